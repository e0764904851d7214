"""What other processes do with the nodes of a tree, as one that grows it too can tell: on a disk that may show things late."""

from __future__ import annotations

import math
import time

from t2i_experts.training.checkpoints import lock_owner
from t2i_experts.training.claims import last_touched
from t2i_experts.training.nodes import NodeStatus, claim_file

SHOWN_WITHIN = 60.0
"""Seconds after which a host sees what another one has written; NFS keeps what it knows of a folder for so long."""


class Elsewhere:
    """Remembers what has been seen of the others."""

    def __init__(self) -> None:
        self._seen: dict[str, float] = {}  # when nodes were last seen at work, by the monotonic clock
        self._first_touched: dict[tuple[str, str], float | None] = {}

    def at_work(self, status: NodeStatus) -> bool:
        """Whether a node is trained by another process, or was until a moment ago: what came of it may not be seen yet."""
        if status.claim is not None or lock_owner(status.run.output) is not None:
            self._seen[status.name] = time.monotonic()
        elif status.failure is not None:
            return False
        return time.monotonic() - self._seen.get(status.name, -math.inf) < SHOWN_WITHIN

    def silent(self, status: NodeStatus) -> bool:
        """Whether a node is claimed by a process that cannot be looked at, and that has given no sign of life since this was asked first.

        It may have ended with its host: then the claim goes stale, and can be taken over.
        """
        if status.claim is None or status.claim.here:
            return False
        touched = last_touched(claim_file(status.run))
        return self._first_touched.setdefault((status.name, status.claim.token), touched) == touched
