"""`t2i-experts experts assemble` on runs that stand there as training leaves them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from t2i_experts.cascade.model_folder import load_model, read_configs, save_model
from t2i_experts.cascade.picture import read_metadata
from t2i_experts.cascade.pipeline import CascadePipeline
from t2i_experts.config import ExpertSamplingConfig, ResolutionSpec, SamplingConfig, StageConfig
from t2i_experts.experts.ensemble import ExpertEnsemble

CLI = Callable[..., tuple[int, str, str]]
TREE = """
experts: {leaves: [E^2_0, complement, E^2_3], images: 32}
"""
FINGERPRINTS = {"encoders": {"t5": "a", "clip_text": "b", "clip_image": "c"}, "codec": None}


class Runs:
    """A config whose runs are written by hand: the same encoders, random networks."""

    def __init__(self, config: Path, output: Path, model_folder: Path) -> None:
        self.config, self.output = config, output
        self.model = load_model(model_folder)
        self.stage = self.model.stages["base64"].config

    def write(
        self, name: str, quantiles: list[str], images_seen: int, *, stage: StageConfig | None = None, seed: int = 0, **provenance: Any
    ) -> Path:
        from t2i_experts.cascade.stage import build_network

        torch.manual_seed(seed)
        stage = stage or self.stage
        network = build_network(stage)
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        folder = (self.output if name == "root" else self.output / "nodes" / name) / "model"
        folder.parent.mkdir(parents=True, exist_ok=True)
        stage = replace(stage, noise=replace(stage.noise, quantiles=quantiles))
        facts = {"images_seen": images_seen, "dataset_hash": "d", **FINGERPRINTS, **provenance}
        save_model(folder, stage, SamplingConfig(), network.state_dict(), self.model.conditioner, provenance=facts)
        return folder


@pytest.fixture
def runs(write_config: Callable[[str], Path], tmp_path: Path, model_folder: Path) -> Runs:
    config = write_config("run")
    config.write_text(config.read_text() + TREE)
    return Runs(config, tmp_path / "run", model_folder)


@pytest.fixture
def root(runs: Runs) -> Runs:
    runs.write("root", [], 64)
    return runs


def experts_of(document: dict[str, Any]) -> list[str]:
    return [one["expert"] for one in document["leaves"]]


def test_what_is_there_answers_and_what_stands_in_is_told(root: Runs, cli: CLI) -> None:
    code, out, err = cli("experts", "assemble", root.config)
    assert (code, err) == (0, "")
    _head, *rows, _empty, first, second, third, last = out.splitlines()
    assert [row.split() for row in rows] == [
        ["E^2_0", "0", "..", "0.1341", "root", "64"],
        ["complement", "0.1341", "..", "0.6766", "root", "64"],
        ["E^2_3", "0.6766", "..", "inf", "root", "64"],
    ]
    assert first == f"root stands in for E^2_0: no model in {root.output}/nodes/E^2_0/model" and "complement" in second and "E^2_3" in third
    single, ensemble = (CascadePipeline.from_pretrained(root.output / name, device="cpu") for name in ("model", "ensemble"))
    assert torch.equal(single("a red cube", sampling=ensemble.base.sampling), ensemble("a red cube")), "the root's pictures"
    assert ensemble.model.fingerprint == last.split()[-1] != single.model.fingerprint
    assert not (root.output / "ensemble/base64/diffusion_pytorch_model.safetensors").exists()

    root.write("E^1_0", ["0", "1/2"], 32, seed=1)
    root.write("complement", ["1/4", "3/4"], 31, seed=2)
    high = replace(root.stage, network=replace(root.stage.network, resolutions=[ResolutionSpec(16, 1), ResolutionSpec(16, 1, True, True)]))
    root.write("E^2_3", ["3/4", "1"], 40, stage=high, seed=3, dataset_hash="another")
    document = json.loads(cli("experts", "assemble", root.config, "--json")[1])
    assert experts_of(document) == ["E^1_0", "root", "E^2_3"]
    assert [one["images_seen"] for one in document["leaves"]] == [32, 64, 40]
    assert [one["why"] and one["why"].split(" ", 1)[1] for one in document["leaves"]][1:] == [
        "has seen 31 of 32 images; --early takes it as it is",
        None,
    ]
    early = json.loads(cli("experts", "assemble", root.config, "--early", "--json", "--dtype", "bfloat16")[1])
    assert experts_of(early) == ["E^1_0", "complement", "E^2_3"]
    model = load_model(root.output / "ensemble")
    assert model.fingerprint == early["fingerprint"] != document["fingerprint"]
    assert isinstance(model.stages["base64"].denoiser, ExpertEnsemble) and model.provenance["images_seen"] == 64
    assert {name: (one["images_seen"], one["parent"]) for name, one in model.provenance["experts"].items()} == {
        "E^1_0": (32, "root"),
        "complement": (31, "root"),
        "E^2_3": (40, "E^1_1"),
    }
    assert read_configs(root.output / "ensemble")[0] == read_configs(root.output / "model")[0]


def test_settings_of_experts_go_along_and_pictures_name_the_ensemble(root: Runs, cli: CLI, tmp_path: Path) -> None:
    settings = ["sampling.experts.E^2_3.guidance=7", "sampling.experts.E^2_3.steps=4"]
    code, out, err = cli("experts", "assemble", root.config, *settings, "--out", tmp_path / "here", "--json")
    assert (code, err) == (0, "") and not (root.output / "ensemble").exists()
    assert read_configs(tmp_path / "here")[1].experts == {"E^2_3": ExpertSamplingConfig(7.0, 4)}
    drawn = ("generate", "a red cube", "--model", tmp_path / "here", "--device", "cpu", "--out", tmp_path / "p.png", "--json")
    pictures = json.loads(cli(*drawn)[1])
    assert pictures["model"]["fingerprint"] == json.loads(out)["fingerprint"]
    metadata = read_metadata(tmp_path / "p.png")
    assert metadata is not None and metadata["model"] == pictures["model"] and metadata["sampling"] == pictures["sampling"]
    assert metadata["sampling"]["experts"] == {"E^2_3": {"guidance": 7.0, "steps": 4}} and metadata["sampling"]["steps"] == 3
    assert metadata["sampling"]["steps_in_all"] == 4 + 1, "of the three levels of the common schedule, one lies below"
    for options, expected in (
        (["--steps", "5"], {"E^2_3": {"guidance": 7.0, "steps": None}}),
        (["--guidance", "2"], {"E^2_3": {"guidance": None, "steps": 4}}),
        (["--expert", "E^2_3:steps=2", "--expert", "E^2_0:guidance=1"], None),
    ):
        found = json.loads(cli(*drawn, *options)[1])["sampling"]["experts"]
        assert found == (expected or {"E^2_3": {"guidance": 7.0, "steps": 2}, "E^2_0": {"guidance": 1.0, "steps": None}})
    unguided = [word for leaf in ("E^2_0", "complement", "E^2_3") for word in ("--expert", f"{leaf}:guidance=1")]
    assert cli(*drawn, *unguided, "--negative", "a green cube")[2].startswith("error: --negative='a green cube' has no effect")
    assert cli(*drawn, *unguided[:4], "--negative", "a green cube")[0] == 0, "E^2_3 has 7"
    code, _, err = cli(*drawn, "--expert", "E^1_0:steps=2")
    assert (code, err) == (2, "error: --expert=E^1_0: this model has no such expert; its experts: E^2_0, complement, E^2_3\n")


def test_who_draws_with_an_expert_alone_is_warned(runs: Runs, cli: CLI, tmp_path: Path) -> None:
    drawn = ("generate", "a red cube", "--device", "cpu", "--out", tmp_path / "p.png", "--json", "--model")
    code, _, err = cli(*drawn, runs.write("E^1_0", ["0", "1/2"], 32))
    assert code == 0 and err.startswith("warning: this model is an expert for a part of the noise, the quantiles 0 to 1/2, and draws no ")
    assert cli(*drawn, runs.write("root", [], 64))[2] == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("E^2_0", "must be of the form LEAF:guidance=G,steps=N"),
        ("E^2_0:", "must be of the form"),
        (":steps=3", "must be of the form"),
        ("E^2_0:steps=x", "must be of the form"),
        ("E^2_0:steps=3,steps=4", "must be of the form"),
        ("E^2_0:rho=3", "must be of the form"),
        ("E^2_0:steps=0", "experts.E^2_0.steps=0 must be at least 1"),
        ("E^2_0:guidance=-1", "experts.E^2_0.guidance=-1.0 must be finite and not negative"),
    ],
)
def test_words_that_say_no_experts_settings(cli: CLI, words: str, message: str) -> None:
    code, out, err = cli("generate", "x", "--expert", words)
    assert (code, out) == (2, "") and err.startswith(f"error: --expert={words!r}") and message in err
    code, _, err = cli("generate", "x", "--expert", "a:steps=3", "--expert", "a:guidance=3")
    assert code == 2 and "a comes twice" in err


def test_what_cannot_be_assembled(runs: Runs, cli: CLI, tmp_path: Path) -> None:
    def refused(*arguments: object) -> str:
        code, out, err = cli("experts", "assemble", runs.config, *arguments)
        assert (code, out) == (2, "") and err.startswith("error: "), err
        return err

    assert "no root to assemble experts around: no model in" in refused()
    assert "experts.leaves=[] names no experts" in refused("experts.leaves=[]", "experts.images=0")
    runs.write("root", [], 63)
    assert "no root to assemble experts around" in refused() and "63 of 64 images; --early" in refused()
    runs.write("root", [], 64)
    assert "--dtype='float16'" in refused("--dtype", "float16")
    (tmp_path / "mine").mkdir()
    assert "exists and is no model folder" in refused("--out", tmp_path / "mine")
    assert "holds a single network's model, which would be lost" in refused("--out", runs.output / "model")
    for stage, quantiles, provenance, message in (
        (
            None,
            ["0", "1/8"],
            {},
            "E^2_0/model was trained on sigma in (0, 0.07574], quantiles 0 to 1/8, but the plan has sigma in (0, 0.1341]",
        ),
        (None, ["0", "1/4"], {"codec": "x"}, "was trained with other codec than"),
        (None, ["0", "1/4"], {"encoders": {**FINGERPRINTS["encoders"], "t5": "z"}}, "was trained with other encoders (t5) than"),  # type: ignore[dict-item]
        (
            replace(runs.stage, size=32),
            ["0", "1/4"],
            {},
            "the expert E^2_0 is no expert of this stage, from which it differs in size: 16 -> 32",
        ),
    ):
        runs.write("E^2_0", quantiles, 32, stage=stage, **provenance)  # type: ignore[arg-type]
        assert message in refused()
    assert not (runs.output / "ensemble").exists() and not list(runs.output.glob(".ensemble*")), "nothing is left"
    runs.write("E^2_0", ["0", "1/4"], 32)
    shutil.copy(runs.write("complement", ["1/4", "3/4"], 32) / "base64/config.json", runs.output / "nodes/E^2_0/model/base64/config.json")
    assert "E^2_0/model was trained on sigma in (0.1341, 0.6766]" in refused()
