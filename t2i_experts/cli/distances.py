"""What commands that compare sets of pictures tell of the numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


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
