"""What `doctor` found, as a table and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Finding:
    """One row. text: for the table. value: for JSON. problem: what is wrong and what to do, in one line; empty if nothing is. note: what
    is worth knowing, but stops nothing."""

    name: str
    text: str
    value: Any = None
    problem: str = ""
    note: str = ""


Sections = Mapping[str, Sequence[Finding]]


def problems(sections: Sections) -> list[str]:
    """What is wrong, in the order of the rows."""
    return [finding.problem for rows in sections.values() for finding in rows if finding.problem]


def document(sections: Sections) -> dict[str, Any]:
    """All of it as plain values: {"ok", "problems", "notes", SECTION: {ROW: value}}."""
    notes = [finding.note for rows in sections.values() for finding in rows if finding.note]
    values = {title: {row.name: row.text if row.value is None else row.value for row in rows} for title, rows in sections.items()}
    return {"ok": not problems(sections), "problems": problems(sections), "notes": notes, **values}


def table(sections: Sections) -> str:
    """All of it for people: rows that have a problem begin with `!`, and the problems come again at the end."""
    width = max((len(row.name) for rows in sections.values() for row in rows), default=0)
    lines: list[str] = []
    for title, rows in sections.items():
        lines += [title, *(f"{'!' if row.problem else ' '} {row.name:{width}}  {row.text}" for row in rows), ""]
    notes = [row.note for rows in sections.values() for row in rows if row.note]
    wrong = problems(sections)
    lines += [f"note: {note}" for note in notes]
    lines += [f"! {problem}" for problem in wrong] or ["nothing is wrong"]
    return "\n".join(lines)


def size(count: float) -> str:
    """Bytes for people: `21.7 GiB`."""
    for unit in ("B", "KiB", "MiB"):
        if abs(count) < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
