"""Model folders: a whole text-to-image model on disk, in the layout of diffusers.

model_index.json                    version, stages, sampling defaults, provenance
base64/config.json                  the stage: network, noise, encoders' widths
base64/diffusion_pytorch_model.safetensors
base64/experts/E^3_0/ ...           instead of these weights, those of an ensemble's experts, or beside them, as low-rank differences from
                                    them: see `expert_folders`; or those of a blend's two, high and low: see `blend_folders`
base64/low_rank.safetensors         of a run with training.rank: the same weights as the trained difference from those that it began with
t5/ clip/                           the encoders, which config.json names ./t5 and ./clip; public weights it names as the hub does
vae/                                the codec in the same way, ./vae, if there is one that has files
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from t2i_experts import __version__
from t2i_experts.cascade.blend_folders import BLEND, SIDES, BlendState, load_blend, read_ratio, write_blend
from t2i_experts.cascade.codec import PIXEL, Codec, fits, load_codec
from t2i_experts.cascade.expert_folders import (
    CONFIG,
    EXPERTS,
    ExpertState,
    Leaf,
    bytes_of_experts,
    has_low_rank,
    load_experts,
    read_leaves,
    save_experts,
    stage_tree,
)
from t2i_experts.cascade.expert_weights import LOW_RANK
from t2i_experts.cascade.files import naming, read_json, write_json
from t2i_experts.cascade.new_folder import new_folder
from t2i_experts.cascade.stage import Stage
from t2i_experts.cascade.weights import WEIGHTS, load_network, read_weights, stored_bytes, write_weights
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
from t2i_experts.experts.lowrank import LowRankDifference
from t2i_experts.experts.lowrank_file import save_difference
from t2i_experts.experts.sampling import check_leaves
from t2i_experts.experts.states import State, fingerprint
from t2i_experts.types import Denoiser

INDEX = "model_index.json"


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


EMBEDDED = "embedded"
"""The name of the model that ships with this package; a folder of this name is ./embedded."""


def embedded_model() -> Path:
    """The folder of the model that ships with this package."""
    return Path(str(resources.files("t2i_experts"))) / "pretrained"


def find_model(model: str | Path | None) -> Path:
    """The local folder of a model: None or `embedded` is the one that ships, a folder is itself, anything else a hub id (downloaded once).

    Raises ValueError that says what was looked for.
    """
    if model in (None, EMBEDDED):
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
    trained: LowRankDifference | None = None,
) -> None:
    """Writes a model folder of one stage with one network, and puts it in the place of `folder` once all of it is on the disk.

    One writer at a time: what an earlier one that was killed left beside `folder` is removed. Files of encoders and of the codec that are
    the same as in the folder that is replaced are linked and not copied.

    sampling: without its settings of experts, which are an ensemble's. weights: the state of the stage's `EDMPrecond`; floating-point
    tensors are cast to `dtype` if one is given. codec: the stage's. provenance: free facts about the training, kept in model_index.json.
    trained: the same weights as the low-rank difference that was trained, kept beside them.
    """

    def write(own: Path, stored: StageConfig) -> None:
        write_weights(own / WEIGHTS, weights, dtype=dtype)
        if trained is not None:
            save_difference(own / LOW_RANK, trained)

    _save(folder, stage, replace(sampling, experts={}), (), write, conditioner, codec, provenance)


def save_ensemble(
    folder: Path,
    stage: StageConfig,
    sampling: SamplingConfig,
    leaves: Sequence[Leaf],
    experts: Mapping[str, ExpertState],
    conditioner: TextConditioner,
    *,
    codec: Codec = PIXEL,
    dtype: torch.dtype | None = None,
    provenance: Mapping[str, Any] | None = None,
    root: State | None = None,
) -> None:
    """Writes a model folder of one stage with an ensemble, as `save_model` does.

    leaves: a partition of all noise. experts: all that these name, and no others; apart from its network, its part of the noise and how
    often training drops encoders, each must have the stage's config. root: what low-rank experts differ from, once it is cast to `dtype`.
    Raises ValueError where that is not so, and for settings of experts that there are not; nothing is written then.
    """
    check_leaves(sampling, {leaf.name: leaf.interval for leaf in leaves})

    def write(own: Path, stored: StageConfig) -> None:
        save_experts(own, stored, leaves, experts, dtype, root)

    _save(folder, stage, sampling, leaves, write, conditioner, codec, provenance)


def save_blend(
    folder: Path,
    stage: StageConfig,
    sampling: SamplingConfig,
    blend: BlendState,
    conditioner: TextConditioner,
    *,
    codec: Codec = PIXEL,
    dtype: torch.dtype | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> None:
    """Writes a model folder of one stage with a blend of two experts, as `save_model` does.

    blend: apart from their networks, their parts of the noise and how often training drops encoders, both experts have the stage's config.
    Raises ValueError where that is not so; nothing is written then.
    """

    def write(own: Path, stored: StageConfig) -> None:
        write_blend(own, stored, blend, dtype)

    _save(folder, stage, replace(sampling, experts={}), (), write, conditioner, codec, provenance, {BLEND: to_plain(blend.ratio)})


def _save(
    folder: Path,
    stage: StageConfig,
    sampling: SamplingConfig,
    leaves: Sequence[Leaf],
    write: Callable[[Path, StageConfig], None],
    conditioner: TextConditioner,
    codec: Codec,
    provenance: Mapping[str, Any] | None,
    more: Mapping[str, Any] | None = None,
) -> None:
    """Everything but the networks, which `write` puts into the stage's folder, given the stage as it is stored. more: for config.json."""
    assert fits(codec, stage), "a model needs the codec of its stage: load_codec(stage)"
    with new_folder(folder) as temporary:
        own = temporary / stage.name
        own.mkdir()
        encoders = conditioner.save(temporary, earlier=folder)
        stage = replace(stage, encoders=encoders, codec=_save_codec(stage.codec, codec, temporary, earlier=folder))
        write(own, stage)
        write_json(own / CONFIG, {**stage_tree(stage, leaves), **(more or {})})
        index = {
            "_class_name": "CascadePipeline",
            "t2i_experts_version": __version__,
            "stages": [stage.name],
            "sampling": {stage.name: to_plain(sampling)},
            "provenance": dict(provenance or {}),
        }
        write_json(temporary / INDEX, index)


def _save_codec(config: CodecConfig, codec: Codec, folder: Path, earlier: Path) -> CodecConfig:
    """Copies the codec's files, if it has any, and returns the config to store, which then names the copies."""
    if not codec.files:
        return config
    (folder / CODEC_FOLDER).mkdir()
    for file in codec.files:
        copy_file(file, folder / CODEC_FOLDER / file.name, earlier / CODEC_FOLDER / file.name)
    return replace(config, model=f"./{CODEC_FOLDER}")


def load_model(
    model: str | Path | None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    networks_on: Callable[[TextConditioner, int], torch.device | str] | None = None,
    one_network: bool = False,
) -> LoadedModel:
    """Reads a model folder (see `find_model`) onto `device`, its networks in `dtype`; encoders and codec keep the dtype of their config.

    networks_on: given the encoders, which are on the device then, and the bytes of all networks, says which device these are to be on.
    one_network: see `load_experts`. Raises ValueError naming the file and the field for a folder that is not whole, and for one without
    low-rank experts that are to share a network.
    """
    folder = find_model(model)
    config, sampling, leaves = read_configs(folder)
    own = folder / config.name
    if one_network and not has_low_rank(own, leaves):
        raise ValueError(f"one_network=True needs low-rank experts, and {folder} has none; leave it out")
    codec = load_codec(config, root=folder, device=device)
    conditioner = TextConditioner.from_config(config.encoders, root=folder, device=device)
    if networks_on is not None:
        device = networks_on(conditioner, _stored_bytes(own, leaves, dtype, one_network))
    denoiser, found = _load_denoiser(own, config, leaves, device, dtype, one_network)
    stage = Stage(config, denoiser, sampling, codec, {leaf.name: leaf.interval for leaf in leaves})
    provenance = read_provenance(folder)
    source = EMBEDDED if model is None else str(model)
    return LoadedModel({config.name: stage}, conditioner, found[:16], source, provenance)


def read_configs(folder: Path) -> tuple[StageConfig, SamplingConfig, tuple[Leaf, ...]]:
    """What a model folder says of its stage, of how to sample from it, and of who answers for which noise: () for a single network.

    Raises ValueError naming the file and the field.
    """
    index = read_json(folder / INDEX)
    names, samplings = index.get("stages"), index.get("sampling")
    if not isinstance(names, list) or len(names) != 1:
        raise ValueError(f"{folder / INDEX}: stages={names!r}; this version draws with models of exactly one stage")
    name = str(names[0])
    check_stage_name(name, f"{folder / INDEX}: stages[0]")
    if not isinstance(samplings, dict) or name not in samplings:
        raise ValueError(f"{folder / INDEX} is not whole: it lacks sampling.{name}; save or fetch the model again")
    path = folder / name / CONFIG
    tree = read_json(path)
    tree.pop("_class_name", None)
    listed = {EXPERTS: tree.pop(EXPERTS, None)}
    tree.pop(BLEND, None)
    with naming(path):
        config: StageConfig = from_plain(StageConfig, tree)
        check_stage(config, prefix="")
        if config.name != name:
            raise ValueError(f"name={config.name!r} must be {name!r}, as {INDEX} says")
    leaves = read_leaves(path, listed, config.noise)
    with naming(folder / INDEX):
        sampling: SamplingConfig = from_plain(SamplingConfig, samplings[name])
        check_sampling(sampling, prefix=f"sampling.{name}.")
        check_threshold(sampling.threshold, config.codec, prefix=f"sampling.{name}.")
        check_leaves(sampling, {leaf.name: leaf.interval for leaf in leaves}, prefix=f"sampling.{name}.experts.")
    return config, sampling, leaves


def read_provenance(folder: Path) -> dict[str, Any]:
    """The facts about its training that a model folder was saved with. Raises ValueError naming the file."""
    provenance = read_json(folder / INDEX).get("provenance") or {}
    if not isinstance(provenance, dict):
        raise ValueError(f"{folder / INDEX}: provenance={provenance!r} must be a JSON object")
    return provenance


def read_network(folder: Path) -> tuple[StageConfig, dict[str, Tensor], str]:
    """The stage of a model folder of one network, its weights as they are in the file, mapped into memory, and their fingerprint.

    Raises ValueError naming the file and the field for a folder that is not whole, and for an ensemble or a blend.
    """
    config, _, leaves = read_configs(folder)
    if leaves:
        raise ValueError(f"{folder} is an ensemble of {', '.join(leaf.name for leaf in leaves)}; name a model of one network")
    if read_ratio(folder / config.name):
        raise ValueError(f"{folder} is a blend of two experts; name a model of one network")
    weights = read_weights(folder / config.name / WEIGHTS)
    return config, weights, fingerprint(weights)


def read_denoiser(folder: Path, device: torch.device | str) -> Denoiser:
    """A model folder's network or ensemble for sampling, in float32, without encoders and codec. Raises ValueError as `load_model`."""
    config, _, leaves = read_configs(folder)
    return _load_denoiser(folder / config.name, config, leaves, device, torch.float32)[0]


def _load_denoiser(
    own: Path, config: StageConfig, leaves: Sequence[Leaf], device: torch.device | str, dtype: torch.dtype, one_network: bool = False
) -> tuple[Denoiser, str]:
    """What a stage's folder holds, with its digest."""
    if read_ratio(own):
        return load_blend(own, config, device, dtype)
    if not leaves:
        return load_network(config, own / WEIGHTS, device, dtype)
    return load_experts(own, config, leaves, device, dtype, one_network=one_network)


def _stored_bytes(own: Path, leaves: Sequence[Leaf], dtype: torch.dtype, one_network: bool) -> int:
    """What the networks in a stage's folder take in memory."""
    if leaves:
        return bytes_of_experts(own, leaves, dtype, one_network=one_network)
    files = [own / EXPERTS / side / WEIGHTS for side in SIDES] if read_ratio(own) else [own / WEIGHTS]
    return sum(stored_bytes(path, dtype) for path in files)
