"""Quality for the time: held-out loss after some minutes of training from scratch, this project's U-Net beside diffusers'.

Both are trained by this project's trainer: the same shards, encoders, loss, precision, optimiser and average, the same images a step, the
same images and noise in validation. See `backbone` for the baseline, `trainings` for the runs, and `quality_table` for the rows.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from t2i_experts.bench.backbone import counterpart, own_flops
from t2i_experts.bench.machine import describe
from t2i_experts.bench.quality_table import mean_rows, run_row
from t2i_experts.bench.result import Result
from t2i_experts.bench.trainings import Candidate, Outcome, Run, Trained, train_all
from t2i_experts.config import PreviewConfig, RunConfig, trace_config
from t2i_experts.shards.reader import ShardReader
from t2i_experts.training.data import open_training_shards
from t2i_experts.training.embeddings import stored_embeddings
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


class RunsFailed(Exception):
    """Some runs did not come to their end; the message names them."""


@dataclass(frozen=True)
class Settings:
    """What is to be compared, and how.

    config, overrides: the run of this project's network, as `bench quality` takes them. minutes: of training steps, for each run. seeds:
    how many runs of each candidate count. rates: learning rates that are tried, the config's own if there are none. baseline_rates: the
    same for the baseline, by default `rates`. variants: name -> further overrides. baseline: whether diffusers takes part. devices: numbers
    of CUDA devices, or `cpu`; none: the best there is. out: a new folder that keeps the runs; None: they are removed.
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


def bench_quality(settings: Settings, tell: Callable[[str], object] = lambda line: None) -> Result:
    """Trains every candidate with every seed. tell: is told of each run that ends.

    Where a candidate has several rates, each is tried once, with a seed that is used for nothing else: so the runs that count are as good
    as any others, however many rates were tried. Raises ValueError for settings that are out of range, and where diffusers is missing.
    """
    if not 0 < settings.minutes < float("inf"):
        raise ValueError(f"--minutes={settings.minutes} must be positive and finite")
    if settings.seeds < 1:
        raise ValueError(f"--seeds={settings.seeds} must be at least 1")
    if settings.out and settings.out.exists() and not (settings.out.is_dir() and not any(settings.out.iterdir())):
        raise ValueError(f"--out={str(settings.out)!r} exists; name a new folder")
    config = _own_config(settings)
    devices = _devices(settings.devices, config)
    candidates = _candidates(settings, config)
    with tempfile.TemporaryDirectory(prefix="t2i-bench-quality-") as temporary:
        root = settings.out or Path(temporary)

        def train(runs: Sequence[Run]) -> dict[Run, Outcome]:
            return train_all(runs, devices, root, settings.minutes, keep=settings.out is not None, tell=tell)

        trials = train([Run(candidate, rate, 0) for candidate in candidates if len(candidate.rates) > 1 for rate in candidate.rates])
        best = {candidate: rate for candidate in candidates if (rate := _best_rate(candidate, trials)) is not None}
        found = trials | train([Run(candidate, rate, seed) for seed in range(1, settings.seeds + 1) for candidate, rate in best.items()])
    ordered = sorted(found, key=lambda run: (candidates.index(run.candidate), run.rate, run.seed))
    described = {
        "config": str(settings.config),
        "minutes": settings.minutes,
        "seeds": settings.seeds,
        "batch": config.training.batch_size,
        "precision": config.training.precision,
        "compiled": config.training.compile,
    }
    machine = describe(torch.device("cpu") if devices == ["cpu"] else training_device(config))
    rows = [*(run_row(run, found[run]) for run in ordered), *mean_rows(candidates, found)]
    return Result("quality", {**machine, "devices": len(devices)}, described, rows)


def failures(result: Result) -> list[str]:
    """What the runs that failed said, by name."""
    return [f"{row.name}: {row.more['failed']}" for row in result.rows if "failed" in row.more]


def parse_rates(text: str | None, option: str) -> tuple[float, ...]:
    """`1e-3,5e-4`; none for None. Raises ValueError for what is no list of positive numbers."""
    try:
        rates = () if text is None else tuple(map(float, text.split(",")))
    except ValueError:
        rates = (0.0,)
    if not all(0 < rate < float("inf") for rate in rates) or len(set(rates)) < len(rates):
        raise ValueError(f"{option}={text!r} must be different positive numbers with commas between them, such as 1e-3,5e-4")
    return rates


def parse_variant(text: str) -> tuple[str, tuple[str, ...]]:
    """`NAME:key=value,key=value` as the name and its overrides; a comma inside a value stays there. Raises ValueError for another form."""
    name, _, rest = text.partition(":")
    overrides = tuple(re.split(r",(?=[\w.]+=)", rest))
    if not (re.fullmatch(r"\w[\w.-]*", name) and all("=" in override for override in overrides)):
        raise ValueError(f"--variant={text!r} must be NAME:key=value, or NAME:key=value,key=value; a name has letters, digits and . _ -")
    return name, overrides


def _best_rate(candidate: Candidate, trials: Mapping[Run, Outcome]) -> float | None:
    """Its only one, or that of the lowest held-out loss; None if no trial came to a loss."""
    losses = {run.rate: tried.loss for run, tried in trials.items() if run.candidate is candidate and isinstance(tried, Trained)}
    return candidate.rates[0] if len(candidate.rates) == 1 else min(losses, key=lambda rate: losses[rate], default=None)


def _own_config(settings: Settings, more: Sequence[str] = ()) -> RunConfig:
    """This project's run with further overrides, and with what the benchmark decides. Raises ValueError, before minutes are spent, for
    overrides that would be ignored and for shards that are not there or do not fit."""
    config, values = trace_config(settings.config, [*settings.overrides, *more])
    ignored = {
        key: setting.origin
        for key, setting in values.items()
        if setting.origin.startswith("override ") and any(key == ours or key.startswith(f"{ours}.") for ours in SET_HERE)
    }
    if ignored:
        raise ValueError(f"{', '.join(sorted(set(ignored.values())))} would be ignored: the benchmark decides {', '.join(sorted(ignored))}")
    if config.data.validation is None:
        raise ValueError("data.validation is null; held-out loss needs a shard folder: data.validation=FOLDER")
    open_training_shards(config, processes=1)
    ShardReader([config.data.validation], size=config.stage.size, seed=0, embeddings=stored_embeddings(config))
    average = replace(config.training.ema, snapshot_every_images=0)
    training = replace(config.training, max_minutes=0.0, rollbacks=0, trackers=[], preview=PreviewConfig(), ema=average)
    return replace(config, training=training)


def _devices(names: Sequence[str], config: RunConfig) -> list[str]:
    """Raises ValueError for a device that is not to be had."""
    if not names:
        device = training_device(config)
        return [str(device.index or 0) if device.type == "cuda" else device.type]
    there = [str(number) for number in range(torch.cuda.device_count())]
    if list(names) != ["cpu"] and (not set(names) <= set(there) or len(set(names)) < len(names)):
        allowed = f"cpu, or of {', '.join(there)} each once with commas between them" if there else "cpu"
        raise ValueError(f"--devices={','.join(names)!r}; allowed: {allowed}")
    return list(names)


def _candidates(settings: Settings, config: RunConfig) -> list[Candidate]:
    """The baseline first, then this project's network, then its variants."""
    found = []
    rates = tuple(settings.rates) or (config.training.optimizer.learning_rate,)
    if settings.baseline:
        if config.stage.network.backbone != "unet":
            raise ValueError(
                f"stage.network.backbone={config.stage.network.backbone!r}: the baseline is made to match a unet; --alone leaves it out"
            )
        other = counterpart(config.stage)
        theirs = replace(
            config, stage=replace(config.stage, network=other.network), training=replace(config.training, gradient_checkpointing=0)
        )
        found.append(Candidate(BASELINE, theirs, tuple(settings.baseline_rates) or rates, other.flops))
    elif settings.baseline_rates:
        raise ValueError("--baseline-rates would be ignored: --alone leaves the baseline out")
    found.append(Candidate(OWN, config, rates, own_flops(config.stage)))
    for name, overrides in (settings.variants or {}).items():
        if name in (OWN, BASELINE):
            raise ValueError(f"--variant={name!r}: the name is taken")
        found.append(_variant(settings, config, name, overrides, rates))
    return found


def _variant(settings: Settings, own: RunConfig, name: str, overrides: Sequence[str], rates: tuple[float, ...]) -> Candidate:
    """This project's network with other values; one that sets its own learning rate keeps it."""
    try:
        config = _own_config(settings, overrides)
    except ValueError as error:
        raise ValueError(f"--variant {name}: {error}") from error
    before = _measured_on(own)
    if others := [key for key, value in _measured_on(config).items() if value != before[key]]:
        raise ValueError(f"--variant {name}: {', '.join(others)} changes what a held-out loss means, and rows could not be compared")
    rate = config.training.optimizer.learning_rate
    own_rate = rate != own.training.optimizer.learning_rate
    return Candidate(name, config, (rate,) if own_rate else rates, own_flops(config.stage))


def _measured_on(config: RunConfig) -> dict[str, Any]:
    """All on which the meaning of a held-out loss depends."""
    stage = config.stage
    return {
        "stage.size": stage.size,
        "stage.codec": stage.codec,
        "stage.noise": stage.noise,
        "data.validation": config.data.validation,
        "training.validation": config.training.validation,
    }
