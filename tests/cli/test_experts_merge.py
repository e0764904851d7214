"""`t2i-experts experts merge`: the root, one expert, what lies between, and what a search finds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from t2i_experts.cascade.model_folder import WEIGHTS, load_model, read_configs, read_network, read_provenance
from t2i_experts.cascade.pipeline import CascadePipeline
from t2i_experts.diffusion.precond import EDMPrecond
from t2i_experts.shards.reader import ShardReader
from t2i_experts.training.task import DiffusionTask
from t2i_experts.training.validation import validate

CLI = Callable[..., tuple[int, str, str]]


def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "base64" / WEIGHTS)


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_given_weights_give_the_root_one_expert_or_what_lies_between(leaves: Any, cli: CLI) -> None:
    merge, merged = ("experts", "merge", leaves.config, "--weights"), leaves.output / "merged"
    code, out, err = cli(*merge, "E^1_0=0", "--json")
    assert (code, err) == (0, "") and equal(tensors(merged), leaves.root()), "bit for bit"
    document = json.loads(out)
    assert document["weights"] == {"E^1_0": 0.0, "E^1_1": 0.0} and document["search"] is None
    assert cli(*merge, "E^1_1=1")[0] == 0 and equal(tensors(merged), tensors(leaves.leaf("E^1_1")))
    assert cli(*merge, "E^1_0=0.5", "--weights", "E^1_1=-2")[0] == 0
    root, low, high = leaves.root(), tensors(leaves.leaf("E^1_0")), tensors(leaves.leaf("E^1_1"))
    for name, tensor in tensors(merged).items():
        torch.testing.assert_close(tensor, root[name] + 0.5 * (low[name] - root[name]) - 2 * (high[name] - root[name]))
    facts = read_provenance(merged)["merged"]
    assert facts["weights"] == {"E^1_0": 0.5, "E^1_1": -2.0}
    assert facts["experts"]["E^1_0"]["fingerprint"] == read_network(leaves.leaf("E^1_0"))[2]
    assert read_configs(merged)[0] == read_configs(leaves.output / "model")[0], "an ordinary model of all noise"
    assert CascadePipeline.from_pretrained(merged, device="cpu")("a red cube").shape == (1, 3, 16, 16)


def test_what_is_searched_for_on_one_part_is_reported_on_the_other(leaves: Any, cli: CLI, shards: Path, tmp_path: Path) -> None:
    options = ("--search", "--evaluations", 9, "--device", "cpu", "--out", tmp_path / "here", "--json")
    code, out, err = cli("experts", "merge", leaves.config, *options)
    assert code == 0 and "lowest loss" in err
    document = json.loads(out)
    search = document["search"]
    assert search["images"] == 4 and len(search["evaluations"]) == 9
    assert document["weights"] == search["best"]["weights"] == min(search["evaluations"], key=lambda one: one["loss"])["weights"]
    assert [one["weights"]["E^1_0"] for one in search["evaluations"][:2]] == [0.0, 0.5]
    assert search == read_provenance(tmp_path / "here")["merged"]["search"]

    reader = ShardReader([shards / "validation"], size=16, seed=0)
    for folder, name in ((leaves.output / "model", "root"), (tmp_path / "here", "found")):
        stage, conditioner = load_model(folder).stages["base64"], load_model(folder).conditioner
        assert isinstance(stage.denoiser, EDMPrecond)
        task = DiffusionTask(stage.config, conditioner, seed=0, device=torch.device("cpu"))
        losses = validate(stage.denoiser, task, reader, images=8, bins=2, batch_size=8).losses
        searched, reported = losses[:4].mean(), losses[4:].mean()
        assert float(reported) == pytest.approx(search["reported"][name]["loss"], rel=1e-5)
        weights = search["reported"][name]["weights"]
        assert float(searched) == pytest.approx(next(o["loss"] for o in search["evaluations"] if o["weights"] == weights), rel=1e-5)
    again = cli("experts", "merge", leaves.config, *options, "--images", 2)
    assert again[0] == 0 and json.loads(again[1])["search"]["images"] == 2, "over an earlier merge, on fewer pictures"


def test_the_papers_projections_are_added_where_they_lack(tree: Any, cli: CLI) -> None:
    tree.write("E^1_0", projections=True)
    tree.write("E^1_1")
    assert cli("experts", "merge", tree.config, "--weights", "E^1_0=1")[0] == 0
    merged = tree.output / "merged"
    assert read_configs(merged)[0].network.projections and equal(tensors(merged), tensors(tree.leaf("E^1_0")))
    assert cli("experts", "merge", tree.config, "--weights", "E^1_1=1")[0] == 0
    assert equal({name: t for name, t in tensors(merged).items() if "projection" not in name}, tensors(tree.leaf("E^1_1")))


def test_mistakes_are_told_by_name(leaves: Any, cli: CLI, tmp_path: Path) -> None:
    def refused(*options: object) -> str:
        code, out, err = cli("experts", "merge", leaves.config, *options)
        assert (code, out) == (2, "") and not (leaves.output / "merged").exists()
        return err

    assert "either --search or --weights LEAF=W; the plain average is --weights E^1_0=0.5 --weights E^1_1=0.5" in refused()
    assert "either --search or --weights" in refused("--search", "--weights", "E^1_0=1")
    assert "--weights root=1: give LEAF=W, each leaf once; the leaves are E^1_0, E^1_1" in refused("--weights", "root=1")
    assert "each leaf once" in refused("--weights", "E^1_0=1", "--weights", "E^1_0=2")
    assert "'nan' must be a finite number" in refused("--weights", "E^1_0=nan")
    assert "--images=4 would be ignored" in refused("--weights", "E^1_0=1", "--images", "4")
    assert "data.validation='" in refused("--search", "--images", "5") and "--images=5: two parts" in refused("--search", "--images", "5")
    assert "data.validation=null: a search needs" in refused(
        "data.validation=null", "training.validation.every_images=0", "--search"
    )  # fmt: skip
    assert "exists and is no earlier merge" in refused("--weights", "E^1_0=1", "--out", leaves.output / "model")
    assert "experts.leaves=[] names no experts" in refused("experts.leaves=[]", "experts.images=0", "--search")
    shutil.rmtree(leaves.leaf("E^1_1"))
    assert "a merge needs the leaves themselves, and nothing that stands in for them; E^1_1: no model in " in refused(
        "--search"
    )  # fmt: skip
    leaves.write("E^1_1", images_seen=16)
    assert "has seen 16 of 32 images; --early takes it as it is" in refused("--search")
    assert cli("experts", "merge", leaves.config, "--early", "--weights", "E^1_0=1", "--out", tmp_path / "early")[0] == 0
