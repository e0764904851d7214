"""When a run stops before its end: SIGTERM, Ctrl-C or the clock on any process, and all processes stop after the same step."""

from __future__ import annotations

import math
import signal
import threading
import time
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from t2i_experts.training.processes import SAVING_MAY_TAKE


class StopRequest:
    """Collects requests to stop while it is entered, and brings the processes together before each step.

    None begins a step, in which it would wait for the others without hearing anything, before all have its data; one that has to wait for
    data says so every second, so that all hear within a second or two that any has been told to stop. They agree over the CPU's network
    and wait for no device. A second Ctrl-C interrupts at once. Signals are only watched where Python delivers them, in the main thread.
    """

    def __init__(self, max_minutes: float = 0.0) -> None:
        """max_minutes: of wall time from now on; 0 for no limit."""
        self.signal: signal.Signals | None = None
        self._deadline = time.monotonic() + 60 * max_minutes if max_minutes else math.inf
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self._group: Any = dist.new_group(backend="gloo", timeout=SAVING_MAY_TAKE) if several else None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        if self.signal is signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def give_up(self) -> bool:
        """To be asked every second or so by a process that waits for the data of its next step: whether the run stops before that step."""
        return self._agree(ready=False)[1]

    def before_step(self) -> tuple[bool, bool]:
        """Waits until all processes have the data of their next step, as this one has, or one of them is told to stop.

        Returns, the same on all of them, whether they make the step and whether they stop after it (or without it).
        """
        ready = told = False
        while not (ready or told):
            ready, told = self._agree(ready=True)
        return ready, told

    def _agree(self, *, ready: bool) -> tuple[bool, bool]:
        """Whether all processes are ready, and whether any has been told to stop. All call it equally often."""
        told = self.signal is not None or time.monotonic() > self._deadline
        either = torch.tensor([not ready, told], dtype=torch.int32)
        if self._group is not None:
            dist.all_reduce(either, dist.ReduceOp.MAX, group=self._group)
        return not either[0], bool(either[1])
