"""Records: what made a number, as JSON's plain values, written whole or not at all, and compared field by field."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(field, its value in the first, in the second) wherever two records differ: `sampling.guidance` for one inside another, None for
    a field that is not there."""
    one, other = _flat(_plain(first)), _flat(_plain(second))
    return [(name, one.get(name), other.get(name)) for name in dict.fromkeys([*one, *other]) if one.get(name) != other.get(name)]


def in_words(found: list[tuple[str, Any, Any]]) -> str:
    """The first few differences: `seed is 0 there and 1 here`."""
    shown = [f"{name} is {first!r} there and {second!r} here" for name, first, second in found[:3]]
    return ", ".join(shown) + (f", and {len(found) - 3} more" if len(found) > 3 else "")


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """Writes a record in one move; a kill leaves what was there before. Raises ValueError if it cannot be written."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "w", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False, indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror or error}") from error


def read_json(path: Path) -> dict[str, Any] | None:
    """A record that was written before; None if there is none. Raises ValueError for what is no record."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no JSON object")
    return found


def _plain(record: Mapping[str, Any]) -> dict[str, Any]:
    """As it would come back from a file: lists for tuples, strings for the keys."""
    plain: dict[str, Any] = json.loads(json.dumps(record))
    return plain


def _flat(record: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in record.items():
        fields |= _flat(value, f"{above}{name}.") if isinstance(value, dict) and value else {f"{above}{name}": value}
    return fields
