"""What tensors occupy, without computing them: fake tensors, and a count of the storages that are alive."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Module = TypeVar("Module", bound=nn.Module)


class Allocations(TorchDispatchMode):
    """While it is on, counts the bytes of all storages that operations make, forward and backward, until each is freed.

    current, peak: in bytes, of what was made since it was made. What a kernel allocates and frees within itself is not seen. With fake
    tensors it costs milliseconds an operation, whatever their size.
    """

    def __init__(self) -> None:
        super().__init__()
        self.current = 0
        self.peak = 0
        self._alive: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {_storage(tensor)._cdata for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = _storage(tensor)
                if storage._cdata not in given and storage._cdata not in self._alive:
                    self._add(storage)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        self._alive[storage._cdata] = storage.nbytes()
        self.current += storage.nbytes()
        self.peak = max(self.peak, self.current)
        weakref.finalize(storage, self._remove, storage._cdata)

    def _remove(self, key: int) -> None:
        self.current -= self._alive.pop(key)


def occupied(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind some tensors, each counted once; on the meta device, of what they would have."""
    return sum({storage._cdata: storage.nbytes() for storage in map(_storage, tensors)}.values())


def held_by(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers."""
    return occupied([*module.parameters(), *module.buffers()])


def materialized(module: Module) -> Module:
    """A module on the meta device given parameters and buffers on the CPU, in place: call it under `FakeTensorMode`, where they are fake.

    (`Module.to_empty` cannot exchange fake ones.)
    """
    made: dict[int, Tensor] = {}
    for part in module.modules():
        for table in (part._parameters, part._buffers):
            for name, tensor in table.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
                    made[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
                table[name] = made[id(tensor)]  # type: ignore[assignment]
    return module


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    return tensor.untyped_storage()
