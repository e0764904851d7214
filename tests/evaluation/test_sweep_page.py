"""A sweep's page and curve: each number where its point is, the best in bold, lines along guidance."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest

from t2i_experts.evaluation.sweep import best, labels
from t2i_experts.evaluation.sweep_page import curve, markdown


def record(
    models: Sequence[str], ways: Sequence[tuple[str, int]], guidances: Sequence[float], *, distance: bool = True, score: bool = True
) -> Any:
    """Distances are lowest, and scores highest, at guidances of their own, and better for later models and ways."""
    points = []
    for (i, model), (j, (sampler, steps)), guidance in itertools.product(enumerate(models), enumerate(ways), guidances):
        point: dict[str, Any] = {
            "model": model,
            "sampling": {"sampler": sampler, "steps": steps, "guidance": guidance},
            "scores": {},
            "seconds_a_picture": 0.25,
        }
        if distance:
            point["distance"] = 10 + abs(guidance - 2) - i - 0.1 * j + 0.004
        if score:
            point["scores"]["clip"] = {"mean": 30 - abs(guidance - 6) + i + 0.1 * j, "error": 0.05, "count": 9}
        points.append(point)
    metrics = {"clip": {"name": "CLIP score", "model": "ViT-L-14"}} if score else {}
    return {
        "prompts": {"count": 5000, "path": "held-out", "sha256": "ab" * 32},
        "reference": {"count": 4000, "path": "held-out", "which": "chosen"} if distance else None,
        "features": {"name": "FID", "features": "inception", "dimension": 2048, "protocol": "pytorch-fid"} if distance else None,
        "decided_by": {"seed": 0, "resolution": 256, "dtype": "float32", "device": "cpu", "metrics": metrics},
        "points": points,
        "best": best(points),
    }


def test_too_few_pictures_are_told_on_the_page_and_in_the_curve() -> None:
    found = record(["a"], [("euler", 10)], [1.0, 2.0])
    few = "with few pictures it is far too large: 2,048 for 2,048 dimensions"
    for count, told in ((2049, False), (2048, True)):
        found["prompts"]["count"] = count
        assert (f"- {few}" in markdown(found).splitlines()) == told and (few in curve(found).subtitle) == told
    found = record(["a"], [("euler", 10)], [1.0, 2.0], distance=False)
    found["prompts"]["count"] = 10
    assert "few pictures" not in markdown(found)


def cells(page: str, heading: str) -> list[list[str]]:
    """The table under a heading."""
    lines = page.split(f"## {heading}")[1].split("\n\n")[1].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_best_is_bold_in_its_row_and_column() -> None:
    page = markdown(record(["a", "b"], [("euler", 10), ("heun", 10)], [1.0, 2.0, 6.0, 10.0]))
    head, _, *rows = cells(page, "All points")
    assert len(rows) == 16 and head[:6] == ["model", "sampler", "steps", "guidance", "FID", "CLIP score"]
    bold = [(row[:4], name, cell) for row in rows for name, cell in zip(head, row, strict=True) if cell.startswith("**")]
    assert bold == [(["b", "heun", "10", "2"], "FID", "**8.90**"), (["b", "heun", "10", "6"], "CLIP score", "**31.10**")]
    head, _, *rows = cells(page, "The best of each model")
    assert head == ["model", "sampler", "steps", "best FID", "at guidance", "best CLIP score", "at guidance", "s a picture"]
    assert rows[0] == ["a", "euler", "10", "10.00", "2", "30.00", "6", "0.25"]
    assert rows[-1] == ["b", "heun", "10", "**8.90**", "2", "**31.10**", "6", "0.25"] and len(rows) == 4


def test_the_curve_goes_along_guidance_with_a_line_for_each_model_sampler_and_steps() -> None:
    chart = curve(record(["a", "b"], [("euler", 10), ("heun", 10)], [1.0, 2.5, 10.0]))
    assert [line.label for line in chart.series] == ["a, euler", "a, heun", "b, euler", "b, heun"] and "10 steps" in chart.subtitle
    assert "n = 5,000 prompts" in chart.subtitle and "4,000 pictures" in chart.subtitle and "pytorch-fid" in chart.subtitle
    first = chart.series[0]
    assert list(first.words) == ["1", "2.5", "10"]
    assert list(first.points) == [(pytest.approx(x), pytest.approx(y)) for x, y in ((25, 11.004), (26.5, 10.504), (26, 18.004))]
    assert (chart.better, chart.x_label, chart.y_label) == ((1, -1), "CLIP score: higher is better", "FID: lower is better")
    styles = [(line.colour, tuple(line.dashes)) for line in chart.series]
    assert len(set(styles)) == 4 and styles[0][0] == styles[1][0] != styles[2][0] and styles[0][1] == styles[2][1] != styles[1][1]
    many = curve(record(["a", "b"], [("heun", steps) for steps in range(1, 8)], [1.0, 2.0]))
    assert len({(line.colour, tuple(line.dashes)) for line in many.series}) == 14


def test_one_number_alone_stands_over_guidance() -> None:
    distances, scores = (curve(record(["a"], [("heun", 10)], [1.0, 3.0], distance=not lone, score=lone)) for lone in (False, True))
    assert [x for x, _ in distances.series[0].points] == [x for x, _ in scores.series[0].points] == [1.0, 3.0]
    assert (distances.better, scores.better) == ((0, -1), (0, 1)) and distances.x_label == scores.x_label == "guidance"
    assert distances.series[0].label == "a" and not distances.series[0].words
    assert "FID" not in markdown(record(["a"], [("heun", 10)], [1.0], distance=False))


def test_names_of_models_are_short_and_different() -> None:
    assert labels([("runs/a/model", "1" * 16), ("runs/b/model", "2" * 16)]) == ["a", "b"]
    assert labels([("runs/a/model", "1" * 16)]) == ["a/model"] and labels([("embedded", "1" * 16)]) == ["embedded"]
    assert labels([("runs/a/model", "1" * 16), ("embedded", "2" * 16)]) == ["runs/a/model", "embedded"]
    assert labels([("/x/a", "1" * 16), ("/x/a", "2" * 16), ("/x/b/", "3" * 16)]) == ["a (11111111)", "a (22222222)", "b"]
    assert labels([("/x/a", "1" * 16), ("/x/a/", "2" * 16)]) == ["x/a (11111111)", "x/a (22222222)"]
    assert labels([("a", "1" * 16), ("a/a", "2" * 16)]) == ["a", "a/a"]


def test_metrics_of_one_name_are_told_apart() -> None:
    found = record(["a"], [("heun", 10)], [1.0])
    found["decided_by"]["metrics"]["other"] = {"name": "CLIP score", "model": "ViT-B-32"}
    found["points"][0]["scores"]["other"] = {"mean": 7.0, "error": 0.5, "count": 9}
    found["best"] = best(found["points"])
    head, _, row = cells(markdown(found), "All points")
    assert dict(zip(head, row, strict=True)).items() >= {"CLIP score (clip)": "**25.00**", "CLIP score (other)": "**7.00**"}.items()
