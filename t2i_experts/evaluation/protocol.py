"""From two sets of pictures to a number, and to the record of all that made it: a number without its protocol cannot be repeated."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from t2i_experts.evaluation.features import FeatureExtractor, FeatureOptions, load_features
from t2i_experts.evaluation.frechet import FEWEST_TO_EXTRAPOLATE, frechet_infinity, gaussian_distance
from t2i_experts.evaluation.kid import kernel_distance
from t2i_experts.evaluation.pictures import Picture, PictureSet, Unreadable, open_pictures, refuse_unreadable, set_hash
from t2i_experts.evaluation.precision_recall import precision_recall
from t2i_experts.evaluation.statistics import FeatureStatistics, Gaussian, load_statistics

PICTURES = "upright by EXIF, transparency on white, colour profiles not applied"
_MAKING = ("features", "dimension", "protocol", "resize", "size", "model", "sha256")
"""The parts of an extractor's record that two sets must share."""


@dataclass(frozen=True, eq=False)
class MeasuredSet:
    """What is compared of a set. features: (N, D) float32, if they were to be kept. made: the extractor's record, or None for a statistics
    file that does not say. record: path, kind, count and hash of the set: of its pictures by name and bytes, or of the statistics file."""

    gaussian: Gaussian
    features: Tensor | None
    made: Mapping[str, Any] | None
    record: Mapping[str, Any]


@dataclass(frozen=True)
class Comparison:
    """Which numbers are wanted beside the Frechet distance: KID, precision and recall, the distance of infinitely many images of A."""

    kid: bool = False
    precision_recall: bool = False
    infinity: bool = False
    seed: int = 2020

    @property
    def needs_features(self) -> bool:
        """Whether mean and covariance are not enough."""
        return self.kid or self.precision_recall or self.infinity


def read_statistics(path: Path) -> MeasuredSet:
    """A set of which there are only statistics: pytorch-fid's .npz, or one that this program wrote. Raises ValueError."""
    gaussian, protocol = load_statistics(path)
    try:
        made = json.loads(protocol) if protocol is not None else None
    except ValueError as error:
        raise ValueError(f"statistics file {path}: its protocol is no JSON: {error}") from error
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return MeasuredSet(gaussian, None, made, {"path": str(path), "kind": "statistics", "count": gaussian.count, "sha256": digest})


@dataclass(frozen=True)
class Pace:
    """What changes how fast a number comes, and not the number: the network's device, pictures that go through it together, threads that
    decode."""

    device: torch.device
    batch: int = 32
    workers: int = 1


Progress = Callable[[int, int | None], None]


def measure_sets(
    paths: Mapping[str, Path],
    features: str,
    options: FeatureOptions,
    wanted: Comparison,
    pace: Pace,
    bar: Callable[[str], AbstractContextManager[Progress]],
) -> dict[str, MeasuredSet]:
    """The sets by the names of their arguments, A and B: statistics from .npz files, all others through the network of that name.

    bar: makes the progress bar with a title. Raises ValueError for what is wrong, nearly always before the first picture is looked at.
    """
    sets = {what: read_statistics(path) for what, path in paths.items() if path.suffix == ".npz" and not path.is_dir()}
    pictures = {what: open_pictures(path, what) for what, path in paths.items() if what not in sets}
    for what in sets:
        if wanted.kid or wanted.precision_recall or (wanted.infinity and what == "A"):
            raise ValueError(
                f"{what}={str(paths[what])!r} holds statistics alone: --kid and --precision-recall need its pictures, --infinity those of A"
            )
    if wanted.infinity and pictures["A"].count < FEWEST_TO_EXTRAPOLATE:
        raise ValueError(f"--infinity needs at least {FEWEST_TO_EXTRAPOLATE} pictures; A={str(paths['A'])!r} holds {pictures['A'].count}")
    if not pictures:
        if options != FeatureOptions():
            raise ValueError("there are statistics alone: --protocol, --resize, --weights and --model have no meaning")
        return sets
    extractor = load_features(features, options, pace.device)
    for measured in sets.values():
        check_alike(measured.record["path"], measured.made, "the pictures", extractor.record)
    for what, found in pictures.items():
        with bar(f"{what}: {found.path.name}") as progress:
            sets[what] = measure_pictures(found, extractor, pace, keep=wanted.needs_features, progress=progress)
    return sets


def measure_pictures(
    pictures: PictureSet,
    extractor: FeatureExtractor,
    pace: Pace,
    *,
    keep: bool = False,
    progress: Progress = lambda done, total: None,
) -> MeasuredSet:
    """Features of every picture of a set, each once.

    keep: whether the features stay in memory. progress is told (pictures done, in all). Raises ValueError if any cannot be read.
    """
    started = time.perf_counter()
    statistics = FeatureStatistics(extractor.dimension, "cpu" if pace.device.type == "mps" else pace.device)
    kept: list[Tensor] = []
    digests: list[bytes] = []
    unreadable: list[Unreadable] = []
    waiting: list[Tensor] = []

    def flush() -> None:
        if waiting:
            features = extractor.encode(prepared(extractor.prepare, waiting, pace.device))
            statistics.add(features)
            if keep:
                kept.append(features.float().cpu())
            waiting.clear()

    progress(0, pictures.count)
    for done, picture in enumerate(pictures.read(pace.workers), start=1):
        match picture:
            case Picture(pixels, digest):
                waiting.append(pixels)
                digests.append(digest)
            case Unreadable():
                unreadable.append(picture)
        if len(waiting) == pace.batch:
            flush()
        progress(done, pictures.count)
    refuse_unreadable(unreadable, pictures)
    flush()
    record = {"path": str(pictures.path), "kind": pictures.kind, "count": statistics.count, "sha256": set_hash(digests)}
    record["seconds"] = round(time.perf_counter() - started, 3)
    return MeasuredSet(statistics.gaussian(), torch.cat(kept) if keep else None, extractor.record, record)


def compare(a: MeasuredSet, b: MeasuredSet, wanted: Comparison) -> dict[str, Any]:
    """The numbers, as JSON's plain values: `distance`, and `kid`, `precision_recall`, `infinity` where they are wanted.

    A is what is judged (generated pictures), B the reference. Raises ValueError for sets whose features were made in different ways, and
    if numbers are wanted that a statistics file does not have the features for.
    """
    check_alike(a.record["path"], a.made, b.record["path"], b.made)
    numbers: dict[str, Any] = {"distance": gaussian_distance(a.gaussian, b.gaussian)}
    if wanted.infinity:
        numbers["infinity"] = asdict(frechet_infinity(_features(a, "--infinity"), b.gaussian, seed=wanted.seed))
    if wanted.kid:
        numbers["kid"] = asdict(kernel_distance(_features(a, "--kid"), _features(b, "--kid"), seed=wanted.seed))
    if wanted.precision_recall:
        both = (_features(measured, "--precision-recall") for measured in (a, b))
        numbers["precision_recall"] = asdict(precision_recall(*both))
    return numbers


def check_alike(a: str, made_a: Mapping[str, Any] | None, b: str, made_b: Mapping[str, Any] | None) -> None:
    """Raises ValueError if two extractors' records say that features were made differently; None says nothing. a, b: of what, in words."""
    for name in _MAKING:
        first, second = (made_a or {}).get(name), (made_b or {}).get(name)
        if made_a is not None and made_b is not None and first != second:
            raise ValueError(f"the features of {a} and of {b} were made differently: {name}={first!r} and {name}={second!r}")


def prepared(prepare: Callable[[Tensor], Tensor], images: Sequence[Tensor], device: torch.device) -> Tensor:
    """A batch of pictures as a network takes them; those of one size are resized together, others one by one."""
    if len({image.shape for image in images}) == 1:
        return prepare(torch.stack(list(images)).to(device))
    return torch.cat([prepare(image[None].to(device)) for image in images])


def _features(measured: MeasuredSet, option: str) -> Tensor:
    if measured.features is None:
        raise ValueError(f"{option} needs the pictures of {measured.record['path']}, of which there are only statistics")
    return measured.features
