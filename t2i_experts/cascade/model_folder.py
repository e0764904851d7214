"""Model folders: a whole text-to-image model on disk, in the layout of diffusers.

model_index.json                    version, stages, sampling defaults, provenance
base64/config.json                  the stage: network, noise, encoders' widths
base64/diffusion_pytorch_model.safetensors
t5/ clip/                           the encoders, which config.json names ./t5 and ./clip; public weights it names as the hub does
vae/                                the codec in the same way, ./vae, if there is one that has files
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from t2i_experts import __version__
from t2i_experts.cascade.codec import PIXEL, Codec, fits, load_codec
from t2i_experts.cascade.stage import Stage, build_network
from t2i_experts.conditioning.conditioner import TextConditioner
from t2i_experts.conditioning.frozen import copy_file
from t2i_experts.config import (
    CodecConfig,
    SamplingConfig,
    StageConfig,
    check_sampling,
    check_stage,
    check_stage_name,
    check_threshold,
    from_plain,
    to_plain,
)
from t2i_experts.config.rules import CODEC_FOLDER
from t2i_experts.diffusion.precond import EDMPrecond

INDEX = "model_index.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
_CLASSES = {"unet": "UNet"}  # a backbone of a plugin goes by its name in the registry


@dataclass(frozen=True)
class LoadedModel:
    """A model folder in memory.

    stages: by name; for now always one. fingerprint: 16 hex digits of the weights of all its stages. provenance: facts about its
    training, as `save_model` was given them.
    """

    stages: Mapping[str, Stage]
    conditioner: TextConditioner
    fingerprint: str
    source: str
    provenance: Mapping[str, Any] = field(default_factory=dict)


def embedded_model() -> Path:
    """The folder of the model that ships with this package."""
    return Path(str(resources.files("t2i_experts"))) / "pretrained"


def find_model(model: str | Path | None) -> Path:
    """The local folder of a model: None is the embedded one, a folder is itself, anything else a hub id (downloaded once).

    Raises ValueError that says what was looked for.
    """
    if model is None:
        if not (embedded_model() / INDEX).is_file():
            raise ValueError("no model is embedded in this version of the package: name a model folder or hub id (--model)")
        return embedded_model()
    folder = Path(model)
    if folder.is_dir():
        if not (folder / INDEX).is_file():
            inside = folder / "model" / INDEX
            hint = f"; did you mean {inside.parent}?" if inside.is_file() else ""
            raise ValueError(f"model={str(model)!r}: the folder holds no {INDEX}{hint}")
        return folder
    if str(model).count("/") != 1 or str(model).startswith((".", "/", "~")):
        raise ValueError(f"model={str(model)!r}: no such folder, and not a hub id of the form owner/name")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(model)))
    except Exception as error:
        raise ValueError(f"model={str(model)!r}: no such folder, and the hub did not give it: {error}") from error


def save_model(
    folder: Path,
    stage: StageConfig,
    sampling: SamplingConfig,
    weights: Mapping[str, Tensor],
    conditioner: TextConditioner,
    *,
    codec: Codec = PIXEL,
    dtype: torch.dtype | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> None:
    """Writes a model folder of one stage, and puts it in the place of `folder` once all of it is on the disk.

    One writer at a time: what an earlier one that was killed left beside `folder` is removed. Files of encoders and of the codec that are
    the same as in the folder that is replaced are linked and not copied.

    weights: the state of the stage's `EDMPrecond`; floating-point tensors are cast to `dtype` if one is given. codec: the stage's.
    provenance: free facts about the training, kept in model_index.json.
    """
    assert fits(codec, stage), "a model needs the codec of its stage: load_codec(stage)"
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    _remove(_leftovers(folder, "tmp"))
    stage_folder = temporary / stage.name
    stage_folder.mkdir(parents=True)
    stage = replace(
        stage, encoders=conditioner.save(temporary, earlier=folder), codec=_save_codec(stage.codec, codec, temporary, earlier=folder)
    )
    tensors = {name: (t.to(dtype) if dtype and t.is_floating_point() else t).detach().cpu().contiguous() for name, t in weights.items()}
    save_file(tensors, stage_folder / WEIGHTS, metadata={"format": "pt"})  # one entry: several are written in any order
    _write_json(
        stage_folder / "config.json",
        {"_class_name": _CLASSES.get(stage.network.backbone, stage.network.backbone), **to_plain(stage)},
    )
    _write_json(
        temporary / INDEX,
        {
            "_class_name": "CascadePipeline",
            "t2i_experts_version": __version__,
            "stages": [stage.name],
            "sampling": {stage.name: to_plain(sampling)},
            "provenance": dict(provenance or {}),
        },
    )
    for path in (*temporary.rglob("*"), temporary):
        flush(path)
    if folder.exists():
        old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    temporary.rename(folder)
    flush(folder.parent)
    _remove(_leftovers(folder, "old"))


def _save_codec(config: CodecConfig, codec: Codec, folder: Path, earlier: Path) -> CodecConfig:
    """Copies the codec's files, if it has any, and returns the config to store, which then names the copies."""
    if not codec.files:
        return config
    (folder / CODEC_FOLDER).mkdir()
    for file in codec.files:
        copy_file(file, folder / CODEC_FOLDER / file.name, earlier / CODEC_FOLDER / file.name)
    return replace(config, model=f"./{CODEC_FOLDER}")


def flush(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _leftovers(folder: Path, ending: str) -> list[Path]:
    return list(folder.parent.glob(f".{glob.escape(folder.name)}.*.{ending}"))


def _remove(folders: Iterable[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def load_model(model: str | Path | None, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> LoadedModel:
    """Reads a model folder (see `find_model`) onto `device`, its networks in `dtype`; encoders and codec keep the dtype of their config.

    Raises ValueError naming the file and the field for a folder that is not whole.
    """
    folder = find_model(model)
    config, sampling = read_configs(folder)
    path = folder / config.name / WEIGHTS
    weights = _read_weights(path)
    denoiser = _denoiser(config, weights, path, device, dtype)
    fingerprint = weights_fingerprint(weights)
    del weights  # mapped into memory: nothing must read them once the file may have been written over
    stage = Stage(config, denoiser, sampling, load_codec(config, root=folder, device=device))
    conditioner = TextConditioner.from_config(config.encoders, root=folder, device=device)
    provenance = read_provenance(folder)
    source = "embedded" if model is None else str(model)
    return LoadedModel({config.name: stage}, conditioner, fingerprint, source, provenance)


def read_configs(folder: Path) -> tuple[StageConfig, SamplingConfig]:
    """What a model folder says of its stage and of how to sample from it. Raises ValueError naming the file and the field."""
    index = _read_json(folder / INDEX)
    names, samplings = index.get("stages"), index.get("sampling")
    if not isinstance(names, list) or len(names) != 1:
        raise ValueError(f"{folder / INDEX}: stages={names!r}; this version draws with models of exactly one stage")
    name = str(names[0])
    check_stage_name(name, f"{folder / INDEX}: stages[0]")
    if not isinstance(samplings, dict) or name not in samplings:
        raise ValueError(f"{folder / INDEX} is not whole: it lacks sampling.{name}; save or fetch the model again")
    path = folder / name / "config.json"
    tree = _read_json(path)
    tree.pop("_class_name", None)
    with _naming(path):
        config: StageConfig = from_plain(StageConfig, tree)
        check_stage(config, prefix="")
        if config.name != name:
            raise ValueError(f"name={config.name!r} must be {name!r}, as {INDEX} says")
    with _naming(folder / INDEX):
        sampling: SamplingConfig = from_plain(SamplingConfig, samplings[name])
        check_sampling(sampling, prefix=f"sampling.{name}.")
        check_threshold(sampling.threshold, config.codec, prefix=f"sampling.{name}.")
    return config, sampling


def read_provenance(folder: Path) -> dict[str, Any]:
    """The facts about its training that a model folder was saved with. Raises ValueError naming the file."""
    provenance = _read_json(folder / INDEX).get("provenance") or {}
    if not isinstance(provenance, dict):
        raise ValueError(f"{folder / INDEX}: provenance={provenance!r} must be a JSON object")
    return provenance


def read_network(folder: Path) -> tuple[StageConfig, dict[str, Tensor], str]:
    """A model folder's stage, its network's weights as they are in the file, mapped into memory, and their fingerprint.

    Raises ValueError naming the file and the field for a folder that is not whole.
    """
    config, _ = read_configs(folder)
    weights = _read_weights(folder / config.name / WEIGHTS)
    return config, weights, weights_fingerprint(weights)


def read_denoiser(folder: Path, device: torch.device | str) -> EDMPrecond:
    """A model folder's network for sampling, in float32, without encoders and codec. Raises ValueError as `read_network`."""
    config, _ = read_configs(folder)
    path = folder / config.name / WEIGHTS
    return _denoiser(config, _read_weights(path), path, device, torch.float32)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Puts the file's name before a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, which the CPU maps into memory and reads where they are used. Raises ValueError."""
    if not path.is_file():
        raise ValueError(f"weights not found: {path}")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); save or fetch the model again") from error


def _denoiser(config: StageConfig, weights: Mapping[str, Tensor], path: Path, device: torch.device | str, dtype: torch.dtype) -> EDMPrecond:
    """The stage's network with weights that were read from `path`, for sampling. Raises ValueError if they do not fit the config."""
    with torch.device("meta"), _naming(path.with_name("config.json")):
        denoiser = build_network(config)
    denoiser = denoiser.to_empty(device=device)
    with _naming(path):
        refuse_misfit(denoiser, weights, "its config.json")
    denoiser.load_state_dict(weights, strict=True)
    return denoiser.to(dtype).to(memory_format=torch.channels_last).eval().requires_grad_(False)


def refuse_misfit(network: torch.nn.Module, weights: Mapping[str, Tensor], whose: str) -> None:
    """Raises ValueError that names the first tensor of a state that a network lacks, has beyond it, or has in another shape."""
    own = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    given = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    wrong = [name for name in {**own, **given} if own.get(name) != given.get(name)]
    if wrong:
        in_file, in_network = (shapes.get(wrong[0], "missing") for shapes in (given, own))
        more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise ValueError(f"does not fit {whose}: {wrong[0]} is {in_file} in the file and {in_network} in the network{more}")


def weights_fingerprint(weights: Mapping[str, Tensor]) -> str:
    """16 hex digits of the sha256 over names, types, shapes and values of tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _write_json(path: Path, tree: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(tree, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"not a whole model folder: {path} is missing") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return tree
