"""`t2i-experts eval coco`: a model's pictures of captions beside the photographs that the captions describe."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from t2i_experts.cli.distances import distance_lines
from t2i_experts.cli.drawing import check_dtype, given_sampling, open_pipeline, what_decides
from t2i_experts.cli.importing import without_collecting
from t2i_experts.cli.measuring import check_pace, machine
from t2i_experts.cli.options import (
    BatchSize,
    Compile,
    Device,
    Dtype,
    Features,
    Guidance,
    Json,
    Kid,
    Model,
    PrecisionRecall,
    Protocol,
    Resize,
    Sampler,
    Steps,
    Threshold,
    Weights,
    Workers,
    one_voice,
)
from t2i_experts.cli.progress import no_bar, progress_bar

if TYPE_CHECKING:
    from t2i_experts.evaluation.prompts import PromptList
    from t2i_experts.evaluation.protocol import MeasuredSet

_LOOKED_AT_TOGETHER = 32
"""Pictures that go through a network of features together, as in `eval fid`; whatever the sampler's batch is."""


@one_voice()
def coco(
    annotations: Annotated[Path | None, typer.Option(help="COCO's captions, such as captions_val2014.json.", show_default=False)] = None,
    images: Annotated[Path | None, typer.Option(help="The folder of their pictures, such as val2014/.", show_default=False)] = None,
    num: Annotated[int | None, typer.Option(help="Pictures: 30000, or all of --ids or --prompts.", show_default=False)] = None,
    caption_seed: Annotated[int, typer.Option(help="Chooses images, and one caption of each.")] = 0,
    ids: Annotated[
        Path | None,
        typer.Option(
            help="Take this list instead: CSV or TSV with image_id and/or file_name, and caption, as ids.csv in --out.", show_default=False
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="Prompts without pictures, for --metric alone: PartiPrompts' TSV, CSV, lines, COCO JSON.", show_default=False),
    ] = None,
    reference: Annotated[str, typer.Option(help="chosen: the pictures of the captions; all: of --annotations; or an .npz.")] = "chosen",
    resolution: Annotated[int, typer.Option(help="Side of the square at which networks see all pictures.")] = 256,
    model: Model = None,
    seed: Annotated[int, typer.Option(help="With its place in the list, decides the noise of a picture.")] = 0,
    steps: Steps = None,
    guidance: Guidance = None,
    sampler: Sampler = None,
    threshold: Threshold = None,
    batch_size: BatchSize = 8,
    device: Device = None,
    dtype: Dtype = None,
    compile: Compile = False,
    features: Features = "inception",
    protocol: Protocol = None,
    resize: Resize = None,
    weights: Weights = None,
    features_model: Annotated[
        str | None, typer.Option(help="Of open_clip: embedded:clip, a folder, hf-hub:ID or an architecture.", show_default=False)
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            "--metric",
            metavar="NAME[:KEY=VALUE,...]",
            help="Also this score of each picture with its prompt, such as clip:model=embedded:clip; may be repeated.",
            show_default=False,
        ),
    ] = None,
    kid: Kid = False,
    precision_recall: PrecisionRecall = False,
    infinity: Annotated[bool, typer.Option("--infinity", help="Also the distance that infinitely many pictures would have.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for result.json, ids.csv, scores.csv and reference.npz.")] = Path("coco"),
    parts: Annotated[
        Path | None, typer.Option(help="Folder for what is done of unfinished work; default: parts in --out.", show_default=False)
    ] = None,
    save_images: Annotated[
        Path | None, typer.Option(help="Also write all pictures as the networks see them, as PNG, into this folder.", show_default=False)
    ] = None,
    workers: Workers = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and about how long it takes; write nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Draw pictures for COCO's captions and compare them with COCO's photographs: zero-shot FID, with its whole record.

    Images and captions are chosen by a rule that --caption-seed and the images' ids decide alone. Generated and reference pictures come to
    the networks in the same way: centre square, --resolution by Lanczos. A run that was stopped goes on with the same command; on several
    GPUs or hosts: accelerate launch -m t2i_experts eval coco ... evaluation/README.md says what else makes the number.
    """
    for name, value in (("num", num), ("resolution", resolution), ("batch-size", batch_size)):
        if value is not None and value < 1:
            raise ValueError(f"--{name}={value} must be at least 1")
    for name, value in (("seed", seed), ("caption-seed", caption_seed)):
        if value < 0:
            raise ValueError(f"--{name}={value} must not be negative")
    check_dtype(dtype)
    workers = check_pace(_LOOKED_AT_TOGETHER, workers)
    metrics = [_metric(text) for text in metric or ()]
    if len({name for name, _ in metrics}) < len(metrics):
        raise ValueError(f"--metric names one twice: {', '.join(name for name, _ in metrics)}")
    given = given_sampling(steps=steps, guidance=guidance, sampler=sampler, threshold=threshold)

    from t2i_experts.registry import registry

    for kind, name in (("features", features), *(("metric", name) for name, _ in metrics)):
        registry.check(kind, name)

    from t2i_experts.evaluation.sources import Sources

    sources = Sources(annotations, images, num, caption_seed, ids, prompts, reference)
    compared = {
        "features": features if features != "inception" else None,
        "protocol": protocol,
        "resize": resize,
        "weights": weights,
        "features-model": features_model,
    }
    sources.check({**compared, "kid": kid, "precision-recall": precision_recall, "infinity": infinity}, bool(metrics))

    with without_collecting():
        import torch

        from t2i_experts.config import check_threshold
        from t2i_experts.evaluation.coco import Evaluation, refuse_impossible
        from t2i_experts.evaluation.features import FeatureOptions, load_features
        from t2i_experts.evaluation.metrics import load_metric
        from t2i_experts.evaluation.processes import open_processes
        from t2i_experts.evaluation.protocol import Comparison, Pace, read_statistics
        from t2i_experts.evaluation.records import made_by
        from t2i_experts.evaluation.rehearsal import rehearse
        from t2i_experts.evaluation.seeing import Drawing, Networks

    started = time.perf_counter()
    with open_processes() as processes:

        def find() -> tuple[PromptList, list[str], MeasuredSet | None]:
            listed = sources.listed()
            names = sources.references(listed)
            statistics = None if sources.statistics is None else read_statistics(sources.statistics)
            if sources.compares:
                refuse_impossible(len(listed.prompts), len(names), statistics, wanted)
            return listed, names, statistics

        def open_drawing() -> Drawing:
            if place.index is not None and place.type == "cuda":
                torch.cuda.set_device(place)  # several processes would else all take room on the first
            pipeline = open_pipeline(model, str(place), dtype, compile=compile)
            settings = pipeline.settings(**given)
            check_threshold(settings.threshold, pipeline.base.config.codec, "--")
            return Drawing(pipeline, listed, seed, settings, batch_size, what_decides(pipeline, settings))

        def load() -> Networks:
            options = FeatureOptions(protocol, resize, weights, features_model)
            try:
                extractor = load_features(features, options, place) if sources.compares else None
            except ValueError as error:
                raise ValueError(str(error).replace("--model", "--features-model")) from error
            scorers = {name: load_metric(name, words, place) for name, words in metrics}
            return Networks(extractor, scorers, resolution, Pace(place, _LOOKED_AT_TOGETHER, workers))

        def plan() -> Evaluation:
            kept = parts or out / "parts"
            planned = Evaluation(drawing, networks, wanted, reference, images, names, statistics, out, kept, save_images)
            planned.check()
            return planned

        wanted = Comparison(kid, precision_recall, infinity)
        listed, names, statistics = processes.together(find)
        place = processes.together(lambda: processes.device(device))
        drawing = processes.together(open_drawing)
        first = processes.together(lambda: load() if processes.local_rank == 0 else None)  # what is downloaded is downloaded once a host
        networks = processes.together(lambda: first or load())
        evaluation = processes.together(plan)
        record: dict[str, Any] = {
            **made_by("eval coco"),
            **evaluation.described(),
            "settings": {"batch_size": batch_size, "workers": workers, "processes": processes.count, "compile": compile},
            **machine(evaluation.networks.pace.device),
        }
        if dry_run:
            if processes.main:
                estimate = rehearse(evaluation.drawing, evaluation.networks, processes.count, images, list(evaluation.names))
                record = {"dry_run": True, **record, "estimate": estimate}
                typer.echo(json.dumps(record, ensure_ascii=False) if as_json else "\n".join(_lines(record)))
            return
        processes.together(lambda: evaluation.open() if processes.main else None)
        evaluation.do(processes, progress_bar if processes.main else no_bar)
    if processes.main:
        result = evaluation.result()
        for note in result["notes"]:
            typer.echo(f"note: {note}", err=True)
        record = {**record, **result, "seconds": round(time.perf_counter() - started, 3)}
        evaluation.keep(record)
        typer.echo(json.dumps(record, ensure_ascii=False) if as_json else "\n".join(_lines(record)))


def _metric(text: str) -> tuple[str, dict[str, str]]:
    """NAME[:KEY=VALUE,...] as name and options. Raises ValueError for another form."""
    name, _, words = text.partition(":")
    options = [word.partition("=") for word in words.split(",")] if words else []
    if not name or any(not (key and equals) for key, equals, _ in options):
        raise ValueError(f"--metric={text!r} must be of the form NAME or NAME:KEY=VALUE,KEY=VALUE")
    return name, {key: value for key, _, value in options}


def _lines(record: Mapping[str, Any]) -> list[str]:
    """For people: the prompts, the model, how pictures are looked at, and the numbers or what they would cost."""
    prompts, reference, made, decided = record["prompts"], record.get("reference"), record["features"], record["decided_by"]
    sampling, model = decided["sampling"], record["model"]
    lines = [
        f"{prompts['count']:,} prompts of {prompts['path']}, hash {prompts['sha256'][:16]}",
        f"model {model['source']}, fingerprint {model['fingerprint']}: {sampling['sampler']}, {sampling['steps']} steps, "
        f"guidance {sampling['guidance']:g}, seed {decided['seed']}, {decided['dtype']} on {decided['device']}",
        f"seen at {decided['resolution']} px: {decided['square']}",
    ]
    if reference is not None:
        count = reference["count"]
        lines.append(f"reference {reference['path']}: {reference['kind']}, {'unknown' if count is None else f'{count:,}'} pictures")
    if made is not None:
        shown = [f"{key} {made[key]}" for key in ("features", "model", "protocol", "resize") if made.get(key)]
        lines.append(", ".join(shown) + f", weights {made['sha256'][:16]}")
    for name, metric in decided["metrics"].items():
        lines.append(f"metric {name}: " + ", ".join(f"{key} {value}" for key, value in metric.items() if key in ("name", "model")))
    if "estimate" in record:
        lines += _estimate_lines(record["estimate"])
    if "distance" in record:
        lines += distance_lines(record, made["name"], made["dimension"], {"the model's set": record["generated"]["count"]})
    for name, score in record.get("scores", {}).items():
        cut = f" (it does not see the ends of {score['captions_cut']:,} prompts, which are too long)" if score["captions_cut"] else ""
        lines.append(f"{decided['metrics'][name].get('name', name)} {_score(score)}{cut}")
        lines += [f"  {category} {_score(part)}" for category, part in score.get("categories", {}).items()]
    return lines


def _estimate_lines(estimate: Mapping[str, Any]) -> list[str]:
    memory, gib = estimate["memory"], 2**30
    device = "" if memory["device_peak_bytes"] is None else f"{memory['device_peak_bytes'] / gib:.1f} GiB of the device, "
    each = f"{estimate['seconds_a_picture']:.3f} s a picture, {estimate['seconds_a_reference']:.3f} s a reference picture"
    return [
        f"about {_duration(estimate['seconds'])}: {each}, {estimate['processes']} processes; measured: {estimate['measured']}",
        f"memory: {device}{memory['process_peak_bytes'] / gib:.1f} GiB of a process, and {memory['statistics_bytes'] / gib:.1f} GiB for "
        f"statistics; {memory['parts_bytes_on_disk'] / 2**20:.0f} MiB of parts on disk",
    ]


def _score(score: Mapping[str, Any]) -> str:
    return f"{score['mean']:.4f}" + ("" if score["error"] is None else f" +- {score['error']:.4f}")


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
