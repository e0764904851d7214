"""From prompt to picture: what a picture depends on, and what it must not depend on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from t2i_experts.cascade.device import default_dtype
from t2i_experts.cascade.pipeline import CascadePipeline, start_noise


@pytest.fixture(scope="module")
def pipeline(model_folder: Path) -> CascadePipeline:
    return CascadePipeline.from_pretrained(model_folder, device="cpu")


def close(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Within 2 of 255, as two batch sizes may differ."""
    return int((first.int() - second.int()).abs().max()) <= 2


def test_noise_belongs_to_seed_and_index() -> None:
    noise = torch.stack([start_noise(seed, index, (3, 32, 32)) for seed, index in [(0, 0), (0, 1), (1, 0), (2**32, 0), (0, 2**32)]])
    assert torch.equal(noise[0], start_noise(0, 0, (3, 32, 32)))
    correlations = torch.corrcoef(noise.flatten(1)) - torch.eye(5)
    assert correlations.abs().max() < 0.1
    assert float(noise.std()) == pytest.approx(1, abs=0.02)
    with pytest.raises(ValueError, match="negative"):
        start_noise(-1, 0, (1,))


def test_a_picture_does_not_depend_on_its_batch(pipeline: CascadePipeline) -> None:
    prompts = ["a red cube", "", "two green apples on the left"]
    together = pipeline(prompts, seed=5)
    assert together.shape == (3, 3, 16, 16)
    assert together.dtype == torch.uint8
    for i, prompt in enumerate(prompts):
        assert close(pipeline(prompt, seed=5, indices=[i])[0], together[i])


def test_seed_prompt_negative_style_and_settings_all_matter(pipeline: CascadePipeline) -> None:
    base = pipeline("a red cube")
    assert torch.equal(pipeline("a red cube"), base)
    others = [
        pipeline("a green apple"),
        pipeline("a red cube", seed=1),
        pipeline("a red cube", negative="a green apple"),
        pipeline("a red cube", style=torch.rand(1, 3, 20, 30) * 2 - 1),
        *(pipeline("a red cube", sampling=pipeline.settings(**{name: value}))  # type: ignore[arg-type]
          for name, value in [("steps", 7), ("guidance", 1.0), ("sampler", "euler"), ("sampler", "heun")]),
    ]  # fmt: skip
    assert not any(torch.equal(other, base) for other in others)


def test_empty_prompt_is_the_null_branch(pipeline: CascadePipeline) -> None:
    """Guidance then steers from null to null: its scale cannot matter."""
    assert close(pipeline("", sampling=pipeline.settings(guidance=1.0)), pipeline("  ", sampling=pipeline.settings(guidance=9.0)))


@pytest.mark.parametrize("prompt", ["word " * 5000, "🍎🐱👩‍👩‍👧", "一只红色的猫", "\x00\ud800", "</s><extra_id_0>"])
def test_no_prompt_is_too_strange(pipeline: CascadePipeline, prompt: str) -> None:
    assert pipeline(prompt).shape == (1, 3, 16, 16)


def test_progress_counts_steps(pipeline: CascadePipeline) -> None:
    seen: list[tuple[int, int]] = []
    pipeline("a", progress=lambda done, steps, denoised: seen.append((done, steps)))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_bfloat16_is_close_to_float32(pipeline: CascadePipeline, model_folder: Path) -> None:
    settings = replace(pipeline.base.sampling, guidance=1.0)
    half = CascadePipeline.from_pretrained(model_folder, device="cpu", dtype=torch.bfloat16)
    difference = (half("a red cube", sampling=settings).int() - pipeline("a red cube", sampling=settings).int()).float()
    assert difference.abs().mean() < 8


def test_it_says_what_it_computes_on_and_in(pipeline: CascadePipeline, model_folder: Path) -> None:
    assert (pipeline.device, pipeline.dtype) == (torch.device("cpu"), default_dtype(torch.device("cpu")))
    half = CascadePipeline.from_pretrained(model_folder, device="cpu", dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert {p.dtype for p in half.base.denoiser.parameters()} == {half.dtype}  # type: ignore[attr-defined]


def test_wrong_input(pipeline: CascadePipeline, model_folder: Path) -> None:
    with pytest.raises(ValueError, match="indices"):
        pipeline(["a", "b"], indices=[1])
    with pytest.raises(ValueError, match="sampler"):
        pipeline("a", sampling=pipeline.settings(sampler="dpmp_2m"))
    with pytest.raises(ValueError, match="steps"):
        pipeline("a", sampling=pipeline.settings(steps=0))
    with pytest.raises(ValueError, match="device"):
        CascadePipeline.from_pretrained(model_folder, device="cuda:99")
