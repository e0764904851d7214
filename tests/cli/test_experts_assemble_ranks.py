"""`t2i-experts experts assemble` with differences from the root in the place of whole experts."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from t2i_experts.cascade.expert_weights import LOW_RANK
from t2i_experts.cascade.model_folder import load_model, save_model
from t2i_experts.cascade.pipeline import CascadePipeline
from t2i_experts.cascade.stage import build_network
from t2i_experts.cascade.weights import WEIGHTS, read_weights
from t2i_experts.config import ResolutionSpec, SamplingConfig, load_config
from t2i_experts.diffusion.precond import EDMPrecond
from t2i_experts.experts.ensemble import ExpertEnsemble
from t2i_experts.experts.lowrank import Decomposition
from t2i_experts.experts.lowrank_file import load_difference
from t2i_experts.experts.lowrank_training import add_low_rank, plain_state, trained_difference
from t2i_experts.experts.runs import node_runs
from t2i_experts.experts.states import count_bytes, fingerprint
from tests.cli.test_experts_assemble import FINGERPRINTS, Runs, root, runs  # noqa: F401

CLI = Callable[..., tuple[int, str, str]]
LEAVES = {"E^2_0": ["0", "1/4"], "complement": ["1/4", "3/4"], "E^2_3": ["3/4", "1"]}


@pytest.fixture
def tree(root: Runs) -> Runs:  # noqa: F811
    for seed, (name, quantiles) in enumerate(LEAVES.items(), 1):
        root.write(name, quantiles, 32, seed=seed)
    return root


def pictures(folder: Path) -> torch.Tensor:
    return CascadePipeline.from_pretrained(folder, device="cpu", dtype=torch.float32)(["a red cube"])


def assembled(cli: CLI, tree: Runs, out: Path, *options: str) -> dict[str, Any]:
    code, text, err = cli("experts", "assemble", tree.config, "--out", out, "--json", *options)
    assert (code, err) == (0, ""), err
    document: dict[str, Any] = json.loads(text)
    assert load_model(out).fingerprint == document["fingerprint"]
    for name, stored in document["experts"].items():
        own = out / "base64/experts" / name
        whole = stored["kind"] == "whole"
        assert (own / WEIGHTS).exists() == whole and (own / LOW_RANK).exists() != whole
        assert stored["bytes"] == (count_bytes(read_weights(own / WEIGHTS)) if whole else load_difference(own / LOW_RANK)[0].bytes)
    return document


def test_full_rank_is_the_whole_ensemble(tree: Runs, cli: CLI, tmp_path: Path) -> None:
    assembled(cli, tree, tmp_path / "whole")
    full = assembled(cli, tree, tmp_path / "full", "--rank", "full")
    assert {(one["kind"], one["error"]) for one in full["experts"].values()} == {("cut", 0.0)}
    assert torch.equal(pictures(tmp_path / "whole"), pictures(tmp_path / "full"))


def test_ranks_and_bytes_are_kept(tree: Runs, cli: CLI, tmp_path: Path) -> None:
    errors = []
    for rank in (1, 4):
        document = assembled(cli, tree, tmp_path / "model", "--rank", str(rank))
        assert all(one["ranks"] == [rank] * 3 for one in document["experts"].values())
        errors.append(document["experts"]["E^2_0"]["error"])
        network = load_model(tmp_path / "model").stages["base64"].denoiser
        assert isinstance(network, ExpertEnsemble) and isinstance(network.networks[0], EDMPrecond)
    assert 0 < errors[1] < errors[0] < 1
    weights, own = (read_weights(folder / "base64" / WEIGHTS) for folder in (tree.output / "model", tree.output / "nodes/E^2_0/model"))
    assert errors[1] == pytest.approx(Decomposition(weights, own).errors([4])[0].error, abs=1e-6)
    together = sum(one["bytes"] for one in document["experts"].values())
    spent = assembled(cli, tree, tmp_path / "model", "--bytes", str(together))
    assert together * 0.99 < sum(one["bytes"] for one in spent["experts"].values()) <= together
    assert sum(one["error"] ** 2 for one in spent["experts"].values()) < sum(one["error"] ** 2 for one in document["experts"].values())
    code, out, _ = cli("experts", "assemble", tree.config, "--rank", "4")
    assert code == 0 and "4 .. 4 (4)" in out and f"{document['experts']['E^2_0']['error']:.2%}" in out


def test_in_bfloat16_the_difference_is_from_the_root_as_it_is_stored(tree: Runs, cli: CLI, tmp_path: Path) -> None:
    document = assembled(cli, tree, tmp_path / "model", "--rank", "8", "--dtype", "bfloat16")
    root_weights = read_weights(tmp_path / "model/base64" / WEIGHTS)
    expert = read_weights(tree.output / "nodes/E^2_3/model/base64" / WEIGHTS)
    best = Decomposition(root_weights, expert).errors([8])[0].error
    assert document["experts"]["E^2_3"]["error"] == pytest.approx(best, rel=1e-3), "the factors' own rounding is all that is added"
    files = [tmp_path / "model/base64" / WEIGHTS, *(tmp_path / "model").rglob(LOW_RANK)]
    assert {tensor.dtype for file in files for tensor in read_weights(file).values()} == {torch.bfloat16} and len(files) == 4


def test_who_stands_in_and_who_is_another_network(root: Runs, cli: CLI, tmp_path: Path) -> None:  # noqa: F811
    large = replace(root.stage, network=replace(root.stage.network, resolutions=[ResolutionSpec(16, 1), ResolutionSpec(16, 1, True, True)]))
    root.write("E^2_3", ["3/4", "1"], 32, stage=large)
    root.write("E^2_0", ["0", "1/4"], 32, seed=4)
    document = assembled(cli, root, tmp_path / "model", "--rank", "2")
    assert {name: one["kind"] for name, one in document["experts"].items()} == {"E^2_0": "cut", "root": "root", "E^2_3": "whole"}
    assert document["experts"]["root"]["bytes"] == 0
    size = document["experts"]["E^2_3"]["bytes"] + 5000
    spent = assembled(cli, root, tmp_path / "model", "--bytes", str(size))
    assert sum(one["bytes"] for one in spent["experts"].values()) <= size


def test_options_that_cannot_be(tree: Runs, cli: CLI) -> None:
    for options, message in (
        (["--rank", "0"], "--rank='0'; allowed: full, or a number from 1 on"),
        (["--rank", "much"], "--rank='much'; allowed"),
        (["--bytes", "0"], "--bytes=0 must be at least 1"),
        (["--bytes", "9"], "--bytes=9 must be at least "),
        (["--bytes", "9000", "--rank", "3"], "--rank=3, --bytes=9000: give one of the two"),
    ):
        code, out, err = cli("experts", "assemble", tree.config, *options)
        assert (code, out) == (2, "") and err.startswith(f"error: {message}")
    assert not (tree.output / "ensemble").exists()


def write_low_rank(tree: Runs, name: str, parent: Path, rank: int, seed: int) -> Path:
    """A node's model as training at low rank from a parent's leaves it."""
    stage = replace(tree.stage, noise=replace(tree.stage.noise, quantiles=LEAVES.get(name, ["0", "1/2"])))
    weights = read_weights(parent / "base64" / WEIGHTS)
    network = build_network(stage)
    network.load_state_dict(weights)
    torch.manual_seed(seed)
    add_low_rank(network, rank)
    for parameter in network.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    state, folder = network.state_dict(), tree.output / "nodes" / name / "model"
    facts = {"images_seen": 32, "dataset_hash": "d", **FINGERPRINTS}
    trained = trained_difference(state, fingerprint(weights))
    conditioner = tree.model.conditioner
    save_model(folder, stage, SamplingConfig(), plain_state(state), conditioner, provenance=facts, trained=trained)
    return folder


def test_what_was_trained_at_low_rank_is_taken_as_it_was_trained(tree: Runs, cli: CLI, tmp_path: Path) -> None:
    assembled(cli, tree, tmp_path / "before")
    node = write_low_rank(tree, "E^2_0", tree.output / "model", 3, seed=5)
    parent = write_low_rank(tree, "E^1_1", tree.output / "model", 2, seed=6)
    write_low_rank(tree, "E^2_3", parent, 2, seed=7)
    document = assembled(cli, tree, tmp_path / "model")
    kinds = {name: one["kind"] for name, one in document["experts"].items()}
    assert kinds == {"E^2_0": "trained", "complement": "whole", "E^2_3": "whole"}, "the last one's root is another node"
    stored, written = (load_difference(path / LOW_RANK)[0] for path in (tmp_path / "model/base64/experts/E^2_0", node / "base64"))
    for name, factors in written.factors.items():
        assert torch.equal(factors.up, stored.factors[name].up) and torch.equal(factors.down, stored.factors[name].down)
    assert document["experts"]["E^2_0"]["error"] == 0 and document["experts"]["E^2_0"]["ranks"] == [3, 3, 3]
    ensemble, alone = (load_model(folder).stages["base64"].denoiser for folder in (tmp_path / "model", node))
    assert isinstance(ensemble, ExpertEnsemble) and isinstance(ensemble.networks[0], EDMPrecond) and isinstance(alone, EDMPrecond)
    assert all(torch.equal(tensor, alone.state_dict()[name]) for name, tensor in ensemble.networks[0].state_dict().items())

    for rank, kind in ((3, "trained"), (2, "cut")):
        document = assembled(cli, tree, tmp_path / "model", "--rank", str(rank), "--dtype", "bfloat16")
        assert [document["experts"][name]["kind"] for name in LEAVES] == [kind, "cut", "cut"]
    spent = assembled(cli, tree, tmp_path / "model", "--bytes", str(written.bytes + 5000))
    assert spent["experts"]["E^2_0"]["kind"] == "trained" and sum(one["bytes"] for one in spent["experts"].values()) <= written.bytes + 5000

    weights = node / "base64" / WEIGHTS
    save_file({name: tensor + 1 for name, tensor in read_weights(weights).items()}, weights)
    code, _, err = cli("experts", "assemble", tree.config)
    assert code == 2 and f"{node / 'base64' / LOW_RANK}: with the root it does not give the weights beside it" in err


def test_nodes_are_trained_at_a_rank_by_an_override(tree: Runs) -> None:
    overrides = ["experts.overrides=[training.rank=4]", "experts.nodes={E^2_0: {overrides: [training.rank=0]}}"]
    nodes = node_runs(load_config(tree.config, overrides))
    assert {name: one.config.training.rank for name, one in nodes.items()} == {
        "root": 0,
        "E^1_0": 4,
        "E^2_0": 0,
        "complement": 4,
        "E^1_1": 4,
        "E^2_3": 4,
    }
