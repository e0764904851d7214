"""Shards behind URLs: every sample once an epoch over ranks and workers, whatever fails on the way is tried again or named."""

from __future__ import annotations

import gzip
import io
import multiprocessing
import tarfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from t2i_experts.shards import stream, tar_stream
from t2i_experts.shards.index import scan
from t2i_experts.shards.reader import Sample, ShardReader, Unreadable
from t2i_experts.shards.stream import StreamReader, open_batches, open_reader
from t2i_experts.shards.tar_stream import StreamedSample, read_tar
from t2i_experts.shards.urls import expand_urls

MakeShards = Callable[..., Path]
Encode = Callable[..., bytes]


def collate(samples: Sequence[Sample]) -> Sequence[Sample]:
    return samples


def ranks(reader: StreamReader, stop: int, *, start: int = 0, batch_size: int = 8, world_size: int = 1, workers: int = 0) -> Any:
    """The batches of each rank."""
    options: dict[str, Any] = {"start": start, "stop": stop, "batch_size": batch_size, "accumulation": 1}
    return [list(open_batches(reader, collate, rank=i, world_size=world_size, workers=workers, **options)) for i in range(world_size)]


def samples(*arguments: Any, **options: Any) -> list[Sample]:
    """All samples, joined batch by batch."""
    return [sample for step in zip(*ranks(*arguments, **options), strict=True) for batch in step for sample in batch]


@pytest.fixture
def url(tmp_path: Path, make_shards: MakeShards, tar_server: Any) -> str:
    """Four tars of eight samples."""
    make_shards(tmp_path / "shards", 32, per_shard=8)
    return f"{tar_server.url}/shards/{{00000..00003}}.tar"


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("workers", [0, 2])
def test_every_epoch_holds_every_sample_once(tmp_path: Path, url: str, world_size: int, workers: int) -> None:
    reader = StreamReader([url], size=4, seed=5)
    found = samples(reader, 64, world_size=world_size, workers=workers)
    assert [sample.position for sample in found] == list(range(64))
    orders = [[sample.key for sample in found[first : first + 32]] for first in (0, 32)]
    everything = [f"{i:05d}" for i in range(32)]
    assert sorted(orders[0]) == sorted(orders[1]) == everything
    assert everything != orders[0] != orders[1]
    local = ShardReader([tmp_path / "shards"], size=4, seed=5)
    for sample in found:
        i = int(sample.key)
        assert torch.equal(sample.image, local.item(i).image) and sample.metadata == {"i": i} and not sample.unreadable
        assert sample.caption in {f"{i}/{j}" for j in range(1 + i % 3)}
    assert len({sample.caption for sample in found}) > 32, "captions are drawn anew in each epoch"


def test_the_order_depends_on_the_seed_and_on_where_the_run_goes_on(url: str) -> None:
    def keys(seed: int, start: int) -> tuple[str, ...]:
        found = samples(StreamReader([url], size=4, seed=seed), start + 32, start=start)
        assert [sample.position for sample in found] == list(range(start, start + 32))
        return tuple(sample.key for sample in found)

    assert len({keys(0, 0), keys(1, 0), keys(0, 8)}) == 3 and keys(0, 8) == keys(0, 8)


def test_unequal_shares_give_equal_batches(tmp_path: Path, make_shards: MakeShards) -> None:
    """Three tars of 5, 5 and 1 samples for two processes with three workers each."""
    make_shards(tmp_path, 11)
    reader = StreamReader([f"file://{tmp_path}/{{00000..00002}}.tar"], size=4, seed=0)
    batches = ranks(reader, 48, world_size=2, workers=3)
    assert [[len(batch) for batch in rank] for rank in batches] == [[4] * 6, [4] * 6]
    assert sorted(sample.position for rank in batches for batch in rank for sample in batch) == list(range(48))
    with pytest.raises(ValueError, match=r"has 3 tars for 4 processes"):
        open_reader([f"file://{tmp_path}/{{00000..00002}}.tar"], size=4, seed=0, processes=4)


@pytest.mark.parametrize("workers", [0, 2])
def test_what_fails_at_first_is_tried_again(url: str, tar_server: Any, workers: int) -> None:
    for i, answers in enumerate(([503, 429], ["cut"], [500, "cut", 503, "cut"], [])):
        tar_server.answers[f"shards/0000{i}.tar"] = answers
    found = samples(StreamReader([url], size=4, seed=0), 32, workers=workers)
    assert sorted(sample.key for sample in found) == [f"{i:05d}" for i in range(32)]
    assert not any(sample.unreadable for sample in found)
    assert [tar_server.requests[f"shards/0000{i}.tar"] for i in range(4)] == [3, 2, 5, 1]


def test_a_tar_that_stays_unreadable_is_named_and_left_out(tmp_path: Path, url: str, tar_server: Any) -> None:
    tar_server.answers["shards/00001.tar"] = [503] * 1000
    (tmp_path / "shards/00002.tar").unlink()
    found = samples(StreamReader([url], size=4, seed=1), 64)
    assert {sample.key for sample in found} == {f"{i:05d}" for i in (*range(8), *range(24, 32))}
    named = [what for sample in found for what in sample.unreadable]
    assert {(what.shard[-9:], what.key, what.why) for what in named} == {
        ("00001.tar", None, "HTTP Error 503: Service Unavailable"),
        ("00002.tar", None, "HTTP Error 404: Not Found"),
    }
    assert named[-1].draws == 8, "as many as the other tars hold"
    assert tar_server.requests["shards/00001.tar"] == 5 * sum("503" in what.why for what in named)
    assert tar_server.requests["shards/00002.tar"] == sum("404" in what.why for what in named), "what is not there is asked for once"


def test_a_tar_that_breaks_off_for_good_gives_what_it_has(url: str, tar_server: Any) -> None:
    tar_server.answers["shards/00001.tar"] = ["cut"] * 1000
    found = list(read_tar(expand_urls([url])[1]))
    assert [part.key for part in found] == ["00008", "00009", "00010", "00011", None]
    assert isinstance(found[-1], Unreadable) and "it ends within" in found[-1].why and "after 4 samples" in found[-1].why
    assert tar_server.requests["shards/00001.tar"] == 2, "the same damage twice is the tar's own"


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_left_to_read_is_an_error(tmp_path: Path, url: str, tar_server: Any, workers: int) -> None:
    for i in range(4):
        tar_server.answers[f"shards/0000{i}.tar"] = [503] * 1000
    with pytest.raises(ValueError, match=r"shards/0000\d\.tar: HTTP Error 503: [^\n]* 4 tars in a row"):
        samples(StreamReader([url], size=4, seed=0), 32, workers=workers)
    tar = tmp_path / "shards/00000.tar"
    tar.write_bytes(tar.read_bytes().replace(b"IDAT", b"IDAX"))
    with pytest.raises(ValueError, match=r"sample '0000\d': [^\n]* 1 tars in a row"):
        samples(StreamReader([f"file://{tar}"], size=4, seed=0), 32)


def test_an_error_does_not_wait_for_the_same_tar_again(url: str, tar_server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of two shares of two tars comes upon one of them several times before the other, in epochs of one tar each."""
    waited: list[float] = []
    monkeypatch.setattr(tar_stream.time, "sleep", waited.append)
    tar_server.answers = defaultdict(lambda: [503] * 1000)
    first, second = (url.replace("{00000..00003}", f"0000{i}") for i in range(2))
    for seed in range(8):
        with pytest.raises(ValueError, match="2 tars in a row"):
            samples(StreamReader([first, second], size=4, seed=seed), 8, world_size=2)
    assert len(waited) == 8 * 8


def test_pipes(tmp_path: Path, make_shards: MakeShards, tar_server: Any) -> None:
    make_shards(tmp_path, 10)
    reader = StreamReader([f"pipe:cat '{tmp_path}/'{{00000..00001}}.tar"], size=4, seed=0)
    assert sorted(sample.key for sample in samples(reader, 10, batch_size=5, workers=2)) == [f"{i:05d}" for i in range(10)]
    for command, given, why in ((f"cat {tmp_path}/00000.tar; exit 3", 5, "exit code 3"), ("nothing-of-this-name", 0, "exit code 127")):
        *found, last = read_tar(f"pipe:{command} 2>/dev/null")
        assert len(found) == given and isinstance(last, Unreadable) and why in last.why


@pytest.mark.parametrize("protocol", ["file", "memory"])
def test_fsspec(tmp_path: Path, make_shards: MakeShards, tar_server: Any, protocol: str) -> None:
    fsspec = pytest.importorskip("fsspec")
    make_shards(tmp_path, 10)
    urls = [f"{protocol}://{tmp_path}/{i:05d}.tar" for i in range(3)]
    if protocol == "memory":
        for i, url in enumerate(urls[:2]):
            fsspec.filesystem("memory").pipe(url, (tmp_path / f"{i:05d}.tar").read_bytes())
    found = samples(StreamReader(urls, size=4, seed=0), 60, batch_size=5, workers=2)
    assert {sample.key for sample in found} == {f"{i:05d}" for i in range(10)}
    assert {(what.shard, what.key) for sample in found for what in sample.unreadable} == {(urls[2], None)}


@pytest.mark.parametrize("begun", [True, False])
@pytest.mark.parametrize("private", [True, False])
def test_workers_that_wait_for_data_keep_nobody_waiting(
    tmp_path: Path, make_shards: MakeShards, monkeypatch: pytest.MonkeyPatch, begun: bool, private: bool
) -> None:
    """private: whether torch has the names by which it is hastened. Without them it takes its own times, which are shortened here."""
    make_shards(tmp_path, 10, per_shard=10)
    monkeypatch.setattr(stream, "BUFFER_SAMPLES", 2)
    if not private:
        monkeypatch.delattr("torch._C._remove_worker_pids")
        monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.1)
    reader = StreamReader([f"pipe:cat {tmp_path}/00000.tar; sleep {i}" for i in (30, 31)], size=4, seed=0)
    options: dict[str, Any] = {"start": 0, "stop": None, "batch_size": 4, "accumulation": 1, "rank": 0, "world_size": 1, "workers": 2}
    batches = open_batches(reader, collate, **options)
    if begun:
        assert [len(next(batches)) for _ in range(2)] == [4, 4]
    started = time.monotonic()
    batches.close()
    assert not multiprocessing.active_children() and time.monotonic() - started < 3


def make_tar(members: Sequence[tuple[str, bytes]]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def test_samples_are_checked_as_in_folders(tmp_path: Path, encode: Encode) -> None:
    png = encode(0)
    broken = [
        ("a.png", png), ("a.txt", b" \n"),
        ("b.png", png[:60]), ("b.txt", b"cut"),
        ("c.png", png), ("c.json", b"{"),
        ("d.png", png), ("d.jpg", png), ("d.txt", b"two"),
        ("e.png", png), ("f.txt", b"f"), ("e.txt", b"apart"),
        ("g.png", png), ("g.txt", b"g"), ("g.txt", b"again"),
        ("h.png", png), ("h.txt", bytes(2**24 + 1)),
        (f"{'k' * 1100}.png", png),
        ("i.cls", b"7"),
    ]  # fmt: skip
    good = [("x/y.PNG", png), ("x/y.txt", b"good"), ("x/y.npz", b"other"), ("z.jpg", png), ("z.json", b'{"captions": ["good"], "n": NaN}')]
    (tmp_path / "0.tar").write_bytes(make_tar([*broken[:9], *good, *broken[9:]]))
    found = samples(StreamReader([f"file://{tmp_path}/0.tar"], size=4, seed=0), 2, batch_size=2)
    assert sorted((sample.key, sample.caption) for sample in found) == [("x/y", "good"), ("z", "good")]
    parts = list(read_tar(f"file://{tmp_path}/0.tar"))
    assert {part.key for part in parts if isinstance(part, StreamedSample)} == {"a", "b", "c", "x/y", "z"}, "these are decoded later"
    why = [(part.key, part.why) for part in parts if isinstance(part, Unreadable)]
    expected = [
        ("d", "several images"), ("e", "no caption"), ("f", "no image"), ("e", "no image"), ("g", "two members .txt"),
        ("h", "its txt has 16,777,217 bytes"), ("k" * 64 + "...", "longer than 1,024"), ("i", "no image"),
    ]  # fmt: skip
    assert [key for key, _ in why] == [key for key, _ in expected]
    assert all(words in reason for (_, reason), (_, words) in zip(why, expected, strict=True))
    more = samples(StreamReader([f"file://{tmp_path}/0.tar"], size=4, seed=0), 4, batch_size=2)
    assert {"a", "b", "c"} <= {what.key for sample in more for what in sample.unreadable}


def spoiled(tar: bytes) -> dict[str, tuple[bytes, str]]:
    member = tar.index(b"00001.png")
    end = len(tar.rstrip(b"\0")) // 512 * 512 + 512
    link = tarfile.TarInfo("link")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    long = tarfile.TarInfo("././@LongLink")
    long.type, long.size = tarfile.GNUTYPE_LONGNAME, 2**31
    return {
        "empty": (b"", "empty"),
        "no samples": (bytes(1024), "no samples"),
        "cut in a member": (tar[: member + 600], "ends within"),
        "cut in a header": (tar[: member + 100], "cut off"),
        "cut between members": (tar[:member], "cut off"),
        "without an end mark": (tar[:end], "cut off"),
        "a damaged header": (tar[:member] + b"\xff" * 512 + tar[member + 512 :], "damaged"),
        "two archives": (tar + tar, "second archive"),
        "compressed": (gzip.compress(tar), "is gzip-compressed"),
        "a page": (b"<html>" * 1000, ""),
        "a link": (link.tobuf() + tar, "no plain file"),
        "a name of 2 GiB": (long.tobuf() + tar, "claims"),
        "..": (make_tar([("../a.png", b"")]), "'..'"),
    }


@pytest.mark.parametrize("name", spoiled(b"00001.png"))
def test_a_damaged_tar_is_found_as_in_folders(tmp_path: Path, make_shards: MakeShards, tar_server: Any, name: str) -> None:
    make_shards(tmp_path / "a", 3)
    data, why = spoiled((tmp_path / "a/00000.tar").read_bytes())[name]
    tar = tmp_path / "0.tar"
    tar.write_bytes(data)
    last = list(read_tar(f"file://{tar}"))[-1]
    assert isinstance(last, Unreadable) and last.key is None and why in last.why
    if name != "no samples":
        with pytest.raises(ValueError):
            scan(tar)


def test_the_buffer_is_bounded(tmp_path: Path, make_shards: MakeShards, monkeypatch: pytest.MonkeyPatch) -> None:
    make_shards(tmp_path, 40, per_shard=40)
    reader = StreamReader([f"file://{tmp_path}/00000.tar"], size=4, seed=0)
    in_order = list(range(40))
    shuffled = [int(sample.key) for sample in samples(reader, 40)]
    monkeypatch.setattr(stream, "BUFFER_SAMPLES", 3)
    nearby = [int(sample.key) for sample in samples(reader, 40)]
    assert all(key <= place + 3 for place, key in enumerate(nearby)) and nearby != in_order
    assert not all(key <= place + 3 for place, key in enumerate(shuffled)) and sorted(shuffled) == sorted(nearby) == in_order
    monkeypatch.setattr(stream, "BUFFER_BYTES", 0)
    assert [int(sample.key) for sample in samples(reader, 40)] == in_order


def test_a_member_that_is_too_large_is_not_read(tmp_path: Path, encode: Encode, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "0.tar").write_bytes(make_tar([("a.png", bytes(10**7)), ("a.txt", b"a"), ("b.png", encode(0)), ("b.txt", b"b")]))
    sizes: list[int] = []
    read = tar_stream._Forward.read
    monkeypatch.setattr(tar_stream._Forward, "read", lambda self, size: sizes.append(size) or read(self, size))
    monkeypatch.setattr(tar_stream, "MAX_IMAGE_BYTES", 10**6)
    monkeypatch.setattr("t2i_experts.shards.index.MAX_IMAGE_BYTES", 10**6)
    first, second = read_tar(f"file://{tmp_path}/0.tar")
    assert isinstance(first, Unreadable) and first.why.startswith("its image has 10,000,000 bytes") and second.key == "b"
    assert max(sizes) <= 2**20


def test_urls() -> None:
    assert expand_urls(["http://a/{08..11}.tar", "pipe:x {a,b} | y '$1'"]) == [
        *(f"http://a/{i}.tar" for i in ("08", "09", "10", "11")), "pipe:x a | y '$1'", "pipe:x b | y '$1'",
    ]  # fmt: skip
    for url, why in (
        ("http://a/{0..9.tar", "Unbalanced"),
        ("http://a/{0..99999999}.tar", "stands for 100,000,000 tars; at most 1,048,576"),
        ("nothing://a/0.tar", "allowed are http"),
    ):
        with pytest.raises(ValueError, match=why) as error:
            expand_urls([url])
        assert f"data.train={url!r}" in str(error.value)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec = pytest.importorskip("fsspec")

    def missing(protocol: str) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "get_filesystem_class", missing)
    with pytest.raises(ValueError, match=r"data\.train='s3://a/0\.tar' needs a package that is not installed here: Install s3fs"):
        expand_urls(["s3://a/0.tar"])


def test_the_hash_is_the_list_of_urls() -> None:
    lists = (["http://a/{0..1}.tar"], ["http://a/0.tar", "http://a/1.tar"], ["http://a/1.tar", "http://a/0.tar"], ["http://a/0.tar"])
    hashes = [StreamReader(urls, size=4, seed=0).dataset_hash for urls in lists]
    assert hashes[0] == hashes[1] and len(set(hashes)) == 3
