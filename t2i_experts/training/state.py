"""Checkpoints: everything that a run needs to go on as if it had never stopped, as safetensors and JSON.

    RUN/checkpoints/000000128000/       named by images seen
        network.safetensors  ema.safetensors  optimizer.safetensors  state.json
        weighting.safetensors  weighting_optimizer.safetensors      if noise levels are weighted by a learned function

A checkpoint is written under another name, flushed to the disk and renamed, so that a folder with a number for a name is whole whatever
killed the writer. What a run draws at random is a function of (seed, images seen), so the counter is the state of every generator.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from t2i_experts import __version__
from t2i_experts.cascade.new_folder import flush
from t2i_experts.cascade.weights import refuse_misfit
from t2i_experts.experts.states import fingerprint
from t2i_experts.training.checkpoints import Validation, best_checkpoint, checkpoints, read_facts, remove_checkpoint
from t2i_experts.training.ema import WeightAverage
from t2i_experts.training.trainable import ordinary_state
from t2i_experts.training.uncertainty import LearnedWeighting


@dataclass
class TrainState:
    """A run between two optimiser steps.

    images_seen: of the global order, by all processes. dataset_hash: of the shards that the order runs over. encoders: fingerprints of the
    frozen encoders' weights, by name. config: resolved, as plain values. weighting: of the noise levels, if the run learns one.
    rollbacks: how often the run diverged and went back. watch: what `LossWatch` has seen, as plain values. codec: fingerprint of the
    codec's `model`, None for one that has none. initial: where the weights came from that the run began with (`InitialWeights.facts`).
    """

    network: nn.Module
    ema: WeightAverage
    optimizer: torch.optim.Optimizer
    images_seen: int
    dataset_hash: str
    encoders: Mapping[str, str]
    config: Mapping[str, Any]
    weighting: LearnedWeighting | None = None
    rollbacks: int = 0
    watch: Mapping[str, Any] | None = None
    codec: str | None = None
    initial: Mapping[str, Any] | None = None

    @property
    def rate_scale(self) -> float:
        """By what the learning rate is multiplied: halved at every roll-back."""
        return 0.5**self.rollbacks

    def save(self, root: Path, keep: int, validation: Validation | None = None) -> tuple[Path, bool]:
        """Writes RUN/checkpoints/IMAGES_SEEN and removes all but the newest `keep` and the best in validation.

        Returns the folder, and whether it is the best.

        validation: of these EMA weights, None if it was not measured.
        """
        folder = root / "checkpoints" / f"{self.images_seen:012d}"
        temporary = folder.with_name(f".{folder.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        _save_tensors(temporary / "network.safetensors", self.network.state_dict())
        _save_tensors(temporary / "ema.safetensors", self.ema.state_dict())
        _save_tensors(temporary / "optimizer.safetensors", optimizer_tensors(self.network, self.optimizer))
        if self.weighting is not None:
            _save_tensors(temporary / "weighting.safetensors", self.weighting.module.state_dict())
            moments = optimizer_tensors(self.weighting.module, self.weighting.optimizer)
            _save_tensors(temporary / "weighting_optimizer.safetensors", moments)
        facts = {
            "images_seen": self.images_seen,
            "validation": validation and dataclasses.asdict(validation),
            "rollbacks": self.rollbacks,
            "watch": self.watch,
            "dataset_hash": self.dataset_hash,
            "encoders": dict(self.encoders),
            "codec": self.codec,
            "initial": self.initial,
            "model": fingerprint(ordinary_state(self.ema.network.state_dict())),
            "config": self.config,
            "versions": {"t2i_experts": __version__, "torch": torch.__version__},
        }
        (temporary / "state.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        for path in (*temporary.iterdir(), temporary):
            flush(path)
        if folder.exists():
            remove_checkpoint(folder)
        temporary.rename(folder)
        flush(folder.parent)
        best = best_checkpoint(root)
        for old in checkpoints(root)[:-keep]:
            if old != best:
                remove_checkpoint(old)
        return folder, folder == best

    def restore(self, folder: Path) -> None:
        """Takes everything from a checkpoint.

        Raises ValueError if it was made on other shards, encoders or codec, does not fit this network, or cannot be read.
        """
        facts = read_facts(folder)
        changed = sorted(name for name, digest in self.encoders.items() if facts["encoders"].get(name) != digest)
        if changed:
            raise ValueError(
                f"{folder} was trained with other weights of the encoders {', '.join(changed)}: give the run another output folder"
            )
        if facts.get("codec") != self.codec:
            raise ValueError(
                f"{folder} was trained with other weights or another normalisation of the codec: give the run another output folder"
            )
        if facts["dataset_hash"] != self.dataset_hash:
            raise ValueError(
                f"{folder} was trained on other shards (dataset hash {facts['dataset_hash']}, now {self.dataset_hash}): "
                "give the run another output folder, or the shards that it began with"
            )
        try:
            network, ema, optimizer = (load_file(folder / f"{name}.safetensors") for name in ("network", "ema", "optimizer"))
            names = ("weighting", "weighting_optimizer") if self.weighting is not None else ()
            weighting = [load_file(folder / f"{name}.safetensors") for name in names]
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{folder} cannot be read ({error}); remove it to go on from the checkpoint before it") from error
        try:
            refuse_misfit(self.network, network, "this network")
            self.ema.load_state_dict(ema)
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{folder} {' '.join(str(error).split())}") from error
        self.network.load_state_dict(network)
        restore_optimizer(self.network, self.optimizer, optimizer)
        if self.weighting is not None:
            self.weighting.module.load_state_dict(weighting[0])
            restore_optimizer(self.weighting.module, self.weighting.optimizer, weighting[1])
        self.images_seen = facts["images_seen"]
        self.rollbacks = facts.get("rollbacks", 0)
        self.watch = facts.get("watch")
        self.initial = facts.get("initial")


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
    optimizer.state.clear()  # what it holds now would else lie in memory beside what comes
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
