"""One run of `bench quality`, in a process of its own: trains for so many minutes of steps, and tells of it by the log of the run.

Two short runs come first, whose weights are thrown away. They compile, and they tell how many images are seen in a second, and so how many
in the time that is given: the learning rate must know where the run will end.
"""

from __future__ import annotations

import shutil
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from t2i_experts.bench.backbone import NAME, build_diffusers
from t2i_experts.bench.children import end_with_parent
from t2i_experts.bench.device import free
from t2i_experts.config import RunConfig, load_config
from t2i_experts.registry import registry
from t2i_experts.training.history import read_events
from t2i_experts.training.measure import training_device
from t2i_experts.training.trainer import Trainer

FIRST_STEPS = 12
"""Of the first short run, which compiles."""
MEASURED_SECONDS = 15.0
"""Of the second one, or a quarter of the time that is given."""
REPORTS = 48
"""About as many lines has the log of a run."""


@dataclass(frozen=True)
class StepTime:
    """What a run has done. images: seen. seconds: of its steps. data_wait: share of them that it waited for data."""

    images: int
    seconds: float
    data_wait: float

    @property
    def images_per_second(self) -> float:
        """On average."""
        return self.images / self.seconds


def step_time(events: Sequence[Mapping[str, Any]]) -> StepTime:
    """The time of a run's steps, from the rates in its log, which leave out validation and saving.

    The steps up to the first report contain what comes once, compilation and the start of the loader's workers; they count as much as
    as many steps later on. Raises ValueError for a log with fewer than two reports.
    """
    reports = [event for event in events if event["event"] == "train"]
    if len(reports) < 2:
        raise ValueError(f"a log with {len(reports)} reports of training tells no rate; two are needed")
    images = seconds = waited = 0.0
    before = reports[0]["images_seen"]
    for report in reports[1:]:
        passed = (report["images_seen"] - before) / report["images_per_second"]
        images, seconds, waited = images + report["images_seen"] - before, seconds + passed, waited + passed * report["data_wait"]
        before = report["images_seen"]
    return StepTime(before, seconds * before / images, waited / seconds)


def train_for(config: RunConfig, minutes: float) -> None:
    """Trains in `config.output` with the config's schedule, drawn together to what the minutes of steps allow.

    Raises KeyboardInterrupt when the run is told to stop.
    """
    if NAME not in registry.names("backbone"):
        registry.add("backbone", NAME, build_diffusers)
    batch, root, seconds = config.training.batch_size, Path(config.output), 60 * minutes
    rate = _rehearse(config, root / "first", FIRST_STEPS * batch)
    rate = _rehearse(config, root / "second", _whole_steps(rate * min(MEASURED_SECONDS, seconds / 4), batch))
    images = _whole_steps(rate * seconds, batch)
    _train(_of_length(config, root, images, validate=True))


def _whole_steps(images: float, batch: int) -> int:
    """So many images in whole steps, three at least, for two reports."""
    return max(round(images / batch), 3) * batch


def _of_length(config: RunConfig, output: Path, images: int, *, validate: bool) -> RunConfig:
    """A run of so many images that warms up for its share of them, and is validated and saved at its end alone."""
    training = config.training
    optimizer = replace(training.optimizer, warmup_images=round(training.optimizer.warmup_images * images / training.images))
    changed = replace(
        training,
        images=images,
        checkpoint_every_images=images,
        log_every_images=max(images // REPORTS // training.batch_size, 1) * training.batch_size,
        optimizer=optimizer,
        validation=replace(training.validation, every_images=images if validate else 0),
    )
    return replace(config, output=str(output), training=changed)


def _rehearse(config: RunConfig, folder: Path, images: int) -> float:
    """Images per second of a short run in a folder that is removed afterwards."""
    _train(_of_length(config, folder, images, validate=False))
    rate = step_time(read_events(folder / "log.jsonl")).images_per_second
    shutil.rmtree(folder)
    free(training_device(config))
    return rate


def _train(config: RunConfig) -> None:
    trainer = Trainer(config, progress=False)
    trainer.run()
    if trainer.stopped_by:
        raise KeyboardInterrupt(f"stopped by {trainer.stopped_by.name}")


def main(config: str, minutes: str) -> None:
    """The process: its last line is what went wrong, if anything did."""
    end_with_parent()
    try:
        train_for(load_config(config), float(minutes))
    except Exception as error:
        traceback.print_exception(error)
        sys.exit(" ".join(str(error).split()) or type(error).__name__)


if __name__ == "__main__":
    main(*sys.argv[1:])
