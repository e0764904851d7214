"""A network other than the U-Net: chosen by name, configured by options of its own, and back from a model folder as it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from t2i_experts.cascade.model_folder import load_model, save_model
from t2i_experts.cascade.stage import build_network
from t2i_experts.conditioning.conditioner import TextConditioner
from t2i_experts.config import NetworkConfig, SamplingConfig, StageConfig, check_stage, load_config, to_plain
from t2i_experts.registry import Registry

OPTIONS = {"channels": 4, "layers": [{"kernel": 3}, {"kernel": 1, "name": None}], "scale": 0.5, "gated": True}


class Plain(nn.Module):
    """Says the same of every prompt."""

    def __init__(self, config: StageConfig, *, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.options = dict(config.network.options)
        self.channels = (in_channels, out_channels)
        channels = self.options["channels"]
        sizes = [spec["kernel"] for spec in self.options["layers"]]
        self.layers = nn.ModuleList([nn.Conv2d(in_channels, channels, 1)])
        self.layers.extend(nn.Conv2d(channels, channels, size, padding=size // 2) for size in sizes)
        self.layers.append(nn.Conv2d(channels, out_channels, 1))

    def project(self, embeddings: Any) -> dict[str, Tensor]:
        return {"mask": next(iter(embeddings.values())).mask}

    def forward(self, x: Tensor, c_noise: Tensor, projected: Any) -> Tensor:
        assert len(projected["mask"]) == len(x) == len(c_noise)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x * self.options["scale"]


def unsaved(config: StageConfig, *, in_channels: int, out_channels: int) -> nn.Module:
    network = Plain(config, in_channels=in_channels, out_channels=out_channels)
    network.register_buffer("table", torch.ones(3), persistent=False)
    return network


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Registry:
    registry = Registry(plugins=())
    registry.add("backbone", "plain", Plain)
    registry.add("backbone", "unsaved", unsaved)
    registry.add("backbone", "function", lambda config, **channels: lambda x: x)
    registry.add("backbone", "unprojected", lambda config, **channels: nn.Conv2d(3, 3, 1))
    monkeypatch.setattr("t2i_experts.cascade.stage.registry", registry)
    return registry


@pytest.fixture
def stage(stage_config: StageConfig) -> StageConfig:
    return replace(stage_config, network=NetworkConfig(backbone="plain", options=OPTIONS))


@pytest.fixture
def folder(registry: Registry, stage: StageConfig, tmp_path: Path) -> Path:
    conditioner = TextConditioner.from_config(stage.encoders)
    torch.manual_seed(0)
    save_model(tmp_path / "model", stage, SamplingConfig(), build_network(stage).state_dict(), conditioner)
    return tmp_path / "model"


def test_a_model_folder_brings_back_the_backbone_its_options_and_its_weights(folder: Path, stage: StageConfig) -> None:
    torch.manual_seed(0)
    expected = build_network(stage)
    loaded = load_model(folder).stages["base64"]
    assert loaded.config.network == stage.network
    network = loaded.denoiser.network  # type: ignore[attr-defined]
    assert isinstance(network, Plain)
    assert network.options == OPTIONS
    assert network.channels == (3, 3)
    weights = expected.network.state_dict()  # type: ignore[attr-defined]
    assert all(torch.equal(weights[name], tensor) for name, tensor in network.state_dict().items())


def test_a_folder_whose_backbone_is_not_installed_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert json.loads((folder / "base64" / "config.json").read_text())["_class_name"] == "plain"
    monkeypatch.setattr("t2i_experts.cascade.stage.registry", Registry(plugins=()))
    with pytest.raises(ValueError, match=r"base64/config\.json: unknown backbone 'plain'; allowed: unet"):
        load_model(folder)


def test_folders_of_older_versions_are_unets(model_folder: Path, tmp_path: Path) -> None:
    path = model_folder / "base64" / "config.json"
    tree = json.loads(path.read_text())
    assert tree["_class_name"] == "UNet"
    assert tree["network"].pop("backbone") == "unet"
    assert tree["network"].pop("options") == {}
    for file in model_folder.rglob("*"):
        target = tmp_path / file.relative_to(model_folder)
        target.mkdir() if file.is_dir() else target.write_bytes(file.read_bytes())
    (tmp_path / "base64" / "config.json").write_text(json.dumps(tree))
    assert load_model(tmp_path).stages["base64"].config.network == load_model(model_folder).stages["base64"].config.network


@pytest.mark.parametrize(
    ("backbone", "said"),
    [
        ("unsaved", r"backbone 'unsaved' has buffers that a model folder would lose, \['table'\]"),
        ("function", "backbone 'function' gave function; it must give a torch.nn.Module with a method project"),
        ("unprojected", "backbone 'unprojected' gave Conv2d; it must give"),
    ],
)
def test_a_backbone_that_gives_no_network_is_named(registry: Registry, stage: StageConfig, backbone: str, said: str) -> None:
    with pytest.raises(TypeError, match=said):
        build_network(replace(stage, network=NetworkConfig(backbone=backbone, options=OPTIONS)))


def test_options_come_from_files_and_overrides(write_config: Callable[[str], Path], tmp_path: Path) -> None:
    whole = to_plain(load_config(write_config("run")))
    whole["stage"]["network"] = {"backbone": "plain", "options": {"channels": 4, "layers": [1, {"a": 2.5}]}}
    (tmp_path / "plain.yaml").write_text(json.dumps(whole))
    network = load_config(
        tmp_path / "plain.yaml", ["stage.network.options.channels=6", "stage.network.options.new={b: [x, true]}"]
    ).stage.network
    assert network.options == {"channels": 6, "layers": [1, {"a": 2.5}], "new": {"b": ["x", True]}}
    assert type(network.options) is dict


@pytest.mark.parametrize(
    ("network", "said"),
    [
        (
            NetworkConfig(backbone="x", patch_size=2),
            "network.patch_size=2 is the unet's; the settings of the backbone 'x', if that is one, belong in network.options",
        ),
        (NetworkConfig(backbone="x", context_channels=8), "network.context_channels=8 is the unet's"),
        (NetworkConfig(backbone="x", options={"a": float("inf")}), "network.options.a=inf must be finite"),
        (NetworkConfig(backbone="x", options={"a": [1, {"b": float("nan")}]}), "network.options.a[1].b=nan must be finite"),
        (NetworkConfig(backbone="x", options={"a": {1: 2}}), "network.options.a: the key 1 must be a string"),
        (NetworkConfig(backbone="x", options={"a": b"bytes"}), "network.options.a=b'bytes'; allowed: null, true, false, numbers"),
    ],
)
def test_what_would_be_ignored_or_lost_is_refused(stage_config: StageConfig, network: NetworkConfig, said: str) -> None:
    with pytest.raises(ValueError) as caught:
        check_stage(replace(stage_config, network=network), prefix="")
    assert said in str(caught.value)


def test_the_unet_has_no_options(stage_config: StageConfig) -> None:
    unet = replace(stage_config.network, options={"depth": 3})
    with pytest.raises(ValueError, match=r"stage\.network\.options=\{'depth': 3\} would be ignored"):
        check_stage(replace(stage_config, network=unet))
