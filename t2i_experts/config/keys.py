"""Which keys a config may have, which of them was meant by one that it may not, and which have values of their own below them."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, get_args, get_origin, get_type_hints

from t2i_experts.config.schema import MISSING


def check_keys(kind: type, tree: Any, *, also: Iterable[str] = ()) -> None:
    """Raises ValueError for the first key of a tree of plain values that the dataclass `kind`, or one inside it, does not have.

    The message names the key with all that leads to it, the nearest valid one, and those that are allowed in its place. `also`: what
    may have been meant at the top level beyond the fields of `kind`.
    """
    for key, name, owner in _unknown(kind, tree, ""):
        fields = [field.name for field in dataclasses.fields(owner)]
        near = _nearest(kind, str(name), [*fields, *also] if owner is kind else fields)
        hint = f"did you mean {near}? " if near else ""
        raise ValueError(f"{key}: unknown key {name!r} in {owner.__name__}; {hint}allowed: {', '.join(fields)}")


def check_shapes(kind: type, tree: Any) -> None:
    """Raises ValueError for the first value in a tree that is no mapping or list, or of another length, where `kind` says what it is."""
    for key, problem in _misshapen(kind, tree, ""):
        raise ValueError(f"{key}: {problem}")


def _unknown(kind: Any, tree: Any, at: str) -> Iterator[tuple[str, Any, type]]:
    """Full key, name and owning dataclass of every unknown key below `at`, where a value of type `kind` belongs."""
    if isinstance(tree, Mapping):
        hints = get_type_hints(kind) if dataclasses.is_dataclass(kind) else None
        for name, value in tree.items():
            key = f"{at}.{name}" if at else str(name)
            if hints is None:
                yield from _unknown(_element(kind), value, key)
            elif name in hints:
                yield from _unknown(hints[name], value, key)
            else:
                yield key, name, kind
    elif isinstance(tree, list):
        for i, value in enumerate(tree):
            yield from _unknown(_element(kind), value, f"{at}[{i}]")


def _misshapen(kind: Any, tree: Any, at: str) -> Iterator[tuple[str, str]]:
    """Full key of every wrongly shaped value at or below `at`, where one of type `kind` belongs, and what is wrong with it."""
    origin = get_origin(kind)
    if tree == MISSING or (isinstance(tree, str) and "${" in tree):
        return
    if dataclasses.is_dataclass(kind) or origin is dict:
        if not isinstance(tree, Mapping):
            yield at, f"needs {f'the keys of {kind.__name__}' if origin is None else 'names with values'} below it, received {tree!r}"
            return
        hints = get_type_hints(kind) if origin is None else {}
        for name, value in tree.items():
            yield from _misshapen(hints.get(name, _element(kind)), value, f"{at}.{name}" if at else str(name))
    elif origin is list:
        if isinstance(tree, Mapping):
            yield at, "a list is replaced as a whole, as by '[a, b]', and not element by element"
        elif not isinstance(tree, (list, tuple)):
            yield at, f"needs a list, such as '[a, b]', received {tree!r}"
        else:
            for i, value in enumerate(tree):
                yield from _misshapen(_element(kind), value, f"{at}[{i}]")
    elif origin is tuple and isinstance(tree, (list, tuple)) and len(tree) != len(get_args(kind)):
        yield at, f"received length {len(tree)}, {list(tree)!r}, needs length {len(get_args(kind))}"


def _element(kind: Any) -> Any:
    """The type of the values of a dict or list type; None for any other."""
    return get_args(kind)[-1] if get_origin(kind) in (dict, list) else None


def _nearest(root: type, name: str, fields: list[str]) -> str:
    """The keys that may have been meant: of this very name elsewhere, else one spelt alike here, else spelt alike elsewhere."""
    elsewhere = dict(_keys(root, ""))
    spelt_alike = difflib.get_close_matches(name, fields, n=1)
    meant = [key for key, last in elsewhere.items() if last == name]
    if not meant and not spelt_alike:
        alike = difflib.get_close_matches(name, set(elsewhere.values()), n=1, cutoff=0.75)
        meant = [key for key, last in elsewhere.items() if last in alike]
    return " or ".join(repr(key) for key in meant or spelt_alike)


def _keys(kind: Any, at: str) -> Iterator[tuple[str, str]]:
    """Every key with all that leads to it, and its last name. What a user names is NAME, and the lists' elements are left out."""
    if dataclasses.is_dataclass(kind):
        for name, hint in get_type_hints(kind).items():
            key = f"{at}.{name}" if at else name
            yield key, name
            yield from _keys(hint, key)
    elif get_origin(kind) is dict:
        yield from _keys(_element(kind), f"{at}.NAME")
