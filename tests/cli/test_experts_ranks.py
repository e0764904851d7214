"""`t2i-experts experts ranks`: losses by rank, on the draws that training validates on."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch

from t2i_experts.cascade.model_folder import load_model
from t2i_experts.config import load_config
from t2i_experts.experts.lowrank import Decomposition, restore
from t2i_experts.shards.reader import ShardReader
from t2i_experts.training.task import DiffusionTask
from t2i_experts.training.validation import validate
from tests.cli.test_experts_assemble import Runs, root, runs  # noqa: F401

CLI = Callable[..., tuple[int, str, str]]


def test_losses_are_those_of_the_networks(root: Runs, cli: CLI) -> None:  # noqa: F811
    folder = root.write("complement", ["1/4", "3/4"], 32, seed=2)
    code, out, err = cli("experts", "ranks", root.config, "--rank", 3, "--rank", 1, "--images", 4, "--device", "cpu", "--json")
    assert (code, err) == (0, "")
    document = json.loads(out)["experts"]
    assert list(document) == ["complement"], "the root stands in for the others"
    rows = document["complement"]
    assert [row["rank"] for row in rows] == [0, 1, 3, None]

    expert, model = load_model(folder), load_model(root.output / "model")
    (stage,), (own_root,) = expert.stages.values(), model.stages.values()
    config = load_config(root.config)
    task = DiffusionTask(stage.config, model.conditioner, seed=0, device=torch.device("cpu"))
    reader = ShardReader([str(config.data.validation)], size=16, seed=0)
    network, weights = own_root.denoiser, {}
    assert isinstance(network, torch.nn.Module) and isinstance(stage.denoiser, torch.nn.Module)
    weights = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    decomposition = Decomposition(weights, stage.denoiser.state_dict())
    for row in rows:
        difference = decomposition.at_rank(decomposition.largest_rank if row["rank"] is None else row["rank"])
        network.load_state_dict(restore(weights, difference) if row["rank"] != 0 else weights)
        found = validate(network, task, reader, images=4, bins=2, batch_size=4)
        assert row["loss"] == pytest.approx(found.mean, rel=1e-5) and row["standard_error"] == pytest.approx(found.standard_error, rel=1e-4)
        assert row["above"] == pytest.approx(row["loss"] - rows[-1]["loss"], abs=1e-6)
        assert row["bytes"] == (difference.bytes if row["rank"] != 0 else 0)
    assert rows[0]["error"] == 1 and rows[-1]["error"] == 0 and rows[1]["above_error"] > 0


def test_the_table_and_what_is_refused(root: Runs, cli: CLI) -> None:  # noqa: F811
    code, _, err = cli("experts", "ranks", root.config, "--device", "cpu")
    assert code == 2 and "no expert is trained that has the root's network" in err
    root.write("complement", ["1/4", "3/4"], 31, seed=2)
    code, out, err = cli("experts", "ranks", root.config, "--early", "--images", 2, "--dtype", "bfloat16", "--device", "cpu")
    assert (code, err) == (0, "")
    name, head, *rows = out.splitlines()
    assert name == "complement" and head.split()[:2] == ["rank", "bytes"]
    assert [row.split()[0] for row in rows if row] == ["root", "1", "2", "4", "8", "full"]
    for options, message in (
        (["--rank", 0], "--rank=0 must be at least 1"),
        (["--images", 0], "--images=0 must be at least 1"),
        (["data.validation=null", "training.validation.every_images=0", "--early"], "data.validation=None: name a shard folder"),
    ):
        code, out, err = cli("experts", "ranks", root.config, *options)
        assert (code, out) == (2, "") and err.startswith(f"error: {message}")
