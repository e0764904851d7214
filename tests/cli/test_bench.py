"""`t2i-experts bench`: every benchmark on the CPU, at a size that takes a moment."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from t2i_experts.bench import denoiser
from t2i_experts.cascade.device import default_dtype
from t2i_experts.cli.app import main

CLI = Callable[..., tuple[int, str, str]]


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
    assert own["floor"] == pytest.approx(baseline["floor"] / own["ratio"]), "both are times over one floor"
    assert own["floor"] > 0.1  # a million parameters lie in a CPU's caches, which are faster than the memory that the floor is of


def test_sample(bench: Any) -> None:
    rows = bench("sample", "--steps", "2", "--repeats", "1", "--device", "cpu")
    assert list(rows) == ["eager"]
    bfloat16 = default_dtype(torch.device("cpu")) == torch.bfloat16
    assert 1e-4 < rows["eager"]["error"] < 0.1 if bfloat16 else rows["eager"]["error"] == 0
    assert rows["eager"]["compilations"] == rows["eager"]["breaks"] == 0


def test_experts(bench: Any) -> None:
    rows = bench("experts", "--network", "tiny", "--batch", "1", "--steps", "3", "--eager", "--repeats", "2", "--device", "cpu")
    one, several = rows["batch 1: one network, eager"], rows["batch 1: 3 experts, eager"]
    assert several["ratio"] == pytest.approx(one["seconds"] / several["seconds"])
    assert several["weights MB"] == pytest.approx(3 * one["weights MB"]) and 0 < several["routing us"] < 50


@pytest.mark.gpu
@pytest.mark.slow
def test_three_experts_take_as_long_as_one_network(bench: Any) -> None:
    """Compiled, as CUDA graphs: at most 1 % more, and what the clock itself varies."""
    rows = bench("experts", "--batch", "16", "--repeats", "30")
    one, several = rows["batch 16: one network, compiled, graphs"], rows["batch 16: 3 experts, compiled, graphs"]
    assert several["seconds"] <= 1.01 * one["seconds"] * (1 + one["spread"]), rows


def test_train(bench: Any) -> None:
    rows = bench("train", "--network", "tiny", "--batch", "2", "--eager", "--repeats", "2", "--device", "cpu")
    baseline, own = rows["diffusers, eager"], rows["t2i-experts, eager"]
    assert baseline["layout"] in ("NCHW", "NHWC") and "ratio" not in baseline
    assert own["ratio"] == pytest.approx(own["images/s"] / baseline["images/s"])
    assert own["share"] / baseline["share"] == pytest.approx(own["ratio"] * own["GFLOP"] / baseline["GFLOP"])
    assert 1e-4 < own["error"] < 1.5 * baseline["error"] < 0.1  # bfloat16's


def test_denoiser(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What users get: diffusers' network in float32, this project's in bfloat16 where the CPU multiplies in it, and then both in that."""
    monkeypatch.setattr(denoiser, "default_dtype", lambda device: torch.bfloat16)
    rows = bench("denoiser", "--network", "tiny", "--batch", "1", "--batch", "2", "--eager", "--repeats", "2", "--device", "cpu")
    assert len(rows) == 6
    for batch in (1, 2):
        names = ("diffusers, eager", "diffusers, eager, bfloat16", "t2i-experts, eager")
        baseline, other, own = (rows[f"batch {batch}: {name}"] for name in names)
        assert [row["dtype"] for row in (baseline, other, own)] == ["float32", "bfloat16", "bfloat16"]
        assert baseline["weights MB"] == 2 * other["weights MB"]
        assert own["ratio"] == pytest.approx(baseline["seconds"] / own["seconds"])
        assert baseline["error"] < 1e-5 < 1e-4 < own["error"] < 1.5 * other["error"] < 0.1
    assert own["GFLOP"] == pytest.approx(2 * rows["batch 1: t2i-experts, eager"]["GFLOP"])
    assert denoiser._dtypes(torch.device("cuda")) == (torch.bfloat16, torch.bfloat16)


def test_compile(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a compiler that only traces. The second process is to find what the first one left; here it tells what the first one told."""
    calls: list[tuple[list[str], str, subprocess.CompletedProcess[str]]] = []
    run = subprocess.run

    def run_once(command: list[str], *, env: dict[str, str], **options: Any) -> subprocess.CompletedProcess[str]:
        done = calls[0][2] if calls else run(command, env=env, **options)
        calls.append((command, env["TORCHINDUCTOR_CACHE_DIR"], done))
        return done

    monkeypatch.setattr(subprocess, "run", run_once)
    rows = bench("compile", "--what", "evaluation", "--network", "tiny", "--batch", "1", "--backend", "eager", "--device", "cpu")
    assert calls[0] == calls[1] and not Path(calls[0][1]).exists()
    assert list(rows) == ["cold", "from cache"] and rows["from cache"]["ratio"] == 1
    for row in rows.values():
        assert row["graphs"] >= 1 and row["recompiles"] == 0
        assert 1 <= row["three networks / one"] < 1.5


def test_what_a_process_says_that_cannot_compile_is_told(cli: CLI, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 3, "", "g++: not found")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    code, _, err = cli("bench", "compile", "--network", "tiny", "--device", "cpu")
    assert code == 1 and "g++: not found" in err


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


def test_growth(bench: Any, tmp_path: Path) -> None:
    rows = bench("growth", "--network", "tiny", "--minutes", "1e-9", "--plot", str(tmp_path / "charts.png"), "--device", "cpu")
    assert {name.split()[0] for name in rows} == {"parameters", "resolution", "batch", "tokens"}
    assert (tmp_path / "charts.png").exists()


def test_quality(cli: CLI, monkeypatch: pytest.MonkeyPatch, write_config: Callable[[str], Path]) -> None:
    """What is asked for arrives, and a run that fails is told beside those that do not; tests/bench trains."""
    from t2i_experts.bench import quality
    from t2i_experts.bench.result import Result, Row
    from t2i_experts.bench.timing import Timing

    asked: list[quality.Settings] = []

    def bench_quality(settings: quality.Settings, tell: Callable[[str], object]) -> Result:
        asked.append(settings)
        tell("1 of 2")
        rows = [Row("one, seed 0", Timing((3.0,))), Row("two, seed 0", None, more={"failed": "it diverged"})]
        return Result("quality", {}, {}, rows if settings.seeds == 2 else rows[:1])

    monkeypatch.setattr(quality, "bench_quality", bench_quality)
    config = str(write_config("run"))
    options = ["--minutes", "2", "--rates", "1e-3", "--baseline-rates", "1e-3,2e-3", "--devices", "0,1", "--out", "x"]
    variants = ["--variant", "wide:stage.network.patch_size=2,training.batch_size=4", "--variant", "long:training.batch_size=16"]
    code, out, err = cli("bench", "quality", config, "data.workers=1", *options, *variants, "--json")
    assert code == 1 and "two, seed 0: it diverged" in err and "1 of 2" in err
    assert [row.get("failed") for row in json.loads(out)["rows"]] == [None, "it diverged"]
    more = {"wide": ("stage.network.patch_size=2", "training.batch_size=4"), "long": ("training.batch_size=16",)}
    assert asked == [quality.Settings(config, ["data.workers=1"], 2.0, 2, (1e-3,), (1e-3, 2e-3), more, True, ["0", "1"], Path("x"))]
    code, out, err = cli("bench", "quality", config, "--seeds", "1", "--alone")
    assert code == 0 and "one, seed 0" in out and not asked[1].baseline


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--minutes", "0"], "--minutes=0"),
        (["--rates", "fast"], "--rates='fast'"),
        (["--variant", "wide"], "--variant='wide' must be NAME:key=value"),
        (["--variant", "a:b=1", "--variant", "a:b=2"], "a name of its own"),
        (["--devices", "gpu"], "--devices='gpu'"),
        (["training.seed=3"], "training.seed=3' would be ignored"),
        (["sampling.sampler=guess"], "sampling.sampler"),
    ],
)
def test_wrong_settings_of_quality(cli: CLI, write_config: Callable[[str], Path], options: list[str], complaint: str) -> None:
    code, _, err = cli("bench", "quality", str(write_config("run")), *options)
    assert code == 2 and complaint in err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["growth", "--network", "huge"], "--network='huge'"),
        (["growth", "--minutes", "-1"], "--minutes=-1"),
        (["growth", "--repeats", "0"], "--repeats=0"),
        (["growth", "--plot", "growth.jpg"], "--plot='growth.jpg'"),
        (["growth", "--plot", f"{__file__}/growth.png"], "--plot='.*growth.png' cannot be written"),
        (["train", "--network", "huge"], "--network='huge' must be one of 100m, tiny"),
        (["train", "--network", "tiny", "--batch", "0"], "--batch=0"),
        (["denoiser", "--network", "tiny", "--batch", "2", "--batch", "0"], r"--batch=\[2, 0\]"),
        (["compile", "--what", "all"], "--what='all' must be one of step, evaluation"),
        (["compile", "--network", "tiny", "--backend", "gcc"], "--backend='gcc' must be one of .*inductor"),
        (["startup", "--command", "draw"], "--command='draw'; allowed: generate"),
        (["startup", "--pictures", "-1"], "--pictures=-1"),
        (["shards", "--samples", "0"], "--samples=0"),
        (["resume", "--position", "10"], "--position=10 must be at least --replayed=20000"),
        (["loader", "--workers", "-1"], "--workers=-1"),
        (["loader", "--side", "32"], "--side=32"),
    ],
)
def test_wrong_settings(cli: CLI, arguments: list[str], complaint: str) -> None:
    device = ["--device", "cpu"] if arguments[0] in ("train", "denoiser", "compile", "growth") else []
    code, _, err = cli("bench", *arguments, *device)
    assert code == 2 and re.search(complaint, err)


def test_a_missing_baseline_tells_how_to_install_it(cli: CLI, monkeypatch: pytest.MonkeyPatch, write_config: Callable[[str], Path]) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    network = ["--network", "tiny", "--device", "cpu"]
    for arguments in (["train", *network], ["denoiser", *network], ["quality", str(write_config("run"))]):
        code, _, err = cli("bench", *arguments)
        assert code == 2 and "pip install 't2i-experts[bench]'" in err


def test_fid(bench: Any) -> None:
    rows = bench(
        "fid", "--images", "6", "--side", "64", "--features", "squeezenet", "--batch-size", "4", "--repeats", "1", "--device", "cpu"
    )
    assert list(rows) == ["PNG files", "in memory", "network alone", "sums alone"]
    assert rows["in memory"]["ratio"] == pytest.approx(rows["PNG files"]["seconds"] / rows["in memory"]["seconds"])
    assert float(rows["sums alone"]["of the network's time"].rstrip("%")) > 0
