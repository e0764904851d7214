"""Aspect-ratio buckets: every global batch has one shape, every bucket its own epochs, and the order is a function of the position."""

from __future__ import annotations

import itertools
import pickle
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from t2i_experts.shards.buckets import BucketOrder, Buckets, nearest_bucket
from t2i_experts.shards.index import scan
from t2i_experts.shards.loader import open_loader
from t2i_experts.shards.reader import Sample, ShardReader
from t2i_experts.shards.writer import ShardWriter

Encode = Callable[..., bytes]

SHAPES = ((8, 8), (12, 6), (6, 12))
SIZES = ((32, 32), (40, 18), (20, 44), (50, 26))  # of samples 0, 1, 2, 3, 4, ... in turn
BUCKET_OF = np.array([0, 1, 2, 1] * 25)


@pytest.fixture
def folder(tmp_path: Path, encode: Encode) -> Path:
    """22 samples: 6 squares, 11 wide and 5 high ones."""
    with ShardWriter(tmp_path / "shards", samples_per_shard=9) as writer:
        for i in range(22):
            writer.write(f"{i:05d}", encode(i, SIZES[i % 4]), "png", [f"{i}/{j}" for j in range(1 + i % 2)], {})
    return tmp_path / "shards"


def open_reader(folder: Path, batch_size: int = 4, seed: int = 5) -> ShardReader:
    return ShardReader([folder], size=8, seed=seed, buckets=Buckets(SHAPES, batch_size))


# Which bucket


def test_the_nearest_is_nearest_by_the_logarithm_of_the_aspect_ratio() -> None:
    rng = np.random.default_rng(0)
    shapes = [tuple(shape) for shape in rng.permutation([(8 * i, 8 * j) for i in range(4, 12) for j in (7, 13)]).tolist()]
    sizes = rng.integers(1, 5000, (3000, 2))
    logs = np.log(sizes[:, :1] / sizes[:, 1:]) - np.log([width / height for width, height in shapes])
    assert (nearest_bucket(sizes, shapes) == np.abs(logs).argmin(axis=1)).all()


def test_ties_and_unknown_sizes() -> None:
    """Half-way (by the ratio) between 1:1 and 4:1 lies 2:1; what cannot be read is a square, so that it does no harm."""
    sizes = np.array([(200, 100), (201, 100), (199, 100), (0, 0)])
    assert nearest_bucket(sizes, [(16, 4), (8, 8)]).tolist() == [1, 0, 1, 1]
    assert nearest_bucket(sizes, [(8, 8)]).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("shapes", [(), ((8, 8), (16, 16))])
def test_buckets_that_cannot_be(shapes: tuple[tuple[int, int], ...]) -> None:
    with pytest.raises(ValueError, match="different aspect ratios"):
        Buckets(shapes, 4)


# The order


def order_of(bucket_of: np.ndarray = BUCKET_OF, batch_size: int = 8, dataset_hash: str = "hash", seed: int = 0) -> BucketOrder:
    return BucketOrder(bucket_of, Buckets(SHAPES, batch_size), dataset_hash, seed)


@pytest.mark.parametrize("batch_size", [1, 3, 8, 64])
def test_every_batch_has_one_bucket_and_every_bucket_its_own_epochs(batch_size: int) -> None:
    """Of a bucket's own positions, each run of as many as it has samples is a permutation of them."""
    order = order_of(batch_size=batch_size)
    own: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for batch in range(900 // batch_size):
        indices = [order[position] for position in range(batch * batch_size, (batch + 1) * batch_size)]
        assert len({BUCKET_OF[index] for index in indices}) == 1
        assert order.batch(batch) == (BUCKET_OF[indices[0]], len(own[BUCKET_OF[indices[0]]]) // batch_size)
        own[BUCKET_OF[indices[0]]] += indices
    for bucket, seen in own.items():
        members = np.flatnonzero(bucket == BUCKET_OF)
        epochs = [seen[at : at + len(members)] for at in range(0, len(seen) - len(members) + 1, len(members))]
        assert epochs and all(sorted(epoch) == members.tolist() for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


def test_buckets_come_in_proportion_at_any_time_and_in_no_pattern() -> None:
    """After K batches a bucket with share s of the samples has had K s of them, give or take 1 + s * buckets."""
    bucket_of = np.repeat([0, 1, 2], [700, 290, 10])
    batches = [order_of(bucket_of).batch(number)[0] for number in range(5000)]
    for bucket, share in enumerate((0.7, 0.29, 0.01)):
        counts = np.cumsum([found == bucket for found in batches])
        assert np.abs(counts - share * np.arange(1, 5001)).max() <= 1 + 3 * share
    rare = np.flatnonzero(np.array(batches) == 2)
    assert np.diff(rare).min() < 60 and np.diff(rare).max() > 140, "once in every hundred, but not at its same place"
    assert len(set(zip(*(batches[i:] for i in range(12)), strict=False))) > 300


def test_a_bucket_without_samples_never_comes_and_a_small_one_repeats_itself() -> None:
    order = order_of(np.array([0] * 50 + [2] * 3), batch_size=8)
    batches = Counter(order.batch(number)[0] for number in range(530))
    assert batches == {0: 500, 2: 30}
    first = next(number for number in itertools.count() if order.batch(number)[0] == 2)
    assert Counter(order[8 * first + i] for i in range(8)).most_common() in [
        [(a, 3), (b, 3), (c, 2)] for a, b, c in itertools.permutations((50, 51, 52))
    ]


def test_far_positions_cost_nothing_and_do_not_depend_on_what_was_asked_before() -> None:
    far, order = 10**15 * 8, order_of()
    there = [order[far + i] for i in range(64)]
    assert there == [order_of()[far + i] for i in reversed(range(64))][::-1]
    numbers = [order.batch(far // 8 + i) for i in range(400)]
    for bucket in range(3):
        own = [number for found, number in numbers if found == bucket]
        assert own == list(range(own[0], own[0] + len(own)))


def test_dataset_seed_and_batch_size_change_the_order() -> None:
    orders = [order_of(), order_of(seed=1), order_of(dataset_hash="other"), order_of(batch_size=4)]
    assert len({tuple(order[i] for i in range(200)) for order in orders}) == 4


def test_the_order_is_frozen() -> None:
    """Runs resume with newer versions of this program: these numbers must never change."""
    order = order_of(np.array([0, 1, 1, 2, 0, 1]), batch_size=2)
    assert [order.batch(number) for number in range(8)] == [(1, 0), (1, 1), (0, 0), (2, 0), (0, 1), (1, 2), (1, 3), (2, 1)]
    assert [order[position] for position in range(16)] == [2, 5, 1, 2, 0, 4, 3, 3, 0, 4, 5, 1, 5, 2, 3, 3]
    assert [order.substitute(5, attempt) for attempt in (1, 2, 3)] == [4, 0, 0]


def test_bad_positions() -> None:
    with pytest.raises(IndexError):
        order_of()[-1]
    with pytest.raises(ValueError, match="samples=0"):
        order_of(np.array([], int))


# The reader and the loader


def collate(samples: Sequence[Sample]) -> tuple[list[tuple[int, str, str]], torch.Tensor]:
    return [(s.position, s.key, s.caption) for s in samples], torch.stack([s.image for s in samples])


def gather(folder: Path, start: int, stop: int, batch_size: int, accumulation: int, world_size: int, workers: int) -> list[object]:
    """All ranks' samples in the order of positions, each with the shape of its batch."""
    arguments = {"start": start, "stop": stop, "batch_size": batch_size, "accumulation": accumulation, "workers": workers}
    seen = []
    for rank in range(world_size):
        for samples, images in open_loader(open_reader(folder, batch_size), collate, rank=rank, world_size=world_size, **arguments):  # type: ignore[arg-type]
            seen += [(*sample, tuple(images.shape[1:])) for sample in samples]
    return sorted(seen)


def test_ranks_workers_accumulation_and_restarts_at_any_batch_change_nothing(folder: Path) -> None:
    expected = gather(folder, 0, 80, 4, 1, 1, 0)
    assert [position for position, *_ in expected] == list(range(80))
    assert {shape for *_, shape in expected} == {(3, height, width) for width, height in SHAPES}
    for world_size, accumulation, workers in [(2, 1, 0), (1, 2, 2), (2, 2, 1), (4, 1, 0)]:
        assert gather(folder, 0, 80, 4, accumulation, world_size, workers) == expected
    for stop in (4, 36):
        assert gather(folder, 0, stop, 4, 1, 2, 0) + gather(folder, stop, 80, 4, 2, 1, 0) == expected
    assert gather(folder, 0, 80, 8, 1, 1, 0) != expected


def test_a_pictures_shape_is_its_buckets_upright(folder: Path) -> None:
    reader = open_reader(folder)
    assert reader.bucket_samples() == {"8x8": 6, "12x6": 11, "6x12": 5}
    assert [reader.shape(i) for i in range(4)] == [(8, 8), (12, 6), (6, 12), (12, 6)]
    assert [tuple(reader.item(i).image.shape) for i in range(4)] == [(3, 8, 8), (3, 6, 12), (3, 12, 6), (3, 6, 12)]
    again = pickle.loads(pickle.dumps(reader))
    assert [again[i].key for i in range(16)] == [reader[i].key for i in range(16)]


def test_the_loader_keeps_to_the_batches_of_the_buckets(folder: Path) -> None:
    for start, batch_size in ((2, 4), (0, 8)):
        with pytest.raises(ValueError, match=rf"start={start}, batch_size={batch_size}: .* whole batches of 4"):
            open_loader(
                open_reader(folder), collate, start=start, stop=8, batch_size=batch_size, accumulation=1, rank=0, world_size=1, workers=0
            )


def test_what_stands_in_for_a_broken_sample_is_of_its_bucket(folder: Path) -> None:
    broken = {f"{i:05d}" for i in range(1, 22, 4)}
    reader = open_reader(folder)
    for tar in folder.glob("*.tar"):
        for row in scan(tar).rows:
            if row.key in broken:
                with open(tar, "r+b") as file:
                    file.seek(row.image[0] + 60)
                    file.write(bytes(row.image[1] - 60))  # the header still says how large it was
    samples = [reader[position] for position in range(176)]
    stand_ins = [sample for sample in samples if sample.unreadable]
    assert len(stand_ins) > 30 and not broken & {sample.key for sample in samples}
    assert {int(sample.key) % 4 for sample in stand_ins} == {3} and {tuple(sample.image.shape) for sample in stand_ins} == {(3, 6, 12)}
    afresh = open_reader(folder)
    assert [afresh[position].key for position in range(176)] == [sample.key for sample in samples]
