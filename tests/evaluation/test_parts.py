"""Parts are whole or absent, and say what made them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from t2i_experts.evaluation import parts as module
from t2i_experts.evaluation.parts import Parts
from t2i_experts.evaluation.records import differences


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SIZE", 4)


MADE: dict[str, Any] = {"seed": 0, "sampling": {"steps": 4, "guidance_interval": (0.0, 1.0)}}


def test_what_is_missing_is_made_once(tmp_path: Path) -> None:
    parts = Parts(tmp_path / "p", 10, MADE)
    parts.open()
    assert parts.missing() == [range(4), range(4, 8), range(8, 10)]
    parts.write(range(4, 8), {"x": np.arange(8.0).reshape(4, 2)})
    (tmp_path / "p/.000008.npz.7.partial").write_bytes(b"of a process that was killed")
    again = Parts(tmp_path / "p", 10, MADE)
    again.open()
    assert again.missing() == [range(4), range(8, 10)] and (again.read(range(4, 8))["x"] == np.arange(8.0).reshape(4, 2)).all()
    assert sorted(path.name for path in (tmp_path / "p").iterdir()) == ["000004.npz", "made_by.json"]


@pytest.mark.parametrize(
    ("made", "count", "said"),
    [
        ({**MADE, "seed": 1}, 10, "seed is 0 there and 1 here"),
        ({**MADE, "sampling": {**MADE["sampling"], "steps": 5}}, 10, r"sampling\.steps is 4 there and 5 here"),
        (MADE, 11, "count is 10 there and 11 here"),
        ({"sampling": MADE["sampling"]}, 10, "seed is 0 there and None here"),
    ],
)
def test_parts_of_other_work_are_refused_by_the_name_of_the_field(tmp_path: Path, made: Any, count: int, said: str) -> None:
    Parts(tmp_path / "p", 10, MADE).open()
    with pytest.raises(ValueError, match=f"p holds parts of other work: {said}"):
        Parts(tmp_path / "p", count, made).open()


def test_a_damaged_part_is_named(tmp_path: Path) -> None:
    parts = Parts(tmp_path / "p", 8, MADE)
    parts.open()
    parts.write(range(4), {"x": np.zeros(4)})
    path = tmp_path / "p/000000.npz"
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"000000\.npz cannot be read .*delete it"):
        parts.read(range(4))
    np.savez(path, x=np.zeros(3))
    with pytest.raises(ValueError, match=r"000000\.npz does not hold 4 pictures"):
        parts.read(range(4))
    with pytest.raises(ValueError, match=r"000004\.npz is missing; all processes must share"):
        parts.read(range(4, 8))
    (tmp_path / "p/made_by.json").unlink()
    with pytest.raises(ValueError, match=r"holds \.npz files, and no made_by\.json"):
        parts.open()


def test_differences_of_records() -> None:
    assert differences({"a": {"b": (1, 2), "c": 3}, "d": {}}, {"a": {"b": [1, 2], "c": 4}, "e": None}) == [("a.c", 3, 4), ("d", {}, None)]
