"""TensorBoard and Weights & Biases through accelerate's trackers: curves, and previews with their prompts as captions.

A run that goes on continues in the same place: TensorBoard is told from which step on its events are void, and Weights & Biases gets the id
of the run again, which RUN/wandb_id holds.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.tracking import GeneralTracker, TensorBoardTracker, WandBTracker
from accelerate.utils import is_tensorboard_available, is_wandb_available
from tqdm import tqdm

from t2i_experts.config import RunConfig, to_plain

WANDB_PROJECT = "t2i-experts"
INSTALLED: Mapping[str, Callable[[], bool]] = {"tensorboard": is_tensorboard_available, "wandb": is_wandb_available}

Captioned = Sequence[tuple[str, Any]]
"""Prompts, each with its picture (PIL)."""


class TensorBoard(TensorBoardTracker):
    """RUN/tensorboard; to look at it: tensorboard --logdir RUN."""

    def __init__(self, run: Path, images_seen: int) -> None:
        super().__init__("tensorboard", run, purge_step=images_seen + 1)
        self._start = images_seen

    def store_init_configuration(self, values: Mapping[str, Any]) -> None:
        """The config as text; TensorBoard's own hyperparameters are flat, and open another run at each start."""
        text = json.dumps(values, indent=2, ensure_ascii=False)
        self.log({"config": "".join(f"    {line}\n" for line in text.splitlines())}, step=self._start)

    def pictures(self, images_seen: int, previews: Captioned) -> None:
        """One image for each prompt, which is its tag."""
        for i, (prompt, picture) in enumerate(previews):
            self.log_images({f"previews/{i + 1:02d} {prompt}": np.asarray(picture)[None]}, step=images_seen, dataformats="NHWC")


class WandB(WandBTracker):
    """One run of Weights & Biases for all starts of a run here.

    Images seen are its x axis but not its own step, which may not go back: a run that goes on repeats the steps since its checkpoint.
    """

    def __init__(self, run: Path) -> None:
        self._id = run / "wandb_id"
        known = self._id.read_text(encoding="utf-8").strip() if self._id.is_file() else None
        project = os.environ.get("WANDB_PROJECT", WANDB_PROJECT)
        super().__init__(project, id=known, name=run.resolve().name, dir=str(run), resume="allow")

    def start(self) -> None:
        """Opens the run and keeps its id."""
        super().start()
        self._id.write_text(self.tracker.id + "\n", encoding="utf-8")
        self.tracker.define_metric("images_seen")
        self.tracker.define_metric("*", step_metric="images_seen")

    def log(self, values: Mapping[str, Any], step: int | None = None, **_: Any) -> None:
        """Values over images seen."""
        super().log({**values, "images_seen": step})

    def pictures(self, images_seen: int, previews: Captioned) -> None:
        """One panel with an image for each prompt, which is its caption."""
        import wandb

        self.log({"previews": [wandb.Image(picture, caption=prompt) for prompt, picture in previews]}, step=images_seen)


class Trackers:
    """The trackers of a run. One that fails in mid-run says so once and is left out; the run goes on."""

    def __init__(self, trackers: Sequence[GeneralTracker]) -> None:
        self._trackers = list(trackers)

    def __len__(self) -> int:
        return len(self._trackers)

    def event(self, kind: str, images_seen: int, values: Mapping[str, Any]) -> None:
        """Passes the numbers of a training report or of a validation on; other events are the log's alone."""
        if kind in ("train", "validation"):
            numbers = dict(scalars(kind, values))
            self._each(lambda tracker: tracker.log(numbers, step=images_seen))

    def pictures(self, images_seen: int, previews: Captioned) -> None:
        """Passes previews on to those that show pictures."""
        self._each(lambda tracker: tracker.pictures(images_seen, previews) if hasattr(tracker, "pictures") else None)

    def close(self) -> None:
        """Writes out what they still hold."""
        self._each(lambda tracker: tracker.finish())
        self._trackers.clear()

    def _each(self, act: Callable[[Any], None]) -> None:
        for tracker in list(self._trackers):
            try:
                act(tracker)
            except Exception as error:
                self._trackers.remove(tracker)
                _warn(f"{tracker.name} failed and is left out until the run is started again; log.jsonl has everything ({_said(error)})")


def scalars(kind: str, values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Names and values of an event's numbers; those of a range of noise are named after it."""
    for key, value in values.items():
        if isinstance(value, (int, float)):
            yield f"{kind}/{key}", value
    for part in values.get("bins", ()):
        yield f"{kind}_sigma/{part['sigma_lo']:.3g}_to_{part['sigma_hi']:.3g}", part["loss"]


def refuse_missing_trackers(names: Sequence[str]) -> None:
    """Raises ValueError, which says how to install it, for a tracker that is not installed."""
    missing = [name for name in names if not INSTALLED[name]()]
    if missing:
        raise ValueError(
            f"training.trackers={list(names)}: not installed: {', '.join(missing)}. pip install {' '.join(missing)}, or leave it out"
        )


def open_trackers(config: RunConfig, images_seen: int) -> Trackers:
    """The trackers that a config names, opened for a run that goes on from `images_seen`; for the main process.

    Raises ValueError for one that cannot be opened when the run begins. When it goes on, that is only said: nobody may be watching.
    """
    run, opened = Path(config.output), []
    for name in config.training.trackers:
        tracker = TensorBoard(run, images_seen) if name == "tensorboard" else WandB(run)
        try:
            tracker.start()
            tracker.store_init_configuration(to_plain(config))
        except Exception as error:
            if not images_seen:
                raise ValueError(f"training.trackers: {name} cannot be opened: {_said(error)}") from error
            _warn(f"{name} cannot be opened; the run goes on without it ({_said(error)})")
        else:
            opened.append(tracker)
    return Trackers(opened)


def _said(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _warn(message: str) -> None:
    tqdm.write(f"warning: {message}", file=sys.stderr)
