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
from t2i_experts.cascade.expert_folders import ExpertState, Leaf, digest_of_experts, refuse_stranger, trained_on
from t2i_experts.cascade.files import naming, read_json
from t2i_experts.cascade.model_folder import INDEX, read_configs, save_ensemble
from t2i_experts.cascade.stage import build_network
from t2i_experts.cascade.weights import WEIGHTS, read_weights, refuse_misfit
from t2i_experts.conditioning.conditioner import TextConditioner
from t2i_experts.config import RunConfig, StageConfig
from t2i_experts.experts.cover import Covered, cover
from t2i_experts.experts.plan import Node, TreePlan

NODES = "nodes"
"""In a root's run, the folder of the nodes' runs."""
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


def write_assembly(assembly: Assembly, config: RunConfig, out: Path, dtype: torch.dtype | None = None) -> str:
    """Writes the ensemble as a model folder, and returns its fingerprint. dtype: of the weights on the disk; None: as they are.

    Raises ValueError if `out` is something else than an earlier ensemble, and for networks that do not fit their config.
    """
    refuse_other_folder(out)
    root = assembly.root
    leaves = [Leaf(one.leaf.name, one.leaf.interval, one.expert.name) for one in assembly.covered]
    save_ensemble(
        out,
        root.stage,
        config.sampling,
        leaves,
        {name: _state(expert) for name, expert in assembly.experts.items()},
        TextConditioner.from_config(root.stage.encoders, root=root.folder),
        codec=load_codec(root.stage, root=root.folder),
        dtype=dtype,
        provenance={
            **root.provenance,
            "experts": {name: {**expert.provenance, "parent": expert.node.parent} for name, expert in assembly.experts.items()},
        },
    )
    return digest_of_experts(out / root.stage.name, leaves)[:16]


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
        folder = (output if node.parent is None else output / NODES / node.name) / "model"
        if not (folder / INDEX).is_file():
            missing[node.name] = f"no model in {folder}"
            continue
        provenance = read_json(folder / INDEX).get("provenance")
        one = TrainedNode(node, folder, read_configs(folder)[0], provenance if isinstance(provenance, dict) else {})
        if one.images_seen < node.images and not early:
            missing[node.name] = f"{folder} has seen {one.images_seen:,} of {node.images:,} images; --early takes it as it is"
            continue
        found[node.name] = one
    return found, missing


def _refuse_strange(expert: TrainedNode, root: TrainedNode) -> None:
    """Raises ValueError unless an expert was trained on the plan's noise, with the root's encoders and codec, as the same stage."""
    if (interval := trained_on(expert.stage.noise)) != expert.node.interval:
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
