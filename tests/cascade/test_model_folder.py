"""Model folders explain themselves, come back as they were, and say what is wrong with them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from t2i_experts.cascade.model_folder import INDEX, WEIGHTS, find_model, load_model, save_model
from t2i_experts.cascade.pipeline import CascadePipeline


def test_round_trip_keeps_weights_settings_and_pictures(model_folder: Path, tmp_path: Path) -> None:
    first = load_model(model_folder)
    stage = first.stages["base64"]
    save_model(tmp_path / "copy", stage.config, stage.sampling, stage.denoiser.state_dict(), first.conditioner)  # type: ignore[attr-defined]
    second = load_model(tmp_path / "copy")
    assert second.fingerprint == first.fingerprint
    assert second.stages["base64"].sampling == stage.sampling
    pictures = [CascadePipeline.from_pretrained(folder, device="cpu")("a red cube") for folder in (model_folder, tmp_path / "copy")]
    assert torch.equal(*pictures)


def test_a_folder_can_be_moved(model_folder: Path, tmp_path: Path) -> None:
    """It holds its encoders, and names them relative to itself."""
    shutil.copytree(model_folder, tmp_path / "elsewhere")
    config = json.loads((tmp_path / "elsewhere" / "base64" / "config.json").read_text())
    assert {encoder["model"] for encoder in config["encoders"].values()} == {"t5", "clip"}
    load_model(tmp_path / "elsewhere")


def test_half_precision_on_disk(model_folder: Path, tmp_path: Path) -> None:
    model = load_model(model_folder)
    stage = model.stages["base64"]
    weights = stage.denoiser.state_dict()  # type: ignore[attr-defined]
    save_model(tmp_path / "half", stage.config, stage.sampling, weights, model.conditioner, dtype=torch.bfloat16)
    again = load_model(tmp_path / "half").stages["base64"].denoiser.state_dict()  # type: ignore[attr-defined]
    assert all(torch.equal(again[name], tensor.bfloat16().float()) for name, tensor in weights.items())
    sizes = [(folder / "base64" / WEIGHTS).stat().st_size for folder in (tmp_path / "half", model_folder)]
    assert sizes[0] < 0.6 * sizes[1]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / INDEX).unlink(), "holds no model_index.json"),
        (lambda folder: (folder / INDEX).write_text("{"), "cannot read"),
        (lambda folder: (folder / "base64" / "config.json").unlink(), "config.json is missing"),
        (lambda folder: (folder / "base64" / WEIGHTS).unlink(), "weights not found"),
        (lambda folder: shutil.rmtree(folder / "t5"), "t5"),
    ],
)
def test_a_folder_that_is_not_whole(model_folder: Path, tmp_path: Path, spoil: object, message: str) -> None:
    shutil.copytree(model_folder, tmp_path / "spoilt")
    spoil(tmp_path / "spoilt")  # type: ignore[operator]
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path / "spoilt")


def test_names_that_lead_nowhere(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such folder"):
        find_model("./nowhere")
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "model" / INDEX).write_text("{}")
    with pytest.raises(ValueError, match="did you mean"):
        find_model(tmp_path / "run")
