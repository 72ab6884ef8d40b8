"""Tests of data/faithful.py: an update is the published one, and the comparison can tell."""
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parent))
import faithful

import pytest


@pytest.fixture(scope="module")
def prepared():
    """{row: (student, groups)} on three problems, one of which nobody solved."""
    return {row: faithful.prepare(row, 3) for row in faithful.FORMULAS}


@pytest.mark.parametrize("row", faithful.FORMULAS, ids=" ".join)
def test_an_update_is_the_published_one(prepared, row):
    cosine, difference, clipped = faithful.compare(*prepared[row], faithful.FORMULAS[row])
    assert cosine > 0.9999
    assert abs(difference) < 1e-3
    if row[0] != "luffy":
        assert clipped > 0, "the clip acts, so that it is compared as well"
    samples = sum(prepared[row][1], [])
    has_guidance = row[0] in ("luffy", "ampo", "guide")
    assert any(sample.off_policy for sample in samples) == has_guidance


@pytest.mark.parametrize("row, other", [
    (("ampo", "code"), ("luffy", "code")), (("guide", "code"), ("grpo", "paper")),
    (("luffy", "paper"), ("luffy", "code")),
], ids=str)
def test_another_formula_is_told_apart(prepared, row, other):
    cosine, difference, _ = faithful.compare(*prepared[row], faithful.FORMULAS[other])
    assert cosine < 0.9999 or abs(difference) > 1e-3
