"""The processes that share one evaluation, as a launcher starts them, and how what fails in one of them ends all.

They talk over the CPU's network (gloo), whatever device features are computed on: there is little to say, and a process that has ended is
noticed at once, where NCCL would wait for it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from t2i_experts.cascade.device import default_device, open_device
from t2i_experts.evaluation.records import differences, in_words

Result = TypeVar("Result")

_WAITING = timedelta(hours=2)
"""How long processes wait for a slower one. One that has ended ends the others at once."""


class FailedProcess(RuntimeError):
    """Another process of this evaluation has failed, in another way than by wrong input."""


@dataclass(frozen=True)
class Processes:
    """rank: of this process among `count`. local_rank: among the `local_count` of its host."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    local_count: int = 1

    @property
    def main(self) -> bool:
        """Whether this is the one that tells the result."""
        return self.rank == 0

    def share(self, total: int) -> range:
        """Which of `total` things are this process's: each is some process's, and no two have the same."""
        return range(self.rank, total, self.count)

    def device(self, device: str | None) -> torch.device:
        """The device of that name, the best one if None; a GPU of its own for each process of a host.

        Raises ValueError for one that this machine lacks, and for several processes on one GPU by its number.
        """
        place = default_device() if device is None else open_device(device, f"--device={device!r}")
        if self.count > 1 and place.type == "cuda":
            if place != torch.device("cuda"):
                raise ValueError(
                    f"--device={device!r} would put {self.count} processes on one GPU; say cuda, and each takes one of its own"
                )
            place = open_device(f"cuda:{self.local_rank}", f"--device=cuda:{self.local_rank}, of process {self.local_rank} on its host,")
        if place.type == "cuda" and place.index is not None:
            torch.cuda.set_device(place)  # what takes room without being told where would else do so on the first GPU
        return place

    def together(self, step: Callable[[], Result]) -> Result:
        """Takes a step, which exchanges nothing, in every process; returns this one's result when all have succeeded.

        Raises, in every process, what was raised in one of them: its own error where it has one; else ValueError for wrong input, or
        FailedProcess.
        """
        if self.count == 1:
            return step()
        own: Exception | None = None
        try:
            result = step()
        except Exception as error:
            own = error
        found = self.everyones(None if own is None else (isinstance(own, ValueError), str(own), type(own).__name__))
        if own is not None:
            raise own
        for rank, failure in enumerate(found):
            if failure is not None:
                wrong_input, message, kind = failure
                if wrong_input:
                    raise ValueError(f"process {rank}: {message}")
                raise FailedProcess(f"process {rank} has failed with {kind}: {message}")
        return result

    def once_a_host_first(self, load: Callable[[], Result]) -> Result:
        """`load` together, by one process of each host before the others, so that what has to be downloaded is downloaded once."""
        first = self.together(lambda: load() if self.local_rank == 0 else None)
        return self.together(lambda: load() if first is None else first)

    def agree(self, what: str, value: object) -> None:
        """Raises ValueError, in every process, if this value is not the same in all of them; of JSON's plain values by names, it names
        the fields."""
        first, *others = self.everyones(value)
        for rank, other in enumerate(others, start=1):
            if other == first:
                continue
            if isinstance(first, Mapping) and isinstance(other, Mapping):
                found = in_words(differences(first, other), ("in process 0", f"in {rank}"))
                raise ValueError(f"{what} must be the same in all processes: {found}")
            raise ValueError(f"{what}: processes 0 and {rank} see different ones: {first!r} and {other!r}")

    def gather(self, value: Result) -> list[Result]:
        """The values of all processes by their ranks, on the main process; nothing on the others."""
        if self.count == 1:
            return [value]
        found: list[Any] | None = [None] * self.count if self.main else None
        connected(lambda: dist.gather_object(value, found))
        return found or []

    def everyones(self, value: Result) -> list[Result]:
        """The values of all processes by their ranks, on each of them."""
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        connected(lambda: dist.all_gather_object(found, value))
        return found


ALONE = Processes()


@contextmanager
def open_processes() -> Iterator[Processes]:
    """This process among those of the launcher (accelerate launch, torchrun), as its environment says; alone without one."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield ALONE
        return
    dist.init_process_group("gloo", timeout=_WAITING)
    yield Processes(
        dist.get_rank(), count, int(os.environ.get("LOCAL_RANK", dist.get_rank())), int(os.environ.get("LOCAL_WORLD_SIZE", count))
    )
    dist.destroy_process_group()  # not after an error, when others may not answer: the process ends then


def interleaved(parts: Sequence[Sequence[Result]]) -> list[Result]:
    """What the processes have of things that they share, in the order of the things. parts: by rank."""
    whole: list[Any] = [None] * sum(map(len, parts))
    for rank, part in enumerate(parts):
        whole[rank :: len(parts)] = part
    return whole


def interleaved_tensors(parts: Sequence[Tensor | None]) -> Tensor:
    """The same for tensors with a row for each thing. None: of a process that has no things; one has some."""
    present = [part for part in parts if part is not None]
    whole = present[0].new_empty(sum(map(len, present)), *present[0].shape[1:])
    for rank, part in enumerate(parts):
        if part is not None:
            whole[rank :: len(parts)] = part
    return whole


def connected(exchange: Callable[[], Result]) -> Result:
    """What an exchange with the other processes gives. Raises FailedProcess if one of them has ended meanwhile."""
    try:
        return exchange()
    except RuntimeError as error:
        raise FailedProcess("another process of this evaluation has ended; its message says why") from error
