"""The baseline: diffusers' UNet2DConditionModel of the same size, and the parts of the training loop that its examples bring."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch

from t2i_experts.bench.network import TEXT_TOKENS, Size
from t2i_experts.bench.timing import interleave
from t2i_experts.cascade.stage import IMAGE_CHANNELS

LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
"""The memory formats that a baseline is tried in; the faster one is reported."""


def diffusers_library() -> Any:
    """The module `diffusers`. Raises ValueError, which tells how to install it, where it is missing."""
    try:
        import diffusers
    except ImportError as error:
        raise ValueError("the baseline needs diffusers: pip install 't2i-experts[bench]', or pip install diffusers") from error
    return diffusers


def diffusers_network(size: Size, device: torch.device, layout: str = "NCHW") -> Any:
    """`UNet2DConditionModel`, float32, the same weights at every call.

    Widths, heads, and the resolutions with attention are those of this project's network, and so are the tokens that it attends to.
    """
    lower = len(size.channels) - 1
    torch.manual_seed(0)
    network = diffusers_library().UNet2DConditionModel(
        sample_size=size.image,
        in_channels=IMAGE_CHANNELS,
        out_channels=IMAGE_CHANNELS,
        layers_per_block=list(size.layers),
        block_out_channels=size.channels,
        down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * lower,
        up_block_types=("CrossAttnUpBlock2D",) * lower + ("UpBlock2D",),
        cross_attention_dim=size.text_channels,
        attention_head_dim=[channels // size.head_channels for channels in size.channels],  # its name for the number of heads
        norm_num_groups=size.norm_groups,
    )
    return network.to(device).to(memory_format=LAYOUTS[layout])


def diffusers_ema(network: Any) -> Any:
    """The moving average of its examples: `EMAModel` with its defaults, a loop over the parameters."""
    diffusers_library()
    from diffusers.training_utils import EMAModel

    return EMAModel(network.parameters(), model_cls=type(network), model_config=network.config)


def diffusers_context(size: Size, batch: int, device: torch.device) -> torch.Tensor:
    """The text that its cross-attention sees, (B, L, D) float32, as many tokens as this project's."""
    return torch.randn(batch, TEXT_TOKENS, size.text_channels, generator=torch.Generator().manual_seed(0)).to(device)


class Timed(Protocol):
    """A candidate. call: what is timed."""

    @property
    def call(self) -> Callable[[], object]: ...


Made = TypeVar("Made", bound=Timed)


def in_better_layout(make: Callable[[str], Made], device: torch.device) -> tuple[str, Made]:
    """Makes a candidate in each of `LAYOUTS`. Returns the one that takes less time, and its layout."""
    tried = {layout: make(layout) for layout in LAYOUTS}
    timings = interleave({layout: made.call for layout, made in tried.items()}, device, repeats=3)
    best = min(timings, key=lambda layout: timings[layout].median)
    return best, tried[best]
