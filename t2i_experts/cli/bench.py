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
Network = Annotated[str, typer.Option(help="100m: 64 px, about 100 M parameters; tiny: to try the command itself.")]
Eager = Annotated[bool, typer.Option("--eager", help="Compile nothing.")]
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
def train(
    network: Network = "100m",
    batch: Annotated[int, typer.Option(help="Images a step.")] = 256,
    eager: Eager = False,
    repeats: Repeats = 10,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """A training step, compiled, beside diffusers' U-Net of equal FLOPs in its example's loop, eager and compiled."""
    from t2i_experts.bench.machine import bench_device
    from t2i_experts.bench.train import bench_train

    say_what_takes_long(eager)
    tell(bench_train(network, batch, bench_device(device), eager=eager, repeats=repeats), as_json)


@app.command()
def denoiser(
    network: Network = "100m",
    batch: Annotated[list[int], typer.Option(help="Images an evaluation; may be given several times.")] = [2, 64],  # noqa: B006
    eager: Eager = False,
    repeats: Repeats = 20,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """One evaluation of the network in sampling, beside diffusers' U-Net of equal FLOPs, eager and compiled."""
    from t2i_experts.bench.denoiser import bench_denoiser
    from t2i_experts.bench.machine import bench_device

    say_what_takes_long(eager)
    tell(bench_denoiser(network, batch, bench_device(device), eager=eager, repeats=repeats), as_json)


@app.command("compile")
def compile_(
    what: Annotated[str, typer.Option(help="step: forward and backward pass of training; evaluation: as in sampling.")] = "step",
    network: Network = "100m",
    batch: Annotated[int, typer.Option(help="Images a call.")] = 256,
    backend: Annotated[str, typer.Option(help="Of torch.compile; with eager, code is traced and not compiled.")] = "inductor",
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Seconds of a compiled network's first call: cold, from the cache on disk, and for three networks of one shape."""
    from t2i_experts.bench.compile import bench_compile
    from t2i_experts.bench.machine import bench_device

    say_what_takes_long()
    tell(bench_compile(what, network, batch, bench_device(device), backend=backend), as_json)


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


def say_what_takes_long(eager: bool = False) -> None:
    """On stderr, where nothing else is heard of it."""
    if not eager:
        typer.echo("compiling, which takes minutes; the table comes at the end", err=True)


def tell(result: Result, as_json: bool) -> None:
    """Prints what was found."""
    from t2i_experts.bench.result import table

    typer.echo(json.dumps(result.plain()) if as_json else table(result))
