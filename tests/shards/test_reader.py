"""Random access in the global order: the same samples from anywhere, by anyone."""

from __future__ import annotations

import io
import os
import pickle
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from t2i_experts.shards import reader as reader_module
from t2i_experts.shards.check import check_shards
from t2i_experts.shards.reader import Sample, ShardReader
from t2i_experts.shards.transforms import decode_image

MakeShards = Callable[..., Path]


def same(a: Sample, b: Sample) -> bool:
    return (a.position, a.key, a.caption, a.metadata) == (b.position, b.key, b.caption, b.metadata) and torch.equal(a.image, b.image)


def test_every_sample_is_itself(tmp_path: Path, make_shards: MakeShards, encode: Callable[..., bytes]) -> None:
    reader = ShardReader([make_shards(tmp_path, 12)], size=16, seed=0)
    assert reader.samples == 12
    for i in range(12):
        sample = reader.item(i)
        assert (sample.key, sample.caption, sample.metadata, sample.position) == (f"{i:05d}", f"{i}/0", {"i": i}, i)
        assert torch.equal(sample.image, decode_image(encode(i), 16))
    for index in (-1, 12):
        with pytest.raises(IndexError):
            reader.item(index)


def test_an_epoch_shows_every_sample_once_and_epochs_draw_other_captions(tmp_path: Path, make_shards: MakeShards) -> None:
    reader = ShardReader([make_shards(tmp_path, 12)], size=4, seed=1)
    samples = [reader[position] for position in range(12 * 40)]
    for epoch in range(40):
        assert Counter(sample.key for sample in samples[12 * epoch : 12 * (epoch + 1)]) == Counter(f"{i:05d}" for i in range(12))
    drawn = Counter(sample.caption for sample in samples if sample.metadata["i"] == 2)
    assert set(drawn) == {"2/0", "2/1", "2/2"} and min(drawn.values()) >= 4
    assert [sample.position for sample in samples] == list(range(480))


def test_reading_in_any_order_from_copies_and_pickles_gives_the_same(tmp_path: Path, make_shards: MakeShards) -> None:
    folder = make_shards(tmp_path / "a", 12)
    reader = ShardReader([folder], size=4, seed=1)
    expected = [reader[position] for position in range(40)]
    copied = pickle.loads(pickle.dumps(reader))
    elsewhere = ShardReader([shutil.copytree(folder, tmp_path / "b")], size=4, seed=1)
    for path in (tmp_path / "b").glob("*.index"):
        path.unlink()
    for position in np.random.default_rng(0).permutation(40).tolist():
        assert all(same(other[position], expected[position]) for other in (reader, copied, elsewhere))
    assert elsewhere.dataset_hash == reader.dataset_hash
    assert len(pickle.dumps(reader)) < 10_000  # rows and files do not travel


def test_seed_and_data_change_the_order(tmp_path: Path, make_shards: MakeShards) -> None:
    a, b = make_shards(tmp_path / "a", 12), make_shards(tmp_path / "b", 12, first=100)
    readers = [ShardReader(folders, size=4, seed=seed) for folders, seed in (([a], 0), ([a], 1), ([b], 0), ([a, b], 0), ([b, a], 0))]
    orders = {tuple(reader.order[i] for i in range(12)) for reader in readers}
    assert len(orders) == 5 and len({reader.dataset_hash for reader in readers}) == 4


def test_several_folders_are_one_dataset(tmp_path: Path, make_shards: MakeShards) -> None:
    reader = ShardReader([make_shards(tmp_path / "a", 7), make_shards(tmp_path / "b", 6, first=50)], size=4, seed=0)
    assert [reader.item(i).metadata["i"] for i in range(13)] == [*range(7), *range(50, 56)]
    assert sorted(reader[position].metadata["i"] for position in range(13)) == [*range(7), *range(50, 56)]


def test_few_files_stay_open(tmp_path: Path, make_shards: MakeShards, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader_module, "_OPEN_FILES", 3)
    reader = ShardReader([make_shards(tmp_path, 20, per_shard=2)], size=4, seed=0)
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    assert [reader.item(i).metadata["i"] for i in [*range(20), *range(20)]] == [*range(20), *range(20)]
    if before is not None:
        assert len(os.listdir("/proc/self/fd")) <= before + 3
        reader.close()
        assert len(os.listdir("/proc/self/fd")) == before
    assert reader.item(3).metadata["i"] == 3


def foreign(folder: Path, encode: Callable[..., bytes], corrupt: int | None = None) -> Path:
    """A folder as img2dataset writes it: jpg, json and txt for each key, all in tars of a few samples, not sorted."""
    folder.mkdir()
    for shard in range(2):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for extension in ("txt", "jpg", "json"):
                for i in range(shard * 4, shard * 4 + 4):
                    image = b"broken" if i == corrupt else encode(i, (32, 32), "JPEG", quality=95)
                    data = {"jpg": image, "txt": f"猫 {i}".encode(), "json": b'{"caption": "other", "similarity": 0.3}'}[extension]
                    info = tarfile.TarInfo(f"{i:09d}.{extension}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return folder


def test_foreign_tars_are_adopted(tmp_path: Path, encode: Callable[..., bytes]) -> None:
    folder = foreign(tmp_path / "laion", encode)
    with pytest.raises(ValueError, match=r"no manifest\.json: .* adopted by `t2i-experts shards check .*laion --write-manifest`"):
        ShardReader([folder], size=8, seed=0)
    report = check_shards(folder, write_manifest=True)
    assert not report.problems and len(report.notes) == 2  # not sorted
    reader = ShardReader([folder], size=8, seed=0)
    assert [(reader.item(i).caption, reader.item(i).metadata) for i in range(8)] == [(f"猫 {i}", {"similarity": 0.3}) for i in range(8)]


def test_a_sample_that_cannot_be_read_is_named_and_can_be_left_out(tmp_path: Path, encode: Callable[..., bytes]) -> None:
    folder = foreign(tmp_path / "laion", encode)
    check_shards(folder, write_manifest=True)
    tar = folder / "00001.tar"
    data, image = tar.read_bytes(), encode(6, (32, 32), "JPEG", quality=95)
    tar.write_bytes(data.replace(image, bytes(len(image))))
    reader = ShardReader([folder], size=8, seed=0)
    with pytest.raises(ValueError, match=r"00001\.tar: sample '000000006': .*--write-manifest"):
        reader.item(6)
    tar.write_bytes(data.replace("猫 6".encode(), b"\xff\xff\xff\xff\xff"))
    with pytest.raises(ValueError, match=r"sample '000000006': its txt is not UTF-8"):
        reader.item(6)
    check_shards(folder, write_manifest=True)
    reader = ShardReader([folder], size=8, seed=0)
    assert [reader.item(i).key[-1] for i in range(reader.samples)] == list("0123457")
    (folder / "00001.index").unlink()
    reader = ShardReader([folder], size=8, seed=0)
    assert [reader.item(i).key[-1] for i in range(reader.samples)] == list("0123457")


def test_bad_arguments(tmp_path: Path, make_shards: MakeShards) -> None:
    folder = make_shards(tmp_path, 2)
    with pytest.raises(ValueError, match="list of folders"):
        ShardReader(str(folder), size=8, seed=0)
    with pytest.raises(ValueError, match="size=0"):
        ShardReader([folder], size=0, seed=0)
    with pytest.raises(ValueError, match="no samples"):
        ShardReader([], size=8, seed=0)
