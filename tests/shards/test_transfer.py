"""Batches that travel from workers: what arrives is what was sent, small tensors as bytes."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import dataclass
from multiprocessing import connection
from typing import Any

import pytest
import torch
from torch import Tensor

from t2i_experts.shards.loader import open_loader
from t2i_experts.shards.transfer import pack, unpack


@dataclass(frozen=True)
class Parts:
    """A batch that knows how to pin itself."""

    keys: tuple[str, ...]
    tensors: dict[str, Any]

    def pin_memory(self) -> Parts:
        return Parts((*self.keys, "pinned"), self.tensors)


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


TENSORS = {
    "bytes": torch.arange(6, dtype=torch.uint8).view(1, 2, 3),
    "bfloat16": torch.randn(3, 5).bfloat16(),
    "bool": torch.tensor([True, False]),
    "whole numbers": torch.tensor([-1, 2**62]),
    "one number": torch.tensor(2.5, dtype=torch.float64),
    "none": torch.empty(0, 4),
    "turned": torch.arange(12.0).view(3, 4).T,
    "part": torch.zeros(2**20)[3:5],
    "large": torch.arange(2**18, dtype=torch.float32),
    "large and turned": torch.arange(2**18, dtype=torch.float32).view(2, -1).T,
    "complex": torch.tensor([1 + 2j]),
    "with a gradient": torch.ones(2, requires_grad=True),
}


def test_everything_arrives_as_it_was() -> None:
    found = unpack(pack(Parts(("a", "b"), TENSORS)))
    assert type(found) is Parts and found.keys == ("a", "b") and list(found.tensors) == list(TENSORS)
    for name, tensor in TENSORS.items():
        assert same(found.tensors[name], tensor), name
    found.tensors["bytes"] += 1
    assert TENSORS["bytes"][0, 0, 0] == 0
    assert unpack(pack([1, None, "text"])) == [1, None, "text"]


def test_only_large_tensors_travel_apart_and_parts_take_no_more_than_they_show() -> None:
    packed = pack(TENSORS)
    assert [tensor.shape for tensor in packed.large] == [TENSORS[name].shape for name in ("large", "large and turned", "with a gradient")]
    assert len(packed.data) < 3000


def test_a_batch_that_arrives_is_pinned() -> None:
    assert pack(Parts(("a",), {})).pin_memory() == Parts(("a", "pinned"), {})
    assert pack([1, "a"]).pin_memory() == [1, "a"]
    packed = pack(torch.ones(1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "pin_memory", lambda self: self + 1)
        assert packed.pin_memory().item() == 2


class Positions:
    """A reader of nothing but positions."""

    buckets = None

    def __getitem__(self, position: int) -> Any:
        return position


def collate(positions: Any) -> dict[str, Tensor]:
    return {"small": torch.tensor(positions), "large": torch.full((2**20,), positions[0], dtype=torch.uint8)}


def collate_in_a_worker_that_sends_only_short_messages(positions: Any) -> Tensor:
    """A longer one than 4096 bytes (PIPE_BUF), which a pipe may take bit by bit, kills it in between."""
    write = connection.Connection._write

    def short(handle: int, data: Any) -> int:
        if len(data) > 4096:
            os.kill(os.getpid(), signal.SIGKILL)
        return write(handle, data)

    connection.Connection._send.__defaults__ = (short,)
    return torch.ones(900_000, dtype=torch.uint8)


@pytest.mark.skipif(sys.platform != "linux", reason="looks into multiprocessing's pipes")
def test_a_worker_that_is_killed_leaves_no_half_of_a_message() -> None:
    """The thread that pins memory would wait for the rest for ever, and torch, ending the workers, for that thread."""
    options: dict[str, Any] = {"start": 0, "stop": 8, "batch_size": 2, "accumulation": 1, "rank": 0, "world_size": 1, "workers": 1}
    batches = open_loader(Positions(), collate_in_a_worker_that_sends_only_short_messages, **options)
    assert [batch.sum().item() for batch in batches] == [900_000] * 4


def fail(positions: Any) -> Any:
    return lambda: None  # cannot be pickled


@pytest.mark.parametrize("workers", [0, 2])
def test_from_workers_and_from_this_process(workers: int) -> None:
    options: dict[str, Any] = {"start": 0, "stop": 12, "batch_size": 2, "accumulation": 1, "rank": 0, "world_size": 1, "workers": workers}
    batches = list(open_loader(Positions(), collate, **options))
    assert [batch["small"].tolist() for batch in batches] == [[i, i + 1] for i in range(0, 12, 2)]
    assert all((batch["large"] == 2 * i).all() for i, batch in enumerate(batches))


def test_a_batch_that_cannot_travel_is_an_error_of_its_own() -> None:
    options: dict[str, Any] = {"start": 0, "stop": 4, "batch_size": 2, "accumulation": 1, "rank": 0, "world_size": 1, "workers": 1}
    with pytest.raises(Exception, match="pickle"):
        list(open_loader(Positions(), fail, **options))
