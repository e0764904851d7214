"""The configs that ship with the package, which a NAME such as `tiny/base64` stands for wherever a config file is asked for."""

from __future__ import annotations

import difflib
import os
from pathlib import Path


def shipped_folder() -> Path:
    """Where they are: inside an installed package, and beside the package in the repository."""
    package = Path(__file__).parents[1]
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def shipped_configs() -> dict[str, Path]:
    """Their files by name: the path below `shipped_folder`, without its ending."""
    folder = shipped_folder()
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.rglob("*.yaml"))}


def find_config(config: str | Path, beside: Path | None = None) -> Path:
    """The file that is meant: the file of that path, the same with `.yaml` after it, or the shipped config of that name.

    A relative path starts in the folder `beside`, or in the working directory. Raises ValueError that says what was looked for.
    """
    path = Path(config) if beside is None else beside / config
    for file in (path, path.with_name(f"{path.name}.yaml") if path.name else path):
        if file.is_file():
            return file
    shipped, name = shipped_configs(), Path(config).as_posix().removesuffix(".yaml")
    if name not in shipped:
        near = difflib.get_close_matches(name, shipped, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"config file not found: {path}; {hint}shipped are {', '.join(shipped)}")
    return shipped[name]


def shown(path: Path) -> str:
    """A config file's name for the eyes: `NAME (shipped)`, or its path."""
    names = {str(file): name for name, file in shipped_configs().items()}
    text = os.path.normpath(path)
    return f"{names[text]} (shipped)" if text in names else text
