"""From a tree of experts to the runs that train it: an ordinary config for each node.

    OUTPUT                       the root's run, as `t2i-experts train CONFIG` makes it
    OUTPUT/nodes/NAME.yaml       the resolved config of a node, which `t2i-experts train` reads
    OUTPUT/nodes/NAME            its run

A node's run is the root's but for its noise, its images, the weights of its parent with which it begins, and its overrides.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from t2i_experts.config import ExpertsConfig, NodeConfig, RunConfig, build_config, to_plain, to_yaml
from t2i_experts.config.expert_rules import require_experts
from t2i_experts.experts.plan import Node, TreePlan


@dataclass(frozen=True)
class NodeRun:
    """The run that trains a node. folder: of the tree's nodes, OUTPUT/nodes."""

    node: Node
    config: RunConfig
    folder: Path

    @property
    def name(self) -> str:
        """Of the node."""
        return self.node.name

    @property
    def output(self) -> Path:
        """The folder of the run."""
        return Path(self.config.output)

    @property
    def model(self) -> Path:
        """The model folder that it writes."""
        return self.output / "model"

    @property
    def config_file(self) -> Path:
        """Where its config is written."""
        return self.folder / f"{self.name}.yaml"

    @property
    def log(self) -> Path:
        """What the process that trains it says."""
        return self.folder / f"{self.name}.log"


def nodes_folder(output: str | Path) -> Path:
    """Of the tree whose root is trained in `output`."""
    return Path(output) / "nodes"


def node_runs(config: RunConfig) -> Mapping[str, NodeRun]:
    """The run of every node of a config's tree by name, the root's first and parents before their children.

    Raises ValueError for a config without experts, a tree that is wrong, and overrides that cannot be: all name the key.
    """
    require_experts(config)
    tree = TreePlan.from_config(config)
    folder = nodes_folder(config.output)
    runs = {tree.root.name: NodeRun(tree.root, config, folder)}
    for node in tree.nodes[1:]:
        assert node.parent is not None
        runs[node.name] = NodeRun(node, _node_config(config, node, folder, runs[node.parent].model), folder)
    return runs


def write_configs(runs: Mapping[str, NodeRun]) -> None:
    """Writes every node's config file that is not there as it should be; several hosts may do so at once."""
    for run in runs.values():
        text = to_yaml(run.config)
        if not run.config_file.is_file() or run.config_file.read_text(encoding="utf-8") != text:
            run.folder.mkdir(parents=True, exist_ok=True)
            descriptor, temporary = tempfile.mkstemp(dir=run.folder, prefix=f".{run.name}.")  # pids of several hosts may be equal
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
            os.chmod(temporary, 0o644)
            os.replace(temporary, run.config_file)


def _node_config(config: RunConfig, node: Node, folder: Path, parent: Path) -> RunConfig:
    whole = node.interval.share == 1
    quantiles = [] if whole else [str(node.interval.u_lo), str(node.interval.u_hi)]
    preview = replace(config.training.preview, around=None if whole else str(Path(config.output) / "model"))
    plain = replace(
        config,
        output=str(folder / node.name),
        stage=replace(config.stage, noise=replace(config.stage.noise, quantiles=quantiles)),
        training=replace(config.training, images=node.images, initial=str(parent), preview=preview),
        sampling=replace(config.sampling, experts={}),  # of the ensemble, which a node alone is not
        experts=ExpertsConfig(),
    )
    own = config.experts.nodes.get(node.name, NodeConfig()).overrides
    try:
        return build_config(to_plain(plain), [*config.experts.overrides, *own], source=node.name)
    except ValueError as error:
        keys = [key for key, said in (("overrides", config.experts.overrides), (f"nodes.{node.name}.overrides", own)) if said]
        where = " and ".join(f"experts.{key}" for key in keys) or "its config"
        raise ValueError(f"the run of {node.name}, by {where}: {error}") from error
