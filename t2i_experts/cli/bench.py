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
