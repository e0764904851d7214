"""Runs that are stopped or killed go on exactly; runs that diverge go back."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from t2i_experts.config import load_config
from t2i_experts.training.checkpoints import best_checkpoint, checkpoints, read_facts
from t2i_experts.training.divergence import LossWatch, TrainingDiverged
from t2i_experts.training.trainer import Trainer, train

WriteConfig = Callable[[str], Path]
FILES = ("network.safetensors", "ema.safetensors", "optimizer.safetensors")

SIGNALLED = """
import os, signal
from t2i_experts.training import task
losses, calls = task.DiffusionTask.losses, 0
def telling(self, denoiser, batch):
    global calls
    calls += 1
    if calls == {call}:
        os.kill(os.getpid(), signal.{name})
    return losses(self, denoiser, batch)
task.DiffusionTask.losses = telling
from t2i_experts.cli.app import main
main({argv!r})
"""


def events(root: Path, kind: str) -> list[dict[str, Any]]:
    return [event for line in (root / "log.jsonl").read_text().splitlines() if (event := json.loads(line))["event"] == kind]


def names(root: Path) -> list[str]:
    return [path.name for path in checkpoints(root)]


def same_end(first: Path, second: Path) -> bool:
    a, b = checkpoints(first)[-1], checkpoints(second)[-1]
    return a.name == b.name and all((a / name).read_bytes() == (b / name).read_bytes() for name in FILES)


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 0), ("SIGINT", 130)])
def test_a_signal_ends_the_step_and_writes_a_checkpoint(write_config: WriteConfig, tmp_path: Path, name: str, code: int) -> None:
    """The step that computes is finished; the next one, in which all processes learn of it (see test_trainer.py), is the last."""
    overrides = ["data.workers=2", "training.checkpoint_every_images=64"]
    argv = ["train", str(write_config("run")), *overrides, "--quiet"]
    script = SIGNALLED.format(call=2, name=name, argv=argv)
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert told.returncode == code, told.stderr
    assert f"stopped by {name} at 24 of 64 images" in told.stderr
    assert "Traceback" not in told.stderr
    assert names(tmp_path / "run") == ["000000000024"]
    train(load_config(write_config("run"), overrides), progress=False)
    train(load_config(write_config("unbroken"), overrides), progress=False)
    assert same_end(tmp_path / "run", tmp_path / "unbroken")


def test_a_second_interrupt_does_not_wait(write_config: WriteConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    trainer = Trainer(load_config(write_config("run")), progress=False)

    def twice(denoiser: Any, batch: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
        raise AssertionError("not interrupted")

    monkeypatch.setattr(trainer.task, "losses", twice)
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    assert names(tmp_path / "run") == []
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers


def diverging(trainer: Trainer, monkeypatch: pytest.MonkeyPatch, factor: float, *, times: int = 1) -> list[float]:
    """Multiplies the losses of the first `times` batches from position 32 on by `factor`; returns the learning rates of all steps."""
    rates: list[float] = []
    losses, left = trainer.task.losses, [times]

    def poison(denoiser: Any, batch: Any) -> Any:
        result, sigma = losses(denoiser, batch)
        if batch.positions[0] >= 32 and left[0]:
            left[0] -= 1
            return result * factor, sigma
        return result, sigma

    monkeypatch.setattr(trainer.task, "losses", poison)
    trainer.optimizer.register_step_pre_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
    return rates


def test_a_run_that_diverges_goes_back_and_on_with_half_the_rate(
    write_config: WriteConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    trainer = Trainer(load_config(write_config("run"), ["training.rollbacks=1", "training.keep_checkpoints=9"]), progress=False)
    rates = diverging(trainer, monkeypatch, float("nan"))
    trainer.run()
    root = tmp_path / "run"
    assert rates[-2:] == [rates[0] / 2] * 2
    (event,) = events(root, "rollback")
    assert event["images_seen"] == 32
    assert event["diverged_at"] == 48
    assert event["rate_scale"] == 0.5
    assert [e["images_seen"] for e in events(root, "train")] == [16, 32, 48, 64]
    assert [read_facts(path)["rollbacks"] for path in checkpoints(root)] == [0, 1, 1, 1]  # the one gone back to knows, too
    assert all(tensor.isfinite().all() for tensor in load_file(checkpoints(root)[-1] / "network.safetensors").values())
    # What a roll-back begins is exactly resumable, too.
    longer = Trainer(load_config(write_config("run"), ["training.rollbacks=1", "training.images=80"]), progress=False)
    assert longer.state.rate_scale == 0.5


def test_a_run_goes_back_only_so_often(write_config: WriteConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(load_config(write_config("run"), ["training.rollbacks=2"]), progress=False)
    rates = diverging(trainer, monkeypatch, float("nan"), times=9)
    with pytest.raises(TrainingDiverged, match="not finite"):
        trainer.run()
    rate = rates[0]
    assert rates == [rate] * 6 + [rate / 2] * 2 + [rate / 4] * 2  # noticed at 48, back to 32


def test_a_loss_that_rises_is_noticed_before_it_is_nan_and_its_weights_are_not_kept(
    write_config: WriteConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    overrides = ["training.images=96", "training.rollbacks=1", "training.keep_checkpoints=9"]
    trainer = Trainer(load_config(write_config("run"), overrides), progress=False)
    diverging(trainer, monkeypatch, 50.0, times=4)  # two steps a report
    trainer.run()
    (event,) = events(tmp_path / "run", "rollback")
    assert (event["images_seen"], event["diverged_at"]) == (32, 64)
    assert "divergence_factor=4" in event["reason"]
    assert [read_facts(path)["rollbacks"] for path in checkpoints(tmp_path / "run")] == [0, 1, 1, 1, 1, 1]


def test_a_run_that_keeps_diverging_keeps_no_such_weights_whoever_starts_it(
    write_config: WriteConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What is a high loss, and how often the run went back, outlive the roll-back and the process."""
    overrides = ["training.images=128", "training.rollbacks=2", "training.keep_checkpoints=9"]
    for rollbacks in (2, 2, 2):
        trainer = Trainer(load_config(write_config("run"), overrides), progress=False)
        diverging(trainer, monkeypatch, 50.0, times=99)
        with pytest.raises(TrainingDiverged, match="divergence_factor"):
            trainer.run()
        assert names(tmp_path / "run") == ["000000000016", "000000000032"]
        assert len(events(tmp_path / "run", "rollback")) == rollbacks
    assert len(events(tmp_path / "run", "diverged")) == 5


def test_one_high_loss_at_the_end_is_none_but_is_remembered(
    write_config: WriteConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    overrides = ["training.images=48", "training.keep_checkpoints=9", "training.rollbacks=1"]
    trainer = Trainer(load_config(write_config("run"), overrides), progress=False)
    diverging(trainer, monkeypatch, 50.0, times=99)
    trainer.run()
    assert names(tmp_path / "run")[-1] == "000000000048"
    more = Trainer(load_config(write_config("run"), [*overrides, "training.images=80"]), progress=False)
    diverging(more, monkeypatch, 50.0, times=2)
    more.run()  # the next high loss is the second in a row: back to what was saved before both
    assert [e["images_seen"] for e in events(tmp_path / "run", "rollback")] == [32]
    assert names(tmp_path / "run")[-1] == "000000000080"


def test_loss_watch() -> None:
    watch = LossWatch(3.0)
    for loss in (1.0, 0.5, 1.6, 0.6, 1.4):  # one outlier is none
        watch.see(loss)
    watch.see(1.51)
    assert watch.suspicious
    with pytest.raises(TrainingDiverged, match=r"1\.55"):
        watch.see(1.55)
    silent = LossWatch(0.0)
    for loss in (1.0, 100.0, 1000.0):
        silent.see(loss)
    assert not silent.suspicious


def test_the_best_checkpoint_is_kept_and_is_a_model(write_config: WriteConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    trainer = Trainer(load_config(write_config("run"), ["training.keep_checkpoints=1"]), progress=False)
    scores = iter([0.5, 0.2, 0.4, 0.3])
    monkeypatch.setattr(trainer, "_validate", lambda: next(scores))
    every = trainer.config.training.validation.every_images
    assert every == 32  # so two of the four checkpoints are validated
    trainer.run()
    root = tmp_path / "run"
    assert names(root) == ["000000000064"]  # 0.2 at 64 is better than 0.5 at 32, and the newest too
    more = Trainer(load_config(write_config("run"), ["training.keep_checkpoints=1", "training.images=128"]), progress=False)
    monkeypatch.setattr(more, "_validate", lambda: next(scores))
    more.run()
    assert names(root) == ["000000000064", "000000000128"]
    assert best_checkpoint(root) == root / "checkpoints" / "000000000064"
    ema = load_file(root / "checkpoints" / "000000000064" / "ema.safetensors")
    best = load_file(next((root / "best").glob("*/diffusion_pytorch_model.safetensors")))
    assert all(torch.equal(best[name], tensor) for name, tensor in ema.items())
    assert json.loads((root / "best" / "model_index.json").read_text())["provenance"]["images_seen"] == 64
    assert json.loads((root / "model" / "model_index.json").read_text())["provenance"]["images_seen"] == 128


def _train(config: str, overrides: list[str]) -> None:
    os.setsid()
    train(load_config(config, overrides), progress=False)


@pytest.mark.slow
def test_fifty_kills_at_random_moments_change_nothing(write_config: WriteConfig, tmp_path: Path) -> None:
    """Some hit while the run starts, some while it steps, and some while it saves."""
    overrides = ["training.images=2400", "training.checkpoint_every_images=80", "data.workers=2"]
    overrides += ["training.validation.every_images=0", "training.preview.every_images=0"]
    train(load_config(write_config("unbroken"), overrides), progress=False)
    context = multiprocessing.get_context("forkserver")  # imports once: a run starts in a moment
    context.set_forkserver_preload([f"t2i_experts.{name}" for name in ("training.trainer", "conditioning.t5", "conditioning.clip")])
    warm = context.Process(target=os.getpid)
    warm.start()
    warm.join()
    config, root, generator = str(write_config("broken")), tmp_path / "broken", random.Random(0)
    kills, found, first, code = 0, set(), 0.0, None
    while code != 0:
        process = context.Process(target=_train, args=(config, overrides))
        started = time.monotonic()
        process.start()
        while not kills and not names(root):  # how long it takes to the first checkpoint, on this machine
            assert process.is_alive(), "it ends before its first checkpoint"
            time.sleep(0.01)
            first = time.monotonic() - started
        process.join(None if kills >= 50 else generator.uniform(0.1, 1.5) * first if kills else 0)
        if process.exitcode is None:
            process.kill()
            process.join()
            kills += 1
        else:
            code = process.exitcode
            assert code == 0, f"exit code {code} after {kills} kills"
        found.update(names(root)[-1:])
    assert kills > 20 and len(found) > 5
    assert same_end(tmp_path / "unbroken", root)
    assert [e["loss"] for e in events(tmp_path / "unbroken", "train")] == [e["loss"] for e in events(root, "train")]
