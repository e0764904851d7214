"""What the commands that measure pictures share: how fast they go, and what they say of the machine and of distances."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from t2i_experts.cli.options import check_counts
from t2i_experts.shards.parallel import cores

if TYPE_CHECKING:
    import torch


def check_pace(batch: int, workers: int | None) -> int:
    """The threads that decode pictures, this process's share of the cores if not given. Raises ValueError for less than one."""
    if workers is None:
        workers = max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    check_counts(batch=batch, workers=workers)
    return workers


def machine(device: torch.device) -> dict[str, Any]:
    """What it was computed on and with. JPEG's decoder counts among the versions: others differ in the last bit."""
    from importlib.metadata import version

    from PIL import features

    from t2i_experts.bench.machine import describe

    packages = {name: version(name) for name in ("torch", "numpy", "pillow", "open-clip-torch")}
    return {"machine": describe(device), "versions": {**packages, "libjpeg-turbo": features.version("libjpeg_turbo")}}


def distance_lines(numbers: Mapping[str, Any], name: str, dimension: int, counts: Mapping[str, int | None]) -> list[str]:
    """The distance, called by its name, and the numbers beside it, for people. counts: of pictures, by what the sets are called."""
    lines = [f"{name} {numbers['distance']:.4f}"]
    few = [f"{what} has {count:,}" for what, count in counts.items() if count is not None and count <= dimension]
    if few:
        lines.append(f"  with few pictures it is far too large: {', '.join(few)} for {dimension:,} dimensions")
    if "infinity" in numbers:
        lines.append(f"{name} of infinitely many pictures {numbers['infinity']['value']:.4f} +- {numbers['infinity']['error']:.4f}")
    if "kid" in numbers:
        found = numbers["kid"]
        everything = set(counts.values()) == {found["size"]}  # then all subsets are the same
        spread = "(all {size} of each: no spread)" if everything else "+- {spread:.6f} ({subsets} subsets of {size})"
        lines.append(f"KID {{mean:.6f}} {spread}".format(**found))
    if "precision_recall" in numbers:
        shown = "precision {precision:.4f}, recall {recall:.4f} ({neighbours} nearest neighbours)"
        lines.append(shown.format(**numbers["precision_recall"]))
    return lines
