"""Folders, CSV and JSONL files: captions and fields that are read, and errors that say where."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from t2i_experts.shards.sources import Record, Skipped, csv_source, folder_source, jsonl_source, source_name


def read_csv(path: Path, text: str, images: Path | None = None) -> list[Record]:
    path.write_text(text, encoding="utf-8", newline="")
    return list(csv_source(path, images, Skipped()))


def test_folder(tmp_path: Path) -> None:
    for name in ("b.jpg", "a/1.png", "a/2.WEBP", "a/3.gif", "a/4.jpeg", ".hidden.jpg", ".git/x.jpg", "notes.txt", "c.jpg", "d.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "b.txt").write_bytes("\ufeffone\r\n\r\n two 🐈 \r\n".encode())
    (tmp_path / "a/1.json").write_text(json.dumps({"caption": "一", "captions": ["二"], "score": 5}), encoding="utf-8")
    (tmp_path / "a/2.json").write_text('{"caption": "same"}')
    (tmp_path / "a/2.txt").write_text("same\nother")
    (tmp_path / "c.txt").write_bytes(b"caf\xe9")
    (tmp_path / "d.json").write_text("{")
    skipped = Skipped()
    records = list(folder_source(tmp_path, None, skipped))
    found = {record.name: (tuple(filter(None, record.captions)), dict(record.metadata)) for record in records}
    assert found == {
        "b.jpg": (("one", "two 🐈"), {}),
        "a/1.png": (("一", "二"), {"score": 5}),
        "a/2.WEBP": (("same", "other"), {}),
        "a/3.gif": ((), {}),
        "a/4.jpeg": ((), {}),
    }
    foreign = "caption file is not UTF-8; it may be Latin-1: convert it with iconv -f latin1 -t utf-8 OLD > NEW"
    assert skipped.counts == {foreign: 1, "caption file cannot be read": 1}
    assert skipped.first[foreign] == ["c.jpg"] and skipped.first["caption file cannot be read"][0].startswith("d.jpg: ")
    with pytest.raises(ValueError, match="--images"):
        list(folder_source(tmp_path, tmp_path, skipped))


def test_csv_with_quotes_newlines_marks_and_repeated_files(tmp_path: Path) -> None:
    text = '\ufefffile,caption,score\r\na.jpg,"red, ""round""\napple",1\r\nb.jpg,猫,2\r\n\r\n./a.jpg,second,3\r\n'
    assert read_csv(tmp_path / "x.csv", text) == [
        Record("a.jpg", tmp_path / "a.jpg", ('red, "round"\napple', "second"), {"score": "1"}),
        Record("b.jpg", tmp_path / "b.jpg", ("猫",), {"score": "2"}),
    ]


def test_csv_base_folder_and_tabs(tmp_path: Path) -> None:
    (record,) = read_csv(tmp_path / "x.tsv", "caption\tfile\na, b\tsub/a.jpg\n", tmp_path / "images")
    assert record == Record("sub/a.jpg", tmp_path / "images/sub/a.jpg", ("a, b",))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name,caption\na,b\n", r"line 1: column file missing; its columns are: name, caption"),
        ("a;b\n", r"line 1: column file and caption missing; its columns are: a;b"),
        ("", r"line 1: column file and caption missing"),
        ("file,caption,caption\n", r"a column occurs twice"),
        ("file,caption\na.jpg,x\nb.jpg,red, round\n", r"line 3: 3 cells where the header has 2 columns \(file, caption\).*double quotes"),
        ("file,caption\na.jpg\n", r"line 2: 1 cells"),
        ("file,caption\n ,x\n", r"line 2: the cell `file` is empty"),
        ('file,caption\na.jpg,"open\n', r"line 2: unexpected end of data"),
    ],
)
def test_csv_errors_name_line_and_columns(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_csv(tmp_path / "x.csv", text)


def test_csv_in_another_encoding(tmp_path: Path) -> None:
    """The line is right far behind what a decoder reads at a time."""
    (tmp_path / "x.csv").write_bytes(b"file,caption\n" + b"a.jpg,x\n" * 5000 + "a.jpg,café\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"line 5002: not UTF-8 \(byte 0xe9 at 9\); it may be Latin-1"):
        list(csv_source(tmp_path / "x.csv", None, Skipped()))


def test_jsonl(tmp_path: Path) -> None:
    lines = [
        {"file": "a.jpg", "caption": "x", "n": 1},
        {"file": "b.jpg", "captions": ["y", "z"]},
        {"file": "a.jpg", "caption": "w", "n": 2},
    ]
    (tmp_path / "x.jsonl").write_text("\n\n".join(json.dumps(line) for line in lines))
    assert list(jsonl_source(tmp_path / "x.jsonl", tmp_path / "i", Skipped())) == [
        Record("a.jpg", tmp_path / "i/a.jpg", ("x", "w"), {"n": 1}),
        Record("b.jpg", tmp_path / "i/b.jpg", ("y", "z")),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "Expecting"),
        ("[]", "found list"),
        ('{"caption": "x"}', "`file` missing or not a string; its fields are: caption"),
        ('{"file": 3, "caption": "x"}', "`file` missing or not a string"),
        ('{"file": "a"}', "`caption` or `captions` missing; its fields are: file"),
        ('{"file": "a", "caption": 1}', "must be a string"),
        ('{"file": "a", "captions": "x"}', "a list of strings"),
        ('{"file": "a", "caption": "x", "n": NaN}', "NaN"),
        (b'{"file": "a", "caption": "\xff"}', "not UTF-8"),
    ],
)
def test_jsonl_errors_name_the_line(tmp_path: Path, line: str | bytes, message: str) -> None:
    raw = line if isinstance(line, bytes) else line.encode()
    (tmp_path / "x.jsonl").write_bytes(b'{"file": "ok.jpg", "caption": "ok"}\n' + raw)
    with pytest.raises(ValueError, match=f"line 2: .*{message}"):
        list(jsonl_source(tmp_path / "x.jsonl", None, Skipped()))


def test_the_source_follows_from_the_path(tmp_path: Path) -> None:
    for name in ("a.csv", "a.TSV", "a.jsonl", "a.ndjson", "a.json", "a.parquet", "a.xml", "tars/0.tar", "tars/0.parquet", "t/0.parquet"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [source_name(tmp_path / name) for name in (".", "a.csv", "a.TSV", "a.jsonl", "a.ndjson")] == [
        "folder",
        "csv",
        "csv",
        "jsonl",
        "jsonl",
    ]
    assert [source_name(tmp_path / name) for name in ("a.json", "a.parquet", "tars", "t")] == ["coco", "parquet", "img2dataset", "parquet"]
    with pytest.raises(ValueError, match=r"'.xml'; allowed"):
        source_name(tmp_path / "a.xml")
    with pytest.raises(ValueError, match="not found"):
        source_name(tmp_path / "none")
