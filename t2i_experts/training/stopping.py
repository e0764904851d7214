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
from torch import Tensor

from t2i_experts.training.processes import SAVING_MAY_TAKE


class StopRequest:
    """Collects requests to stop while it is entered; each step is framed by `ask` and `agreed`.

    The processes agree over the CPU's network while the step computes, so that none waits for its device. A second Ctrl-C interrupts at
    once. Signals are only watched where Python delivers them, in the main thread.
    """

    def __init__(self, max_minutes: float = 0.0) -> None:
        """max_minutes: of wall time from now on; 0 for no limit."""
        self.signal: signal.Signals | None = None
        self._deadline = time.monotonic() + 60 * max_minutes if max_minutes else math.inf
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self._group: Any = dist.new_group(backend="gloo", timeout=SAVING_MAY_TAKE) if several else None
        self._asked: tuple[Tensor, Any] | None = None
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

    def ask(self) -> None:
        """Begins to ask all processes whether any has been told to stop. Every process must call it equally often."""
        wanted = torch.tensor(int(self.signal is not None or time.monotonic() > self._deadline))
        work = dist.all_reduce(wanted, dist.ReduceOp.MAX, group=self._group, async_op=True) if self._group is not None else None
        self._asked = wanted, work

    def agreed(self) -> bool:
        """The answer to the last `ask`, the same on all processes."""
        assert self._asked is not None
        wanted, work = self._asked
        if work is not None:
            work.wait()
        return bool(wanted)
