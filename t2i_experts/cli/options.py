"""What the commands share: how a group of them is made, the arguments and options that several take, and what a shell completes there.

A completion that is empty leaves the word to the shell, which knows the files.
"""

from __future__ import annotations

import glob
from pathlib import Path
from typing import Annotated

import typer


def group(name: str, help: str) -> typer.Typer:
    """An empty group of commands, whose help is plain text and comes without rich, as that of the root."""
    return typer.Typer(
        name=name, help=help, no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False
    )


def complete_shipped(incomplete: str) -> list[str]:
    """The shipped configs by name."""
    from t2i_experts.config.shipped import shipped_configs

    return [name for name in shipped_configs() if name.startswith(incomplete)]


def complete_config(incomplete: str) -> list[str]:
    """The shipped configs by name, and YAML files."""
    return [*complete_shipped(incomplete), *_paths(incomplete, "*.yaml")]


def complete_model(incomplete: str) -> list[str]:
    """Model folders: that of this name, and those that a run, or the runs in a folder, hold as `model` and `best`."""
    found = [
        path for above in ("*", "*/model", "*/best", "*/*/model", "*/*/best") for path in _paths(incomplete, f"{above}/model_index.json")
    ]
    return sorted({str(Path(path).parent) for path in found})


def complete_sampler(incomplete: str) -> list[str]:
    """The samplers, plugins' too."""
    from t2i_experts.registry import registry

    return [name for name in registry.names("sampler") if name.startswith(incomplete)]


def complete_features(incomplete: str) -> list[str]:
    """The networks whose features metrics compare, plugins' too."""
    from t2i_experts.registry import registry

    return [name for name in registry.names("features") if name.startswith(incomplete)]


def complete_metric(incomplete: str) -> list[str]:
    """The metrics of pictures with captions, plugins' too."""
    from t2i_experts.registry import registry

    return [name for name in registry.names("metric") if name.startswith(incomplete)]


def _paths(incomplete: str, pattern: str) -> list[str]:
    return sorted(glob.glob(glob.escape(incomplete) + pattern))


Config = Annotated[
    str,
    typer.Argument(metavar="CONFIG", help="A YAML file, or a shipped config's name: see config list.", autocompletion=complete_config),
]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Values that replace the file's.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Workers = Annotated[int | None, typer.Option(help="Threads that decode pictures; all cores if not given.", show_default=False)]
