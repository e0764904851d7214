"""The JSON files of model folders, and errors that name a file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write_json(path: Path, tree: Mapping[str, Any]) -> None:
    """Writes an object for people to read."""
    path.write_text(json.dumps(tree, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """An object of a model folder. Raises ValueError that names the file."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"not a whole model folder: {path} is missing") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return tree


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Puts the file's name before a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
