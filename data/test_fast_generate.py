"""Tests of what only data/fast_generate.py does: the slab, the window, graphs and shared rows.

What every sampler must do is tested in test_ampo.py, class Test_generate, which
test_same_tests_as_the_plain_one runs on this sampler. Two oracles here: forward passes of
transformers without cache or padding, and ampo.generate with the same seed, as both samplers
draw one random number a running rollout, in the same order.
"""
import json
import math
import os
import runpy
import subprocess
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "data"))
import ampo
import fast_generate

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, Cache, DynamicLayer

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15], [16]]  # unequal: short ones are padded
STOPS = [20, 21, 22]


def random_model(kind, **settings):
    """A tiny model with weights so large that predictions are peaked and depend on context."""
    torch.manual_seed(1)
    config = AutoConfig.for_model(kind, vocab_size=60, bos_token_id=None, eos_token_id=1,
                                  pad_token_id=1, initializer_range=0.3, **settings)
    return AutoModelForCausalLM.from_config(config).eval()


def tiny(kind, **settings):
    """A tiny model of the Llama family: grouped-query attention, rotary positions."""
    return random_model(kind, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                        num_attention_heads=4, num_key_value_heads=2,
                        max_position_embeddings=256, **settings)


@pytest.fixture(scope="module")
def model():
    return tiny("qwen2")


@pytest.fixture(scope="module")
def learned_positions():
    """Learned positions, as GPT-2 has them, show a shift that rotary ones hide."""
    return random_model("gpt2", n_embd=32, n_layer=2, n_head=4, n_positions=128)


@pytest.fixture
def nan_memory(monkeypatch):
    """New memory holds NaN, so that a slot that is read before it is written shows."""
    new_empty = torch.Tensor.new_empty

    def new_nan(x, *size, **options):
        return new_empty(x, *size, **options).fill_(math.nan)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_nan)


@torch.no_grad()
def next_logits(model, ids):
    """Logits (V,) of the token after ids, from a forward pass without cache or padding."""
    return model(torch.tensor([ids])).logits[0, -1]


@torch.no_grad()
def assert_exact(model, prompts, groups, temperature):
    """Every log-probability is that of a forward pass without cache or padding."""
    for prompt, group in zip(prompts, groups):
        for ids, logps in group:
            logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1:-1]
            wanted = (logits / temperature).log_softmax(-1)
            wanted = wanted.gather(1, torch.tensor(ids)[:, None])[:, 0]
            assert logps == pytest.approx(wanted.tolist(), abs=1e-4)


def ids_of(groups):
    """The ids of all responses of all groups, in one list."""
    responses = []
    for group in groups:
        responses += [ids for ids, _ in group]
    return responses


def lengths_of(groups):
    return [len(ids) for ids in ids_of(groups)]


@torch.inference_mode()
def decode(model, n, max_new_tokens, temperature, span=1, graphs=False):
    """fast_generate.generate with a window and graphs of one's choice. Seed 0."""
    torch.manual_seed(0)
    decoder = fast_generate.Decoder(model, PROMPTS, n, max_new_tokens, span, graphs)
    stops = torch.tensor(STOPS)
    all_ids, all_logps, lengths = fast_generate.sample(decoder, n, max_new_tokens,
                                                       temperature, stops)
    pairs = []
    for i, length in enumerate(lengths.tolist()):
        ids = all_ids[i, :length].tolist()
        logps = all_logps[i, :length].tolist()
        pairs.append((ids, logps))
    return [pairs[:n], pairs[n:2 * n], pairs[2 * n:]]


def plain(model, n, max_new_tokens, temperature):
    torch.manual_seed(0)
    return ampo.generate(model, PROMPTS, n, max_new_tokens, temperature, STOPS)


def watch(model, monkeypatch):
    """A list that gets the (rows, tokens a row, width of the mask) of each forward pass."""
    seen = []
    forward = model.forward

    def noted(*args, **inputs):
        if "attention_mask" in inputs:  # a sampler's, not an oracle's
            rows, tokens = inputs["input_ids"].shape
            seen.append((rows, tokens, inputs["attention_mask"].shape[-1]))
        return forward(*args, **inputs)

    monkeypatch.setattr(model, "forward", noted)
    return seen


# ---------------------------------------------------------------------------------------
# The slab


class Test_Slab:
    def slab(self, n=3, slots=8):
        """Two prompts of 5 tokens, 3 heads of size 4; the next token goes into slot 5."""
        keys = torch.randn(2, 3, 5, 4)
        values = torch.randn(2, 3, 5, 4)
        layer = DynamicLayer()
        layer.update(keys, values)
        slab = fast_generate.Slab(layer, 2 * n, slots, torch.tensor([5]))
        return slab, keys, values

    def test_begins_with_the_prompts(self):
        slab, keys, values = self.slab()
        assert isinstance(slab, DynamicLayer)
        assert torch.equal(slab.keys, keys)
        assert torch.equal(slab.values, values)

    @pytest.mark.parametrize("rows", [[0, 1], [1, 0, 0, 1, 1], [1], [0, 0, 0, 1, 1, 1]], ids=str)
    def test_rows_are_copied_in_memory_that_stays(self, nan_memory, rows):
        slab, keys, values = self.slab()
        places = [slab.keys.data_ptr(), slab.values.data_ptr()]
        slab.regroup(torch.tensor(rows))
        assert torch.equal(slab.keys, keys[rows])
        assert torch.equal(slab.values, values[rows])
        assert [slab.keys.data_ptr(), slab.values.data_ptr()] == places

    def test_new_slots_of_the_window_are_zero(self, nan_memory):
        slab, keys, values = self.slab()
        slab.regroup(torch.tensor([1, 0, 1]))
        slab.open_window(7)
        zeros = torch.zeros(3, 3, 2, 4)
        for x, prompts in ((slab.keys, keys), (slab.values, values)):
            assert torch.equal(x[:, :, :5], prompts[[1, 0, 1]])
            assert torch.equal(x[:, :, 5:], zeros)

    def test_a_step_writes_one_slot_and_sees_the_window(self):
        slab, keys, values = self.slab()
        slab.open_window(8)
        slab.slot += 1  # as whoever samples moves it on: slot 6
        new_keys = torch.randn(2, 3, 1, 4)
        new_values = torch.randn(2, 3, 1, 4)
        seen = slab.update(new_keys, new_values)
        for x, prompts, new in zip(seen, (keys, values), (new_keys, new_values)):
            wanted = torch.zeros(2, 3, 8, 4)
            wanted[:, :, :5] = prompts
            wanted[:, :, 6:7] = new
            assert torch.equal(x, wanted)

    def test_what_was_written_moves_with_its_row(self):
        slab, _, _ = self.slab()
        slab.open_window(6)
        keys = torch.randn(2, 3, 1, 4)
        values = torch.randn(2, 3, 1, 4)
        slab.update(keys, values)
        slab.regroup(torch.tensor([1, 1, 0]))
        assert torch.equal(slab.keys[:, :, 5:], keys[[1, 1, 0]])
        assert torch.equal(slab.values[:, :, 5:], values[[1, 1, 0]])

    def test_serves_as_a_layer_of_a_cache(self):
        slab, _, _ = self.slab()
        slab.open_window(6)
        cache = Cache(layers=[slab])
        new = torch.randn(2, 3, 1, 4)
        keys, values = cache.update(new, -new, 0)
        assert torch.equal(keys[:, :, 5:], new)
        assert torch.equal(values[:, :, 5:], -new)
        assert isinstance(cache.get_seq_length(), int), "models may ask the cache for its length"


# ---------------------------------------------------------------------------------------
# The decoder: prompts, steps, window


class Test_Decoder:
    @pytest.mark.parametrize("span", [1, 4, 32])
    @pytest.mark.parametrize("kind", ["model", "learned_positions"])
    @torch.inference_mode()
    def test_logits_are_those_of_an_unpadded_forward_pass(self, nan_memory, request, kind, span):
        """After the prompts and after steps, between which rows are copied and dropped."""
        model = request.getfixturevalue(kind)
        decoder = fast_generate.Decoder(model, PROMPTS, 3, 12, span, graphs=False)
        texts = [list(prompt) for prompt in PROMPTS]
        for rows in ([0, 1, 2], [2, 2, 0, 1, 1, 1, 0], [0, 1, 3, 6], [3], [0, 0, 0], [2, 1]):
            wanted = [next_logits(model, text) for text in texts]
            assert torch.allclose(decoder.logits, torch.stack(wanted), atol=1e-4)
            decoder.regroup(torch.tensor(rows))
            new_rows = torch.arange(len(rows))
            decoder.step(new_rows, new_rows + 30)
            texts = [texts[row] + [i + 30] for i, row in enumerate(rows)]

    @torch.inference_mode()
    def test_several_rollouts_may_read_one_row_and_none_another(self, model):
        decoder = fast_generate.Decoder(model, PROMPTS, 3, 12, span=1, graphs=False)
        logits = decoder.step(torch.tensor([2, 2, 0]), torch.tensor([31, 31, 40]))
        for row, token in ((2, 31), (0, 40)):
            wanted = next_logits(model, PROMPTS[row] + [token])
            assert torch.allclose(logits[row], wanted, atol=1e-4)

    @pytest.mark.parametrize("span, widths", [
        (1, [9, 10, 11, 12, 13, 14]),
        (4, [12, 12, 12, 12, 16, 16]),
    ])
    def test_the_window_opens_by_a_span(self, model, monkeypatch, span, widths):
        seen = watch(model, monkeypatch)
        decode(model, 2, 7, temperature=0, span=span)
        assert seen[0] == (3, 8, 8)
        assert [width for _, _, width in seen[1:]] == widths

    @pytest.mark.parametrize("span, slots", [(1, 20), (16, 32), (20, 20)])
    @torch.inference_mode()
    def test_reserves_whole_spans_for_all_rollouts(self, model, span, slots):
        """The longest prompt has 8 tokens, a response at most 12."""
        decoder = fast_generate.Decoder(model, PROMPTS, 5, 12, span, graphs=False)
        slab = decoder.cache.layers[0].key_slab
        assert slab.shape[0] == 3 * 5
        assert slab.shape[2] == slots

    def test_on_the_cpu_the_window_opens_slot_by_slot_without_graphs(self, model, monkeypatch):
        seen = watch(model, monkeypatch)
        monkeypatch.delattr(torch.cuda, "CUDAGraph")
        fast_generate.generate(model, PROMPTS, 2, 7)
        assert [width for _, _, width in seen[1:]] == [9, 10, 11, 12, 13, 14]

    def test_a_model_without_keys_and_values_is_an_input_error(self):
        model = random_model("rwkv", hidden_size=32, num_hidden_layers=2)
        with pytest.raises(ampo.InputError, match="rwkv"):
            fast_generate.generate(model, PROMPTS, 1, 3)


# ---------------------------------------------------------------------------------------
# What a CUDA graph does, without CUDA


class Tape(TorchDispatchMode):
    """Stands in for torch.cuda.CUDAGraph: operations on the very tensors that they saw."""

    def __init__(self):
        super().__init__()
        self.operations = []
        self.made = []  # tensors that the operations returned

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        synchronises = operation is torch.ops.aten._local_scalar_dense.default
        assert not synchronises, "a graph cannot read a number back"
        out = operation(*args, **kwargs or {})
        self.operations.append((operation, args, kwargs or {}, out))
        self.made += tensors(out)
        return out

    def replay(self):
        for operation, args, kwargs, out in self.operations:
            again = operation(*args, **kwargs)
            for old, new in zip(tensors(out), tensors(again)):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)

    def read_from_outside(self):
        """Addresses of the memory that the operations use and did not make."""
        used = []
        for _, args, kwargs, _ in self.operations:
            used += tensors((args, kwargs))
        return memory_of(used) - memory_of(self.made)


def tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def memory_of(some_tensors):
    return {x.untyped_storage().data_ptr() for x in some_tensors}


@pytest.fixture
def tapes(monkeypatch):
    """Tapes take the place of CUDA graphs; a list of all that were recorded."""
    recorded = []

    class Graph(Tape):
        def __exit__(self, *error):
            super().__exit__(*error)
            self.made[-1].fill_(math.nan)  # the logits: recording computes nothing
            recorded.append(self)

    def graph(tape):
        return tape

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    return recorded


class Test_graphs:
    @pytest.mark.parametrize("span", [16, 64])
    def test_steps_run_again_from_a_recording(self, model, monkeypatch, nan_memory, tapes, span):
        """A tensor that is rebound, or a number from Python, would stay what it was."""
        seen = watch(model, monkeypatch)
        groups = decode(model, 10, 60, 1.0, span, graphs=True)
        calls = len(seen)
        steps = max(lengths_of(groups)) - 1
        assert len(tapes) > 2, "recorded again where rows or the window changed"
        assert calls < 1 + steps, "most steps call no Python of the model"
        assert {width % span for _, _, width in seen[1:]} == {0}
        assert ids_of(groups) == ids_of(plain(model, 10, 60, 1.0))
        assert_exact(model, PROMPTS, groups, 1.0)

    @torch.inference_mode()
    def test_a_recorded_step_reads_and_writes_static_memory_only(self, model, tapes):
        """The model's weights, and tensors of the decoder that stay until it forgets a graph."""
        decoder = fast_generate.Decoder(model, PROMPTS, 2, 40, 32, graphs=True)
        static = [*model.parameters(), *model.buffers()]
        static += [decoder.ids, decoder.positions, decoder.bias, decoder.slot]
        for layer in decoder.cache.layers:
            static += [layer.keys, layer.values]
        row = torch.arange(3)
        decoder.step(row, row)
        assert len(tapes) == 0, "a first step is not recorded"
        for token in range(30, 36):
            decoder.step(row, token + row)
        assert len(tapes) == 1, "one recording serves for as long as nothing changes"
        assert tapes[0].read_from_outside() <= memory_of(static)

    @pytest.mark.parametrize("change", ["regroup", "open_window"])
    @torch.inference_mode()
    def test_a_change_of_shapes_ends_a_graph(self, model, tapes, change):
        decoder = fast_generate.Decoder(model, PROMPTS, 2, 40, 16, graphs=True)
        row = torch.arange(3)
        for _ in range(3):
            decoder.step(row, row)
        assert decoder.graph is not None
        if change == "regroup":
            decoder.regroup(torch.tensor([0, 0, 1, 2]))
        if change == "open_window":
            decoder.open_window()
        assert decoder.graph is None


# ---------------------------------------------------------------------------------------
# Shared rows


def running_pasts(groups, t):
    """(prompt, first t tokens) of every response that has not stopped by then."""
    pasts = []
    for i, group in enumerate(groups):
        for ids, _ in group:
            said = ids[:t]
            if not set(said) & set(STOPS):
                pasts.append((i, tuple(said)))
    return pasts


class Test_generate:
    @pytest.mark.parametrize("span", [1, 3, 16, 64])
    @pytest.mark.parametrize("temperature", [1.0, 0.5])
    def test_says_what_the_plain_one_says(self, model, nan_memory, span, temperature):
        """Sharing changes nothing: every rollout draws its own tokens, as in a row of its own."""
        groups = decode(model, 10, 60, temperature, span)
        wanted = plain(model, 10, 60, temperature)
        assert ids_of(groups) == ids_of(wanted)
        assert_exact(model, PROMPTS, groups, temperature)
        lengths = lengths_of(groups)
        assert len(set(lengths)) > 8, "they end at different lengths"
        assert max(lengths) > 3 * 16, "the window of 16 slots opened several times"

    def test_rollouts_that_said_the_same_share_a_row(self, model, monkeypatch):
        seen = watch(model, monkeypatch)
        groups = decode(model, 20, 60, temperature=0.3)
        assert seen[0] == (3, 8, 8), "each prompt is read once"
        assert {tokens for _, tokens, _ in seen[1:]} == {1}
        assert len(seen) == max(lengths_of(groups))
        shared = 0
        for t, (rows, _, _) in enumerate(seen[1:], 1):
            running = running_pasts(groups, t)
            pasts = len(set(running))
            shared += len(running) - pasts
            # a row for each past, and no more than so many that nobody reads
            assert pasts <= rows <= max(pasts / fast_generate.LEAST_SHARE, 1)
        assert shared > 100, "a test that shares little"

    @pytest.mark.parametrize("kind", ["mistral", "gemma3_text"])
    def test_sliding_windows_are_left_to_the_plain_one(self, kind):
        model = tiny(kind, head_dim=8, sliding_window=16)
        torch.manual_seed(0)
        groups = fast_generate.generate(model, PROMPTS, 4, 30, 0.7, STOPS)
        assert groups == plain(model, 4, 30, 0.7)
        assert_exact(model, PROMPTS, groups, 0.7)


def test_same_tests_as_the_plain_one(tmp_path):
    """test_ampo.py takes its sampler from the file that AMPO_SAMPLER names."""
    sampler = tmp_path / "sampler.py"
    called = tmp_path / "called"
    sampler.write_text(f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(ROOT / "data")!r})
import fast_generate

def generate(*args, **kwargs):
    Path({str(called)!r}).touch()
    return fast_generate.generate(*args, **kwargs)
""")
    environment = dict(os.environ, AMPO_SAMPLER=str(sampler))
    command = [sys.executable, "-m", "pytest", "-q", "test_ampo.py", "-k", "Test_generate"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert called.exists(), "the tests did not use the sampler they were given"


def test_runs_ampo_under_its_own_flags(monkeypatch, tmp_path, capsys):
    samplers = []
    main = ampo.main

    def watched(argv, sampler):
        samplers.append(sampler.__module__)
        return main(argv, sampler)

    lines = (ROOT / "data" / "train.jsonl").read_text().splitlines()[:3]
    data = tmp_path / "problems.jsonl"
    data.write_text("\n".join(lines))
    argv = ["fast_generate.py", "eval", "--model", str(ROOT / "data" / "base"),
            "--data", str(data), "--samples", "2"]
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(ampo, "main", watched)
    monkeypatch.setitem(sys.modules, "ampo", ampo)  # other tests may have loaded another
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "data" / "fast_generate.py"), run_name="__main__")
    assert end.value.code == 0
    assert samplers == ["__main__"], "the generate of the file that was run"
    scores = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert scores["n"] == 3
    assert "pass@2" in scores
