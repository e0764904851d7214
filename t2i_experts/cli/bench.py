"""`t2i-experts bench`: side-by-side timings that anyone can repeat, one sub-command each."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from t2i_experts.cli.options import Json, complete_model, group

if TYPE_CHECKING:
    from t2i_experts.bench.result import Result

app = group("bench", "Time this project's code beside strong baselines, in one process: ratios, floors and errors.")

Repeats = Annotated[
    int, typer.Option(help="Timed calls of each candidate; the table shows medians and half the distance of the quartiles.")
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; default: the best there is.", show_default=False)]


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


@app.command()
def sample(
    model: Annotated[
        str | None,
        typer.Option(help="A model folder or hub id; default: the embedded model.", show_default=False, autocompletion=complete_model),
    ] = None,
    steps: Annotated[int, typer.Option(help="Steps of DPM-Solver++(2M).")] = 25,
    batch_size: Annotated[int, typer.Option(help="Pictures that are drawn together.")] = 1,
    compile: Annotated[bool, typer.Option("--compile", help="Also measure compiled code.")] = False,
    repeats: Repeats = 10,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """From a prompt to a picture: every kernel by itself, beside evaluations replayed as CUDA graphs and compiled ones."""
    for name, value in (("steps", steps), ("batch-size", batch_size)):
        if value < 1:
            raise ValueError(f"--{name}={value} must be at least 1")

    from t2i_experts.bench.machine import bench_device
    from t2i_experts.bench.sample import bench_sample

    tell(bench_sample(model, bench_device(device), steps=steps, batch=batch_size, compile=compile, repeats=repeats), as_json)


def tell(result: Result, as_json: bool) -> None:
    """Prints what was found."""
    from t2i_experts.bench.result import table

    typer.echo(json.dumps(result.plain()) if as_json else table(result))
