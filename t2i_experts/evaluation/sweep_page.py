"""What a sweep tells a reader: a page in Markdown, and the curve. Both come out of the record alone."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from t2i_experts.cascade.picture import save_png
from t2i_experts.charts import Chart, Series, draw_chart, palette
from t2i_experts.evaluation.sweep import metrics_of

PAGE, CURVE = "sweep.md", "curve.png"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#a0428f", "#8a6d00", "#444444")
DASHES = ((), (8, 4), (2, 4), (12, 3, 2, 3))
_SIZE = (960, 720)

Record = Mapping[str, Any]


def write_page(out: Path, record: Record) -> None:
    """Writes `sweep.md` and `curve.png`. Raises ValueError if that is not possible."""
    try:
        (out / PAGE).write_text(markdown(record), encoding="utf-8")
        save_png(draw_chart(curve(record), *_SIZE), out / CURVE)
    except OSError as error:
        raise ValueError(f"--out={out}: {error.strerror or error}") from error


def columns(record: Record) -> dict[str, Callable[[Record], str]]:
    """The columns of a table of points by their heads: of a point, what stands there; empty where it has no such number."""
    points = record["points"]

    def number(form: str, *keys: str) -> Callable[[Record], str]:
        def shown(point: Record) -> str:
            value: Any = point
            for key in keys:
                value = None if value is None else value.get(key)
            return "" if value is None else form.format(value)

        return shown

    found: dict[str, Callable[[Record], str]] = {
        "sampler": number("{}", "sampling", "sampler"),
        "steps": number("{}", "sampling", "steps"),
        "guidance": number("{:g}", "sampling", "guidance"),
    }
    if any("distance" in point for point in points):
        found[distance_name(record)] = number("{:.2f}", "distance")
    if any("infinity" in point for point in points):
        found |= {"of infinitely many": number("{:.2f}", "infinity", "value"), "+- of it": number("{:.2f}", "infinity", "error")}
    if any("kid" in point for point in points):
        found |= {"KID": number("{:.5f}", "kid", "mean"), "+- of KID": number("{:.5f}", "kid", "spread")}
    if any("precision_recall" in point for point in points):
        found |= {name: number("{:.3f}", "precision_recall", name) for name in ("precision", "recall")}
    for name in metrics_of(points):
        found |= {metric_name(record, name): number("{:.2f}", "scores", name, "mean")}
        found |= {f"+- of {name}": number("{:.2f}", "scores", name, "error")}
    return {**found, "s a picture": number("{:.3g}", "seconds_a_picture")}


def markdown(record: Record) -> str:
    """The page: what all points share, the best of each line of the curve, and all points; the best numbers in bold."""
    return "\n".join(
        [
            "# Sweep over guidance",
            "",
            *(f"- {line}" for line in about(record)),
            "",
            f"![{curve(record).title}]({CURVE})",
            "",
            "## The best of each model, sampler and number of steps",
            "",
            *_best_table(record),
            "",
            "## All points",
            "",
            *_points_table(record),
            "",
            "Lower distances and higher scores are better. +- is the standard error of a score's mean over pictures; of KID, the spread of "
            "its subsets. Seconds are those of a process, from the noise to all numbers of a picture. A guidance that was chosen here was "
            "chosen with these prompts.",
            "",
        ]
    )


def _best_table(record: Record) -> list[str]:
    """A row for each line of the curve."""
    best, rows = _best(record), []
    for (model, sampler, steps), line in _lines(record["points"]).items():
        row = [model, sampler, str(steps)]
        for metric, place in best.values():
            having = [point for point in line if _value(point, metric) is not None]
            top = min(having, key=functools.partial(_order, metric=metric)) if having else None
            row.append("" if top is None else _bold(f"{_value(top, metric):.2f}", _is_best(top, place)))
            row.append("" if top is None else f"{top['sampling']['guidance']:g}")
        rows.append([*row, f"{sum(point['seconds_a_picture'] for point in line) / len(line):.3g}"])
    found = [cell for name in best for cell in (f"best {name}", "at guidance")]
    return _table(["model", "sampler", "steps", *found, "s a picture"], rows)


def _points_table(record: Record) -> list[str]:
    """A row for each point."""
    best, shown, rows = _best(record), columns(record), []
    for point in record["points"]:
        cells = (_bold(cell(point), name in best and _is_best(point, best[name][1])) for name, cell in shown.items())
        rows.append([point["model"], *cells])
    return _table(["model", *shown], rows)


def _best(record: Record) -> dict[str, tuple[str | None, Record]]:
    """By what they are called: the metrics, None for the distance, and where each is best."""
    best = record["best"]
    found: dict[str, tuple[str | None, Record]] = {distance_name(record): (None, best["distance"])} if "distance" in best else {}
    return found | {metric_name(record, metric): (metric, place) for metric, place in best["scores"].items()}


def about(record: Record) -> list[str]:
    """What all points share, in some lines."""
    prompts, reference, made, decided = record["prompts"], record["reference"], record["features"], record["decided_by"]
    lines = [f"n = {prompts['count']:,} prompts of {prompts['path']} (hash {prompts['sha256'][:16]}), seed {decided['seed']}"]
    if reference is not None:
        count = "" if reference["count"] is None else f"{reference['count']:,} pictures of "
        which = f" ({reference['which']})" if "which" in reference else ""
        lines.append(f"{distance_name(record)} to {count}{reference['path']}{which}, {_made(made)}")
        if prompts["count"] <= made["dimension"]:
            lines.append(f"with few pictures it is far too large: {prompts['count']:,} for {made['dimension']:,} dimensions")
    lines += [f"{metric_name(record, name)}, {_made(metric)}" for name, metric in decided["metrics"].items()]
    lines.append(f"seen at {decided['resolution']} px, drawn in {decided['dtype']} on {decided['device']}")
    return lines


def curve(record: Record) -> Chart:
    """The distance over the first score, or the only one of both over guidance: a line for each model, sampler and number of steps."""
    points = record["points"]
    metrics, distances = metrics_of(points), any("distance" in point for point in points)
    lines = _lines(points)
    vary = [len({line[i] for line in lines}) > 1 for i in range(3)]
    same = [_part(i, next(iter(lines))[i]) for i in range(3) if not vary[i]]
    styles = _styles(list(lines))
    y_metric = None if distances else metrics[0]
    x_metric = metrics[0] if distances and metrics else None
    series = []
    for line, found in lines.items():
        label = ", ".join(_part(i, line[i]) for i in range(3) if vary[i]) or line[0]
        places = [
            (
                point["sampling"]["guidance"] if x_metric is None else _value(point, x_metric),
                _value(point, y_metric),
                point["sampling"]["guidance"],
            )
            for point in found
        ]
        whole = [(float(x), float(y), f"{guidance:g}") for x, y, guidance in places if x is not None and y is not None]
        colour, dashes = styles[line]
        words = [guidance for *_, guidance in whole] if x_metric is not None else []
        series.append(Series(label, [(x, y) for x, y, _ in whole], colour, dots=True, dashes=dashes, words=words))
    y_name = distance_name(record) if distances else metric_name(record, metrics[0])
    x_name = "guidance" if x_metric is None else metric_name(record, x_metric)
    subtitle = "; ".join([", ".join(same), *about(record)] if same else about(record))
    return Chart(
        f"{y_name} over {x_name}" + ("" if x_metric is None else ", along guidance (the numbers at the points)"),
        x_name if x_metric is None else f"{x_name}: higher is better",
        f"{y_name}: {'lower' if distances else 'higher'} is better",
        series,
        from_zero=False,
        x_ticks=sorted({point["sampling"]["guidance"] for point in points}) if x_metric is None else (),
        better=(0 if x_metric is None else 1, -1 if distances else 1),
        subtitle=subtitle,
    )


def distance_name(record: Record) -> str:
    """FID, or what else the distance of these features is called."""
    return str((record["features"] or {}).get("name", "distance"))


def metric_name(record: Record, metric: str) -> str:
    """What the mean of a metric is called, and the metric too if two are called the same."""
    names = {key: str(made.get("name", key)) for key, made in record["decided_by"]["metrics"].items()}
    return names[metric] if [*names.values()].count(names[metric]) == 1 else f"{names[metric]} ({metric})"


def _lines(points: Sequence[Record]) -> dict[tuple[str, str, int], list[Record]]:
    """The points by model, sampler and steps, along guidance."""
    lines: dict[tuple[str, str, int], list[Record]] = {}
    for point in points:
        sampling = point["sampling"]
        lines.setdefault((point["model"], sampling["sampler"], sampling["steps"]), []).append(point)
    return lines


def _styles(lines: Sequence[tuple[str, str, int]]) -> dict[tuple[str, str, int], tuple[str, Sequence[int]]]:
    """Colour and dashes of each line: a colour for each model, and dashes for its samplers and steps if there are few enough of these;
    else a colour for each line."""
    models, ways = list(dict.fromkeys(line[0] for line in lines)), list(dict.fromkeys(line[1:] for line in lines))
    if len(models) > 1 and len(ways) <= len(DASHES):
        colours = _colours(len(models))
        return {line: (colours[models.index(line[0])], DASHES[ways.index(line[1:])]) for line in lines}
    return {line: (colour, ()) for line, colour in zip(lines, _colours(len(lines)), strict=True)}


def _colours(count: int) -> Sequence[str]:
    return COLOURS[:count] if count <= len(COLOURS) else palette(count)


def _part(place: int, value: str | int) -> str:
    return f"{value} steps" if place == 2 else str(value)


def _value(point: Record, metric: str | None) -> float | None:
    """The mean of a metric, or the distance; None if the point has none."""
    value = point.get("distance") if metric is None else point["scores"].get(metric, {}).get("mean")
    return None if value is None else float(value)


def _order(point: Record, metric: str | None) -> float:
    """Lower for the better."""
    value = _value(point, metric)
    assert value is not None
    return value if metric is None else -value


def _is_best(point: Record, best: Record) -> bool:
    return point["model"] == best["model"] and all(point["sampling"][key] == best[key] for key in ("sampler", "steps", "guidance"))


def _made(made: Record) -> str:
    """The network behind a number; of a file with weights its name alone, since the record has its place and its sha256."""
    named = {**made, "weights": made["weights"] and Path(made["weights"]).name} if "weights" in made else made
    return ", ".join(f"{named[key]}" for key in ("features", "model", "weights", "protocol", "resize") if named.get(key))


def _bold(text: str, is_best: bool) -> str:
    return f"**{text}**" if is_best else text


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    aligned = ["---", *("---:" for _ in head[1:])]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (head, aligned, *rows)]
