"""The one registry: every part that is chosen by name is found here, and plugins enter by the same door as the built-in parts."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Mapping
from typing import Any

BUILT_IN: Mapping[str, Mapping[str, str]] = {
    "sampler": {
        "euler": "t2i_experts.diffusion.samplers:sample_euler",
        "heun": "t2i_experts.diffusion.samplers:sample_heun",
        "dpmpp_2m": "t2i_experts.diffusion.samplers:sample_dpmpp_2m",
    },
    "encoder": {
        "t5": "t2i_experts.conditioning.t5:T5Encoder",
        "clip_text": "t2i_experts.conditioning.clip:CLIPTextEncoder",
        "clip_image": "t2i_experts.conditioning.clip:CLIPImageEncoder",
    },
    "source": {
        "folder": "t2i_experts.shards.sources:folder_source",
        "csv": "t2i_experts.shards.sources:csv_source",
        "jsonl": "t2i_experts.shards.sources:jsonl_source",
        "coco": "t2i_experts.shards.coco:coco_source",
        "img2dataset": "t2i_experts.shards.tars:img2dataset_source",
        "parquet": "t2i_experts.shards.parquet:parquet_source",
    },
}
"""Kind -> name -> "module:attribute", imported when it is asked for, so that listing names costs nothing."""


class Registry:
    """Names to parts, by kind. A part is an object, or "module:attribute" to be imported on first use."""

    def __init__(self, parts: Mapping[str, Mapping[str, Any]] = BUILT_IN) -> None:
        self._parts: dict[str, dict[str, Any]] = {kind: dict(named) for kind, named in parts.items()}

    def add(self, kind: str, name: str, part: Callable[..., Any] | type | str) -> None:
        """Adds a part. Raises ValueError for an unknown kind and for a name that is taken."""
        named = self._named(kind)
        if name in named:
            raise ValueError(f"the {kind} {name!r} exists already and cannot be replaced")
        named[name] = part

    def names(self, kind: str) -> list[str]:
        """The names of a kind, sorted. Raises ValueError for an unknown kind."""
        return sorted(self._named(kind))

    def get(self, kind: str, name: str) -> Any:
        """The part. Raises ValueError for an unknown kind or name, listing those that there are."""
        named = self._named(kind)
        if name not in named:
            near = difflib.get_close_matches(name, named, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(f"unknown {kind} {name!r}; {hint}allowed: {', '.join(sorted(named))}")
        part = named[name]
        if isinstance(part, str):
            module, attribute = part.split(":")
            part = named[name] = getattr(importlib.import_module(module), attribute)
        return part

    def _named(self, kind: str) -> dict[str, Any]:
        if kind not in self._parts:
            raise ValueError(f"unknown kind of part {kind!r}; allowed: {', '.join(sorted(self._parts))}")
        return self._parts[kind]


registry = Registry()
