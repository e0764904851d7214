"""Where each value of a config comes from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from t2i_experts.config.schema import MISSING

DEFAULT = "default"


@dataclass(frozen=True)
class Setting:
    """A resolved value (see `to_plain`), and what gave it: a file, an override, or `default`."""

    value: Any
    origin: str


def flatten(tree: Mapping[str, Any], at: str = "") -> dict[str, Any]:
    """The values of nested dicts by dotted key; a list is one value, and so is an empty dict."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        key = f"{at}.{name}" if at else name
        flat |= flatten(value, key) if isinstance(value, Mapping) and value else {key: value}
    return flat


def trace(resolved: Mapping[str, Any], layers: Sequence[tuple[str, Any]]) -> dict[str, Setting]:
    """Every value of a resolved config by dotted key, with its origin.

    layers: (origin, tree of plain values), merged in this order, so that the last one that says a key is where its value comes from.
    """

    def origin(key: str) -> str:
        return next((name for name, tree in reversed(layers) if _says(tree, key.split("."))), DEFAULT)

    return {key: Setting(value, origin(key)) for key, value in flatten(resolved).items()}


def _says(tree: Any, names: Sequence[str]) -> bool:
    """Whether a tree gives the value at a key, itself or by a reference in the place of all that holds it."""
    for name in names:
        if not isinstance(tree, Mapping):
            break
        if name not in tree:
            return False
        tree = tree[name]
    return bool(tree != MISSING)
