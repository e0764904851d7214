"""Finding samples in tars, this project's and others', and refusing tars that mean harm."""

from __future__ import annotations

import bz2
import dataclasses
import gzip
import lzma
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from t2i_experts.shards import index as index_module
from t2i_experts.shards.format import Manifest
from t2i_experts.shards.index import IndexFile, Row, open_index, scan

MakeShards = Callable[..., Path]
WriteTar = Callable[..., Path]


def contents(path: Path) -> dict[str, tuple[bytes, bytes, bytes]]:
    data = path.read_bytes()
    return {row.key: tuple(data[at : at + size] for at, size in (row.image, row.text, row.fields)) for row in scan(path).rows}  # type: ignore[misc]


def rows_of(index: IndexFile | tuple[Row, ...]) -> tuple[Row, ...]:
    if isinstance(index, tuple):
        return index
    data = index.path.read_bytes()
    starts = range(index.offset, len(data), index.row_bytes)
    assert [index.place(i) for i in range(len(starts))] == [(start, index.row_bytes) for start in starts]
    return tuple(index.unpack(data[start : start + index.row_bytes]) for start in starts)


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_all_kinds_of_headers(tmp_path: Path, format: int, write_tar: WriteTar) -> None:
    long = "0" * 90 if format == tarfile.USTAR_FORMAT else "长" * 200
    members = [
        ("./b.jpg", b"B"),
        ("./b.txt", b"bb"),
        (f"{long}.webp", b"L"),
        (f"{long}.json", b"{}"),
        ("sub/a.JPEG", b""),
        ("sub/a.txt", b"x"),
    ]
    assert contents(write_tar(tmp_path / "x.tar", members, format)) == {
        "b": (b"B", b"bb", b""),
        long: (b"L", b"", b"{}"),
        "sub/a": (b"", b"x", b""),
    }


def test_webdatasets_own_tars(tmp_path: Path, encode: Callable[..., bytes]) -> None:
    wds = pytest.importorskip("webdataset")
    images = {f"{i:03d}": encode(i) for i in range(4)}
    with wds.TarWriter(str(tmp_path / "x.tar")) as writer:
        for key, image in images.items():
            writer.write({"__key__": key, "png": image, "txt": f"caption {key}", "json": {"width": 16}})
    assert contents(tmp_path / "x.tar") == {key: (image, f"caption {key}".encode(), b'{"width": 16}') for key, image in images.items()}


def test_members_that_do_not_stand_together_are_joined(tmp_path: Path, write_tar: WriteTar) -> None:
    path = write_tar(
        tmp_path / "x.tar", [("b.jpg", b"B"), ("a.jpg", b"A"), ("a.txt", b"a"), ("c.t5.npz", b"?"), ("b.txt", b"b"), ("README", b"")]
    )
    found = scan(path)
    assert contents(path) == {"a": (b"A", b"a", b""), "b": (b"B", b"b", b"")}
    assert found.unsorted == "b" and [key for key, _ in found.incomplete] == ["c"]


def test_incomplete_samples_are_named(tmp_path: Path, write_tar: WriteTar) -> None:
    members = [
        ("a.jpg", b""),
        ("b.txt", b""),
        ("c.jpg", b""),
        ("c.png", b""),
        ("c.txt", b""),
        ("d.jpg", b""),
        ("d.jpg", b""),
        ("d.txt", b""),
    ]
    found = scan(write_tar(tmp_path / "x.tar", members))
    assert len(found.rows) == 0
    reasons = dict(found.incomplete)
    assert (
        "no caption" in reasons["a"]
        and "no image" in reasons["b"]
        and "several images" in reasons["c"]
        and "two members .jpg" in reasons["d"]
    )


@pytest.mark.parametrize("name", ["/tmp/a.jpg", "../a.jpg", "a/../../b.jpg"])
def test_paths_that_leave_the_folder_are_refused(tmp_path: Path, name: str, write_tar: WriteTar) -> None:
    with pytest.raises(ValueError, match="absolute path or"):
        scan(write_tar(tmp_path / "x.tar", [("a.jpg", b"A"), ("a.txt", b"a"), (name, b"")]))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_refused(tmp_path: Path, kind: bytes) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        info = tarfile.TarInfo("a.jpg")
        info.type, info.linkname = kind, "/etc/passwd"
        tar.addfile(info)
    with pytest.raises(ValueError, match="no plain file"):
        scan(tmp_path / "x.tar")


def test_damaged_tars_are_refused(tmp_path: Path, write_tar: WriteTar) -> None:
    path = write_tar(tmp_path / "x.tar", [(f"{i}.jpg", bytes(5000)) for i in range(5)])
    data = path.read_bytes()
    for broken in (data[:7000], b"\xff" * 2000, data[:5632] + b"\xff" * 512 + data[6144:], data + data, data[:28160]):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match="cannot be read as an uncompressed tar"):
            scan(path)


def test_compressed_tars_are_named_with_the_command_that_undoes_it(tmp_path: Path, write_tar: WriteTar) -> None:
    (tmp_path / "my shards").mkdir()
    path = write_tar(tmp_path / "my shards" / "x.tar", [("a.jpg", b"A"), ("a.txt", b"a")])
    data = path.read_bytes()
    packed = {"gunzip": gzip.compress(data), "bunzip2": bz2.compress(data), "unxz": lzma.compress(data)}
    packed["unzstd"] = b"\x28\xb5\x2f\xfd" + data[:100]  # only its first bytes are looked at
    for command, compressed in packed.items():
        path.write_bytes(compressed)
        with pytest.raises(ValueError, match=f"-compressed; .*: {command} < '{path}' >"):
            scan(path)


def test_the_index_file_says_what_a_scan_finds(tmp_path: Path, make_shards: MakeShards, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = Manifest.load(make_shards(tmp_path, 12)).shards[1]
    scanned = scan(tmp_path / entry.file).rows
    with monkeypatch.context() as patch:
        patch.setattr(index_module, "scan", None)  # the file is enough
        index = open_index(tmp_path, entry)
    assert isinstance(index, IndexFile) and rows_of(index) == scanned


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "garbage", "another shard's"])
def test_an_index_file_that_does_not_fit_is_not_believed(tmp_path: Path, make_shards: MakeShards, damage: str) -> None:
    entries = Manifest.load(make_shards(tmp_path, 10)).shards
    path = tmp_path / "00000.index"
    match damage:
        case "missing":
            path.unlink()
        case "empty":
            path.write_bytes(b"")
        case "cut":
            path.write_bytes(path.read_bytes()[:-8])
        case "garbage":
            path.write_bytes(os.urandom(2000))
        case _:
            path.write_bytes((tmp_path / "00001.index").read_bytes())
    assert open_index(tmp_path, entries[0]) == scan(tmp_path / "00000.tar").rows


def test_a_tar_that_is_not_the_manifests_is_refused(tmp_path: Path, make_shards: MakeShards) -> None:
    entry = Manifest.load(make_shards(tmp_path, 5)).shards[0]
    with pytest.raises(ValueError, match="is missing: run `t2i-experts shards check"):
        open_index(tmp_path, dataclasses.replace(entry, file="00009.tar"))
    with pytest.raises(ValueError, match="5 samples where the manifest says 6"):
        open_index(tmp_path, dataclasses.replace(entry, samples=6))
    with open(tmp_path / entry.file, "ab") as file:
        file.write(bytes(512))
    with pytest.raises(ValueError, match="bytes where the manifest says"):
        open_index(tmp_path, entry)
