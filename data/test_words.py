"""Tests of words.py, and of ampo.py on a model like the one that those problems are for.

The real weights take part where data/smollm.py has left its folder, or SMOLLM2 names another one.
"""
import json
import os
import re
import sys
from collections import Counter
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import ampo
sys.path.insert(0, str(HERE))
import words

SETS = ("train", "valid", "test", "ood_longer")
REAL = Path(os.environ.get("SMOLLM2", HERE / "smollm2"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The four files, as the command makes them."""
    folder = tmp_path_factory.mktemp("words")
    words.main(["--out", str(folder)])
    return folder


@pytest.fixture(scope="module")
def sets(folder):
    """{name: rows} as they were written."""
    found = {}
    for name in SETS:
        lines = (folder / f"{name}.jsonl").read_text().splitlines()
        found[name] = [json.loads(line) for line in lines]
    return found


def numbers_of(text):
    """All numbers in a text, in order."""
    return [int(digits) for digits in re.findall(r"\d+", text)]


def losses_of(row):
    """How many numbers go, read off the verbs of the story."""
    return len(re.findall(r"gives away|takes out|sold|get off|drops|fly off|leak", row["question"]))


def told_answer(row):
    """The answer worked out from the story alone, sentence by sentence."""
    total = 0
    for sentence in re.split(r"(?<=[.?]) ", row["question"]):
        number = sum(numbers_of(sentence))
        total += -number if losses_of({"question": sentence}) else number
    return total


def able(row):
    """The rule of words.py's docstring, from the story alone."""
    count = len(numbers_of(row["question"]))
    losses = losses_of(row)
    names = {
        "steps": count <= 3,
        "prose": losses <= 1,
        "places": losses == 0,
        "sides": count >= 3 and losses >= 1,
    }
    return {name for name, can in names.items() if can}


class Test_sets:
    def test_the_answer_is_that_of_the_story(self, sets):
        for row in sum(sets.values(), []):
            assert row["answer"] == str(told_answer(row)), row["question"]
            assert 1 <= len(row["answer"]) <= 3

    def test_every_trace_and_solution_is_right(self, sets):
        for row in sum(sets.values(), []):
            for text in [*row["teachers"].values(), row["solution"]]:
                assert ampo.verify(text, row["answer"], row["question"]), text

    def test_every_equation_in_a_trace_is_true(self, sets):
        for row in sum(sets.values(), []):
            text = "\n".join([*row["teachers"].values(), row["solution"]])
            for left, right in re.findall(r"^([\d+-]+)=(\d+)$", text, re.MULTILINE):
                terms = re.findall(r"[+-]?\d+", left)
                assert sum(map(int, terms)) == int(right), text

    def test_a_teacher_does_the_forms_of_its_rule_and_no_other(self, sets):
        for row in sum(sets.values(), []):
            assert set(row["teachers"]) == able(row), row["question"]

    def test_each_training_problem_has_a_teacher_and_no_teacher_has_all(self, sets):
        done = Counter()
        for row in sets["train"]:
            done.update(list(row["teachers"]))
            assert row["teachers"]
        assert len(done) == 4
        assert all(0.2 < times / len(sets["train"]) < 0.85 for times in done.values())

    def test_the_same_answer_every_time_is_right_in_under_2_percent(self, sets):
        for name, rows in sets.items():
            (_, times), = Counter(row["answer"] for row in rows).most_common(1)
            assert times / len(rows) < 0.02, name

    def test_a_number_of_the_question_is_never_the_answer(self, sets):
        for row in sum(sets.values(), []):
            assert int(row["answer"]) not in numbers_of(row["question"])

    def test_no_two_problems_have_the_same_numbers(self, sets):
        seen = Counter()
        for row in sum(sets.values(), []):
            signed = (tuple(numbers_of(row["question"])), row["form"])
            seen[signed] += 1
        assert max(seen.values()) == 1

    def test_longer_sums_are_longer_and_worded_otherwise(self, sets):
        def skeleton(row):
            return set(re.sub(r"\d+", "N", row["question"]).split(". ")[:-1])

        known = set()
        for row in sets["train"]:
            known |= skeleton(row)
            assert len(numbers_of(row["question"])) <= 4
        for row in sets["ood_longer"]:
            assert not skeleton(row) & known - {"Put the answer in \\boxed{}"}
            assert len(numbers_of(row["question"])) == 5

    def test_a_hint_holds_the_question_and_not_the_answer(self, sets):
        for row in sum(sets.values(), []):
            question, _, hint = row["hint"].partition("\nHint: ")
            assert question == row["question"]
            assert int(row["answer"]) not in numbers_of(hint)

    def test_the_question_asks_for_a_box(self, sets):
        assert all("\\boxed{}" in row["question"] for row in sum(sets.values(), []))

    def test_the_same_seed_gives_the_same_bytes(self, folder, tmp_path):
        words.main(["--out", str(tmp_path / "again")])
        words.main(["--out", str(tmp_path / "other"), "--seed", "2"])
        for name in SETS:
            file = f"{name}.jsonl"
            before = (folder / file).read_bytes()
            assert (tmp_path / "again" / file).read_bytes() == before
            assert (tmp_path / "other" / file).read_bytes() != before

    def test_load_problems_reads_them(self, folder):
        for name in SETS:
            problems = ampo.load_problems(folder / f"{name}.jsonl")
            assert all(problem.hint and problem.solution for problem in problems)


# -------------------------------------------------------------------------------------------------
# A model like SmolLM2

# Like its template, this one writes a system prompt where the messages have none.
TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A random Llama with tied embeddings and grouped queries; padding and end share a token."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    texts = [f"{scene.start} {scene.gain} {scene.loss} {scene.ask}" for scene in words.SCENES]
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        chat_template=TEMPLATE,
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    folder = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def train_once(model, folder, out, method, *flags):
    """One step of training on a few of the problems. Returns its metrics."""
    lines = (folder / "train.jsonl").read_text().splitlines(keepends=True)
    few = folder / "few.jsonl"
    few.write_text("".join(lines[:12]))
    status = ampo.main([
        "--method", method, "--model", str(model), "--data", str(few),
        "--out", str(out), "--steps", "1", "--prompts_per_step", "2", "--group_size", "2",
        "--num_minibatches", "1", "--eval_every", "0", *flags,
    ])
    assert status == 0
    (line,) = (out / "metrics.jsonl").read_text().splitlines()
    return json.loads(line)


class Test_like_smollm2:
    @pytest.mark.parametrize("method", ["grpo", "luffy", "ampo", "guide", "ghpo", "sft"])
    def test_one_step(self, checkpoint, folder, tmp_path, method):
        metrics = train_once(
            checkpoint, folder, tmp_path, method, "--max_new_tokens", "90", "--k", "1"
        )
        teachers = sum(metrics["sources"].get(name, 0) for name in words.TEACHERS)
        # A random model fails every group: AMPO and LUFFY give each of the two problems a trace.
        wanted = {"grpo": 0, "guide": 0, "ghpo": 0, "luffy": 2, "ampo": 2}
        assert teachers == wanted.get(method, teachers)
        assert (teachers > 0) == (method in ("luffy", "ampo", "sft"))
        assert (metrics["grad_norm"] > 0) == (teachers > 0)

    def test_what_is_saved_stays_tied_and_ends_with_im_end(self, checkpoint, folder, tmp_path):
        flags = "--max_new_tokens 90 --lr 0.01 --k 1"
        train_once(checkpoint, folder, tmp_path, "ampo", *flags.split())
        before, _ = ampo.load_model(str(checkpoint))
        after, tokenizer = ampo.load_model(str(tmp_path / "model"))
        assert after.lm_head.weight is after.model.embed_tokens.weight
        assert not torch.equal(after.lm_head.weight, before.lm_head.weight)
        assert ampo.end_tokens(after, tokenizer) == [tokenizer.convert_tokens_to_ids("<|im_end|>")]

    def test_a_system_prompt_takes_the_place_of_the_template_s(self, checkpoint):
        _, tokenizer = ampo.load_model(str(checkpoint))
        plain = tokenizer.decode(ampo.encode_prompt(tokenizer, "4+4?"))
        own = tokenizer.decode(ampo.encode_prompt(tokenizer, "4+4?", "Be short."))
        assert "You are a helpful assistant." in plain
        assert "helpful" not in own
        assert "Be short." in own


@pytest.fixture(scope="module")
def loaded():
    """Model and tokenizer of the real weights."""
    return ampo.load_model(str(REAL))


@pytest.mark.skipif(not REAL.exists(), reason="data/smollm.py makes the folder")
class Test_real_weights:
    def test_it_answers_a_question_and_stops(self, loaded):
        model, tokenizer = loaded
        end = ampo.end_tokens(model, tokenizer)
        prompt = ampo.encode_prompt(tokenizer, "What is the capital of France?")
        (((ids, _),),) = ampo.generate(model, [prompt], 1, 12, 0, end)
        assert ids[-1:] == end[:1]
        assert "Paris" in tokenizer.decode(ids)

    def test_digits_are_cut_apart_from_what_stands_before(self, loaded):
        _, tokenizer = loaded
        two_breaks = tokenizer("\n\n").input_ids
        one_and_two = tokenizer("1").input_ids + tokenizer("2").input_ids
        assert tokenizer("\n\n12").input_ids == two_breaks + one_and_two

    def test_all_traces_end_within_48_tokens(self, loaded, sets):
        _, tokenizer = loaded
        for row in sum(sets.values(), []):
            for text in [*row["teachers"].values(), row["solution"]]:
                assert len(tokenizer(text).input_ids) + 1 <= 48

    def test_sampled_and_scored_alike(self, loaded, sets):
        model, tokenizer = loaded
        prompts = [ampo.encode_prompt(tokenizer, row["question"]) for row in sets["test"][:2]]
        groups = ampo.generate(model, prompts, 1, 4)
        responses = [ids for (ids, _), in groups]
        sampled = torch.tensor([logps for (_, logps), in groups])
        with torch.no_grad():
            scored, _ = ampo.token_logps(model, prompts, responses)
        assert torch.allclose(scored, sampled, atol=1e-3)

    @pytest.mark.skipif("SMOLLM2_STEP" not in os.environ, reason="a minute, and 1.6 GB of disk")
    def test_one_step(self, folder, tmp_path):
        metrics = train_once(REAL, folder, tmp_path, "ampo", "--max_new_tokens", "48")
        assert metrics["rescued"] == metrics["fail_rate"] == 1
        assert metrics["grad_norm"] > 0
