"""The global order: a permutation each epoch, random access, no dependence on anything but its arguments."""

from __future__ import annotations

import pickle
import subprocess
import sys

import numpy as np
import pytest

from t2i_experts.shards.order import GlobalOrder, PositionDraws, position_rng


@pytest.mark.parametrize("samples", [1, 2, 3, 5, 7, 16, 17, 48, 100, 1023, 1025])
def test_every_epoch_is_a_permutation_and_epochs_differ(samples: int) -> None:
    order = GlobalOrder(samples, "hash", 3)
    epochs = order[np.arange(6 * samples)].reshape(6, samples)
    assert (np.sort(epochs, axis=1) == np.arange(samples)).all()
    if samples >= 16:
        assert len({tuple(epoch) for epoch in epochs}) == 6


def test_one_position_agrees_with_arrays_of_positions_across_epochs() -> None:
    order = GlobalOrder(37, "hash", 0)
    positions = np.random.default_rng(0).integers(0, 37 * 9, 500)
    assert order[positions].tolist() == [order[int(position)] for position in positions]


def test_far_positions_cost_nothing_and_large_sets_stay_in_range() -> None:
    order = GlobalOrder(5_000_000_011, "hash", 0)
    far = 10**15 + np.arange(2000)
    indices = order[far]
    assert indices.min() >= 0 and indices.max() < 5_000_000_011 and len(set(indices.tolist())) == 2000
    assert order[10**15] == indices[0]


def test_the_order_looks_random() -> None:
    """Each sample falls on each place equally often (chi-square), and neighbours are not correlated."""
    samples, epochs = 12, 3000
    order = GlobalOrder(samples, "hash", 1)[np.arange(samples * epochs)].reshape(epochs, samples)
    counts = np.stack([np.bincount(order[:, place], minlength=samples) for place in range(samples)])
    expected = epochs / samples
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < 121 + 5 * np.sqrt(2 * 121)  # 11 * 11 degrees of freedom
    long = GlobalOrder(10_000, "hash", 1)[np.arange(10_000)].astype(float)
    assert abs(np.corrcoef(long[:-1], long[1:])[0, 1]) < 0.05
    assert abs(np.corrcoef(long, np.arange(10_000))[0, 1]) < 0.05


def test_seed_and_dataset_change_the_order() -> None:
    orders = [GlobalOrder(100, name, seed)[np.arange(100)].tolist() for name, seed in (("a", 0), ("a", 1), ("b", 0))]
    assert orders[0] != orders[1] and orders[0] != orders[2] and orders[1] != orders[2]


def test_the_order_is_frozen() -> None:
    """Runs resume with newer versions of this program: these numbers must never change."""
    assert GlobalOrder(10, "hash", 0)[np.arange(20)].tolist() == [5, 7, 8, 9, 1, 6, 0, 2, 3, 4, 7, 1, 3, 9, 8, 0, 5, 6, 2, 4]
    assert position_rng(0, 7, "caption").integers(1000, size=4).tolist() == [209, 551, 892, 642]


def test_another_process_finds_the_same_order() -> None:
    """Nothing depends on Python's hash seed."""
    code = (
        "from t2i_experts.shards.order import *; print([GlobalOrder(50, 'x', 4)[i] for i in range(50)], position_rng(1, 2, 'p').random())"
    )
    here = [GlobalOrder(50, "x", 4)[i] for i in range(50)], position_rng(1, 2, "p").random()
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert there.strip() == f"{here[0]} {here[1]}"


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="samples=0"):
        GlobalOrder(0, "hash", 0)
    with pytest.raises(IndexError, match="-1"):
        GlobalOrder(3, "hash", 0)[-1]
    with pytest.raises(IndexError):
        GlobalOrder(3, "hash", 0)[np.array([1, -1])]


def test_random_numbers_belong_to_position_purpose_and_seed() -> None:
    draws = {
        tuple(position_rng(seed, position, purpose).random(4))
        for seed in (0, 1)
        for position in (0, 1, 2**40)
        for purpose in ("caption", "crop")
    }
    assert len(draws) == 12
    assert position_rng(5, 6, "crop").random() == position_rng(5, 6, "crop").random()
    uniform = np.array([position_rng(0, position, "crop").random() for position in range(2000)])
    assert abs(uniform.mean() - 0.5) < 0.03 and abs(np.corrcoef(uniform[:-1], uniform[1:])[0, 1]) < 0.1


def test_draws_at_positions_are_those_of_their_generators() -> None:
    """In any order, however much was drawn at the one before, and from a copy."""
    draws = PositionDraws(3, "caption")
    for position in (5, 0, 5, 10**12, 1):
        for of in (draws, pickle.loads(pickle.dumps(draws))):
            found, expected = of.at(position), position_rng(3, position, "caption")
            assert found.integers(5) == expected.integers(5)
            assert found.random() == expected.random()
            assert (found.integers(1000, size=position % 4) == expected.integers(1000, size=position % 4)).all()
            assert found.integers(2**31, dtype=np.int32) == expected.integers(2**31, dtype=np.int32)  # keeps half of a draw
