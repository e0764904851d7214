"""Sizes of the pictures of a shard: upright, from headers alone, read once and kept beside the tar."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from t2i_experts.shards import sizes as sizes_module
from t2i_experts.shards.format import Manifest
from t2i_experts.shards.index import scan
from t2i_experts.shards.sizes import shard_sizes
from t2i_experts.shards.writer import ShardWriter

Encode = Callable[..., bytes]
KINDS = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}


@pytest.fixture
def folder(tmp_path: Path, encode: Encode) -> Path:
    """Eight pictures of 30 + i by 20 pixels, of three kinds, of which 1, 4, ... are turned by EXIF; the last one is a large WebP."""
    turned = Image.Exif()
    turned[0x0112] = 6
    with ShardWriter(tmp_path / "shards") as writer:
        for i in range(8):
            extension, kind = list(KINDS.items())[i % 3]
            options = {"exif": turned.tobytes()} if i % 4 == 1 else {}
            writer.write(f"{i}", encode(i, (30 + i, 20), kind, **options), extension, ["a"], {})
        noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 200, 3), dtype=np.uint8))
        noise.save(tmp_path / "noise.webp", lossless=True)
        writer.write("8", (tmp_path / "noise.webp").read_bytes(), "webp", ["a"], {})
    return tmp_path / "shards"


EXPECTED = [[30, 20], [20, 31], [32, 20], [33, 20], [34, 20], [20, 35], [36, 20], [37, 20], [200, 300]]


def test_sizes_are_upright_and_in_the_order_of_the_index(folder: Path) -> None:
    (entry,) = Manifest.load(folder).shards
    assert scan(folder / entry.file).rows[8].image[1] > 2**16, "more than is read first"
    assert shard_sizes(folder, entry).tolist() == EXPECTED


def test_they_are_read_once_and_again_when_the_file_does_not_fit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (entry,) = Manifest.load(folder).shards
    first = shard_sizes(folder, entry)
    kept = folder / "00000.sizes"
    whole = kept.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(sizes_module, "upright_size", None)  # the file is enough
        assert (shard_sizes(folder, entry) == first).all()
    for damaged in (b"", whole[:-8], os.urandom(200), whole.replace(entry.sha256.encode(), b"0" * 64)):
        kept.write_bytes(damaged)
        assert (shard_sizes(folder, entry) == first).all()
        assert kept.read_bytes() == whole


def test_a_folder_that_cannot_be_written_to(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (entry,) = Manifest.load(folder).shards

    def refuse(*arguments: object) -> None:
        raise PermissionError("read-only file system")

    monkeypatch.setattr(sizes_module, "write_atomically", refuse)
    assert shard_sizes(folder, entry).tolist() == EXPECTED
    assert not (folder / "00000.sizes").exists()


def test_broken_headers_are_zero_and_a_broken_tar_is_a_plain_error(folder: Path) -> None:
    (entry,) = Manifest.load(folder).shards
    tar = folder / entry.file
    row = scan(tar).rows[2]
    with open(tar, "r+b") as file:
        file.seek(row.image[0])
        file.write(bytes(16))
    assert shard_sizes(folder, entry).tolist() == [*EXPECTED[:2], [0, 0], *EXPECTED[3:]]
    (folder / "00000.sizes").unlink()
    tar.unlink()
    with pytest.raises(ValueError, match=r"00000\.tar"):
        shard_sizes(folder, entry)
