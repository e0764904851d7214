"""Loss on held-out images at fixed noise: the same images, noise levels and noise every time, so that two numbers can be compared.

An expert is validated on the noise that it is trained on: two experts' numbers are of different noise."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from t2i_experts.experts.interval import NoiseInterval
from t2i_experts.shards.order import position_rng
from t2i_experts.shards.reader import Sample, ShardReader, Unreadable, UnreadableSample
from t2i_experts.training.task import DiffusionTask, text_inputs
from t2i_experts.types import Conditioning, Denoiser, TextFeatures

GOLDEN = 0.6180339887498949


@dataclass(frozen=True)
class ValidationLoss:
    """losses: (N, bins) float64, EDM's weighted loss of image n at one noise level of bin b. edges: (bins + 1,) sigmas between the bins.

    read: (N,) bool, False for images that cannot be read, whose losses are zeros that do not count. unreadable: they and why, by name.
    """

    losses: Tensor
    edges: Tensor
    read: Tensor
    unreadable: tuple[Unreadable, ...] = ()

    @property
    def mean(self) -> float:
        """Over images and bins: an estimate of the training loss, since the bins are equally probable."""
        return float(self.losses[self.read].mean())

    @property
    def standard_error(self) -> float:
        """Of the mean, over images."""
        return standard_error(self.losses[self.read].mean(dim=1))

    def summary(self) -> dict[str, Any]:
        """As plain values, with the mean and its standard error for each bin."""
        bins = [
            {"sigma_lo": lo, "sigma_hi": hi, "loss": float(column.mean()), "standard_error": standard_error(column)}
            for lo, hi, column in zip(self.edges[:-1].tolist(), self.edges[1:].tolist(), self.losses[self.read].T, strict=True)
        ]
        return {"loss": self.mean, "standard_error": self.standard_error, "images": int(self.read.sum()), "bins": bins}


def standard_error(values: Tensor) -> float:
    """Of the mean of (N,) values; infinite for fewer than two."""
    return float(values.std() / len(values) ** 0.5) if len(values) > 1 else float("inf")


def fixed_sigmas(interval: NoiseInterval, index: int, bins: int) -> Tensor:
    """One sigma in each of `bins` equally probable parts of an interval for image `index`, (bins,) float32; images spread evenly inside
    a bin."""
    fraction = ((index + 0.5) * GOLDEN) % 1.0
    return interval.from_uniform((torch.arange(bins, dtype=torch.float64) + fraction) / bins, torch.float32)


@dataclass(frozen=True)
class FixedBatch:
    """Held-out images with all that is drawn for them. rows: their places. latents, eps: (B, C, H, W). sigmas: (B, bins)."""

    rows: tuple[int, ...]
    latents: Tensor
    eps: Tensor
    sigmas: Tensor
    conditioning: Conditioning

    @torch.no_grad()
    def losses(self, denoiser: Denoiser, task: DiffusionTask) -> Tensor:
        """EDM's loss of each image in each bin, (B, bins) float64 on the CPU."""
        columns = []
        for b in range(self.sigmas.shape[1]):
            with task.autocast():
                columns.append(task.loss(denoiser, self.latents, self.sigmas[:, b], self.eps, self.conditioning))
        return torch.stack(columns, dim=1).cpu().double()


def fixed_batch(
    task: DiffusionTask,
    reader: ShardReader,
    indices: Iterable[int],
    *,
    bins: int,
    without: Collection[str] = ("clip_image",),
    caption_of: Callable[[int], int] | None = None,
) -> tuple[FixedBatch | None, list[Unreadable]]:
    """Held-out images with their first captions, without those that cannot be read, and these; None if none can.

    without: encoders that are dropped; by default the image encoder, as when one samples from a prompt. caption_of: the image whose
    caption an image gets instead of its own.
    """
    rows: list[int] = []
    samples: list[Sample] = []
    captions: list[str] = []
    features: list[Mapping[str, TextFeatures]] = []
    unreadable: list[Unreadable] = []
    for i in indices:
        try:
            sample = reader.item(i)
            other = reader.raw(caption_of(i)) if caption_of is not None else None
        except UnreadableSample as error:
            unreadable.append(error.what)
            continue
        rows.append(i)
        samples.append(sample)
        captions.append(sample.caption if other is None else other.captions[0])
        features.append(sample.features if other is None else {name: found[0] for name, found in other.features.items()})
    if not rows:
        return None, unreadable
    pixels = task.images(torch.stack([sample.image for sample in samples]))
    drops = {name: torch.full((len(rows),), name in without) for name in task.stage.encoders}
    conditioning = task.conditioner.encode(text_inputs(task.conditioner.tokenizer, captions, features), pixels, drops)
    latents = task.latents(pixels)
    eps = torch.stack([_noise(i, latents.shape[1:]) for i in rows]).to(task.device)
    sigmas = torch.stack([fixed_sigmas(task.interval, i, bins) for i in rows]).to(task.device)
    return FixedBatch(tuple(rows), latents, eps, sigmas, conditioning), unreadable


@torch.no_grad()
def validate(
    denoiser: Denoiser,
    task: DiffusionTask,
    reader: ShardReader,
    *,
    images: int,
    bins: int,
    batch_size: int,
    without: Collection[str] = ("clip_image",),
    shuffled: bool = False,
    rank: int = 0,
    world_size: int = 1,
) -> ValidationLoss:
    """The loss on the first `images` of `reader` (or all, if it has fewer) with their first captions.

    without: see `fixed_batch`. shuffled: every image gets the caption of another one (the seventeenth after it, cyclically) instead of its
    own. With several processes each computes its share, leaves zeros (and False in `read`) elsewhere, and the caller sums.

    An image that cannot be read is left out, and nothing takes its place: the others keep their noise, so their losses stay the same.
    """
    count = min(images, reader.samples)
    losses = torch.zeros(count, bins, dtype=torch.float64)
    read = torch.zeros(count, dtype=torch.bool)
    unreadable: list[Unreadable] = []
    caption_of = (lambda i: (i + 17) % count) if shuffled else None
    for start in range(rank * batch_size, count, world_size * batch_size):
        indices = range(start, min(start + batch_size, count))
        batch, missed = fixed_batch(task, reader, indices, bins=bins, without=without, caption_of=caption_of)
        unreadable += missed
        if batch is not None:
            rows = list(batch.rows)
            losses[rows] = batch.losses(denoiser, task)
            read[rows] = True
    edges = torch.tensor(task.interval.edges(bins), dtype=torch.float64)
    return ValidationLoss(losses, edges, read, tuple(unreadable))


def _noise(index: int, shape: torch.Size) -> Tensor:
    """The fixed noise of validation image `index`."""
    return torch.from_numpy(position_rng(0, index, "validation noise").standard_normal(tuple(shape), dtype=np.float32))
