"""Members, captions and the manifest."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from t2i_experts.shards.format import MANIFEST, Manifest, ShardEntry, Spread, Statistics, dump_fields, parse_captions, split_member


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("0001.jpg", ("0001", "jpg")),
        ("./0001.JPG", ("0001", "jpg")),
        ("a.b/0001.t5.npz", ("a.b/0001", "t5.npz")),
        ("白猫.webp", ("白猫", "webp")),
        ("README", None),
        ("._0001.jpg", None),
        ("a/.DS_Store", None),
    ],
)
def test_split_member(name: str, expected: tuple[str, str] | None) -> None:
    assert split_member(name) == expected


@pytest.mark.parametrize("name", ["/etc/passwd.txt", "../a.jpg", "a/../../b.jpg", "..\\a.jpg", "./../a.jpg"])
def test_split_member_refuses_paths_that_leave_the_folder(name: str) -> None:
    with pytest.raises(ValueError, match="absolute path"):
        split_member(name)


@pytest.mark.parametrize(
    ("text", "fields", "captions"),
    [
        (b"a cat\n", None, ("a cat",)),
        ("\ufeff一只猫 🐈".encode(), None, ("一只猫 🐈",)),
        (None, b'{"caption": "a dog", "width": 3}', ("a dog",)),
        (b"a cat", b'{"caption": "a dog"}', ("a cat",)),
        (b"a cat", b'{"caption": null}', ("a cat",)),
        (b"a cat", b'{"captions": ["x", " ", "y "]}', ("x", "y")),
    ],
)
def test_which_caption_counts(text: bytes | None, fields: bytes | None, captions: tuple[str, ...]) -> None:
    assert parse_captions(text, fields)[0] == captions


@pytest.mark.parametrize(
    ("text", "fields", "message"),
    [
        (b"\xff\xfe", None, "not UTF-8"),
        (b" \n", None, "no caption"),
        (None, b"{", "cannot be read"),
        (None, b"[1]", "list"),
        (None, b'{"caption": 3}', "int"),
        (None, b'{"captions": "a"}', "list of strings"),
        (None, b'{"captions": [1]}', "list of strings"),
        (None, b'{"url": "x"}', "no caption"),
        (None, b"[" * 100_000, "cannot be read"),
    ],
)
def test_bad_captions(text: bytes | None, fields: bytes | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_captions(text, fields)


def test_fields_round_trip() -> None:
    captions, metadata = ["é", "🙂"], {"score": 0.5, "tags": ["a"], "none": None}
    assert parse_captions(b"e", dump_fields(captions, metadata)) == (tuple(captions), metadata)
    assert parse_captions(None, dump_fields(["one"], metadata)) == (("one",), metadata)
    assert dump_fields(["one"], {}) is None
    with pytest.raises(ValueError, match="captions"):
        dump_fields(["one"], {"captions": []})
    with pytest.raises(ValueError):
        dump_fields(["one"], {"score": float("nan")})


def test_spreads_add_up() -> None:
    values = [5, 3, 9, 1]
    assert Spread.of(values[:1]) + Spread.of([]) + Spread.of(values[1:]) == Spread.of(values) == Spread(4, 1, 9, 18)
    assert Spread.of(values).mean == 4.5


def entry(**changes: Any) -> ShardEntry:
    return dataclasses.replace(ShardEntry("00000.tar", 3, 2048, "ab" * 32, ("k",)), **changes)


def test_manifest_round_trip_and_hash(tmp_path: Path) -> None:
    statistics = Statistics.of([3, 5], [(64, 32), (20, 10)])
    manifest = Manifest((entry(), entry(file="00001.tar", samples=2)), statistics)
    manifest.save(tmp_path)
    assert Manifest.load(tmp_path) == manifest and manifest.samples == 5
    shutil.copytree(tmp_path, tmp_path / "elsewhere")
    assert Manifest.load(tmp_path / "elsewhere").hash == manifest.hash
    assert Manifest((entry(file="other.tar"),)).hash == Manifest((entry(),), statistics).hash
    different = [entry(), entry(sha256="cd" * 32), entry(samples=4), entry(skipped=())]
    assert len({Manifest((shard,)).hash for shard in different}) == 4
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == [MANIFEST]  # no temporary file is left


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"samples": 4},
        {"shards": [{"file": "../x.tar", "samples": 3, "bytes": 1, "sha256": ""}]},
        {"shards": [{"file": "x.tar", "samples": "3", "bytes": 1, "sha256": ""}]},
        {"shards": [{"file": "x.tar"}]},
        {"shards": None},
        {"statistics": {"unknown": {}}},
    ],
)
def test_damaged_manifests_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    Manifest((entry(),)).save(tmp_path)
    plain = json.loads((tmp_path / MANIFEST).read_text())
    (tmp_path / MANIFEST).write_text(json.dumps(plain | change))
    with pytest.raises(ValueError, match=r"manifest\.json is damaged"):
        Manifest.load(tmp_path)
    (tmp_path / MANIFEST).write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        Manifest.load(tmp_path)


def test_missing_manifests_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not found"):
        Manifest.load(tmp_path / "none")
    with pytest.raises(ValueError, match="shards build"):
        Manifest.load(tmp_path)
    (tmp_path / "0.tar").touch()
    with pytest.raises(ValueError, match=r"shards check .* --write-manifest"):
        Manifest.load(tmp_path)
