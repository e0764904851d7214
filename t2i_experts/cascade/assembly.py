"""From the runs of a tree to one model folder with experts: which nodes there are, who answers for whom, and whether they fit together.

The root's run is the config's `output`, that of node NAME is `output`/nodes/NAME; the averaged weights are the model folder `model` in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from t2i_experts.cascade.codec import load_codec
from t2i_experts.cascade.cutting import Limit, StoredSize, cut_experts, read_trained
from t2i_experts.cascade.expert_folders import ExpertState, Leaf, digest_of_experts, refuse_stranger
from t2i_experts.cascade.files import naming
from t2i_experts.cascade.model_folder import INDEX, read_configs, read_provenance, save_ensemble
from t2i_experts.cascade.stage import build_network
from t2i_experts.cascade.weights import WEIGHTS, read_weights, refuse_misfit
from t2i_experts.conditioning.conditioner import TextConditioner
from t2i_experts.config import RunConfig, StageConfig
from t2i_experts.experts.cover import Covered, cover
from t2i_experts.experts.interval import NoiseInterval
from t2i_experts.experts.lowrank import LowRankDifference
from t2i_experts.experts.plan import Node, TreePlan
from t2i_experts.experts.runs import nodes_folder

ENSEMBLE = "ensemble"
"""In a root's run, the model folder that is assembled."""


@dataclass(frozen=True)
class TrainedNode:
    """A node of the plan that has a model folder. provenance: what that says of its training."""

    node: Node
    folder: Path
    stage: StageConfig
    provenance: Mapping[str, Any]

    @property
    def images_seen(self) -> int:
        """0 if the folder does not say it."""
        return int(self.provenance.get("images_seen") or 0)


@dataclass(frozen=True)
class Assembly:
    """What an ensemble is made of: for each leaf who answers, those who do by name, and why other nodes do not."""

    covered: tuple[Covered, ...]
    experts: Mapping[str, TrainedNode]
    missing: Mapping[str, str]
    root: TrainedNode


def gather(config: RunConfig, *, early: bool = False) -> Assembly:
    """Looks at the runs of a config's tree. early: takes models of runs that have not seen all their images yet, too.

    Raises ValueError for a config without experts, a root that is not there, and models that do not fit each other or the plan, by name.
    """
    if not config.experts.leaves:
        raise ValueError("experts.leaves=[] names no experts to assemble; a single network is the model folder of its run")
    plan = TreePlan.from_config(config)
    found, missing = _find(plan, Path(config.output), early)
    if plan.root.name not in found:
        raise ValueError(f"output={config.output!r}: there is no {plan.root.name} to assemble experts around: {missing[plan.root.name]}")
    covered, root = cover(plan, found), found[plan.root.name]
    experts = {name: found[name] for name in dict.fromkeys(one.expert.name for one in covered)}
    for expert in experts.values():
        _refuse_strange(expert, root)
    return Assembly(covered, experts, missing, root)


def write_assembly(
    assembly: Assembly, config: RunConfig, out: Path, dtype: torch.dtype | None = None, limit: Limit | None = None
) -> tuple[str, dict[str, StoredSize]]:
    """Writes the ensemble as a model folder, and returns its fingerprint, and what each expert costs on the disk.

    dtype: of the weights on the disk; None: as they are. limit: for experts as low-rank differences; None: those alone that were trained
    so, from the root.

    Raises ValueError if `out` is something else than an earlier ensemble, for networks that do not fit their config, and for a limit that
    cannot be kept.
    """
    refuse_other_folder(out)
    root = assembly.root
    states = read_states(assembly)
    trained = {name: one for name in assembly.experts if (one := trained_difference(assembly, name, states)) is not None}
    whole = {name: states[name] for name in assembly.experts}
    stored_root, experts, sizes = cut_experts(states[root.node.name], whole, trained, limit or Limit(), dtype)
    leaves = [Leaf(one.leaf.name, one.leaf.interval, one.expert.name) for one in assembly.covered]
    save_ensemble(
        out,
        root.stage,
        config.sampling,
        leaves,
        experts,
        TextConditioner.from_config(root.stage.encoders, root=root.folder),
        codec=load_codec(root.stage, root=root.folder),
        dtype=dtype,
        root=stored_root,
        provenance={
            **root.provenance,
            "experts": {name: {**expert.provenance, "parent": expert.node.parent} for name, expert in assembly.experts.items()},
        },
    )
    return digest_of_experts(out / root.stage.name, leaves)[:16], sizes


def read_states(assembly: Assembly) -> dict[str, ExpertState]:
    """The whole weights of the root and of all experts, mapped into memory. Raises ValueError for networks that do not fit their config."""
    nodes = {assembly.root.node.name: assembly.root, **assembly.experts}
    return {name: _state(node) for name, node in nodes.items()}


def trained_difference(assembly: Assembly, name: str, states: Mapping[str, ExpertState]) -> LowRankDifference | None:
    """What an expert has beyond the root, if it was trained so from the root; see `read_trained`."""
    node = assembly.experts[name]
    own, root = states[name].weights, states[assembly.root.node.name].weights
    assert not isinstance(own, LowRankDifference) and not isinstance(root, LowRankDifference)
    return read_trained(node.folder / node.stage.name, own, root)


def refuse_other_folder(out: Path) -> None:
    """Raises ValueError for a place that an ensemble must not take: a file, a folder that is no model's, or a single network's model."""
    if not out.exists():
        return
    if not (out / INDEX).is_file():
        raise ValueError(f"--out={out} exists and is no model folder; choose a new one")
    if not read_configs(out)[2]:
        raise ValueError(f"--out={out} holds a single network's model, which would be lost; choose another folder")


def _find(plan: TreePlan, output: Path, early: bool) -> tuple[dict[str, TrainedNode], dict[str, str]]:
    """The nodes that have a model, and why others do not count."""
    found: dict[str, TrainedNode] = {}
    missing: dict[str, str] = {}
    for node in plan.nodes:
        folder = (output if node.parent is None else nodes_folder(output) / node.name) / "model"
        if not (folder / INDEX).is_file():
            missing[node.name] = f"no model in {folder}"
            continue
        one = TrainedNode(node, folder, read_configs(folder)[0], read_provenance(folder))
        if one.images_seen < node.images and not early:
            missing[node.name] = f"{folder} has seen {one.images_seen:,} of {node.images:,} images; --early takes it as it is"
            continue
        found[node.name] = one
    return found, missing


def _refuse_strange(expert: TrainedNode, root: TrainedNode) -> None:
    """Raises ValueError unless an expert was trained on the plan's noise, with the root's encoders and codec, as the same stage."""
    if (interval := NoiseInterval.from_config(expert.stage.noise)) != expert.node.interval:
        raise ValueError(f"{expert.folder} was trained on {interval}, but the plan has {expert.node.interval} for {expert.node.name}")
    for kind in ("encoders", "codec"):
        own, roots = (_fingerprints(one.provenance.get(kind)) for one in (expert, root))
        if other := sorted(name for name in own.keys() | roots.keys() if own.get(name) != roots.get(name)):
            names = f" ({', '.join(other)})" if kind == "encoders" else ""
            raise ValueError(f"{expert.folder} was trained with other {kind}{names} than {root.folder}: their fingerprints differ")
    with naming(expert.folder):
        refuse_stranger(expert.stage, root.stage, expert.node.name)


def _fingerprints(recorded: object) -> Mapping[str, object]:
    return recorded if isinstance(recorded, dict) else {"": recorded}


def _state(expert: TrainedNode) -> ExpertState:
    path = expert.folder / expert.stage.name / WEIGHTS
    weights = read_weights(path)
    with torch.device("meta"):
        network = build_network(expert.stage)
    with naming(path):
        refuse_misfit(network, weights, "its config.json")
    return ExpertState(expert.stage, weights)
