"""The learning rate over a run."""

from __future__ import annotations

import pytest

from t2i_experts.config import OptimizerConfig
from t2i_experts.training.optim import learning_rate


@pytest.mark.parametrize(("schedule", "middle", "end"), [("constant", 1.0, 1.0), ("linear", 0.5, 0.0), ("cosine", 0.5, 0.0)])
def test_schedules(schedule: str, middle: float, end: float) -> None:
    config = OptimizerConfig(learning_rate=1.0, warmup_images=100, schedule=schedule)  # type: ignore[arg-type]
    rates = [learning_rate(config, images, 1100) for images in range(0, 1101, 10)]
    assert rates[0] == pytest.approx(0.01)
    assert rates[10] == 1.0 == max(rates)
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert learning_rate(config, 600, 1100) == pytest.approx(middle)
    assert learning_rate(config, 1100, 1100) == pytest.approx(end)
    assert learning_rate(config, 5000, 1100) == pytest.approx(end)


def test_no_warm_up() -> None:
    assert learning_rate(OptimizerConfig(learning_rate=0.3), 0, 100) == 0.3
