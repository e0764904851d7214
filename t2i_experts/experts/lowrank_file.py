"""Low-rank differences on disk: one safetensors file that says what it is.

whole/NAME        a tensor as the expert has it
up/NAME           (out, rank)
down/NAME         (rank, in): NAME of the expert is the root's NAME + up @ down, reshaped
metadata          one entry, `low_rank`, a JSON object: format, the root's fingerprint, and free facts such as node and quantiles

Tensors of the root that have none of these are the expert's too.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from t2i_experts.experts.lowrank import Factors, LowRankDifference

_ENTRY = "low_rank"
_FORMAT = "expert = root + up @ down, or whole; version 1"


def stored_tensors(difference: LowRankDifference) -> dict[str, Tensor]:
    """All tensors of a difference by the names that they have in the file."""
    tensors = {f"whole/{name}": tensor for name, tensor in difference.whole.items()}
    for name, factors in difference.factors.items():
        tensors |= {f"up/{name}": factors.up, f"down/{name}": factors.down}
    return tensors


def save_difference(path: Path, difference: LowRankDifference, facts: Mapping[str, Any] | None = None) -> None:
    """Writes the file, the same bytes for the same difference and facts; an earlier one is replaced when it is whole.

    facts: whatever JSON can hold.
    """
    about = json.dumps({"format": _FORMAT, "root": difference.root, "facts": dict(facts or {})})
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in stored_tensors(difference).items()}
    save_file(tensors, temporary, metadata={_ENTRY: about})  # one entry: several are written in any order
    temporary.replace(path)


def load_difference(path: Path) -> tuple[LowRankDifference, dict[str, Any]]:
    """What `save_difference` wrote: the difference and the facts. Raises ValueError naming the file for anything else."""
    if not path.is_file():
        raise ValueError(f"low-rank difference not found: {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}") from error
    about = json.loads(metadata.get(_ENTRY, "{}"))
    if about.get("format") != _FORMAT:
        raise ValueError(f"{path} is no low-rank difference: its metadata must have the entry {_ENTRY} with the format {_FORMAT!r}")
    parts: dict[str, dict[str, Tensor]] = {"whole": {}, "up": {}, "down": {}}
    for key, tensor in tensors.items():
        kind, _, name = key.partition("/")
        if kind not in parts:
            raise ValueError(f"{path}: {key} must begin with whole/, up/ or down/")
        parts[kind][name] = tensor
    up, down = parts["up"], parts["down"]
    for name in sorted(up.keys() | down.keys()):
        if name not in up or name not in down or up[name].shape[1:] != down[name].shape[:1]:
            raise ValueError(f"{path}: up/{name} and down/{name} must be (out, rank) and (rank, in)")
    return LowRankDifference(about["root"], {name: Factors(up[name], down[name]) for name in up}, parts["whole"]), about["facts"]
