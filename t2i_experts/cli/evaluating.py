"""What `eval coco` and `eval sweep` share: the options that say what a model is measured on and how, and what these open. Some of them
`eval nearest` has, too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from t2i_experts.cli.importing import without_collecting
from t2i_experts.cli.options import check_counts

if TYPE_CHECKING:
    import torch

    from t2i_experts.evaluation.originals import Originals
    from t2i_experts.evaluation.processes import Processes
    from t2i_experts.evaluation.prompts import PromptList
    from t2i_experts.evaluation.protocol import Comparison, MeasuredSet
    from t2i_experts.evaluation.seeing import Networks
    from t2i_experts.evaluation.sources import Sources

LOOKED_AT_TOGETHER = 32
"""Pictures that go through a network of features together, as in `eval fid`; whatever the sampler's batch is."""

Annotations = Annotated[Path | None, typer.Option(help="COCO's captions, such as captions_val2014.json.", show_default=False)]
Images = Annotated[Path | None, typer.Option(help="The folder of their pictures, such as val2014/.", show_default=False)]
Shards = Annotated[Path | None, typer.Option(help="Instead of both, a folder of shards: captions and pictures.", show_default=False)]
Num = Annotated[int | None, typer.Option(help="Pictures: 30000 of --annotations, all of --shards, --ids or --prompts.", show_default=False)]
CaptionSeed = Annotated[int, typer.Option(help="Chooses images, and one caption of each.")]
Ids = Annotated[
    Path | None,
    typer.Option(
        help="Take this list instead: CSV or TSV with image_id and/or file_name, and caption, as ids.csv in --out.", show_default=False
    ),
]
Prompts = Annotated[
    Path | None,
    typer.Option(help="Prompts without pictures, for --metric alone: PartiPrompts' TSV, CSV, lines, COCO JSON.", show_default=False),
]
Reference = Annotated[str, typer.Option(help="chosen: the pictures of the captions; all: of --annotations or --shards; or an .npz.")]
Resolution = Annotated[int, typer.Option(help="Side of the square at which networks see all pictures.")]
Seed = Annotated[int, typer.Option(help="With its place in the list, decides the noise of a picture.")]
FeaturesModel = Annotated[
    str | None, typer.Option(help="Of open_clip: embedded:clip, a folder, hf-hub:ID or an architecture.", show_default=False)
]
Metrics = Annotated[
    list[str] | None,
    typer.Option(
        "--metric",
        metavar="NAME[:KEY=VALUE,...]",
        help="Also this score of each picture with its prompt, such as clip:model=embedded:clip; may be repeated.",
        show_default=False,
    ),
]
Infinity = Annotated[bool, typer.Option("--infinity", help="Also the distance that infinitely many pictures would have.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and about how long it takes; write nothing.")]


@dataclass(frozen=True)
class Looking:
    """What looks at the pictures, as the options say it. metrics: NAME[:KEY=VALUE,...] each."""

    features: str
    protocol: str | None
    resize: str | None
    weights: str | None
    features_model: str | None
    metrics: Sequence[str]
    resolution: int

    @property
    def named(self) -> list[tuple[str, dict[str, str]]]:
        """The metrics as name and options. Raises ValueError for another form, and for a name that comes twice."""
        found = [_metric(text) for text in self.metrics]
        if len({name for name, _ in found}) < len(found):
            raise ValueError(f"--metric names one twice: {', '.join(name for name, _ in found)}")
        return found

    def check(self) -> None:
        """Raises ValueError for parts that nobody knows. Imports no torch."""
        from t2i_experts.registry import registry

        for kind, name in (("features", self.features), *(("metric", name) for name, _ in self.named)):
            registry.check(kind, name)

    @property
    def comparing(self) -> dict[str, Any]:
        """The options that have a meaning only where features are compared, if they were given."""
        return {
            "features": self.features if self.features != "inception" else None,
            "protocol": self.protocol,
            "resize": self.resize,
            "weights": self.weights,
            "features-model": self.features_model,
        }

    def open(self, place: torch.device, workers: int, *, compares: bool, processes: Processes) -> Networks:
        """The networks, the same in all processes. Raises ValueError on all of them."""
        from t2i_experts.evaluation.features import FeatureOptions, load_features
        from t2i_experts.evaluation.metrics import load_metric
        from t2i_experts.evaluation.protocol import Pace
        from t2i_experts.evaluation.seeing import Networks

        def load() -> Networks:
            options = FeatureOptions(self.protocol, self.resize, self.weights, self.features_model)
            with features_model_named():
                extractor = load_features(self.features, options, place) if compares else None
            scorers = {name: load_metric(name, words, place) for name, words in self.named}
            return Networks(extractor, scorers, self.resolution, Pace(place, LOOKED_AT_TOGETHER, workers))

        return processes.once_a_host_first(load)


@contextmanager
def features_model_named() -> Iterator[None]:
    """Errors of a network of features call its model's option by the name that it has beside the --model that draws."""
    try:
        yield
    except ValueError as error:
        raise ValueError(str(error).replace("--model", "--features-model")) from error


def check_numbers(*, num: int | None, resolution: int, batch_size: int, seed: int, caption_seed: int) -> None:
    """Raises ValueError for numbers that mean nothing."""
    check_counts(num=num, resolution=resolution, batch_size=batch_size)
    for name, value in (("seed", seed), ("caption-seed", caption_seed)):
        if value < 0:
            raise ValueError(f"--{name}={value} must not be negative")


@dataclass(frozen=True)
class Material:
    """The prompts, and what their pictures are compared with: see `t2i_experts.evaluation.coco.Evaluation`."""

    listed: PromptList
    originals: Originals | None
    names: Sequence[str]
    statistics: MeasuredSet | None


def find(sources: Sources, wanted: Comparison) -> Material:
    """Reads the lists, and looks whether the pictures are there. Raises ValueError."""
    with without_collecting():
        from t2i_experts.evaluation.coco import refuse_impossible
        from t2i_experts.evaluation.protocol import read_statistics

    listed = sources.listed()
    names = sources.references(listed)
    statistics = None if sources.statistics is None else read_statistics(sources.statistics)
    if sources.compares:
        refuse_impossible(len(listed.prompts), len(names), statistics, wanted)
    return Material(listed, sources.originals, names, statistics)


def shown_prompts(prompts: Mapping[str, Any]) -> str:
    """For people, in a line."""
    return f"{prompts['count']:,} prompts of {prompts['path']}, hash {prompts['sha256'][:16]}"


def shown_reference(reference: Mapping[str, Any]) -> str:
    """For people, in a line."""
    count = "unknown" if reference["count"] is None else f"{reference['count']:,}"
    return f"reference {reference['path']}: {reference['kind']}, {count} pictures"


def shown_features(made: Mapping[str, Any]) -> str:
    """For people, in a line."""
    shown = [f"{key} {made[key]}" for key in ("features", "model", "protocol", "resize") if made.get(key)]
    return ", ".join(shown) + f", weights {made['sha256'][:16]}"


def shown_metric(name: str, record: Mapping[str, Any]) -> str:
    """For people, in a line."""
    return f"metric {name}: " + ", ".join(f"{key} {value}" for key, value in record.items() if key in ("name", "model"))


def duration(seconds: float) -> str:
    """For people: `40 s`, `12 min`, `2.5 h`."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _metric(text: str) -> tuple[str, dict[str, str]]:
    """NAME[:KEY=VALUE,...] as name and options. Raises ValueError for another form."""
    name, _, words = text.partition(":")
    options = [word.partition("=") for word in words.split(",")] if words else []
    if not name or any(not (key and equals) for key, equals, _ in options):
        raise ValueError(f"--metric={text!r} must be of the form NAME or NAME:KEY=VALUE,KEY=VALUE")
    return name, {key: value for key, _, value in options}
