"""SqueezeNet 1.0 (Iandola et al., arXiv 1602.07360), for Frechet distances where Inception's weights are not to be had.

A SqueezeNet distance compares models of one person with each other. It is no FID, and not comparable with any published number.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import max_pool2d, relu

SIZE = 227
"""Height and width, in pixels, of the images that the network was trained on."""


class Fire(nn.Module):
    """(B, inputs, H, W) to (B, 2 expanded, H, W): squeezed by 1 x 1, expanded by 1 x 1 and by 3 x 3."""

    def __init__(self, inputs: int, squeezed: int, expanded: int) -> None:
        super().__init__()
        self.conv1x1_1 = nn.Conv2d(inputs, squeezed, 1)
        self.conv1x1_2 = nn.Conv2d(squeezed, expanded, 1)
        self.conv3x3_2 = nn.Conv2d(squeezed, expanded, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = relu(self.conv1x1_1(x))
        return relu(torch.cat([self.conv1x1_2(x), self.conv3x3_2(x)], 1))


class SqueezeNet(nn.Module):
    """(B, 3, 227, 227) float, BGR in 0..255 minus 104, 117, 123, to (B, 512): the mean over the places of the last fire module."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 96, 7, stride=2)
        self.fire2 = Fire(96, 16, 64)
        self.fire3 = Fire(128, 16, 64)
        self.fire4 = Fire(128, 32, 128)
        self.fire5 = Fire(256, 32, 128)
        self.fire6 = Fire(256, 48, 192)
        self.fire7 = Fire(384, 48, 192)
        self.fire8 = Fire(384, 64, 256)
        self.fire9 = Fire(512, 64, 256)
        self.conv_final = nn.Conv2d(512, 1000, 1)  # in the file; its classes are not used here

    def forward(self, x: Tensor) -> Tensor:
        x = max_pool2d(relu(self.conv1(x)), 3, stride=2, ceil_mode=True)
        x = max_pool2d(self.fire4(self.fire3(self.fire2(x))), 3, stride=2, ceil_mode=True)
        x = max_pool2d(self.fire8(self.fire7(self.fire6(self.fire5(x)))), 3, stride=2, ceil_mode=True)
        return self.fire9(x).mean((2, 3))
