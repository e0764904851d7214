"""Records: what made a number, as JSON's plain values, written whole or not at all, and compared field by field.

What every command's record says in the same words: `record`, the command and the version of this description; the set that is judged as
`generated`, with `reference` or `train` beside it, or as `set` where there is no other, each with path, kind, count and sha256;
`features`, `metric` or `metrics`, and `judge`: the networks; `prompts` or `captions`; what decides drawn pictures: model, seed, sampling,
dtype, device, t2i_experts (in `decided_by` of `eval coco`, with all that decides what is seen of them); `settings`: what ought not to
change the number; machine, versions, seconds. Values of single pictures lie beside it, in the file that `values` names.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

VERSION = 1
"""Of the records' description; a higher one may have other fields."""


def made_by(command: str) -> dict[str, Any]:
    """The first field of a command's record."""
    return {"record": {"command": command, "version": VERSION}}


def differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(field, its value in the first, in the second) wherever two records differ: `sampling.guidance` for one inside another, None for
    a field that is not there."""
    one, other = flat(_plain(first)), flat(_plain(second))
    return [(name, one.get(name), other.get(name)) for name in dict.fromkeys([*one, *other]) if one.get(name) != other.get(name)]


def steps_in_all(sampling: Mapping[str, Any]) -> int:
    """The steps of a record's `sampling`: those that all experts make, where some have steps of their own."""
    return int(sampling.get("steps_in_all", sampling["steps"]))


def in_words(found: list[tuple[str, Any, Any]], where: tuple[str, str] = ("there", "here")) -> str:
    """The first few differences: `seed is 0 there and 1 here`."""
    shown = [f"{name} is {first!r} {where[0]} and {second!r} {where[1]}" for name, first, second in found[:3]]
    return ", ".join(shown) + (f", and {len(found) - 3} more" if len(found) > 3 else "")


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """Writes a record in one move; a kill leaves what was there before. Raises ValueError if it cannot be written."""
    _write(path, (json.dumps(record, ensure_ascii=False, indent=2) + "\n").encode())


def write_values(path: Path, key: str, keys: Sequence[Any], values: Mapping[str, Sequence[float]]) -> dict[str, str]:
    """Writes a CSV with a row for each picture: its key, and its values by their names. Returns what a record says of it as `values`.

    Raises ValueError if it cannot be written.
    """
    return write_table(path, [key, *values], zip(keys, *values.values(), strict=True))


def write_table(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> dict[str, str]:
    """Writes a CSV; returns its path and sha256. Raises ValueError if it cannot be written."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    data = out.getvalue().encode(errors="surrogateescape")
    _write(path, data)
    return {"path": str(path), "sha256": hashlib.sha256(data).hexdigest()}


def read_values(record: Path, told: Mapping[str, str]) -> dict[str, dict[str, float]] | None:
    """By name and then by picture, what `write_values` wrote: beside the record, or where it was written. None if it is no longer the
    file that the record tells of, or lies elsewhere, and if two pictures have the same key, as in different tars they may."""
    for path in (record.parent / Path(told["path"]).name, Path(told["path"])):
        try:
            data = path.read_bytes()
        except OSError:
            continue
        if hashlib.sha256(data).hexdigest() == told["sha256"]:
            rows = csv.DictReader(io.StringIO(data.decode(errors="surrogateescape"), newline=""))
            key, *names = rows.fieldnames or [""]
            found: dict[str, dict[str, float]] = {name: {} for name in names}
            for row in rows:
                if any(row[key] in values for values in found.values()):
                    return None
                for name in names:
                    found[name][row[key]] = float(row[name])
            return found
    return None


def read_json(path: Path) -> dict[str, Any] | None:
    """A record that was written before; None if there is none. Raises ValueError for what is no record."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no JSON object")
    return found


def _write(path: Path, data: bytes) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror or error}") from error


def _plain(record: Mapping[str, Any]) -> dict[str, Any]:
    """As it would come back from a file: lists for tuples, strings for the keys."""
    plain: dict[str, Any] = json.loads(json.dumps(record))
    return plain


def flat(record: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """The fields of records inside records by their whole names: `sampling.guidance`."""
    fields: dict[str, Any] = {}
    for name, value in record.items():
        fields |= flat(value, f"{above}{name}.") if isinstance(value, dict) and value else {f"{above}{name}": value}
    return fields
