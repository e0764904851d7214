"""What ranks say of distances: against scipy, against all orders, and of sets of which one knows what they are."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.stats import mannwhitneyu

from t2i_experts.evaluation.copying import copying, share_below


@pytest.mark.parametrize("rounded", [False, True])
def test_the_statistic_is_mann_whitneys(rounded: bool) -> None:
    random = np.random.default_rng(0)
    generated, held_out = random.gamma(4, 1, 60), random.gamma(5, 1, 45)
    if rounded:  # many are equal
        generated, held_out = generated.round(), held_out.round()
    expected = mannwhitneyu(generated, held_out, alternative="less", method="asymptotic", use_continuity=False)
    found = copying(generated, held_out)
    assert found.p == pytest.approx(expected.pvalue, rel=1e-9) and found.further == pytest.approx(expected.statistic / (60 * 45))
    assert found.z < 0 and found.further < 0.5
    back = copying(held_out, generated)
    assert back.z == pytest.approx(-found.z) and back.p == pytest.approx(1 - found.p) and back.further == pytest.approx(1 - found.further)


def test_sets_that_are_all_equal_say_nothing() -> None:
    found = copying(np.zeros(5), np.zeros(7))
    assert (found.z, found.p, found.further) == (0.0, 0.5, 0.5)


def test_the_chance_of_so_many_is_that_of_all_orders() -> None:
    """Of the C(8, 5) orders of five generated and three held-out pictures, those with as many before the first held-out one."""
    orders = list(itertools.combinations(range(8), 5))
    for count in range(6):
        generated = np.array([*range(count), *range(100, 105 - count)], float)
        held_out = np.array([50.0, 120.0, 130.0])
        found = share_below(generated, held_out)
        as_many = sum(set(range(count)) <= set(order) for order in orders) / len(orders)
        assert found.count == count and found.threshold == 50 and found.p == pytest.approx(as_many)
        assert found.share == count / 5 and found.expected == 1 / 4


def test_a_few_copies_show_in_the_share_and_not_in_the_statistic() -> None:
    random = np.random.default_rng(1)
    held_out, generated = random.gamma(9, 1, 1000), random.gamma(9, 1, 500)
    alike = share_below(generated, held_out)
    assert alike.p > 0.01 and alike.expected == 10 / 1001
    generated[:25] = 0.001
    few, all_together = share_below(generated, held_out), copying(generated, held_out)
    assert few.share >= 0.05 and few.p < 1e-6 and all_together.p > 1e-3
    assert copying(0.8 * random.gamma(9, 1, 500), held_out).p < 1e-6


def test_the_chances_are_right_where_sets_are_alike() -> None:
    """Of many pairs of alike sets, about one in twenty has p below 0.05, and never many more."""
    random = np.random.default_rng(2)
    pairs = [(random.random(80), random.random(200)) for _ in range(400)]
    assert 0.02 < np.mean([copying(*pair).p < 0.05 for pair in pairs]) < 0.08
    assert 0.01 < np.mean([share_below(*pair).p < 0.05 for pair in pairs]) < 0.08


def test_empty_sets_are_refused() -> None:
    for pair in ((np.zeros(0), np.zeros(3)), (np.zeros(3), np.zeros(0))):
        with pytest.raises(ValueError, match="at least one of each"):
            copying(*pair)
        with pytest.raises(ValueError, match="at least one of each"):
            share_below(*pair)
