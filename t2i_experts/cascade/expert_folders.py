"""The experts of a model folder: each network in a folder of its own, which says what it was trained on, and who answers for which noise.

base64/config.json                  the stage, and under "experts" the leaves from low noise to high: name, quantiles of p(sigma), and whose
                                    network answers, {"leaf": "E^3_0", "quantiles": ["0", "1/8"], "expert": "E^1_0"}
base64/experts/E^1_0/config.json    one expert's network, which may be another than the stage's; noise.quantiles: what it was trained on
base64/experts/E^1_0/diffusion_pytorch_model.safetensors    the same quantiles, and the node's name, stand in its header
base64/experts/E^1_0/low_rank.safetensors                   or this: the difference from the root, whose weights base64/ then holds as well

`expert_weights` has the two kinds of files; whole and low-rank experts may stand side by side.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from t2i_experts.cascade.expert_weights import (
    LOW_RANK,
    RootWeights,
    digest_of_expert,
    is_low_rank,
    load_expert,
    network_bytes,
    read_difference,
    write_expert,
)
from t2i_experts.cascade.files import naming, read_json, write_json
from t2i_experts.cascade.one_network import SharedNetwork, SharingExpert
from t2i_experts.cascade.weights import WEIGHTS, cast, read_weights, write_weights
from t2i_experts.config import EncoderConfig, NoiseConfig, StageConfig, check_node_name, check_stage, differences, from_plain, to_plain
from t2i_experts.diffusion.precond import EDMPrecond
from t2i_experts.experts.ensemble import ExpertEnsemble
from t2i_experts.experts.interval import NoiseInterval
from t2i_experts.experts.lowrank import LowRankDifference, refuse_other_root
from t2i_experts.experts.states import State
from t2i_experts.types import Denoiser

EXPERTS = "experts"
"""The key in a stage's config.json, and the folder beside it."""
CONFIG = "config.json"
_CLASSES = {"unet": "UNet"}  # a backbone of a plugin goes by its name in the registry


@dataclass(frozen=True)
class Leaf:
    """A range of noise of an ensemble: its name, and the name of the expert who answers for it, the leaf itself or one that stands in."""

    name: str
    interval: NoiseInterval
    expert: str


@dataclass(frozen=True)
class ExpertState:
    """What is stored of an expert. config: its network, and in noise.quantiles what it was trained on. weights: of its `EDMPrecond`, or
    what these have beyond the root's, which then has the same network."""

    config: StageConfig
    weights: State | LowRankDifference


def stage_tree(stage: StageConfig, leaves: Sequence[Leaf] = ()) -> dict[str, Any]:
    """What config.json says of a stage, or of one expert's network."""
    backbone = stage.network.backbone
    listed = [{"leaf": leaf.name, "quantiles": _quantiles(leaf.interval), "expert": leaf.expert} for leaf in leaves]
    return {"_class_name": _CLASSES.get(backbone, backbone), **to_plain(stage), **({EXPERTS: listed} if listed else {})}


def save_experts(
    folder: Path,
    stage: StageConfig,
    leaves: Sequence[Leaf],
    experts: Mapping[str, ExpertState],
    dtype: torch.dtype | None,
    root: State | None = None,
) -> None:
    """Writes the networks of all experts into the folder of a stage, whose config they must fit, and the root's if it is given.

    dtype: that whole experts and the root are cast to; differences are from the root as it is stored then, and stay as they are.

    Raises ValueError for leaves that do not partition the noise, experts that there are not or that answer for nothing, an expert that
    differs from the stage in more than its network and its part of the noise, and differences from another root.
    """
    _ensemble(leaves, {name: _Nobody() for name in experts})
    if idle := experts.keys() - {leaf.expert for leaf in leaves}:
        raise ValueError(f"experts that answer for no noise: {', '.join(sorted(idle))}")
    if root is not None:
        root = cast(root, dtype)
        write_weights(folder / WEIGHTS, root)
    for name, expert in experts.items():
        save_expert(folder, stage, name, expert, dtype, root)


def save_expert(
    folder: Path, stage: StageConfig, name: str, expert: ExpertState, dtype: torch.dtype | None, root: State | None = None
) -> None:
    """Writes one expert's network into the folder of a stage. Raises ValueError as `save_experts`."""
    check_node_name(name, EXPERTS)
    refuse_stranger(expert.config, stage, name)
    config = _beside(stage, expert.config)
    own = folder / EXPERTS / name
    own.mkdir(parents=True)
    if isinstance(expert.weights, LowRankDifference):
        if root is None or config.network != stage.network:
            raise ValueError(f"the low-rank expert {name} needs a root, of the same network, that it differs from")
        with naming(own / LOW_RANK):
            refuse_other_root(root, expert.weights)
    about = {"node": name, "quantiles": " to ".join(_quantiles(NoiseInterval.from_config(config.noise)))}
    write_expert(own, expert.weights, about, dtype)
    write_json(own / CONFIG, stage_tree(config))


def read_leaves(path: Path, tree: Mapping[str, Any], noise: NoiseConfig) -> tuple[Leaf, ...]:
    """The leaves that a stage's config.json lists, from low noise to high; () for a single network. Raises ValueError naming the entry."""
    listed = tree.get(EXPERTS)
    if listed is None:
        return ()
    with naming(path):
        if not isinstance(listed, list) or not listed:
            raise ValueError(f"{EXPERTS}={listed!r} must be a list of experts")
        leaves = tuple(_leaf(entry, f"{EXPERTS}[{i}]", noise) for i, entry in enumerate(listed))
        if len({leaf.name for leaf in leaves}) < len(leaves):
            raise ValueError(f"{EXPERTS} names a leaf twice: {', '.join(leaf.name for leaf in leaves)}")
        _ensemble(leaves, {leaf.expert: _Nobody() for leaf in leaves})
    return tuple(sorted(leaves, key=lambda leaf: leaf.interval.u_lo))


def load_experts(
    folder: Path,
    stage: StageConfig,
    leaves: Sequence[Leaf],
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    one_network: bool = False,
) -> tuple[ExpertEnsemble, str]:
    """The ensemble in the folder of a stage, each network once, and a fingerprint of its weights and of who answers for what.

    one_network: the low-rank experts share one network, into which each writes its weights when it is to evaluate; see `one_network`.

    Raises ValueError naming the file for a network that is not whole, or not what config.json says of it.
    """
    networks: dict[str, Denoiser] = {}
    digests: dict[str, str] = {}
    root, shared = RootWeights(folder), None
    for name in dict.fromkeys(leaf.expert for leaf in leaves):
        own = folder / EXPERTS / name
        if one_network and is_low_rank(own):
            config = _read_config(own / CONFIG, stage, name)
            shared = shared or SharedNetwork(config, root, device, dtype)
            difference, about, digests[name] = read_difference(own, root)
            with naming(own / LOW_RANK):
                _refuse_mistaken(about, name, NoiseInterval.from_config(config.noise))
            networks[name] = SharingExpert(shared, difference.to(torch.device(device)))
        else:
            networks[name], digests[name] = load_named_expert(folder, stage, name, root, device, dtype)
    return _ensemble(leaves, networks), _digest(leaves, digests)


def load_named_expert(
    folder: Path, stage: StageConfig, name: str, root: RootWeights, device: torch.device | str, dtype: torch.dtype
) -> tuple[EDMPrecond, str]:
    """One expert's network in the folder of a stage, and the digest of its weights. Raises ValueError as `load_experts`."""
    own = folder / EXPERTS / name
    config = _read_config(own / CONFIG, stage, name)
    network, found, about = load_expert(config, own, root, device, dtype)
    with naming(own / (LOW_RANK if is_low_rank(own) else WEIGHTS)):
        _refuse_mistaken(about, name, NoiseInterval.from_config(config.noise))
    return network, found


def bytes_of_experts(folder: Path, leaves: Sequence[Leaf], dtype: torch.dtype, *, one_network: bool = False) -> int:
    """What the networks that `load_experts` gives take in memory. Raises ValueError for files that cannot be read."""
    root = RootWeights(folder)
    folders = {leaf.expert: folder / EXPERTS / leaf.expert for leaf in leaves}
    low_rank = [own for own in folders.values() if is_low_rank(own)] if one_network else []
    total = sum(network_bytes(own, root, dtype) for own in folders.values() if own not in low_rank)
    if low_rank:
        total += network_bytes(low_rank[0], root, dtype) + sum(read_difference(own, root)[0].bytes for own in low_rank)
    return total


def has_low_rank(folder: Path, leaves: Sequence[Leaf]) -> bool:
    """Whether any expert in the folder of a stage is stored as a difference from the root."""
    return any(is_low_rank(folder / EXPERTS / leaf.expert) for leaf in leaves)


def digest_of_experts(folder: Path, leaves: Sequence[Leaf]) -> str:
    """The fingerprint that `load_experts` gives, without building the networks."""
    root = RootWeights(folder)
    return _digest(leaves, {leaf.expert: digest_of_expert(folder / EXPERTS / leaf.expert, root) for leaf in leaves})


def read_experts(folder: Path, stage: StageConfig, leaves: Sequence[Leaf]) -> tuple[dict[str, ExpertState], State | None]:
    """What `save_experts` was given: the experts as they are stored, and the root if there is any difference from it."""
    root = RootWeights(folder)
    experts = {}
    for name in dict.fromkeys(leaf.expert for leaf in leaves):
        own = folder / EXPERTS / name
        low_rank = is_low_rank(own)
        weights = read_difference(own, root)[0] if low_rank else read_weights(own / WEIGHTS)
        experts[name] = ExpertState(_read_config(own / CONFIG, stage, name), weights)
    return experts, root.state if has_low_rank(folder, leaves) else None


def refuse_stranger(config: StageConfig, stage: StageConfig, name: str) -> None:
    """Raises ValueError, which names the values, for an expert that differs from its stage in more than the network, its part of the noise,
    how often training drops encoders, and where the files of encoders and codec are."""
    alike = replace(
        config := _beside(stage, config),
        network=stage.network,
        noise=replace(config.noise, quantiles=stage.noise.quantiles),
        encoders={key: _as_dropped(encoder, stage.encoders.get(key)) for key, encoder in config.encoders.items()},
    )
    if found := list(differences(to_plain(stage), to_plain(alike))):
        raise ValueError(f"the expert {name} is no expert of this stage, from which it differs in {'; '.join(found)}")


class _Nobody:
    """In the place of a network, where only the intervals are looked at."""

    def __call__(self, x: Tensor, sigma: Tensor, conditioning: object) -> Tensor:
        raise AssertionError("nobody evaluates")


def _ensemble(leaves: Sequence[Leaf], networks: Mapping[str, Denoiser]) -> ExpertEnsemble:
    if missing := [leaf.expert for leaf in leaves if leaf.expert not in networks]:
        raise ValueError(f"no weights of the expert {missing[0]}; there are those of {', '.join(networks) or 'none'}")
    return ExpertEnsemble([(leaf.interval, networks[leaf.expert]) for leaf in leaves])


def _digest(leaves: Sequence[Leaf], digests: Mapping[str, str]) -> str:
    lines = (f"{leaf.interval.u_lo} {leaf.interval.u_hi} {digests[leaf.expert]}\n" for leaf in leaves)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _quantiles(interval: NoiseInterval) -> list[str]:
    return [str(interval.u_lo), str(interval.u_hi)]


def _leaf(entry: Any, where: str, noise: NoiseConfig) -> Leaf:
    if not isinstance(entry, dict) or entry.keys() != {"leaf", "quantiles", "expert"}:
        raise ValueError(f"{where}={entry!r} must be an object with leaf, quantiles and expert")
    for key in ("leaf", "expert"):
        check_node_name(str(entry[key]), f"{where}.{key}")
    try:
        interval = NoiseInterval.from_config(replace(noise, quantiles=list(map(str, entry["quantiles"]))))
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"{where}.quantiles={entry['quantiles']!r} must be two fractions with 0 <= u_lo < u_hi <= 1: {error}") from error
    return Leaf(str(entry["leaf"]), interval, str(entry["expert"]))


def _read_config(path: Path, stage: StageConfig, name: str) -> StageConfig:
    tree = read_json(path)
    tree.pop("_class_name", None)
    with naming(path):
        config: StageConfig = from_plain(StageConfig, tree)
        check_stage(config, prefix="")
        refuse_stranger(config, stage, name)
    return config


def _beside(stage: StageConfig, config: StageConfig) -> StageConfig:
    """An expert's config that names the encoders' and the codec's files where its stage does."""
    encoders = {
        key: replace(encoder, model=stage.encoders[key].model) if key in stage.encoders else encoder
        for key, encoder in config.encoders.items()
    }
    return replace(config, encoders=encoders, codec=replace(config.codec, model=stage.codec.model))


def _as_dropped(encoder: EncoderConfig, like: EncoderConfig | None) -> EncoderConfig:
    return encoder if like is None else replace(encoder, drop=like.drop)


def _refuse_mistaken(about: Mapping[str, str], name: str, interval: NoiseInterval) -> None:
    """Raises ValueError for a file whose header says that it holds another expert than the folder does."""
    wanted = {"node": name, "quantiles": " to ".join(_quantiles(interval))}
    for key, value in wanted.items():
        if about.get(key) != value:
            raise ValueError(
                f"its header says {key} {about.get(key)!r}, where {CONFIG} and its folder say {value!r}: another expert's file"
            )
