"""Bad data in a run: each unreadable sample is named once, and the run ends only when too much cannot be read."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from t2i_experts.shards.reader import Unreadable
from t2i_experts.training.tracking import RunLog

_WARNINGS = 5
_AT_LEAST_DRAWS = 1000


class UnreadableSamples:
    """What all processes came upon and could not read. Each sample is one event of the log, and the first few are warnings on stderr."""

    def __init__(self, accelerator: Accelerator, log: RunLog, *, images_seen: int, max_share: float) -> None:
        """images_seen: where this run begins or goes on; what the log has named by then is not named again.

        max_share: of the samples drawn from now on (and of a thousand at least), so many may be unreadable.
        """
        self.drawn = 0  # unreadable draws of all processes, of which several may fall on one sample
        self._accelerator = accelerator
        self._log = log
        self._begin = images_seen
        self._max_share = max_share
        self._named = {(event["shard"], event["key"]) for event in log.events("unreadable")}
        self._warned = self._largest = 0  # the largest: the most draws that one finding stood for
        self._waiting: list[Unreadable] = []
        self._waiting_draws = 0

    def note(self, found: Sequence[Unreadable], *, drawn: bool) -> None:
        """Keeps what this process found until `tell`. drawn: for training, which counts for the share, and not for validation."""
        self._waiting.extend(found)
        self._waiting_draws += sum(what.draws for what in found) * drawn

    def rewind(self, images_seen: int) -> None:
        """The run goes back to `images_seen`: from there on its draws are counted anew."""
        self._begin, self.drawn = images_seen, 0

    def tell(self, images_seen: int) -> None:
        """Names what is new in the log; all processes call it together. Raises ValueError, on all of them, if too much is unreadable."""
        counts = torch.tensor([len(self._waiting), self._waiting_draws], device=self._accelerator.device)
        waiting, drawn = self._accelerator.reduce(counts, "sum").tolist()
        if not waiting:
            return
        everyone: list[Unreadable] = gather_object(self._waiting)
        self._waiting, self._waiting_draws = [], 0
        self.drawn += drawn
        self._largest = max(self._largest, *(what.draws for what in everyone))
        for what in everyone:
            if (what.shard, what.key) not in self._named:
                self._named.add((what.shard, what.key))
                self._log.event("unreadable", images_seen, shard=what.shard, key=what.key, why=what.why)
                self._warn(what)
        draws = images_seen - self._begin + self.drawn
        two_tars = 2 * self._largest / self._max_share if self._max_share else 0  # one alone, early in a run, is not too much
        if self.drawn > self._max_share * max(draws, _AT_LEAST_DRAWS, two_tars):
            raise ValueError(
                f"{self.drawn:,} of {draws:,} samples drawn in this run could not be read, which is more than "
                f"data.max_unreadable={self._max_share} allows. {self._log.path} names them; "
                "repair the shards, or allow more, and the same command goes on from the last checkpoint"
            )

    def _warn(self, what: Unreadable) -> None:
        self._warned += 1
        if self._warned <= _WARNINGS:
            where = what.shard if what.key is None else f"{what.shard}: sample {what.key!r}"
            self._log.warn(f"warning: {where} cannot be read and is replaced or left out: {what.why}")
        if self._warned == _WARNINGS:
            self._log.warn(f"warning: any further unreadable samples are named in {self._log.path} alone")
