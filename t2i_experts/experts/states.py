"""Weights of networks as values: names with tensors, as `state_dict` gives them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

State = Mapping[str, Tensor]
"""All weights of one network, by name."""


def refuse_misfit(root: State, other: State, whose: str) -> None:
    """Raises ValueError that names the first tensor that only one of two states has, or that they have in different shapes.

    whose: what the other state is called, "expert 2".
    """
    if found := misfit(root, other):
        name, in_root, there, more = found
        raise ValueError(f"{whose} does not fit the root: {name} is {there} there and {in_root} in the root{more}")


def misfit(first: State, second: State) -> tuple[str, str, str, str] | None:
    """The first tensor that only one of two states has, or that they have in different shapes: its name, what the first and what the
    second has, and in words how many more there are; None if the states fit."""
    shapes, others = ({name: str(tuple(tensor.shape)) for name, tensor in state.items()} for state in (first, second))
    wrong = [name for name in {**shapes, **others} if shapes.get(name) != others.get(name)]
    if not wrong:
        return None
    more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
    return wrong[0], shapes.get(wrong[0], "missing"), others.get(wrong[0], "missing"), more


def count_bytes(state: State) -> int:
    """Of all tensors together."""
    return sum(tensor.numel() * tensor.element_size() for tensor in state.values())


def digest(state: State) -> str:
    """sha256 (hex) over names, types, shapes and bytes, whatever the order of the names."""
    found = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def fingerprint(state: State) -> str:
    """The first 16 digits of the digest, by which the weights of one network are known."""
    return digest(state)[:16]
