"""`t2i-experts experts assemble` with differences from the root in the place of whole experts."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from t2i_experts.cascade.expert_weights import LOW_RANK
from t2i_experts.cascade.model_folder import load_model
from t2i_experts.cascade.pipeline import CascadePipeline
from t2i_experts.cascade.weights import WEIGHTS, read_weights
from t2i_experts.config import ResolutionSpec
from t2i_experts.diffusion.precond import EDMPrecond
from t2i_experts.experts.ensemble import ExpertEnsemble
from t2i_experts.experts.lowrank import Decomposition
from t2i_experts.experts.lowrank_file import load_difference
from t2i_experts.experts.states import count_bytes
from tests.cli.test_experts_assemble import Runs, root, runs  # noqa: F401

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
