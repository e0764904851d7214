"""img2dataset's output as a source: samples are read where they lie, and what is broken is left out and named."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from t2i_experts.shards.build import BuildOptions, build_shards
from t2i_experts.shards.format import Manifest
from t2i_experts.shards.reader import ShardReader
from t2i_experts.shards.sources import Skipped
from t2i_experts.shards.tars import img2dataset_source

Encode = Callable[..., bytes]
WriteTar = Callable[..., Path]
MakeShards = Callable[..., Path]


@pytest.fixture
def downloaded(tmp_path: Path, encode: Encode, write_tar: WriteTar) -> Path:
    """Two tars as img2dataset writes them, with its other files beside them."""
    folder = tmp_path / "laion"
    folder.mkdir()
    for shard in range(2):
        members = {}
        for i in range(3):
            key = f"{shard:05d}{i:04d}"
            fields = {"key": key, "caption": f"caption {key}", "similarity": 0.1 * (3 * shard + i), "status": "success", "exif": "{}"}
            if key == "000010001":
                fields["similarity"] = float("nan")
            members |= {f"{key}.jpg": encode(3 * shard + i, (40, 30), "JPEG"), f"{key}.txt": f"caption {key}".encode()}
            members[f"{key}.json"] = json.dumps(fields, indent=4).encode()
        write_tar(folder / f"{shard:05d}.tar", members)
        (folder / f"{shard:05d}.parquet").write_bytes(b"PAR1")
        (folder / f"{shard:05d}_stats.json").write_text("{}")
    return folder


def test_records_are_places_in_the_tars(downloaded: Path) -> None:
    records = list(img2dataset_source(downloaded, None, Skipped()))
    assert [record.name for record in records] == [f"{s:05d}/{s:05d}{i:04d}" for s in range(2) for i in range(3)]
    assert records[4].captions == ("caption 000010001",) and records[4].file == downloaded / "00001.tar"
    assert records[4].metadata == {"key": "000010001", "similarity": None, "status": "success", "exif": "{}"}
    with tarfile.open(downloaded / "00001.tar") as tar:
        assert records[4].read() == tar.extractfile("000010001.jpg").read()  # type: ignore[union-attr]


def test_build_from_tars_with_where(downloaded: Path, tmp_path: Path) -> None:
    manifest, skipped = build_shards(downloaded, tmp_path / "out", None, BuildOptions(where="similarity > 0.15", workers=2))
    assert manifest.samples == 3
    assert skipped.counts == {"left out by --where": 2, "--where: no value of similarity": 1}
    assert skipped.first["--where: no value of similarity"] == ["00001/000010001"]
    raw = ShardReader([tmp_path / "out"], size=8, seed=0).raw(0)
    assert raw.key == "00000_000000002" and raw.metadata["file"] == "00000/000000002" and raw.metadata["similarity"] == 0.2


def test_what_is_broken_is_left_out_and_named(downloaded: Path, encode: Encode, write_tar: WriteTar) -> None:
    picture = encode(0, (8, 8), "PNG")
    members = {"a.png": picture, "a.txt": b"\xff", "b.png": picture, "c.png": picture, "c.json": b"[]", "d.txt": b"x", "e.png": picture}
    write_tar(downloaded / "00002.tar", {**members, "e.txt": b" \n"})
    tar = downloaded / "00001.tar"
    tar.write_bytes(tar.read_bytes()[:5000])
    skipped = Skipped()
    records = list(img2dataset_source(downloaded, None, skipped))
    assert len(records) == 3 and not any(record.file.name != "00000.tar" for record in records)
    assert skipped.counts == {"tar cannot be read": 1, "sample of a tar is incomplete": 2, "sample's caption cannot be read": 3}
    assert "00001.tar" in skipped.first["tar cannot be read"][0]
    assert skipped.first["sample of a tar is incomplete"][0].startswith("00002/b: it has no caption")


def test_shards_can_be_built_from_shards(tmp_path: Path, make_shards: MakeShards) -> None:
    """Filtered and cut anew: the pictures, captions and fields stay."""
    make_shards(tmp_path / "a", 12, per_shard=5)
    build_shards(tmp_path / "a", tmp_path / "b", None, BuildOptions(4, where="i >= 2 and i != 5"))
    assert [shard.samples for shard in Manifest.load(tmp_path / "b").shards] == [4, 4, 1]
    old, new = (ShardReader([tmp_path / name], size=8, seed=0) for name in "ab")
    for index, i in enumerate(i for i in range(2, 12) if i != 5):
        assert (new.raw(index).image, new.raw(index).captions) == (old.raw(i).image, old.raw(i).captions)
        assert new.raw(index).metadata["i"] == i


def test_mistakes(tmp_path: Path, downloaded: Path) -> None:
    with pytest.raises(ValueError, match="--images"):
        list(img2dataset_source(downloaded, tmp_path, Skipped()))
    with pytest.raises(ValueError, match="holds no tars"):
        list(img2dataset_source(tmp_path, None, Skipped()))
