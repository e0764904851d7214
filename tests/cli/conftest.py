"""A tree whose root was really trained, and whose leaves are it with something added."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from t2i_experts.cascade.model_folder import WEIGHTS, load_model, save_model
from t2i_experts.cascade.stage import build_network
from t2i_experts.config import SamplingConfig

TREE = "\nexperts: {leaves: [E^1_0, E^1_1], images: 32}\n"


class Tree:
    """config: its file. output: the root's run."""

    def __init__(self, config: Path, output: Path, root: Path) -> None:
        self.config, self.output = config, output
        config.write_text(config.read_text() + TREE)
        shutil.copytree(root, output / "model")
        self.model = load_model(root)

    def write(self, name: str, *, images_seen: int = 32, projections: bool = False, seed: int = 0) -> dict[str, Tensor]:
        """A leaf: the root with noise on its weights."""
        stage = self.model.stages["base64"].config
        quantiles = {"E^1_0": ["0", "1/2"], "E^1_1": ["1/2", "1"]}[name]
        stage = replace(stage, noise=replace(stage.noise, quantiles=quantiles), network=replace(stage.network, projections=projections))
        network, root = build_network(stage), self.root()
        generator = torch.Generator().manual_seed(seed)
        weights = {
            key: root.get(key, tensor) + 0.02 * torch.randn(tensor.shape, generator=generator)
            for key, tensor in network.state_dict().items()
        }
        facts = {**self.model.provenance, "images_seen": images_seen}
        save_model(self.leaf(name), stage, SamplingConfig(), weights, self.model.conditioner, provenance=facts)
        return weights

    def leaf(self, name: str) -> Path:
        return self.output / "nodes" / name / "model"

    def root(self) -> dict[str, Tensor]:
        return load_file(self.output / "model" / "base64" / WEIGHTS)


@pytest.fixture
def tree(write_config: Callable[[str], Path], tmp_path: Path, trained: Path) -> Tree:
    return Tree(write_config("run"), tmp_path / "run", trained / "model")


@pytest.fixture
def leaves(tree: Tree) -> Tree:
    tree.write("E^1_0")
    tree.write("E^1_1", seed=1)
    return tree
