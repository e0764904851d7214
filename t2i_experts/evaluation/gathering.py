"""The features of one set of images, batch by batch: their statistics, and they themselves where a metric needs them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from t2i_experts.evaluation.features import FeatureExtractor
from t2i_experts.evaluation.processes import ALONE, Processes
from t2i_experts.evaluation.statistics import FeatureStatistics

_TOGETHER = 1024
"""Images whose features become statistics together: a GPU gets the next batch meanwhile, and waits for none of the sums."""


class FeatureGatherer:
    """Gathers what an extractor makes of images.

    device: where sums are made, but for MPS, which knows no float64. keep: whether the features stay in memory, as float32 on the CPU.
    """

    def __init__(self, extractor: FeatureExtractor, device: torch.device, *, keep: bool = False) -> None:
        self.extractor = extractor
        self.statistics = FeatureStatistics(extractor.dimension, "cpu" if device.type == "mps" else device)
        self._kept: list[Tensor] | None = [] if keep else None
        self._waiting: list[Tensor] = []
        self._names: list[str] = []

    def add(self, prepared: Tensor, names: Sequence[str]) -> None:
        """prepared: what the extractor's `prepare` gave for some images. names: theirs, for messages.

        Raises ValueError for features that hold NaN or infinity, up to some batches later, and for other features than one an image.
        """
        features = self.extractor.encode(prepared)
        if features.shape != (len(names), self.extractor.dimension):
            wanted = f"{self.extractor.dimension} features of each of {len(names)} images"
            raise ValueError(f"features of shape {tuple(features.shape)} where {wanted} were expected, from {names[0]} on")
        self._waiting.append(features)
        self._names.extend(names)
        if len(self._names) >= _TOGETHER:
            self.finish()

    def finish(self) -> None:
        """Takes in what still waits. Raises ValueError as `add` does."""
        if not self._waiting:
            return
        features = torch.cat(self._waiting)
        self.statistics.add(features, self._names)
        if self._kept is not None:
            self._kept.append(features.float().cpu())
        self._waiting, self._names = [], []

    def kept(self, processes: Processes = ALONE) -> list[Tensor] | None:
        """(N, D) float32 features of each process's images by rank, on the main process; None if they were not to be kept."""
        if self._kept is None:
            return None
        return processes.gather(torch.cat([torch.empty(0, self.extractor.dimension), *self._kept]))
