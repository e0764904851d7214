"""The README tells a newcomer what each file is for."""

from __future__ import annotations

import re
from pathlib import Path

ROOM = Path(__file__).parents[2] / "t2i_experts/evaluation"


def test_the_list_of_files_has_each_of_them_once() -> None:
    text = (ROOM / "README.md").read_text(encoding="utf-8").partition("## The files")[2]
    rows = [line.split("|")[2] for line in text.splitlines() if line.startswith("| ") and "---" not in line][1:]
    told = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert sorted(told) == sorted(path.stem for path in ROOM.glob("[!_]*.py"))
