"""Validation: fixed, fair over noise levels, and sensitive to captions."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest
import torch
from torch import Tensor

from t2i_experts.conditioning.conditioner import TextConditioner
from t2i_experts.config import StageConfig
from t2i_experts.diffusion.noise import LogNormalSigma
from t2i_experts.experts.interval import NoiseInterval
from t2i_experts.shards.reader import RawSample, ShardReader, Unreadable, UnreadableSample
from t2i_experts.training.task import DiffusionTask
from t2i_experts.training.validation import fixed_sigmas, standard_error, validate
from t2i_experts.types import Conditioning


@pytest.fixture(scope="module")
def task(stage_config: StageConfig) -> DiffusionTask:
    return DiffusionTask(stage_config, TextConditioner.from_config(stage_config.encoders), seed=0, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def reader(shards: Path) -> ShardReader:
    return ShardReader([shards / "validation"], size=16, seed=0)


def word_counting(x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
    """A denoiser whose answer depends on each row's text and noise, and on nothing else."""
    tokens = conditioning.embeddings["t5"].tokens
    return x / (1 + sigma[:, None, None, None] ** 2) + tokens.mean(dim=(1, 2))[:, None, None, None]


@pytest.mark.parametrize(("u_lo", "u_hi"), [(0, 1), (0, Fraction(1, 8)), (Fraction(511, 512), 1), (Fraction(1, 3), Fraction(2, 3))])
def test_sigmas_fill_equally_probable_bins(u_lo: Fraction, u_hi: Fraction) -> None:
    interval = NoiseInterval(Fraction(u_lo), Fraction(u_hi))
    sigmas = torch.stack([fixed_sigmas(interval, i, 4) for i in range(200)])
    assert sigmas.dtype == torch.float32 and interval.contains(sigmas).all()
    edges = torch.tensor(interval.edges(4), dtype=torch.float64)
    assert ((sigmas > edges[:-1]) & (sigmas < edges[1:])).all()
    quantiles = (LogNormalSigma().cdf(sigmas) - float(u_lo)) / float(interval.share)
    assert torch.equal((quantiles * 4).long(), torch.arange(4).expand(200, 4))
    inside = ((quantiles * 4) % 1)[:, 0].sort().values
    torch.testing.assert_close(inside, (torch.arange(200, dtype=torch.float64) + 0.5) / 200, atol=0.02, rtol=0)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_batches_and_processes_do_not_change_it(task: DiffusionTask, reader: ShardReader, batch_size: int) -> None:
    whole = validate(word_counting, task, reader, images=8, bins=2, batch_size=8).losses
    parts = [validate(word_counting, task, reader, images=8, bins=2, batch_size=batch_size, rank=r, world_size=2).losses for r in (0, 1)]
    torch.testing.assert_close(parts[0] + parts[1], whole, rtol=1e-4, atol=1e-6)
    assert whole.shape == (8, 2)
    assert (whole > 0).all()


def test_captions_and_encoders_matter(task: DiffusionTask, reader: ShardReader) -> None:
    losses = [
        validate(word_counting, task, reader, images=8, bins=2, batch_size=8, **options).losses  # type: ignore[arg-type]
        for options in ({}, {"shuffled": True}, {"without": ("t5",)}, {"without": ("clip_text", "clip_image")})
    ]
    assert not torch.allclose(losses[0], losses[1])
    assert not torch.allclose(losses[0], losses[2])
    torch.testing.assert_close(losses[0], losses[3])


def test_summary(task: DiffusionTask, reader: ShardReader) -> None:
    result = validate(word_counting, task, reader, images=100, bins=4, batch_size=8)
    summary = result.summary()
    assert summary["images"] == 8
    assert summary["loss"] == pytest.approx(sum(b["loss"] for b in summary["bins"]) / 4)
    assert [b["sigma_lo"] for b in summary["bins"]][1:] == [b["sigma_hi"] for b in summary["bins"]][:-1]
    assert standard_error(torch.tensor([1.0, 3.0])) == pytest.approx(1.0)


def test_an_image_that_cannot_be_read_is_left_out_and_the_others_keep_their_losses(
    task: DiffusionTask, reader: ShardReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = validate(word_counting, task, reader, images=8, bins=2, batch_size=8)
    raw = reader.raw

    def failing(index: int) -> RawSample:
        if index in (2, 3):
            raise UnreadableSample(Unreadable("x.tar", f"{index}", "gone"))
        return raw(index)

    monkeypatch.setattr(reader, "raw", failing)
    for batch_size in (2, 8):  # a batch of which nothing is left, too
        parts = [validate(word_counting, task, reader, images=8, bins=2, batch_size=batch_size, rank=r, world_size=2) for r in (0, 1)]
        read = parts[0].read | parts[1].read
        assert read.tolist() == [True, True, False, False, True, True, True, True]
        losses = parts[0].losses + parts[1].losses
        torch.testing.assert_close(losses[read], whole.losses[read], rtol=1e-4, atol=1e-6)
        assert {what.key for part in parts for what in part.unreadable} == {"2", "3"}
    part = validate(word_counting, task, reader, images=8, bins=2, batch_size=8)
    assert part.summary()["images"] == 6
    assert part.mean == pytest.approx(float(whole.losses[read].mean()), rel=1e-4)
