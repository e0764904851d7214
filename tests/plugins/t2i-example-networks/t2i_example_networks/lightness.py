"""A metric that needs no weights and looks at captions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


class LightnessMetric:
    options = ("word",)

    def __init__(self, word: str) -> None:
        self.word = word
        self.record = {"name": "lightness", "metric": "lightness", "word": word}

    @classmethod
    def load(cls, options: Mapping[str, str], device: torch.device) -> LightnessMetric:
        return cls(options.get("word", "light"))

    def prepare(self, images: Tensor) -> Tensor:
        return images.float().mean((1, 2, 3)) / 255

    def values(self, prepared: Tensor, captions: Sequence[str]) -> Tensor:
        said = torch.tensor([self.word in caption for caption in captions])
        return torch.where(said, prepared, 1 - prepared)

    def cut(self, captions: Sequence[str]) -> list[int]:
        return [0] * len(captions)
