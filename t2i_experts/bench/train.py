"""A whole training step: forward, backward, clipping, AdamW, moving average; the text's embeddings are given."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from t2i_experts.bench.baseline import diffusers_library, in_better_layout
from t2i_experts.bench.device import free
from t2i_experts.bench.error import exact_float32, relative_rms
from t2i_experts.bench.floor import flops, matrix_rate
from t2i_experts.bench.loops import DiffusersLoop, Loop, OwnLoop, add_batch_gradients
from t2i_experts.bench.machine import describe
from t2i_experts.bench.network import size_named
from t2i_experts.bench.result import Result, Row
from t2i_experts.bench.timing import interleave
from t2i_experts.cascade.device import synchronize

CALLS = 4  # steps in a row that are timed together, as in a loop, which waits for none of them
REFERENCE_ROWS = 32  # images whose gradient is compared with float32's


@dataclass(frozen=True)
class Candidate:
    """A loop that has taken its first steps.

    call: takes the next one. flops: of one image's evaluation. error: of its gradients. first: seconds of its first forward and backward
    pass. peak: bytes on the device while it takes a step, those of all other loops left out; None where nothing counts them.
    """

    call: Callable[[], None]
    flops: int
    error: float
    first: float
    peak: int | None


def first_steps(make: Callable[[], Loop], device: torch.device) -> Candidate:
    """Makes a loop, measures its gradients' error on its initial weights, and takes two steps."""
    free(device)
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    loop = make()
    parameters = list(loop.network.parameters())
    rows = slice(0, min(REFERENCE_ROWS, loop.batch))
    synchronize(device)
    started = time.perf_counter()
    add_batch_gradients(loop, rows)
    synchronize(device)
    first = time.perf_counter() - started
    found, uncompiled = [_taken(parameter) for parameter in parameters], loop.network.forward
    with exact_float32():
        loop.losses(uncompiled, rows).mean().backward()
        count = flops(lambda: loop.losses(uncompiled, slice(0, 1)))
    error = relative_rms(found, [_taken(parameter) for parameter in parameters])
    del found

    def step() -> None:
        add_batch_gradients(loop)
        loop.update()

    step()  # the optimiser's moments come into being
    peak = None
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) - before
    return Candidate(step, count, error, first, peak)


def _taken(parameter: nn.Parameter) -> Tensor:
    """Its gradient, which it then has no longer."""
    gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    parameter.grad = None
    return gradient


def bench_train(network: str, batch: int, device: torch.device, *, eager: bool = False, repeats: int = 10) -> Result:
    """This project's step, compiled, beside that of diffusers, eager and compiled, each in the better of two memory layouts.

    eager: nothing is compiled. Raises ValueError for settings that are out of range, and where diffusers is missing.
    """
    size = size_named(network)
    if batch < 1:
        raise ValueError(f"--batch={batch} must be at least 1")
    diffusers_library()
    torch.backends.cudnn.benchmark = True
    rate = matrix_rate(device, torch.bfloat16, repeats=repeats)

    def baseline(layout: str, compiled: bool) -> Candidate:
        return first_steps(lambda: DiffusersLoop(size, batch, device, layout, compiled=compiled), device)

    slow, fast, own = "diffusers, eager", "diffusers, compiled", f"t2i-experts, {'eager' if eager else 'compiled'}"
    found: dict[str, tuple[str, Candidate]] = {slow: in_better_layout(lambda layout: baseline(layout, False), device)}
    if not eager:
        found[fast] = in_better_layout(lambda layout: baseline(layout, True), device)
    found[own] = "NHWC", first_steps(lambda: OwnLoop(size, batch, device, None if eager else "inductor"), device)

    timings = interleave({name: candidate.call for name, (_, candidate) in found.items()}, device, repeats=repeats, calls=CALLS)
    rows = []
    for name, (layout, candidate) in found.items():
        seconds = timings[name].median
        more: dict[str, Any] = {"layout": layout, "images/s": batch / seconds, "GFLOP": candidate.flops / 1e9, "first s": candidate.first}
        if candidate.peak is not None:
            more["peak GiB"] = candidate.peak / 2**30
        if name == own and not eager:
            more["over compiled"] = f"{timings[fast].median / seconds:.2f}x"
        ratio = None if name == slow else timings[slow].median / seconds
        share = 3 * candidate.flops * batch / seconds / rate
        rows.append(Row(name, timings[name], ratio=ratio, share=share, error=candidate.error, more=more))
    settings = {"network": network, "batch": batch, "repeats": repeats, "matrix rate TFLOP/s": round(rate / 1e12, 3)}
    return Result("train", describe(device), settings, rows)
