"""A plugin with a sampler that takes one step, and a source of pictures that are described by a file `NAME: CAPTION` a line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any


def sample_at_once(denoiser: Any, x: Any, sigmas: Any, conditioning: Any, *, callback: Any = None) -> Any:
    denoised = denoiser(x, sigmas[0], conditioning)
    if callback is not None:
        callback(0, sigmas[0], denoised)
    return denoised


def colon_source(path: Path, images: Path | None, skipped: Any) -> Iterator[Any]:
    from t2i_experts.shards.sources import Record

    for line in path.read_text(encoding="utf-8").splitlines():
        name, colon, caption = line.partition(": ")
        if colon:
            yield Record(name, (images or path.parent) / name, (caption,))
        else:
            skipped.add("line without a caption", line)


def register(registry: Any) -> None:
    registry.add("sampler", "at_once", sample_at_once)
    registry.add("source", "colon", colon_source)
