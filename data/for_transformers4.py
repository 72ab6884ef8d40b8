"""Rewrites a checkpoint's folder so that transformers 4.57 reads the same model as version 5.

    python data/for_transformers4.py runs/ampo-0/model

Version 5 writes rotary settings under a name that version 4 does not know: it takes its defaults
without a word, and the model is another one. The tokenizer's class does not exist there either.
The new names stay beside the old ones, so that version 5 still reads the folder. Checked on
Qwen 2 and 3, Llama, Mistral, Gemma 2 and 3 and GPT-2, with the rotary scalings that both know.
"""
import json
import sys
from pathlib import Path

# Layers with a window have rotary frequencies of their own in these models.
TWO_FREQUENCIES = ("gemma3_text", "gemma3n_text", "olmo3")


def old_rope_names(config):
    """Rotary settings of a version 5 config.json under the names that version 4 reads."""
    rope = config.get("rope_parameters") or {}
    old = {}
    if config["model_type"] in TWO_FREQUENCIES:
        old["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    for name in ("rope_theta", "partial_rotary_factor"):
        if name in rope:
            old[name] = rope[name]
    if rope.get("rope_type", "default") != "default":
        old["rope_scaling"] = rope
    return old


def old_tokenizer_names(settings, has_fast_file):
    """tokenizer_config.json as both versions read it."""
    settings = dict(settings)
    if has_fast_file:
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # takes all from tokenizer.json
    if isinstance(settings.get("extra_special_tokens"), list):   # version 4 wants a dict there
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    return settings


def rewrite(path, change):
    """Put change(its content) in the place of a JSON file's content."""
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(change(content), indent=2) + "\n", encoding="utf-8")


def convert(folder):
    """Rewrite config.json and tokenizer_config.json of a folder."""
    has_fast_file = (folder / "tokenizer.json").exists()
    rewrite(folder / "config.json", lambda config: config | old_rope_names(config))
    rewrite(
        folder / "tokenizer_config.json",
        lambda settings: old_tokenizer_names(settings, has_fast_file),
    )


if __name__ == "__main__":
    if len(sys.argv) != 2 or not (Path(sys.argv[1]) / "config.json").exists():
        sys.exit("usage: python data/for_transformers4.py FOLDER   (that of a checkpoint)")
    convert(Path(sys.argv[1]))
    print(f"{sys.argv[1]}: transformers 4.57 and 5 read it alike")
