"""What the scripts that train small networks on pictures have in common."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor

import torch
from torch import Tensor


def workers(number: int) -> Executor:
    """A pool of processes with one thread each, or of one thread."""
    return ProcessPoolExecutor(number, initializer=torch.set_num_threads, initargs=(1,)) if number > 1 else ThreadPoolExecutor(1)


def shuffled_rows(samples: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Without end, the numbers of `batch_size` samples, (B,) int64 on the generator's device: each pass over all of them in an order of
    its own, of which the rest that fills no batch is left out. An order is drawn when its first batch is asked for."""
    queue = torch.empty(0, dtype=torch.int64, device=generator.device)
    while True:
        if len(queue) < batch_size:
            queue = torch.randperm(samples, generator=generator, device=generator.device)
        rows, queue = queue[:batch_size], queue[batch_size:]
        yield rows


def set_learning_rate(optimizer: torch.optim.Optimizer, highest: float, *, step: int, warmup: int, progress: float) -> None:
    """A linear rise over so many steps, times a linear decay to zero as progress goes from 0 to 1."""
    for group in optimizer.param_groups:
        group["lr"] = highest * min(1.0, (step + 1) / warmup) * (1 - progress)
