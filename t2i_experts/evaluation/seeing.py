"""Pictures on their way to the networks of metrics: drawn for a list of prompts or read from a folder, made square, looked at, and what was
seen kept in parts. They go from the sampler to the networks without files, rounded to whole numbers as files would be."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from t2i_experts.cascade.picture import save_png, to_pil
from t2i_experts.cascade.pipeline import CascadePipeline
from t2i_experts.config import SamplingConfig
from t2i_experts.evaluation.features import FeatureExtractor
from t2i_experts.evaluation.generation import draw
from t2i_experts.evaluation.metrics import Metric
from t2i_experts.evaluation.parts import Parts
from t2i_experts.evaluation.pictures import named_digest
from t2i_experts.evaluation.processes import Processes
from t2i_experts.evaluation.prompts import PromptList
from t2i_experts.evaluation.protocol import Pace, Progress
from t2i_experts.evaluation.squares import HOW, centre_square
from t2i_experts.shards.images import whole
from t2i_experts.shards.parallel import in_order

_LISTED = 10


@dataclass(frozen=True)
class Networks:
    """What looks at the pictures, all at one resolution. extractor: None where there is nothing to compare features with.

    pace.batch: pictures that go through a network together, whatever the sampler's batch is.
    """

    extractor: FeatureExtractor | None
    metrics: Mapping[str, Metric]
    resolution: int
    pace: Pace

    def features_made(self) -> dict[str, Any]:
        """What decides the features of a picture."""
        made = None if self.extractor is None else {k: v for k, v in self.extractor.record.items() if k != "weights"}  # a place
        return {"features": made, "resolution": self.resolution, "square": HOW}

    def made(self) -> dict[str, Any]:
        """What decides all that is seen of a picture."""
        return {**self.features_made(), "metrics": {name: dict(metric.record) for name, metric in self.metrics.items()}}

    def see(self, squares: Tensor, captions: Sequence[str] | None, names: Sequence[str]) -> dict[str, NDArray[Any]]:
        """(N, 3, resolution, resolution) uint8 to `features`, (N, D) float32, and, of pictures with captions, `metric NAME`, (N,) float64.

        names: what an error calls the pictures. Raises ValueError for NaN or infinity.
        """
        seen: dict[str, list[Tensor]] = {}
        for start in range(0, len(squares), self.pace.batch):
            batch = squares[start : start + self.pace.batch].to(self.pace.device)
            if self.extractor is not None:
                seen.setdefault("features", []).append(self.extractor.encode(self.extractor.prepare(batch)).float().cpu())
            for name, metric in self.metrics.items() if captions is not None else ():
                texts = captions[start : start + self.pace.batch]  # type: ignore[index]
                seen.setdefault(f"metric {name}", []).append(metric.values(metric.prepare(batch), texts).cpu().double())
        joined = {name: torch.cat(values) for name, values in seen.items()}
        for name, values in joined.items():
            wrong = (~values.isfinite().reshape(len(values), -1).all(1)).nonzero()
            if len(wrong):
                raise ValueError(f"{names[int(wrong[0])]}: its {name} hold NaN or infinity")
        return {name: values.numpy() for name, values in joined.items()}


@dataclass(frozen=True)
class Drawing:
    """How the pictures of a list are drawn. facts: what their files say of them beside prompt, index and seed."""

    pipeline: CascadePipeline
    prompts: PromptList
    seed: int
    sampling: SamplingConfig
    batch_size: int
    facts: Mapping[str, Any]

    def squares(self, indices: Sequence[int], resolution: int) -> Iterator[Tensor]:
        """(3, resolution, resolution) uint8 of each of these pictures."""
        options: dict[str, Any] = {"seed": self.seed, "sampling": self.sampling, "batch_size": self.batch_size}
        for _, images in draw(self.pipeline, self.prompts.texts, indices=indices, **options):
            yield from (centre_square(image, resolution) for image in images)


def to_make(parts: Parts, saved: Path | None, processes: Processes) -> list[range]:
    """This process's share of the parts that are missing, or whose pictures are to be saved and are not there.

    They are listed before any process makes one.
    """

    def to_do() -> list[range]:
        missing = parts.missing()
        if saved is None:
            return missing
        return [indices for indices in parts.ranges if indices in missing or not all(_file(saved, i).is_file() for i in indices)]

    listed = processes.together(to_do)
    return [listed[i] for i in processes.share(len(listed))]


def draw_parts(
    parts: Parts,
    mine: Sequence[range],
    drawing: Drawing,
    networks: Networks,
    saved: Path | None,
    progress: Progress = lambda done, total: None,
) -> None:
    """Makes some of the parts: draws their pictures and shows them to the networks.

    saved: a folder for the pictures as the networks see them.
    Raises ValueError for a picture or features that are not finite.
    """
    texts = drawing.prompts.texts
    total, done = sum(map(len, mine)), 0
    progress(0, total)
    for indices in mine:
        started, squares = time.perf_counter(), []
        for square in drawing.squares(indices, networks.resolution):
            squares.append(square)
            progress(done := done + 1, total)
        captions = [texts[i] for i in indices]
        seen = networks.see(torch.stack(squares), captions, [f"picture {i}, {texts[i]!r}" for i in indices])
        if saved is not None:
            for i, square in zip(indices, squares, strict=True):
                save_png(to_pil(square), _file(saved, i), {"prompt": texts[i], "index": i, "seed": drawing.seed, **drawing.facts})
        digests = [hashlib.sha256(square.contiguous().numpy().tobytes()).digest() for square in squares]
        seconds = np.full(len(indices), (time.perf_counter() - started) / len(indices))
        parts.write(indices, {**seen, "digest": _rows(digests), "seconds": seconds})


def reference_parts(
    parts: Parts,
    mine: Sequence[range],
    folder: Path,
    names: Sequence[str],
    networks: Networks,
    saved: Path | None,
    progress: Progress = lambda done, total: None,
) -> None:
    """The same for pictures of a folder. Raises ValueError, with their names, if some cannot be read."""
    total, done = sum(map(len, mine)), 0
    progress(0, total)
    unreadable: list[str] = []
    for indices in mine:
        started, squares, digests = time.perf_counter(), [], []
        before = len(unreadable)
        for found in read_squares(folder, [names[i] for i in indices], networks):
            progress(done := done + 1, total)
            if isinstance(found, str):
                unreadable.append(found)
            else:
                squares.append(found[0])
                digests.append(found[1])
        if len(unreadable) > before:
            continue
        seen = networks.see(torch.stack(squares), None, [names[i] for i in indices])
        if saved is not None:
            for i, square in zip(indices, squares, strict=True):
                save_png(to_pil(square), _file(saved, i), {"reference": names[i]})
        seconds = np.full(len(indices), (time.perf_counter() - started) / len(indices))
        parts.write(indices, {**seen, "digest": _rows(digests), "seconds": seconds})
    if unreadable:
        shown = "".join(f"\n  {line}" for line in unreadable[:_LISTED])
        more = f"\n  and {len(unreadable) - _LISTED:,} more" if len(unreadable) > _LISTED else ""
        raise ValueError(f"{len(unreadable):,} of the {total:,} pictures that were read of {folder} cannot be:{shown}{more}")


def read_squares(folder: Path, names: Sequence[str], networks: Networks) -> Iterator[tuple[Tensor, bytes] | str]:
    """Of each picture in order, what the networks see of it and the digest of its name and bytes, or in a line why it cannot be read."""

    def read(name: str) -> tuple[Tensor, bytes] | str:
        try:
            data = (folder / name).read_bytes()
            pixels = torch.from_numpy(np.array(whole(data))).permute(2, 0, 1)
        except (OSError, ValueError) as error:
            return f"{name}: {error}"
        return centre_square(pixels, networks.resolution), named_digest(name, data)

    with ThreadPoolExecutor(networks.pace.workers) as pool:
        yield from in_order(pool, networks.pace.workers, read, names)


def _file(folder: Path, index: int) -> Path:
    return folder / f"{index:06d}.png"


def _rows(digests: Sequence[bytes]) -> NDArray[np.uint8]:
    return np.frombuffer(b"".join(digests), np.uint8).reshape(len(digests), -1)
