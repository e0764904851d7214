"""Zero-shot FID on captions: pictures drawn for a list of prompts beside the photographs that the captions describe.

What is seen of the pictures is kept in parts, so that processes share the work and a run that was killed goes on; the sums are made out of
the parts in their order, so that neither changes the number. Whatever processes and batches, picture i is that of the noise of (seed, i).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from t2i_experts.conditioning.frozen import fingerprint
from t2i_experts.config import to_plain
from t2i_experts.evaluation.frechet import FEWEST_TO_EXTRAPOLATE
from t2i_experts.evaluation.metrics import mean_score
from t2i_experts.evaluation.originals import Originals
from t2i_experts.evaluation.parts import Parts, check_work, open_work
from t2i_experts.evaluation.pictures import set_hash
from t2i_experts.evaluation.processes import Processes
from t2i_experts.evaluation.prompts import PromptList
from t2i_experts.evaluation.protocol import PICTURES, Comparison, MeasuredSet, Progress, check_alike, compare, keep_statistics, remarks
from t2i_experts.evaluation.records import differences, in_words, read_json, write_json, write_values
from t2i_experts.evaluation.seeing import Drawing, Networks, draw_parts, reference_parts, to_make
from t2i_experts.evaluation.statistics import FeatureStatistics

_TOKENIZED = 1024  # prompts at a time

RESULT, IDS, REFERENCE, SCORES = "result.json", "ids.csv", "reference.npz", "scores.csv"


def refuse_impossible(drawn: int, references: int, statistics: MeasuredSet | None, wanted: Comparison) -> None:
    """Raises ValueError for numbers that so many pictures, or statistics alone, cannot give. references: 0 where there are statistics."""
    if drawn < 2 or (statistics is None and references < 2):
        raise ValueError(
            f"a distance needs at least 2 pictures of each kind; there are {drawn} prompts and {references} reference pictures"
        )
    if wanted.infinity and drawn < FEWEST_TO_EXTRAPOLATE:
        raise ValueError(f"--infinity needs at least {FEWEST_TO_EXTRAPOLATE} pictures; there are {drawn}")
    if statistics is not None and (wanted.kid or wanted.precision_recall):
        raise ValueError(f"{statistics.record['path']} holds statistics alone: --kid and --precision-recall need the reference pictures")


@dataclass(frozen=True)
class Unread:
    """Prompts that are read only in part. by_model: a line for each of its encoders that does so. by_metrics: how many, by name."""

    by_model: Sequence[str]
    by_metrics: Mapping[str, int]


@dataclass(frozen=True)
class Evaluation:
    """What is to be measured. out: where the result goes. folder: of the parts. saved: where pictures go, if anywhere.

    which: the reference pictures in a word. originals, names: where they are, and their names. statistics: the reference, if it is a file
    of these instead. shared: a folder for the parts of the reference, if other evaluations have the same.
    """

    drawing: Drawing
    networks: Networks
    comparison: Comparison
    which: str
    originals: Originals | None
    names: Sequence[str]
    statistics: MeasuredSet | None
    out: Path
    folder: Path
    saved: Path | None
    shared: Path | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for statistics of features that are made in another way."""
        if self.statistics is None or self.networks.extractor is None:
            return
        path, made = self.statistics.record["path"], self.statistics.made
        check_alike(path, made, "the pictures", self.networks.extractor.record)
        found = (made or {}).get("resolution")
        if found not in (None, self.networks.resolution):
            raise ValueError(f"{path} is of pictures at --resolution {found}; received --resolution {self.networks.resolution}")

    def decided(self) -> dict[str, Any]:
        """All that decides the generated pictures and what is seen of them, as JSON's plain values."""
        facts, conditioner = self.drawing.facts, self.drawing.pipeline.model.conditioner
        model = {name: value for name, value in facts["model"].items() if name != "source"}  # a place
        model["encoders"] = {name: conditioner.fingerprint(name) for name in conditioner.names}
        model["codec_sha256"] = self._codec_sha256
        config = to_plain(self.drawing.pipeline.base.config)  # the fingerprint is of the weights, which another config makes another model
        model["config"] = {name: config[name] for name in ("network", "noise")}
        return {"prompts": self.drawing.prompts.sha256, "seed": self.drawing.seed, **facts, "model": model, **self.networks.made()}

    @cached_property
    def _codec_sha256(self) -> str | None:
        codec = self.drawing.pipeline.base.codec
        return None if codec.model is None else fingerprint(codec.model)

    def described(self) -> dict[str, Any]:
        """What is known before the first picture is drawn."""
        prompts, pipeline, extractor = self.drawing.prompts, self.drawing.pipeline, self.networks.extractor
        described: dict[str, Any] = {
            "decided_by": self.decided(),
            "prompts": {**prompts.origin, "count": len(prompts.prompts), "sha256": prompts.sha256},
            "model": {**self.drawing.facts["model"], "config": to_plain(pipeline.base.config)},
            "features": None if extractor is None else dict(extractor.record),
            "pictures": PICTURES,
        }
        if self.statistics is not None:
            described["reference"] = dict(self.statistics.record)
        elif self.originals is not None:
            described["reference"] = self._listed(self.originals)
        return described

    def check(self) -> None:
        """Raises ValueError if the folders hold what something else decided."""
        for parts in self._parts():
            parts.check()
            if (saved := self._saved(parts.folder.name)) is not None:
                check_work(saved, ".png", saved.with_suffix(".json"), parts.decided())
        there = read_json(self.out / RESULT)
        found = [] if there is None else differences(there.get("decided_by", {}), self.decided())
        if found:
            raise ValueError(f"{self.out / RESULT} is of another evaluation: {in_words(found)}; choose another --out")

    def open(self) -> None:
        """Makes the folders, and writes down which prompts there are. Only one process may. Raises ValueError if that is not possible."""
        for parts in self._parts():
            parts.open()
            if (saved := self._saved(parts.folder.name)) is not None:
                open_work(saved, ".png", saved.with_suffix(".json"), parts.decided())
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            (self.out / IDS).write_text(self.drawing.prompts.csv(), encoding="utf-8", newline="")
        except OSError as error:
            raise ValueError(f"--out={self.out}: {error.strerror or error}") from error

    def remaining(self) -> tuple[int, int]:
        """How many pictures are still to be drawn, and how many of the reference to be read."""
        generated, reference = self._generated(), self._reference()
        drawn, read = generated.missing(), [] if reference is None else reference.missing()
        return sum(map(len, drawn)), sum(map(len, read))

    def do(self, processes: Processes, bar: Callable[[str], AbstractContextManager[Progress]]) -> None:
        """Makes this process's share of what is missing, the reference first: what is wrong there is found before hours of drawing.

        Raises ValueError, in every process, for what is wrong in one of them, when all have done their shares; before any does, if they
        would not do the same work, as with another model at the same place of another host.
        """
        reference, generated = self._reference(), self._generated()
        processes.agree("what decides the pictures", generated.decided())
        processes.agree("what decides the reference", {} if reference is None else reference.decided())
        of = f" ({processes.count} processes)" if processes.count > 1 else ""
        if reference is not None and self.originals is not None:
            originals, saved = self.originals, self._saved("reference")
            mine = to_make(reference, saved, processes)
            with bar(f"reference{of}") as progress:
                processes.together(lambda: reference_parts(reference, mine, originals, self.names, self.networks, saved, progress))
        saved = self._saved("generated")
        mine = to_make(generated, saved, processes)
        with bar(f"drawing{of}") as progress:
            processes.together(lambda: draw_parts(generated, mine, self.drawing, self.networks, saved, progress))

    def measured_reference(self) -> MeasuredSet | None:
        """What the generated pictures are compared with, out of all parts; None if there is nothing."""
        parts, extractor = self._reference(), self.networks.extractor
        if parts is None or extractor is None or self.originals is None:
            return self.statistics
        seen = gather(parts, self.networks.pace.device, keep=self.comparison.needs_features)
        assert seen.statistics is not None
        record = {**self._listed(self.originals), "count": len(seen.digests), "sha256": set_hash(seen.digests)}
        seconds = round(seen.seconds, 3)
        return MeasuredSet(seen.statistics.gaussian(), seen.features, extractor.record, {**record, "seconds": seconds})

    def keep_reference(self, reference: MeasuredSet, path: Path) -> None:
        """Writes its statistics, with how they were made, as a file that `read_statistics` reads."""
        keep_statistics(path, reference, {k: v for k, v in self.networks.features_made().items() if k != "features"})

    def unread(self) -> Unread:
        """Which of the prompts the model and the metrics read only in part."""
        texts = self.drawing.prompts.texts
        counts = {name: sum(tokens > 0 for tokens in metric.cut(texts)) for name, metric in self.networks.metrics.items()}
        return Unread(cut_prompts(self.drawing), counts)

    def result(self, reference: MeasuredSet | None, unread: Unread) -> dict[str, Any]:
        """The numbers with what is known of both sets, out of all parts. Keeps the scores of each picture in `out`.

        reference, unread: `measured_reference` and `unread`.
        """
        place, extractor = self.networks.pace.device, self.networks.extractor
        drawn = gather(self._generated(), place, keep=self.comparison.needs_features)
        record: dict[str, Any] = {"count": len(drawn.digests), "sha256": hashlib.sha256(b"".join(drawn.digests)).hexdigest()}
        generated = {"path": "the sampler's pictures", "kind": "generated", **record, "seconds": round(drawn.seconds, 3)}
        notes = list(unread.by_model)
        found: dict[str, Any] = {"generated": generated, "scores": scores(drawn, self.drawing.prompts), "notes": notes}
        if drawn.values:
            by_name = {name: values.tolist() for name, values in drawn.values.items()}
            found["values"] = write_values(self.out / SCORES, "index", range(len(drawn.digests)), by_name)
        for name, count in unread.by_metrics.items():
            found["scores"][name]["captions_cut"] = count
        if extractor is None or drawn.statistics is None or reference is None:
            return found
        measured = MeasuredSet(drawn.statistics.gaussian(), drawn.features, extractor.record, generated)
        found |= {"reference": dict(reference.record), "notes": [*notes, *remarks({"generated": measured, "reference": reference})]}
        return {**compare(measured, reference, self.comparison, place), **found}

    def keep(self, record: Mapping[str, Any]) -> None:
        """Writes the record. Raises ValueError if that is not possible."""
        write_json(self.out / RESULT, record)

    def _parts(self) -> list[Parts]:
        reference = self._reference()
        return [self._generated(), *([] if reference is None else [reference])]

    def _generated(self) -> Parts:
        return Parts(self.folder / "generated", len(self.drawing.prompts.prompts), self.decided())

    def _reference(self) -> Parts | None:
        if self.originals is None:
            return None
        listed = {"names": hashlib.sha256("\n".join(self.names).encode()).hexdigest(), **self.originals.identity}
        return Parts((self.shared or self.folder) / "reference", len(self.names), {**listed, **self.networks.features_made()})

    def _listed(self, originals: Originals) -> dict[str, Any]:
        return {"path": str(originals.path), "which": self.which, "kind": originals.kind, "count": len(self.names), **originals.identity}

    def _saved(self, what: str) -> Path | None:
        return None if self.saved is None else self.saved / what


def cut_prompts(drawing: Drawing) -> list[str]:
    """Of each of the model's text encoders that reads some prompts only in part, how many, in a line."""
    texts, counts = drawing.prompts.texts, dict[str, int]()
    tokenizer = drawing.pipeline.model.conditioner.tokenizer
    for start in range(0, len(texts), _TOKENIZED):
        for name, tokens in tokenizer(texts[start : start + _TOKENIZED]).items():
            counts[name] = counts.get(name, 0) + sum(cut is not None for cut in tokens.truncated)
    return [f"the model's {name} reads {count:,} of the {len(texts):,} prompts only in part" for name, count in counts.items() if count]


@dataclass(frozen=True, eq=False)
class Gathered:
    """All parts together. statistics, features: where the networks had an extractor; features: (N, D) float32, if they are kept.

    values: (N,) of each metric. digests: of each picture. seconds: that all processes took, in all runs together.
    """

    statistics: FeatureStatistics | None
    features: Tensor | None
    values: Mapping[str, Tensor]
    digests: Sequence[bytes]
    seconds: float


def gather(parts: Parts, device: torch.device, *, keep: bool = False) -> Gathered:
    """Reads the parts in their order, so that sums do not depend on who made them. Raises ValueError for a part that cannot be read."""
    statistics: FeatureStatistics | None = None
    kept: list[Tensor] = []
    values: dict[str, list[Tensor]] = {}
    digests: list[bytes] = []
    seconds = 0.0
    for indices in parts.ranges:
        arrays = parts.read(indices)
        if "features" in arrays:
            features = torch.from_numpy(arrays["features"])
            if statistics is None:
                statistics = FeatureStatistics(features.shape[1], "cpu" if device.type == "mps" else device)
            statistics.add(features)
            if keep:
                kept.append(features)
        for name, array in arrays.items():
            if name.startswith("metric "):
                values.setdefault(name.removeprefix("metric "), []).append(torch.from_numpy(array))
        digests += [row.tobytes() for row in arrays["digest"]]
        seconds += float(arrays["seconds"].sum())
    joined = {name: torch.cat(found) for name, found in values.items()}
    return Gathered(statistics, torch.cat(kept) if kept else None, joined, digests, seconds)


def scores(gathered: Gathered, prompts: PromptList) -> dict[str, dict[str, Any]]:
    """Of each metric: the mean over all pictures with its standard error, and by category where the prompts have them."""
    categories = list(dict.fromkeys(prompt.category for prompt in prompts.prompts if prompt.category is not None))
    found = {}
    for name, values in gathered.values.items():
        found[name] = asdict(mean_score(values))
        if categories:
            places = {category: [i for i, prompt in enumerate(prompts.prompts) if prompt.category == category] for category in categories}
            found[name]["categories"] = {category: asdict(mean_score(values[places[category]])) for category in categories}
    return found
