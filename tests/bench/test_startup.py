"""Processes that are timed, and what they are compared with."""

from __future__ import annotations

import sys

import pytest

from t2i_experts.bench.startup import _OWN, Process, _rows


def test_a_process_that_ends_otherwise_is_not_timed() -> None:
    Process((sys.executable, "-c", "raise SystemExit(3)"), code=3)()
    with pytest.raises(RuntimeError, match="ended with 3 instead of 0: because"):
        Process((sys.executable, "-c", "import sys; sys.stderr.write('because'); sys.exit(3)"))()


def test_cpu_time_is_that_of_the_process_alone() -> None:
    sum(range(10**6))
    process = Process((sys.executable, "-c", "sum(range(10**7))"))
    process()
    assert 0.02 < process.cpu[0] < 5


def test_own_rows_are_compared_with_others_and_with_the_floor() -> None:
    processes = {
        "floor": Process((sys.executable, "-c", "pass")),
        "other": Process((sys.executable, "-c", "import time; time.sleep(0.2)")),
        "own": Process((*_OWN, "--version")),
    }
    floor, other, own = _rows(processes, 1, floor="floor", compared="other")
    assert (floor.ratio, floor.floor, other.ratio, other.floor) == (None,) * 4
    assert own.ratio == pytest.approx(other.timing.median / own.timing.median)
    assert own.floor == pytest.approx(own.timing.median / floor.timing.median)
    assert _rows(processes, 1, floor="floor", compared=None)[2].ratio is None
