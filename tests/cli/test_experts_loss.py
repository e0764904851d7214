"""`t2i-experts experts loss`: the held-out loss by range of noise, of several models on the same draws."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch

from t2i_experts.cascade.expert_folders import ExpertState, Leaf
from t2i_experts.cascade.model_folder import load_model, save_ensemble
from t2i_experts.cascade.stage import build_network
from t2i_experts.config import SamplingConfig
from t2i_experts.experts.interval import NoiseInterval
from t2i_experts.shards.reader import ShardReader
from t2i_experts.training.task import DiffusionTask
from t2i_experts.training.validation import validate

CLI = Callable[..., tuple[int, str, str]]


@pytest.fixture
def ensemble(tmp_path: Path, model_folder: Path) -> Path:
    """The model folder's own network for the lower half of the noise, and another one for the upper."""
    model = load_model(model_folder)
    stage = model.stages["base64"]
    torch.manual_seed(5)
    other = build_network(stage.config)
    for parameter in other.parameters():
        torch.nn.init.normal_(parameter, std=0.3)

    def state(network: Any, *quantiles: str) -> ExpertState:
        return ExpertState(replace(stage.config, noise=replace(stage.config.noise, quantiles=list(quantiles))), network.state_dict())

    low, high = (NoiseInterval.node(1, index, NoiseInterval.from_config(stage.config.noise).distribution) for index in (0, 1))
    save_ensemble(
        tmp_path / "ensemble",
        stage.config,
        SamplingConfig(),
        [Leaf("low", low, "low"), Leaf("high", high, "high")],
        {"low": state(stage.denoiser, "0", "1/2"), "high": state(other, "1/2", "1")},
        model.conditioner,
    )
    return tmp_path / "ensemble"


def test_it_changes_where_the_network_does_and_nowhere_else(cli: CLI, model_folder: Path, ensemble: Path, shards: Path) -> None:
    code, out, err = cli(
        "experts", "loss", model_folder, ensemble, "--shards", shards / "train", "--images", 6, "--draws", 3, "--device", "cpu", "--json"
    )
    assert code == 0, err
    document = json.loads(out)
    low, high, everything = document["ranges"]
    assert (low["quantiles"], high["quantiles"], everything["quantiles"]) == (["0", "1/2"], ["1/2", "1"], ["0", "1"])
    assert low["models"][1]["change"] == 0 and low["models"][1]["standard_error_of_change"] == 0
    assert high["models"][1]["change"] != 0
    for i in (0, 1):
        both = (low["models"][i]["loss"] + high["models"][i]["loss"]) / 2
        assert everything["models"][i]["loss"] == pytest.approx(both, rel=1e-9)
    # the same numbers by the training's own validation
    model = load_model(model_folder)
    stage = model.stages["base64"]
    config = replace(stage.config, noise=replace(stage.config.noise, quantiles=["1/2", "1"]))
    task = DiffusionTask(config, model.conditioner, seed=0, device=torch.device("cpu"))
    reader = ShardReader([shards / "train"], size=config.size, seed=0)
    expected = validate(stage.denoiser, task, reader, images=6, bins=3, batch_size=6)
    assert high["models"][0]["loss"] == pytest.approx(expected.mean, rel=1e-6)
    assert document["images"] == 6 and document["shards"] == reader.dataset_hash

    code, out, err = cli("experts", "loss", ensemble, model_folder, "--shards", shards / "train", "--images", 4, "--device", "cpu")
    assert code == 0 and len(out.splitlines()) == 4 and "+0.00% ± 0.00%" in out.splitlines()[1], out


def test_ranges_of_ones_own(cli: CLI, model_folder: Path, shards: Path) -> None:
    options = ["experts", "loss", model_folder, "--shards", shards / "train", "--images", 2, "--draws", 1, "--device", "cpu", "--json"]
    code, out, err = cli(*options, "--at", "1/8, 0.5")
    assert code == 0
    assert [Fraction(one["quantiles"][1]) for one in json.loads(out)["ranges"]] == [Fraction(1, 8), Fraction(1, 2), 1, 1]
    for options_more, message in (
        ([], "none of the models is an ensemble"),
        (["--at", "1/2,1/8"], "--at=1/2,1/8 must be ascending"),
        (["--at", "x"], "--at=x must be ascending"),
        (["--at", "1/2", "--dtype", "float16"], "--dtype=float16 must be float32 or bfloat16"),
        (["--at", "1/2", "--draws", 0], "--draws=0 must be at least 1"),
    ):
        code, _, err = cli(*options, *options_more)
        assert code == 2 and message in err, err
