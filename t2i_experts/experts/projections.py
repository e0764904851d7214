"""Channel-wise projections (DeMe, Xie et al. 2410.06664): matrices over channels, at first the identity, that train with the rest.

Two places for them. `branch` is ours: on the last convolution of each residual branch, W (K * h) = (W K) * h, so that each folds into
the convolution's own weight and an ordinary network is left. `stream` is the paper's: a 1x1 convolution after the last block of each
resolution on the way down and on the way up, and after the middle. There the matrix acts on what norms and identity shortcuts also read; it
cannot be folded, and stays.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from t2i_experts.experts.states import State
from t2i_experts.nn.layers import Convolution, ResidualBlock
from t2i_experts.nn.unet import UNet, UNetBlock

Placement = Literal["branch", "stream"]

_STREAM = ".projection.weight"
_ORIGINAL, _MATRIX = (f".parametrizations.weight.{part}" for part in ("original", "0.matrix"))


class Projection(nn.Module):
    """A convolution's weight whose output channels are mixed: matrix @ weight. matrix: (out, out), at first the identity."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.eye(weight.shape[0], dtype=weight.dtype, device=weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        """weight: (out, in, k, k). Returns the same shape."""
        kind = "cpu" if weight.is_meta else weight.device.type  # autocast knows no meta device, where nothing is computed
        with torch.autocast(kind, enabled=False):
            return _project(self.matrix, weight)


def _project(matrix: Tensor, weight: Tensor) -> Tensor:
    return (matrix @ weight.flatten(1)).view_as(weight)


def add_projections(network: nn.Module, placement: Placement) -> None:
    """Adds projections to the U-Net inside a network, in place; its answers stay.

    branch: to the last convolution of each `ResidualBlock`, for `fold` to take away. stream: as above; the network is another one then,
    and what it is to be merged with, the root included, needs the same call.

    Raises ValueError if the network has none of the places.
    """
    blocks = [module for module in network.modules() if isinstance(module, ResidualBlock)]
    unets = [module for module in network.modules() if isinstance(module, UNet)]
    if not (blocks if placement == "branch" else unets):
        raise ValueError(f"placement={placement}: {type(network).__name__} has no {'ResidualBlock' if placement == 'branch' else 'UNet'}")
    if placement == "branch":
        for block in blocks:
            parametrize.register_parametrization(block.conv_out, "weight", Projection(block.conv_out.weight))
    else:
        for end in [end for unet in unets for end in _ends(unet)]:
            end.projection = _identity(end.residual)


def fold(state: State) -> dict[str, Tensor]:
    """The weights of the ordinary network that a state with projections of branches stands for, under their own names.

    Computed as in the network itself: its answers do not change. Other tensors, those of projections of the stream too, are those of the
    state, and not copies.
    """
    folded = {}
    for name, tensor in state.items():
        if name.endswith(_ORIGINAL) and name.removesuffix(_ORIGINAL) + _MATRIX in state:
            layer = name.removesuffix(_ORIGINAL)
            folded[f"{layer}.weight"] = _project(state[layer + _MATRIX], tensor).detach()
        elif not name.endswith(_MATRIX):
            folded[name] = tensor.detach()
    return folded


def with_identities(state: State, network: nn.Module) -> dict[str, Tensor]:
    """A state, and the identity for each projection of the stream that `network` has and the state has not: the same answers.

    network: may be on the meta device.
    """
    added = {name: tensor for name, tensor in network.state_dict().items() if name.endswith(_STREAM) and name not in state}
    return {**state, **{name: nn.init.dirac_(torch.empty(tensor.shape)) for name, tensor in added.items()}}


def _identity(block: ResidualBlock) -> Convolution:
    """A 1x1 convolution that changes nothing, of a block's output."""
    weight = block.conv_in.weight
    convolution = Convolution(block.out_channels, block.out_channels, 1).to(weight.device, weight.dtype)
    nn.init.dirac_(convolution.weight)
    return convolution


def _ends(network: UNet) -> Iterator[UNetBlock]:
    """The last block of each resolution on the way down, the last one in the middle, and those on the way up."""
    for part, change in ((network.down, "down"), (network.middle, ""), (network.up, "up")):
        blocks = [block for block in part if isinstance(block, UNetBlock)]
        for block, following in zip(blocks, [*blocks[1:], None], strict=True):
            if following is None or following.residual.mode == change:
                yield block
