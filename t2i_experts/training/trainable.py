"""What a run trains: one network, or a blend of two with the ratio in which they answer; and the model folder that it becomes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from t2i_experts.cascade.blend_folders import SIDES, BlendState
from t2i_experts.cascade.codec import Codec
from t2i_experts.cascade.expert_folders import ExpertState
from t2i_experts.cascade.model_folder import save_blend, save_model
from t2i_experts.cascade.stage import build_network
from t2i_experts.conditioning.conditioner import TextConditioner
from t2i_experts.config import RunConfig
from t2i_experts.diffusion.noise import LogNormalSigma
from t2i_experts.diffusion.precond import EDMPrecond
from t2i_experts.experts.blend import RatioBlend
from t2i_experts.experts.lowrank_training import plain_state, trained_difference
from t2i_experts.experts.projections import fold
from t2i_experts.experts.ratio import build_ratio

Trainable = EDMPrecond | RatioBlend


def build_trainable(config: RunConfig) -> Trainable:
    """What a run trains, with fresh weights on torch's default device, and without projections of branches."""
    training, noise = config.training, config.stage.noise
    if training.blend.high is None:
        return build_network(config.stage, checkpointed_resolutions=training.gradient_checkpointing)
    high, low = (build_network(config.stage, checkpointed_resolutions=training.gradient_checkpointing) for _ in SIDES)
    with torch.device("cpu"):  # it computes with numbers, which no meta device has
        ratio = build_ratio(training.blend.ratio, LogNormalSigma(noise.mean, noise.std))
    return RatioBlend(high, low, ratio, saturation=None)


def networks_of(trained: Trainable) -> list[EDMPrecond]:
    """The networks in it, of which each is compiled by itself."""
    if isinstance(trained, RatioBlend):
        return [network for network in (trained.high, trained.low) if isinstance(network, EDMPrecond)]
    return [trained]


def ordinary_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of the ordinary networks that a trained state stands for: low-rank differences added, projections of branches folded."""
    return fold(plain_state(state))


def save_trained(
    folder: Path,
    config: RunConfig,
    weights: Mapping[str, Tensor],
    conditioner: TextConditioner,
    *,
    codec: Codec,
    provenance: Mapping[str, Any],
    initial: str | None = None,
) -> None:
    """Writes weights of what a run trains as a model folder that generates, of ordinary networks.

    initial: the fingerprint of the weights that the run began with; beside a network that was trained at low rank lies the difference.
    """
    folded, ratio = ordinary_state(weights), config.training.blend.ratio
    if config.training.blend.high is None:
        trained = None
        if config.training.rank:
            assert initial is not None, "a rule of configs: training.rank needs training.initial"
            trained = trained_difference(weights, initial)
        save_model(folder, config.stage, config.sampling, folded, conditioner, codec=codec, provenance=provenance, trained=trained)
        return
    parts = {side: {n.removeprefix(f"{side}."): t for n, t in folded.items() if n.startswith(f"{side}.")} for side in (*SIDES, "ratio")}
    high, low = (ExpertState(config.stage, parts[side]) for side in SIDES)
    blend = BlendState(high, low, ratio, parts["ratio"] or None)
    save_blend(folder, config.stage, config.sampling, blend, conditioner, codec=codec, provenance=provenance)
