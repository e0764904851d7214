"""What a run tells: a line of JSON for each event in RUN/log.jsonl, and a progress bar with images per second and the end time."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm


class RunLog:
    """The log of a run. Only the main process writes; on the others every call does nothing.

    A run that goes on from `images_seen` first takes back the lines of steps that it will repeat.
    """

    def __init__(self, path: Path, *, images_seen: int, total_images: int, writes: bool, progress: bool) -> None:
        self.path = path
        self.writes = writes
        self._bar: tqdm[Any] | None = None
        if not writes:
            return
        if path.exists():
            kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _images_seen(line) <= images_seen]
            temporary = path.with_name(f".{path.name}.tmp")
            temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
            temporary.replace(path)
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
            file.write(json.dumps(_finite(record), ensure_ascii=False) + "\n")

    def events(self, kind: str) -> list[dict[str, Any]]:
        """The events of a kind so far, of this run and what it goes on from; none on processes that do not write."""
        if not self.writes or not self.path.exists():
            return []
        found = (json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines())
        return [event for event in found if event["event"] == kind]

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
        """Ends the progress bar."""
        if self._bar is not None:
            self._bar.close()


def _images_seen(line: str) -> float:
    """Of a log line; infinity for a line that a kill cut short."""
    try:
        return float(json.loads(line)["images_seen"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
