"""Line charts and pictures with words beside them, drawn with Pillow alone: enough for the curves of a run and of a sweep.

Lines are drawn at three times the size and reduced, which smooths them; text comes on top, in the font that Pillow brings.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

from PIL import Image, ImageDraw, ImageFont

Point = tuple[float, float]

SUPERSAMPLING = 3
INK, FAINT_INK, GRID = "#222222", "#666666", "#e6e6e6"
VIRIDIS = ("#440154", "#414487", "#2a788e", "#22a884", "#7ad151", "#d8c41c")


@dataclass(frozen=True)
class Series:
    """A line through points (x, y), or with `dots` also a dot at each; `width` in pixels. A point that is not finite is left out."""

    label: str
    points: Sequence[Point]
    colour: str
    width: float = 2.0
    dots: bool = False


@dataclass(frozen=True)
class Marks:
    """Dashed vertical lines at some x, with one entry in the legend."""

    label: str
    positions: Sequence[float]
    colour: str


@dataclass(frozen=True)
class Chart:
    """A chart in words and numbers.

    log: a logarithmic y axis, on which points that are not positive are left out. Otherwise the y axis begins at zero, or at the lowest
    point if that lies below it. log_x: the same for x. x_ticks: where ticks may stand on the x axis; none: at round values.
    """

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    marks: Sequence[Marks] = ()
    log: bool = False
    log_x: bool = False
    x_ticks: Sequence[float] = ()


def draw_chart(chart: Chart, width: int = 960, height: int = 420) -> Image.Image:
    """The chart as an RGB picture. Raises ValueError if no series has a point that can be drawn."""
    lines = [
        [
            (x, y)
            for x, y in line.points
            if math.isfinite(x) and math.isfinite(y) and (x > 0 or not chart.log_x) and (y > 0 or not chart.log)
        ]
        for line in chart.series
    ]
    xs, ys = ([point[i] for line in lines for point in line] for i in (0, 1))
    if not xs:
        raise ValueError(f"the chart {chart.title!r} has no point to draw")
    xs += [position for marks in chart.marks for position in marks.positions]
    xs += [] if chart.log_x else [0.0]
    x_axis = _Axis(min(xs), max(xs), log=chart.log_x, ticks=8)
    if not chart.log:
        ys += [0.0, 1.05 * max(ys)]
    y_axis = _Axis(min(ys), max(ys), log=chart.log, ticks=6)

    rows = list(_legend_rows(chart, width - 32))
    labels = [compact(tick) for tick in y_axis.ticks]
    left = 28 + max(round(_font(13).getlength(label)) for label in labels)
    top, right, bottom = 60 + 20 * len(rows), width - 24, height - 50

    def place(x: float, y: float) -> Point:
        return left + x_axis.fraction(x) * (right - left), bottom - y_axis.fraction(y) * (bottom - top)

    def large(*points: Point) -> list[Point]:
        return [(SUPERSAMPLING * x, SUPERSAMPLING * y) for x, y in points]

    canvas = Image.new("RGB", (SUPERSAMPLING * width, SUPERSAMPLING * height), "white")
    pen = ImageDraw.Draw(canvas)
    for tick in y_axis.ticks:
        y = place(0, tick)[1]
        pen.line(large((left, y), (right, y)), GRID, SUPERSAMPLING)
    x_ticks = [tick for tick in chart.x_ticks if x_axis.low <= tick <= x_axis.high] or x_axis.ticks
    for tick in x_ticks:
        x = place(tick, y_axis.low)[0]
        pen.line(large((x, top), (x, bottom)), GRID, SUPERSAMPLING)
    for line, points in zip(chart.series, lines, strict=True):
        path = large(*(place(x, y) for x, y in points))
        pen.line(path, line.colour, round(SUPERSAMPLING * line.width), joint="curve")
        for x, y in path if line.dots or len(path) == 1 else ():
            r = SUPERSAMPLING * (line.width + 1)
            pen.ellipse((x - r, y - r, x + r, y + r), line.colour)
    for marks in chart.marks:
        for position in marks.positions:
            x = place(position, y_axis.low)[0]
            for y in range(top, bottom, 8):
                pen.line(large((x, y), (x, min(y + 4, bottom))), marks.colour, SUPERSAMPLING)
    pen.line(large((left, top), (left, bottom), (right, bottom)), FAINT_INK, SUPERSAMPLING)
    for row, entries in enumerate(rows):
        for x, _, colour, dashed in entries:
            y = 62 + 20 * row
            for a, b in ((0, 8), (14, 22)) if dashed else ((0, 22),):
                pen.line(large((x + a, y), (x + b, y)), colour, 3 * SUPERSAMPLING)

    picture = canvas.reduce(SUPERSAMPLING)
    pen = ImageDraw.Draw(picture)
    pen.text((16, 12), chart.title, INK, _font(18))
    pen.text((16, 36), chart.y_label, FAINT_INK, _font(13))
    for row, entries in enumerate(rows):
        for x, label, *_ in entries:
            pen.text((x + 28, 62 + 20 * row), label, INK, _font(13), anchor="lm")
    for tick, label in zip(y_axis.ticks, labels, strict=True):
        pen.text((left - 8, place(0, tick)[1]), label, FAINT_INK, _font(13), anchor="rm")
    for tick in x_ticks:
        pen.text((place(tick, y_axis.low)[0], bottom + 8), compact(tick), FAINT_INK, _font(13), anchor="mt")
    pen.text((right, height - 22), chart.x_label, FAINT_INK, _font(13), anchor="rt")
    return picture


def draw_grid(
    rows: Sequence[Sequence[Image.Image]], row_labels: Sequence[str], column_labels: Sequence[str], cell: int = 96
) -> Image.Image:
    """Pictures of any size, each scaled to a square of `cell` pixels; labels of rows, wrapped, at the left, of columns on top."""
    margin, top, gap, font = 168, 32, 4, _font(13)
    size = (margin + len(column_labels) * (cell + gap), top + len(rows) * (cell + gap))
    grid = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(grid)
    for column, label in enumerate(column_labels):
        pen.text((margin + column * (cell + gap) + cell / 2, top / 2), label, FAINT_INK, font, anchor="mm")
    for row, (pictures, label) in enumerate(zip(rows, row_labels, strict=True)):
        y = top + row * (cell + gap)
        pen.multiline_text((8, y + cell / 2), "\n".join(_wrapped(label, margin - 20, 5)), INK, font, anchor="lm")
        for column, picture in enumerate(pictures):
            x = margin + column * (cell + gap)
            grid.paste(picture.convert("RGB").resize((cell, cell), Image.Resampling.LANCZOS), (x, y))
            pen.rectangle((x - 1, y - 1, x + cell, y + cell), outline=GRID)
    return grid


def draw_captioned(pictures: Sequence[tuple[Image.Image, str]], columns: int, side: int = 192, lines: int = 4) -> Image.Image:
    """Pictures of any size, each scaled to a square of `side` pixels, row by row, with at most `lines` lines of its caption below it.

    Small pictures show their pixels. The font has Latin letters; others are boxes.
    """
    gap, line_height, font = 8, 16, _font(13)
    cell, row_height = side + gap, side + lines * line_height + gap
    sheet = Image.new("RGB", (min(columns, len(pictures)) * cell - gap, -(-len(pictures) // columns) * row_height), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (picture, caption) in enumerate(pictures):
        x, y = i % columns * cell, i // columns * row_height
        filtering = Image.Resampling.NEAREST if max(picture.size) <= side else Image.Resampling.LANCZOS
        sheet.paste(picture.convert("RGB").resize((side, side), filtering), (x, y))
        wrapped = (line for paragraph in caption.splitlines() for line in _wrapped(paragraph, side, lines))
        for j, line in enumerate(itertools.islice(wrapped, lines)):
            pen.text((x, y + side + 2 + j * line_height), line, INK, font)
    return sheet


def palette(count: int) -> list[str]:
    """`count` colours in an order that one sees, from dark violet to yellow."""
    colours = []
    for i in range(count):
        place = i / max(count - 1, 1) * (len(VIRIDIS) - 1)
        first = min(int(place), len(VIRIDIS) - 2)
        pairs = [(int(VIRIDIS[first][k : k + 2], 16), int(VIRIDIS[first + 1][k : k + 2], 16)) for k in (1, 3, 5)]
        colours.append("#" + "".join(f"{round(a + (place - first) * (b - a)):02x}" for a, b in pairs))
    return colours


def compact(value: float) -> str:
    """A number as the label of a tick: 1500000 is 1.5M, 0.00002 is 2e-5."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    if value and abs(value) < 1e-4:
        mantissa, exponent = f"{value:e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:g}"


def linear_ticks(low: float, high: float, count: int) -> list[float]:
    """The round values in [low, high], a step of 1, 2 or 5 times a power of ten apart, at most about `count` of them."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    return [float(f"{i * step:.12g}") for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float, count: int) -> list[float]:
    """The round values in [low, high] for a logarithmic axis: as many of 1, 2, 5 in each power of ten as fit, or fewer."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
        ticks = [float(f"{digit}e{decade}") for decade in decades for digit in digits if low <= float(f"{digit}e{decade}") <= high]
        if len(ticks) <= count:
            return ticks if len(ticks) > 2 else linear_ticks(low, high, count)
    return ticks[:: math.ceil(len(ticks) / count)]


class _Axis:
    """One axis: its range, which is never empty, and its ticks."""

    def __init__(self, low: float, high: float, *, log: bool, ticks: int) -> None:
        if log:
            margin = 1.05 if high > low else 2.0
            low, high = low / margin, high * margin
        elif low == high:
            high += 1.0
        self.low, self.high, self._log = low, high, log
        self.ticks = log_ticks(low, high, ticks) if log else linear_ticks(low, high, ticks)

    def fraction(self, value: float) -> float:
        """Where a value lies on the axis, from 0 at its low end to 1 at its high end."""
        if self._log:
            return math.log(value / self.low) / math.log(self.high / self.low) if value > 0 else 0.0
        return (value - self.low) / (self.high - self.low)


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)
    return font


def _legend_rows(chart: Chart, width: int) -> Iterator[list[tuple[int, str, str, bool]]]:
    """Rows of (x, label, colour, dashed), as many entries in each as fit into `width` pixels; none for a single line."""
    entries = [(line.label, line.colour, False) for line in chart.series]
    entries += [(marks.label, marks.colour, True) for marks in chart.marks if marks.positions]
    if len(entries) < 2:
        return
    row: list[tuple[int, str, str, bool]] = []
    x = 16
    for label, colour, dashed in entries:
        needed = 28 + round(_font(13).getlength(label)) + 24
        if row and x + needed > width:
            yield row
            row, x = [], 16
        row.append((x, label, colour, dashed))
        x += needed
    yield row


def _wrapped(text: str, width: int, lines: int) -> list[str]:
    """The text in at most `lines` lines of at most `width` pixels, cut with an ellipsis; a word that is too long is cut too."""
    wrapped = [""]
    for word in text[: lines * width].split():  # more cannot fit
        longer = f"{wrapped[-1]} {word}".strip()
        if _font(13).getlength(longer) <= width or not wrapped[-1]:
            wrapped[-1] = longer
        else:
            wrapped.append(word)
    if len(wrapped) > lines:
        wrapped = [*wrapped[: lines - 1], f"{wrapped[lines - 1]} ..."]
    for i, line in enumerate(wrapped):
        while _font(13).getlength(wrapped[i]) > width:
            line = line[:-1]
            wrapped[i] = f"{line}..."
    return wrapped
