"""Times that can be compared: candidates take turns, so that whatever slows the machine down slows all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from t2i_experts.cascade.device import synchronize

Work = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Seconds of each repeat."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles, as a share of the median; 0 for a single repeat."""
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return (high - low) / 2 / self.median


def interleave(
    candidates: Mapping[str, Work], device: torch.device, *, repeats: int = 10, warmup: int = 3, calls: int = 1
) -> dict[str, Timing]:
    """Each candidate's seconds: first `warmup` calls of each that do not count, then A, B, A, B... until each has had `repeats`.

    On CUDA a repeat is so many `calls` in a row, its seconds are those of one, taken by events on the current stream, and the device is
    idle when it begins. Elsewhere a repeat is one call. Raises ValueError for fewer than one repeat.
    """
    if repeats < 1:
        raise ValueError(f"repeats={repeats} must be at least 1")
    for work in candidates.values():
        for _ in range(warmup):
            work()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(repeats):
        for name, work in candidates.items():
            seconds[name].append(seconds_of(work, device, calls))
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def seconds_of(work: Work, device: torch.device, calls: int = 1) -> float:
    """How long a call takes, until the device has done all that it was given; on CUDA, each of so many in a row, without a pause."""
    if device.type == "cuda":
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        synchronize(device)
        begin.record()
        for _ in range(calls):
            work()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1000 / calls
    started = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - started
