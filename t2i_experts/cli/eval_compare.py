"""`t2i-experts eval compare`: records of other evaluations side by side, if they compare."""

from __future__ import annotations

import json
from pathlib import Path
from string import ascii_uppercase
from typing import TYPE_CHECKING, Annotated

import typer

from t2i_experts.cli.options import Json

if TYPE_CHECKING:
    from t2i_experts.evaluation.comparing import Comparison, Difference, Number


def compare(
    records: Annotated[
        list[Path], typer.Argument(metavar="A.json B.json ...", help="What eval prints with --json, or keeps as result.json.")
    ],
    anyway: Annotated[bool, typer.Option("--anyway", help="Show numbers that do not compare too, with what keeps them apart.")] = False,
    as_json: Json = False,
) -> None:
    """Compare the numbers of records, and refuse what does not compare.

    Numbers compare if network, protocol, resizing, reference, prompts and counts are the same. Otherwise each field that is not is named,
    with the values, and the exit code is 2. What may differ and does is shown: model, seed, sampling, versions, machine. A difference
    has a standard error where both numbers have one: picture by picture where the values of single pictures are kept.
    """
    if not 2 <= len(records) <= len(ascii_uppercase):
        raise ValueError(f"received {len(records)} records; 2 to {len(ascii_uppercase)} can stand side by side")

    from t2i_experts.evaluation.comparing import compare_records
    from t2i_experts.evaluation.records import made_by

    found = compare_records(records, anyway=anyway)
    if as_json:
        typer.echo(json.dumps({**made_by("eval compare"), **found.plain()}, ensure_ascii=False))
        return
    for obstacle in found.obstacles:
        letter = ascii_uppercase[[str(record.path) for record in found.records].index(obstacle.record)]
        typer.echo(f"A and {letter} do not compare: {obstacle}", err=True)
    typer.echo("\n".join(_lines(found)))


def _lines(found: Comparison) -> list[str]:
    """For people: the records by letters, what differs between them, and the numbers."""
    letters = ascii_uppercase[: len(found.records)]
    lines = [f"{letter}  {record.command}  {record.path}" for letter, record in zip(letters, found.records, strict=True)]
    if found.differs:
        rows = [["", *letters], *([name, *("" if value is None else str(value) for value in row)] for name, row in found.differs.items())]
        lines += ["", "differs:", *_table(rows, right=False)]
    heads = ["", *letters, *(f"{letter} - A" for letter in letters[1:])]
    rows = [[name, *map(_number, row), *map(_difference, found.differences[name])] for name, row in found.numbers.items()]
    return [*lines, "", *_table([heads, *rows], right=True)]


def _number(number: Number | None) -> str:
    if number is None:
        return "-"
    return f"{number.value:.4f}" + ("" if number.error is None else f" +- {number.error:.4f}")


def _difference(difference: Difference | None) -> str:
    if difference is None:
        return "-"
    if difference.error is None:
        return f"{difference.value:+.4f}"
    how = "paired" if difference.paired else "not paired"
    verdict = ", within the noise" if difference.within_noise else ""
    return f"{difference.value:+.4f} +- {difference.error:.4f} ({how}{verdict})"


def _table(rows: list[list[str]], *, right: bool) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    cells = [[cell.rjust(w) if right and i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))] for row in rows]
    return ["  ".join(row).rstrip() for row in cells]
