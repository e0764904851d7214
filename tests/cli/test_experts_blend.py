"""`t2i-experts experts blend`: two leaves that answer together, as they are and trained together."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import t2i_experts
from t2i_experts.cascade import picture
from t2i_experts.cascade.model_folder import load_model, read_network, read_provenance
from t2i_experts.cascade.picture import read_metadata
from t2i_experts.cascade.pipeline import CascadePipeline, start_noise
from t2i_experts.config import load_config
from t2i_experts.experts.blend import RatioBlend
from t2i_experts.experts.ensemble import ExpertEnsemble
from t2i_experts.experts.ratio import LearnedRatio
from t2i_experts.training.checkpoints import checkpoints
from t2i_experts.training.memory import estimate_training
from t2i_experts.training.trainer import Trainer

CLI = Callable[..., tuple[int, str, str]]
TRAIN = ["training.preview.every_images=16", "training.preview.steps=2", "training.validation.every_images=16"]


def draw(model: Path, **more: Any) -> Tensor:
    pipeline = CascadePipeline.from_pretrained(model, device="cpu", dtype=torch.float32, **more)
    return pipeline(["a red cube", "dogs"], sampling=pipeline.settings(steps=4, guidance=2.0))


def test_it_draws_and_its_ends_are_the_experts(leaves: Any, cli: CLI, tmp_path: Path) -> None:
    blends = leaves.output / "blends"
    code, out, err = cli("experts", "blend", leaves.config, "--json")
    assert (code, err) == (0, "")
    document = json.loads(out)
    assert (document["high"], document["low"], document["ratio"]) == ("E^1_1", "E^1_0", "sigmoid")
    loaded = load_model(blends / "sigmoid")
    blend = loaded.stages["base64"].denoiser
    assert loaded.fingerprint == document["fingerprint"] and isinstance(blend, RatioBlend)
    for side, leaf in (("high", "E^1_1"), ("low", "E^1_0")):
        (stage,) = load_model(leaves.leaf(leaf)).stages.values()
        expert = getattr(blend, side)
        assert all(torch.equal(p, q) for p, q in zip(expert.parameters(), stage.denoiser.parameters(), strict=True))  # type: ignore[attr-defined]
        assert read_provenance(blends / "sigmoid")["blend"][side]["fingerprint"] == read_network(leaves.leaf(leaf))[2]

    assert cli("experts", "blend", leaves.config, "--k", "inf", "--out", tmp_path / "hard")[0] == 0
    assert cli("experts", "assemble", leaves.config, "--out", tmp_path / "ensemble")[0] == 0
    assert torch.equal(draw(tmp_path / "hard"), draw(tmp_path / "ensemble")), "the hard split is the ensemble"
    assert isinstance(load_model(tmp_path / "ensemble").stages["base64"].denoiser, ExpertEnsemble)
    assert load_model(tmp_path / "hard").fingerprint != document["fingerprint"]
    soft = draw(blends / "sigmoid")
    assert not torch.equal(soft, draw(tmp_path / "hard")) and torch.equal(soft, draw(blends / "sigmoid", memory=1)), "taking turns, too"

    drawn = ("generate", "a red cube", "--model", blends / "sigmoid", "--device", "cpu", "--out", tmp_path / "p.png")
    metadata = read_metadata(tmp_path / "p.png") if cli(*drawn)[0] == 0 else None
    assert metadata is not None and metadata["model"]["fingerprint"] == document["fingerprint"]
    code, _, err = cli("experts", "blend", leaves.config, "--ratio", "linear", "--out", leaves.output / "model")
    assert code == 2 and "exists and is no earlier blend" in err


def test_what_each_expert_denoises_alone_as_the_page_says(leaves: Any, cli: CLI, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(t2i_experts.__file__).parent / "experts" / "README.md").read_text(encoding="utf-8")
    (block,) = (block for block in page.split("```python\n")[1:] if "def watched" in block)
    assert cli("experts", "blend", leaves.config)[0] == 0
    pipeline = CascadePipeline.from_pretrained(leaves.output / "blends" / "sigmoid", device="cpu")
    monkeypatch.chdir(tmp_path)
    exec(block.split("```")[0], {**vars(picture), "pipeline": pipeline, "torch": torch, "replace": replace, "start_noise": start_noise})
    with Image.open("apart.png") as sheet:
        high, low = sheet.crop((0, 0, sheet.width, sheet.height // 2)), sheet.crop((0, sheet.height // 2, sheet.width, sheet.height))
    assert sheet.width >= 3 * 16 and high.tobytes() != low.tobytes()


def test_where_the_ratio_ends_one_expert_draws_alone(leaves: Any, cli: CLI, tmp_path: Path) -> None:
    for u0, leaf in (("1/1000000000000", "E^1_1"), ("999999999999/1000000000000", "E^1_0")):
        assert cli("experts", "blend", leaves.config, "--k", "inf", "--u0", u0, "--out", tmp_path / leaf)[0] == 0
        assert torch.equal(draw(tmp_path / leaf), draw(leaves.leaf(leaf)))


def test_experts_and_ratio_train_together_and_go_on_bit_for_bit(leaves: Any, cli: CLI) -> None:
    command = ("experts", "blend", leaves.config, *TRAIN, "--ratio", "learned")
    code, out, err = cli(*command, "--images", 8, "--json")
    assert code == 0, err
    run = leaves.output / "blends" / "learned-trained"
    assert json.loads(out)["output"] == str(run)
    assert cli(*command, "--images", 16)[0] == 0
    undisturbed = leaves.output / "undisturbed"
    assert cli(*command, "--images", 16, "--out", undisturbed)[0] == 0
    ours, theirs = (checkpoints(folder)[-1] for folder in (run, undisturbed))
    for name in ("network", "ema", "optimizer"):
        first, second = (load_file(folder / f"{name}.safetensors") for folder in (ours, theirs))
        assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)

    trained = load_file(ours / "ema.safetensors")
    blend = load_model(run / "model").stages["base64"].denoiser
    assert isinstance(blend, RatioBlend) and (run / "previews" / "000000000016.png").is_file()
    saved = {**{f"high.{n}": t for n, t in blend.high.state_dict().items()}, **{f"low.{n}": t for n, t in blend.low.state_dict().items()}}  # type: ignore[attr-defined]
    assert isinstance(blend.ratio, LearnedRatio) and blend.ratio.out.weight.abs().max() > 0, "it has learned"
    saved |= {f"ratio.{name}": tensor for name, tensor in blend.ratio.state_dict().items()}
    assert trained.keys() == saved.keys() and all(torch.equal(trained[name], saved[name]) for name in saved)
    for side, leaf in (("high", "E^1_1"), ("low", "E^1_0")):
        begun = load_file(leaves.leaf(leaf) / "base64" / "diffusion_pytorch_model.safetensors")
        assert any(not torch.equal(begun[name], saved[f"{side}.{name}"]) for name in begun)
    assert draw(run / "model").shape == (2, 3, 16, 16)


def test_a_run_begins_as_the_blend_of_the_two(leaves: Any, cli: CLI) -> None:
    assert cli("experts", "blend", leaves.config)[0] == 0
    both = [f"training.blend.high={leaves.leaf('E^1_1')}", f"training.blend.low={leaves.leaf('E^1_0')}"]
    config = load_config(leaves.config, [*both, f"output={leaves.output / 'run'}", "experts.leaves=[]", "experts.images=0"])
    trainer = Trainer(config, progress=False)
    blend = load_model(leaves.output / "blends" / "sigmoid").stages["base64"].denoiser
    batch = next(trainer._batches())
    with torch.no_grad():
        first, theirs = (trainer.task.losses(denoiser, batch)[0] for denoiser in (trainer.network, blend))
    torch.testing.assert_close(first, theirs, rtol=2e-3, atol=1e-5)  # but for the saturated part of the ratio
    memory = estimate_training(config)
    assert memory.parameters == sum(p.numel() for p in trainer.network.parameters())


def test_mistakes_are_told_by_name(leaves: Any, cli: CLI, tmp_path: Path) -> None:
    def refused(*options: object) -> str:
        code, out, err = cli("experts", "blend", leaves.config, *options)
        assert (code, out) == (2, "") and not (leaves.output / "blends").exists()
        return err

    assert "--ratio=cubic must be one of linear, sigmoid, learned" in refused("--ratio", "cubic")
    assert "--ratio=learned needs --images" in refused("--ratio", "learned")
    assert "a linear ratio is the quantile itself" in refused("--ratio", "linear", "--k", "3")
    assert "--ratio.steepness=0.0 must be positive" in refused("--k", "0")
    assert "--ratio.middle=2 must be a quantile" in refused("--u0", "2")
    assert "--ratio.steepness=inf: a learned ratio must begin at a finite one" in refused("--ratio", "learned", "--images", 8, "--k", "inf")
    assert "--high=E^3_7: name one of the leaves E^1_0, E^1_1" in refused("--high", "E^3_7", "--low", "E^1_0")
    assert "has lower noise than --low=E^1_1: exchange them" in refused("--high", "E^1_0", "--low", "E^1_1")
    assert "a blend is of two experts" in refused("--high", "E^1_0", "--low", "E^1_0")
    assert "training.blend.high=None, training.blend.low='a': a blend needs both" in refused("training.blend.low=a")
    both = ("training.blend.low=a", "training.blend.high=b")
    assert "experts.leaves=['E^1_0', 'E^1_1'] does not go with training.blend" in refused(*both)
    shutil.rmtree(leaves.leaf("E^1_1"))
    assert "a blend needs the leaves themselves, and nothing that stands in for them; E^1_1: no model in" in refused()
    with pytest.raises(ValueError, match=r"training\.blend\.high='b': model='b': no such folder"):
        Trainer(load_config(leaves.config, [*both, "experts.leaves=[]", "experts.images=0"]), progress=False)
