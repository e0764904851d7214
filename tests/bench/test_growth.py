"""What is measured as the work grows, what is marked where it cannot be, and that the charts show it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from t2i_experts.bench import growth
from t2i_experts.bench.growth import Work, bench_growth, growing
from t2i_experts.bench.network import SIZES, TEXT_TOKENS
from t2i_experts.bench.timing import interleave
from t2i_experts.charts import Chart

CPU = torch.device("cpu")


@pytest.fixture
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two points on each axis, and no time spent on collecting garbage and on calls that do not count."""
    monkeypatch.setattr(growth, "free", lambda device: None)
    monkeypatch.setattr(growth, "interleave", lambda calls, device, repeats, warmup: interleave(calls, device, repeats=1, warmup=0))
    monkeypatch.setattr(growth, "BATCH", 4)
    monkeypatch.setattr(growth, "BATCHES", (4, 16))
    monkeypatch.setattr(growth, "TOKENS", (48, 512))
    monkeypatch.setattr(growth, "HALVES", {"parameters": (2, 4), "resolution": (2, 4)})


def test_costs_grow_with_the_work(little: None, tmp_path: Path) -> None:
    rows = {row.name: row for row in bench_growth("tiny", CPU, plot=tmp_path / "growth.png", repeats=1).rows}
    assert len(rows) == 16
    for what in ("evaluation", "training step"):
        for axis in ("parameters", "resolution", "batch", "tokens"):
            small, large = (row for name, row in rows.items() if name.startswith(axis) and name.endswith(what))
            assert large.more["peak GiB"] > 1.05 * small.more["peak GiB"], (axis, what)
            assert small.more["images/s"] == pytest.approx(small.more["batch"] / small.timing.median)
        base = {name for name, row in rows.items() if row.timing == rows[f"batch 4: {what}"].timing}
        assert len(base) == 4, "the base lies on every axis, and is measured once"
    for name, row in rows.items():
        if name.endswith("evaluation"):
            step = rows[name.replace("evaluation", "training step")]
            assert step.more["peak GiB"] > max(row.more["peak GiB"], 16 * row.more["parameters"] / 2**30), "weights, gradients, moments"
    with Image.open(tmp_path / "growth.png") as sheet:
        assert sheet.size == (2 * 720, 4 * 360), "time and memory"
        for row, column in ((row, column) for row in range(4) for column in range(2)):
            panel = sheet.crop((720 * column, 360 * row + 80, 720 * (column + 1), 360 * (row + 1)))
            colours = {colour for _, colour in panel.getcolors(10**6) or ()}
            assert {(31, 95, 168), (209, 102, 43)} <= colours, "both lines"


def test_one_thing_grows_at_a_time() -> None:
    size = SIZES["100m"]
    base = Work(size, 16, 48)
    for axis, works in growing(base).items():
        assert base in works, axis
        for field, own in (("batch", "batch"), ("tokens", "tokens")):
            assert len({getattr(work, field) for work in works}) == (len(works) if axis == own else 1)
        assert len({work.size.image for work in works}) == (len(works) if axis == "resolution" else 1)
        assert len({work.size.channels for work in works}) == (len(works) if axis == "parameters" else 1)
        for work in works:
            assert all(channels % size.head_channels == 0 for channels in work.size.channels)
    text = Work(SIZES["tiny"], 3, 200).text(CPU)
    assert sum(e.mask.shape[1] for e in text.embeddings.values()) == TEXT_TOKENS + 152


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_what_has_no_memory_is_marked(little: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: RuntimeError) -> None:
    def make(work: Work, device: torch.device, compiled: bool) -> Callable[[], object]:
        def call() -> None:
            if work.batch > 4:
                raise error

        return call

    monkeypatch.setattr(growth, "_evaluation", make)
    monkeypatch.setattr(growth, "_training_step", make)
    monkeypatch.setattr(growth, "_peak", lambda *_: 2**20)
    charts: list[Chart] = []
    monkeypatch.setattr(growth, "draw_chart", lambda chart, *_: charts.append(chart) or Image.new("RGB", (1, 1)))
    rows = {row.name: row.plain() for row in bench_growth("tiny", CPU, plot=tmp_path / "growth.png", repeats=1).rows}
    missing = {name: row["missing"] for name, row in rows.items() if "missing" in row}
    assert missing == dict.fromkeys(["batch 16: evaluation", "batch 16: training step"], "out of memory")
    assert "seconds" not in rows["batch 16: evaluation"] and rows["batch 4: evaluation"]["peak GiB"] == 2**-10
    assert [mark.positions for chart in charts for mark in chart.marks] == [[], [], [], [], [16.0], [16.0], [], []]
    assert [x for x, _ in charts[4].series[0].points] == [4.0]


def test_another_error_is_one(little: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def make(*_: Any) -> Callable[[], object]:
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(growth, "_evaluation", make)
    with pytest.raises(RuntimeError, match="shapes differ"):
        bench_growth("tiny", CPU, plot=tmp_path / "growth.png", repeats=1)


def test_what_comes_after_the_time_is_left_out(tmp_path: Path) -> None:
    rows = bench_growth("tiny", CPU, plot=tmp_path / "growth.png", minutes=1e-9).rows
    assert len(rows) == 36 and {row.more["missing"] for row in rows} == {"no time left"}
    assert (tmp_path / "growth.png").exists()
