"""What a check finds, and what a manifest then leaves out."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from t2i_experts.shards.check import Problem, check_shards
from t2i_experts.shards.format import MANIFEST, Manifest

MakeShards = Callable[..., Path]
Encode = Callable[..., bytes]


def append(tar: Path, *members: tuple[str, bytes]) -> None:
    with tarfile.open(tar, "a") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def details(problems: list[Problem]) -> dict[str, str]:
    return {problem.key or problem.shard: problem.detail for problem in problems}


def test_good_shards(tmp_path: Path, make_shards: MakeShards) -> None:
    manifest = Manifest.load(make_shards(tmp_path, 12))
    told: list[tuple[int, int]] = []
    for workers in (1, 3):
        report = check_shards(tmp_path, workers=workers, progress=lambda done, total: told.append((done, total)))
        assert (report.problems, report.left_out, report.notes) == ([], [], []) and report.manifest == manifest
    assert told[-1] == (12, 12)


def test_writing_the_manifest_anew_restores_every_byte(tmp_path: Path, make_shards: MakeShards) -> None:
    files = {path: path.read_bytes() for path in make_shards(tmp_path, 12).iterdir()}
    for path in [*tmp_path.glob("*.index"), tmp_path / MANIFEST]:
        path.unlink()
    assert details(check_shards(tmp_path).problems)[MANIFEST].startswith("is missing")
    assert not (tmp_path / MANIFEST).exists()
    assert not check_shards(tmp_path, write_manifest=True).problems
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == files


def test_differences_from_the_manifest(tmp_path: Path, make_shards: MakeShards) -> None:
    make_shards(tmp_path, 20)
    first = (tmp_path / "00000.tar").read_bytes()
    (tmp_path / "00000.tar").write_bytes(first.replace(b"0/0", b"9/9"))
    (tmp_path / "00001.tar").write_bytes((tmp_path / "00001.tar").read_bytes() + bytes(512))
    (tmp_path / "00002.tar").unlink()
    (tmp_path / "extra.tar").write_bytes(first)
    found = details(check_shards(tmp_path).problems)
    assert set(found) == {"00000.tar", "00001.tar", "00002.tar", "extra.tar"}
    assert "content has changed" in found["00000.tar"] and "bytes where the manifest says" in found["00001.tar"]
    assert "no such file" in found["00002.tar"] and "not in the manifest" in found["extra.tar"]


def test_broken_samples_are_found_then_left_out_then_expected(tmp_path: Path, make_shards: MakeShards, encode: Encode) -> None:
    make_shards(tmp_path, 4)
    (tmp_path / MANIFEST).unlink()
    image = encode(0)
    bad = {
        "truncated": [("png", image[: len(image) // 2]), ("txt", b"x")],
        "nopicture": [("jpg", b"<html>"), ("txt", b"x")],
        "empty": [("png", image), ("txt", b" \n")],
        "latin": [("png", image), ("txt", b"caf\xe9")],
        "badjson": [("png", image), ("json", b"{")],
        "alone": [("png", image)],
        "textonly": [("txt", b"x")],
        "twice": [("png", image), ("png", image), ("txt", b"x")],
    }
    append(tmp_path / "00000.tar", *((f"{key}.{extension}", data) for key, members in bad.items() for extension, data in members))
    assert set(details(check_shards(tmp_path).problems)) == {*bad, MANIFEST}
    report = check_shards(tmp_path, write_manifest=True, workers=2)
    assert not report.problems and set(details(report.left_out)) == set(bad)
    manifest = Manifest.load(tmp_path)
    assert manifest.samples == 4 and set(manifest.shards[0].skipped) == set(list(bad)[:5])
    again = check_shards(tmp_path)
    assert not again.problems and set(details(again.left_out)) == set(bad) and again.manifest == manifest


def test_an_unreadable_tar_is_a_problem_and_the_others_are_used(tmp_path: Path, make_shards: MakeShards) -> None:
    make_shards(tmp_path, 10)
    (tmp_path / "00000.tar").write_bytes(b"\xff" * 2000)
    assert set(details(check_shards(tmp_path).problems)) == {"00000.tar"}
    report = check_shards(tmp_path, write_manifest=True)
    assert set(details(report.problems)) == {"00000.tar"} and [shard.file for shard in Manifest.load(tmp_path).shards] == ["00001.tar"]


def test_notes(tmp_path: Path, make_shards: MakeShards, encode: Encode) -> None:
    make_shards(tmp_path, 6)
    append(tmp_path / "00000.tar", ("x.png", encode(0)), ("00005.png", encode(0)), ("00005.txt", b"again"), ("x.txt", b"x"))
    report = check_shards(tmp_path, write_manifest=True)
    assert not report.problems and report.manifest.samples == 8
    assert any("00000.tar is not sorted: the members of 'x'" in note for note in report.notes)
    assert any("1 keys occur in more than one tar, such as '00005'" in note for note in report.notes)


def test_errors(tmp_path: Path, make_shards: MakeShards) -> None:
    with pytest.raises(ValueError, match="holds no tars"):
        check_shards(tmp_path)
    with pytest.raises(ValueError, match="not found"):
        check_shards(tmp_path / "none")
    append(tmp_path / "x.tar", ("a.png", b"broken"), ("a.txt", b"x"))
    with pytest.raises(ValueError, match=r"no good sample, and 1 problem, such as x\.tar 'a': it is no picture"):
        check_shards(tmp_path, write_manifest=True)
    assert not (tmp_path / MANIFEST).exists()
    make_shards(tmp_path / "b", 2)
    (tmp_path / "b" / MANIFEST).write_text(json.dumps({}))
    with pytest.raises(ValueError, match="damaged"):
        check_shards(tmp_path / "b")
    assert not check_shards(tmp_path / "b", write_manifest=True).problems
