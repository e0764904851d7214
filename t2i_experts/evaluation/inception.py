"""The Inception network of FID: the one of TensorFlow's 2015-12-05 graph, which everybody's published numbers come from.

It is not torchvision's: average pools leave padding out, and the last block has a maximum pool where Szegedy et al. (arXiv 1512.00567) have
an average. Parameters have the names of the public file pt_inception-2015-12-05-6726825d.pth, so that it can be read as it is.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, max_pool2d, relu

SIZE = 299
"""Height and width, in pixels, of the images that the network was trained on."""


class ConvNorm(nn.Module):
    """Convolution without bias, batch norm with the statistics of training, ReLU. kernel: an int, or (height, width)."""

    def __init__(self, inputs: int, outputs: int, kernel: int | tuple[int, int], stride: int = 1, padded: bool = True) -> None:
        super().__init__()
        height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (height // 2, width // 2) if padded else (0, 0)
        self.conv = nn.Conv2d(inputs, outputs, (height, width), stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return relu(self.bn(self.conv(x)))


def _average(x: Tensor) -> Tensor:
    """3 x 3 average of what lies inside the image."""
    return avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class BlockA(nn.Module):
    """35 x 35: (B, inputs, H, W) to (B, 224 + pooled, H, W)."""

    def __init__(self, inputs: int, pooled: int) -> None:
        super().__init__()
        self.branch1x1 = ConvNorm(inputs, 64, 1)
        self.branch5x5_1 = ConvNorm(inputs, 48, 1)
        self.branch5x5_2 = ConvNorm(48, 64, 5)
        self.branch3x3dbl_1 = ConvNorm(inputs, 64, 1)
        self.branch3x3dbl_2 = ConvNorm(64, 96, 3)
        self.branch3x3dbl_3 = ConvNorm(96, 96, 3)
        self.branch_pool = ConvNorm(inputs, pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        five = self.branch5x5_2(self.branch5x5_1(x))
        three = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), five, three, self.branch_pool(_average(x))], 1)


class BlockB(nn.Module):
    """35 x 35 to 17 x 17: (B, inputs, H, W) to (B, 480 + inputs, H / 2, W / 2)."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch3x3 = ConvNorm(inputs, 384, 3, stride=2, padded=False)
        self.branch3x3dbl_1 = ConvNorm(inputs, 64, 1)
        self.branch3x3dbl_2 = ConvNorm(64, 96, 3)
        self.branch3x3dbl_3 = ConvNorm(96, 96, 3, stride=2, padded=False)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, max_pool2d(x, 3, stride=2)], 1)


class BlockC(nn.Module):
    """17 x 17: (B, inputs, H, W) to (B, 768, H, W), by convolutions along rows and columns."""

    def __init__(self, inputs: int, channels: int) -> None:
        super().__init__()
        self.branch1x1 = ConvNorm(inputs, 192, 1)
        self.branch7x7_1 = ConvNorm(inputs, channels, 1)
        self.branch7x7_2 = ConvNorm(channels, channels, (1, 7))
        self.branch7x7_3 = ConvNorm(channels, 192, (7, 1))
        self.branch7x7dbl_1 = ConvNorm(inputs, channels, 1)
        self.branch7x7dbl_2 = ConvNorm(channels, channels, (7, 1))
        self.branch7x7dbl_3 = ConvNorm(channels, channels, (1, 7))
        self.branch7x7dbl_4 = ConvNorm(channels, channels, (7, 1))
        self.branch7x7dbl_5 = ConvNorm(channels, 192, (1, 7))
        self.branch_pool = ConvNorm(inputs, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        single = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), single, double, self.branch_pool(_average(x))], 1)


class BlockD(nn.Module):
    """17 x 17 to 8 x 8: (B, inputs, H, W) to (B, 512 + inputs, H / 2, W / 2)."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch3x3_1 = ConvNorm(inputs, 192, 1)
        self.branch3x3_2 = ConvNorm(192, 320, 3, stride=2, padded=False)
        self.branch7x7x3_1 = ConvNorm(inputs, 192, 1)
        self.branch7x7x3_2 = ConvNorm(192, 192, (1, 7))
        self.branch7x7x3_3 = ConvNorm(192, 192, (7, 1))
        self.branch7x7x3_4 = ConvNorm(192, 192, 3, stride=2, padded=False)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3_2(self.branch3x3_1(x))
        seven = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([three, seven, max_pool2d(x, 3, stride=2)], 1)


class BlockE(nn.Module):
    """8 x 8: (B, inputs, H, W) to (B, 2048, H, W). maximum: whether its pool takes the maximum, as FID's last block does."""

    def __init__(self, inputs: int, maximum: bool) -> None:
        super().__init__()
        self.maximum = maximum
        self.branch1x1 = ConvNorm(inputs, 320, 1)
        self.branch3x3_1 = ConvNorm(inputs, 384, 1)
        self.branch3x3_2a = ConvNorm(384, 384, (1, 3))
        self.branch3x3_2b = ConvNorm(384, 384, (3, 1))
        self.branch3x3dbl_1 = ConvNorm(inputs, 448, 1)
        self.branch3x3dbl_2 = ConvNorm(448, 384, 3)
        self.branch3x3dbl_3a = ConvNorm(384, 384, (1, 3))
        self.branch3x3dbl_3b = ConvNorm(384, 384, (3, 1))
        self.branch_pool = ConvNorm(inputs, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        single = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = max_pool2d(x, 3, stride=1, padding=1) if self.maximum else _average(x)
        return torch.cat(
            [
                self.branch1x1(x),
                self.branch3x3_2a(single),
                self.branch3x3_2b(single),
                self.branch3x3dbl_3a(double),
                self.branch3x3dbl_3b(double),
                self.branch_pool(pooled),
            ],
            1,
        )


class InceptionFID(nn.Module):
    """(B, 3, 299, 299) float in about [-1, 1] to (B, 2048), the mean over the places of the last block."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = ConvNorm(3, 32, 3, stride=2, padded=False)
        self.Conv2d_2a_3x3 = ConvNorm(32, 32, 3, padded=False)
        self.Conv2d_2b_3x3 = ConvNorm(32, 64, 3)
        self.Conv2d_3b_1x1 = ConvNorm(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvNorm(80, 192, 3, padded=False)
        self.Mixed_5b = BlockA(192, 32)
        self.Mixed_5c = BlockA(256, 64)
        self.Mixed_5d = BlockA(288, 64)
        self.Mixed_6a = BlockB(288)
        self.Mixed_6b = BlockC(768, 128)
        self.Mixed_6c = BlockC(768, 160)
        self.Mixed_6d = BlockC(768, 160)
        self.Mixed_6e = BlockC(768, 192)
        self.Mixed_7a = BlockD(768)
        self.Mixed_7b = BlockE(1280, maximum=False)
        self.Mixed_7c = BlockE(2048, maximum=True)
        self.fc = nn.Linear(2048, 1008)  # in the file; its classes are not used here

    def forward(self, x: Tensor) -> Tensor:
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(max_pool2d(x, 3, stride=2)))
        x = max_pool2d(x, 3, stride=2)
        x = self.Mixed_6a(self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x))))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(x))))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        return x.mean((2, 3))
