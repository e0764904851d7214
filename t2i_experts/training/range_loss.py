"""The held-out loss of models in ranges of noise, on the same pictures and draws, so that their difference is known better than either.

What an expert is worth shows here: in its range beside the root, and beside the root trained on for as long.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from t2i_experts.cascade.model_folder import LoadedModel
from t2i_experts.cascade.stage import Stage
from t2i_experts.experts.interval import NoiseInterval
from t2i_experts.shards.reader import ShardReader
from t2i_experts.training.task import DiffusionTask
from t2i_experts.training.validation import standard_error, validate


@dataclass(frozen=True)
class RangeLoss:
    """EDM's weighted loss of several models at noise drawn in one range. losses: (models, N) float64, of each image."""

    interval: NoiseInterval
    losses: Tensor

    def mean(self, model: int) -> tuple[float, float]:
        """Of one model, with its standard error over images."""
        return float(self.losses[model].mean()), standard_error(self.losses[model])

    def change(self, model: int) -> tuple[float, float]:
        """From the first model to another, as a share of the first one's mean, with the standard error of the paired differences."""
        first = float(self.losses[0].mean())
        difference = self.losses[model] - self.losses[0]
        return float(difference.mean()) / first, standard_error(difference) / first


def range_losses(
    models: Sequence[LoadedModel],
    reader: ShardReader,
    intervals: Sequence[NoiseInterval],
    *,
    images: int,
    draws: int,
    batch_size: int,
    device: torch.device,
    bf16: bool = False,
    progress: Callable[[int, int | None], None] = lambda done, total: None,
) -> list[RangeLoss]:
    """The loss in each range, and last in all of them together, each weighed by its share of the training noise.

    models: of one stage each, for pictures of one size. intervals: a partition of all noise, of the models' own distribution. images: the
    first so many of `reader`, at `draws` noise levels in every range. bf16: computed under autocast, as in training. progress: called with
    the pictures that are done, counted once for each model and range, and all.

    Raises ValueError for models of other noise than the ranges', or of pictures of another size than the reader's.
    """
    stages = [_stage(model, reader, intervals) for model in models]
    found: list[RangeLoss] = []
    count = min(images, reader.samples)
    for interval in intervals:
        losses, read = [], torch.ones(count, dtype=torch.bool)
        for model, stage in zip(models, stages, strict=True):
            noise = replace(stage.config.noise, quantiles=[str(interval.u_lo), str(interval.u_hi)])
            config = replace(stage.config, noise=noise)
            task = DiffusionTask(config, model.conditioner, seed=0, device=device, bf16=bf16, codec=stage.codec)
            result = validate(stage.denoiser, task, reader, images=images, bins=draws, batch_size=batch_size)
            losses.append(result.losses.mean(dim=1))
            read &= result.read
            progress(count * (len(found) * len(models) + len(losses)), count * len(intervals) * len(models))
        found.append(RangeLoss(interval, torch.stack(losses)[:, read]))
    whole = NoiseInterval(intervals[0].u_lo, intervals[-1].u_hi, intervals[0].distribution)
    everything = torch.stack([float(one.interval.share) * one.losses for one in found]).sum(dim=0)
    return [*found, RangeLoss(whole, everything)]


def _stage(model: LoadedModel, reader: ShardReader, intervals: Sequence[NoiseInterval]) -> Stage:
    (stage,) = model.stages.values()
    own = NoiseInterval.from_config(replace(stage.config.noise, quantiles=[])).distribution
    for interval in intervals:
        if interval.distribution != own:
            raise ValueError(f"{model.source} was trained on the noise {own}; the ranges are parts of {interval.distribution}")
    if stage.config.size != reader.size:
        raise ValueError(f"{model.source} is for pictures of {stage.config.size} px; the first model is for {reader.size} px")
    if stage.config.noise.quantiles:
        raise ValueError(
            f"{model.source} is one expert, trained on {NoiseInterval.from_config(stage.config.noise)}; assemble its tree first"
        )
    return stage
