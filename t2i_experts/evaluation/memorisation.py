"""Has a model learnt its training pictures by heart? The nearest training picture of each generated one, beside those of real pictures that
were not trained on. All pictures come to the comparison in the same way: the square in their centre, at one size."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from t2i_experts.cascade.picture import to_pil
from t2i_experts.charts import Chart, Marks, Series, draw_captioned, draw_chart
from t2i_experts.evaluation.copying import QUANTILE, copying, share_below
from t2i_experts.evaluation.looking import Shown, Source
from t2i_experts.evaluation.nearest import NearestSearch
from t2i_experts.evaluation.processes import ALONE, Processes, interleaved, interleaved_tensors
from t2i_experts.evaluation.protocol import Pace, Progress
from t2i_experts.evaluation.spaces import Space

_BINS = 40
_QUANTILES = {"nearest": 0.0, "1%": 0.01, "10%": 0.1, "median": 0.5, "90%": 0.9, "furthest": 1.0}


@dataclass(frozen=True, eq=False)
class Found:
    """Of each picture of a set, in its order: its name, the distance to the nearest training picture, and which that is."""

    names: Sequence[str]
    distances: NDArray[np.float32]
    nearest: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Memorisation:
    """generated, held_out: what was found of each; held_out is None without such pictures. sets: the records of all sets."""

    generated: Found
    held_out: Found | None
    sets: Mapping[str, Mapping[str, Any]]

    def numbers(self) -> dict[str, Any]:
        """As JSON's plain values: quantiles and histogram of the distances, and what they say beside those of the held-out pictures."""
        found = {"generated": self.generated} | ({} if self.held_out is None else {"held_out": self.held_out})
        edges = self._edges()
        numbers: dict[str, Any] = {
            "distances": {what: _summary(one.distances) for what, one in found.items()},
            "copies": {what: int((one.distances == 0).sum()) for what, one in found.items()},
            "histogram": {
                "edges": edges.tolist(),
                **{what: np.histogram(one.distances, edges)[0].tolist() for what, one in found.items()},
            },
        }
        if self.held_out is not None:
            numbers["below"] = asdict(share_below(self.generated.distances, self.held_out.distances))
            numbers["copying"] = asdict(copying(self.generated.distances, self.held_out.distances))
        return numbers

    def notes(self, resolution: int) -> list[str]:
        """What a reader of the numbers should know, in a line each."""
        found = []
        if self.held_out is None:
            found.append("without --held-out nobody can say which distance is small: real pictures that were not trained on have some, too")
        elif copies := int((self.held_out.distances == 0).sum()):
            found.append(f"{copies:,} held-out pictures are training pictures, as far as these distances can tell: they are not held out")
        for what, record in self.sets.items():
            low, high = record["shorter_side"]
            if low < resolution:
                found.append(f"{what}: pictures of {low} px (the largest have {high}) are enlarged to {resolution} px; see --resolution")
        return found

    def nearest_first(self, what: Found, most: int) -> list[int]:
        """The indices of the pictures of one set that are nearest to a training picture, at most so many."""
        return [int(i) for i in np.argsort(what.distances, kind="stable")[:most]]

    def rarity(self, distance: float) -> float | None:
        """The share of the held-out pictures that are nearer than that to a training picture; None if there are none."""
        return None if self.held_out is None else float((self.held_out.distances < distance).mean())

    def chart(self, title: str, label: str) -> Chart:
        """The histogram of both kinds of distances, each as a share of its set."""
        edges = self._edges()
        middles = (edges[1:] + edges[:-1]) / 2

        def series(what: Found, name: str, colour: str) -> Series:
            shares = np.histogram(what.distances, edges)[0] / len(what.distances)
            return Series(name, list(zip(middles.tolist(), shares.tolist(), strict=True)), colour)

        lines, marks = [series(self.generated, "generated", "#2a788e")], []
        if self.held_out is not None:
            lines.append(series(self.held_out, "held out", "#d8872c"))
            threshold = share_below(self.generated.distances, self.held_out.distances).threshold
            marks = [Marks(f"nearer than that: {QUANTILE:.0%} of those held out", [threshold], "#666666")]
        return Chart(title, label, "share of the pictures", lines, marks)

    def _edges(self) -> NDArray[np.float64]:
        highest = max(float(one.distances.max()) for one in (self.generated, self.held_out) if one is not None)
        return np.linspace(0, highest or 1.0, _BINS + 1)


@dataclass(frozen=True)
class Comparing:
    """How pictures are compared: in which space, at which side of a square, how fast, and by which processes."""

    space: Space
    resolution: int
    pace: Pace
    processes: Processes = ALONE


def find_nearest(
    generated: Source,
    train: Source,
    held_out: Source | None,
    how: Comparing,
    bar: Callable[[str], AbstractContextManager[Progress]],
) -> Memorisation:
    """Looks at every picture once; what is in memory are the features of the generated and held-out ones, and a batch of the others.

    bar: makes the progress bar with a title. Raises ValueError for pictures that cannot be read and for features that hold NaN; on all of
    several processes, of which each looks at its share of every set.
    """
    processes, sets = how.processes, dict[str, Mapping[str, Any]]()
    asked = {"generated": generated} | ({} if held_out is None else {"held_out": held_out})
    for what, source in {**asked, "train": train}.items():
        processes.agree(f"the pictures of {what.replace('_', '-')}", source.listing)
    processes.agree("how pictures are compared", {**how.space.record, "weights": None, "resolution": how.resolution})
    names: dict[str, list[str]] = {}
    features: list[Tensor] = []
    for what, source in asked.items():
        seen = _Looked(source, how)
        with bar(what.replace("_", "-")) as progress:
            mine = processes.together(partial(seen.features, progress))
        features.append(interleaved_tensors(processes.everyones(mine)))
        sets[what], names[what] = seen.record()
    search = NearestSearch(torch.cat(features), how.pace.device)

    def stream() -> None:
        for some, indices in seen.batches(progress):
            search.add(some, indices)

    seen = _Looked(train, how, names=False)
    with bar("training pictures") as progress:
        processes.together(stream)
    for distances, indices in processes.everyones((search.distances, search.indices)):
        search.merge(distances, indices)
    sets["train"], _ = seen.record()
    told = how.space.distance(torch.from_numpy(search.distances).double()).float().numpy()
    found, start = dict[str, Found](), 0
    for what, source in asked.items():
        own = slice(start, start := start + source.count)
        found[what] = Found(names[what], told[own], search.indices[own])
    return Memorisation(found["generated"], found.get("held_out"), sets)


def draw_pairs(
    pairs: Sequence[tuple[int, int, str]], asked: Source, train: Source, resolution: int, workers: int, *, columns: int = 3, side: int = 160
) -> Any:
    """A sheet of pictures with the nearest training picture at the right of each. pairs: both indices, and words for below the first."""
    left = _shown(asked, [i for i, _, _ in pairs], resolution, workers)
    right = _shown(train, [j for _, j, _ in pairs], resolution, workers)
    pictures = []
    for i, j, words in pairs:
        pictures += [(to_pil(left[i].pixels), f"{words}\n{left[i].name}\n{left[i].caption}")]
        pictures += [(to_pil(right[j].pixels), f"training picture\n{right[j].name}\n{right[j].caption}")]
    return draw_captioned(pictures, 2 * columns, side, lines=6)


def draw_distances(found: Memorisation, space: Space) -> Any:
    """The histogram as a picture."""
    return draw_chart(found.chart("distance to the nearest training picture", f"{space.record['name']}: {space.record['distance']}"))


class _Looked:
    """One process's share of a source, and what is known of it afterwards. names: whether those of the pictures are."""

    def __init__(self, source: Source, how: Comparing, *, names: bool = True) -> None:
        self._source, self._how, self._named = source, how, names
        self._names: list[str] = []
        self._digests: list[bytes] = []
        self._sides: list[int] = []
        self._seconds = 0.0

    def features(self, progress: Progress) -> Tensor | None:
        """(N, T, D) on the CPU, of all pictures of the share; None if there are none. Raises ValueError."""
        parts = [features.cpu() for features, _ in self.batches(progress)]
        return torch.cat(parts) if parts else None

    def batches(self, progress: Progress) -> Iterator[tuple[Tensor, list[int]]]:
        """(B, T, D) features, and the indices of the pictures. Raises ValueError."""
        started = time.perf_counter()
        share, waiting = self._how.processes.share(self._source.count), list[Shown]()
        progress(0, len(share))
        for done, shown in enumerate(self._source.squares(share, self._how.resolution, self._how.pace.workers), start=1):
            waiting.append(shown)
            self._digests.append(shown.digest)
            self._sides = [min([*self._sides, shown.side]), max([*self._sides, shown.side])]
            if len(waiting) == self._how.pace.batch or done == len(share):
                yield self._features(waiting), [share[i] for i in range(done - len(waiting), done)]
                waiting.clear()
            progress(done, len(share))
        self._seconds = time.perf_counter() - started

    def record(self) -> tuple[dict[str, Any], list[str]]:
        """The set's record, and the names of its pictures in order, if they are known; from all processes."""
        processes = self._how.processes
        digests = interleaved(processes.everyones(self._digests))
        sides = [side for some in processes.everyones(self._sides) for side in some]
        record = self._source.described(digests) | {"count": len(digests), "shorter_side": [min(sides), max(sides)]}
        return {**record, "seconds": round(self._seconds, 3)}, interleaved(processes.everyones(self._names))

    def _features(self, shown: Sequence[Shown]) -> Tensor:
        self._names += [one.name for one in shown] if self._named else []
        squares = torch.stack([one.pixels for one in shown])
        features = self._how.space.see(squares)
        wrong = (~features.isfinite().flatten(1).all(1)).nonzero()
        if len(wrong):
            raise ValueError(f"the features of {shown[int(wrong[0])].name} hold NaN or infinity")
        return features


def _summary(distances: NDArray[np.float32]) -> dict[str, float]:
    return {name: float(np.quantile(distances, share)) for name, share in _QUANTILES.items()} | {"mean": float(distances.mean())}


def _shown(source: Source, indices: Sequence[int], resolution: int, workers: int) -> dict[int, Shown]:
    distinct = list(dict.fromkeys(indices))
    return dict(zip(distinct, source.squares(distinct, resolution, workers), strict=True))
