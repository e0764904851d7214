"""Batches and losses: what is drawn for a sample belongs to the sample."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from t2i_experts.conditioning.conditioner import TextConditioner
from t2i_experts.config import StageConfig
from t2i_experts.shards.reader import Sample
from t2i_experts.training.task import DiffusionTask
from t2i_experts.types import Conditioning


@pytest.fixture(scope="module")
def task(stage_config: StageConfig) -> DiffusionTask:
    encoders = {name: replace(encoder, drop=0.5) for name, encoder in stage_config.encoders.items()}
    stage = replace(stage_config, encoders=encoders)
    return DiffusionTask(stage, TextConditioner.from_config(encoders), seed=3, device=torch.device("cpu"))


def samples(positions: range) -> list[Sample]:
    return [Sample(i, f"{i:05d}", torch.full((3, 16, 16), i % 256, dtype=torch.uint8), f"a red cube {i}", {}) for i in positions]


class Recorder:
    """A denoiser that remembers and answers with its input."""

    def __call__(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        self.x, self.sigma, self.conditioning = x, sigma, conditioning
        return x


def test_draws_belong_to_the_position(task: DiffusionTask) -> None:
    collate = task.collate()
    whole, part = collate(samples(range(8))), collate(samples(range(5, 8)))
    assert torch.equal(whole.uniform[5:], part.uniform)
    for name in whole.drops:
        assert torch.equal(whole.drops[name][5:], part.drops[name])


def test_encoders_are_dropped_independently_at_their_rates(task: DiffusionTask) -> None:
    encoders = {
        name: replace(task.stage.encoders[name], drop=rate) for name, rate in [("t5", 0.25), ("clip_text", 0.2), ("clip_image", 0.9)]
    }
    collate = DiffusionTask(replace(task.stage, encoders=encoders), task.conditioner, seed=3, device=task.device).collate()
    drops = collate([replace(sample, caption="a") for sample in samples(range(3000))]).drops
    for name, encoder in encoders.items():
        assert float(drops[name].double().mean()) == pytest.approx(encoder.drop, abs=0.03)
    all_three = drops["t5"] & drops["clip_text"] & drops["clip_image"]
    assert float(all_three.double().mean()) == pytest.approx(0.045, abs=0.015)
    backwards = replace(collate, drop_rates=dict(reversed(collate.drop_rates.items())))(samples(range(100))).drops
    assert all(torch.equal(backwards[name], drops[name][:100]) for name in drops)


def test_noise_levels_follow_the_distribution(task: DiffusionTask) -> None:
    recorder = Recorder()
    task.losses(recorder, task.collate()([replace(sample, caption="") for sample in samples(range(2000))]))
    logs = recorder.sigma.log()
    assert float(logs.mean()) == pytest.approx(-1.2, abs=0.1)
    assert float(logs.std()) == pytest.approx(1.2, abs=0.1)


SIXTEEN_FLOATS = ("1048577/2097152", "1048578/2097152")  # of which rounding takes 4 % of all draws out


@pytest.mark.parametrize("quantiles", [("511/512", "1"), ("0", "1/8"), ("1/8", "511/512"), SIXTEEN_FLOATS])
def test_an_expert_meets_its_own_noise_alone(task: DiffusionTask, quantiles: tuple[str, str]) -> None:
    stage = replace(task.stage, noise=replace(task.stage.noise, quantiles=list(quantiles)))
    expert, recorder = DiffusionTask(stage, task.conditioner, seed=3, device=task.device), Recorder()
    batch = expert.collate()([replace(sample, caption="") for sample in samples(range(2000))])
    expert.losses(recorder, batch)
    assert expert.interval.contains(recorder.sigma).all() and recorder.sigma.isfinite().all()
    quantile = (expert.interval.distribution.cdf(recorder.sigma) - float(expert.interval.u_lo)) / float(expert.interval.share)
    assert float(quantile.mean()) == pytest.approx(0.5, abs=0.03)


def test_an_interval_too_narrow_to_train_on_is_refused(task: DiffusionTask) -> None:
    stage = replace(task.stage, noise=replace(task.stage.noise, quantiles=["0.5", "0.500000000001"]))
    with pytest.raises(ValueError, match="too narrow"):
        DiffusionTask(stage, task.conditioner, seed=3, device=task.device)


def test_a_batch_meets_the_same_noise_whenever_it_comes(task: DiffusionTask) -> None:
    first, again, other = Recorder(), Recorder(), Recorder()
    batch = task.collate()(samples(range(8)))
    task.losses(first, batch)
    task.losses(other, task.collate()(samples(range(8, 16))))
    task.losses(again, batch)
    assert torch.equal(first.x, again.x)
    assert not torch.equal(first.x, other.x)


def test_loss_of_the_identity_is_that_of_the_noise(task: DiffusionTask) -> None:
    """D(x) = x leaves an error of sigma eps, so the weighted loss is about (sigma^2 + sd^2) / sd^2."""
    recorder = Recorder()
    losses, sigma = task.losses(recorder, task.collate()(samples(range(64))))
    assert torch.equal(sigma, recorder.sigma)
    expected = (sigma.square() + 0.25) / 0.25
    torch.testing.assert_close(losses, expected, rtol=0.15, atol=0)


def test_dropped_rows_are_null(task: DiffusionTask) -> None:
    recorder = Recorder()
    batch = task.collate()(samples(range(16)))
    task.losses(recorder, batch)
    for name, embedding in recorder.conditioning.embeddings.items():
        silent = embedding.tokens.abs().sum(dim=(1, 2)) == 0
        assert torch.equal(silent, batch.drops[name]), name
