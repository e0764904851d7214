"""One evaluation of a denoiser, as a sampler calls it again and again with one prompt.

Each network computes in what its users get: this project's in `default_dtype`, and diffusers' in bfloat16 on CUDA, as its documentation
advises, and elsewhere in float32, its own default. Where these differ, diffusers' in this project's dtype is a row more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from t2i_experts.bench.baseline import LAYOUTS, diffusers_context, diffusers_library, diffusers_network, in_better_layout
from t2i_experts.bench.device import free
from t2i_experts.bench.error import exact_float32, relative_rms
from t2i_experts.bench.floor import bandwidth, flops, matrix_rate
from t2i_experts.bench.machine import describe
from t2i_experts.bench.network import Size, captions, noise_images, own_network, size_named
from t2i_experts.bench.result import Result, Row
from t2i_experts.bench.timing import interleave
from t2i_experts.cascade.device import default_dtype
from t2i_experts.cascade.graphs import GraphedDenoiser
from t2i_experts.diffusion.compiling import compile_denoiser
from t2i_experts.training.allocations import held_by

SIGMA = 80.0
"""Where sampling begins. EDM's c_skip is 4e-5 there: what is compared with float32 is the network's output, and not the input."""
CALLS = 8
"""Evaluations in a row that are timed together, as in a sampler, which waits for none of them."""


@dataclass(frozen=True)
class Evaluation:
    """A candidate. dtype: of its weights. flops: of a call. weights: their bytes. error: of its result."""

    call: Callable[[], Tensor]
    dtype: torch.dtype
    flops: int
    weights: int
    error: float


def own_evaluation(size: Size, batch: int, device: torch.device, dtype: torch.dtype, *, compiled: bool) -> Evaluation:
    """This project's, as `cascade/` has it: the text's projections made beforehand; what is compiled is replayed by `GraphedDenoiser`."""
    with torch.no_grad():
        network, x, text = own_network(size, device).eval(), noise_images(size, batch, device, 0) * SIGMA, captions(batch, device)
        sigma = torch.tensor(SIGMA, dtype=torch.float64)  # as samplers give it
        with exact_float32():
            reference = network(x, sigma, text)
        network = network.to(dtype)
        prepared = network.prepare(text)
        count = flops(lambda: network(x, sigma, prepared))
        if compiled:
            compile_denoiser(network, training=False)
        model: Any = GraphedDenoiser(network) if compiled else network

        def call() -> Tensor:
            with torch.no_grad():
                output: Tensor = model(x, sigma, prepared)
            return output

        return Evaluation(call, dtype, count, held_by(network), relative_rms([call()], [reference]))


def diffusers_evaluation(size: Size, batch: int, device: torch.device, dtype: torch.dtype, layout: str, *, compiled: bool) -> Evaluation:
    """Diffusers': compiled as its documentation does it, which on CUDA makes CUDA graphs, too."""
    with torch.no_grad():
        network = diffusers_network(size, device, layout).eval()
        x = noise_images(size, batch, device, 0).contiguous(memory_format=LAYOUTS[layout])
        text, timestep = diffusers_context(size, batch, device), torch.tensor(999, device=device)
        with exact_float32():
            reference = network(x, timestep, text, return_dict=False)[0]
        network = nn.Module.to(network, dtype)  # as its own `to`, without a warning that names nothing
        x, text = x.to(dtype), text.to(dtype)
        count = flops(lambda: network(x, timestep, text))
        model: Any = torch.compile(network, mode="reduce-overhead", fullgraph=True, dynamic=False) if compiled else network

        def call() -> Tensor:
            with torch.no_grad():
                output: Tensor = model(x, timestep, text, return_dict=False)[0]
            return output

        return Evaluation(call, dtype, count, held_by(network), relative_rms([call()], [reference]))


def bench_denoiser(network: str, batches: Sequence[int], device: torch.device, *, eager: bool = False, repeats: int = 20) -> Result:
    """This project's evaluation, eager and compiled, beside that of diffusers, each of these in the better of two memory layouts.

    floor: the FLOPs at the measured matrix rate and the weights at the measured bandwidth, one after the other. eager: nothing is
    compiled. Raises ValueError for settings that are out of range, and where diffusers is missing.
    """
    size = size_named(network)
    if not batches or min(batches) < 1:
        raise ValueError(f"--batch={list(batches)} must be numbers of at least 1")
    diffusers_library()
    torch.backends.cudnn.benchmark = True
    dtypes = _dtypes(device)
    rates = {dtype: matrix_rate(device, dtype, repeats=repeats) for dtype in dict.fromkeys(dtypes)}
    speed = bandwidth(device, repeats=repeats)
    rows: list[Row] = []
    for batch in batches:
        found = _candidates(size, batch, device, eager=eager)
        timings = interleave({name: evaluation.call for name, (_, evaluation) in found.items()}, device, repeats=repeats, calls=CALLS)
        first = next(iter(found))
        for name, (layout, evaluation) in found.items():
            seconds, rate = timings[name].median, rates[evaluation.dtype]
            more = {"dtype": _named(evaluation.dtype), "layout": layout}
            rows.append(
                Row(
                    f"batch {batch}: {name}",
                    timings[name],
                    ratio=None if name == first else timings[first].median / seconds,
                    floor=seconds / (evaluation.flops / rate + evaluation.weights / speed),
                    share=evaluation.flops / seconds / rate,
                    error=evaluation.error,
                    more={**more, "GFLOP": evaluation.flops / 1e9, "weights MB": evaluation.weights / 1e6},
                )
            )
        del found
        free(device)
    measured = {f"{_named(dtype)} TFLOP/s": round(rate / 1e12, 3) for dtype, rate in rates.items()}
    settings = {"network": network, "repeats": repeats, **measured, "bandwidth GB/s": round(speed / 1e9, 1)}
    return Result("denoiser", describe(device), settings, rows)


def _dtypes(device: torch.device) -> tuple[torch.dtype, torch.dtype]:
    """What users get on a device: of diffusers, and of this project."""
    own = default_dtype(device)
    return own if device.type == "cuda" else torch.float32, own


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _candidates(size: Size, batch: int, device: torch.device, *, eager: bool) -> dict[str, tuple[str, Evaluation]]:
    """Memory layout and evaluation of each candidate, by name, the baseline first."""
    usual, own = _dtypes(device)
    found: dict[str, tuple[str, Evaluation]] = {}
    for compiled in [False] if eager else [False, True]:
        how = "eager" if not compiled else "compiled, graph" if device.type == "cuda" else "compiled"
        baselines = {f"diffusers, {how}": usual} | ({f"diffusers, {how}, {_named(own)}": own} if own != usual else {})
        for name, dtype in baselines.items():
            found[name] = in_better_layout(partial(diffusers_evaluation, size, batch, device, dtype, compiled=compiled), device)
            free(device)
        found[f"t2i-experts, {how}"] = "NHWC", own_evaluation(size, batch, device, own, compiled=compiled)
    return found
