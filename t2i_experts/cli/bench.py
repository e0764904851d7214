"""`t2i-experts bench`: side-by-side timings that anyone can repeat, one sub-command each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from t2i_experts.cli.options import Config, Json, Overrides, check_counts, complete_model, group

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
def fid(
    images: Annotated[int, typer.Option(help="Pictures that are drawn for this, and held on the device.")] = 5000,
    side: Annotated[int, typer.Option(help="Their side in pixels.")] = 1024,
    features: Annotated[str, typer.Option(help="inception or squeezenet, with random weights.")] = "inception",
    batch_size: Annotated[int, typer.Option(help="Pictures that go through the network together.")] = 32,
    workers: Annotated[int | None, typer.Option(help="Threads that write and read PNGs; all cores if not given.")] = None,
    repeats: Repeats = 3,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Statistics of features of images in memory, beside writing them as PNGs and reading these again; and the share of the sums."""
    from t2i_experts.bench.fid import bench_fid

    tell(bench_fid(images, side=side, features=features, batch_size=batch_size, workers=workers, repeats=repeats, device=device), as_json)


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


@app.command()
def experts(
    network: Network = "100m",
    batch: Annotated[list[int], typer.Option(help="Images a sampling; may be given several times.")] = [1, 16],  # noqa: B006
    steps: Annotated[int, typer.Option(help="Steps of DPM-Solver++(2M).")] = 25,
    eager: Eager = False,
    repeats: Repeats = 20,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Sampling with an ensemble of three experts, all on the device, beside a single network of their size."""
    from t2i_experts.bench.experts import bench_experts
    from t2i_experts.bench.machine import bench_device

    say_what_takes_long(eager)
    tell(bench_experts(network, batch, bench_device(device), steps=steps, eager=eager, repeats=repeats), as_json)


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
    check_counts(steps=steps, batch_size=batch_size)

    from t2i_experts.bench.machine import bench_device
    from t2i_experts.bench.sample import bench_sample

    tell(bench_sample(model, bench_device(device), steps=steps, batch=batch_size, compile=compile, repeats=repeats), as_json)


@app.command()
def quality(
    config: Config,
    overrides: Overrides = None,
    minutes: Annotated[float, typer.Option(help="Of training steps, for each run; compiling, validation and saving come on top.")] = 4.0,
    seeds: Annotated[int, typer.Option(help="Runs of each candidate that count.")] = 2,
    rates: Annotated[
        str | None,
        typer.Option(
            "--rates", metavar="RATE,RATE", help="Learning rates, each tried in one run more; default: the config's.", show_default=False
        ),
    ] = None,
    baseline_rates: Annotated[
        str | None,
        typer.Option("--baseline-rates", metavar="RATE,RATE", help="The same for the baseline; default: --rates.", show_default=False),
    ] = None,
    variant: Annotated[
        list[str] | None,
        typer.Option(
            "--variant",
            metavar="NAME:KEY=VALUE,...",
            help="This project's network with other values, as a candidate more; repeatable.",
            show_default=False,
        ),
    ] = None,
    alone: Annotated[bool, typer.Option("--alone", help="Leave out the baseline.")] = False,
    devices: Annotated[
        str | None,
        typer.Option(
            "--devices",
            metavar="0,1",
            help="GPUs by number, a run on each at a time, or cpu; default: the best there is.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="A new folder that keeps the runs; default: they are removed.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Held-out loss after minutes of training on your shards, beside diffusers' U-Net of equal FLOPs in the same trainer."""
    from t2i_experts.bench.quality import RunsFailed, Settings, bench_quality, failures, parse_rates, parse_variant
    from t2i_experts.cli.config import check_parts
    from t2i_experts.config import load_config

    variants = dict(map(parse_variant, variant or []))
    if len(variants) < len(variant or []):
        raise ValueError(f"--variant={variant}: every one needs a name of its own")
    for more in ((), *variants.values()):
        check_parts(load_config(config, [*(overrides or []), *more]))
    settings = Settings(
        config,
        overrides or [],
        minutes,
        seeds,
        parse_rates(rates, "--rates"),
        parse_rates(baseline_rates, "--baseline-rates"),
        variants,
        not alone,
        devices.split(",") if devices is not None else [],
        out,
    )
    result = bench_quality(settings, lambda line: typer.echo(line, err=True))
    tell(result, as_json)
    if failed := failures(result):
        raise RunsFailed("; ".join(failed))


@app.command()
def growth(
    network: Network = "100m",
    plot: Annotated[Path, typer.Option("--plot", metavar="FILE.png", help="Where the charts go.")] = Path("growth.png"),
    compile: Annotated[bool, typer.Option("--compile", help="Compile everything, which takes minutes for each shape.")] = False,
    minutes: Annotated[float, typer.Option(help="What would begin later is left out; the cheapest comes first.")] = 4.0,
    repeats: Repeats = 5,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Time and memory of an evaluation and of a training step, over parameters, resolution, batch and prompt length."""
    from t2i_experts.bench.growth import bench_growth
    from t2i_experts.bench.machine import bench_device

    tell(bench_growth(network, bench_device(device), plot=plot, compiled=compile, minutes=minutes, repeats=repeats), as_json)


def say_what_takes_long(eager: bool = False) -> None:
    """On stderr, where nothing else is heard of it."""
    if not eager:
        typer.echo("compiling, which takes minutes; the table comes at the end", err=True)


def tell(result: Result, as_json: bool) -> None:
    """Prints what was found."""
    from t2i_experts.bench.result import table

    typer.echo(json.dumps(result.plain()) if as_json else table(result))
