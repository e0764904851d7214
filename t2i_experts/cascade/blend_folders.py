"""A blend in a model folder: two networks that answer together, and the ratio in which they do.

base64/config.json                  the stage, and under "blend" the ratio: {"kind": "learned", "steepness": 20.0, "middle": "1/2"}
base64/experts/high/ low/           the two networks, as those of an ensemble: see `expert_folders`
base64/ratio.safetensors            the parameters of a learned ratio
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from t2i_experts.cascade.expert_folders import CONFIG, ExpertState, load_named_expert, save_expert
from t2i_experts.cascade.expert_weights import RootWeights
from t2i_experts.cascade.files import naming, read_json
from t2i_experts.cascade.weights import read_weights, refuse_misfit, write_weights
from t2i_experts.config import RatioConfig, StageConfig, check_ratio, from_plain, to_plain
from t2i_experts.diffusion.noise import LogNormalSigma
from t2i_experts.experts.blend import RatioBlend
from t2i_experts.experts.ratio import LearnedRatio, build_ratio
from t2i_experts.experts.states import digest

BLEND = "blend"
"""The key in a stage's config.json."""
SIDES = ("high", "low")
"""The names of the two experts."""
RATIO = "ratio.safetensors"


@dataclass(frozen=True)
class BlendState:
    """What is stored of a blend. high, low: the experts. learned: the parameters of a ratio of that kind."""

    high: ExpertState
    low: ExpertState
    ratio: RatioConfig
    learned: Mapping[str, Tensor] | None = None


def write_blend(folder: Path, stage: StageConfig, blend: BlendState, dtype: torch.dtype | None) -> None:
    """Writes the networks and the parameters of the ratio, which stay float32, into the folder of a stage, whose config says the rest."""
    assert (blend.ratio.kind == "learned") == (blend.learned is not None)
    for name in SIDES:
        save_expert(folder, stage, name, getattr(blend, name), dtype)
    if blend.learned is not None:
        write_weights(folder / RATIO, blend.learned)


def read_ratio(folder: Path) -> RatioConfig | None:
    """The ratio that the folder of a stage tells, if it holds a blend. Raises ValueError naming the file."""
    found = read_json(folder / CONFIG).get(BLEND)
    if found is None:
        return None
    with naming(folder / CONFIG):
        if not isinstance(found, dict):
            raise ValueError(f"{BLEND}={found!r} must be an object")
        ratio: RatioConfig = from_plain(RatioConfig, found)
        check_ratio(ratio, BLEND)
    return ratio


def load_blend(folder: Path, stage: StageConfig, device: torch.device | str, dtype: torch.dtype) -> tuple[RatioBlend, str]:
    """The blend in the folder of a stage, its networks in `dtype`, and a fingerprint of all of it.

    Raises ValueError naming the file for what is not whole, or not what config.json says of it.
    """
    config = read_ratio(folder)
    assert config is not None
    (high, first), (low, second) = (load_named_expert(folder, stage, name, RootWeights(folder), device, dtype) for name in SIDES)
    ratio, third = build_ratio(config, LogNormalSigma(stage.noise.mean, stage.noise.std)), ""
    if isinstance(ratio, LearnedRatio):
        weights = read_weights(folder / RATIO)
        with naming(folder / RATIO):
            refuse_misfit(ratio, weights, "a learned ratio")
        ratio.load_state_dict(weights)
        ratio = ratio.to(device).eval().requires_grad_(False)
        third = digest(weights)
    found = hashlib.sha256("\n".join([first, second, third, json.dumps(to_plain(config), sort_keys=True)]).encode()).hexdigest()
    return RatioBlend(high, low, ratio), found
