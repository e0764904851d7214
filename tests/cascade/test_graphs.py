"""Evaluations as CUDA graphs: the same estimates, recorded once a shape, without waiting for the device; and what is never recorded."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from t2i_experts.cascade.graphs import GraphedDenoiser
from t2i_experts.cascade.pipeline import CascadePipeline, start_noise
from t2i_experts.types import Conditioning

PROMPTS = ["a red cube", "a green apple on the left of 3 dogs", "", "two of them", "an owl"]


def estimates(pipeline: CascadePipeline, denoise: Callable[..., Tensor], guidance: float) -> list[Tensor]:
    """Pictures of five prompts in the model's own steps."""
    stage = replace(pipeline.base, denoiser=denoise)
    sampling = replace(stage.sampling, guidance=guidance)
    found = []
    for i, prompt in enumerate(PROMPTS):
        noise = start_noise(0, i, stage.noise_shape)[None].to(pipeline.device)
        found.append(stage.sample(noise, pipeline.model.conditioner([prompt]), pipeline.model.conditioner.null(), sampling))
    return found


@pytest.mark.parametrize(
    "case",
    [
        "on the CPU",
        pytest.param("unprepared", marks=pytest.mark.gpu),
        pytest.param("with gradients", marks=pytest.mark.gpu),
    ],
)
def test_what_cannot_be_replayed_is_evaluated_as_ever(model_folder: Path, case: str) -> None:
    device = "cpu" if case == "on the CPU" else "cuda"  # where nothing but the case itself stands in the way
    pipeline = CascadePipeline.from_pretrained(model_folder, device=device, dtype=torch.float32)
    plain = pipeline.base.denoiser.denoiser if isinstance(pipeline.base.denoiser, GraphedDenoiser) else pipeline.base.denoiser
    graphed = GraphedDenoiser(plain)
    conditioning = pipeline.model.conditioner(["a red cube"])
    if case != "unprepared":
        conditioning = graphed.prepare(conditioning)
        assert conditioning.projected
    x, sigma = torch.randn(1, *pipeline.base.noise_shape, device=device), torch.tensor(2.0, dtype=torch.float64)
    with torch.set_grad_enabled(case == "with gradients"):
        assert torch.equal(graphed(x, sigma, conditioning), plain(x, sigma, conditioning))
    assert not graphed._graphs


@pytest.mark.gpu
def test_graphs_agree_with_plain_evaluations_and_are_recorded_once(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # its rounding makes much of little, step after step
    pipeline = CascadePipeline.from_pretrained(model_folder, device="cuda", dtype=torch.float32)
    graphed = pipeline.base.denoiser
    assert isinstance(graphed, GraphedDenoiser)
    for guidance in (1.0, 3.0, 2.5):
        plain = estimates(pipeline, graphed.denoiser, guidance)
        for own, expected in zip(estimates(pipeline, graphed, guidance), plain, strict=True):
            torch.testing.assert_close(own, expected, atol=2e-4, rtol=1e-3)
        assert not torch.equal(plain[0], plain[1])
    assert len(graphed._graphs) == 2 and None not in graphed._graphs.values()  # of one row, and of two


@pytest.mark.gpu
def test_a_replayed_picture_waits_for_nothing(model_folder: Path) -> None:
    pipeline = CascadePipeline.from_pretrained(model_folder, device="cuda")
    stage, null = pipeline.base, pipeline.model.conditioner.null()
    noise = start_noise(0, 0, stage.noise_shape)[None].to(pipeline.device)
    conditionings = [pipeline.model.conditioner([prompt]) for prompt in PROMPTS]
    settings = [
        replace(stage.sampling, guidance=guidance, sigma_max=sigma)
        for guidance, sigma in zip((3, 2, 4, 3.5, 5), (80, 60, 40, 80, 70), strict=True)
    ]
    stage.sample(noise, conditionings[0], null, settings[0])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for conditioning, sampling in zip(conditionings, settings, strict=True):
            stage.sample(noise, conditioning, null, sampling)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_a_network_that_cannot_be_recorded_is_evaluated_with_a_warning(model_folder: Path) -> None:
    pipeline = CascadePipeline.from_pretrained(model_folder, device="cuda", dtype=torch.float32)
    graphed = pipeline.base.denoiser
    assert isinstance(graphed, GraphedDenoiser)
    plain = graphed.denoiser

    def waits(x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        return plain(x, sigma, conditioning) * float(x.new_ones(()))

    conditioning = graphed.prepare(pipeline.model.conditioner(["a red cube"]))
    x, sigma = torch.randn(1, *pipeline.base.noise_shape, device="cuda"), torch.tensor(2.0, dtype=torch.float64)
    stubborn = GraphedDenoiser(waits)
    with torch.no_grad():
        with pytest.warns(UserWarning, match="cannot be recorded"):
            first = stubborn(x, sigma, conditioning)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            torch.testing.assert_close(stubborn(x, sigma, conditioning), first)
        torch.testing.assert_close(first, plain(x, sigma, conditioning), atol=1e-5, rtol=1e-4)
