"""What is written: the same bytes for the same samples, readable by tarfile and webdataset, and never half a folder."""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from t2i_experts.shards.format import MANIFEST, Manifest
from t2i_experts.shards.writer import ShardWriter, write_manifest

Encode = Callable[..., bytes]
MakeShards = Callable[..., Path]


def test_the_same_samples_give_the_same_bytes(tmp_path: Path, make_shards: MakeShards) -> None:
    first, second = (make_shards(tmp_path / name, 12) for name in "ab")
    files = sorted(path.name for path in first.iterdir())
    assert files == sorted([MANIFEST, *(f"{i:05d}.{kind}" for i in range(3) for kind in ("tar", "index"))])
    assert all((first / file).read_bytes() == (second / file).read_bytes() for file in files)


def test_the_manifest_tells_the_truth(tmp_path: Path, make_shards: MakeShards) -> None:
    manifest = Manifest.load(make_shards(tmp_path, 12))
    assert [shard.samples for shard in manifest.shards] == [5, 5, 2] and manifest.samples == 12
    for shard in manifest.shards:
        data = (tmp_path / shard.file).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (shard.bytes, shard.sha256)
    assert manifest.statistics.caption_characters.count == 24
    assert (manifest.statistics.image_width.min, manifest.statistics.image_height.max) == (16, 16)


def test_tarfile_sees_sorted_members_of_nobody(tmp_path: Path, encode: Encode) -> None:
    with ShardWriter(tmp_path) as writer:
        writer.write("a", encode(0), "png", ["one"])
        writer.write("b/x", encode(1), "png", ["eins", "zwei 🐈"], {"n": 1})
        writer.write("長い" * 60, encode(2), "png", ["三"])
    with tarfile.open(tmp_path / "00000.tar") as tar:
        members = tar.getmembers()
        assert [m.name for m in members] == ["a.png", "a.txt", "b/x.png", "b/x.json", "b/x.txt", f"{'長い' * 60}.png", f"{'長い' * 60}.txt"]
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {(0, 0, 0, "", "", 0o644)}
        assert tar.extractfile("b/x.txt").read() == b"eins"  # type: ignore[union-attr]
        assert json.load(tar.extractfile("b/x.json")) == {"captions": ["eins", "zwei 🐈"], "n": 1}  # type: ignore[arg-type]


def test_webdataset_reads_it(tmp_path: Path, make_shards: MakeShards) -> None:
    wds: Any = pytest.importorskip("webdataset")
    make_shards(tmp_path, 7)
    urls = [str(tmp_path / f"{i:05d}.tar") for i in range(2)]
    samples = list(wds.WebDataset(urls, shardshuffle=False).decode("pil").to_tuple("__key__", "png", "txt"))
    assert [(key, text) for key, _, text in samples] == [(f"{i:05d}", f"{i}/0") for i in range(7)]
    assert all(image.size == (16, 16) for _, image, _ in samples)


def test_an_error_leaves_no_manifest_and_no_half_shard(tmp_path: Path, encode: Encode) -> None:
    with pytest.raises(RuntimeError), ShardWriter(tmp_path, samples_per_shard=2) as writer:
        for i in range(3):
            writer.write(f"{i}", encode(i), "png", ["x"])
        raise RuntimeError
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000.index", "00000.tar"]


def test_several_writers_share_a_folder(tmp_path: Path, make_shards: MakeShards, encode: Encode) -> None:
    """Two writers with ranges of their own give what one gives."""
    whole = make_shards(tmp_path / "whole", 12)
    parts = tmp_path / "parts"
    writers = [ShardWriter(parts, samples_per_shard=5, first_shard=first) for first in (2, 0)]
    for writer, samples in zip(writers, (range(10, 12), range(10)), strict=True):
        for i in samples:
            writer.write(f"{i:05d}", encode(i), "png", [f"{i}/{j}" for j in range(1 + i % 3)], {"i": i})
    for writer in writers:
        writer.close()
    assert write_manifest(parts) == Manifest.load(whole) == Manifest.load(parts)


def test_write_manifest_refuses_tars_of_others(tmp_path: Path, make_shards: MakeShards) -> None:
    make_shards(tmp_path, 3)
    (tmp_path / "foreign.tar").write_bytes(b"")
    with pytest.raises(ValueError, match=r"foreign\.tar .*--write-manifest"):
        write_manifest(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": "a"}, "ascending"),
        ({"key": "b"}, "ascending"),
        ({"key": "c.d"}, "without dots"),
        ({"key": "/c"}, "absolute"),
        ({"key": "../c"}, "absolute"),
        ({"key": "./c"}, "relative path"),
        ({"key": ""}, "cannot name"),
        ({"extension": "gif"}, "jpg, jpeg, png, webp"),
        ({"captions": []}, "at least one caption"),
        ({"captions": ["x", " "]}, "blank"),
        ({"captions": ["\ud800"]}, "sample 'c'"),
        ({"image": b"nonsense"}, "sample 'c'"),
        ({"metadata": {"caption": "x"}}, "caption"),
        ({"metadata": {"x": object()}}, "sample 'c'"),
    ],
)
def test_bad_samples_are_refused_and_do_no_harm(tmp_path: Path, encode: Encode, change: dict[str, Any], message: str) -> None:
    sample: dict[str, Any] = {"key": "c", "image": encode(0), "extension": "png", "captions": ["x"]}
    with ShardWriter(tmp_path) as writer:
        writer.write(**sample | {"key": "b"})
        with pytest.raises(ValueError, match=message):
            writer.write(**sample | change)
        writer.write(**sample)
    with tarfile.open(tmp_path / "00000.tar") as tar:
        assert tar.getnames() == ["b.png", "b.txt", "c.png", "c.txt"]


def test_existing_shards_are_not_overwritten(tmp_path: Path, make_shards: MakeShards) -> None:
    make_shards(tmp_path, 3)
    with pytest.raises(ValueError, match="exists already"):
        make_shards(tmp_path, 3)
    with pytest.raises(ValueError, match="samples_per_shard=0"):
        ShardWriter(tmp_path, samples_per_shard=0)
