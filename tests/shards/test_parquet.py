"""Parquet tables: picture files named in a column, and pictures inside the table. Without pyarrow, how to get it."""

from __future__ import annotations

import datetime
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from t2i_experts.shards.build import BuildOptions, build_shards
from t2i_experts.shards.parquet import parquet_source
from t2i_experts.shards.reader import ShardReader
from t2i_experts.shards.sources import Record, Skipped

Encode = Callable[..., bytes]

needs_pyarrow = pytest.mark.skipif(importlib.util.find_spec("pyarrow") is None, reason="needs pyarrow: pip install 't2i-experts[parquet]'")


def write(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns), path, **options)
    return path


def test_without_pyarrow_the_error_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").touch()
    with pytest.raises(ValueError, match=r"a\.parquet needs pyarrow: pip install 't2i-experts\[parquet\]'"):
        list(parquet_source(tmp_path / "a.parquet", None, Skipped()))


@needs_pyarrow
def test_files_are_named_as_in_a_csv(tmp_path: Path) -> None:
    day = datetime.date(2020, 1, 2)
    columns = {"file": ["a.jpg", "b.jpg", "./a.jpg"], "caption": ["x", None, "y"], "score": [0.5, float("nan"), 2.0], "day": [day] * 3}
    path = write(tmp_path / "x.parquet", columns)
    assert list(parquet_source(path, tmp_path / "i", Skipped())) == [
        Record("a.jpg", tmp_path / "i/a.jpg", ("x", "y"), {"score": 0.5, "day": "2020-01-02"}),
        Record("b.jpg", tmp_path / "i/b.jpg", (), {"score": None, "day": "2020-01-02"}),
    ]


@needs_pyarrow
@pytest.mark.parametrize("struct", [False, True])
def test_pictures_inside_the_table(tmp_path: Path, encode: Encode, struct: bool) -> None:
    pictures = [encode(i, (20, 10), "JPEG") for i in range(25)]
    images = [{"bytes": p, "path": f"{i}.jpg"} for i, p in enumerate(pictures)] if struct else list(pictures)
    images[3] = {"bytes": None, "path": "3.jpg"} if struct else None
    (tmp_path / "t").mkdir()
    for part, rows in enumerate((slice(0, 12), slice(12, 25))):
        columns = {"image": images[rows], "captions": [[f"{i}", "more"] for i in range(25)][rows], "n": list(range(25))[rows]}
        write(tmp_path / f"t/train-{part}.parquet", columns, row_group_size=5)
    records = list(parquet_source(tmp_path / "t", None, Skipped()))
    assert [record.name for record in records][10:13] == ["train-0/10", "train-0/11", "train-1/00"]
    assert records[14].read() == pictures[14] and records[2].read() == pictures[2]
    assert records[7].captions == ("7", "more") and records[7].metadata == ({"n": 7, "path": "7.jpg"} if struct else {"n": 7})
    manifest, skipped = build_shards(tmp_path / "t", tmp_path / "out", None, BuildOptions(8, workers=3, where="n < 20"))
    assert manifest.samples == 19 and skipped.first["picture cannot be decoded"] == ["train-0/03: its row holds no bytes"]
    assert ShardReader([tmp_path / "out"], size=8, seed=0).raw(12).image == pictures[13]


@needs_pyarrow
@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"file": ["a"], "text": ["x"]}, "column `caption` or `captions` missing; its columns are: file, text"),
        ({"caption": ["x"], "url": ["u"]}, "one of the columns `file` and `image`"),
        ({"caption": ["x"], "image": [3]}, "column `image` holds int64"),
        ({"caption": [3], "file": ["a"]}, "row 0: `caption` must be a string"),
        ({"caption": ["x", "y"], "file": ["a", None]}, "row 1: `file` is blank"),
    ],
)
def test_wrong_tables_are_refused(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "x.parquet", columns)
    with pytest.raises(ValueError, match=rf"x\.parquet.*{message}"):
        list(parquet_source(path, None, Skipped()))


@needs_pyarrow
def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(ValueError, match="cannot be read as Parquet"):
        list(parquet_source(tmp_path / "x.parquet", None, Skipped()))
