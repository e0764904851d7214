"""Trainings of the candidates of `bench quality`, each in a process of its own (see `quality_run`), one at a time on each device."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from t2i_experts.bench.children import end_child, interrupted_by_sigterm, start_child
from t2i_experts.bench.quality_run import StepTime, step_time
from t2i_experts.config import RunConfig, to_yaml
from t2i_experts.training.history import read_history


@dataclass(frozen=True, eq=False)
class Candidate:
    """config: of its runs, but for rate, seed, device and output. rates: that are tried. flops: of an evaluation of one image."""

    name: str
    config: RunConfig
    rates: tuple[float, ...]
    flops: int


@dataclass(frozen=True, eq=False)
class Run:
    """One training of a candidate. seed: 0 for a trial, which tells a good rate and nothing else."""

    candidate: Candidate
    rate: float
    seed: int

    @property
    def name(self) -> str:
        """As the table has it."""
        return f"{self.candidate.name}, rate {self.rate}, {f'seed {self.seed}' if self.seed else 'trial'}"

    @property
    def folder(self) -> str:
        """The name without what a folder's should not have."""
        return re.sub(r"[^\w.+-]+", "-", self.name)

    def config(self, folder: Path, device: str) -> RunConfig:
        """Of this run, into a folder."""
        config, training = self.candidate.config, self.candidate.config.training
        training = replace(
            training,
            seed=self.seed,
            optimizer=replace(training.optimizer, learning_rate=self.rate),
            device="cpu" if device == "cpu" else None,
        )
        return replace(config, output=str(folder / "run"), training=training)


@dataclass(frozen=True)
class Trained:
    """seconds: of the whole process. steps: what it did. loss: held out. standard_error: of it, over the images."""

    seconds: float
    steps: StepTime
    loss: float
    standard_error: float


@dataclass(frozen=True)
class Failed:
    """seconds: of the whole process. why: what it said last."""

    seconds: float
    why: str


Outcome = Trained | Failed


@dataclass(frozen=True)
class _Running:
    """A run whose process was started at a moment of the monotonic clock."""

    run: Run
    folder: Path
    process: subprocess.Popen[bytes]
    started: float


def train_all(
    runs: Sequence[Run], devices: Sequence[str], root: Path, minutes: float, *, keep: bool, tell: Callable[[str], object]
) -> dict[Run, Outcome]:
    """All runs, each in a folder of `root`, which is removed afterwards unless it is to `keep`. tell: is told of each that ends.

    What still runs is ended if this is interrupted, by SIGTERM too.
    """
    waiting, running, found = _queues(runs, devices), dict[str, _Running](), dict[Run, Outcome]()
    with interrupted_by_sigterm():
        try:
            while len(found) < len(runs):
                for device, queue in waiting.items():
                    if queue and device not in running:
                        run = queue.popleft()
                        folder = root / run.folder
                        running[device] = _Running(run, folder, _start(run, folder, device, minutes), time.monotonic())
                time.sleep(0.05)
                for device, one in list(running.items()):
                    if one.process.poll() is None:
                        continue
                    found[one.run] = outcome = _outcome(one)
                    end_child(running.pop(device).process)
                    if not keep:
                        shutil.rmtree(one.folder)
                    said = f"failed: {outcome.why}" if isinstance(outcome, Failed) else f"held-out loss {outcome.loss:.4f}"
                    tell(f"{len(found)} of {len(runs)}: {one.run.name}: {said}")
        finally:
            for one in running.values():
                end_child(one.process)
    return found


def _queues(runs: Sequence[Run], devices: Sequence[str]) -> dict[str, deque[Run]]:
    """The runs of each device. Each time all have got one, the next begins one further on, so that no candidate keeps to a device."""
    queues: dict[str, deque[Run]] = {device: deque() for device in devices}
    for i, run in enumerate(runs):
        queues[devices[(i + i // len(devices)) % len(devices)]].append(run)
    return queues


def _start(run: Run, folder: Path, device: str, minutes: float) -> subprocess.Popen[bytes]:
    """A process that trains into FOLDER/run."""
    folder.mkdir(parents=True)
    config, environment = folder / "config.yaml", dict(os.environ)
    config.write_text(to_yaml(run.config(folder, device)), encoding="utf-8")
    if device.isdigit():
        visible = [name for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        environment["CUDA_VISIBLE_DEVICES"] = visible[int(device)] if visible else device
    command = [sys.executable, "-m", "t2i_experts.bench.quality_run", str(config), str(minutes)]
    return start_child(command, environment, folder / "output.txt")


def _outcome(ended: _Running) -> Outcome:
    """Of a process that has ended."""
    seconds, code = time.monotonic() - ended.started, ended.process.returncode
    if code < 0:
        return Failed(seconds, f"ended by {signal.Signals(-code).name}")
    if code:
        lines = (ended.folder / "output.txt").read_text(encoding="utf-8", errors="replace").split("\n")
        said = [line.strip() for line in lines if line.strip()]
        return Failed(seconds, said[-1][:300] if said else f"exit code {code}")
    history = read_history(ended.folder / "run")
    last = history.of("validation")[-1]
    if last["loss"] is None:
        return Failed(seconds, "its held-out loss is not finite")
    return Trained(seconds, step_time(history.events), last["loss"], last["standard_error"])
