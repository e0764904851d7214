"""What an evaluation and a training step of this project's network cost as the work grows: more parameters, pixels, images, words.

One of these grows at a time, and the others stay what they are at the base: a network of `SIZES`, its own resolution, `BATCH` images, and
prompts of as many tokens as the embedded model reads.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from t2i_experts.bench.device import free
from t2i_experts.bench.loops import OwnLoop, add_batch_gradients
from t2i_experts.bench.machine import describe
from t2i_experts.bench.network import ENCODERS, Size, captions, noise_images, own_network, size_named, stage_of
from t2i_experts.bench.result import Result, Row
from t2i_experts.bench.timing import Timing, interleave
from t2i_experts.cascade.device import default_dtype
from t2i_experts.cascade.graphs import GraphedDenoiser
from t2i_experts.cascade.picture import save_png
from t2i_experts.cascade.stage import build_network
from t2i_experts.charts import Chart, Marks, Series, draw_chart
from t2i_experts.diffusion.compiling import compile_denoiser
from t2i_experts.training.measure import most_allocated
from t2i_experts.types import Conditioning

BATCH = 16
BATCHES = (1, 4, 16, 64, 256)
TOKENS = (16, 48, 128, 256, 512)
HALVES = {"parameters": (1, 2, 3, 4), "resolution": (1, 2, 4, 8)}
"""Widths of the network, and sides of the pictures, in halves of the base's."""
X_LABELS = {"parameters": "parameters", "resolution": "side in pixels", "batch": "images", "tokens": "T5 tokens of a prompt"}
COLOURS = {"evaluation": "#1f5fa8", "training step": "#d1662b"}


@dataclass(frozen=True)
class Work:
    """batch: images. tokens: of each prompt, that T5 gives; CLIP gives as many as ever."""

    size: Size
    batch: int
    tokens: int

    @property
    def amount(self) -> int:
        """About how much there is to do, to begin with what is cheap."""
        return self.size.channels[-1] ** 2 * self.size.image**2 * self.batch * (self.tokens + 1000)

    def text(self, device: torch.device) -> Conditioning:
        """Prompts of this length."""
        return captions(self.batch, device, {**ENCODERS, "t5": replace(ENCODERS["t5"], max_tokens=self.tokens)})


@dataclass(frozen=True)
class Cost:
    """timing: of the calls. peak: bytes on the device at the worst moment, if anything counts them. missing: why there is neither."""

    timing: Timing | None = None
    peak: int | None = None
    missing: str = ""


def growing(base: Work) -> dict[str, list[Work]]:
    """What is measured, by what grows in it."""
    size = base.size
    widths = [tuple(channels * halves // 2 for channels in size.channels) for halves in HALVES["parameters"]]
    return {
        "parameters": [replace(base, size=replace(size, channels=channels)) for channels in widths],
        "resolution": [replace(base, size=replace(size, image=size.image * halves // 2)) for halves in HALVES["resolution"]],
        "batch": [replace(base, batch=batch) for batch in BATCHES],
        "tokens": [replace(base, tokens=tokens) for tokens in TOKENS],
    }


def bench_growth(
    network: str, device: torch.device, *, plot: Path, compiled: bool = False, minutes: float = 4.0, repeats: int = 5
) -> Result:
    """Measures all of `growing`, the cheapest first, and draws it into a PNG.

    What the device has no memory for is marked, and so is what comes after so many minutes. Raises ValueError for settings that are out
    of range.
    """
    size = size_named(network)
    if not 0 < minutes < float("inf"):
        raise ValueError(f"--minutes={minutes} must be positive and finite")
    if repeats < 1:
        raise ValueError(f"--repeats={repeats} must be at least 1")
    if plot.suffix.lower() != ".png" or plot.is_dir():
        raise ValueError(f"--plot={str(plot)!r} must be a file whose name ends in .png")
    try:  # before minutes are spent
        plot.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=plot.parent).close()
    except OSError as error:
        raise ValueError(f"--plot={str(plot)!r} cannot be written: {error.strerror}") from error
    deadline = time.monotonic() + 60 * minutes
    axes = growing(Work(size, BATCH, ENCODERS["t5"].max_tokens))
    makers = {"evaluation": _evaluation, "training step": _training_step}
    parameters: dict[tuple[int, ...], int] = {}
    costs: dict[tuple[Work, str], Cost] = {}
    for work in sorted({work for works in axes.values() for work in works}, key=lambda work: work.amount):
        if work.size.channels not in parameters:
            parameters[work.size.channels] = _parameters(work.size)
        for what, make in makers.items():
            late = time.monotonic() > deadline
            costs[work, what] = (
                Cost(missing="no time left") if late else _cost(partial(make, work, device, compiled), device, repeats, compiled)
            )
    points = {axis: [(_position(axis, work, parameters[work.size.channels]), work) for work in works] for axis, works in axes.items()}
    save_png(_panels(points, costs), plot)
    rows = [
        _row(f"{axis} {position:,}: {what}", work, parameters[work.size.channels], costs[work, what])
        for axis, works in points.items()
        for position, work in works
        for what in makers
    ]
    settings = {"network": network, "compiled": compiled, "repeats": repeats, "plot": str(plot)}
    return Result("growth", describe(device), settings, rows)


def _position(axis: str, work: Work, parameters: int) -> int:
    """Where a piece of work lies on an axis."""
    return {"parameters": parameters, "resolution": work.size.image, "batch": work.batch, "tokens": work.tokens}[axis]


def _parameters(size: Size) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build_network(stage_of(size)).parameters())


def _evaluation(work: Work, device: torch.device, compiled: bool) -> Callable[[], object]:
    """As in sampling: weights in `default_dtype`, the prompt's projections made beforehand; compiled code is replayed as a CUDA graph."""
    network = own_network(work.size, device).eval().to(default_dtype(device))
    x, sigma = noise_images(work.size, work.batch, device, 0), torch.tensor(1.0, dtype=torch.float64)  # as samplers give it
    with torch.no_grad():
        prepared = network.prepare(work.text(device))
    if compiled:
        compile_denoiser(network, training=False)
    model: Any = GraphedDenoiser(network) if compiled else network

    def call() -> Tensor:
        with torch.no_grad():
            output: Tensor = model(x, sigma, prepared)
        return output

    return call


def _training_step(work: Work, device: torch.device, compiled: bool) -> Callable[[], object]:
    """As `bench train` has it."""
    loop = OwnLoop(work.size, work.batch, device, "inductor" if compiled else None, work.text(device))

    def call() -> None:
        add_batch_gradients(loop)
        loop.update()

    return call


def _cost(make: Callable[[], Callable[[], object]], device: torch.device, repeats: int, compiled: bool) -> Cost:
    """Of what `make` makes, when nothing else lies on the device."""
    if compiled:
        torch._dynamo.reset()  # each shape is compiled for itself, as often as there are shapes
    free(device)
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    try:
        call = make()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        timing = interleave({"": call}, device, repeats=repeats, warmup=2)[""]
        return Cost(timing, _peak(make, before, device))
    except RuntimeError as error:
        if not _out_of_memory(error):
            raise
        return Cost(missing="out of memory")


def _peak(make: Callable[[], Callable[[], object]], before: int, device: torch.device) -> int | None:
    """The most bytes that the calls so far have occupied, beyond those `before`; on the CPU, that calls of one that is made anew occupy."""
    match device.type:
        case "cuda":  # all calls, for what a CUDA graph uses when it is replayed is not counted
            return torch.cuda.max_memory_allocated(device) - before
        case "cpu":

            def calls() -> None:
                call = make()
                call()  # an optimiser's moments come into being
                call()

            return most_allocated(calls)
        case _:
            return None


def _out_of_memory(error: RuntimeError) -> bool:
    """By its words: neither the CPU's allocator nor a compiler that runs out of memory has a class of its own for it."""
    return any(words in str(error) for words in ("out of memory", "can't allocate memory", "ALLOC_FAILED"))


def _row(name: str, work: Work, parameters: int, cost: Cost) -> Row:
    more: dict[str, Any] = {"parameters": parameters, "px": work.size.image, "batch": work.batch, "tokens": work.tokens}
    if cost.timing is not None:
        more["images/s"] = work.batch / cost.timing.median
    if cost.peak is not None:
        more["peak GiB"] = cost.peak / 2**30
    if cost.missing:
        more["missing"] = cost.missing
    return Row(name, cost.timing, more=more)


def _panels(points: Mapping[str, Sequence[tuple[int, Work]]], costs: Mapping[tuple[Work, str], Cost]) -> Image.Image:
    """A panel for each axis: time, and beside it memory where it was counted, over what grows."""
    figures: dict[str, Callable[[Cost], float | None]] = {
        "milliseconds": lambda cost: 1000 * cost.timing.median if cost.timing else None,
        "peak memory, GiB": lambda cost: cost.peak / 2**30 if cost.peak else None,
    }
    panels = [
        [chart for unit, figure in figures.items() if (chart := _chart(axis, works, unit, figure, costs))] for axis, works in points.items()
    ]
    width, height = 720, 360
    sheet = Image.new("RGB", (width * max(1, *map(len, panels)), height * len(panels)), "white")
    for row, charts in enumerate(panels):
        for column, chart in enumerate(charts):
            sheet.paste(draw_chart(chart, width, height), (column * width, row * height))
    return sheet


def _chart(
    axis: str,
    works: Sequence[tuple[int, Work]],
    unit: str,
    figure: Callable[[Cost], float | None],
    costs: Mapping[tuple[Work, str], Cost],
) -> Chart | None:
    """One figure over one axis, both logarithmic; None if it was never taken."""
    series = []
    for what, colour in COLOURS.items():
        found = [(float(position), value) for position, work in works if (value := figure(costs[work, what])) is not None]
        series.append(Series(what, found, colour, dots=True))
    if not any(line.points for line in series):
        return None
    full = [float(position) for position, work in works if any(costs[work, what].missing == "out of memory" for what in COLOURS)]
    return Chart(
        f"Growing {axis}",
        X_LABELS[axis],
        f"{unit}, logarithmic",
        series,
        [Marks("out of memory", full, "#c0202a")],
        log=True,
        log_x=True,
        x_ticks=[float(f"{position:.3g}") for position, _ in works],
    )
