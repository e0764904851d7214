"""Checkpoints: everything that a run needs to go on as if it had never stopped, as safetensors and JSON.

    RUN/checkpoints/000000128000/       named by images seen
        network.safetensors  ema.safetensors  optimizer.safetensors  state.json

A checkpoint is written under another name, flushed to the disk and renamed, so that a folder with a number for a name is whole whatever
killed the writer. What a run draws at random is a function of (seed, images seen), so the counter is the state of every generator.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from t2i_experts import __version__
from t2i_experts.training.ema import EMA


@dataclass
class TrainState:
    """A run between two optimiser steps.

    images_seen: of the global order, by all processes. dataset_hash: of the shards that the order runs over. config: resolved, as plain
    values.
    """

    network: nn.Module
    ema: EMA
    optimizer: torch.optim.Optimizer
    images_seen: int
    dataset_hash: str
    config: Mapping[str, Any]

    def save(self, root: Path, keep: int) -> Path:
        """Writes RUN/checkpoints/IMAGES_SEEN and removes all but the newest `keep`. Returns the checkpoint's folder."""
        folder = root / "checkpoints" / f"{self.images_seen:012d}"
        temporary = folder.with_name(f".{folder.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        _save_tensors(temporary / "network.safetensors", self.network.state_dict())
        _save_tensors(temporary / "ema.safetensors", self.ema.network.state_dict())
        _save_tensors(temporary / "optimizer.safetensors", optimizer_tensors(self.network, self.optimizer))
        facts = {
            "images_seen": self.images_seen,
            "dataset_hash": self.dataset_hash,
            "config": self.config,
            "versions": {"t2i_experts": __version__, "torch": torch.__version__},
        }
        (temporary / "state.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        for path in (*temporary.iterdir(), temporary):
            _flush(path)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
        _flush(folder.parent)
        for old in checkpoints(root)[:-keep]:
            shutil.rmtree(old)
        return folder

    def restore(self, folder: Path) -> None:
        """Takes everything from a checkpoint.

        Raises ValueError if it was made on other shards or does not fit this network.
        """
        facts = read_facts(folder)
        if facts["dataset_hash"] != self.dataset_hash:
            raise ValueError(
                f"{folder} was trained on other shards (dataset hash {facts['dataset_hash']}, now {self.dataset_hash}): "
                "give the run another output folder, or the shards that it began with"
            )
        try:
            self.network.load_state_dict(load_file(folder / "network.safetensors"))
            self.ema.network.load_state_dict(load_file(folder / "ema.safetensors"))
        except RuntimeError as error:
            raise ValueError(f"{folder} does not fit this network: {error}") from error
        restore_optimizer(self.network, self.optimizer, load_file(folder / "optimizer.safetensors"))
        self.images_seen = facts["images_seen"]


def checkpoints(root: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    return sorted(path for path in (root / "checkpoints").glob("[0-9]*") if path.is_dir())


def read_facts(folder: Path) -> dict[str, Any]:
    """A checkpoint's state.json. Raises ValueError if it cannot be read."""
    try:
        return json.loads((folder / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read the checkpoint {folder}: {error}") from error


def optimizer_tensors(network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state as flat tensors named PARAMETER/FIELD (AdamW: step, exp_avg, exp_avg_sq)."""
    return {
        f"{name}/{field}": torch.as_tensor(value)
        for name, parameter in network.named_parameters()
        for field, value in optimizer.state.get(parameter, {}).items()
    }


def restore_optimizer(network: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`.

    Each moment gets its parameter's strides: the fused AdamW walks through memory, and a file knows nothing of channels-last.
    """
    parameters = {name: (i, parameter) for i, (name, parameter) in enumerate(network.named_parameters())}
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, field = key.rsplit("/", 1)
        i, parameter = parameters[name]
        moment = tensor.shape == parameter.shape
        state.setdefault(i, {})[field] = torch.empty_like(parameter.detach()).copy_(tensor) if moment else tensor
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)


def _flush(path: Path) -> None:
    """Waits until a file or a folder's list of names is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
