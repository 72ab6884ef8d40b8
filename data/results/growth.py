"""What a sampled token costs: tokens a second of both samplers, plain and fast.

    python data/results/growth.py [MODEL]      # ten minutes on two CPU cores; prints tables

plain is ampo.generate, fast is data/fast_generate.py. Medians of REPEATS runs, in which the
samplers take turns. The first two tables give no end-of-sequence token, so every rollout runs
to the full length. The third is the task itself; it also counts the rows that went through the
model for these tokens, prompts aside, as rollouts that share a row cost one row together.
(On a CPU: steps that run from a CUDA graph do not pass where they are counted.)
"""
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "data"))
import ampo
import fast_generate

import torch

SAMPLERS = {"plain": ampo.generate, "fast": fast_generate.generate}
GROUP_SIZE = 8  # rollouts a prompt
ROLLOUTS = (8, 16, 32, 64, 128, 256, 512, 1024)  # of 64 tokens each
LENGTHS = (64, 128, 256, 512, 1024, 2048)  # of 64 rollouts
TASKS = ((8, 1.0), (32, 0.6))  # rollouts a prompt and temperature, in training and evaluation
PROMPTS = 32  # of the task
MAX_NEW_TOKENS = 128
REPEATS = 3


def timed(generate, *args):
    """Run generate(*args), always with the same draws. Returns its tokens and seconds."""
    torch.manual_seed(0)
    began = time.perf_counter()
    groups = generate(*args)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    tokens = 0
    for group in groups:
        tokens += sum(len(ids) for ids, _ in group)
    return tokens, seconds


def speeds(*args):
    """Tokens a second of each sampler, called with args."""
    runs = {name: [] for name in SAMPLERS}
    for _ in range(REPEATS):
        for name, generate in SAMPLERS.items():
            tokens, seconds = timed(generate, *args)
            runs[name].append(tokens / seconds)
    return {name: statistics.median(run) for name, run in runs.items()}


def count_rows(model, generate, *args):
    """Rows of one token each that go through the model while generate(model, *args) runs."""
    rows = []

    def note(module, inputs, named_inputs):
        ids = named_inputs["input_ids"]
        if ids.shape[1] == 1:
            rows.append(ids.shape[0])

    hook = model.register_forward_pre_hook(note, with_kwargs=True)
    tokens, _ = timed(generate, model, *args)
    hook.remove()
    return sum(rows), tokens


def print_table(header, columns, results):
    """A table in Markdown. results: for each column, {name of the row: number}."""
    print(f"| {header} | " + " | ".join(columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for name in results[0]:
        cells = [f"{result[name]:,.0f}" for result in results]
        print(f"| {name}, tokens/s | " + " | ".join(cells) + " |")
    print(flush=True)


def print_task(model, prompts, eos_token_id):
    """How fast and with how many rows the task itself is sampled, one line a sampler."""
    print("| the task | sampler | tokens | rows | tokens/s |")
    print("|---|---|---|---|---|")
    for n, temperature in TASKS:
        args = (prompts, n, MAX_NEW_TOKENS, temperature, eos_token_id)
        speed = speeds(model, *args)
        for name, generate in SAMPLERS.items():
            rows, tokens = count_rows(model, generate, *args)
            if torch.cuda.is_available():
                rows = "-"
            case = f"{n} rollouts a prompt, temperature {temperature}"
            print(f"| {case} | {name} | {tokens} | {rows} | {speed[name]:,.0f} |", flush=True)


def main():
    path = str(ROOT / "data" / "base")
    if len(sys.argv) > 1:
        path = sys.argv[1]
    student = ampo.load_student(path, ampo.Config())
    model = student.rollout_model
    prompts = []
    for problem in ampo.load_problems(ROOT / "data" / "train.jsonl")[:max(ROLLOUTS) // GROUP_SIZE]:
        prompts.append(ampo.encode_prompt(student.tokenizer, problem.question))

    device = f"CPU, {torch.get_num_threads()} threads"
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    print(f"{path} on {device}\n")
    speeds(model, prompts[:8], GROUP_SIZE, 64)  # warm up

    results = [speeds(model, prompts[:r // GROUP_SIZE], GROUP_SIZE, 64) for r in ROLLOUTS]
    print_table("rollouts, 64 tokens each", [str(r) for r in ROLLOUTS], results)
    results = [speeds(model, prompts[:64 // GROUP_SIZE], GROUP_SIZE, t) for t in LENGTHS]
    print_table("tokens each, 64 rollouts", [str(t) for t in LENGTHS], results)
    print_task(model, prompts[:PROMPTS], student.eos)


if __name__ == "__main__":
    main()
