"""What the commands share: how a group of them is made, the arguments and options that several take, and what a shell completes there.

A completion that is empty leaves the word to the shell, which knows the files.
"""

from __future__ import annotations

import contextlib
import glob
import os
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer


def group(name: str, help: str) -> typer.Typer:
    """An empty group of commands, whose help is plain text and comes without rich, as that of the root."""
    return typer.Typer(
        name=name, help=help, no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False
    )


def check_counts(**counts: int | None) -> None:
    """Raises ValueError for one that is less than 1, by its option's name; None is one that was not given."""
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')}={value} must be at least 1")


def tabulated(rows: Sequence[Sequence[str]], left: Collection[int] = (0,)) -> list[str]:
    """The lines of a table, whose columns are aligned to the right but for those in `left`."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(n) if i in left else cell.rjust(n) for i, (cell, n) in enumerate(zip(row, widths, strict=True))).rstrip()
        for row in rows
    ]


@contextlib.contextmanager
def one_voice() -> Iterator[None]:
    """Lets the main process of a launcher's tell what went wrong, where it went wrong in all of them; the others end with the same exit
    code. For commands that agree on errors (`t2i_experts.evaluation.processes`)."""
    try:
        yield
    except Exception as error:
        if os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0":
            raise
        from t2i_experts.evaluation.processes import FailedProcess

        if not isinstance(error, (ValueError, FailedProcess)):
            raise
        time.sleep(1)  # a launcher ends all when one has ended: the main process is to say why before
        raise typer.Exit(2 if isinstance(error, ValueError) else 1) from error


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

Model = Annotated[str | None, typer.Option(help="A model folder or hub id; default: the embedded model.", autocompletion=complete_model)]
Steps = Annotated[int | None, typer.Option(help="Sampling steps.")]
Guidance = Annotated[float | None, typer.Option(help="Classifier-free guidance; 1 is none.")]
Sampler = Annotated[str | None, typer.Option(help="euler, heun or dpmpp_2m.", autocompletion=complete_sampler)]
Threshold = Annotated[float | None, typer.Option(help="Percentile of dynamic thresholding, such as 0.995; 0 is none.")]
BatchSize = Annotated[int, typer.Option(help="Pictures that are computed together.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps; default: the best there is.")]
Dtype = Annotated[str | None, typer.Option(help="float32 or bfloat16; default: bfloat16 where the device computes in it.")]
Compile = Annotated[bool, typer.Option("--compile", help="Compile the network first: a minute that pays for many pictures.")]

Features = Annotated[
    str, typer.Option(help="Network: inception (FID), open_clip, squeezenet, or a plugin's.", autocompletion=complete_features)
]
Protocol = Annotated[
    str | None,
    typer.Option(help="Inception's resizing and scaling: pytorch-fid (default) or tf1 (torch-fidelity).", show_default=False),
]
Resize = Annotated[str | None, typer.Option(help="clean: clean-fid's filter, with tf1's scaling.", show_default=False)]
Weights = Annotated[
    str | None,
    typer.Option(
        help="File (.pth, .safetensors, .npz), URL or OWNER/REPO/FILE of the hub; open_clip's tag. Else inception's public ones.",
        show_default=False,
    ),
]
Kid = Annotated[bool, typer.Option("--kid", help="Also the kernel distance, with its spread over 100 subsets.")]
PrecisionRecall = Annotated[bool, typer.Option("--precision-recall", help="Also precision and recall, by 3 nearest neighbours.")]
