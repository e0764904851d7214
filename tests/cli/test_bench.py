"""`t2i-experts bench`: every benchmark on the CPU, at a size that takes a moment."""

from __future__ import annotations

import json
from typing import Any

import pytest

from t2i_experts.cli.app import main


@pytest.fixture
def bench(capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a benchmark on the CPU and returns its rows by name."""

    def run(*arguments: str) -> dict[str, dict[str, Any]]:
        with pytest.raises(SystemExit, match="0"):
            main(["bench", *arguments, "--json"])
        return {row.pop("name"): row for row in json.loads(capsys.readouterr().out)["rows"]}

    return run


def test_optimizer(bench: Any) -> None:
    rows = bench("optimizer", "--parameters", "1", "--repeats", "3", "--device", "cpu")
    baseline, own = rows["defaults, loop"], rows["fused, foreach"]
    assert own["ratio"] == pytest.approx(baseline["seconds"] / own["seconds"])
    assert max(baseline["error"], own["error"]) < 5e-3  # float32's rounding of weights, of which a step changes little
    assert own["floor"] > 0.3


def test_sample(bench: Any) -> None:
    rows = bench("sample", "--steps", "2", "--repeats", "1", "--device", "cpu")
    assert list(rows) == ["eager"]
    assert rows["eager"]["error"] == 0  # float32 beside float32
    assert rows["eager"]["compilations"] == rows["eager"]["breaks"] == 0
