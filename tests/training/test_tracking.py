"""The log of a run."""

from __future__ import annotations

import json
from pathlib import Path

from t2i_experts.training.tracking import RunLog


def open_log(path: Path, images_seen: int, writes: bool = True) -> RunLog:
    return RunLog(path, images_seen=images_seen, total_images=100, writes=writes, progress=False)


def test_a_run_that_goes_on_takes_back_what_it_will_repeat(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    log = open_log(path, 0)
    for seen in (10, 20, 30):
        log.event("train", seen, loss=float(seen))
    with path.open("a") as file:
        file.write('{"event": "train", "images_')
    open_log(path, 20).event("train", 30, loss=float("nan"))
    events = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(event["images_seen"], event["loss"]) for event in events] == [(10, 10.0), (20, 20.0), (30, None)]


def test_line_separators_inside_an_event_do_not_end_its_line(tmp_path: Path) -> None:
    log = open_log(tmp_path / "log.jsonl", 0)
    log.event("unreadable", 10, key="a\u2028b\x85c")
    assert [event["key"] for event in open_log(tmp_path / "log.jsonl", 10).events("unreadable")] == ["a\u2028b\x85c"]


def test_other_processes_write_nothing(tmp_path: Path) -> None:
    log = open_log(tmp_path / "log.jsonl", 0, writes=False)
    log.event("train", 10)
    log.advance(10, 0.5)
    log.close()
    assert not list(tmp_path.iterdir())
