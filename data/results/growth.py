"""How the cost of sampling grows: tokens a second of ampo.generate against the number of rows and the length.

    python data/results/growth.py            # a few minutes on two CPU cores; prints the table of growth.md

No end-of-sequence token is given, so every row runs to the full length. Medians of REPEATS runs.
"""
import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import ampo

ROWS, LENGTHS, REPEATS, GROUP = (8, 16, 32, 64, 128, 256, 512, 1024), (64, 128, 256, 512, 1024, 2048), 3, 8


def speed(student, problems, rows, length):
    """Tokens a second for `rows` responses of `length` tokens each."""
    prompts = [ampo.encode_prompt(student.tokenizer, p.question) for p in problems[:rows // GROUP]]
    seconds = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        ampo.generate(student.sampler, prompts, GROUP, length)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return rows * length / statistics.median(seconds)


def main():
    model = sys.argv[1] if len(sys.argv) > 1 else str(ROOT / "data" / "base")
    student = ampo.load_student(model, ampo.Config())
    problems = ampo.load_problems(ROOT / "data" / "train.jsonl")
    speed(student, problems, 64, 64)  # warm up
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    print(f"{model} on {device}\n\n| rows, 64 tokens each | " + " | ".join(map(str, ROWS)) + " |")
    print("|---" * (len(ROWS) + 1) + "|")
    print("| tokens/s | " + " | ".join(f"{speed(student, problems, rows, 64):,.0f}" for rows in ROWS) + " |\n")
    print("| tokens each, 64 rows | " + " | ".join(map(str, LENGTHS)) + " |\n" + "|---" * (len(LENGTHS) + 1) + "|")
    print("| tokens/s | " + " | ".join(f"{speed(student, problems, 64, length):,.0f}" for length in LENGTHS) + " |")


if __name__ == "__main__":
    main()
