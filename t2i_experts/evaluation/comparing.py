"""Numbers of several records side by side: only where everything that makes the number, but for what is judged, is the same.

What must be the same goes with the number: a distance needs the same features, reference and counts, a score the same metric and captions.
Model, seed, sampling, versions and machine may differ; they are what a comparison is about, and are told.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from t2i_experts.evaluation.records import VERSION, flat, read_json, read_values

NOISE = 2.0
"""Standard errors: a smaller difference is within the noise."""

_UNKNOWN = "not known"
_MAY_DIFFER = ("model", "seed", "sampling", "dtype", "device", "t2i_experts", "settings", "machine", "versions")
_PLACES = ("weights", "path", "source", "seconds")  # of files, which say nothing of what is in them; and how long it took
_LISTED = 20

Values = Mapping[str, tuple[float, float]]
"""By picture: what counts of it, and out of how much. A number is the sum of the first over the sum of the second: 1 each for a mean."""


@dataclass(frozen=True)
class Number:
    """error: its standard error, None if it has none. needs: what must be the same in another record, by whole names; None is unknown.

    values: of single pictures, which have the same keys for the same prompts; None if they are not kept.
    """

    value: float
    error: float | None
    needs: Mapping[str, Any]
    values: Values | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Measured:
    """What a record says. numbers: by name. may_differ: what may, by whole names."""

    path: Path
    command: str
    numbers: Mapping[str, Number]
    may_differ: Mapping[str, Any]


@dataclass(frozen=True)
class Obstacle:
    """Why a number of a record does not compare with that of the first: a field with both values."""

    record: str
    numbers: Sequence[str]
    field: str
    first: Any
    other: Any

    def __str__(self) -> str:
        """In a line."""
        both = f"{_UNKNOWN} in either" if self.first is None and self.other is None else f"{_shown(self.first)} and {_shown(self.other)}"
        return f"{self.field}: {both} ({', '.join(self.numbers)})"


@dataclass(frozen=True)
class Difference:
    """Of a number from the first record's. error: the standard error of the difference, None if one of them has none. paired: whether
    it was taken picture by picture. within_noise: whether it is less than `NOISE` such errors; None if nobody knows."""

    value: float
    error: float | None
    paired: bool
    within_noise: bool | None


@dataclass(frozen=True)
class Comparison:
    """numbers: by name, of each record, None where it lacks it. differences: by name, of each record but the first.

    differs: by name, what may differ and does, of each record. obstacles: none if all that stands side by side compares.
    """

    records: Sequence[Measured]
    numbers: Mapping[str, Sequence[Number | None]]
    differences: Mapping[str, Sequence[Difference | None]]
    differs: Mapping[str, Sequence[Any]]
    obstacles: Sequence[Obstacle]

    def plain(self) -> dict[str, Any]:
        """As JSON's plain values."""
        return {
            "records": [{"path": str(one.path), "command": one.command} for one in self.records],
            "numbers": {
                name: [None if one is None else {"value": one.value, "error": one.error} for one in row]
                for name, row in self.numbers.items()
            },
            "differences": {name: [None if one is None else asdict(one) for one in row] for name, row in self.differences.items()},
            "differs": {name: list(values) for name, values in self.differs.items()},
            "obstacles": [asdict(one) for one in self.obstacles],
        }


def read_measured(path: Path) -> Measured:
    """Reads what a command of `eval` printed with --json or kept. Raises ValueError for what is no such record, or has no number."""
    record = read_json(path)
    if record is None:
        raise ValueError(f"{path} is not there")
    made = record.get("record")
    if not isinstance(made, dict) or made.get("command") not in [*_READERS]:
        found = f"its field record is {made!r}" if made is not None else "it has no field record"
        raise ValueError(f"{path} is no record of {', '.join(_READERS)}: {found}")
    if made.get("version") != VERSION:
        raise ValueError(f"{path}: its record.version is {made.get('version')!r}; this program knows {VERSION}")
    try:
        numbers = _READERS[made["command"]](record, path)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is not a whole record of {made['command']}: {type(error).__name__} {error}") from error
    if not numbers:
        raise ValueError(f"{path} holds no number: {made['command']} was asked for none, or only for a dry run")
    decided = {**record, **record.get("decided_by", {})}
    decided |= {"model": {**decided["model"], **record["model"]}} if "model" in record else {}
    return Measured(path, made["command"], numbers, flat({name: decided[name] for name in _MAY_DIFFER if name in decided}))


def compare_records(paths: Sequence[Path], *, anyway: bool = False) -> Comparison:
    """Every record beside the first. Raises ValueError, which names the fields, for what does not compare, unless `anyway`: then there are
    no standard errors of differences, since nobody knows what they would be of."""
    records = [read_measured(path) for path in paths]
    first = records[0]
    for other in records[1:]:
        if not set(first.numbers) & set(other.numbers):
            raise ValueError(
                f"no number in common: {first.path} has {', '.join(first.numbers)}; {other.path} has {', '.join(other.numbers)}"
            )
    obstacles = [obstacle for other in records[1:] for obstacle in _obstacles(first, other)]
    if obstacles and not anyway:
        raise ValueError(_refusal(first, records[1:], obstacles))
    names = list(dict.fromkeys(name for record in records for name in record.numbers))
    numbers = {name: [record.numbers.get(name) for record in records] for name in names}
    blocked = {(obstacle.record, name) for obstacle in obstacles for name in obstacle.numbers}
    differences = {
        name: [_difference(row[0], one, (str(record.path), name) in blocked) for record, one in zip(records[1:], row[1:], strict=True)]
        for name, row in numbers.items()
    }
    fields = dict.fromkeys(name for record in records for name in record.may_differ)
    values = {name: [record.may_differ.get(name) for record in records] for name in fields}
    differs = {name: row for name, row in values.items() if any(value != row[0] for value in row)}
    return Comparison(records, numbers, differences, differs, obstacles)


def _obstacles(first: Measured, other: Measured) -> list[Obstacle]:
    """Each field once, with all the numbers that it parts."""
    found: dict[str, tuple[list[str], Any, Any]] = {}
    for name in first.numbers:
        if name not in other.numbers:
            continue
        needs, others = first.numbers[name].needs, other.numbers[name].needs
        for key in dict.fromkeys([*needs, *others]):
            one, two = needs.get(key), others.get(key)
            if one != two or one is None:
                found.setdefault(key, ([], one, two))[0].append(name)
    return [Obstacle(str(other.path), names, key, one, two) for key, (names, one, two) in found.items()]


def _refusal(first: Measured, others: Sequence[Measured], obstacles: Sequence[Obstacle]) -> str:
    lines = []
    for other in others:
        mine = [obstacle for obstacle in obstacles if obstacle.record == str(other.path)]
        if mine:
            lines += [f"{first.path} and {other.path} do not compare:", *(f"  {obstacle}" for obstacle in mine[:_LISTED])]
            lines += [f"  and {len(mine) - _LISTED} more"] if len(mine) > _LISTED else []
    return "\n".join([*lines, "--anyway shows the numbers nevertheless"])


def _difference(first: Number | None, other: Number | None, blocked: bool) -> Difference | None:
    if first is None or other is None:
        return None
    value = other.value - first.value
    if blocked or first.error is None or other.error is None:
        return Difference(value, None, False, None)
    paired = _paired_error(first.values, other.values)
    error = math.hypot(first.error, other.error) if paired is None else paired
    return Difference(value, error, paired is not None, abs(value) <= NOISE * error)


def _paired_error(first: Values | None, other: Values | None) -> float | None:
    """The standard error of the difference of two ratios of sums over the same pictures, by their residuals (Cochran 1977, 6.4); None if
    the pictures are not the same or only one, and where all differ by the same: three claims that fail here and hold there are no
    certainty."""
    if first is None or other is None or set(first) != set(other) or len(first) < 2:
        return None
    if any(first[key][1] != other[key][1] for key in first):
        return None
    pairs = [(other[key][0] - first[key][0], first[key][1]) for key in first]
    whole, count = math.fsum(weight for _, weight in pairs), len(pairs)
    if not whole:
        return None
    mean = math.fsum(value for value, _ in pairs) / whole
    scatter = math.fsum((value - mean * weight) ** 2 for value, weight in pairs)
    if mean and not scatter:
        return None
    return math.sqrt(scatter * count / (count - 1)) / whole


def _network(record: Mapping[str, Any] | None, what: str) -> dict[str, Any]:
    """What must be the same of a network: all that it says, but for places."""
    if record is None:
        return {f"{what}.sha256": None}
    return {f"{what}.{name}": value for name, value in flat(record).items() if value is not None and name not in _PLACES}


def _set(record: Mapping[str, Any], what: str) -> dict[str, Any]:
    """A set of pictures that must be the same. Of statistics, whose file's hash is known, the count may be unknown."""
    return {f"{what}.sha256": record["sha256"]} | ({} if record["count"] is None else {f"{what}.count": record["count"]})


def _reference(record: Mapping[str, Any], decided: Mapping[str, Any]) -> dict[str, Any]:
    """The reference by its pictures and how they were seen, also where only their statistics are at hand; else by the file of these."""
    pictures = {"sha256": record["sha256"], **{name: decided[name] for name in ("resolution", "square") if name in decided}}
    known = {"sha256": record["sha256"], **record.get("of", {})} if record["kind"] == "statistics" else pictures
    return {**_set(record, "reference"), **{f"reference.{name}": value for name, value in known.items()}}


def _distances(record: Mapping[str, Any], path: Path) -> dict[str, Number]:
    """Those of `eval fid`, and of `eval coco` where it has a reference."""
    if "distance" not in record:
        return {}
    features, decided = record["features"], record.get("decided_by", {})
    needs = {
        **_network(features, "features"),
        "pictures": record["pictures"],
        **_reference(record["reference"], decided),
        "generated.count": record["generated"]["count"],
        **_seen(decided),
    }
    name = (features or {}).get("name", "Frechet distance")
    numbers = {name: Number(record["distance"], None, needs)}
    if "infinity" in record:
        found = record["infinity"]
        counts = {"infinity.counts": ", ".join(map(str, found["counts"]))}
        # the error of the line through subsets of the same pictures, which is less than that of the pictures
        numbers[f"{name} infinity"] = Number(found["value"], None, {**needs, **counts})
    if "kid" in record:
        found = record["kid"]
        drawn = {f"kid.{key}": found[key] for key in ("subsets", "size")}
        # its spread is that of subsets, which overlap: no error of the mean
        numbers["KID"] = Number(found["mean"], None, {**needs, **drawn})
    if "precision_recall" in record:
        found = record["precision_recall"]
        k = {"precision_recall.neighbours": found["neighbours"]}
        numbers |= {key: Number(found[key], None, {**needs, **k}) for key in ("precision", "recall")}
    return numbers


def _seen(decided: Mapping[str, Any]) -> dict[str, Any]:
    """Which pictures were drawn, and how they came to the networks; nothing for a record that only compares folders."""
    return {
        name: decided[key] for name, key in (("prompts.sha256", "prompts"), ("resolution", "resolution"), ("square", "square")) if decided
    }


def _coco(record: Mapping[str, Any], path: Path) -> dict[str, Number]:
    numbers, decided = _distances(record, path), record["decided_by"]
    kept = read_values(path, record["values"]) if "values" in record else None
    called = [metric.get("name", key) for key, metric in decided["metrics"].items()]
    for key, score in record.get("scores", {}).items():
        metric = decided["metrics"][key]
        name = metric.get("name", key)
        needs = {**_network(metric, f"metrics.{key}"), "count": score["count"], "pictures": record["pictures"], **_seen(decided)}
        numbers[name if called.count(name) == 1 else f"{name} ({key})"] = Number(score["mean"], score["error"], needs, _ones(kept, key))
    return numbers


def _score(record: Mapping[str, Any], path: Path) -> dict[str, Number]:
    """That of `eval clip` and `eval score`."""
    metric, kept = record["metric"], read_values(path, record["values"]) if "values" in record else None
    needs = {
        **_network(metric, "metric"),
        "count": record["count"],
        "captions.sha256": record["captions"]["sha256"],
        "pictures": record["pictures"],
    }
    values = next(iter(kept.values())) if kept else None
    return {metric["name"]: Number(record["mean"], record["error"], needs, None if values is None else _ones({"": values}, ""))}


def _judge(record: Mapping[str, Any], path: Path) -> dict[str, Number]:
    needs = {"judge.fingerprint": record["judge"]["fingerprint"], "prompts.sha256": record["prompts"]["sha256"], "num": record["num"]}
    pictures, numbers = record.get("pictures"), {}
    for category, score in record["scores"].items():
        values = None if pictures is None else {str(i): _claims(one["claims"], category) for i, one in enumerate(pictures)}
        numbers[category] = Number(score["right"], score["standard_error"], needs, values)
    return numbers


def _nearest(record: Mapping[str, Any], path: Path) -> dict[str, Number]:
    """Those of `eval nearest`. A share's threshold and a test's measure are the held-out pictures, which must be the same."""
    needs = {
        **_network(record["features"], "features"),
        **_set(record["train"], "train"),
        **{name: record[name] for name in ("resolution", "square", "pictures")},
    }
    numbers = {"median distance": Number(record["distances"]["generated"]["median"], None, needs)}
    if "held_out" in record:
        below, count = record["below"], record["generated"]["count"]
        measured = {**needs, **_set(record["held_out"], "held_out")}
        numbers["share below"] = Number(below["share"], below["error"], measured)
        numbers["C_T"] = Number(record["copying"]["z"], None, {**measured, "generated.count": count})
    return numbers


def _claims(claims: Sequence[Sequence[Any]], category: str) -> tuple[float, float]:
    """Of a picture: claims of a category that hold, and all of these; of whole prompts, whether all claims hold."""
    from t2i_experts.evaluation.composition import WHOLE  # with torch, for which a comparison of files need not wait

    if category == WHOLE:
        return float(all(claim[-1] for claim in claims)), 1.0
    verdicts = [bool(claim[-1]) for claim in claims if claim[0] == category]
    return float(sum(verdicts)), float(len(verdicts))


def _ones(kept: Mapping[str, Mapping[str, float]] | None, name: str) -> Values | None:
    return None if kept is None or name not in kept else {key: (value, 1.0) for key, value in kept[name].items()}


def _shown(value: Any) -> str:
    return _UNKNOWN if value is None else repr(value)


_READERS: Mapping[str, Callable[[Mapping[str, Any], Path], dict[str, Number]]] = {
    "eval fid": _distances,
    "eval coco": _coco,
    "eval clip": _score,
    "eval score": _score,
    "eval judge": _judge,
    "eval nearest": _nearest,
}
