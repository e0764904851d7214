"""Model folders explain themselves, come back as they were, and say what is wrong with them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from t2i_experts.cascade.model_folder import INDEX, embedded_model, find_model, load_model, save_model
from t2i_experts.cascade.pipeline import CascadePipeline
from t2i_experts.cascade.weights import WEIGHTS


def test_round_trip_keeps_weights_settings_and_pictures(model_folder: Path, tmp_path: Path) -> None:
    first = load_model(model_folder)
    stage = first.stages["base64"]
    save_model(tmp_path / "copy", stage.config, stage.sampling, stage.denoiser.state_dict(), first.conditioner)  # type: ignore[attr-defined]
    second = load_model(tmp_path / "copy")
    assert second.fingerprint == first.fingerprint
    assert second.stages["base64"].sampling == stage.sampling
    pictures = [CascadePipeline.from_pretrained(folder, device="cpu")("a red cube") for folder in (model_folder, tmp_path / "copy")]
    assert torch.equal(*pictures)


def test_the_fingerprint_is_that_of_the_weights_in_the_file(model_folder: Path, tmp_path: Path) -> None:
    """Whatever dtype they are loaded in; pictures carry it, so that it must stay as it is."""
    shutil.copytree(model_folder, tmp_path / "model")
    path = tmp_path / "model" / "base64" / WEIGHTS
    weights = load_file(path)
    for value in (None, 3.0):
        if value is not None:
            weights[sorted(weights)[-1]].view(-1)[0] = value
            save_file(weights, path)
        digest = hashlib.sha256()
        for name in sorted(weights):
            digest.update(f"{name} torch.float32 {tuple(weights[name].shape)}".encode() + weights[name].numpy().tobytes())
        assert load_model(tmp_path / "model", dtype=torch.bfloat16).fingerprint == digest.hexdigest()[:16]


def test_a_folder_can_be_moved(model_folder: Path, tmp_path: Path) -> None:
    """It holds its encoders, and names them relative to itself."""
    shutil.copytree(model_folder, tmp_path / "elsewhere")
    config = json.loads((tmp_path / "elsewhere" / "base64" / "config.json").read_text())
    assert {encoder["model"] for encoder in config["encoders"].values()} == {"./t5", "./clip"}
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
        (lambda folder: shutil.rmtree(folder / "t5"), r"encoders\.t5: .*spoilt is not whole, it lacks t5"),
        (lambda folder: edit(folder / INDEX, sampling=None), r"model_index\.json is not whole: it lacks sampling\.base64; save or fetch"),
        (lambda folder: edit(folder / INDEX, sampling={"base64": {"steps": 0}}), r"model_index\.json: sampling\.base64\.steps=0"),
        (lambda folder: edit(folder / INDEX, sampling={"base64": {"stepz": 5}}), r"model_index\.json: SamplingConfig: .*stepz"),
        (lambda folder: edit(folder / INDEX, stages=None), "stages=None; .*exactly one stage"),
        (lambda folder: edit(folder / INDEX, stages=[]), r"stages=\[\]; .*exactly one stage"),
        (lambda folder: edit(folder / INDEX, stages=["base64", "sr256"]), "exactly one stage"),
        (lambda folder: edit(folder / INDEX, stages=["../base64"]), r"stages\[0\]='../base64' must be letters"),
        (lambda folder: edit(folder / INDEX, stages=["t5"]), r"stages\[0\]='t5' must be"),
        (lambda folder: edit(folder / "base64/config.json", network=None), r"config\.json: .*network"),
        (lambda folder: edit(folder / "base64/config.json", size=15), r"config\.json: size=15 must be a multiple of 2"),
        (lambda folder: edit(folder / "base64/config.json", encoders={}), r"config\.json: encoders is empty"),
        (lambda folder: truncate(folder / "base64" / WEIGHTS), rf"{WEIGHTS} is damaged .*fetch the model again"),
        (lambda folder: (folder / "base64" / WEIGHTS).write_bytes(b""), rf"{WEIGHTS} is damaged"),
        (lambda folder: truncate(folder / "t5/model.safetensors"), r"encoders\.t5: the weights in .*t5 are damaged"),
        (lambda folder: truncate(folder / "t5/spiece.model"), r"encoders\.t5: .*spiece\.model: the SentencePiece vocabulary is damaged"),
        (lambda folder: (folder / "t5/spiece.model").write_bytes(b""), r"spiece\.model: .* vocabulary is empty"),
        (lambda folder: (folder / "clip/merges.txt.gz").write_bytes(b"x"), r"encoders\.clip_text: .*merges\.txt\.gz cannot be read"),
        (lambda folder: truncate(folder / "clip/open_clip_model.safetensors"), r"encoders\.clip_text: the weights in .*clip are damaged"),
    ],
)
def test_a_folder_that_is_not_whole(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: object, message: str
) -> None:
    shutil.copytree(model_folder, tmp_path / "spoilt")
    spoil(tmp_path / "spoilt")  # type: ignore[operator]
    monkeypatch.chdir(model_folder)  # whose own t5 must not take the place of a lost one
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path / "spoilt")


def edit(path: Path, **changes: object) -> None:
    """Changes values of a JSON file; None takes one out."""
    tree = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in tree.items() if value is not None}))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


# Writing


def resave(source: Path, target: Path) -> None:
    """Writes the model of one folder into another, as each checkpoint of a run does."""
    model = load_model(source)
    stage = model.stages["base64"]
    save_model(target, stage.config, stage.sampling, stage.denoiser.state_dict(), model.conditioner)  # type: ignore[attr-defined]


def test_what_killed_writers_left_is_removed_and_nothing_else(model_folder: Path, tmp_path: Path) -> None:
    for name in (".model.7.tmp", ".model.8.old", ".model2.7.tmp", "model.7.tmp", ".model.keep"):
        (tmp_path / name / "inside").mkdir(parents=True)
    for _ in range(2):
        resave(model_folder, tmp_path / "model")
        assert sorted(path.name for path in tmp_path.iterdir()) == [".model.keep", ".model2.7.tmp", "model", "model.7.tmp"]
    load_model(tmp_path / "model")


def test_all_is_on_the_disk_before_the_old_folder_goes(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resave(model_folder, tmp_path / "model")
    events: list[str] = []
    synced, rename = os.fsync, Path.rename

    def fsync(descriptor: int) -> None:
        events.append(os.readlink(f"/proc/self/fd/{descriptor}").split(".tmp")[-1])
        synced(descriptor)

    def moved(self: Path, target: Path) -> Path:
        events.append(f"{'old' if self.name == 'model' else 'new'} moves")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", moved)
    resave(model_folder, tmp_path / "model")
    flushed = set(events[: events.index("old moves")])
    within = {f"/{path.relative_to(tmp_path / 'model')}" for path in (tmp_path / "model").rglob("*")}
    assert flushed == {"", *within}
    assert events[-3:] == ["old moves", "new moves", str(tmp_path)]


def test_the_same_model_is_the_same_bytes(model_folder: Path, tmp_path: Path) -> None:
    for i in range(6):
        resave(model_folder, tmp_path / f"{i}")
    assert len({(tmp_path / f"{i}" / "base64" / WEIGHTS).read_bytes() for i in range(6)}) == 1


def test_encoders_that_did_not_change_are_on_the_disk_once(model_folder: Path, tmp_path: Path) -> None:
    """And what was saved does not change when its source is written over."""
    source = tmp_path / "source"
    shutil.copytree(model_folder, source)
    resave(source, tmp_path / "model")
    files = [Path("t5/model.safetensors"), Path("clip/open_clip_model.safetensors"), Path("clip/merges.txt.gz")]
    first = [(tmp_path / "model" / file).stat().st_ino for file in files]
    assert not set(first) & {(source / file).stat().st_ino for file in files}
    resave(source, tmp_path / "model")
    assert [(tmp_path / "model" / file).stat().st_ino for file in files] == first
    kept = (tmp_path / "model" / files[0]).read_bytes()
    weights = load_file(source / files[0])
    save_file({name: tensor + 1 for name, tensor in weights.items()}, source / files[0], metadata={"format": "pt"})
    assert (tmp_path / "model" / files[0]).read_bytes() == kept
    resave(source, tmp_path / "model")
    inodes = [(tmp_path / "model" / file).stat().st_ino for file in files]
    assert inodes[0] != first[0] and inodes[1:] == first[1:]
    assert (tmp_path / "model" / files[0]).read_bytes() == (source / files[0]).read_bytes() != kept


def test_names_that_lead_nowhere(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such folder"):
        find_model("./nowhere")
    assert find_model("embedded") == find_model(None) == embedded_model()
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "model" / INDEX).write_text("{}")
    with pytest.raises(ValueError, match="did you mean"):
        find_model(tmp_path / "run")
