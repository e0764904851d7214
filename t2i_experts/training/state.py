"""Checkpoints: everything that a run needs to go on as if it had never stopped, as safetensors and JSON.

    RUN/checkpoints/000000128000/       named by images seen
        network.safetensors  ema.safetensors  optimizer.safetensors  state.json
        weighting.safetensors  weighting_optimizer.safetensors      if noise levels are weighted by a learned function

A checkpoint is written under another name, flushed to the disk and renamed, so that a folder with a number for a name is whole whatever
killed the writer. What a run draws at random is a function of (seed, images seen), so the counter is the state of every generator.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import shutil
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from t2i_experts import __version__
from t2i_experts.cascade.new_folder import flush
from t2i_experts.cascade.weights import refuse_misfit
from t2i_experts.config import RunConfig, differences, from_plain, to_plain
from t2i_experts.shards.format import write_atomically
from t2i_experts.training.ema import WeightAverage
from t2i_experts.training.uncertainty import LearnedWeighting


@dataclass(frozen=True)
class Validation:
    """A validation loss. of: what it was measured on; losses of different ones cannot be compared."""

    loss: float
    of: str


@dataclass
class TrainState:
    """A run between two optimiser steps.

    images_seen: of the global order, by all processes. dataset_hash: of the shards that the order runs over. encoders: fingerprints of the
    frozen encoders' weights, by name. config: resolved, as plain values. weighting: of the noise levels, if the run learns one.
    rollbacks: how often the run diverged and went back. watch: what `LossWatch` has seen, as plain values. codec: fingerprint of the
    codec's `model`, None for one that has none.
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
            "config": self.config,
            "versions": {"t2i_experts": __version__, "torch": torch.__version__},
        }
        (temporary / "state.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        for path in (*temporary.iterdir(), temporary):
            flush(path)
        if folder.exists():
            _remove(folder)
        temporary.rename(folder)
        flush(folder.parent)
        best = best_checkpoint(root)
        for old in checkpoints(root)[:-keep]:
            if old != best:
                _remove(old)
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


def _remove(folder: Path) -> None:
    """Takes a checkpoint away; if that is cut short, what is left no longer has a number for a name."""
    doomed = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed)


def checkpoints(root: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    return sorted(path for path in (root / "checkpoints").glob("[0-9]*") if path.is_dir())


def best_checkpoint(root: Path) -> Path | None:
    """The checkpoint with the lowest validation loss, the older of two equal ones; None if no checkpoint was validated.

    Of those that were measured on the same as the newest: other losses cannot be compared.
    """
    facts = [(read_facts(folder).get("validation"), folder) for folder in checkpoints(root)]
    measured = [(Validation(**validation), folder) for validation, folder in facts if validation]
    return min(((v.loss, folder) for v, folder in measured if v.of == measured[-1][0].of), default=(None, None))[1]


def prepare_roll_back(root: Path) -> None:
    """Removes the checkpoints that were saved, at a stop, when the loss had just risen too high."""
    for folder in reversed(checkpoints(root)):
        if not (read_facts(folder).get("watch") or {}).get("high"):
            break
        _remove(folder)


def record_roll_back(folder: Path, rollbacks: int) -> None:
    """Writes into the checkpoint that a run goes back to how often it has done so, which a later start must know."""
    facts = {**read_facts(folder), "rollbacks": rollbacks}
    write_atomically(folder / "state.json", [json.dumps(facts, indent=2).encode() + b"\n"])


def read_facts(folder: Path) -> dict[str, Any]:
    """A checkpoint's state.json. Raises ValueError if it cannot be read, or is another one."""
    try:
        facts = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        if not (isinstance(facts, dict) and {"images_seen", "config"} <= facts.keys()):
            raise ValueError("state.json does not hold images_seen and config")
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read the checkpoint {folder}: {error}") from error
    return facts


def lock_run(root: Path) -> IO[str]:
    """Makes the output folder of a run and takes it for this process, until the file that is returned is closed or the process ends.

    Raises ValueError if it cannot be a folder, or if another process has it.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = (root / ".lock").open("a", encoding="utf-8")
    except OSError as error:
        raise ValueError(f"output={str(root)!r} cannot be used: {error}") from error
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock's, this lock is not inherited by loader workers
    except OSError:
        owner = (root / ".lock").read_text(encoding="utf-8").strip()
        lock.close()
        raise ValueError(f"output={str(root)!r}: another process is training there ({owner or 'unknown'})") from None
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()}")
    lock.flush()
    return lock


MAY_CHANGE = (
    "output",
    "data",
    "sampling",
    "experts",
    "training.images",
    "training.accumulation",
    "training.compile",
    "training.gradient_checkpointing",
    "training.device",
    "training.ema.snapshot_every_images",
    "training.max_minutes",
    "training.rollbacks",
    "training.divergence_factor",
    "training.checkpoint_every_images",
    "training.keep_checkpoints",
    "training.log_every_images",
    "training.preview",
    "training.trackers",
    "training.validation",
)
"""Config values, or groups of them, that may differ when a run goes on. Hashes guard the content of the shards and encoders."""


def refuse_changed_config(folder: Path, config: RunConfig) -> None:
    """Raises ValueError with the differences if a checkpoint was made under another config; what it did not know counts as default."""
    old = to_plain(from_plain(RunConfig, read_facts(folder)["config"]))
    changes = []
    for line in differences(old, to_plain(config)):
        key = line.split(":")[0]
        if not any(key == name or key.startswith(f"{name}.") for name in MAY_CHANGE):
            changes.append(line)
    if changes:
        raise ValueError(
            f"{folder.parent.parent} holds a run with another config; go on with its own, or choose another output. Changed:\n  "
            + "\n  ".join(changes)
        )


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
