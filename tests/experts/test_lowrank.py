"""Experts as low-rank differences: exact where it says so, as good as can be elsewhere, and trained in the same form."""

from __future__ import annotations

import copy
import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from t2i_experts.config import ResolutionSpec
from t2i_experts.experts.lowrank import Decomposition, LowRankDifference, extract, restore
from t2i_experts.experts.lowrank_file import load_difference, save_difference
from t2i_experts.experts.lowrank_training import add_low_rank, low_rank_difference
from t2i_experts.experts.states import State, count_bytes
from t2i_experts.nn.unet import UNet
from t2i_experts.types import Embedding


def state(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"linear.weight": (24, 16), "linear.bias": (24,), "conv.weight": (12, 8, 3, 3), "thin.weight": (1, 50)}
    state = {name: torch.randn(*shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    return {**state, "steps": torch.tensor([seed])}


def moved(root: State, rank: int, seed: int = 9, scale: float = 0.1) -> dict[str, Tensor]:
    """An expert whose matrices moved by differences of that rank, with singular values that fall off."""
    generator = torch.Generator().manual_seed(seed)

    def difference(tensor: Tensor) -> Tensor:
        out, inputs = tensor.flatten(1).shape
        sizes = scale * 2.0 ** -torch.arange(rank)
        return ((torch.randn(out, rank, generator=generator) * sizes) @ torch.randn(rank, inputs, generator=generator)).view_as(tensor)

    return {name: tensor + difference(tensor) if tensor.ndim > 1 else tensor + 1 for name, tensor in root.items()}


def same_bits(a: State, b: State) -> bool:
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


def error(restored: State, expert: State, root: State) -> float:
    names = [name for name, tensor in root.items() if tensor.ndim > 1]
    lost = sum((restored[n].double() - expert[n].double()).square().sum() for n in names)
    return float((lost / sum((root[n].double() - expert[n].double()).square().sum() for n in names)).sqrt())


ROOT = state(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_full_rank_is_the_expert_bit_for_bit(dtype: torch.dtype) -> None:
    root, expert = state(0, dtype), state(1, dtype)
    decomposition = Decomposition(root, expert)
    for difference in (decomposition.at_rank(decomposition.largest_rank), decomposition.at_rank(1000), decomposition.within(10**9)):
        assert same_bits(restore(root, difference), expert)
        assert not difference.factors and difference.bytes == count_bytes(expert)
    assert decomposition.at_rank(decomposition.largest_rank - 1).factors


def test_a_difference_of_low_rank_is_found_to_rounding() -> None:
    expert = moved(ROOT, rank=3)
    restored = restore(ROOT, extract(ROOT, expert, rank=3))
    for name in expert:
        torch.testing.assert_close(restored[name], expert[name], rtol=1e-6, atol=1e-6)
    assert torch.equal(restored["linear.bias"], expert["linear.bias"]) and torch.equal(restored["thin.weight"], expert["thin.weight"])


def test_what_is_stored() -> None:
    expert = {**moved(ROOT, rank=5), "conv.weight": ROOT["conv.weight"]}
    difference = extract(ROOT, expert, rank=2)
    assert set(difference.factors) == {"linear.weight"} and set(difference.whole) == {"linear.bias", "thin.weight", "steps"}
    factors = difference.factors["linear.weight"]
    assert (factors.up.shape, factors.down.shape, factors.rank) == ((24, 2), (2, 16), 2)
    torch.testing.assert_close(factors.up.norm(dim=0), factors.down.norm(dim=1))
    assert difference.bytes == 4 * (2 * (24 + 16) + 24 + 50) + 8
    nothing = extract(ROOT, ROOT, rank=2)
    assert nothing.bytes == 0 and same_bits(restore(ROOT, nothing), ROOT)


def test_errors_by_rank_are_those_of_what_is_restored() -> None:
    expert = state(1)
    decomposition = Decomposition(ROOT, expert)
    rows = decomposition.errors(range(decomposition.largest_rank + 1))
    assert rows[0].error == 1 and rows[-1].error == 0
    for row, worse in zip(rows[1:], rows, strict=False):
        difference = decomposition.at_rank(row.rank)
        assert row.bytes == difference.bytes and worse.bytes <= row.bytes
        assert row.error == pytest.approx(error(restore(ROOT, difference), expert, ROOT), abs=1e-6)
        assert row.error < worse.error


def test_no_other_matrix_of_the_rank_is_nearer() -> None:
    """Against random subspaces, onto which the difference is projected as well as can be."""
    expert = state(1)
    difference = expert["linear.weight"] - ROOT["linear.weight"]
    ours = (restore(ROOT, extract(ROOT, expert, rank=4))["linear.weight"] - expert["linear.weight"]).norm()
    for seed in range(20):
        basis, _ = torch.linalg.qr(difference @ torch.randn(16, 4, generator=torch.Generator().manual_seed(seed)))
        assert ours < (difference - basis @ (basis.T @ difference)).norm()


def test_a_budget_is_kept_and_spent_where_it_is_worth_most() -> None:
    """One matrix moved far in few directions, another a little in many."""
    expert = {**ROOT}
    expert["linear.weight"] = moved(ROOT, rank=2, scale=5.0)["linear.weight"]
    expert["conv.weight"] = ROOT["conv.weight"] + 0.01 * torch.randn(12, 8, 3, 3, generator=torch.Generator().manual_seed(5))
    decomposition = Decomposition(ROOT, expert)
    errors = []
    for budget in range(0, 4000, 97):
        difference = decomposition.within(budget)
        assert difference.bytes <= budget
        errors.append(error(restore(ROOT, difference), expert, ROOT))
    assert errors[0] == 1 and all(after <= before + 1e-9 for before, after in pairwise(errors))
    two = decomposition.within(2 * 40 * 4)
    assert set(two.factors) == {"linear.weight"} and two.factors["linear.weight"].rank == 2
    for row in decomposition.errors(range(1, 6)):  # never worse than the same rank for all
        assert error(restore(ROOT, decomposition.within(row.bytes)), expert, ROOT) <= row.error + 1e-9, (
            "never worse than the same rank for all"
        )


def test_a_budget_that_cannot_be_kept_and_wrong_ranks_are_refused() -> None:
    expert = state(1)
    with pytest.raises(ValueError, match="budget_bytes=50 must be >= 104"):
        extract(ROOT, expert, budget_bytes=50)
    with pytest.raises(ValueError, match="rank=-1"):
        extract(ROOT, expert, rank=-1)
    for given in ({}, {"rank": 1, "budget_bytes": 500}):
        with pytest.raises(ValueError, match="exactly one"):
            extract(ROOT, expert, **given)
    with pytest.raises(ValueError, match=r"the expert does not fit the root: linear\.bias is missing"):
        extract(ROOT, {name: t for name, t in expert.items() if name != "linear.bias"}, rank=1)


def test_another_root_is_refused() -> None:
    difference = extract(ROOT, state(1), rank=1)
    with pytest.raises(ValueError, match="was taken from the root"):
        restore(state(3), difference)


def test_files_come_back_and_are_the_same_bytes_each_time(tmp_path: Path) -> None:
    expert = state(1)
    difference = extract(ROOT, expert, rank=2)
    facts = {"node": "E^3_0", "quantiles": ["0", "1/8"]}
    save_difference(tmp_path / "a.safetensors", difference, facts)
    save_difference(tmp_path / "b.safetensors", difference, facts)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]
    loaded, found = load_difference(tmp_path / "a.safetensors")
    assert found == facts and loaded.bytes == difference.bytes
    assert same_bits(restore(ROOT, loaded), restore(ROOT, difference))
    size = (tmp_path / "a.safetensors").stat().st_size
    assert difference.bytes < size < difference.bytes + 1500


def test_damaged_and_foreign_files_are_refused_by_name(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "x.safetensors"
    with pytest.raises(ValueError, match=r"not found: .*x\.safetensors"):
        load_difference(path)
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"x\.safetensors is damaged"):
        load_difference(path)
    save_file({"w": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="is no low-rank difference"):
        load_difference(path)
    save_difference(path, extract(ROOT, state(1), rank=2))
    about = {"low_rank": json.dumps({"format": "expert = root + up @ down, or whole; version 1", "root": "", "facts": {}})}
    save_file({"up/w": torch.zeros(3, 2)}, path, metadata=about)
    with pytest.raises(ValueError, match="up/w and down/w must be"):
        load_difference(path)


def unet() -> UNet:
    torch.manual_seed(0)
    network = UNet(
        [ResolutionSpec(16, 1), ResolutionSpec(24, 1, True, True)],
        {"t5": (6, 5)},
        embedding_channels=16,
        context_channels=12,
        head_channels=8,
    )
    for parameter in network.parameters():
        if parameter.abs().max() == 0:
            nn.init.normal_(parameter, std=0.05)
    return network.to(memory_format=torch.channels_last)


def answer(network: UNet) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    tokens, pooled = torch.randn(2, 3, 6, generator=generator), torch.randn(2, 5, generator=generator)
    projected = network.project({"t5": Embedding(tokens, torch.ones(2, 3) > 0, pooled)})
    result: Tensor = network(torch.randn(2, 3, 16, 16, generator=generator), torch.tensor([-0.5, 0.5]), projected)
    return result


def trained(network: UNet, steps: int = 3) -> None:
    parameters = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, 1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        (answer(network) - 1).square().mean().backward()
        optimizer.step()


@pytest.fixture(scope="module")
def low_rank() -> tuple[UNet, UNet, LowRankDifference]:
    """The root, the network that was trained from it at rank 2, and its difference."""
    root, network = unet(), unet()
    add_low_rank(network, 2)
    trained(network)
    return root, network, low_rank_difference(network.state_dict(), root.state_dict())


def test_it_starts_as_the_root_and_trains_little() -> None:
    root, network = unet(), unet()
    add_low_rank(network, 2)
    assert torch.equal(answer(network), answer(root)), "up is zero"
    assert not low_rank_difference(network.state_dict(), root.state_dict()).whole, "what has not changed is not stored"
    free = sum(p.numel() for p in network.parameters() if p.requires_grad)
    assert free < 0.3 * sum(p.numel() for p in root.parameters())


def test_what_was_trained_is_what_is_restored(low_rank: tuple[UNet, UNet, LowRankDifference]) -> None:
    root, network, difference = low_rank
    plain = unet()
    plain.load_state_dict(restore(root.state_dict(), difference))
    torch.testing.assert_close(answer(plain), answer(network), rtol=1e-5, atol=1e-5)
    assert (answer(network) - answer(root)).abs().max() > 0.05
    assert all(factors.rank == 2 for factors in difference.factors.values()) and len(difference.factors) > 10
    assert {"conv_in.bias", "noise_embedding.out.bias"} <= set(difference.whole), "what is no matrix trains too"
    assert difference.bytes < 0.3 * count_bytes(root.state_dict())


def test_a_trained_difference_is_of_its_rank(low_rank: tuple[UNet, UNet, LowRankDifference]) -> None:
    """The decomposition of what was restored finds it again."""
    root, _, difference = low_rank
    again = extract(root.state_dict(), restore(root.state_dict(), difference), rank=2)
    for name, factors in difference.factors.items():
        shape = root.state_dict()[name].shape
        torch.testing.assert_close(again.factors[name].product(shape), factors.product(shape), rtol=1e-3, atol=1e-5)


def test_copies_of_the_network_train_on(low_rank: tuple[UNet, UNet, LowRankDifference]) -> None:
    """As the moving average of the weights is one."""
    root, network, _ = low_rank
    twin = copy.deepcopy(network)
    assert torch.equal(answer(twin), answer(network))
    before = answer(network)
    trained(twin, 1)
    assert torch.equal(answer(network), before) and not torch.equal(answer(twin), before)
    low_rank_difference(twin.state_dict(), root.state_dict())


def test_a_state_of_another_root_and_wrong_ranks_are_refused(low_rank: tuple[UNet, UNet, LowRankDifference]) -> None:
    root, network, _ = low_rank
    other = {name: tensor.clone() for name, tensor in root.state_dict().items()}
    other["conv_in.weight"] += 1
    with pytest.raises(ValueError, match=r"conv_in\.weight was trained from another root"):
        low_rank_difference(network.state_dict(), other)
    with pytest.raises(ValueError, match="rank=0"):
        add_low_rank(unet(), 0)
    with pytest.raises(ValueError, match="rank=500"):
        add_low_rank(unet(), 500)
