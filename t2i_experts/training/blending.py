"""Two trained leaves of a tree as a blend: a model folder as it is, or the config of the run that trains both and their ratio."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from t2i_experts.cascade.assembly import TrainedNode
from t2i_experts.cascade.blend_folders import SIDES, BlendState, read_ratio
from t2i_experts.cascade.codec import load_codec
from t2i_experts.cascade.expert_folders import ExpertState
from t2i_experts.cascade.model_folder import INDEX, load_model, read_configs, read_network, save_blend
from t2i_experts.conditioning.conditioner import TextConditioner
from t2i_experts.config import BlendConfig, ExpertsConfig, RatioConfig, RunConfig, build_config, to_plain
from t2i_experts.training.merging import trained_leaves

BLENDS = "blends"
"""In a root's run: blends/KIND, the model folder of a blend as it is, and blends/KIND-trained, the run that trains one."""


def blended_leaves(config: RunConfig, high: str | None, low: str | None, *, early: bool = False) -> dict[str, TrainedNode]:
    """The trained leaves that are to answer together, as "high" and "low"; None: of a tree of two, the upper and the lower one.

    Raises ValueError as `gather` does, and for leaves that there are not, that are not trained, that are the same, or in the wrong order.
    """
    leaves = config.experts.leaves
    if high is None and low is None and len(leaves) == 2:
        lower, upper = trained_leaves(config, "a blend", early=early)[1].items()
        return {"high": upper[1], "low": lower[1]}
    names = ", ".join(leaves)
    for option, name in (("--high", high), ("--low", low)):
        if name not in leaves:
            raise ValueError(f"{option}={name}: name one of the leaves {names}")
    assert high is not None and low is not None
    if high == low:
        raise ValueError(f"--high={high} --low={low}: a blend is of two experts; the leaves are {names}")
    found = trained_leaves(config, "a blend", (high, low), early=early)[1]
    if found[high].node.interval.u_lo < found[low].node.interval.u_lo:
        raise ValueError(f"--high={high} has lower noise than --low={low}: exchange them")
    return {"high": found[high], "low": found[low]}


def write_blend_model(
    config: RunConfig, experts: dict[str, TrainedNode], ratio: RatioConfig, out: Path, dtype: torch.dtype | None = None
) -> str:
    """Writes a model folder in which two experts answer together, and returns its fingerprint. ratio: not a learned one.

    Raises ValueError if `out` is something else than an earlier blend.
    """
    refuse_other_folder(out)
    root = trained_leaves(config, "a blend", ())[0]
    states = {side: read_network(node.folder) for side, node in experts.items()}
    high, low = (ExpertState(states[side][0], states[side][1]) for side in SIDES)
    save_blend(
        out,
        root.stage,
        config.sampling,
        BlendState(high, low, ratio),
        TextConditioner.from_config(root.stage.encoders, root=root.folder),
        codec=load_codec(root.stage, root=root.folder),
        dtype=dtype,
        provenance={
            **root.provenance,
            "blend": {side: {"node": node.node.name, "fingerprint": states[side][2], **node.provenance} for side, node in experts.items()},
        },
    )
    return load_model(out).fingerprint


def refuse_other_folder(out: Path) -> None:
    """Raises ValueError for a place that a blend must not take: whatever is there and is no earlier one."""
    if out.exists() and not ((out / INDEX).is_file() and read_ratio(out / read_configs(out)[0].name)):
        raise ValueError(f"--out={out} exists and is no earlier blend; choose a new folder")


def blend_run(config: RunConfig, experts: dict[str, TrainedNode], ratio: RatioConfig, images: int, out: Path) -> RunConfig:
    """The config of the run in `out` that trains two experts and their ratio together: the root's, over all noise, on so many images."""
    blend = BlendConfig(high=str(experts["high"].folder), low=str(experts["low"].folder), ratio=ratio)
    plain = replace(
        config,
        output=str(out),
        training=replace(config.training, images=images, initial=None, blend=blend),
        sampling=replace(config.sampling, experts={}),
        experts=ExpertsConfig(),
    )
    return build_config(to_plain(plain), [], source="the blend")
