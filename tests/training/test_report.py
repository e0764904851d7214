"""The page about a run: it says what the log says, shows what it names, and its commands work."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from torch import Tensor

from t2i_experts.cli.app import main
from t2i_experts.config import load_config
from t2i_experts.training.checkpoints import checkpoints
from t2i_experts.training.report import write_report
from t2i_experts.training.task import Batch
from t2i_experts.training.trainer import Trainer, TrainingDiverged, train
from t2i_experts.types import Denoiser

WriteConfig = Callable[[str], Path]


def run_command(line: str) -> int:
    """Runs a command of the page in this process. Returns its exit code."""
    program, *arguments = shlex.split(line)
    assert program == "t2i-experts"
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    return int(exit.value.code or 0)


def test_a_run_writes_its_page_and_the_pages_commands_work(
    write_config: WriteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = ["training.preview.every_images=16", "training.validation.every_images=16"]
    config, root = write_config("run"), tmp_path / "run"
    train(load_config(config, ["training.images=16", *overrides]), progress=False)
    assert "**16 of 16 images (100 %)**" in (root / "report.md").read_text()
    train(load_config(config, ["training.images=48", *overrides]), progress=False)
    page = (root / "report.md").read_text()
    assert "**48 of 48 images (100 %)**" in page
    assert "began with 1 process on cpu" in page and "at 16 images: resumed with 1 process" in page
    assert "1. `a red cube`\n2. `dogs`" in page

    events = [json.loads(line) for line in (root / "log.jsonl").read_text().splitlines()]
    validation = [event for event in events if event["event"] == "validation"]
    for b, part in enumerate(validation[-1]["bins"]):
        (row,) = [line for line in page.splitlines() if line.startswith(("| 0 to", "| above")[b])]
        losses = [event["bins"][b]["loss"] for event in (validation[0], validation[-2], validation[-1])]
        assert [cell.strip() for cell in row.split("|")[2:5]] == [f"{loss:.4f}" for loss in losses]
        assert f"{100 * (losses[2] / losses[1] - 1):+.1f} %" in row
        assert f"{part['standard_error']:.4f}" in row

    shown = re.findall(r"!\[.+\]\((.+)\)", page)
    assert {"report/loss.png", "report/noise.png", "report/previews.png", "report/gradient.png", "report/throughput.png"} <= set(shown)
    assert "report/memory.png" not in shown  # a CPU does not count it
    for name in shown:
        with Image.open(root / name) as picture:
            assert picture.width > 300

    train_again, generate = re.findall(r"```bash\n(.+)\n```", page)
    monkeypatch.chdir(tmp_path)
    assert run_command(train_again + " --quiet") == 0
    assert checkpoints(root)[-1].name == "000000000096"
    assert run_command(generate + " --out picture.png --device cpu") == 0
    assert (tmp_path / "picture.png").is_file()


def test_a_run_that_was_copied_is_told_of_and_continued_elsewhere(
    write_config: WriteConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = ["training.preview.every_images=0", "training.max_minutes=1e-9"]
    train(load_config(write_config("run"), overrides), progress=False)
    copy, out = tmp_path / "a copy", tmp_path / "out"
    shutil.copytree(tmp_path / "run", copy)
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    assert run_command(shlex.join(["t2i-experts", "report", str(copy), "--out", str(out), "--json"])) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["images_seen"] == 8 and facts["total_images"] == 64 and facts["report"] == str(out / "report.md")
    assert before == {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    page = (out / "report.md").read_text()
    assert "No validation yet." in page and "None are drawn" in page
    again = re.findall(r"```bash\n(.+)\n```", page)[0]
    assert f"output={shlex.quote(str(copy))}" in again
    assert run_command(again + " --quiet training.max_minutes=0") == 0
    assert checkpoints(copy)[-1].name == "000000000064" and checkpoints(tmp_path / "run")[-1].name == "000000000008"


def test_a_divergence_is_told_and_stays_told(write_config: WriteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(write_config("run"), ["training.preview.every_images=0", "training.validation.every_images=0"])
    trainer = Trainer(config, progress=False)
    losses = trainer.task.losses

    def diverging(denoiser: Denoiser, batch: Batch) -> tuple[Tensor, Tensor]:
        values, sigma = losses(denoiser, batch)
        return values * (1 if batch.positions[0] < 32 else 1e39), sigma

    monkeypatch.setattr(trainer.task, "losses", diverging)
    with pytest.raises(TrainingDiverged):
        trainer.run()
    page = (tmp_path / "run" / "report.md").read_text()
    assert "where it **diverged**" in page and "| divergences | 1 |" in page
    trainer._lock.close()
    train(config, progress=False)
    page = (tmp_path / "run" / "report.md").read_text()
    assert "**64 of 64 images (100 %)**" in page and "| divergences | 1 |" in page and "| resumptions | 1 |" in page


def test_a_report_that_cannot_be_written_does_not_end_the_run(
    write_config: WriteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(root: Path) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr("t2i_experts.training.tracking.write_report", full)
    config = load_config(write_config("run"), ["training.images=16", "training.preview.every_images=0"])
    assert (train(config, progress=False) / "model_index.json").is_file()
    assert "report.md was not written: the disk is full" in capsys.readouterr().err


def test_prompts_that_look_like_markdown_stay_what_they_are(write_config: WriteConfig, tmp_path: Path) -> None:
    prompts = "training.preview.prompts=['a | b `c` ![x](y)', '猫 * 🍎']"
    train(load_config(write_config("run"), ["training.images=16", "training.preview.every_images=16", prompts]), progress=False)
    assert "1. `a | b 'c' ![x](y)`\n2. `猫 * 🍎`" in (tmp_path / "run" / "report.md").read_text()
    (tmp_path / "run" / "previews" / "000000000008.png").write_text("not a picture")
    write_report(tmp_path / "run")


def test_what_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(f"t2i-experts report {tmp_path}") == 2
    assert f"RUN={str(tmp_path)!r}" in capsys.readouterr().err
