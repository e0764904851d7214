"""Times, floors and tables of benchmarks."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from torch import nn

from t2i_experts.bench.floor import bandwidth, flops, matrix_rate
from t2i_experts.bench.result import Result, Row, duration, table
from t2i_experts.bench.timing import Timing, interleave

CPU = torch.device("cpu")


def test_candidates_take_turns_after_their_warm_up() -> None:
    order: list[str] = []

    def work(name: str, seconds: float) -> Callable[[], None]:
        def call() -> None:
            order.append(name)
            time.sleep(seconds)

        return call

    found = interleave({"a": work("a", 0.01), "b": work("b", 0.002)}, CPU, repeats=3, warmup=2)
    assert "".join(order) == "aabb" + "ababab"
    assert found["a"].median > found["b"].median >= 0.002
    with pytest.raises(ValueError, match="repeats=0"):
        interleave({}, CPU, repeats=0)


def test_median_and_spread() -> None:
    timing = Timing((1.0, 2.0, 3.0, 4.0, 100.0))
    assert (timing.median, timing.spread) == (3.0, pytest.approx(1 / 3))
    assert Timing((2.0,)).spread == 0


def test_what_the_machine_can_do() -> None:
    assert 1e8 < matrix_rate(CPU, torch.float32, side=128, repeats=3) < 1e15
    assert 1e8 < bandwidth(CPU, repeats=3) < 1e14
    convolution = nn.Conv2d(3, 5, 3, padding=1)
    assert flops(lambda: convolution(torch.zeros(2, 3, 8, 8))) == 2 * 2 * 8 * 8 * 3 * 5 * 9


def test_columns_that_nothing_fills_are_left_out() -> None:
    rows = [Row("slow", Timing((2.0, 2.0))), Row("fast", Timing((0.001, 0.001)), ratio=2000.0, more={"images/s": 8.5})]
    found = Result("race", {"device": "cpu"}, {"repeats": 2}, rows)
    assert table(found).splitlines() == [
        "race: repeats 2",
        "device cpu",
        "      time    +-     ratio  images/s",
        "slow   2 s  0.0%",
        "fast  1 ms  0.0%  2000.00x       8.5",
    ]
    assert found.plain()["rows"][1] == {"name": "fast", "seconds": 0.001, "spread": 0.0, "ratio": 2000.0, "images/s": 8.5}
    assert [duration(s) for s in (1.5, 0.00146, 2e-6)] == ["1.5 s", "1.46 ms", "2 us"]
