"""What a run tells: a line of JSON for each event in RUN/log.jsonl, a progress bar with images per second and the end time, and, out of
these, the page of `report` and what `trackers` pass on.

    start       processes, device, device_name, versions, parameters, samples (or tars, of shards behind URLs), buckets (samples of each,
                if there are any)
    initial     model, fingerprint (of the weights that the run began with, if they were not fresh)
    train       loss, grad_norm, learning_rate, images_per_second, data_wait (share of the time of steps), peak_memory_gib,
                unreadable_draws
    validation  loss, standard_error, images, bins (sigma_lo, sigma_hi, loss, standard_error)
    diverged    keys
    rollback    diverged_at (images), reason, rate_scale
    unreadable  shard, key (null for a whole tar), why
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from t2i_experts import __version__
from t2i_experts.training.history import read_events
from t2i_experts.training.preview import read_preview
from t2i_experts.training.report import write_report
from t2i_experts.training.trackers import Trackers

LASTING = ("start", "diverged", "rollback", "unreadable")
"""Events that stay in the log of a run that goes on from before them: what happened, happened."""


class RunLog:
    """The log of a run. Only the main process writes; on the others every call does nothing.

    A run that goes on from `images_seen` first takes back the lines of steps that it will repeat.
    """

    def __init__(
        self, path: Path, *, images_seen: int, total_images: int, writes: bool, progress: bool, trackers: Trackers | None = None
    ) -> None:
        self.path = path
        self.writes = writes
        self._trackers = trackers or Trackers([])
        self._bar: tqdm[Any] | None = None
        if not writes:
            return
        self.rewind(images_seen)
        if progress:
            self._bar = tqdm(
                total=total_images,
                initial=images_seen,
                unit="img",
                unit_scale=True,
                file=sys.stderr,
                dynamic_ncols=True,
                smoothing=0.1,
                mininterval=0.1 if sys.stderr.isatty() else 30,  # a log file wants a line now and then
            )

    def event(self, kind: str, images_seen: int, **values: Any) -> None:
        """Appends {"event": kind, "images_seen": ..., "time": unix seconds, ...values}; numbers that are not finite become null."""
        if not self.writes:
            return
        record = {"event": kind, "images_seen": images_seen, "time": round(time.time(), 3), **values}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_line(_finite(record)))
        self._trackers.event(kind, images_seen, values)

    def preview(self, images_seen: int, path: Path) -> None:
        """Passes the pictures of a preview on to the trackers."""
        if self.writes and self._trackers:
            self._trackers.pictures(images_seen, read_preview(path))

    def report(self) -> None:
        """Writes RUN/report.md anew. Whatever is wrong with it is said and does not end the run."""
        if not self.writes:
            return
        try:
            write_report(self.path.parent)
        except Exception as error:
            tqdm.write(f"warning: {self.path.with_name('report.md')} was not written: {error}", file=sys.stderr)

    def rewind(self, images_seen: int) -> None:
        """Takes back the lines of later steps, which will be repeated, and the progress bar with them."""
        if not self.writes:
            return
        if self.path.exists():
            kept = [event for event in read_events(self.path) if event["images_seen"] <= images_seen or event["event"] in LASTING]
            temporary = self.path.with_name(f".{self.path.name}.tmp")
            temporary.write_text("".join(map(_line, kept)), encoding="utf-8")
            temporary.replace(self.path)
        if self._bar is not None:
            self._bar.update(images_seen - self._bar.n)

    def events(self, kind: str) -> list[dict[str, Any]]:
        """The events of a kind so far, of this run and what it goes on from; none on processes that do not write."""
        return [event for event in read_events(self.path) if event["event"] == kind] if self.writes else []

    def warn(self, message: str) -> None:
        """A line on stderr, above the progress bar if there is one."""
        if self.writes:
            tqdm.write(message, file=sys.stderr)

    def advance(self, images: int, loss: float | None = None) -> None:
        """Moves the progress bar by `images`."""
        if self._bar is not None:
            if loss is not None:
                self._bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
            self._bar.update(images)

    def close(self) -> None:
        """Ends the progress bar, writes the report and ends the trackers."""
        if self._bar is not None:
            self._bar.close()
        self.report()
        self._trackers.close()


def machine(device: torch.device) -> dict[str, Any]:
    """On what and with what a run works."""
    name = {"device_name": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}
    return {"device": str(device), **name, "versions": {"t2i_experts": __version__, "torch": torch.__version__}}


def peak_memory_gib(device: torch.device) -> float | None:
    """The most that this process's tensors have occupied since the last call; None on devices that do not count it."""
    if device.type != "cuda":
        return None
    peak = torch.cuda.max_memory_allocated(device) / 2**30
    torch.cuda.reset_peak_memory_stats(device)
    return round(peak, 3)


def _line(event: Mapping[str, Any]) -> str:
    return json.dumps(event, ensure_ascii=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
