"""What a run is and how it goes, on one page: RUN/report.md with charts in RUN/report, from what lies in the run's folder.

It reads log.jsonl, config.yaml, previews/, checkpoints/ and model/ and nothing else, so it can be written at any time, also while the run
is at work and for one that ended long ago.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from t2i_experts.cascade.picture import save_png
from t2i_experts.charts import Chart, Marks, Series, compact, draw_chart, draw_grid, palette
from t2i_experts.training.history import Curve, History, Run, comparable_validations, facts, range_of, smoothed
from t2i_experts.training.preview import read_preview
from t2i_experts.training.report_page import page

RAW, SMOOTH, HELD_OUT, BAD, PAUSE = "#b5cfe8", "#1f5fa8", "#d1662b", "#c0202a", "#9a9a9a"
IMAGES = "images seen"
SHOWN_PREVIEWS = 8


def write_report(root: Path, out: Path | None = None) -> dict[str, Any]:
    """Writes report.md and report/*.png into `out`, by default the run's own folder. Returns `facts`, and the page's path.

    Raises ValueError if `root` is not the folder of a run that has begun, or if `out` cannot be a folder.
    """
    run, out = Run.read(root), out or root
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out {str(out)!r} cannot be a folder: {error}") from error
    drawn: dict[str, str] = {}
    for name, chart in _charts(run):
        save_png(draw_chart(chart), out / "report" / f"{name}.png")
        drawn[name] = chart.title
    prompts, sheets = _previews(run)
    if sheets:
        rows = [[pictures[i] for _, pictures in sheets] for i in range(len(prompts))]
        labels = [f"{i + 1}. {prompt}" for i, prompt in enumerate(prompts)]
        save_png(draw_grid(rows, labels, [compact(seen) for seen, _ in sheets]), out / "report" / "previews.png")
        drawn["previews"] = "The same prompts from the same noise, over time"
    temporary = out / ".report.md.tmp"
    temporary.write_text(page(run, drawn, prompts), encoding="utf-8")
    temporary.replace(out / "report.md")
    return {**facts(run), "report": str(out / "report.md")}


def _charts(run: Run) -> Iterator[tuple[str, Chart]]:
    """(name, chart) of every curve of which the log holds a point."""
    history = run.history
    marks = (
        Marks("resumed", [event["images_seen"] for event in history.resumptions], PAUSE),
        Marks("diverged", [event["images_seen"] for event in history.of("diverged")], BAD),
    )
    loss, held_out = history.curve("train", "loss"), history.curve("validation", "loss")
    lines = [Series("training, as logged", loss, RAW, 1.5), Series("training, smoothed", smoothed(loss), SMOOTH, 2.5)] if loss else []
    lines += [Series("validation", held_out, HELD_OUT, dots=True)] if held_out else []
    if lines:
        yield "loss", Chart("Loss", IMAGES, "EDM's weighted loss, logarithmic", lines, marks, log=True)
    ranges = list(_noise_ranges(history))
    if ranges:
        lines = [Series(label, points, colour, dots=True) for (label, points), colour in zip(ranges, palette(len(ranges)), strict=True)]
        yield "noise", Chart("Validation loss by range of noise (sigma)", IMAGES, "EDM's weighted loss, logarithmic", lines, log=True)
    for name, key, title, unit, scale, log in (
        ("gradient", "grad_norm", "Gradient norm", "before clipping, mean over the steps of a report, logarithmic", 1, True),
        ("learning_rate", "learning_rate", "Learning rate", "of the last step before each report", 1, False),
        ("throughput", "images_per_second", "Throughput", "images per second, without validation, previews and checkpoints", 1, False),
        ("data_wait", "data_wait", "Waiting for data", "% of the time of training steps", 100, False),
        ("memory", "peak_memory_gib", "Peak GPU memory of the main process", "GiB, highest since the report before", 1, False),
    ):
        curve = [(x, scale * y) for x, y in history.curve("train", key)]
        if any(y > 0 for _, y in curve) or (curve and not log):
            lines = [Series("as logged", curve, SMOOTH)]
            if name not in ("learning_rate", "memory"):
                lines = [Series("as logged", curve, RAW, 1.5), Series("smoothed", smoothed(curve), SMOOTH, 2.5)]
            yield name, Chart(title, IMAGES, unit, lines, marks, log=log)


def _noise_ranges(history: History) -> Iterator[tuple[str, Curve]]:
    """(label, points) of each range of the newest validation, over all validations with the same ranges."""
    validations = comparable_validations(history)
    for b, newest in enumerate(validations[-1]["bins"] if validations else ()):
        points = [(event["images_seen"], event["bins"][b]["loss"]) for event in validations if event["bins"][b]["loss"] is not None]
        yield range_of(newest), points


def _previews(run: Run) -> tuple[list[str], list[tuple[int, list[Any]]]]:
    """The prompts of the newest preview, and (images seen, pictures) of `SHOWN_PREVIEWS` of all previews, if they have these prompts."""
    last = len(run.previews) - 1
    sheets = []
    for i in sorted({round(k * last / (SHOWN_PREVIEWS - 1)) for k in range(SHOWN_PREVIEWS)}) if run.previews else ():
        try:
            sheets.append((int(run.previews[i].stem), read_preview(run.previews[i])))
        except (OSError, ValueError):  # not one of ours
            continue
    prompts = [prompt for prompt, _ in sheets[-1][1]] if sheets else []
    return prompts, [(seen, [picture for _, picture in pairs]) for seen, pairs in sheets if [prompt for prompt, _ in pairs] == prompts]
