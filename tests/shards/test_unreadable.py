"""Samples that turn out unreadable while a reader is at work: others stand in, the same everywhere, and all is named."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from t2i_experts.shards import reader as reader_module
from t2i_experts.shards.index import scan
from t2i_experts.shards.loader import open_loader
from t2i_experts.shards.reader import Sample, ShardReader, Unreadable, UnreadableSample

MakeShards = Callable[..., Path]


def break_images(folder: Path, *keys: str) -> None:
    """Writes zeros over the images of some samples; sizes stay."""
    for tar in folder.glob("*.tar"):
        for row in scan(tar).rows:
            if row.key in keys:
                with open(tar, "r+b") as file:
                    file.seek(row.image[0])
                    file.write(bytes(row.image[1]))


def facts(sample: Sample) -> tuple[int, str, str, tuple[Unreadable, ...]]:
    return sample.position, sample.key, sample.caption, sample.unreadable


def test_another_sample_stands_in_and_nothing_else_changes(tmp_path: Path, make_shards: MakeShards) -> None:
    reader = ShardReader([make_shards(tmp_path, 13)], size=4, seed=5)
    intact = [reader[position] for position in range(65)]
    break_images(tmp_path, "00003", "00011")
    found = [reader[position] for position in range(65)]
    for before, after in zip(intact, found, strict=True):
        if before.key in ("00003", "00011"):
            assert after.key not in ("00003", "00011") and after.position == before.position
            assert after.unreadable[0].key == before.key and "no picture" in after.unreadable[0].why
            assert Path(after.unreadable[0].shard).parent == tmp_path
        else:
            assert facts(after) == facts(before) and torch.equal(after.image, before.image)
    stands_in = {sample.key for sample in found if sample.unreadable}
    assert sum(bool(sample.unreadable) for sample in found) == 10 and len(stands_in) > 4  # drawn anew each time
    other_seed = ShardReader([tmp_path], size=4, seed=6)
    assert stands_in != {sample.key for position in range(65) if (sample := other_seed[position]).unreadable}


def collate(samples: Sequence[Sample]) -> Sequence[Sample]:
    return samples


@pytest.mark.parametrize(("world_size", "accumulation", "workers"), [(1, 1, 2), (2, 2, 0), (4, 1, 1)])
def test_substitutes_are_the_same_on_all_ranks_and_workers_and_travel_with_their_batch(
    tmp_path: Path, make_shards: MakeShards, world_size: int, accumulation: int, workers: int
) -> None:
    reader = ShardReader([make_shards(tmp_path, 13)], size=4, seed=5)
    break_images(tmp_path, *(f"{i:05d}" for i in range(0, 13, 3)))
    expected = [facts(ShardReader([tmp_path], size=4, seed=5)[position]) for position in range(8, 40)]
    options = {"start": 8, "stop": 40, "batch_size": 8, "accumulation": accumulation, "world_size": world_size, "workers": workers}
    found = [
        facts(sample) for rank in range(world_size) for batch in open_loader(reader, collate, rank=rank, **options) for sample in batch
    ]
    assert sorted(found) == expected and any(unreadable for _, _, _, unreadable in found)


def test_nothing_left_to_read_is_an_error(tmp_path: Path, make_shards: MakeShards) -> None:
    reader = ShardReader([make_shards(tmp_path, 3)], size=4, seed=0)
    break_images(tmp_path, "00000", "00001", "00002")
    with pytest.raises(ValueError, match=r"00000\.tar: sample '0000\d': .*shards check.*Nor can 15 others"):
        reader[0]


def test_a_tar_that_the_manifest_contradicts_is_an_error_at_the_start(tmp_path: Path, make_shards: MakeShards) -> None:
    make_shards(tmp_path, 10)
    reader = ShardReader([tmp_path], size=4, seed=0)
    os.truncate(tmp_path / "00001.tar", 4000)
    with pytest.raises(ValueError, match=r"00001\.tar has 4000 bytes where the manifest says \d+: run `t2i-experts shards check"):
        ShardReader([tmp_path], size=4, seed=0)
    (tmp_path / "00001.tar").unlink()
    with pytest.raises(ValueError, match=r"00001\.tar is missing"):
        ShardReader([tmp_path], size=4, seed=0)
    found = [reader[position] for position in range(20)]  # it was there when this reader began
    assert {sample.key for sample in found} == {f"{i:05d}" for i in range(5)}
    named = {what for sample in found for what in sample.unreadable}
    assert {(Path(what.shard).name, what.key) for what in named} == {("00001.tar", None)}
    assert all(what.why.startswith("is missing") for what in named)


def test_a_tar_that_shrinks_while_it_is_read_loses_only_what_is_gone(tmp_path: Path, make_shards: MakeShards) -> None:
    reader = ShardReader([make_shards(tmp_path, 10)], size=4, seed=0)
    for position in range(10):
        reader[position]
    row = scan(tmp_path / "00001.tar").rows[3]
    os.truncate(tmp_path / "00001.tar", row.image[0] + 10)
    assert [reader.item(i).key for i in range(8)] == [f"{i:05d}" for i in range(8)]
    for i in (8, 9):
        with pytest.raises(UnreadableSample, match="ends within it"):
            reader.item(i)
    assert {what.key for position in range(10) for what in reader[position].unreadable} == {"00008", "00009"}


def test_a_failing_file_system_is_asked_again(tmp_path: Path, make_shards: MakeShards, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = ShardReader([make_shards(tmp_path, 4)], size=4, seed=0)
    expected = facts(reader[0])
    pread, waited, failures = os.pread, [], [2]

    def failing(*arguments: int) -> bytes:
        if failures[0]:
            failures[0] -= 1
            raise OSError(5, "Input/output error")
        return pread(*arguments)

    monkeypatch.setattr(reader_module.os, "pread", failing)
    monkeypatch.setattr(reader_module.time, "sleep", waited.append)
    assert facts(reader[0]) == expected and len(waited) == 2
    failures[0] = 6
    assert reader[0].unreadable[0].why.endswith("Input/output error")


def test_a_tar_whose_headers_are_broken_is_scanned_once(tmp_path: Path, make_shards: MakeShards, monkeypatch: pytest.MonkeyPatch) -> None:
    make_shards(tmp_path, 10)
    (tmp_path / "00000.index").unlink()
    size = (tmp_path / "00000.tar").stat().st_size
    (tmp_path / "00000.tar").write_bytes(b"\xff" * size)
    calls = []
    monkeypatch.setattr("t2i_experts.shards.index.scan", lambda tar: calls.append(tar) or scan(tar))
    reader = ShardReader([tmp_path], size=4, seed=0)
    named = {(what.key, what.why[:14]) for position in range(30) for what in reader[position].unreadable}
    assert named == {(None, "cannot be read")} and len(calls) == 1
    assert pickle.loads(pickle.dumps(reader))[0].key == reader[0].key


def test_what_an_index_claims_is_not_believed(tmp_path: Path, make_shards: MakeShards) -> None:
    """A member of 2^40 bytes, or before the beginning of the file, costs no memory."""
    make_shards(tmp_path, 3)
    path = tmp_path / "00000.index"
    data = path.read_bytes()
    reader = ShardReader([tmp_path], size=4, seed=0)
    image = scan(tmp_path / "00000.tar").rows[1].image
    for lie in ((image[0], 2**40), (image[0], -1), (-512, image[1])):
        packed, false = (b"".join(n.to_bytes(8, "little", signed=True) for n in place) for place in (image, lie))
        path.write_bytes(data.replace(packed, false))
        with pytest.raises(UnreadableSample, match=r"sample '00001': its image has"):
            reader.item(1)


def test_an_index_file_that_vanishes_or_shrinks_is_found_anew(tmp_path: Path, make_shards: MakeShards) -> None:
    reader = ShardReader([make_shards(tmp_path, 10)], size=4, seed=0)
    expected = [facts(reader[position]) for position in range(10)]
    os.truncate(tmp_path / "00000.index", 70)
    (tmp_path / "00001.index").unlink()
    reader.close()
    assert [facts(reader[position]) for position in range(10)] == expected
