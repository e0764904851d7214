"""A run that begins with the weights of a model folder: with them exactly, and with nothing else of the run that made it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from t2i_experts.cascade.model_folder import WEIGHTS, load_model, read_provenance
from t2i_experts.config import RunConfig, load_config
from t2i_experts.diffusion.precond import EDMPrecond
from t2i_experts.experts.ensemble import ExpertEnsemble
from t2i_experts.experts.interval import NoiseInterval
from t2i_experts.training import preview
from t2i_experts.training.checkpoints import checkpoints, read_facts
from t2i_experts.training.optim import learning_rate
from t2i_experts.training.report import write_report
from t2i_experts.training.trainer import Trainer, train
from t2i_experts.types import Conditioning

WriteConfig = Callable[[str], Path]
Fine = Callable[..., RunConfig]
SHORT = ["training.images=16", "training.preview.every_images=0", "training.validation.every_images=0"]


@pytest.fixture
def parent(trained: Path, tmp_path: Path) -> Path:
    """A model folder that may be changed."""
    shutil.copytree(trained / "model", tmp_path / "parent")
    return tmp_path / "parent"


@pytest.fixture
def fine(write_config: WriteConfig, parent: Path) -> Fine:
    """fine(name, *overrides): the config of a short run that begins with the parent's weights."""

    def config(name: str, *overrides: str) -> RunConfig:
        return load_config(write_config(name), [*SHORT, f"training.initial={parent}", *overrides])

    return config


def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "base64" / WEIGHTS)


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_it_begins_exactly_there_with_all_else_anew(fine: Fine, parent: Path, tmp_path: Path) -> None:
    trainer = Trainer(fine("run", "training.optimizer.warmup_images=32"), progress=False)
    assert equal(trainer.network.state_dict(), tensors(parent)) and equal(trainer.ema.state_dict(), tensors(parent))
    assert trainer.state.images_seen == 0 and not trainer.optimizer.state
    batch = next(trainer._batches())
    stage = load_model(parent).stages["base64"]
    assert isinstance(stage.denoiser, EDMPrecond)
    with torch.no_grad():
        first, parents = (trainer.task.losses(network, batch)[0] for network in (trainer.network, stage.denoiser))
    assert torch.equal(first, parents)
    trainer.run()
    events = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    begin = next(event for event in events if event["event"] == "initial")
    assert (begin["model"], begin["fingerprint"]) == (str(parent), load_model(parent).fingerprint)
    warming = learning_rate(trainer.config.training.optimizer, 8, 16)
    assert next(e for e in events if e["event"] == "train")["learning_rate"] == warming < 0.01 / 3, "its own warm-up"
    facts = {"model": str(parent), "fingerprint": load_model(parent).fingerprint, "images_seen": 64}
    newest = read_facts(checkpoints(tmp_path / "run")[-1])
    assert newest["initial"] == facts == read_provenance(tmp_path / "run" / "model")["initial"]
    assert newest["model"] == load_model(tmp_path / "run" / "model").fingerprint
    write_report(tmp_path / "run")
    assert f"began with the weights of `{parent}`" in (tmp_path / "run" / "report.md").read_text()


def test_the_control_is_the_run_of_an_expert_of_all_noise(fine: Fine, tmp_path: Path) -> None:
    """Nothing but the draws of sigma differs between the root trained on and a child of it."""
    for name, quantiles in (("control", "[]"), ("all", "[0, 1]"), ("part", "[0, 1/2]")):
        train(fine(name, f"stage.noise.quantiles={quantiles}"), progress=False)
    control, whole, part = (tensors(tmp_path / name / "model") for name in ("control", "all", "part"))
    assert equal(control, whole) and not equal(control, part)


def test_a_run_that_has_begun_needs_the_weights_no_more(fine: Fine, parent: Path, tmp_path: Path) -> None:
    train(fine("unbroken"), progress=False)
    train(fine("run", "training.images=8"), progress=False)
    moved = parent.rename(parent.with_name("moved"))
    assert not Trainer(fine("run", f"training.initial={moved}"), progress=False)._told_once, "the same weights, elsewhere"
    shutil.rmtree(moved)
    train(fine("run"), progress=False)
    assert equal(tensors(tmp_path / "run" / "model"), tensors(tmp_path / "unbroken" / "model"))
    assert read_facts(checkpoints(tmp_path / "run")[-1])["initial"]["model"] == str(parent)


def test_other_weights_in_their_place_are_told_and_others_by_another_name_refused(fine: Fine, parent: Path, tmp_path: Path) -> None:
    train(fine("run", "training.images=8"), progress=False)
    other = tmp_path / "other"
    shutil.copytree(parent, other)
    path = other / "base64" / WEIGHTS
    save_file({name: tensor + 1 for name, tensor in load_file(path).items()}, path)
    for name in (str(other), str(tmp_path / "nowhere")):
        with pytest.raises(ValueError, match=rf"training\.initial='{name}' .*began with the weights [0-9a-f]{{16}} of '{parent}'"):
            Trainer(fine("run", f"training.initial={name}"), progress=False)
    with pytest.raises(ValueError, match=r"another config.*\n  training\.initial: '.*' -> None"):
        Trainer(fine("run", "training.initial=null"), progress=False)
    shutil.rmtree(parent)
    other.rename(parent)
    (told,) = Trainer(fine("run"), progress=False)._told_once
    assert told.startswith(f"warning: training.initial='{parent}' has changed since this run began with it")


def test_what_does_not_fit_is_named_and_leaves_no_folder(fine: Fine, parent: Path, tmp_path: Path) -> None:
    narrow = "stage.network.resolutions=[{channels: 16, blocks: 1}, {channels: 16, blocks: 1, cross_attention: true}]"
    cases = {
        narrow: r"does not fit the network of this run: .* is \(.*\) in the file and \(.*\) in the network, and \d+ more",
        "stage.name=other": "it is a model of the stage base64, and this run trains other",
        f"training.initial={tmp_path}": "holds no model_index.json",
        "training.initial=nowhere": "no such folder",
    }
    for override, said in cases.items():
        with pytest.raises(ValueError, match=rf"^training\.initial='.*': .*{said}"):
            Trainer(fine("run", override), progress=False)
    assert not (tmp_path / "run").exists()


def test_other_encoders_are_told(fine: Fine, parent: Path) -> None:
    index = json.loads((parent / "model_index.json").read_text())
    index["provenance"]["encoders"]["t5"] = "another"
    (parent / "model_index.json").write_text(json.dumps(index))
    encoders, scale = Trainer(fine("run", "stage.noise.sigma_data=0.4"), progress=False)._told_once
    assert f"training.initial='{parent}': it was trained with other weights of the encoders t5, whose embeddings" in encoders
    assert "sigma_data 0.5" in scale and "not 0.4" in scale


def test_weights_in_bfloat16_are_read_as_they_are(fine: Fine, parent: Path) -> None:
    path = parent / "base64" / WEIGHTS
    half = {name: tensor.bfloat16() for name, tensor in load_file(path).items()}
    save_file(half, path)
    network = Trainer(fine("run"), progress=False).network
    assert equal(network.state_dict(), {name: tensor.float() for name, tensor in half.items()})


def test_an_expert_is_trained_validated_and_previewed_in_its_range(fine: Fine, parent: Path, tmp_path: Path) -> None:
    preview = ["training.preview.every_images=16", "training.validation.every_images=16"]
    train(fine("run", "stage.noise.quantiles=[1/2, 1]", *preview), progress=False)
    events = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    bins = next(event for event in events if event["event"] == "validation")["bins"]
    assert [(b["sigma_lo"], b["sigma_hi"]) for b in bins] == [(pytest.approx(0.3012, abs=1e-4), pytest.approx(0.6766, abs=1e-4)),
                                                              (bins[0]["sigma_hi"], None)]  # fmt: skip
    assert (tmp_path / "run" / "previews" / "000000000016.png").is_file()
    text = (tmp_path / "run" / "report.md").read_text()
    assert "an expert for sigma in (0.3012, inf), quantiles 1/2 to 1" in text and "t2i-experts generate" not in text

    part = tmp_path / "run" / "model"
    with pytest.raises(ValueError, match=r"^training\.initial='.*': it was trained on the quantiles 1/2 to 1 and draws no picture alone"):
        Trainer(fine("child", "stage.noise.quantiles=[3/4, 1]", f"training.initial={part}", *preview), progress=False)
    around = f"training.preview.around={parent}"
    child = Trainer(fine("child", "stage.noise.quantiles=[3/4, 1]", f"training.initial={part}", around, *preview), progress=False)
    shutil.rmtree(parent)
    child.run()
    assert not list((tmp_path / "child").glob("previews/*")), "that costs the preview, and not the run"


@pytest.mark.parametrize("halves", [False, True])
def test_previews_ask_the_expert_inside_and_the_model_around_it_outside(fine: Fine, monkeypatch: pytest.MonkeyPatch, halves: bool) -> None:
    whole = lambda x, s, c: x + 2  # noqa: E731
    both = ExpertEnsemble([(NoiseInterval.node(1, 0), whole), (NoiseInterval.node(1, 1), lambda x, s, c: x + 3)])
    monkeypatch.setattr(preview, "read_denoiser", lambda folder, device: both if halves else whole)
    config = fine("child", "stage.noise.quantiles=[1/4, 3/8]", "training.preview.every_images=0")
    denoiser = preview.preview_denoiser(lambda x, s, c: x + 1, config, torch.device("cpu"))
    x, nothing, interval = torch.zeros(1), Conditioning({}), NoiseInterval(Fraction(1, 4), Fraction(3, 8))
    for sigma, answer in ((0.05, 2), (interval.sigma_lo, 2), (0.2, 1), (interval.sigma_hi, 1), (0.29, 2), (80, 3 if halves else 2)):
        assert denoiser(x, torch.tensor(sigma, dtype=torch.float64), nothing) == answer


def test_the_root_of_a_tree_is_a_model_without_the_settings_of_its_experts(fine: Fine) -> None:
    tree = ["experts={leaves: [E^1_0, E^1_1], images: 8}", "sampling.experts={E^1_0: {guidance: 2.0}}"]
    (stage,) = load_model(train(fine("root", *tree), progress=False)).stages.values()
    assert stage.sampling.experts == {}
