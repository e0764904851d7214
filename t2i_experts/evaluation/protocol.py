"""From two sets of pictures to a number, and to the record of all that made it: a number without its protocol cannot be repeated."""

from __future__ import annotations

import hashlib
import itertools
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from t2i_experts.evaluation.features import FeatureExtractor, FeatureOptions, checked, load_features
from t2i_experts.evaluation.frechet import FEWEST_TO_EXTRAPOLATE, frechet_infinity, gaussian_distance
from t2i_experts.evaluation.gathering import FeatureGatherer
from t2i_experts.evaluation.kid import kernel_distance
from t2i_experts.evaluation.pictures import PictureSet, Unreadable, open_pictures, refuse_unreadable, set_hash
from t2i_experts.evaluation.precision_recall import precision_recall
from t2i_experts.evaluation.processes import ALONE, Processes, connected, interleaved_tensors
from t2i_experts.evaluation.statistics import Gaussian, load_statistics, save_statistics

PICTURES = "upright by EXIF, transparency on white, first frame of animations, colour profiles not applied"
_MAKING = ("features", "dimension", "protocol", "resize", "size", "model", "sha256")
"""The parts of an extractor's record that two sets must share."""


@dataclass(frozen=True, eq=False)
class MeasuredSet:
    """What is compared of a set. features: (N, D) float32, if they were to be kept. made: the extractor's record, or None for a statistics
    file that does not say. record: path, kind, count and hash of the set: of its pictures by name and bytes, or of the statistics file,
    with `of`, the pictures' own, where the file tells."""

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
    record = {"path": str(path), "kind": "statistics", "count": gaussian.count, "sha256": digest}
    of = made.pop("of", None) if isinstance(made, dict) else None
    return MeasuredSet(gaussian, None, made, record if of is None else {**record, "of": of})


def keep_statistics(path: Path, measured: MeasuredSet, seen: Mapping[str, Any] | None = None) -> None:
    """Writes what `read_statistics` reads: mean and covariance, how the features were made, and of which pictures.

    seen: how the pictures came to the network, if not as they are. Raises ValueError if the file cannot be written.
    """
    if measured.made is None:
        save_statistics(path, measured.gaussian)
        return
    known = measured.record.get("of") if measured.record["kind"] == "statistics" else {"sha256": measured.record["sha256"], **(seen or {})}
    made = {**measured.made, **(seen or {}), **({} if known is None else {"of": known})}
    save_statistics(path, measured.gaussian, json.dumps(made))


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
    processes: Processes = ALONE,
) -> dict[str, MeasuredSet]:
    """The sets by the names of their arguments, A and B: statistics from .npz files, all others through the network of that name.

    bar: makes the progress bar with a title. Raises ValueError for what is wrong, nearly always before the first picture is looked at; on
    all of several processes, of which each looks at its share of the pictures.
    """
    files = [what for what, path in paths.items() if path.suffix == ".npz" and not path.is_dir()]
    sets = processes.together(lambda: {what: read_statistics(paths[what]) for what in files})
    pictures = processes.together(lambda: {what: open_pictures(path, what) for what, path in paths.items() if what not in files})
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
    extractor = _loaded(features, options, pace.device, processes)
    for measured in sets.values():
        check_alike(measured.record["path"], measured.made, "the pictures", extractor.record)
    for what, found in pictures.items():
        with bar(f"{what}: {found.path.name}") as progress:
            sets[what] = measure_pictures(found, extractor, pace, keep=wanted.needs_features, progress=progress, processes=processes)
    return sets


def measure_pictures(
    pictures: PictureSet,
    extractor: FeatureExtractor,
    pace: Pace,
    *,
    keep: bool = False,
    progress: Progress = lambda done, total: None,
    processes: Processes = ALONE,
) -> MeasuredSet:
    """Features of every picture of a set, each once, in one of the processes.

    keep: whether the features stay in memory, of the main process. progress is told (pictures done, in all) of this process's share. Raises
    ValueError if any cannot be read, and for features that hold NaN; on all processes.
    """
    started = time.perf_counter()
    gathered = FeatureGatherer(extractor, pace.device, keep=keep)
    share = processes.share(pictures.count)
    digests: list[bytes] = []
    sides: list[int] = []
    unreadable: list[Unreadable] = []

    def read() -> None:
        for some in pictures.batches(share, pace.batch, pace.workers, unreadable, progress):
            digests.extend(picture.digest for picture in some)
            sides.extend(min(picture.pixels.shape[1:]) for picture in some)
            batch = prepared(extractor.prepare, [picture.pixels for picture in some], pace.device)
            gathered.add(batch, [picture.name for picture in some])
        if not unreadable:
            gathered.finish()

    processes.agree(f"the pictures of {pictures.path}", pictures.listing)
    processes.together(read)
    refuse_unreadable(sorted(itertools.chain(*processes.everyones(unreadable)), key=lambda found: found.why), pictures)
    record = {"path": str(pictures.path), "kind": pictures.kind, "sha256": set_hash([*itertools.chain(*processes.everyones(digests))])}
    return _measured(gathered, processes, started, record, sides, by_turns=True)


def measure_images(
    images: Tensor | Iterable[Tensor],
    extractor: FeatureExtractor,
    pace: Pace,
    *,
    name: str = "images",
    keep: bool = False,
    processes: Processes = ALONE,
) -> MeasuredSet:
    """Features of images in memory, such as a sampler's: nothing is written, and what is on `pace.device` stays there.

    images: (N, 3, H, W) uint8, RGB, or batches of such; of this process alone where there are several, of which some may have none. name:
    of the set, for messages. Raises ValueError for images of another shape or dtype, and for features that hold NaN; on all processes.
    """
    started = time.perf_counter()
    gathered = FeatureGatherer(extractor, pace.device, keep=keep)
    sides: list[int] = []

    def read() -> None:
        first = 0
        for batch in [images] if isinstance(images, Tensor) else images:
            if not len(checked(batch)):
                continue
            for some in batch.split(pace.batch):
                names = [f"image {i} (counted from 0) of {name}" for i in range(first, first + len(some))]
                gathered.add(extractor.prepare(some.to(pace.device)), names)
                first += len(some)
            sides.append(min(batch.shape[2:]))
        gathered.finish()

    processes.together(read)
    return _measured(gathered, processes, started, {"path": name, "kind": "images", "sha256": None}, sides, by_turns=False)


def _measured(
    gathered: FeatureGatherer, processes: Processes, started: float, record: dict[str, Any], sides: Sequence[int], *, by_turns: bool
) -> MeasuredSet:
    """What all processes have gathered. sides: the shorter ones of this process's images. by_turns: whether image i was process i's,
    modulo their number, so that the features can be put into the order of the images."""
    statistics = gathered.statistics if processes.count == 1 else connected(gathered.statistics.over_processes)
    parts = gathered.kept(processes)
    features = None if not parts else interleaved_tensors(parts) if by_turns else torch.cat(parts)
    spans = [(min(some), max(some)) for some in processes.everyones(sides) if some]
    record["count"] = statistics.count
    record["shorter_side"] = [min(low for low, _ in spans), max(high for _, high in spans)] if spans else None
    record["seconds"] = round(time.perf_counter() - started, 3)
    return MeasuredSet(statistics.gaussian(), features, gathered.extractor.record, record)


def _loaded(features: str, options: FeatureOptions, device: torch.device, processes: Processes) -> FeatureExtractor:
    """The extractor, the same in all processes."""
    extractor = processes.once_a_host_first(lambda: load_features(features, options, device))
    processes.agree("the networks of the features", {name: extractor.record.get(name) for name in _MAKING})
    return extractor


def remarks(sets: Mapping[str, MeasuredSet]) -> list[str]:
    """What a reader of the number should know of the sets, by the names of their arguments, that is no error; in a line each."""
    found = [f"{one.record['path']} does not say how its features were made" for one in sets.values() if one.made is None]
    counts = {what: one.record["count"] for what, one in sorted(sets.items()) if one.record["count"] is not None}
    if len(set(counts.values())) > 1:
        both = " and ".join(f"{count:,} in {what}" for what, count in counts.items())
        found.append(f"the sets differ in size ({both}): compare the number only with others of the same two sizes, or give --kid")
    sides = {what: one.record["shorter_side"] for what, one in sorted(sets.items()) if one.record.get("shorter_side")}
    if len(sides) == 2 and max(low for low, _ in sides.values()) > min(high for _, high in sides.values()):
        both = ", ".join(f"{what} has {low} px" if low == high else f"{what} has {low} to {high} px" for what, (low, high) in sides.items())
        found.append(f"the pictures differ in size (shorter side: {both}), and what resizing does to one set alone is in the number")
    return found


def compare(a: MeasuredSet, b: MeasuredSet, wanted: Comparison, device: torch.device | str = "cpu") -> dict[str, Any]:
    """The numbers, as JSON's plain values: `distance`, and `kid`, `precision_recall`, `infinity` where they are wanted.

    A is what is judged (generated pictures), B the reference. device: of the products of features, if it knows float64. Raises ValueError
    for sets whose features were made in different ways, and if numbers are wanted that a statistics file does not have the features for.
    """
    check_alike(a.record["path"], a.made, b.record["path"], b.made)
    numbers: dict[str, Any] = {"distance": gaussian_distance(a.gaussian, b.gaussian)}
    if wanted.infinity:
        numbers["infinity"] = asdict(frechet_infinity(_features(a, "--infinity"), b.gaussian, seed=wanted.seed))
    place = "cpu" if torch.device(device).type == "mps" else device
    if wanted.kid:
        generated, reference = (_features(measured, "--kid").to(place) for measured in (a, b))
        numbers["kid"] = asdict(kernel_distance(generated, reference, seed=wanted.seed))
    if wanted.precision_recall:
        generated, reference = (_features(measured, "--precision-recall").to(place) for measured in (a, b))
        numbers["precision_recall"] = asdict(precision_recall(generated, reference))
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
