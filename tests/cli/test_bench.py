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


def test_startup(bench: Any) -> None:
    rows = bench("startup", "--command", "plugins", "--pictures", "0", "--alone", "--repeats", "1")
    assert set(rows) == {"python -c pass", "--help", "plugins --help", "generate x --steps 0"}
    own, least = rows["plugins --help"], rows["python -c pass"]
    assert own["floor"] == pytest.approx(own["seconds"] / least["seconds"])
    assert own["floor"] > 1
    assert own["CPU s"] > 0


def test_shards(bench: Any) -> None:
    rows = bench("shards", "--samples", "40", "--size", "16", "--repeats", "1")
    for baseline, own in (("webdataset", "own, global order"), ("webdataset, decoded", "own, decoded")):
        assert rows[own]["ratio"] == pytest.approx(rows[baseline]["seconds"] / rows[own]["seconds"])
        assert rows[own]["samples/s"] == pytest.approx(40 / rows[own]["seconds"])
    assert rows["own, decoded"]["error"] == 0


def test_resume_does_not_read_what_comes_before(bench: Any) -> None:
    rows = bench(
        "resume", "--position", "100000", "--replayed", "64", "--samples", "40", "--size", "16", "--batch-size", "8", "--repeats", "1"
    )
    replay = rows["replay"]
    assert replay["seconds"] == pytest.approx(replay["measured s"] * 100_000 / 64)
    assert rows["own"]["ratio"] == pytest.approx(replay["seconds"] / rows["own"]["seconds"])
    assert rows["own"]["ratio"] > 100


@pytest.mark.parametrize("workers", ["0", "1"])
def test_loader(bench: Any, workers: str) -> None:
    rows = bench("loader", "--images", "8", "--side", "64", "--size", "16", "--batch-size", "4", "--workers", workers, "--repeats", "1")
    for row in rows.values():
        assert row["images/s"] == pytest.approx(1 / row["seconds"])
        assert 0 < row["error"] < 0.1
    assert set(rows) == {"files, Pillow", "shards", "shards, prepared"}


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("startup", "--command", "draw"), "--command='draw'; allowed: generate"),
        (("startup", "--pictures", "-1"), "--pictures=-1"),
        (("shards", "--samples", "0"), "--samples=0"),
        (("resume", "--position", "10"), "--position=10 must be at least --replayed=20000"),
        (("loader", "--workers", "-1"), "--workers=-1"),
        (("loader", "--side", "32"), "--side=32"),
    ],
)
def test_what_cannot_be_measured_is_told(arguments: tuple[str, ...], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["bench", *arguments])
    assert complaint in capsys.readouterr().err
