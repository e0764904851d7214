"""What a terminal shows of the nodes of a tree while they are trained: a line for each."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Collection
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from t2i_experts.training.nodes import NodeStatus

_REDRAW_EVERY = 1.0
_LINES_EVERY = 30.0
"""Seconds, on a terminal and elsewhere: a log file wants a line now and then."""


class GrowthDisplay:
    """Lines on stderr: those that `tell` something stay, those that `show` progress are drawn over where that is a terminal."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._drawn = 0
        self._next = time.monotonic() + (0 if self._terminal else _LINES_EVERY)

    def tell(self, text: str) -> None:
        """A line that stays."""
        self._erase()
        print(text, file=sys.stderr, flush=True)

    def show(self, nodes: Collection[NodeStatus]) -> None:
        """How far the nodes that are being trained have come, if it is time to say so."""
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + (_REDRAW_EVERY if self._terminal else _LINES_EVERY)
        lines = [_progress(node) for node in nodes]
        self._erase()
        width = shutil.get_terminal_size().columns
        for line in lines:
            print(line[: width - 1] if self._terminal else line, file=sys.stderr, flush=True)
        self._drawn = len(lines) if self._terminal else 0

    def close(self) -> None:
        """Takes the progress away."""
        self._erase()

    def _erase(self) -> None:
        if self._drawn:
            print(f"\x1b[{self._drawn}A\x1b[J", end="", file=sys.stderr, flush=True)
        self._drawn = 0


def _progress(node: NodeStatus) -> str:
    """`E^1_0: 1,200 of 8,000 images (15 %), 34.1 images/s, ends 14:05`, as far as the run's log tells."""
    from t2i_experts.training.nodes import told_by_log

    told, total = told_by_log(node.run), node.run.node.images
    seen, rate = max(told["images_seen"] or 0, node.images_seen), told["images_per_second"]
    text = f"{node.name}: {seen:,} of {total:,} images ({100 * seen // total} %)"
    if rate and told["images_seen"]:
        left = timedelta(seconds=max(total - seen, 0) / rate)
        end = datetime.now() + left
        text += f", {rate:,.1f} images/s, ends {end:%H:%M}" + (f" on {end:%Y-%m-%d}" if left > timedelta(hours=20) else "")
    return text
