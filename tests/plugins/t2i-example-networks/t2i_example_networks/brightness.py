"""Features that need no weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class BrightnessFeatures:
    dimension = 2

    def __init__(self) -> None:
        self.record = {"name": "brightness distance", "features": "brightness", "dimension": 2}

    @classmethod
    def load(cls, options: Any, device: torch.device) -> BrightnessFeatures:
        options.only("brightness")
        return cls()

    def prepare(self, images: Tensor) -> Tensor:
        return torch.stack([images.float().mean((1, 2, 3)), images.float().std((1, 2, 3))], 1)

    def encode(self, prepared: Tensor) -> Tensor:
        return prepared
