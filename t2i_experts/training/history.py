"""What the folder of a run tells of it: curves over images seen, how its time was spent, where it stands. See `tracking` for the events."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from t2i_experts.config import RunConfig, load_config
from t2i_experts.training.checkpoints import checkpoints

Curve = list[tuple[float, float]]


@dataclass(frozen=True)
class TimeSpent:
    """Seconds of wall time over all starts of a run: in training steps, of these waiting for data, and in all else.

    All else is what comes between two reports of training: the first batch's workers, validation, previews, checkpoints.
    """

    steps: float
    data_wait: float
    rest: float

    @property
    def total(self) -> float:
        """Seconds from each start to the last line before the next one."""
        return self.steps + self.rest


@dataclass(frozen=True)
class History:
    """The events of a run in the order of the file."""

    events: Sequence[Mapping[str, Any]]

    def of(self, kind: str) -> list[Mapping[str, Any]]:
        """The events of one kind."""
        return [event for event in self.events if event["event"] == kind]

    def curve(self, kind: str, key: str) -> Curve:
        """(images seen, value) of each event of a kind that has a finite number under `key`."""
        return [(event["images_seen"], event[key]) for event in self.of(kind) if isinstance(event.get(key), (int, float))]

    @property
    def images_seen(self) -> int:
        """Where the run stands, as far as it has told."""
        return next(event["images_seen"] for event in reversed(self.events) if event["event"] != "diverged")

    @property
    def resumptions(self) -> list[Mapping[str, Any]]:
        """Every start but the first."""
        return self.of("start")[1:]

    @property
    def images_per_second(self) -> float | None:
        """The median of the last ten reports."""
        recent = self.curve("train", "images_per_second")[-10:]
        return median(rate for _, rate in recent) if recent else None

    def time_spent(self) -> TimeSpent:
        """How the wall time was spent, from the times of the events and the rates that they report."""
        total = steps = data_wait = 0.0
        before: Mapping[str, Any] | None = None
        seen = 0
        for event in self.events:
            if before is not None and event["event"] != "start":
                total += max(event["time"] - before["time"], 0.0)
            if event["event"] == "train" and event.get("images_per_second"):
                seconds = (event["images_seen"] - seen) / event["images_per_second"]
                steps += seconds
                data_wait += seconds * (event.get("data_wait") or 0.0)
            if event["event"] in ("start", "train", "rollback"):
                seen = event["images_seen"]
            before = event
        return TimeSpent(steps, data_wait, max(total - steps, 0.0))


def read_events(log: Path) -> list[dict[str, Any]]:
    """The events of a log.jsonl in the order of the file; none if there is none. A line that is being written, or that a kill cut short,
    is left out."""
    events = []
    for line in log.read_bytes().splitlines() if log.is_file() else ():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and {"event", "images_seen", "time"} <= event.keys():
            events.append(event)
    return events


def read_history(run: Path) -> History:
    """Raises ValueError if `run` is not the folder of a run that has begun."""
    path = run / "log.jsonl"
    if not path.is_file():
        raise ValueError(f"RUN={str(run)!r} has no log.jsonl; name the output folder of a training run")
    events = read_events(path)
    if not any(event["event"] != "diverged" for event in events):
        raise ValueError(f"{path} tells nothing yet")
    return History(events)


def smoothed(curve: Curve, points: int = 500) -> Curve:
    """About `points` of a curve's points, each the median of its neighbourhood of a twentieth of the curve: no lag, and no spikes.

    The neighbourhood is smaller where the curve begins; the last value is the median over the last fortieth (at least three values).
    """
    reach = max(len(curve) // 40, 2)
    values = np.array([y for _, y in curve])
    shown = sorted({*range(0, len(curve), len(curve) // points + 1), len(curve) - 1}) if curve else []
    return [(curve[i][0], float(np.median(values[i - min(reach, i) : i + min(reach, i) + 1]))) for i in shown]


@dataclass(frozen=True)
class Run:
    """What a run's folder holds."""

    root: Path
    config: RunConfig
    history: History
    previews: Sequence[Path]
    checkpoints: Sequence[Path]

    @classmethod
    def read(cls, root: Path) -> Run:
        """Raises ValueError if `root` is not the folder of a run that has begun, or if its config is not one of this version's."""
        history = read_history(root)
        return cls(root, load_config(root / "config.yaml"), history, sorted(root.glob("previews/[0-9]*.png")), checkpoints(root))


def facts(run: Run) -> dict[str, Any]:
    """The newest numbers of a run as plain values; None for what its log does not hold."""
    history, total = run.history, run.config.training.images
    loss, held_out = smoothed(history.curve("train", "loss")), history.curve("validation", "loss")
    rate, left = history.images_per_second, max(total - history.images_seen, 0)
    memory = history.curve("train", "peak_memory_gib")
    return {
        "run": str(run.root),
        "images_seen": history.images_seen,
        "total_images": total,
        "loss": loss[-1][1] if loss else None,
        "validation_loss": held_out[-1][1] if held_out else None,
        "images_per_second": rate,
        "seconds_spent": history.time_spent().total,
        "seconds_left": left / rate if rate else None,
        "peak_memory_gib": max(value for _, value in memory) if memory else None,
        "resumptions": len(history.resumptions),
        "divergences": len(history.of("diverged")),
    }


def comparable_validations(history: History) -> list[Mapping[str, Any]]:
    """The validations on as many images and in the same ranges of noise as the newest, oldest first."""

    def measure(event: Mapping[str, Any]) -> object:
        return event.get("images"), [range_of(part) for part in event["bins"]]

    validations = [event for event in history.of("validation") if event.get("bins")]
    return [event for event in validations if measure(event) == measure(validations[-1])]


def range_of(part: Mapping[str, Any]) -> str:
    """A bin's range of sigma in words; None stands for infinity, which JSON does not have."""
    if part["sigma_hi"] is None:
        return f"above {part['sigma_lo']:.3g}"
    return f"{part['sigma_lo']:.3g} to {part['sigma_hi']:.3g}"
