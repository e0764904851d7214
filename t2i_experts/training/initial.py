"""The weights that a run begins with: those of a model folder, if `training.initial` names one.

Fine-tuning, and the children of a tree of experts, begin with the averaged weights of another run; the optimiser, the warm-up of its
learning rate and the average begin anew. A checkpoint remembers where the weights came from and their fingerprint, and needs them no more,
unless the run is to stay near them (`DecoupleConfig.consistency`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from t2i_experts.cascade.model_folder import find_model, read_network, read_provenance
from t2i_experts.cascade.stage import build_network
from t2i_experts.cascade.weights import refuse_misfit
from t2i_experts.config import RunConfig, StageConfig, TrainingConfig
from t2i_experts.diffusion.precond import EDMPrecond
from t2i_experts.experts.lowrank_training import add_low_rank
from t2i_experts.experts.projections import with_identities
from t2i_experts.experts.runs import NodeRun
from t2i_experts.training.checkpoints import read_facts


@dataclass(frozen=True)
class InitialWeights:
    """weights: the state of an `EDMPrecond`. stage: what they were trained as. model: the folder or hub id, as the config names it.
    fingerprint: as `LoadedModel`'s. provenance: as `save_model` was given it."""

    weights: Mapping[str, Tensor]
    stage: StageConfig
    model: str
    fingerprint: str
    provenance: Mapping[str, Any]

    @property
    def facts(self) -> dict[str, Any]:
        """What a checkpoint and a model folder remember."""
        return {"model": self.model, "fingerprint": self.fingerprint, "images_seen": self.provenance.get("images_seen")}

    def unlike(self, stage: StageConfig, encoders: Mapping[str, str], codec: str | None) -> list[str]:
        """What the weights were used to and do not find in this run, in sentences: they fit, but must learn it anew.

        encoders, codec: the run's fingerprints, as in `TrainState`; of a model that does not tell its own, nothing is said.
        """
        told, theirs = [], self.provenance.get("encoders") or {}
        changed = sorted(name for name, digest in encoders.items() if name in theirs and theirs[name] != digest)
        if changed:
            told.append(f"it was trained with other weights of the encoders {', '.join(changed)}, whose embeddings it must learn anew")
        if "codec" in self.provenance and self.provenance["codec"] != codec:
            told.append("it was trained with another codec, whose latents it must learn anew")
        ours, sigma_data = stage.noise.sigma_data, self.stage.noise.sigma_data
        if ours != sigma_data:
            told.append(f"it was trained with sigma_data {sigma_data:g}, which scales all that it reads and says, and not {ours:g}")
        return [f"warning: training.initial={self.model!r}: {text}" for text in told]


def read_initial(config: RunConfig) -> InitialWeights | None:
    """The weights that a run without checkpoints begins with; None for fresh ones.

    Raises ValueError that names `training.initial`, or `training.blend`, for one that is no model folder, of another stage, or does not
    fit the network.
    """
    if config.training.blend.high is not None:
        return _read_blended(config)
    name = config.training.initial
    return None if name is None else _read(config, name, "training.initial")


def _read(config: RunConfig, name: str, key: str) -> InitialWeights:
    """The weights of a model folder for a network of this run. Raises ValueError that names the key that names it."""
    try:
        folder = find_model(name)
        stage, weights, fingerprint = read_network(folder)
        if stage.name != config.stage.name:
            raise ValueError(f"it is a model of the stage {stage.name}, and this run trains {config.stage.name}")
        with torch.device("meta"):
            network = build_network(config.stage)
        weights = with_identities(weights, network)
        refuse_misfit(network, weights, "the network of this run")
        initial = InitialWeights(weights, stage, name, fingerprint, read_provenance(folder))
    except ValueError as error:
        raise ValueError(f"{key}={name!r}: {error}") from error
    with torch.device("meta"):
        at_rank(network, config.training)
    return initial


def at_rank(network: nn.Module, training: TrainingConfig) -> None:
    """Leaves a network as it is, or only differences of `training.rank` from its weights to be trained; see `add_low_rank`.

    Raises ValueError for a rank that is too large for all of its matrices.
    """
    if training.rank:
        try:
            add_low_rank(network, training.rank)
        except ValueError as error:
            raise ValueError(f"training.{error}; take a smaller one, or 0 to train all weights") from error


def _read_blended(config: RunConfig) -> InitialWeights:
    """Those of both networks of a blend; a learned ratio begins by itself."""
    blend = config.training.blend
    assert blend.high is not None and blend.low is not None, "check_blend"
    high, low = _read(config, blend.high, "training.blend.high"), _read(config, blend.low, "training.blend.low")
    for kind in ("encoders", "codec"):
        if high.provenance.get(kind) != low.provenance.get(kind):
            raise ValueError(f"training.blend.low={blend.low!r} was trained with other {kind} than training.blend.high={blend.high!r}")
    weights = {f"{side}.{name}": tensor for side, one in (("high", high), ("low", low)) for name, tensor in one.weights.items()}
    model, fingerprint = f"{blend.high} and {blend.low}", f"{high.fingerprint} {low.fingerprint}"
    return InitialWeights(weights, high.stage, model, fingerprint, {**high.provenance, "images_seen": None})


def refuse_unlike_parents(runs: Mapping[str, NodeRun]) -> None:
    """Raises ValueError for a node of a tree whose network could not begin with its parent's weights, before any is trained."""
    for run in runs.values():
        parent = runs.get(run.node.parent or "")
        if parent is None or run.config.stage.network == parent.config.stage.network:
            continue
        with torch.device("meta"):
            own, weights = build_network(run.config.stage), build_network(parent.config.stage).state_dict()
            weights = with_identities(weights, own)
        try:
            refuse_misfit(own, weights, "its own network")
        except ValueError as error:
            raise ValueError(f"the run of {run.name}, by its overrides of stage.network: the weights of {parent.name}: {error}") from error


def check_initial(config: RunConfig, checkpoint: Path) -> list[str]:
    """What is to be told of a run that goes on from a checkpoint, because the weights that it began with have changed since.

    The same weights may have moved, and none need to be there any more. Raises ValueError if the config names other ones now.
    """
    name, recorded = config.training.initial, read_facts(checkpoint).get("initial")
    if name is None or recorded is None:
        return []
    found = None
    if Path(name).is_dir():  # a hub id is not asked for again
        try:
            found = read_network(Path(name))[2]
        except ValueError:
            found = None
    if found == recorded["fingerprint"] or (found is None and name == recorded["model"]):
        return []
    if name != recorded["model"]:
        run, holds = checkpoint.parent.parent, f"has {found}" if found else "cannot be read"
        raise ValueError(
            f"training.initial={name!r} {holds}, but the run in {run} began with the weights {recorded['fingerprint']} of "
            f"{recorded['model']!r}: name these, or choose another output"
        )
    text = f"has changed since this run began with it (weights {recorded['fingerprint']}, now {found}); the run goes on with its own"
    return [f"warning: training.initial={name!r} {text}"]


def open_parent(
    config: RunConfig, checkpoint: Path | None, encoders: Mapping[str, str], codec: str | None, device: torch.device
) -> EDMPrecond:
    """`training.initial` as a frozen denoiser, which a run with `training.decouple.consistency` needs from its beginning to its end.

    checkpoint: that the run goes on from; the weights must be those that it began with. encoders, codec: see `InitialWeights.unlike`.

    Raises ValueError that names `training.initial` for one that cannot be read, holds other weights now, or was used to other inputs.
    """
    name, why = config.training.initial, f"training.decouple.consistency={config.training.decouple.consistency:g} needs it all the time"
    assert name is not None, "check_decouple"
    try:
        folder = find_model(name)
        stage, weights, fingerprint = read_network(folder)
    except ValueError as error:
        raise ValueError(f"training.initial={name!r}: {error}; {why}") from error
    recorded = read_facts(checkpoint).get("initial") if checkpoint is not None else None
    if recorded is not None and recorded["fingerprint"] != fingerprint:
        raise ValueError(
            f"training.initial={name!r} holds the weights {fingerprint} now, and the run in {config.output} began with "
            f"{recorded['fingerprint']}; {why}: put them back, or give the run another output folder"
        )
    found = InitialWeights(weights, stage, name, fingerprint, read_provenance(folder))
    if unlike := found.unlike(config.stage, encoders, codec):
        raise ValueError(f"{unlike[0].removeprefix('warning: ')}: a distance from what it says then has no meaning; {why}")
    network = build_network(stage)
    network.load_state_dict(weights)
    return network.to(device).eval().requires_grad_(False)
