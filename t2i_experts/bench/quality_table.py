"""The rows of `bench quality`: one for each run, and one of means for each candidate, compared with the first."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from t2i_experts.bench.result import Row
from t2i_experts.bench.timing import Timing
from t2i_experts.bench.trainings import Candidate, Failed, Outcome, Run, Trained


def run_row(run: Run, outcome: Outcome) -> Row:
    """A run's own figures, or why it failed."""
    if isinstance(outcome, Failed):
        return Row(run.name, None, more={"process s": outcome.seconds, "failed": outcome.why})
    steps = outcome.steps
    more = {
        "GFLOP": run.candidate.flops / 1e9,
        "images/s": steps.images_per_second,
        "images seen": steps.images,
        "data wait": steps.data_wait,
        "held-out loss": outcome.loss,
        "standard error": outcome.standard_error,
        "process s": outcome.seconds,
    }
    return Row(run.name, Timing((steps.seconds,)), more=more)


def mean_rows(candidates: Sequence[Candidate], found: Mapping[Run, Outcome]) -> list[Row]:
    """Of all runs but trials that came to a loss. Beside those of the first candidate: the ratio of images/s, the difference of the losses,
    and this over the spread between seeds."""
    rows: list[Row] = []
    first: tuple[Row, list[float]] | None = None
    for candidate in candidates:
        trained = {run: o for run, o in found.items() if run.candidate is candidate and run.seed and isinstance(o, Trained)}
        if not trained:
            continue
        losses, steps = [outcome.loss for outcome in trained.values()], [outcome.steps for outcome in trained.values()]
        rate = next(run.rate for run in trained)
        more: dict[str, Any] = {
            "images/s": statistics.mean(one.images_per_second for one in steps),
            "images seen": round(statistics.mean(one.images for one in steps)),
            "held-out loss": statistics.mean(losses),
        }
        ratio = None
        if len(losses) > 1:
            more["seeds +-"] = statistics.stdev(losses)
        if first is not None:
            baseline, others = first
            ratio = more["images/s"] / baseline.more["images/s"]
            more["difference"] = more["held-out loss"] - baseline.more["held-out loss"]
            spread = _spread(losses, others)
            if spread:
                more["over spread"] = more["difference"] / spread
        if len(candidate.rates) > 1 and rate in (min(candidate.rates), max(candidate.rates)):
            more["rate"] = "lowest tried" if rate == min(candidate.rates) else "highest tried"
        rows.append(
            Row(f"{candidate.name}, rate {rate}, mean of {len(losses)}", Timing(tuple(one.seconds for one in steps)), ratio, more=more)
        )
        if candidate is candidates[0]:
            first = rows[-1], losses
    return rows


def _spread(*samples: Sequence[float]) -> float:
    """The root of the mean of the samples' variances; 0 if one has a single value."""
    if any(len(sample) < 2 for sample in samples):
        return 0.0
    return statistics.mean(statistics.variance(sample) for sample in samples) ** 0.5
