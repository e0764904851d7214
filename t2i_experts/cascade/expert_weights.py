"""The weights of one expert in its folder: whole, or as a difference of low rank from the root's.

base64/experts/E^3_0/diffusion_pytorch_model.safetensors    whole weights
base64/experts/E^3_0/low_rank.safetensors                   or a difference (`experts.lowrank_file`), which knows its root
base64/diffusion_pytorch_model.safetensors                  the root, if any expert is a difference from it

Both files have the node's name and the quantiles that it was trained on in their headers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from t2i_experts.cascade.files import naming
from t2i_experts.cascade.stage import build_network
from t2i_experts.cascade.weights import WEIGHTS, load_network, read_about, read_weights, refuse_misfit, stored_bytes, write_weights
from t2i_experts.config import StageConfig
from t2i_experts.diffusion.precond import EDMPrecond
from t2i_experts.experts.lowrank import LowRankDifference, refuse_other_root
from t2i_experts.experts.lowrank_file import load_difference, save_difference, stored_tensors
from t2i_experts.experts.states import State, digest

LOW_RANK = "low_rank.safetensors"
"""The file in the folder of an expert that is stored as a difference."""


class RootWeights:
    """The weights in a stage's folder, from which its low-rank experts differ; read when the first of these asks for them."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / WEIGHTS

    @cached_property
    def state(self) -> dict[str, Tensor]:
        """As they are in the file, mapped into memory. Raises ValueError."""
        return read_weights(self.path)

    @cached_property
    def digest(self) -> str:
        """See `states.digest`; its first 16 digits are the fingerprint that a difference knows."""
        return digest(self.state)


def is_low_rank(folder: Path) -> bool:
    """How an expert is stored. Raises ValueError for a folder that has it in both ways."""
    low_rank = (folder / LOW_RANK).is_file()
    if low_rank and (folder / WEIGHTS).is_file():
        raise ValueError(f"{folder} holds both {WEIGHTS} and {LOW_RANK}: which of them is the expert? Remove the other")
    return low_rank


def write_expert(folder: Path, weights: State | LowRankDifference, about: Mapping[str, str], dtype: torch.dtype | None) -> None:
    """Writes an expert's file. about: facts for its header. dtype: that whole weights are cast to; a difference stays as it is."""
    if isinstance(weights, LowRankDifference):
        save_difference(folder / LOW_RANK, weights, about)
    else:
        write_weights(folder / WEIGHTS, weights, dtype=dtype, about=about)


def read_difference(folder: Path, root: RootWeights) -> tuple[LowRankDifference, dict[str, str], str]:
    """The difference in an expert's folder, the facts in its header, and a digest of it and the root.

    Raises ValueError naming the file if it cannot be read, and if it is one from another root.
    """
    path = folder / LOW_RANK
    difference, about = load_difference(path)
    with naming(path):
        refuse_other_root(root.state, difference, root.digest[:16])
    found = hashlib.sha256(f"{root.digest} {digest(stored_tensors(difference))}".encode()).hexdigest()
    return difference, about, found


def load_expert(
    config: StageConfig, folder: Path, root: RootWeights, device: torch.device | str, dtype: torch.dtype
) -> tuple[EDMPrecond, str, dict[str, str]]:
    """The network of an expert for sampling, whole in any case, a digest of its file (and of the root), and the facts in the header.

    A difference is added in float64 on `device` and rounded to float32 before it is cast to `dtype`.
    Raises ValueError naming the file for what cannot be read or does not fit.
    """
    if not is_low_rank(folder):
        network, found = load_network(config, folder / WEIGHTS, device, dtype)
        return network, found, read_about(folder / WEIGHTS)
    difference, about, found = read_difference(folder, root)
    network = empty_network(config, root, device)
    put_on(network, root.state, difference.to(torch.device(device)), root.state)
    return for_sampling(network, dtype), found, about


def digest_of_expert(folder: Path, root: RootWeights) -> str:
    """The digest that `load_expert` gives, without building the network."""
    return read_difference(folder, root)[2] if is_low_rank(folder) else digest(read_weights(folder / WEIGHTS))


def network_bytes(folder: Path, root: RootWeights, dtype: torch.dtype) -> int:
    """Bytes of an expert's network in memory, restored."""
    return stored_bytes(root.path if is_low_rank(folder) else folder / WEIGHTS, dtype)


def empty_network(config: StageConfig, root: RootWeights, device: torch.device | str) -> EDMPrecond:
    """The network of a config on a device, in float32, with anything for weights. Raises ValueError if it is not the root's."""
    with torch.device("meta"), naming(root.path.with_name("config.json")):
        network = build_network(config)
    with naming(root.path):
        refuse_misfit(network, root.state, "the network of its low-rank expert")
    return network.to_empty(device=device)


def for_sampling(network: EDMPrecond, dtype: torch.dtype) -> EDMPrecond:
    """In that type, in channels-last memory, without gradients."""
    return network.to(dtype).to(memory_format=torch.channels_last).eval().requires_grad_(False)


@torch.no_grad()
def put_on(network: EDMPrecond, root: State, difference: LowRankDifference, names: Iterable[str]) -> None:
    """Writes the tensors of these names of root + difference into a network, in place. The difference is on its device."""
    into = network.state_dict()
    for name in names:
        own = root[name].to(into[name].device, non_blocking=True)
        into[name].copy_(difference.tensor(name, own, torch.float32))
