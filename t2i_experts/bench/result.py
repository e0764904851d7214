"""What a benchmark found, as a table and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from t2i_experts.bench.timing import Timing


@dataclass(frozen=True)
class Row:
    """One candidate.

    timing: of its calls, None if there were none. ratio: how many times as fast as the row that it is compared with, None for that row
    itself. floor: how many times the physical floor it takes. share: of the matrix rate that was measured in this run. error: against an
    fp32 reference, relative root-mean-square. more: other figures, by name.
    """

    name: str
    timing: Timing | None
    ratio: float | None = None
    floor: float | None = None
    share: float | None = None
    error: float | None = None
    more: Mapping[str, Any] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        """As JSON: the columns that have a value."""
        columns = {"ratio": self.ratio, "floor": self.floor, "share": self.share, "error": self.error}
        found = {name: value for name, value in columns.items() if value is not None}
        times = {"seconds": self.timing.median, "spread": self.timing.spread} if self.timing else {}
        return {"name": self.name, **times, **found, **self.more}


@dataclass(frozen=True)
class Result:
    """benchmark: its name. machine, settings: what it was measured on and with. rows: the baseline first."""

    benchmark: str
    machine: Mapping[str, Any]
    settings: Mapping[str, Any]
    rows: Sequence[Row]

    def plain(self) -> dict[str, Any]:
        """As JSON."""
        rows = [row.plain() for row in self.rows]
        return {"benchmark": self.benchmark, "machine": dict(self.machine), "settings": dict(self.settings), "rows": rows}


def table(result: Result) -> str:
    """For people: one line for the settings, one for the machine, and a row for each candidate; columns that nothing fills are left out."""
    head = ["", "time", "+-", "ratio", "x floor", "matrix rate", "error", *dict.fromkeys(name for row in result.rows for name in row.more)]
    cells = [_cells(row, head[7:]) for row in result.rows]
    used = [i for i in range(len(head)) if i == 0 or any(row[i] for row in cells)]
    lines = [[head[i] for i in used], *([row[i] for i in used] for row in cells)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(used))]
    about = [
        f"{result.benchmark}: {', '.join(f'{key} {value}' for key, value in result.settings.items())}",
        ", ".join(f"{key} {value}" for key, value in result.machine.items()),
    ]
    body = ["  ".join([line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))]) for line in lines]
    return "\n".join([*about, *(line.rstrip() for line in body)])


def _cells(row: Row, more: Sequence[str]) -> list[str]:
    def shown(value: float | None, form: str) -> str:
        return "" if value is None else form.format(value)

    return [
        row.name,
        duration(row.timing.median) if row.timing else "",
        f"{row.timing.spread:.1%}" if row.timing and len(row.timing.seconds) > 1 else "",
        shown(row.ratio, "{:.2f}x"),
        shown(row.floor, "{:.2f}x"),
        shown(row.share, "{:.1%}"),
        shown(row.error, "{:.1e}"),
        *(_figure(row.more.get(name)) for name in more),
    ]


def _figure(value: Any) -> str:
    return "" if value is None else f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def duration(seconds: float) -> str:
    """For people: `1.46 ms`."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"
