"""Metrics of pictures with their captions, by name: one value a picture, and their mean with its standard error.

Values of single pictures are the whole state: processes that share the pictures gather them, a run that was stopped keeps them, and
`mean_score` gives the same number whatever their order. Plugins add metrics of the kind `metric` to the registry.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from t2i_experts.evaluation.captioned import CaptionedPictures
from t2i_experts.evaluation.pictures import Unreadable, named_digest, printable, refuse_unreadable, set_hash
from t2i_experts.evaluation.processes import ALONE, Processes
from t2i_experts.evaluation.protocol import Pace, Progress, prepared
from t2i_experts.registry import registry


class Metric(Protocol):
    """A frozen network on its device that says how well pictures fit their captions, or how good they are.

    options: the names of what may be chosen, which the class has: `load(options, device)` of the registry's part is given no others.
    record: what makes the values what they are, as JSON's plain values; `name` is what their mean is called.
    """

    options: Sequence[str]
    record: Mapping[str, Any]

    def prepare(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) uint8, RGB, on any device, to what `values` takes, of one shape whatever H and W are, on the same device."""
        ...

    def values(self, prepared: Tensor, captions: Sequence[str]) -> Tensor:
        """What `prepare` gave for B images, and their B captions, to (B,) float on the network's device; each for itself."""
        ...

    def cut(self, captions: Sequence[str]) -> list[int]:
        """Of each caption, how many tokens at its end the network does not see, since it reads no more: mostly 0."""
        ...


def load_metric(name: str, options: Mapping[str, str], device: torch.device | str) -> Metric:
    """The metric of that name, with what the user chose. Raises ValueError for what the user got wrong."""
    part = registry.get("metric", name)
    for key, value in options.items():
        if key not in part.options:
            raise ValueError(f"{key}={value!r} is no option of the metric {name}; it has {', '.join(part.options) or 'none'}")
    metric: Metric = part.load(options, torch.device(device))
    return metric


@dataclass(frozen=True)
class MeanScore:
    """The mean of the values of so many pictures, and its standard error: None for one picture."""

    mean: float
    error: float | None
    count: int


def mean_score(values: Sequence[float] | Tensor) -> MeanScore:
    """Of one or more values, whose order does not matter to the last digit. Raises ValueError for none."""
    numbers = values.tolist() if isinstance(values, Tensor) else list(values)
    count = len(numbers)
    if not count:
        raise ValueError("there are no values to take the mean of")
    mean = math.fsum(numbers) / count
    if count == 1:
        return MeanScore(mean, None, 1)
    variance = math.fsum((number - mean) ** 2 for number in numbers) / (count - 1)
    return MeanScore(mean, math.sqrt(variance / count), count)


@dataclass(frozen=True, eq=False)
class MeasuredPictures:
    """values: (N,) float64, in the order of the set. names: of the pictures. record: mean, standard error and count, and all that made
    them."""

    values: Tensor
    names: Sequence[str]
    record: Mapping[str, Any]


@dataclass(frozen=True)
class _Valued:
    """A picture's value, by the picture's index in its set, and what the record says of it. cut: tokens. several: captions."""

    index: int
    name: str
    value: float
    caption: str
    cut: int
    digest: bytes
    caption_digest: bytes
    several: bool


def measure_captioned(
    captioned: CaptionedPictures,
    metric: Metric,
    pace: Pace,
    *,
    progress: Progress = lambda done, total: None,
    processes: Processes = ALONE,
) -> MeasuredPictures:
    """The value of every picture of a set with its first caption; each in one of the processes, and the whole in all of them.

    progress is told (pictures done, in all) of this process's share. Raises ValueError if any cannot be read, RuntimeError if the metric
    gives no finite number; on all processes.
    """
    started = time.perf_counter()
    pictures = captioned.pictures
    share = processes.share(pictures.count)
    found: list[_Valued] = []
    unreadable: list[Unreadable] = []

    def read() -> None:
        for some in pictures.batches(share, pace.batch, pace.workers, unreadable, progress):
            captions = [picture.captions[0] for picture in some]
            values = metric.values(prepared(metric.prepare, [picture.pixels for picture in some], pace.device), captions).tolist()
            for picture, caption, value, cut in zip(some, captions, values, metric.cut(captions), strict=True):
                if not math.isfinite(value):
                    raise RuntimeError(f"{metric.record['name']} of {picture.name} is {value}")
                digest, several = named_digest(picture.name, caption.encode()), len(picture.captions) > 1
                found.append(_Valued(share[len(found)], picture.name, value, caption, cut, picture.digest, digest, several))

    processes.agree(f"the pictures of {pictures.path}", pictures.listing)
    processes.agree("the network of the metric", dict(metric.record))
    processes.together(read)
    refuse_unreadable(sorted(itertools.chain(*processes.everyones(unreadable)), key=lambda one: one.why), pictures)
    everyones = sorted(itertools.chain(*processes.everyones(found)), key=lambda one: one.index)
    values = [one.value for one in everyones]
    too_long = [{"picture": printable(one.name), "caption": one.caption, "tokens_cut": one.cut} for one in everyones if one.cut]
    score = mean_score(values)
    record = {
        **asdict(score),
        "metric": dict(metric.record),
        "set": {
            "path": str(pictures.path),
            "kind": pictures.kind,
            "count": score.count,
            "sha256": set_hash([one.digest for one in everyones]),
        },
        "captions": {
            "source": captioned.source,
            "sha256": set_hash([one.caption_digest for one in everyones]),
            "pictures_with_several": sum(one.several for one in everyones),
            "too_long": {"count": len(too_long), "captions": too_long},
        },
    }
    record["set"]["seconds"] = round(time.perf_counter() - started, 3)
    return MeasuredPictures(torch.tensor(values, dtype=torch.float64), [one.name for one in everyones], record)
