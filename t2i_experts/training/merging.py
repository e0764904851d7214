"""The trained leaves of a tree merged into one ordinary model folder, and the weights for that searched for on held-out pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from t2i_experts.cascade.assembly import TrainedNode, gather
from t2i_experts.cascade.codec import load_codec
from t2i_experts.cascade.model_folder import INDEX, read_network, read_provenance, save_model
from t2i_experts.cascade.stage import build_network
from t2i_experts.conditioning.conditioner import TextConditioner
from t2i_experts.config import RunConfig, StageConfig
from t2i_experts.experts.merge import merge
from t2i_experts.experts.merge_search import Loss, MergeSearch, Tell, search_coordinates
from t2i_experts.experts.projections import with_identities
from t2i_experts.experts.states import State, refuse_misfit
from t2i_experts.shards.reader import ShardReader
from t2i_experts.training.embeddings import open_conditioner, stored_embeddings
from t2i_experts.training.task import DiffusionTask
from t2i_experts.training.validation import FixedBatch, fixed_batch

MERGED = "merged"
"""In a root's run, the model folder of the merge; in its provenance, what was merged with which weights."""


@dataclass(frozen=True)
class Mergeable:
    """The root of a tree and its leaves, from low noise to high. stage: of the network that all their weights fit."""

    root: TrainedNode
    stage: StageConfig
    weights: State
    leaves: Mapping[str, State]
    facts: Mapping[str, Mapping[str, Any]]

    @property
    def experts(self) -> list[State]:
        """The leaves' weights alone."""
        return list(self.leaves.values())

    def on(self, device: torch.device) -> Mergeable:
        """The same with all weights on a device, where each merge is computed."""
        moved = {name: {key: tensor.to(device) for key, tensor in state.items()} for name, state in self.leaves.items()}
        return replace(self, weights={key: tensor.to(device) for key, tensor in self.weights.items()}, leaves=moved)


def trained_leaves(
    config: RunConfig, what: str, names: Sequence[str] | None = None, *, early: bool = False
) -> tuple[TrainedNode, dict[str, TrainedNode]]:
    """The root of a config's tree and its leaves, or those of these names, from low noise to high. what: needs them, "a merge".

    early: takes nodes that are still to see some of their images, too. Raises ValueError as `gather` does, and for a leaf that is not
    trained: one that stands in for it is not it.
    """
    assembly = gather(config, early=early)
    answers = {one.leaf.name: one.expert.name for one in assembly.covered}
    wanted = [leaf for leaf in answers if names is None or leaf in names]
    if missing := [f"{leaf}: {assembly.missing[leaf]}" for leaf in wanted if answers[leaf] != leaf]:
        raise ValueError(f"{what} needs the leaves themselves, and nothing that stands in for them; {'; '.join(missing)}")
    return assembly.root, {leaf: assembly.experts[leaf] for leaf in wanted}


def open_mergeable(config: RunConfig, *, early: bool = False) -> Mergeable:
    """The averaged weights of a config's tree, mapped into memory. early: of nodes that are still to see some of their images, too.

    Where some of the networks have projections of the stream, the others get the identity there.

    Raises ValueError as `gather` does, for leaves that are not trained, and for networks that do not fit the root's, by name.
    """
    root, nodes = trained_leaves(config, "a merge", early=early)
    found = {name: read_network(node.folder) for name, node in {"": root, **nodes}.items()}
    projections = any(stage.network.projections for stage, _, _ in found.values())
    stage = replace(root.stage, network=replace(root.stage.network, projections=projections)) if projections else root.stage
    with torch.device("meta"):
        network = build_network(stage)
    states = {name: with_identities(state, network) for name, (_, state, _) in found.items()}
    weights = states.pop("")
    for name, state in states.items():
        refuse_misfit(weights, state, f"the expert {name}")
    facts = {name: {"fingerprint": found[name][2], **node.provenance} for name, node in nodes.items()}
    return Mergeable(root, stage, weights, states, facts)


def search_weights(
    mergeable: Mergeable, config: RunConfig, device: torch.device, *, images: int | None, evaluations: int, tell: Tell
) -> tuple[MergeSearch, int]:
    """Weights of the lowest loss on the first `images` of `data.validation`, reported on as many that follow; see `search_coordinates`.

    The loss is EDM's over all training noise, at fixed noise levels and noise. images: None: half of what there is, at most
    `training.validation.images`. Returns the search, and how many images each part has.

    Raises ValueError without validation shards, for too few images, and for stored embeddings of other encoders.
    """
    task, reader = _open_task(mergeable, config, device)
    count = min(reader.samples // 2, config.training.validation.images) if images is None else images
    if not 0 < 2 * count <= reader.samples:
        raise ValueError(
            f"--images={count}: two parts of so many pictures are needed, one to search on and one to report on, and "
            f"data.validation={config.data.validation!r} has {reader.samples}"
        )
    here = mergeable.on(device)
    searched, held_out = (_loss(here, config, task, reader, range(start, start + count)) for start in (0, count))
    return search_coordinates(here.weights, here.experts, searched, held_out, evaluations=evaluations, tell=tell), count


def write_merged(
    mergeable: Mergeable,
    weights: Sequence[float],
    config: RunConfig,
    out: Path,
    dtype: torch.dtype | None = None,
    search: Mapping[str, Any] | None = None,
) -> str:
    """Merges and writes the model folder, and returns its fingerprint. search: facts about how the weights were found.

    Raises ValueError if `out` is something else than an earlier merge.
    """
    refuse_other_folder(out)
    root = mergeable.root
    merged = {"weights": dict(zip(mergeable.leaves, weights, strict=True)), "experts": dict(mergeable.facts)}
    save_model(
        out,
        mergeable.stage,
        config.sampling,
        merge(mergeable.weights, mergeable.experts, weights),
        TextConditioner.from_config(root.stage.encoders, root=root.folder),
        codec=load_codec(root.stage, root=root.folder),
        dtype=dtype,
        provenance={**root.provenance, MERGED: {**merged, **({"search": dict(search)} if search else {})}},
    )
    return read_network(out)[2]


def refuse_other_folder(out: Path) -> None:
    """Raises ValueError for a place that a merge must not take: whatever is there and is no earlier merge."""
    if out.exists() and not ((out / INDEX).is_file() and MERGED in read_provenance(out)):
        raise ValueError(f"--out={out} exists and is no earlier merge; choose a new folder")


def _open_task(mergeable: Mergeable, config: RunConfig, device: torch.device) -> tuple[DiffusionTask, ShardReader]:
    """What losses of the merge are measured with: the root's encoders and codec, all of its noise, and the config's validation shards."""
    root, shards = mergeable.root, config.data.validation
    if shards is None:
        raise ValueError("data.validation=null: a search needs held-out pictures; name a shard folder there, or give --weights")
    reader = ShardReader([shards], size=root.stage.size, seed=0, embeddings=stored_embeddings(config))
    if config.data.embeddings == "stored":
        conditioner = open_conditioner(config, reader.embeddings, None, device=device, main_process=False)
    else:
        conditioner = TextConditioner.from_config(root.stage.encoders, root=root.folder, device=device)
    trained = root.provenance.get("encoders") or {}
    if other := [name for name in conditioner.names if name in trained and trained[name] != conditioner.fingerprint(name)]:
        raise ValueError(f"data.validation={shards!r}: its embeddings, or the encoders of {root.folder}, are not those that the root was "
                         f"trained with ({', '.join(other)}): their fingerprints differ")  # fmt: skip
    codec = load_codec(root.stage, root=root.folder, device=device)
    bf16 = config.training.precision == "bf16"
    return DiffusionTask(mergeable.stage, conditioner, seed=config.training.seed, device=device, bf16=bf16, codec=codec), reader


def _loss(mergeable: Mergeable, config: RunConfig, task: DiffusionTask, reader: ShardReader, indices: range) -> Loss:
    """The mean loss of a state on some images, which are read and encoded once. Raises ValueError if none can be read."""
    training = config.training
    size = max(training.batch_size // training.accumulation, 1)
    parts = [indices[start : start + size] for start in range(0, len(indices), size)]
    found = [fixed_batch(task, reader, part, bins=training.validation.bins)[0] for part in parts]
    batches: list[FixedBatch] = [batch for batch in found if batch is not None]
    if not batches:
        raise ValueError(
            f"data.validation={config.data.validation!r}: none of the images {indices.start} to {indices.stop - 1} is readable"
        )
    network = build_network(mergeable.stage).to(task.device).eval().requires_grad_(False)

    def loss(state: Mapping[str, Tensor]) -> float:
        network.load_state_dict(state)
        return float(torch.cat([batch.losses(network, task) for batch in batches]).mean())

    return loss
