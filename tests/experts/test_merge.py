"""Merging by task vectors: what holds to the last bit, and the search for the weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from t2i_experts.experts.merge import merge
from t2i_experts.experts.merge_search import search_coordinates, search_grid
from t2i_experts.experts.states import State, count_bytes, fingerprint


def state(seed: int, *, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> dict[str, Tensor]:
    """Numbers of very different sizes, both zeros among them."""
    generator = torch.Generator().manual_seed(seed)
    sizes = 10 ** (torch.rand(40, generator=generator) * 20 - 15)
    numbers = torch.randn(40, generator=generator) * sizes * scale
    numbers[:2] = torch.tensor([0.0, -0.0] if seed % 2 else [-0.0, 0.0])
    conv = torch.randn(4, 3, 3, 3, generator=generator).to(memory_format=torch.channels_last)
    return {"numbers": numbers.to(dtype), "conv.weight": conv.to(dtype), "steps": torch.tensor([7])}


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def same_bits(a: State, b: State) -> bool:
    return list(a) == list(b) and all(a[name].dtype == b[name].dtype and bits(a[name]) == bits(b[name]) for name in a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_weights_of_zero_are_the_root_and_one_of_one_is_that_expert(dtype: torch.dtype) -> None:
    root, experts = state(0, dtype=dtype), [state(seed, dtype=dtype) for seed in (1, 2, 3)]
    assert same_bits(merge(root, experts, [0.0, 0.0, 0.0]), root)
    assert same_bits(merge(root, experts[:1], [1.0]), experts[0])
    for i in range(3):
        assert same_bits(merge(root, experts, [float(i == j) for j in range(3)]), experts[i])


def test_the_difference_of_the_textbook_would_not_hold_this() -> None:
    a, b = state(0)["numbers"], state(1)["numbers"]
    assert not torch.equal(a + (b - a), b), "the numbers of these tests are such that it matters"


def test_experts_that_are_the_root_give_the_root_whatever_the_weights() -> None:
    root = state(0)
    merged = merge(root, [root, root, root], [0.1, 0.7, 1.9])
    assert torch.equal(merged["numbers"], root["numbers"]) and torch.equal(merged["conv.weight"], root["conv.weight"])


def test_against_exact_arithmetic() -> None:
    """The nearest float32 to root + sum w (expert - root), as fractions."""
    root, experts, weights = state(0), [state(1), state(2)], [0.3, -1.7]
    merged = merge(root, experts, weights)
    exact = [
        float(Fraction(a) + sum(Fraction(w) * (Fraction(b) - Fraction(a)) for w, b in zip(weights, bs, strict=True)))
        for a, *bs in zip(*(s["numbers"].tolist() for s in (root, *experts)), strict=True)
    ]
    torch.testing.assert_close(merged["numbers"].double(), torch.tensor(exact, dtype=torch.float64), rtol=2**-24, atol=0)


def test_accumulation_is_finer_than_the_weights() -> None:
    """256 small steps in one direction: in bfloat16, each alone would be rounded away."""
    root = {"w": torch.ones(3, dtype=torch.bfloat16)}
    expert = {"w": torch.full((3,), 1.0 + 2**-7, dtype=torch.bfloat16)}
    merged = merge(root, [expert] * 256, [2**-8] * 256)
    assert torch.equal(merged["w"], expert["w"])


def test_states_that_do_not_fit_are_refused_by_their_first_tensor() -> None:
    root, expert = state(0), state(1)
    with pytest.raises(ValueError, match=r"expert 1 does not fit the root: conv.weight is \(4, 27\) there and \(4, 3, 3, 3\) in the root"):
        merge(root, [expert, {**expert, "conv.weight": expert["conv.weight"].flatten(1)}], [0.5, 0.5])
    with pytest.raises(ValueError, match=r"numbers is missing there and \(40,\) in the root, and 1 more"):
        merge(root, [{"conv.weight": expert["conv.weight"]}], [1.0])
    with pytest.raises(ValueError, match=r"extra is \(1,\) there and missing in the root"):
        merge(root, [{**expert, "extra": torch.zeros(1)}], [1.0])
    with pytest.raises(ValueError, match=r"steps is torch\.int64 and differs"):
        merge(root, [{**expert, "steps": torch.tensor([8])}], [1.0])


@pytest.mark.parametrize("weights", [[1.0], [1.0, math.nan], [math.inf, 0.0]])
def test_weights_that_are_no_numbers_or_not_enough_are_refused(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="weights="):
        merge(state(0), [state(1), state(2)], weights)


def test_the_merge_shares_no_memory_with_what_it_was_made_of() -> None:
    root, expert = state(0), state(1)
    for weights in ([0.0], [1.0]):
        merged = merge(root, [expert], weights)
        assert not {t.data_ptr() for t in merged.values()} & {t.data_ptr() for t in (*root.values(), *expert.values())}


def test_fingerprints_know_every_bit_name_and_type() -> None:
    root = state(0)
    other = {name: tensor.clone() for name, tensor in root.items()}
    assert fingerprint(root) == fingerprint(dict(reversed(other.items())))
    other["numbers"][5] = other["numbers"][5].nextafter(torch.tensor(9.0))
    changed = [other, {**root, "steps": root["steps"].int()}, {"renamed" if n == "steps" else n: t for n, t in root.items()}]
    assert len({fingerprint(root), *map(fingerprint, changed)}) == 4
    assert count_bytes(root) == 40 * 4 + 4 * 27 * 4 + 8


ROOT = {"w": torch.zeros(3)}
EXPERTS = [{"w": torch.eye(3)[i]} for i in range(3)]  # the merged w is the weights themselves
BOWL = torch.tensor([[2.0, 0.6, 0.0], [0.6, 1.0, 0.2], [0.0, 0.2, 0.5]])


def bowl(lowest: Sequence[float], calls: list[list[float]] | None = None) -> Callable[[State], float]:
    """A loss with its minimum, 1, at the weights `lowest`."""

    def loss(state: State) -> float:
        if calls is not None:
            calls.append(state["w"].tolist())
        d = state["w"] - torch.tensor(lowest)
        return 1 + float(d @ BOWL @ d)

    return loss


def test_coordinates_find_the_bottom_of_a_tilted_bowl() -> None:
    calls: list[list[float]] = []
    search = search_coordinates(ROOT, EXPERTS, bowl([0.9, 0.1, 0.4], calls), bowl([0.9, 0.1, 0.4]), smallest_step=1 / 256, evaluations=500)
    assert search.best.weights == pytest.approx([0.9, 0.1, 0.4], abs=0.02)
    assert len(calls) == len(search.evaluations) == len({e.weights for e in search.evaluations}) < 150, "no weights twice"
    assert search.evaluations[0].weights == (0, 0, 0) and search.evaluations[1].weights == (1 / 3,) * 3
    assert search == search_coordinates(ROOT, EXPERTS, bowl([0.9, 0.1, 0.4]), bowl([0.9, 0.1, 0.4]), smallest_step=1 / 256, evaluations=500)


def test_it_begins_at_the_better_of_root_and_average() -> None:
    for lowest, start in ([0.0, 0.0, 0.0], (0.0, 0.0, 0.0)), ([0.4, 0.4, 0.4], (1 / 3, 1 / 3, 1 / 3)):
        search = search_coordinates(ROOT, EXPERTS, bowl(lowest), bowl(lowest), step=2.0, smallest_step=2.0)
        assert search.best.weights == start


def test_what_was_found_on_one_split_is_reported_on_the_other() -> None:
    searched, held_out = bowl([0.5, 0.5, 0.5]), bowl([0.25, 0.5, 0.5])
    search = search_coordinates(ROOT, EXPERTS, searched, held_out)
    root, average, found = search.reported
    assert root.weights == (0, 0, 0) and average.weights == (1 / 3,) * 3 and found.weights == search.best.weights
    assert found.loss == pytest.approx(held_out({"w": torch.tensor(found.weights)})) and found.loss > search.best.loss
    assert root.loss == pytest.approx(held_out(ROOT))


def test_a_limit_of_evaluations_is_kept() -> None:
    search = search_coordinates(ROOT, EXPERTS, bowl([3.0, 0.1, 0.4]), bowl([3.0, 0.1, 0.4]), evaluations=9)
    assert len(search.evaluations) == 9
    assert search.best.loss == min(e.loss for e in search.evaluations)


def test_a_grid_is_searched_whole() -> None:
    search = search_grid(ROOT, EXPERTS, bowl([0.9, 0.1, 0.4]), bowl([0.9, 0.1, 0.4]), [0.0, 0.5, 1.0])
    assert {e.weights for e in search.evaluations} == {(a, b, c) for a in (0, 0.5, 1) for b in (0, 0.5, 1) for c in (0, 0.5, 1)} | {
        (1 / 3,) * 3
    }
    grid = [e for e in search.evaluations if e.weights != (1 / 3,) * 3]
    assert search.best == min(search.evaluations, key=lambda e: e.loss) and min(grid, key=lambda e: e.loss).weights == (1.0, 0.0, 0.5)


def test_a_loss_that_is_not_a_number_is_never_the_best() -> None:
    search = search_grid(ROOT, EXPERTS[:1], lambda s: 5.0 if s["w"][0] == 0.75 else math.nan, lambda s: 0.0, [0.5, 0.75])
    assert search.best.weights == (0.75,)


def test_wrong_settings_of_the_search_are_refused() -> None:
    loss = bowl([0.0, 0.0, 0.0])
    with pytest.raises(ValueError, match="smallest_step"):
        search_coordinates(ROOT, EXPERTS, loss, loss, step=0.1, smallest_step=0.2)
    with pytest.raises(ValueError, match="evaluations=1"):
        search_coordinates(ROOT, EXPERTS, loss, loss, evaluations=1)
    with pytest.raises(ValueError, match="no experts"):
        search_coordinates(ROOT, [], loss, loss)
