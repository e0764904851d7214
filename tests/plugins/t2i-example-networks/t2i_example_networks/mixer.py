"""A stack of 3 x 3 convolutions to which noise level and prompt are added."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class Mixer(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, widths: Mapping[str, int], channels: int, layers: int) -> None:
        super().__init__()
        self.words = nn.ModuleDict({name: nn.Linear(width, channels) for name, width in widths.items()})
        self.noise = nn.Linear(1, channels)
        self.first = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.layers = nn.ModuleList([nn.Conv2d(channels, channels, 3, padding=1) for _ in range(layers)])
        self.last = nn.Conv2d(channels, out_channels, 1)

    def project(self, embeddings: Mapping[str, Any]) -> dict[str, Tensor]:
        def mean(e: Any) -> Tensor:
            return (e.tokens * e.mask[..., None]).sum(1) / e.mask.sum(1, keepdim=True)

        dtype = self.noise.weight.dtype
        return {"words": torch.stack([linear(mean(embeddings[name]).to(dtype)) for name, linear in self.words.items()]).sum(0)}

    def forward(self, x: Tensor, c_noise: Tensor, projected: Mapping[str, Tensor]) -> Tensor:
        said = projected["words"] + self.noise(c_noise[:, None].to(self.noise.weight.dtype))
        x = self.first(x.to(said.dtype)) + said[:, :, None, None]
        for layer in self.layers:
            x = x + torch.relu(layer(x))
        return self.last(x)


def build(config: Any, *, in_channels: int, out_channels: int) -> Mixer:
    options = {"channels": 8, "layers": 2, **config.network.options}
    unknown = sorted(set(options) - {"channels", "layers"})
    if unknown:
        raise ValueError(f"stage.network.options: unknown {unknown}; allowed: channels, layers")
    return Mixer(in_channels, out_channels, {name: encoder.width for name, encoder in config.encoders.items()}, **options)
