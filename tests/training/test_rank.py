"""Training at low rank: what is fixed stays, what is trained comes back, and the model folder holds both forms of it."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch._dynamo.utils import counters

from t2i_experts.cascade.expert_weights import LOW_RANK
from t2i_experts.cascade.model_folder import load_model
from t2i_experts.cascade.stage import build_network
from t2i_experts.cascade.weights import WEIGHTS
from t2i_experts.config import RunConfig, load_config
from t2i_experts.diffusion.compiling import compile_denoiser
from t2i_experts.experts.lowrank import restore
from t2i_experts.experts.lowrank_file import load_difference
from t2i_experts.experts.lowrank_training import add_low_rank
from t2i_experts.experts.states import fingerprint
from t2i_experts.training.checkpoints import checkpoints, read_facts
from t2i_experts.training.initial import at_rank
from t2i_experts.training.memory import estimate_training
from t2i_experts.training.posthoc import save_reconstruction
from t2i_experts.training.trainer import Trainer, train

At = Callable[..., RunConfig]
SHORT = ["training.images=32", "training.preview.every_images=0"]


@pytest.fixture
def at(write_config: Callable[[str], Path], trained: Path) -> At:
    """at(name, rank, *overrides): the config of a short run at a rank, which begins with the weights of `trained`."""

    def config(name: str, rank: int, *overrides: str) -> RunConfig:
        return load_config(write_config(name), [*SHORT, f"training.initial={trained / 'model'}", f"training.rank={rank}", *overrides])

    return config


def test_only_the_factors_and_what_is_no_matrix_move(at: At, trained: Path, tmp_path: Path) -> None:
    trainer = Trainer(at("run", 2), progress=False)
    root = load_file(trained / "model/base64" / WEIGHTS)
    before = {name: tensor.clone() for name, tensor in trainer.network.state_dict().items()}
    fixed = {name for name in before if name.endswith(".original")}
    assert len(fixed) > 10 and all(name in {n for n, p in trainer.network.named_parameters() if not p.requires_grad} for name in fixed)
    trainer.run()
    for network in (trainer.network, trainer.ema.network):
        for name, tensor in network.state_dict().items():
            moves = name not in fixed
            assert torch.equal(tensor, before[name]) != moves or not tensor.abs().max(), name
    for name in fixed:
        assert torch.equal(before[name], root[name.replace(".parametrizations.weight.original", ".weight")])
    events = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    start = next(event for event in events if event["event"] == "start")
    assert start["trained_parameters"] == sum(p.numel() for p in trainer.network.parameters() if p.requires_grad) < start["parameters"]


def test_the_model_is_an_ordinary_network_with_its_difference_beside_it(at: At, trained: Path, tmp_path: Path) -> None:
    train(at("run", 2), progress=False)
    model, average = tmp_path / "run/model", load_file(checkpoints(tmp_path / "run")[-1] / "ema.safetensors")
    difference, _ = load_difference(model / "base64" / LOW_RANK)
    for name, factors in difference.factors.items():
        where = name.removesuffix(".weight") + ".parametrizations.weight"
        assert torch.equal(factors.up, average[f"{where}.0.up"]) and torch.equal(factors.down, average[f"{where}.0.down"])
        assert factors.rank == 2
    weights, root = load_file(model / "base64" / WEIGHTS), load_file(trained / "model/base64" / WEIGHTS)
    assert difference.root == fingerprint(root) and weights.keys() == root.keys()
    restored = restore(root, difference)
    assert all(torch.equal(restored[name], weights[name]) for name in weights) and not torch.equal(
        weights["network.conv_in.weight"], root["network.conv_in.weight"]
    )
    assert load_model(model).fingerprint == read_facts(checkpoints(tmp_path / "run")[-1])["model"]


def test_it_goes_on_bit_for_bit_without_the_weights_that_it_began_with(at: At, trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "model", tmp_path / "initial")
    initial = f"training.initial={tmp_path / 'initial'}"
    train(at("unbroken", 3, initial), progress=False)
    train(at("run", 3, initial, "training.images=16"), progress=False)
    shutil.rmtree(tmp_path / "initial")
    with pytest.raises(ValueError, match=r"training\.rank: 3 -> 4"):
        Trainer(at("run", 4, initial), progress=False)
    train(at("run", 3, initial), progress=False)
    for name in ("network", "ema", "optimizer"):
        first, second = ((checkpoints(tmp_path / run)[-1] / f"{name}.safetensors").read_bytes() for run in ("unbroken", "run"))
        assert first == second, name
    for file in (WEIGHTS, LOW_RANK):
        assert (tmp_path / "unbroken/model/base64" / file).read_bytes() == (tmp_path / "run/model/base64" / file).read_bytes()


def test_snapshots_of_averages_are_of_ordinary_networks(at: At, tmp_path: Path) -> None:
    train(at("run", 2, "training.ema={kind: power, snapshot_every_images: 16}"), progress=False)
    save_reconstruction(tmp_path / "run", tmp_path / "model", 0.05)
    first, second = (load_file(tmp_path / name / "base64" / WEIGHTS) for name in ("run/model", "model"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_ranks_that_cannot_be_leave_no_folder(at: At, write_config: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"training\.rank=2 needs training\.initial"):
        load_config(write_config("run"), ["training.rank=2"])
    with pytest.raises(ValueError, match=r"training\.rank=-1 must be finite and not negative"):
        at("run", -1)
    with pytest.raises(ValueError, match=r"training\.rank=500: no matrix of the network is larger than .*; take a smaller one"):
        Trainer(at("run", 500), progress=False)
    assert not (tmp_path / "run").exists()


def test_the_memory_is_that_of_what_is_trained(at: At) -> None:
    config = at("run", 1)
    low = estimate_training(config)
    network = build_network(config.stage)
    whole = sum(p.nbytes for p in network.parameters())
    at_rank(network, config.training)
    assert low.gradients == sum(p.nbytes for p in network.parameters() if p.requires_grad) < whole / 2
    assert low.optimizer == 2 * low.gradients and low.weights > whole


@pytest.mark.parametrize("bf16", [False, True])
def test_compiled_training_is_that_of_the_network(bf16: bool) -> None:
    """One graph, without a break, and the same gradients."""
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(64, 6))
    add_low_rank(plain, 2)
    for name, parameter in plain.named_parameters():
        if name.endswith("up"):
            nn.init.normal_(parameter)
    compiled = copy.deepcopy(plain)
    compile_denoiser(compiled, training=True, backend="aot_eager")
    x, found = torch.randn(2, 3, 8, 8), []
    for network in (plain, compiled):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            network(x).float().square().mean().backward()
        found.append({name: p.grad for name, p in network.named_parameters()})
    assert sum(gradient is not None for gradient in found[0].values()) == 9 and not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 1
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()
