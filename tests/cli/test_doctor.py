"""`t2i-experts doctor`: what is wrong is told in one line with what to do, and makes the exit code 1."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from t2i_experts.cli import preflight
from t2i_experts.cli.app import main
from t2i_experts.cli.environment import packages
from t2i_experts.cli.findings import Finding, document, size, table
from t2i_experts.config import load_config
from t2i_experts.training.memory import SamplingMemory, TrainingMemory

WriteConfig = Callable[[str], Path]
Doctor = Callable[..., tuple[int, str, str]]


@pytest.fixture
def doctor(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Doctor:
    """doctor(*arguments) -> exit code, stdout, stderr."""
    monkeypatch.delenv("T2I_DEBUG", raising=False)
    monkeypatch.setattr("t2i_experts.training.throughput.SECONDS", 0.1)

    def doctor(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            main(["doctor", *map(str, arguments)])
        captured = capsys.readouterr()
        return int(exit.value.code or 0), captured.out, captured.err

    return doctor


def test_without_a_config_it_looks_at_the_machine(doctor: Doctor) -> None:
    code, out, _ = doctor("--json")
    found = json.loads(out)
    assert (code, found["ok"], found["problems"]) == (0, True, [])
    assert found["packages"]["torch"]["version"] == metadata.version("torch")
    assert found["machine"]["CPU cores"] > 0
    assert found["machine"]["working directory"]["free"] > 0
    assert found["parts"]["embedded t5"].endswith("pretrained/t5")


def test_a_config_that_can_be_trained(doctor: Doctor, write_config: WriteConfig, tmp_path: Path) -> None:
    code, out, err = doctor(write_config("run"), "--measure", "--json")
    found = json.loads(out)
    assert (code, found["problems"], err) == (0, [], "")
    assert found["shards"]["train"]["samples"] == 40
    assert found["measured"]["peak memory"]["ratio"] == pytest.approx(1, abs=0.15)
    assert found["throughput"]["loader"]["samples_per_second"] > 0
    assert found["throughput"]["enough"]["needed"] == found["measured"]["speed"]
    assert found["disk"]["output"]["checkpoint"] == 4 * 4 * found["memory"]["network"]
    assert not (tmp_path / "run").exists()


def test_problems_come_with_what_to_do(doctor: Doctor, write_config: WriteConfig, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    public = ["stage.encoders.t5.model=google/t5-v1_1-small", "stage.encoders.t5.width=512"]
    code, out, _ = doctor(write_config("run"), f"data.train=[{gone}]", *public, "--measure")
    lines = [line for line in out.splitlines() if line.startswith("! ")]
    assert code == 1
    assert any(line.startswith("! t5: hf download google/t5-v1_1-small") for line in lines)
    assert any(line.startswith("! data.train: ") and f"shards build SOURCE --out {gone}" in line for line in lines)
    assert any(line.startswith("! --measure: get the encoders t5 first") for line in lines)
    assert "throughput" not in out


def test_memory_and_disk_that_do_not_suffice(doctor: Doctor, write_config: WriteConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("t2i_experts.cli.preflight.main_memory", lambda: 12 * 2**20)
    monkeypatch.setattr("t2i_experts.cli.preflight.free_disk", lambda folder: 1000)
    code, out, _ = doctor(write_config("run"), "training.batch_size=256", "--no-shards")
    assert code == 1
    assert "the CPU has 12.0 MiB: compute fewer images at a time (training.accumulation " in out
    assert "1000 B are free: lower training.keep_checkpoints" in out


def test_the_speed_of_an_earlier_run_is_compared_with_the_loaders(
    write_config: WriteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("t2i_experts.training.throughput.SECONDS", 0.1)
    (tmp_path / "run").mkdir()
    events: list[dict[str, Any]] = [
        {"event": "start", "images_seen": 0, "time": 0, "processes": 2},
        {"event": "train", "images_seen": 8, "time": 1, "images_per_second": 8e9, "data_wait": 0.5},
    ]
    (tmp_path / "run" / "log.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events) + '{"event": "tra')
    _, enough = preflight.throughput(load_config(write_config("run")), (), None, processes=1)
    assert enough.value == {"needed": 8e9, "enough": False}
    assert "raise data.workers" in enough.note
    assert not enough.problem  # slow, but it runs


def test_every_folder_of_several_has_its_row(write_config: WriteConfig, shards: Path, tmp_path: Path) -> None:
    folders = f"data.train=[{shards / 'train'},{shards / 'validation'},{tmp_path / 'gone'}]"
    rows = {row.name: row for row in preflight.shards(load_config(write_config("run"), [folders]))}
    assert [row.value["samples"] for row in rows.values()] == [40, 8, None, 8]
    assert list(rows) == ["train", "train 2", "train 3", "validation"]
    assert [name for name, row in rows.items() if row.problem] == ["train 3"] and rows["train 3"].problem.startswith("data.train: ")


@pytest.mark.parametrize(("compiled", "traced", "problem"), [(False, False, True), (True, True, True), (True, False, False)])
def test_memory_that_may_suffice_after_all_is_a_note(
    write_config: WriteConfig, monkeypatch: pytest.MonkeyPatch, compiled: bool, traced: bool, problem: bool
) -> None:
    """What uncompiled code takes is only an upper bound for compiled code."""
    monkeypatch.setattr("t2i_experts.cli.preflight.main_memory", lambda: 1000)
    memory = TrainingMemory(8, 10, 40, 40, 80, 40, {}, 10_000, compiled=traced, uncompiled=10_000)
    config = load_config(write_config("run"), [f"training.compile={str(compiled).lower()}"])
    rows = {row.name: row for row in preflight.memory_rows(config, memory, SamplingMemory(8, "float32", 40, {}, 10))}
    assert bool(rows["training"].problem) == problem and bool(rows["training"].note) != problem


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--measure"], "--measure needs a CONFIG"),
        (["tiny/base64", "--processes", "0"], "--processes=0 must be at least 1"),
        (["tiny/base64", "--processes", "3"], "training.batch_size=8 must be a multiple of accumulation x processes = 1 x 3"),
        (["tiny/base64", "stage.encoders.t5.kind=t6"], "unknown encoder 't6'"),
        (["tiny/base64", "training.batch=2"], "batch_size"),
    ],
)
def test_wrong_input(doctor: Doctor, arguments: list[str], said: str) -> None:
    code, out, err = doctor(*arguments)
    assert (code, out) == (2, "")
    assert said in err


def test_a_checkouts_packages_are_those_of_its_pyproject(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the metadata of an older editable installation says, or if there is none."""
    monkeypatch.setattr(metadata, "requires", lambda name: ["torch>=2.0"])
    rows = {row.name: row for row in packages()}
    assert {"torch", "pyarrow", "resvg-py", "wandb"} <= rows.keys() and "pytest" not in rows
    assert "(>=18; optional: shards build from Parquet tables)" in rows["pyarrow"].text


@pytest.mark.parametrize(
    "other", ["[tool.thing]\n", "[project]\nname = 'other'\nrequires-python = '>=3.20'\ndependencies = ['numpy>=99']\n"]
)
def test_the_pyproject_of_another_package_is_not_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, other: str) -> None:
    (tmp_path / "pyproject.toml").write_text(other)
    monkeypatch.setattr("t2i_experts.cli.environment.PYPROJECT", tmp_path / "pyproject.toml")
    monkeypatch.setattr(metadata, "requires", lambda name: ["torch>=2.0"])
    assert {row.name: row.problem for row in packages()} == {"python": "", "t2i-experts": "", "torch": ""}


def test_packages_that_are_missing_or_old(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("t2i_experts.cli.environment.PYPROJECT", tmp_path / "none")
    requirements = [
        "torch>=99.1",
        "nonesuch-package>=1.2",
        "numpy<99,>=1.0.0",
        "other-thing>=3; extra == 'track'",
        "pytest>=999; extra == 'test'",
    ]
    monkeypatch.setattr(metadata, "requires", lambda name: requirements)
    rows = {row.name: row for row in packages()}
    assert "pytest" not in rows
    assert rows["torch"].problem.endswith('is older than 99.1: pip install "torch>=99.1"')
    assert rows["nonesuch-package"].problem == 'nonesuch-package is not installed: pip install "nonesuch-package>=1.2"'
    assert not rows["numpy"].problem
    assert not rows["other-thing"].problem
    assert 'optional: training.trackers): pip install "other-thing>=3"' in rows["other-thing"].text


def test_old_packages_end_the_examination(doctor: Doctor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("t2i_experts.cli.environment.PYPROJECT", tmp_path / "none")
    monkeypatch.setattr(metadata, "requires", lambda name: ["torch>=99.1"])
    code, out, _ = doctor("--json")
    assert code == 1
    assert "machine" not in json.loads(out)


def test_a_table_marks_problems_and_repeats_them() -> None:
    sections = {"disk": [Finding("output", "9 GiB", 9, problem="make room"), Finding("free", "8 GiB", 8, note="hardly any")]}
    assert table(sections).splitlines() == ["disk", "! output  9 GiB", "  free    8 GiB", "", "note: hardly any", "! make room"]
    assert document(sections) == {"ok": False, "problems": ["make room"], "notes": ["hardly any"], "disk": {"output": 9, "free": 8}}
    assert [size(n) for n in (12, 2048, 3 * 2**20, 5 * 2**30)] == ["12 B", "2.0 KiB", "3.0 MiB", "5.0 GiB"]


def test_shards_that_stall_are_given_up(write_config: WriteConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("t2i_experts.training.throughput.PATIENCE", 1)
    (found,) = preflight.throughput(
        load_config(write_config("run"), ["data.train=['pipe:sleep 60']", "data.workers=0"]), (), None, processes=1
    )
    assert found.problem == "data.train: the training shards did not bring enough batches to measure in 1 s"
