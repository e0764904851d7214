"""Quality for the time: held-out loss after some minutes of training from scratch, this project's U-Net beside diffusers'.

Both are trained by this project's trainer: the same shards, encoders, loss, precision, optimiser and average, the same images a step, the
same images and noise in validation. Each run is a process of its own (see `quality_run`), one at a time on each device.
"""

from __future__ import annotations

import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from t2i_experts.bench.backbone import counterpart, own_flops
from t2i_experts.bench.machine import describe
from t2i_experts.bench.quality_run import StepTime, step_time
from t2i_experts.bench.result import Result, Row
from t2i_experts.bench.timing import Timing
from t2i_experts.config import PreviewConfig, RunConfig, to_yaml, trace_config
from t2i_experts.shards.reader import ShardReader
from t2i_experts.training.data import open_training_shards
from t2i_experts.training.embeddings import stored_embeddings
from t2i_experts.training.history import read_history
from t2i_experts.training.measure import training_device

OWN, BASELINE = "t2i-experts", "diffusers"
SET_HERE = (
    "output",
    "training.seed",
    "training.device",
    "training.max_minutes",
    "training.log_every_images",
    "training.checkpoint_every_images",
    "training.keep_checkpoints",
    "training.rollbacks",
    "training.trackers",
    "training.preview",
    "training.ema.snapshot_every_images",
    "training.validation.every_images",
)
"""Keys, with all below them, that the benchmark decides."""
MEASURE = ("stage.size", "stage.codec", "stage.noise", "data.validation", "training.validation")
"""Keys, with all below them, on which the meaning of a held-out loss depends."""


class RunsFailed(Exception):
    """Some runs did not come to their end; the message names them."""


@dataclass(frozen=True)
class Settings:
    """What is to be compared, and how.

    config, overrides: the run of this project's network, as `bench quality` takes them. minutes: of training steps, for each run.
    rates, baseline_rates: learning rates that are tried, the config's own if there are none. variants: name -> further overrides.
    baseline: whether diffusers takes part. devices: numbers of CUDA devices, or `cpu`; none: the best there is. out: a folder that keeps
    the runs; None: they are removed.
    """

    config: str | Path
    overrides: Sequence[str] = ()
    minutes: float = 4.0
    seeds: int = 2
    rates: Sequence[float] = ()
    baseline_rates: Sequence[float] = ()
    variants: Mapping[str, Sequence[str]] | None = None
    baseline: bool = True
    devices: Sequence[str] = ()
    out: Path | None = None


@dataclass(frozen=True, eq=False)
class Candidate:
    """config: of its runs, but for rate, seed, device and output. rates: that are tried. flops: of an evaluation of one image."""

    name: str
    config: RunConfig
    rates: tuple[float, ...]
    flops: int


@dataclass(frozen=True, eq=False)
class Run:
    """One training of a candidate."""

    candidate: Candidate
    rate: float
    seed: int

    @property
    def name(self) -> str:
        """As the table has it."""
        return f"{self.candidate.name}, rate {self.rate:g}, seed {self.seed}"

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
class Outcome:
    """seconds: of the whole process. steps: what it did. loss: held out. standard_error: of it, over the images.

    failure: what the process said last, if it came to no loss; steps is None then.
    """

    seconds: float
    steps: StepTime | None = None
    loss: float = float("inf")
    standard_error: float = float("inf")
    failure: str = ""


def bench_quality(settings: Settings, tell: Callable[[str], object] = lambda line: None) -> Result:
    """Trains every candidate with every seed. tell: is told of each run that ends.

    Where a candidate has several rates, all of them are tried with the first seed, and the best goes on with the others. Raises ValueError
    for settings that are out of range, and where diffusers is missing.
    """
    if not 0 < settings.minutes < float("inf"):
        raise ValueError(f"--minutes={settings.minutes} must be positive and finite")
    if settings.seeds < 1:
        raise ValueError(f"--seeds={settings.seeds} must be at least 1")
    config, _ = _own_config(settings)
    devices = _devices(settings.devices, config)
    _refuse_missing_data(config)
    candidates = _candidates(settings, config)
    seeds = range(settings.seeds)
    with tempfile.TemporaryDirectory(prefix="t2i-bench-quality-") as temporary:
        root = settings.out or Path(temporary)

        def outcomes(runs: Iterable[Run]) -> dict[Run, Outcome]:
            turns = sorted(runs, key=lambda run: run.seed)  # of the candidates, one after the other
            return _side_by_side(turns, devices, root, settings, tell)

        found = outcomes(
            Run(candidate, rate, seed)
            for seed in seeds
            for candidate in candidates
            for rate in candidate.rates
            if seed == 0 or _settled(candidate)
        )
        best = {candidate.name: _best_rate(candidate, found) for candidate in candidates}
        found |= outcomes(
            Run(candidate, best[candidate.name], seed) for seed in seeds[1:] for candidate in candidates if not _settled(candidate)
        )
    ordered = sorted(found, key=lambda run: (candidates.index(run.candidate), run.rate, run.seed))
    rows = [_row(run, found[run]) for run in ordered]
    described = {
        "config": str(settings.config),
        "minutes": settings.minutes,
        "seeds": settings.seeds,
        "batch": config.training.batch_size,
        "precision": config.training.precision,
        "compiled": config.training.compile,
    }
    machine = describe(torch.device("cpu") if devices == ["cpu"] else training_device(config))
    return Result("quality", {**machine, "devices": len(devices)}, described, [*rows, *_summaries(candidates, best, found)])


def failures(result: Result) -> list[str]:
    """What the runs that failed said, by name."""
    return [f"{row.name}: {row.more['failed']}" for row in result.rows if "failed" in row.more]


def parse_rates(text: str | None, option: str) -> tuple[float, ...]:
    """`1e-3,5e-4`. Raises ValueError for what is no list of positive numbers."""
    try:
        rates = tuple(float(part) for part in text.split(",")) if text else ()
    except ValueError:
        rates = (0.0,)
    if not all(0 < rate < float("inf") for rate in rates) or len(set(rates)) < len(rates):
        raise ValueError(f"{option}={text!r} must be different positive numbers with commas between them, such as 1e-3,5e-4")
    return rates


def parse_variant(text: str) -> tuple[str, tuple[str, ...]]:
    """`NAME:key=value,key=value` as the name and its overrides; a comma inside a value stays there. Raises ValueError for another form."""
    name, colon, rest = text.partition(":")
    overrides = tuple(re.split(r",(?=[\w.]+=)", rest))
    if not (name and colon and all("=" in override for override in overrides)):
        raise ValueError(f"--variant={text!r} must be NAME:key=value, or NAME:key=value,key=value")
    return name, overrides


def _own_config(settings: Settings, more: Sequence[str] = ()) -> tuple[RunConfig, set[str]]:
    """This project's run with further overrides, and with what the benchmark decides; and the keys whose values these overrides give."""
    config, values = trace_config(settings.config, [*settings.overrides, *more])
    given = {text: {key for key, value in values.items() if value.origin == f"override {text!r}"} for text in (*settings.overrides, *more)}
    for text, keys in given.items():
        if ignored := sorted(key for key in keys if _below(key, SET_HERE)):
            raise ValueError(f"override {text!r} would be ignored: the benchmark decides {', '.join(ignored)}")
    if config.data.validation is None:
        raise ValueError("data.validation is null; held-out loss needs a shard folder: data.validation=FOLDER")
    training = replace(
        config.training,
        max_minutes=0.0,
        rollbacks=0,
        trackers=[],
        preview=PreviewConfig(),
        ema=replace(config.training.ema, snapshot_every_images=0),
    )
    return replace(config, training=training), {key for text in more for key in given[text]}


def _below(key: str, keys: Sequence[str]) -> bool:
    """Whether a dotted key is one of these, or below one."""
    return any(key == other or key.startswith(f"{other}.") for other in keys)


def _refuse_missing_data(config: RunConfig) -> None:
    """Raises ValueError, before minutes are spent, for shards that are not there or do not fit."""
    open_training_shards(config, processes=1)
    assert config.data.validation is not None
    ShardReader([config.data.validation], size=config.stage.size, seed=0, embeddings=stored_embeddings(config))


def _devices(names: Sequence[str], config: RunConfig) -> list[str]:
    """Raises ValueError for a device that is not to be had."""
    if not names:
        kind = training_device(config).type
        return ["0" if kind == "cuda" else kind]
    there = [str(number) for number in range(torch.cuda.device_count())]
    for name in names:
        if name not in (*there, "cpu") or names.count(name) > 1:
            raise ValueError(f"--devices={','.join(names)!r}: allowed, each once, with commas between them: {', '.join([*there, 'cpu'])}")
    return list(names)


def _candidates(settings: Settings, config: RunConfig) -> list[Candidate]:
    """The baseline first, then this project's network, then its variants."""
    found = []
    usual = (config.training.optimizer.learning_rate,)
    if settings.baseline:
        if config.stage.network.backbone != "unet":
            raise ValueError(
                f"stage.network.backbone={config.stage.network.backbone!r}: the baseline is made to match a unet; --alone leaves it out"
            )
        other = counterpart(config.stage)
        theirs = replace(
            config, stage=replace(config.stage, network=other.network), training=replace(config.training, gradient_checkpointing=0)
        )
        found.append(Candidate(BASELINE, theirs, tuple(settings.baseline_rates) or usual, other.flops))
    elif settings.baseline_rates:
        raise ValueError("--baseline-rates would be ignored: --alone leaves the baseline out")
    found.append(Candidate(OWN, config, tuple(settings.rates) or usual, own_flops(config.stage)))
    for name, overrides in (settings.variants or {}).items():
        if name in (OWN, BASELINE):
            raise ValueError(f"--variant={name!r}: the name is taken")
        try:
            changed, given = _own_config(settings, overrides)
        except ValueError as error:
            raise ValueError(f"--variant {name}: {error}") from error
        if other_measure := sorted(key for key in given if _below(key, MEASURE)):
            raise ValueError(
                f"--variant {name}: {', '.join(other_measure)} changes what a held-out loss means, and rows could not be compared"
            )
        rate = changed.training.optimizer.learning_rate
        rates = (rate,) if "training.optimizer.learning_rate" in given else tuple(settings.rates) or (rate,)
        found.append(Candidate(name, changed, rates, own_flops(changed.stage)))
    return found


def _settled(candidate: Candidate) -> bool:
    return len(candidate.rates) == 1


def _best_rate(candidate: Candidate, found: Mapping[Run, Outcome]) -> float:
    """That of the lowest held-out loss with the first seed, among the runs that came to one."""
    tried = {run.rate: outcome for run, outcome in found.items() if run.candidate is candidate and run.seed == 0}
    return min(candidate.rates, key=lambda rate: tried[rate].loss)


@dataclass(frozen=True)
class _Running:
    """A run whose process was started at a moment of the monotonic clock."""

    run: Run
    folder: Path
    process: subprocess.Popen[str]
    started: float


def _side_by_side(
    runs: Iterable[Run], devices: Sequence[str], root: Path, settings: Settings, tell: Callable[[str], object]
) -> dict[Run, Outcome]:
    """All runs, one at a time on each device; what still runs is ended if this is interrupted."""
    waiting, running, found = _queues(list(runs), devices), dict[str, _Running](), dict[Run, Outcome]()
    total = sum(map(len, waiting.values()))
    try:
        while running or any(waiting.values()):
            for device, queue in waiting.items():
                if queue and device not in running:
                    run = queue.popleft()
                    folder = root / re.sub(r"[^\w.-]+", "-", run.name)
                    running[device] = _Running(run, folder, _start(run, folder, device, settings.minutes), time.monotonic())
            time.sleep(0.05)
            for device, one in list(running.items()):
                if one.process.poll() is not None:
                    del running[device]
                    found[one.run] = outcome = _outcome(one)
                    if settings.out is None:
                        shutil.rmtree(one.folder)
                    said = outcome.failure or f"held-out loss {outcome.loss:.4f}"
                    tell(f"{len(found)} of {total}: {one.run.name}: {'failed: ' if outcome.failure else ''}{said}")
    finally:
        for one in running.values():
            one.process.kill()
            one.process.wait()
    return found


def _queues(runs: Sequence[Run], devices: Sequence[str]) -> dict[str, deque[Run]]:
    """The runs of each device. Each time all have got one, the next begins one further on, so that no candidate keeps to a device."""
    queues: dict[str, deque[Run]] = {device: deque() for device in devices}
    for i, run in enumerate(runs):
        queues[devices[(i + i // len(devices)) % len(devices)]].append(run)
    return queues


def _start(run: Run, folder: Path, device: str, minutes: float) -> subprocess.Popen[str]:
    """A process that trains into FOLDER/run. Raises ValueError for a folder that is there."""
    if folder.exists():
        raise ValueError(f"--out: {folder} exists; name a folder that holds no such run")
    folder.mkdir(parents=True)
    config, environment = folder / "config.yaml", dict(os.environ)
    config.write_text(to_yaml(run.config(folder, device)), encoding="utf-8")
    if device.isdigit():
        visible = [name for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        environment["CUDA_VISIBLE_DEVICES"] = visible[int(device)] if visible else device
    command = [sys.executable, "-m", "t2i_experts.bench.quality_run", str(config), str(minutes)]
    with _said(folder).open("w", encoding="utf-8") as said:
        return subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=said, stderr=said, text=True)


def _said(folder: Path) -> Path:
    """What the process of a run wrote."""
    return folder / "output.txt"


def _outcome(ended: _Running) -> Outcome:
    """Of a process that has ended."""
    seconds = time.monotonic() - ended.started
    if ended.process.returncode:
        lines = [line.strip() for line in _said(ended.folder).read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        return Outcome(seconds, failure=(lines or [f"exit code {ended.process.returncode}"])[-1][:300])
    history = read_history(ended.folder / "run")
    last = history.of("validation")[-1]
    if last["loss"] is None:
        return Outcome(seconds, failure="its held-out loss is not finite")
    return Outcome(seconds, step_time(history.events), last["loss"], last["standard_error"])


def _row(run: Run, outcome: Outcome) -> Row:
    if outcome.steps is None:
        return Row(run.name, None, more={"process s": outcome.seconds, "failed": outcome.failure})
    steps = outcome.steps
    more = {
        "GFLOP": run.candidate.flops / 1e9,
        "images/s": steps.images_per_second,
        "images seen": steps.images,
        "data wait": steps.data_wait,
        "held-out loss": outcome.loss,
        "standard error": outcome.standard_error,
        "process s": outcome.seconds,
    }
    return Row(run.name, Timing((steps.seconds,)), more=more)


@dataclass(frozen=True)
class _Mean:
    """Of a candidate's runs at its best rate that came to a loss."""

    runs: Sequence[StepTime]
    losses: Sequence[float]

    @property
    def loss(self) -> float:
        return statistics.mean(self.losses)

    @property
    def images_per_second(self) -> float:
        return statistics.mean(steps.images_per_second for steps in self.runs)

    @property
    def variance(self) -> float | None:
        """Of the loss between seeds; None for a single one."""
        return statistics.variance(self.losses) if len(self.losses) > 1 else None


def _summaries(candidates: Sequence[Candidate], best: Mapping[str, float], found: Mapping[Run, Outcome]) -> list[Row]:
    """A row of means for each candidate, compared with the first: ratio of images/s, difference of the losses, and this over the spread."""
    means = {}
    for candidate in candidates:
        ended = [o for run, o in found.items() if run.candidate is candidate and run.rate == best[candidate.name] and o.steps]
        if ended:
            means[candidate.name] = _Mean([o.steps for o in ended if o.steps], [o.loss for o in ended])
    first = means.get(candidates[0].name)
    rows = []
    for name, mean in means.items():
        more: dict[str, Any] = {
            "images/s": mean.images_per_second,
            "images seen": round(statistics.mean(steps.images for steps in mean.runs)),
            "held-out loss": mean.loss,
        }
        if mean.variance is not None:
            more["seeds +-"] = mean.variance**0.5
        if first is not None and mean is not first:
            more["difference"] = mean.loss - first.loss
            if first.variance is not None and mean.variance is not None and first.variance + mean.variance > 0:
                more["over spread"] = more["difference"] / ((first.variance + mean.variance) / 2) ** 0.5
        ratio = None if first is None or mean is first else mean.images_per_second / first.images_per_second
        timing = Timing(tuple(steps.seconds for steps in mean.runs))
        rows.append(Row(f"{name}, rate {best[name]:g}, mean of {len(mean.runs)}", timing, ratio=ratio, more=more))
    return rows
