"""Quantiles, and what the run of an expert alone needs."""

from __future__ import annotations

from fractions import Fraction

import pytest

from t2i_experts.config import load_config
from t2i_experts.config.expert_rules import read_quantiles, whole

PREVIEW = "training.preview.every_images=0"


@pytest.mark.parametrize(
    ("given", "read"),
    [("[]", (0, 1)), ("[0, 1]", (0, 1)), ("[511/512, 1]", (Fraction(511, 512), 1)), ("[0.1, 0.30]", (Fraction(1, 10), Fraction(3, 10)))],
)
def test_quantiles_are_exact(given: str, read: tuple[Fraction, Fraction]) -> None:
    quantiles = load_config("tiny/base64", [PREVIEW, f"stage.noise.quantiles={given}"]).stage.noise.quantiles
    assert read_quantiles(quantiles, "here") == read and whole(quantiles) == (read == (0, 1))


@pytest.mark.parametrize(
    "given", ["[0]", "[0, 1/2, 1]", "[1/2, 1/2]", "[1/2, 1/4]", "[-0.1, 1]", "[0, 1.01]", "[0, 1/0]", "[a, b]", "[nan, 1]"]
)
def test_wrong_quantiles_are_named(given: str) -> None:
    with pytest.raises(ValueError, match=r"stage\.noise\.quantiles=\[.*\] must be two numbers or fractions .* 0 <= u_lo < u_hi <= 1"):
        load_config("tiny/base64", [PREVIEW, f"stage.noise.quantiles={given}"])


def test_an_experts_previews_need_a_model_for_all_other_noise() -> None:
    part = "stage.noise.quantiles=[0, 1/2]"
    with pytest.raises(ValueError, match=r"preview\.every_images=2000: .* draws no picture alone; name a model"):
        load_config("tiny/base64", [part])
    for remedy in ("training.initial=a", "training.preview.around=a", PREVIEW):
        load_config("tiny/base64", [part, remedy])
    with pytest.raises(ValueError, match=r"preview\.around='a' would be ignored"):
        load_config("tiny/base64", ["training.preview.around=a"])


def test_projections_need_whole_matrices() -> None:
    both = [PREVIEW, "training.initial=embedded", "training.rank=2", "training.decouple.projections=true"]
    with pytest.raises(ValueError, match=r"training\.decouple\.projections=true .* training\.rank=2"):
        load_config("tiny/base64", both)
