"""The weights of one network on disk: a safetensors file, which says what it holds, and the network that they are put into."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from t2i_experts.cascade.files import naming
from t2i_experts.cascade.stage import build_network
from t2i_experts.config import StageConfig
from t2i_experts.diffusion.precond import EDMPrecond
from t2i_experts.experts.states import digest, misfit

WEIGHTS = "diffusion_pytorch_model.safetensors"
"""The file in a network's folder; its config.json lies beside it."""


def write_weights(
    path: Path, weights: Mapping[str, Tensor], *, dtype: torch.dtype | None = None, about: Mapping[str, str] | None = None
) -> None:
    """Writes a state; the same state gives the same bytes. dtype: that floating-point tensors are cast to. about: facts for the header."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in cast(weights, dtype).items()}
    save_file(tensors, path, metadata={"format": "pt", **(about or {})})
    if about:
        _sort_facts(path)


def cast(weights: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """A state with its floating-point tensors in another type; None: as they are."""
    return {name: tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor for name, tensor in weights.items()}


def _sort_facts(path: Path) -> None:
    """Puts the facts of a file's header in order, which safetensors writes in any. The header keeps its length: spaces may follow it."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= length, "the same header, in another order, is longer"
        file.seek(8)
        file.write(text.ljust(length))


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, which the CPU maps into memory and reads where they are used. Raises ValueError."""
    if not path.is_file():
        raise ValueError(f"weights not found: {path}")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); save or fetch the model again") from error


def read_about(path: Path) -> dict[str, str]:
    """The facts in the header of a file that `read_weights` can read."""
    with safe_open(path, "pt") as file:
        return dict(file.metadata() or {})


def stored_bytes(path: Path, dtype: torch.dtype) -> int:
    """Bytes that the weights in a file take in memory once they are of `dtype`. Raises ValueError if they cannot be read."""
    return sum(
        tensor.numel() * (dtype.itemsize if tensor.is_floating_point() else tensor.itemsize) for tensor in read_weights(path).values()
    )


def load_network(
    config: StageConfig, path: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[EDMPrecond, str]:
    """The network of a stage with the weights in `path`, for sampling, and the `digest` of these.

    Raises ValueError if they cannot be read or do not fit the config.
    """
    weights = read_weights(path)
    with torch.device("meta"), naming(path.with_name("config.json")):
        network = build_network(config)
    network = network.to_empty(device=device)
    with naming(path):
        refuse_misfit(network, weights, "its config.json")
    network.load_state_dict(weights, strict=True)
    found = digest(weights)  # before they go: mapped into memory, they must not be read once the file may have been written over
    return network.to(dtype).to(memory_format=torch.channels_last).eval().requires_grad_(False), found


def refuse_misfit(network: torch.nn.Module, weights: Mapping[str, Tensor], whose: str) -> None:
    """Raises ValueError that names the first tensor of a state that a network lacks, has beyond it, or has in another shape."""
    if found := misfit(network.state_dict(), weights):
        name, in_network, in_file, more = found
        raise ValueError(f"does not fit {whose}: {name} is {in_file} in the file and {in_network} in the network{more}")
