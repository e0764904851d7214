"""How a batch travels from a worker: all but its large tensors in one piece of shared memory.

torch sends each tensor in shared memory of its own: a file, new pages, and a connection with a handshake to fetch it. That costs about
0.4 ms and is worth it for many megabytes; a batch has a dozen tensors of a few kilobytes. They do not go through the workers' pipe: it
takes longer messages bit by bit, and after a worker that is killed within one, nobody could read or write it any more.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_LARGE = 2**20
"""Bytes from which on a tensor travels in shared memory of its own."""


@dataclass(frozen=True)
class Packed:
    """A batch in parts. data: all but the large tensors, pickled, (bytes,) uint8."""

    data: Tensor
    large: tuple[Tensor, ...]

    def pin_memory(self) -> Any:
        """The batch, its memory pinned if it has a method for that, as a tensor has; called by the thread that torch has for that."""
        batch = unpack(self)
        return batch.pin_memory() if hasattr(batch, "pin_memory") else batch


def pack(batch: object) -> Packed:
    """Anything that can be pickled. Of tensors that are views only what they show."""
    out, large = io.BytesIO(), list[Tensor]()
    _Pickler(out, large).dump(batch)
    return Packed(torch.frombuffer(out.getbuffer(), dtype=torch.uint8), tuple(large))


def unpack(packed: Packed) -> Any:
    """What `pack` was given; its tensors may be written to."""
    return _Unpickler(io.BytesIO(packed.data.numpy().data), packed.large).load()


class _Pickler(pickle.Pickler):
    def __init__(self, out: io.BytesIO, large: list[Tensor]) -> None:
        super().__init__(out, protocol=5)
        self._large = large

    def persistent_id(self, value: object) -> int | None:
        """The place of a large tensor, which is left out."""
        if not isinstance(value, Tensor) or (_plain(value) and value.nbytes < _LARGE):
            return None
        self._large.append(value)
        return len(self._large) - 1

    def reducer_override(self, value: object) -> Any:
        """A small tensor as its bytes; everything else as usual."""
        if not isinstance(value, Tensor):
            return NotImplemented
        raw = value.contiguous().view(-1).view(torch.uint8)  # numpy has no bfloat16
        return _tensor, (pickle.PickleBuffer(raw.numpy().data), value.dtype, tuple(value.shape))


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: io.BytesIO, large: Sequence[Tensor]) -> None:
        super().__init__(data)
        self._large = large

    def persistent_load(self, place: int) -> Tensor:
        return self._large[place]


def _plain(tensor: Tensor) -> bool:
    return type(tensor) is Tensor and tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.requires_grad


def _tensor(raw: bytearray, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    return torch.frombuffer(raw, dtype=dtype).view(shape) if raw else torch.empty(shape, dtype=dtype)
