"""Shards get embeddings: of every caption, byte for byte the same however often the work was interrupted and by whomever it was done."""

from __future__ import annotations

import errno
import multiprocessing
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from t2i_experts.shards import embed as embed_module
from t2i_experts.shards.check import check_shards
from t2i_experts.shards.embed import EmbedResult, embed_shards
from t2i_experts.shards.format import MANIFEST, EncoderRecord, Manifest
from t2i_experts.shards.reader import ShardReader
from t2i_experts.types import TextFeatures
from tests.shards.conftest import MakeShards
from tests.shards.test_check import append

T5 = EncoderRecord("T5", "t5", "a/t5", "float32", "1" * 64, max_tokens=16, width=4, pooled_width=0)
CLIP = EncoderRecord("clip", "clip_text", "a/clip", "float32", "2" * 64, max_tokens=9, width=3, pooled_width=2)


def encode(captions: Sequence[str]) -> Mapping[str, list[TextFeatures]]:
    """Features that are functions of the caption alone."""

    def one(record: EncoderRecord, caption: str) -> TextFeatures:
        generator = torch.Generator().manual_seed(zlib.crc32(f"{record.name}{caption}".encode()))
        tokens = torch.randn(len(caption) if "7" not in caption else 0, record.width, generator=generator).bfloat16()
        pooled = torch.randn(record.pooled_width, generator=generator).bfloat16() if record.pooled_width else None
        return TextFeatures(tokens, pooled)

    return {record.name: [one(record, caption) for caption in captions] for record in (T5, CLIP)}


def embed(folder: Path, out: Path, records: Sequence[EncoderRecord] = (T5, CLIP), **options: int) -> EmbedResult:
    return embed_shards(folder, out, records, encode, **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def source(tmp_path: Path, make_shards: MakeShards) -> Path:
    return make_shards(tmp_path / "source", 18)


@pytest.mark.parametrize("indexed", [True, False])
def test_every_caption_gets_its_own(source: Path, tmp_path: Path, indexed: bool) -> None:
    result = embed(source, tmp_path / "out")
    assert result.manifest == Manifest.load(tmp_path / "out") and result.manifest.embeddings == (T5, CLIP)
    assert (result.tars, result.samples, result.captions) == (4, 18, 36)
    if not indexed:
        for path in (tmp_path / "out").glob("*.index"):
            path.unlink()
    plain = ShardReader([source], size=16, seed=3)
    reader = ShardReader([tmp_path / "out"], size=16, seed=3, embeddings=["clip", "T5"])
    for i in range(18):
        raw, before = reader.raw(i), plain.raw(i)
        assert (raw.key, raw.image, raw.captions, raw.metadata) == (before.key, before.image, before.captions, before.metadata)
        for name, expected in encode(raw.captions).items():
            assert [f.tokens.tolist() for f in raw.features[name]] == [f.tokens.tolist() for f in expected]
            assert [f.pooled is None or f.pooled.tolist() for f in raw.features[name]] == [
                f.pooled is None or f.pooled.tolist() for f in expected
            ]
    for position in range(40):  # the features are those of the caption that was drawn
        sample = reader[position]
        for name, (wanted,) in encode([sample.caption]).items():
            assert torch.equal(sample.features[name].tokens, wanted.tokens)
    online = ShardReader([tmp_path / "out"], size=16, seed=3)
    assert [online[p].caption for p in range(40)] == [reader[p].caption for p in range(40)] and not online[0].features


def test_processes_share_the_tars_and_the_last_one_writes_the_manifest(source: Path, tmp_path: Path) -> None:
    embed(source, tmp_path / "one")
    first = embed(source, tmp_path / "two", rank=1, world_size=2)
    assert first.manifest is None and not (tmp_path / "two" / MANIFEST).exists()
    with pytest.raises(ValueError, match="manifest"):
        ShardReader([tmp_path / "two"], size=1, seed=0)
    second = embed(source, tmp_path / "two", rank=0, world_size=2)
    assert second.manifest is not None and first.tars == second.tars == 2
    processes = [
        multiprocessing.get_context("fork").Process(target=embed, args=(source, tmp_path / "three"), kwargs={"rank": rank, "world_size": 5})
        for rank in range(5)  # one more than there are tars
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "two") == contents(tmp_path / "three")


def test_a_killed_run_goes_on_after_its_last_complete_tar(source: Path, tmp_path: Path) -> None:
    calls: list[int] = []

    def dying(captions: Sequence[str]) -> Mapping[str, list[TextFeatures]]:
        calls.append(len(captions))
        if len(calls) == 3:
            (tmp_path / "out" / ".00002.tar.partial").write_bytes(b"what a SIGKILL leaves")
            raise KeyboardInterrupt
        return encode(captions)

    embed(source, tmp_path / "unbroken")
    with pytest.raises(KeyboardInterrupt):
        embed_shards(source, tmp_path / "out", (T5, CLIP), dying)
    assert embed(source, tmp_path / "out").tars == 2
    assert contents(tmp_path / "out") == contents(tmp_path / "unbroken")
    assert embed(source, tmp_path / "out").tars == 0  # and a run that is whole stays as it is
    assert contents(tmp_path / "out") == contents(tmp_path / "unbroken")


def test_embedding_again_replaces(source: Path, tmp_path: Path) -> None:
    embed(source, tmp_path / "out")
    embed(tmp_path / "out", tmp_path / "again", records=[replace(T5, fingerprint="3" * 64)])
    (record,) = Manifest.load(tmp_path / "again").embeddings
    assert record.fingerprint == "3" * 64 and check_shards(tmp_path / "again").notes == []


def test_a_sample_that_cannot_be_read_is_left_out_and_named(source: Path, tmp_path: Path) -> None:
    tar = source / "00001.tar"
    data = tar.read_bytes()
    at = data.index(b"\x89PNG")
    tar.write_bytes(data[:at] + b"no" + data[at + 2 :])
    result = embed(source, tmp_path / "out")
    (what,) = result.unreadable
    assert what.key == "00005" and result.manifest is not None and result.manifest.samples == 17
    assert check_shards(tmp_path / "out").problems == []


@pytest.mark.parametrize("most", [1, 1500])
def test_samples_are_read_by_so_many_bytes_at_once(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """One that alone has more comes alone, and what is written does not change."""
    embed(source, tmp_path / "whole")
    pread, reading, progress = os.pread, [0], list[int]()

    def counted(file: int, size: int, offset: int) -> bytes:
        reading[-1] += size
        return pread(file, size, offset)

    def encode_after(captions: Sequence[str]) -> Mapping[str, list[TextFeatures]]:
        reading.append(0)
        return encode(captions)

    monkeypatch.setattr(embed_module, "_BYTES_AT_ONCE", most)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pread", counted)
        embed_shards(source, tmp_path / "out", (T5, CLIP), encode_after, progress=lambda done, total: progress.append(done))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    pieces = len(reading) - 1
    assert pieces == 18 if most == 1 else 4 < pieces < 18 and max(reading) <= most
    assert progress == sorted(progress) and progress[-1] == 18


def test_a_disk_that_fails_is_an_error_that_names_the_tar(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The samples are not left out, as broken ones are: the same command goes on when the disk does."""

    def failing(file: int, size: int, offset: int) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch, pytest.raises(OSError, match=r"Input/output error: '\S+/source/00000\.tar'$"):
        patch.setattr(os, "pread", failing)
        embed(source, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.tar"))
    assert embed(source, tmp_path / "out").samples == 18


def test_what_does_not_fit_is_refused(source: Path, tmp_path: Path, make_shards: MakeShards) -> None:
    out = tmp_path / "out"
    embed(source, out, rank=0, world_size=2)
    before = contents(out)
    with pytest.raises(ValueError, match=r"T5.fingerprint is '1111.* there and '3333"):
        embed(source, out, records=(replace(T5, fingerprint="3" * 64), CLIP))
    with pytest.raises(ValueError, match=r"T5.max_tokens is 16 there and 12 here"):
        embed(source, out, records=(replace(T5, max_tokens=12), CLIP))
    with pytest.raises(ValueError, match="embeddings of T5, clip, and not of T5"):
        embed(source, out, records=(T5,))
    with pytest.raises(ValueError, match="not made from this source"):
        embed(make_shards(tmp_path / "other", 18, first=3), out)
    with pytest.raises(ValueError, match="not made from this source"):
        embed(source, make_shards(tmp_path / "taken", 3))
    with pytest.raises(ValueError, match="is the folder itself"):
        embed(source, source / ".")
    with pytest.raises(ValueError, match="nothing but case"):
        embed(source, tmp_path / "new", records=(T5, replace(CLIP, name="t5")))
    with pytest.raises(ValueError, match=r"rank=2 must lie in \[0, world-size\) = \[0, 2\)"):
        embed(source, tmp_path / "new", rank=2, world_size=2)
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds notes\.txt"):
        embed(source, tmp_path / "new")
    assert embed(source, out, records=(replace(T5, model="elsewhere"), CLIP), rank=0, world_size=2).tars == 0
    assert contents(out) == before


def test_a_reader_refuses_what_its_folders_do_not_hold(source: Path, tmp_path: Path) -> None:
    embed(source, tmp_path / "one")
    embed(source, tmp_path / "two", records=(T5, replace(CLIP, fingerprint="4" * 64)))
    with pytest.raises(ValueError, match=r"source holds no embeddings of the encoders T5 \(it has: none\).*shards embed"):
        ShardReader([tmp_path / "one", source], size=1, seed=0, embeddings=["T5"])
    with pytest.raises(ValueError, match=r"no embeddings of the encoders t5 \(it has: T5, clip\)"):
        ShardReader([tmp_path / "one"], size=1, seed=0, embeddings=["t5"])
    with pytest.raises(ValueError, match=r"two and .*one hold embeddings of different encoders: clip.fingerprint is '4444.*'2222"):
        ShardReader([tmp_path / "one", tmp_path / "two"], size=1, seed=0, embeddings=["T5", "clip"])
    assert len(ShardReader([tmp_path / "one", tmp_path / "two"], size=1, seed=0, embeddings=["T5"]).raw(20).features) == 1


def test_check_accepts_embeddings_and_finds_broken_and_lonely_ones(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    embed(source, out)
    before = contents(out)
    report = check_shards(out)
    assert (report.problems, report.left_out, report.notes) == ([], [], [])
    (out / MANIFEST).unlink()  # the index files say it too
    check_shards(out, write_manifest=True)
    assert contents(out) == before
    append(out / "00003.tar", ("nobody.t5.npz", b"?"), ("00017.depth.npz", b"?"))
    report = check_shards(out, write_manifest=True)
    assert [(p.key, p.detail) for p in report.left_out] == [("nobody", "its embeddings belong to no sample")]
    assert [note for note in report.notes if ".depth.npz" in note] and report.manifest.samples == 18
    tar = out / "00001.tar"
    data = tar.read_bytes()
    at = data.index(b"tokens.npy")
    tar.write_bytes(data[:at] + b"broken" + data[at + 6 :])
    problems = [p for p in check_shards(out).problems if p.key]
    assert [p.key for p in problems] == ["00005"] and "t5.npz cannot be read" in problems[0].detail
    reader = ShardReader([out], size=4, seed=0, embeddings=["T5"])
    assert any(what.key == "00005" for position in range(18) for what in reader[position].unreadable)
