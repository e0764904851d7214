"""Line charts and pictures with words beside them, drawn with Pillow alone: enough for the curves of a run and of a sweep.

Lines are drawn at three times the size and reduced, which smooths them; text comes on top, in the font that Pillow brings.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Point = tuple[float, float]

SUPERSAMPLING = 3
INK, FAINT_INK, GRID = "#222222", "#666666", "#e6e6e6"
_SUBTITLE_LINES = 6
_ARROW = 40  # pixels beside a label
_MARK_DASHES = (8, 6)
VIRIDIS = ("#440154", "#414487", "#2a788e", "#22a884", "#7ad151", "#d8c41c")


@dataclass(frozen=True)
class Series:
    """A line through points (x, y) in their order, or with `dots` also a dot at each; `width` in pixels. A point that is not finite is left
    out.

    dashes: pixels drawn and left out, by turns; none for a line without gaps. words: beside the points, one for each, or none at all.
    """

    label: str
    points: Sequence[Point]
    colour: str
    width: float = 2.0
    dots: bool = False
    dashes: Sequence[int] = ()
    words: Sequence[str] = ()


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
    point if that lies below it. log_x: the same for x. x_ticks: where ticks may stand on the x axis; none: at round values. from_zero:
    False lets axes that are not logarithmic reach over the points alone. better: which way along x and y is better, -1 or 1, which an arrow
    beside the axis's label shows; 0 shows none. subtitle: below the title, in some lines.
    """

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    marks: Sequence[Marks] = ()
    log: bool = False
    log_x: bool = False
    x_ticks: Sequence[float] = ()
    from_zero: bool = True
    better: tuple[int, int] = (0, 0)
    subtitle: str = ""


def draw_chart(chart: Chart, width: int = 960, height: int = 420) -> Image.Image:
    """The chart as an RGB picture. Raises ValueError if no series has a point that can be drawn."""

    def drawn(x: float, y: float) -> bool:
        return math.isfinite(x) and math.isfinite(y) and (x > 0 or not chart.log_x) and (y > 0 or not chart.log)

    lines = [[point for point in line.points if drawn(*point)] for line in chart.series]
    xs, ys = ([point[i] for line in lines for point in line] for i in (0, 1))
    if not xs:
        raise ValueError(f"the chart {chart.title!r} has no point to draw")
    xs += [position for marks in chart.marks for position in marks.positions]
    if chart.from_zero:
        xs += [] if chart.log_x else [0.0]
        ys += [] if chart.log else [0.0, 1.05 * max(ys)]
    else:
        xs += [] if chart.log_x else _widened(xs)
        ys += [] if chart.log else _widened(ys)
    x_axis = _Axis(min(xs), max(xs), log=chart.log_x, ticks=8)
    y_axis = _Axis(min(ys), max(ys), log=chart.log, ticks=6 if chart.from_zero else 9)

    rows = list(_legend_rows(chart, width - 32))
    subtitle = _wrapped(chart.subtitle, width - 32, _SUBTITLE_LINES) if chart.subtitle else []
    heading = 36 + (18 * len(subtitle) + 8 if subtitle else 0)  # where the y axis's label begins
    labels = [compact(tick) for tick in y_axis.ticks]
    left = 28 + max(round(_font(13).getlength(label)) for label in labels)
    top, right, bottom = heading + 24 + 20 * len(rows), width - 24, height - 50

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
        for piece in dashed(path, [SUPERSAMPLING * length for length in line.dashes]):
            pen.line(piece, line.colour, round(SUPERSAMPLING * line.width), joint="curve")
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
        for x, _, colour, dashes in entries:
            y = heading + 26.0 + 20 * row
            for piece in dashed([(float(x), y), (x + 22.0, y)], dashes):
                pen.line(large(*piece), colour, 3 * SUPERSAMPLING)
    y_words = _font(13).getlength(chart.y_label)
    x_arrow = _ARROW if chart.better[0] else 0
    if chart.better[0]:
        arrow = [(right - x_arrow + 10.0, height - 16.0), (right, height - 16.0)]
        _arrow(pen, large(*arrow[:: chart.better[0]]))
    if chart.better[1]:
        arrow = [(y_words + 28.0, heading + 16.0), (y_words + 28.0, heading - 1.0)]
        _arrow(pen, large(*arrow[:: chart.better[1]]))

    picture = canvas.reduce(SUPERSAMPLING)
    pen = ImageDraw.Draw(picture)
    pen.text((16, 12), chart.title, INK, _font(18))
    for i, text in enumerate(subtitle):
        pen.text((16, 36 + 18 * i), text, FAINT_INK, _font(13))
    pen.text((16, heading), chart.y_label, FAINT_INK, _font(13))
    for row, entries in enumerate(rows):
        for x, label, *_ in entries:
            pen.text((x + 28, heading + 26 + 20 * row), label, INK, _font(13), anchor="lm")
    for tick, label in zip(y_axis.ticks, labels, strict=True):
        pen.text((left - 8, place(0, tick)[1]), label, FAINT_INK, _font(13), anchor="rm")
    for tick in x_ticks:
        pen.text((place(tick, y_axis.low)[0], bottom + 8), compact(tick), FAINT_INK, _font(13), anchor="mt")
    pen.text((right - x_arrow, height - 22), chart.x_label, FAINT_INK, _font(13), anchor="rt")
    words = [
        (word, line.colour, place(*point))
        for line in chart.series
        for word, point in zip(line.words, line.points, strict=bool(line.words))
        if drawn(*point)
    ]
    paths = [[place(x, y) for x, y in points] for points in lines]
    boxes = place_words([(_font(12).getlength(word), 12.0, at) for word, _, at in words], paths, (left, top, right, bottom))
    for (word, colour, _), (x, y) in zip(words, boxes, strict=True):
        pen.text((x, y), word, colour, _font(12), anchor="lm", stroke_width=2, stroke_fill="white")
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


def dashed(path: Sequence[Point], dashes: Sequence[float]) -> Iterator[list[Point]]:
    """The pieces of a path that are drawn: `dashes` are lengths along it, drawn and left out by turns; without any it is one piece."""
    if not dashes:
        yield list(path)
        return
    turns = itertools.cycle(enumerate(dashes))
    turn, left = next(turns)
    piece = list(path[:1])
    for (x, y), (to_x, to_y) in itertools.pairwise(path):
        length, done = math.hypot(to_x - x, to_y - y), 0.0
        while length - done > left:
            done += left
            piece.append((x + (to_x - x) * done / length, y + (to_y - y) * done / length))
            if turn % 2 == 0:
                yield piece
            piece = piece[-1:]
            turn, left = next(turns)
        left -= length - done
        piece.append((to_x, to_y))
    if turn % 2 == 0 and len(piece) > 1:
        yield piece


Box = tuple[float, float, float, float]  # left, top, right, bottom


def place_words(words: Sequence[tuple[float, float, Point]], paths: Sequence[Sequence[Point]], inside: Box) -> list[Point]:
    """The left ends of words (width, height, the point that they belong to): beside their points, away from each other and from the points
    and lines of all `paths` as far as there is room. y is that of the words' middle. All in pixels."""
    room = _Room(paths, inside)
    found = []
    for width, height, (x, y) in words:
        boxes: list[tuple[float, int, Box]] = []
        for reach in (0, 6, 12, 20):
            for turn in range(16):
                angle = (turn - 2) * math.pi / 8
                centre_x = x + math.cos(angle) * (width / 2 + 5 + reach)
                centre_y = y + math.sin(angle) * (height / 2 + 5 + reach)
                box = (centre_x - width / 2, centre_y - height / 2, centre_x + width / 2, centre_y + height / 2)
                boxes.append((room.cost(box) + 2 * reach, len(boxes), box))
        _, _, box = min(boxes)
        room.placed.append(box)
        found.append((box[0], (box[1] + box[3]) / 2))
    return found


class _Room:
    """What words must keep away from: the points and lines of paths, the words that were placed before, and the edge."""

    def __init__(self, paths: Sequence[Sequence[Point]], inside: Box) -> None:
        self.placed: list[Box] = []
        self._inside = inside
        self._dots = np.array([point for path in paths for point in path], dtype=float).reshape(-1, 2)
        self._lines = np.array([at for path in paths for a, b in itertools.pairwise(path) for at in _along(a, b)]).reshape(-1, 2)

    def cost(self, box: Box) -> float:
        """How much a word in that box would hide and overlap, in no unit."""
        left, top, right, bottom = box[0] - 4, box[1], box[2] + 4, box[3]
        overlap = sum(max(0.0, min(right, r) - max(left, x)) * max(0.0, min(bottom, b) - max(top, y)) for x, y, r, b in self.placed)
        outside = sum(
            max(0.0, beyond)
            for beyond in (self._inside[0] - left, self._inside[1] - top, right - self._inside[2], bottom - self._inside[3])
        )
        dots, lines = (
            int(((at[:, 0] > box[0] - gap) & (at[:, 0] < box[2] + gap) & (at[:, 1] > top - gap) & (at[:, 1] < bottom + gap)).sum())
            for at, gap in ((self._dots, 3), (self._lines, 2))
        )
        return 8 * overlap + 100 * outside + 60 * dots + 6 * lines


def _along(a: Point, b: Point) -> list[Point]:
    """Points from `a` to `b`, 3 pixels apart."""
    count = max(1, round(math.dist(a, b) / 3))
    return [(a[0] + (b[0] - a[0]) * i / count, a[1] + (b[1] - a[1]) * i / count) for i in range(count)]


def _arrow(pen: ImageDraw.ImageDraw, ends: Sequence[Point]) -> None:
    """From the first point to the second, on the large canvas."""
    (x, y), (tip_x, tip_y) = ends
    length = math.hypot(tip_x - x, tip_y - y)
    dx, dy = (tip_x - x) / length, (tip_y - y) / length
    head, half = 7 * SUPERSAMPLING, 4 * SUPERSAMPLING
    base_x, base_y = tip_x - dx * head, tip_y - dy * head
    pen.line([(x, y), (base_x, base_y)], FAINT_INK, 2 * SUPERSAMPLING)
    pen.polygon([(tip_x, tip_y), (base_x - dy * half, base_y + dx * half), (base_x + dy * half, base_y - dx * half)], FAINT_INK)


def _widened(values: Sequence[float]) -> list[float]:
    """A little below the lowest and above the highest; for equal values, by a tenth of them."""
    low, high = min(values), max(values)
    margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return [low - margin, high + margin]


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


def _legend_rows(chart: Chart, width: int) -> Iterator[list[tuple[int, str, str, Sequence[int]]]]:
    """Rows of (x, label, colour, dashes), as many entries in each as fit into `width` pixels; none for a single line."""
    entries = [(line.label, line.colour, line.dashes) for line in chart.series]
    entries += [(marks.label, marks.colour, _MARK_DASHES) for marks in chart.marks if marks.positions]
    if len(entries) < 2:
        return
    row: list[tuple[int, str, str, Sequence[int]]] = []
    x = 16
    for label, colour, dashes in entries:
        needed = 28 + round(_font(13).getlength(label)) + 24
        if row and x + needed > width:
            yield row
            row, x = [], 16
        row.append((x, label, colour, dashes))
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
