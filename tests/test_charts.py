"""Charts: ticks are round, lines lie where their numbers say, and pictures where their labels say."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from PIL import Image

from t2i_experts.charts import (
    Chart,
    Marks,
    Series,
    compact,
    dashed,
    draw_captioned,
    draw_chart,
    draw_grid,
    linear_ticks,
    log_ticks,
    palette,
    place_words,
)

RED, PINK, BLUE = "#ff0000", "#ff00ff", "#0000ff"


def where(picture: Image.Image, colour: str, tolerance: float = 130) -> np.ndarray:
    """(N, 2) rows and columns of the pixels near that colour; a thin line is paler than its colour, as smoothing mixes it with white."""
    wanted = [int(colour[k : k + 2], 16) for k in (1, 3, 5)]
    return np.argwhere(np.linalg.norm(np.asarray(picture, dtype=float) - wanted, axis=2) <= tolerance)


def rows_of(chart: Chart) -> list[float]:
    """The height, in pixels from above, of each series' line, without its entry in the legend."""
    picture = draw_chart(chart)
    found = [where(picture, line.colour) for line in chart.series]
    return [float(pixels[pixels[:, 0] > 72, 0].mean()) for pixels in found]


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 1_728_000), (0.003, 0.0041), (-7, 23), (0, 640), (0.8, 1.4)])
def test_linear_ticks_are_round_and_even(low: float, high: float) -> None:
    ticks = linear_ticks(low, high, 6)
    assert 3 <= len(ticks) <= 8
    assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in ticks)
    steps = np.diff(ticks)
    assert np.allclose(steps, steps[0])
    assert float(f"{steps[0]:e}".split("e")[0]) in (1, 2, 5)
    assert all(math.isclose(tick / steps[0], round(tick / steps[0]), abs_tol=1e-6) for tick in ticks)


@pytest.mark.parametrize(("low", "high"), [(0.09, 1.2), (1e-6, 1e3), (0.8, 1.4), (3, 31), (0.04, 0.3)])
def test_log_ticks_lie_inside_and_are_few(low: float, high: float) -> None:
    ticks = log_ticks(low, high, 6)
    assert 2 <= len(ticks) <= 8
    assert ticks == sorted(ticks)
    assert low <= ticks[0] and ticks[-1] <= high


@pytest.mark.parametrize(
    ("value", "label"), [(0, "0"), (1_500_000, "1.5M"), (25_600, "25.6k"), (0.0005, "0.0005"), (2e-5, "2e-5"), (0.3, "0.3"), (-2000, "-2k")]
)
def test_labels_are_short(value: float, label: str) -> None:
    assert compact(value) == label


def test_a_logarithmic_axis_makes_equal_factors_equal_distances() -> None:
    lines = [Series(colour, [(0, y), (100, y)], colour) for colour, y in ((RED, 1.0), (PINK, 10.0), (BLUE, 100.0))]
    red, pink, blue = rows_of(Chart("t", "x", "y", lines, log=True))
    assert blue < pink < red
    assert red - pink == pytest.approx(pink - blue, abs=1)


def test_a_logarithmic_x_axis_does_the_same_and_leaves_out_zero() -> None:
    lines = [Series(colour, [(0, 1.0), (x, 1.0)], colour, dots=True) for colour, x in ((RED, 1.0), (PINK, 10.0), (BLUE, 100.0))]
    picture = draw_chart(Chart("t", "x", "y", lines, log_x=True))
    found = [where(picture, line.colour) for line in lines]
    red, pink, blue = (float(pixels[pixels[:, 0] > 90, 1].mean()) for pixels in found)
    assert red < pink < blue
    assert pink - red == pytest.approx(blue - pink, abs=1)


def test_ticks_may_be_given() -> None:
    line = Series("line", [(8, 1.0), (64, 1.0)], BLUE)
    pictures = [np.asarray(draw_chart(Chart("t", "x", "y", [line], log_x=True, x_ticks=ticks))) for ticks in ((8, 16, 64), (8, 32, 64, 70))]
    columns = np.flatnonzero((pictures[0] != pictures[1]).any(axis=(0, 2)))
    pixels = where(Image.fromarray(pictures[0]), BLUE)[:, 1]
    left, right = (int(pixels[pixels > 60].min()), int(pixels.max()))
    places = [left + (right - left) * third / 3 for third in (1, 2)]
    assert all(min(abs(column - place) for place in places) < 12 for column in columns), "they differ at 16 and 32 alone"


def test_a_linear_axis_begins_at_zero() -> None:
    lines = [Series(colour, [(0, y), (100, y)], colour) for colour, y in ((RED, 5.0), (PINK, 10.0), (BLUE, 15.0))]
    red, pink, blue = rows_of(Chart("t", "x", "y", lines))
    assert red - pink == pytest.approx(pink - blue, abs=1)
    assert red + (red - pink) == pytest.approx(420 - 50, abs=2)


def test_x_grows_to_the_right_and_marks_stand_at_their_place() -> None:
    line = Series("line", [(0, 5.0), (200, 5.0)], BLUE)
    picture = draw_chart(Chart("t", "x", "y", [line], [Marks("resumed", [50, 400], RED)]))
    blue, red = (where(picture, colour) for colour in (BLUE, RED))
    blue, red = blue[blue[:, 0] > 72, 1], red[red[:, 0] > 72, 1]
    first, last = np.sort(red)[0], np.sort(red)[-1]
    assert last > blue.max()  # a mark beyond the last point is inside the chart
    quarter = blue.min() + (blue.max() - blue.min()) / 4
    assert first == pytest.approx(quarter, abs=2)


def test_what_cannot_be_drawn_is_left_out() -> None:
    good = [(0, 1.0), (1, 2.0)]
    bad = [(2, math.inf), (3, math.nan), (4, 0.0), (5, -1.0)]
    lines = [Chart("t", "x", "y", [Series("a", points, BLUE)], log=True) for points in (good, good + bad)]
    assert draw_chart(lines[0]).tobytes() == draw_chart(lines[1]).tobytes()
    with pytest.raises(ValueError, match="no point"):
        draw_chart(Chart("t", "x", "y", [Series("a", bad, BLUE)], log=True))


@pytest.mark.parametrize("y", [0.0, 5.0, -5.0])
@pytest.mark.parametrize("log", [False, True])
def test_a_single_point_is_a_dot(y: float, log: bool) -> None:
    if y > 0 or not log:
        assert len(where(draw_chart(Chart("t", "x", "y", [Series("a", [(0, y)], BLUE)], log=log)), BLUE)) > 10


def test_colours_differ() -> None:
    for count in (1, 2, 8, 20):
        assert len(set(palette(count))) == count


def test_captioned_pictures_stand_in_rows_above_their_words() -> None:
    colours = [f"#{10 * i:02x}00c8" for i in range(5)]
    captions = ["one", "two words\nand a line", "x" * 100_000, "word " * 500, ""]
    sheet = draw_captioned([(Image.new("RGB", (7, 5 + i), c), t) for i, (c, t) in enumerate(zip(colours, captions, strict=True))], 3, 40, 2)
    assert sheet.size == (3 * 48 - 8, 2 * (40 + 2 * 16 + 8))
    for i, colour in enumerate(colours):
        top, left = i // 3 * 80, i % 3 * 48
        assert where(sheet, colour, 0).min(axis=0).tolist() == [top, left] and len(where(sheet, colour, 0)) == 40 * 40
        below = np.asarray(sheet)[top + 40 : top + 80, left : left + 48].min(axis=-1) < 128
        assert below.any() == bool(captions[i])
        lines = [below[:18].any(), below[18:].any()]
        assert lines == [[True, False], [True, True], [True, False], [True, True], [False, False]][i]


def test_a_grid_holds_each_picture_in_its_row_and_column() -> None:
    colours = [[(10 * row + column, 0, 200) for column in range(3)] for row in range(2)]
    rows = [[Image.new("RGB", (7, 7), colour) for colour in line] for line in colours]
    grid = draw_grid(rows, ["a long caption of many words, " * 9, "Donaudampfschifffahrtsgesellschaft" * 2], ["1k", "2k", "3k"], cell=40)
    centres = {
        colour: where(grid, f"#{colour[0]:02x}{colour[1]:02x}{colour[2]:02x}", 0).mean(axis=0).round().tolist()
        for line in colours
        for colour in line
    }
    ys = [[centres[colour][0] for colour in line] for line in colours]
    xs = [[centres[colour][1] for colour in line] for line in colours]
    assert ys[0] == [ys[0][0]] * 3 and ys[1][0] - ys[0][0] == 44
    assert xs[0] == xs[1] and np.diff(xs[0]).tolist() == [44, 44]


def test_a_line_may_go_back_and_axes_may_reach_over_its_points_alone() -> None:
    points, green = [(25.0, 14.0), (26.0, 12.0), (25.2, 12.5)], "#00a000"
    dots = [Series("a", [point], colour, width=4) for point, colour in zip(points, (RED, PINK, BLUE), strict=True)]
    picture = draw_chart(Chart("t", "x", "y", [Series("line", points, green), *dots], from_zero=False))
    red, pink, blue = (pixels[pixels[:, 0] > 90].mean(axis=0) for pixels in (where(picture, line.colour) for line in dots))
    assert pink[1] - red[1] > 700 and pink[0] - red[0] > 200
    assert blue == pytest.approx([red[0] + 0.75 * (pink[0] - red[0]), red[1] + 0.2 * (pink[1] - red[1])], abs=1)
    line = where(picture, green)
    for a, b, drawn in ((red, pink, True), (pink, blue, True), (blue, red, False)):
        assert (np.abs(line - (a + b) / 2).sum(axis=1).min() < 3) == drawn


@pytest.mark.parametrize("better", [(1, -1), (-1, 1)])
def test_an_arrow_points_to_where_it_is_better(better: tuple[int, int]) -> None:
    line = Series("a", [(1, 1), (2, 2)], BLUE)
    without, with_arrows = (np.asarray(draw_chart(Chart("t", "", "", [line], better=way)), dtype=int) for way in ((0, 0), better))
    rows, columns = np.nonzero(np.abs(without - with_arrows).sum(axis=-1) > 30)
    bottom = rows > 300
    for along, across, way in ((columns[bottom], rows[bottom], better[0]), (-rows[~bottom], columns[~bottom], better[1])):
        thickness = [len({*across[along == place]}) for place in range(along.min(), along.max() + 1)]
        head = thickness.index(max(thickness)) / len(thickness)
        assert head > 0.5 if way > 0 else head < 0.5


def test_a_subtitle_moves_the_chart_down_and_nothing_else() -> None:
    line = Series("a", [(1, 1), (2, 2)], BLUE)
    short, long = (where(draw_chart(Chart("t", "x", "y", [line], subtitle=text)), BLUE) for text in ("", "some words " * 40))
    assert long[:, 0].min() > short[:, 0].min() + 30 and long[:, 1].max() == short[:, 1].max()


def test_dashes_have_their_lengths_round_corners_too() -> None:
    path = [(0.0, 0.0), (10.0, 0.0), (10.0, 25.0)]
    pieces = list(dashed(path, (8, 4)))
    lengths = [sum(math.dist(a, b) for a, b in itertools.pairwise(piece)) for piece in pieces]
    assert lengths == pytest.approx([8, 8, 8]) and [piece[0] for piece in pieces] == [(0, 0), (10, 2), (10, 14)]
    assert list(dashed(path, ())) == [path]
    assert sum(math.dist(a, b) for piece in dashed(path, (20, 5)) for a, b in itertools.pairwise(piece)) == pytest.approx(30)


def test_words_stand_beside_their_points_and_not_on_each_other() -> None:
    dots = [(100.0 + 14 * i, 200.0 + 3 * (i % 4)) for i in range(12)]
    inside = (60.0, 50.0, 400.0, 350.0)
    found = place_words([(16.0, 12.0, dot) for dot in dots], [dots], inside)
    boxes = [(x, y - 6, x + 16, y + 6) for x, y in found]
    for (a, b, c, d), (e, f, g, h) in itertools.combinations(boxes, 2):
        assert c <= e or g <= a or d <= f or h <= b
    for (a, b, c, d), (x, y) in zip(boxes, dots, strict=True):
        assert math.dist(((a + c) / 2, (b + d) / 2), (x, y)) < 45 and inside[0] <= a and c <= inside[2]
        assert not any(a < dot_x < c and b < dot_y < d for dot_x, dot_y in dots)


def test_words_of_a_chart_have_the_colour_of_their_line() -> None:
    points = [(1.0, 1.0), (2.0, 2.0), (3.0, math.nan)]
    plain, worded = (where(draw_chart(Chart("t", "x", "y", [Series("a", points, BLUE, words=words)])), BLUE) for words in ((), "123"))
    assert len(worded) > len(plain) + 5
    with pytest.raises(ValueError, match="zip"):
        draw_chart(Chart("t", "x", "y", [Series("a", points, BLUE, words=["1"])]))
