"""A sweep: the same evaluation at many guidances, steps and samplers, of one or several models.

Each point is one `Evaluation`, in a folder of its own that depends on the model's weights, sampler, steps and guidance alone; the parts of
the reference are shared. So a sweep that was killed goes on, a repeated one only reads, and a larger one adds points to those it finds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from t2i_experts.cascade.pipeline import CascadePipeline
from t2i_experts.config import SamplingConfig, check_threshold
from t2i_experts.evaluation.coco import IDS, REFERENCE, RESULT, Evaluation, Unread
from t2i_experts.evaluation.processes import Processes
from t2i_experts.evaluation.prompts import PromptList
from t2i_experts.evaluation.protocol import MeasuredSet, Progress
from t2i_experts.evaluation.records import differences, in_words, made_by, read_json, steps_in_all, write_json
from t2i_experts.evaluation.seeing import Drawing

Bar = Callable[[str], AbstractContextManager[Progress]]

SWEEP, POINTS = "sweep.json", "points"


@dataclass(frozen=True)
class Setting:
    """What differs between the points of a model. None leaves the model's own."""

    sampler: str | None
    steps: int | None
    guidance: float


@dataclass(frozen=True)
class Point:
    """What is known of a point before it is measured. model: the fingerprint of its weights. done: whether its numbers are there already.

    steps: those of all experts. pictures, references: that are still to be drawn and to be read, if nothing else does it before.
    """

    model: str
    source: str
    sampling: SamplingConfig
    steps: int
    folder: Path
    done: bool
    pictures: int
    references: int

    @property
    def name(self) -> str:
        """In words, without the model."""
        return f"{self.sampling.sampler}, {self.steps} steps, guidance {self.sampling.guidance:g}"


@dataclass(frozen=True)
class Sweep:
    """What is to be measured. threshold: of all points; None leaves each model's own.

    drawing: how a model draws the prompts with some settings. made: the evaluation of that, into a folder; all are alike but for these two.
    """

    settings: Sequence[Setting]
    threshold: float | None
    made: Callable[[Drawing, Path], Evaluation]
    drawing: Callable[[CascadePipeline, SamplingConfig], Drawing]
    out: Path

    def evaluations(self, pipeline: CascadePipeline) -> list[Evaluation]:
        """Of one model, in the order of the settings. Raises ValueError for settings that the model cannot be sampled with."""
        found = []
        for one in self.settings:
            sampling = pipeline.settings(sampler=one.sampler, steps=one.steps, guidance=one.guidance, threshold=self.threshold)
            check_threshold(sampling.threshold, pipeline.base.config.codec, "--")
            steps = pipeline.base.steps(sampling)
            folder = self.out / POINTS / pipeline.model.fingerprint / f"{sampling.sampler}-{steps}-guidance{sampling.guidance:.12g}"
            found.append(replace(self.made(self.drawing(pipeline, sampling), folder), shared=self.out))
        return found

    def described(self, pipeline: CascadePipeline) -> tuple[dict[str, Any], dict[str, Any]]:
        """What decides all points, and what else is known of all of them before the first picture is drawn."""
        evaluation = self.evaluations(pipeline)[0]
        described = evaluation.described()
        return self._shared(evaluation), {name: described.get(name) for name in ("prompts", "reference", "features", "pictures")}

    def _shared(self, evaluation: Evaluation) -> dict[str, Any]:
        """All that decides the numbers and is the same for every point, as JSON's plain values."""
        reference: dict[str, Any] | None = None
        if evaluation.statistics is not None:
            reference = {"kind": "statistics", "sha256": evaluation.statistics.record["sha256"]}
        elif evaluation.originals is not None:
            listed = hashlib.sha256("\n".join(evaluation.names).encode()).hexdigest()
            reference = {"which": evaluation.which, "kind": evaluation.originals.kind, "names": listed, **evaluation.originals.identity}
        decided = {name: value for name, value in evaluation.decided().items() if name not in ("model", "sampling")}
        return {**decided, "threshold": self.threshold, "reference": reference}

    def plan(self, pipeline: CascadePipeline) -> list[Point]:
        """The points of one model. Raises ValueError, which names the fields, if the folder holds what something else decided."""
        evaluations = self.evaluations(pipeline)
        there = read_json(self.out / SWEEP)
        found = [] if there is None else differences(there.get("decided_by", {}), self._shared(evaluations[0]))
        if found:
            raise ValueError(f"{self.out / SWEEP} is of another sweep: {in_words(found)}; choose another --out")
        return [self._point(one) for one in evaluations]

    def open(self, prompts: PromptList) -> None:
        """Makes the folder, and writes down which prompts there are. Only one process may. Raises ValueError if that is not possible."""
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            (self.out / IDS).write_text(prompts.csv(), encoding="utf-8", newline="")
        except OSError as error:
            raise ValueError(f"--out={self.out}: {error.strerror or error}") from error

    def _point(self, evaluation: Evaluation) -> Point:
        evaluation.check()
        result = read_json(evaluation.out / RESULT)
        done = result is not None and all(name in result for name in _wanted(evaluation))
        pictures, references = (0, 0) if done else evaluation.remaining()
        model = evaluation.drawing.facts["model"]
        sampling, stage = evaluation.drawing.sampling, evaluation.drawing.pipeline.base
        return Point(model["fingerprint"], model["source"], sampling, stage.steps(sampling), evaluation.out, done, pictures, references)


def refuse_twins(plans: Sequence[Sequence[Point]]) -> None:
    """Raises ValueError for two models of the same weights: their points would be the same."""
    sources: dict[str, str] = {}
    for first, *_ in plans:
        if first.model in sources:
            raise ValueError(f"--model={first.source!r} has the same weights as --model={sources[first.model]!r}: {first.model}")
        sources[first.model] = first.source


class Common:
    """What several points need and is made once: the statistics of the reference, which `out` keeps, and of each model which prompts it
    reads only in part."""

    def __init__(self, out: Path) -> None:
        self._out = out
        self._reference: MeasuredSet | None = None
        self._unread: dict[str, Unread] = {}

    def reference(self, evaluation: Evaluation) -> MeasuredSet | None:
        """What the evaluation's pictures are compared with, when all its parts are there."""
        if self._reference is None:
            self._reference = evaluation.measured_reference()
            if self._reference is not None and evaluation.originals is not None:
                evaluation.keep_reference(self._reference, self._out / REFERENCE)
        return self._reference

    def unread(self, evaluation: Evaluation) -> Unread:
        """See `Evaluation.unread`."""
        model = evaluation.drawing.facts["model"]["fingerprint"]
        if model not in self._unread:
            self._unread[model] = evaluation.unread()
        return self._unread[model]


def measure(evaluation: Evaluation, common: Common, about: Mapping[str, Any], processes: Processes, bar: Bar) -> None:
    """Makes what is missing of a point, and writes its record, which is that of `eval coco`. about: what a record says of the machine."""
    processes.together(lambda: evaluation.open() if processes.main else None)
    evaluation.do(processes, bar)

    def finish() -> None:
        result = evaluation.result(common.reference(evaluation), common.unread(evaluation))
        evaluation.keep({**made_by("eval coco"), **evaluation.described(), **about, **result})

    processes.together(lambda: finish() if processes.main else None)


def collect(out: Path, shared: Mapping[str, Any], described: Mapping[str, Any], sources: Mapping[str, str]) -> dict[str, Any]:
    """The record of the sweep: what its points share, and the numbers of all points that there are, in `out` and in JSON's plain values.

    described: what else they share. sources: of the models that are asked for, in their order, by fingerprint; others come after them.
    """
    results = [(path.parent, result) for path in sorted(out.glob(f"{POINTS}/*/*/{RESULT}")) if (result := read_json(path)) is not None]
    found = {result["model"]["fingerprint"]: result["model"] for _, result in results}
    order = [*(one for one in sources if one in found), *sorted(found.keys() - sources.keys(), key=lambda one: (found[one]["source"], one))]
    names = dict(zip(order, labels([(sources.get(one, found[one]["source"]), one) for one in order]), strict=True))
    encoders = {result["model"]["fingerprint"]: result["decided_by"]["model"]["encoders"] for _, result in results}
    models = {names[one]: {**found[one], "source": sources.get(one, found[one]["source"]), "encoders": encoders[one]} for one in order}
    points = [_plain_point(folder.relative_to(out), names[result["model"]["fingerprint"]], result) for folder, result in results]
    places = {name: place for place, name in enumerate(models)}
    points.sort(key=lambda point: (places[point["model"]], *(point["sampling"][key] for key in ("sampler", "steps", "guidance"))))
    made = made_by("eval sweep")
    return {**made, "decided_by": dict(shared), **described, "models": models, "points": points, "best": best(points)}


def best(points: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The point of the lowest distance, if any has one, and under `scores` for each metric that of the highest score."""
    measured = [point for point in points if "distance" in point]
    found = {"distance": _where(min(measured, key=lambda point: float(point["distance"])))} if measured else {}
    highest: dict[str, Any] = {}
    for name in metrics_of(points):
        scored = [point for point in points if name in point["scores"]]
        highest[name] = _where(max(scored, key=lambda point: float(point["scores"][name]["mean"])))
    return {**found, "scores": highest}


def metrics_of(points: Sequence[Mapping[str, Any]]) -> list[str]:
    """The metrics that the points have scores of."""
    return list(dict.fromkeys(name for point in points for name in point["scores"]))


def labels(models: Sequence[tuple[str, str]]) -> list[str]:
    """Short names for models (source, fingerprint): what tells their places apart, and for several of one place the fingerprint too."""
    paths = [source.rstrip("/").split("/") for source, _ in models]
    if all(parts == paths[0] for parts in paths):
        paths = [parts[-2:] for parts in paths]
    else:
        while all(len(parts) > 1 and parts[-1] == paths[0][-1] for parts in paths):
            paths = [parts[:-1] for parts in paths]
        while all(len(parts) > 1 and parts[0] == paths[0][0] for parts in paths):
            paths = [parts[1:] for parts in paths]
    short = ["/".join(parts) for parts in paths]
    return [name if short.count(name) == 1 else f"{name} ({fingerprint[:8]})" for name, (_, fingerprint) in zip(short, models, strict=True)]


def keep(out: Path, record: Mapping[str, Any]) -> None:
    """Writes the record. Raises ValueError if that is not possible."""
    write_json(out / SWEEP, record)


def _plain_point(folder: Path, model: str, result: Mapping[str, Any]) -> dict[str, Any]:
    generated = result["generated"]
    numbers = {name: result[name] for name in ("distance", "infinity", "kid", "precision_recall") if name in result}
    return {
        "model": model,
        "sampling": {**(sampling := result["decided_by"]["sampling"]), "steps": steps_in_all(sampling)},
        **numbers,
        "scores": result["scores"],
        "seconds_a_picture": round(generated["seconds"] / generated["count"], 6),
        "generated": generated,
        "notes": result["notes"],
        "folder": folder.as_posix(),
    }


def _where(point: Mapping[str, Any]) -> dict[str, Any]:
    return {"model": point["model"], **{key: point["sampling"][key] for key in ("sampler", "steps", "guidance")}}


def _wanted(evaluation: Evaluation) -> list[str]:
    """The numbers that a finished record of this evaluation has."""
    wanted = evaluation.comparison
    if evaluation.networks.extractor is None:
        return ["scores"]
    more = {"kid": wanted.kid, "precision_recall": wanted.precision_recall, "infinity": wanted.infinity}
    return ["distance", *(name for name, is_wanted in more.items() if is_wanted)]
