"""`t2i-experts bench`: side-by-side timings that anyone can repeat, one sub-command each."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from t2i_experts.cli.options import Json, group

if TYPE_CHECKING:
    from t2i_experts.bench.result import Result

app = group("bench", "Time this project's code beside strong baselines, in one process: ratios, floors and errors.")

Repeats = Annotated[
    int, typer.Option(help="Timed calls of each candidate; the table shows medians and half the distance of the quartiles.")
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; default: the best there is.", show_default=False)]


@app.command()
def startup(
    command: Annotated[
        list[str] | None, typer.Option("--command", help="A command whose help is timed, with those below it; default: all.")
    ] = None,
    pictures: Annotated[int, typer.Option(help="How often a picture is drawn with the embedded model; 0: never.")] = 5,
    alone: Annotated[bool, typer.Option("--alone", help="Leave out the other tools.")] = False,
    repeats: Repeats = 10,
    as_json: Json = False,
) -> None:
    """Whole processes: help, a wrong option and a picture, beside other tools' help and imports."""
    from t2i_experts.cli.app import COMMANDS, load

    unknown = [name for name in command or () if name not in COMMANDS]
    if unknown:
        raise ValueError(f"--command={unknown[0]!r}; allowed: {', '.join(COMMANDS)}")
    helps = [(name,) for name in command or COMMANDS]
    below = [(name, other) for (name,) in helps for other in getattr(load(name, COMMANDS[name]), "commands", ())]

    from t2i_experts.bench.startup import bench_startup

    tell(bench_startup(sorted([*helps, *below]), pictures=pictures, alone=alone, repeats=repeats), as_json)


Side = Annotated[int, typer.Option("--size", help="Side of the pictures in pixels.")]
Batch = Annotated[int, typer.Option("--batch-size", help="Pictures in a batch.")]


@app.command()
def shards(
    samples: Annotated[int, typer.Option(help="How many the shards hold that are drawn for this.")] = 20_000,
    size: Side = 64,
    repeats: Repeats = 10,
    as_json: Json = False,
) -> None:
    """Samples out of local tars in one process, as bytes and decoded, beside webdataset."""
    from t2i_experts.bench.shards import bench_shards

    tell(bench_shards(samples, size=size, repeats=repeats), as_json)


@app.command()
def resume(
    position: Annotated[int, typer.Option(help="The sample at which training goes on.")] = 1_000_000,
    replayed: Annotated[int, typer.Option(help="Samples that the baseline replays; its time is scaled to the position.")] = 20_000,
    samples: Annotated[int, typer.Option(help="How many the shards hold that are drawn for this.")] = 4096,
    size: Side = 64,
    batch_size: Batch = 64,
    repeats: Repeats = 10,
    as_json: Json = False,
) -> None:
    """The time until the first batch far into a run, beside webdataset and Accelerate, which replay what comes before."""
    from t2i_experts.bench.resume import bench_resume

    tell(bench_resume(position, replayed=replayed, samples=samples, size=size, batch_size=batch_size, repeats=repeats), as_json)


@app.command()
def loader(
    images: Annotated[
        int, typer.Option(help="JPEG files that are drawn for this; shards of prepared pictures hold ten times as many.")
    ] = 1000,
    side: Annotated[int, typer.Option(help="Side of these files in pixels.")] = 512,
    size: Side = 64,
    batch_size: Batch = 64,
    workers: Annotated[int, typer.Option(help="Processes that read and decode.")] = 2,
    repeats: Repeats = 10,
    as_json: Json = False,
) -> None:
    """Pictures per second of the training loader, beside a PyTorch DataLoader that opens the files with Pillow."""
    from t2i_experts.bench.loader import bench_loader

    tell(bench_loader(images, side=side, size=size, batch_size=batch_size, workers=workers, repeats=repeats), as_json)


@app.command()
def optimizer(
    parameters: Annotated[int, typer.Option(help="Millions of parameters.")] = 100,
    repeats: Repeats = 10,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """AdamW and EMA: fused and many tensors at a time, beside PyTorch's default AdamW and a loop over the parameters."""
    from t2i_experts.bench.machine import bench_device
    from t2i_experts.bench.optimizer import bench_optimizer

    tell(bench_optimizer(parameters, bench_device(device), repeats=repeats), as_json)


def tell(result: Result, as_json: bool) -> None:
    """Prints what was found."""
    from t2i_experts.bench.result import table

    typer.echo(json.dumps(result.plain()) if as_json else table(result))
