"""What the log of a run tells."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from t2i_experts.training.history import History, comparable_validations, read_history, smoothed


def train(seen: int, time: float, **values: Any) -> dict[str, Any]:
    return {"event": "train", "images_seen": seen, "time": time, **values}


def start(seen: int, time: float) -> dict[str, Any]:
    return {"event": "start", "images_seen": seen, "time": time}


def test_smoothing_follows_a_trend_and_no_spike() -> None:
    falling = [(float(i), 10.0 - 0.1 * i) for i in range(80)]
    assert [x for x, _ in smoothed(falling)] == [x for x, _ in falling]
    assert [y for _, y in smoothed(falling)[:-2]] == pytest.approx([y for _, y in falling[:-2]])
    spiked = [(x, 1000.0 if x == 40 else y) for x, y in falling]
    assert max(abs(a - b) for (_, a), (_, b) in zip(smoothed(spiked), falling, strict=True)) < 0.25
    long = [(float(i), 1.0) for i in range(12345)]
    assert len(smoothed(long)) < 700 and smoothed(long)[-1] == long[-1]
    assert smoothed([(3.0, 2.0)]) == [(3.0, 2.0)]
    assert smoothed([]) == []


def test_time_is_counted_within_each_start_and_not_between_them() -> None:
    """100 s: 60 of steps, half of the second 30 waiting; then 1000 s of nothing; then 50 s, 40 of steps."""
    history = History(
        [
            start(0, 1000),
            train(300, 1040, images_per_second=10, data_wait=0.0),
            train(600, 1080, images_per_second=10, data_wait=0.5),
            {"event": "validation", "images_seen": 600, "time": 1100},
            start(500, 2100),
            train(900, 2150, images_per_second=10, data_wait=None),
        ]
    )
    spent = history.time_spent()
    assert (spent.steps, spent.data_wait, spent.rest, spent.total) == (100, 15, 50, 150)
    assert [event["images_seen"] for event in history.resumptions] == [500]


def test_curves_leave_out_what_is_not_there() -> None:
    history = History([start(0, 0), train(10, 1, loss=2.0), train(20, 2, loss=None), train(30, 3)])
    assert history.curve("train", "loss") == [(10, 2.0)]
    assert history.images_per_second is None
    assert history.images_seen == 30


def test_only_equal_measures_are_compared() -> None:
    def validation(seen: int, hi: float, images: int) -> dict[str, Any]:
        return {"event": "validation", "images_seen": seen, "images": images, "bins": [{"sigma_lo": 0.0, "sigma_hi": hi, "loss": 1.0}]}

    history = History([validation(1, 0.5, 8), validation(2, 0.3, 8), validation(3, 0.5, 16), validation(4, 0.5, 8)])
    assert [event["images_seen"] for event in comparable_validations(history)] == [1, 4]
    assert comparable_validations(History([start(0, 0)])) == []


def test_a_log_that_is_being_written(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text(json.dumps(start(0, 0)) + "\n" + json.dumps(train(8, 1)) + '\n{"event": "trai')
    assert [event["event"] for event in read_history(tmp_path).events] == ["start", "train"]


@pytest.mark.parametrize("content", [None, "", '{"event": "sta', '{"event": "diverged", "images_seen": 3, "time": 1}\n', "[3]\n"])
def test_a_folder_without_a_run_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "log.jsonl").write_text(content)
    with pytest.raises(ValueError, match=r"log\.jsonl"):
        read_history(tmp_path)
