"""Early detection of a run that diverges while its loss is still finite."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


class TrainingDiverged(RuntimeError):
    """The loss or the gradient is not finite any more, or the loss has risen far above where it was."""


class LossWatch:
    """Watches the mean losses of the reports: two in a row above `factor` times the lowest so far are a divergence; 0 watches nothing."""

    def __init__(self, factor: float, state: Mapping[str, Any] | None = None) -> None:
        """state: that of an earlier watch, to go on from."""
        self.factor = factor
        self.lowest = math.inf
        self._high = 0
        if state is not None and state["lowest"] is not None:
            self.lowest, self._high = state["lowest"], state["high"]

    @property
    def suspicious(self) -> bool:
        """Whether the last loss was too high: what the weights are now should not be kept."""
        return self._high > 0

    @property
    def state(self) -> dict[str, Any]:
        """What has been seen, as plain values."""
        return {"lowest": self.lowest if math.isfinite(self.lowest) else None, "high": self._high}

    def see(self, loss: float) -> None:
        """Takes the loss of a report. Raises TrainingDiverged at the second in a row that is too high."""
        self._high = self._high + 1 if self.factor and loss > self.factor * self.lowest else 0
        self.lowest = min(self.lowest, loss)
        if self._high > 1:
            raise TrainingDiverged(
                f"the loss rose to {loss:.4g}, more than training.divergence_factor={self.factor:g} times its lowest ({self.lowest:.4g})"
            )
