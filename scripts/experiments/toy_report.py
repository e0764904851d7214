"""What `toy_experts.py` found, as a table, a chart of the loss over the noise, and a sheet of samples."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image
from torch import Tensor

from t2i_experts.charts import Chart, Marks, Series, draw_chart, draw_grid

COLOURS = ("#d1495b", "#00798c", "#edae49", "#5f9e4f", "#7b5ea7", "#8c6d46")

Row = Mapping[str, float]
"""Measured of one denoiser: name of the column -> number."""


def relative(rows: Sequence[Mapping[str, Row]], name: str, column: str) -> str:
    """Mean and standard error over seeds of a number, relative to the root's of the same seed, in percent."""
    values = [100 * row[name][column] / row["root"][column] for row in rows]
    return f"{np.mean(values):.1f} ± {_error(values):.1f}"


def absolute(rows: Sequence[Mapping[str, Row]], name: str, column: str) -> str:
    """Mean and standard error over seeds, in thousandths."""
    values = [1000 * row[name][column] for row in rows]
    return f"{np.mean(values):.2f} ± {_error(values):.2f}"


def _error(values: Sequence[float]) -> float:
    return float(np.std(values, ddof=1)) / len(values) ** 0.5 if len(values) > 1 else math.nan


def table(
    rows: Sequence[Mapping[str, Row]], losses: Sequence[str], bytes_of: Mapping[str, int], weights: Mapping[str, Sequence[Sequence[float]]]
) -> str:
    """Markdown. rows: one for each seed, denoiser -> its numbers, "root" among them. losses: the columns that are losses. weights: of each
    merge, those of each seed."""
    lines = [
        f"| denoiser | bytes | {' | '.join(losses)} | distance of samples |",
        "|---" * (3 + len(losses)) + "|",
    ]
    for name, size in bytes_of.items():
        cells = [name, f"{size:,}", *(relative(rows, name, column) for column in [*losses, "distance"])]
        lines.append(f"| {' | '.join(cells)} |")
    lines.append(f"| fresh points | | {' | ' * len(losses)}{relative(rows, 'fresh points', 'distance')} |")
    root = "; ".join(f"{column} {absolute(rows, 'root', column)}" for column in [*losses, "distance"])
    lines += ["", f"In percent of the root's, whose losses above the ideal denoiser's and distance are, x 1000: {root}."]
    for name, each in weights.items():
        text = "; ".join("(" + ", ".join(f"{weight:.3g}" for weight in row) + ")" for row in each)
        lines += ["", f"Weights of {name}, from low noise to high, by seed: {text}."]
    return "\n".join([*lines, ""])


def draw_losses(curves: Mapping[str, Sequence[tuple[float, float]]], edges: Sequence[float], seeds: int) -> Image.Image:
    """The loss above the ideal's, relative to the root's, over sigma: a curve for each denoiser."""
    chart = Chart(
        "Loss above the ideal denoiser's, relative to the root's",
        "sigma",
        "|D - ideal|^2 / |D_root - ideal|^2",
        [
            *(Series(name, points, colour) for (name, points), colour in zip(curves.items(), COLOURS, strict=False)),
            Series("root", [(sigma, 1.0) for sigma, _ in next(iter(curves.values()))], "#222222", dashes=(2, 4)),
        ],
        [Marks("edges of the leaves", edges, "#999999")],
        log=True,
        log_x=True,
        better=(0, -1),
        subtitle=f"Points on rings on a spiral; geometric means over {seeds} seeds.",
    )
    return draw_chart(chart, height=520)


def draw_samples(points: Mapping[str, Tensor], columns: int = 4) -> Image.Image:
    """Where points lie, (N, 2, 1, 1) by name: dark where there are many."""

    def picture(name: str) -> Image.Image:
        counts, _, _ = np.histogram2d(*points[name][:, :, 0, 0].numpy().T, bins=220, range=[[-1.2, 1.2]] * 2)
        return Image.fromarray((255 * np.exp(-0.7 * counts)).astype(np.uint8))

    names = list(points)
    parts = [names[i : i + columns] for i in range(0, len(names), columns)]
    strips = [draw_grid([[picture(name) for name in part]], [""], part, cell=240) for part in parts]
    sheet = Image.new("RGB", (strips[0].width, sum(strip.height for strip in strips)), "white")
    for i, strip in enumerate(strips):
        sheet.paste(strip, (0, i * strips[0].height))
    return sheet.crop((160, 0, *sheet.size)).quantize(16)  # without the room for labels of rows
