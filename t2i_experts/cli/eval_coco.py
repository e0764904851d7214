"""`t2i-experts eval coco`: a model's pictures of captions beside the photographs that the captions describe."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from t2i_experts.cli.drawing import check_dtype, given_sampling, open_pipeline, pipeline_settings, what_decides
from t2i_experts.cli.evaluating import (
    LOOKED_AT_TOGETHER,
    Annotations,
    CaptionSeed,
    DryRun,
    FeaturesModel,
    Ids,
    Images,
    Infinity,
    Looking,
    Metrics,
    Num,
    Prompts,
    Reference,
    Resolution,
    Seed,
    Shards,
    check_numbers,
    duration,
    find,
    shown_features,
    shown_metric,
    shown_prompts,
    shown_reference,
)
from t2i_experts.cli.importing import without_collecting
from t2i_experts.cli.measuring import check_pace, distance_lines, machine
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


@one_voice()
def coco(
    annotations: Annotations = None,
    images: Images = None,
    shards: Shards = None,
    num: Num = None,
    caption_seed: CaptionSeed = 0,
    ids: Ids = None,
    prompts: Prompts = None,
    reference: Reference = "chosen",
    resolution: Resolution = 256,
    model: Model = None,
    seed: Seed = 0,
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
    features_model: FeaturesModel = None,
    metric: Metrics = None,
    kid: Kid = False,
    precision_recall: PrecisionRecall = False,
    infinity: Infinity = False,
    out: Annotated[Path, typer.Option(help="Folder for result.json, ids.csv, scores.csv and reference.npz.")] = Path("coco"),
    parts: Annotated[
        Path | None, typer.Option(help="Folder for what is done of unfinished work; default: parts in --out.", show_default=False)
    ] = None,
    save_images: Annotated[
        Path | None, typer.Option(help="Also write all pictures as the networks see them, as PNG, into this folder.", show_default=False)
    ] = None,
    workers: Workers = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Draw pictures for COCO's captions and compare them with COCO's photographs: zero-shot FID, with its whole record.

    Images and captions are chosen by a rule that --caption-seed and the images' ids decide alone. Generated and reference pictures come to
    the networks in the same way: centre square, --resolution by Lanczos. A run that was stopped goes on with the same command; on several
    GPUs or hosts: accelerate launch -m t2i_experts eval coco ... evaluation/README.md says what else makes the number.
    """
    check_numbers(num=num, resolution=resolution, batch_size=batch_size, seed=seed, caption_seed=caption_seed)
    check_dtype(dtype)
    workers = check_pace(LOOKED_AT_TOGETHER, workers)
    looking = Looking(features, protocol, resize, weights, features_model, metric or (), resolution)
    looking.check()
    given = given_sampling(steps=steps, guidance=guidance, sampler=sampler, threshold=threshold)

    from t2i_experts.evaluation.sources import Sources

    sources = Sources(annotations, images, shards, num, caption_seed, ids, prompts, reference)
    compared = {**looking.comparing, "kid": kid, "precision-recall": precision_recall, "infinity": infinity}
    sources.check(compared, bool(looking.metrics))

    with without_collecting():
        from t2i_experts.evaluation.coco import REFERENCE, Evaluation
        from t2i_experts.evaluation.processes import open_processes
        from t2i_experts.evaluation.protocol import Comparison
        from t2i_experts.evaluation.records import made_by
        from t2i_experts.evaluation.rehearsal import rehearse
        from t2i_experts.evaluation.seeing import Drawing

    started = time.perf_counter()
    with open_processes() as processes:

        def open_drawing() -> Drawing:
            pipeline = open_pipeline(model, str(place), dtype, compile=compile)
            settings = pipeline_settings(pipeline, given)
            return Drawing(pipeline, found.listed, seed, settings, batch_size, what_decides(pipeline, settings))

        def plan() -> Evaluation:
            kept, theirs = parts or out / "parts", (found.originals, found.names, found.statistics)
            planned = Evaluation(drawing, networks, wanted, reference, *theirs, out, kept, save_images)
            planned.check()
            return planned

        wanted = Comparison(kid, precision_recall, infinity)
        found = processes.together(lambda: find(sources, wanted))
        place = processes.together(lambda: processes.device(device))
        drawing = processes.together(open_drawing)
        networks = looking.open(place, workers, compares=sources.compares, processes=processes)
        evaluation = processes.together(plan)
        record: dict[str, Any] = {
            **made_by("eval coco"),
            **evaluation.described(),
            "settings": {"batch_size": batch_size, "workers": workers, "processes": processes.count, "compile": compile},
            **machine(evaluation.networks.pace.device),
        }
        if dry_run:
            if processes.main:
                estimate = rehearse(evaluation.drawing, evaluation.networks, processes.count, found.originals, list(found.names))
                record = {"dry_run": True, **record, "estimate": estimate}
                typer.echo(json.dumps(record, ensure_ascii=False) if as_json else "\n".join(_lines(record)))
            return
        processes.together(lambda: evaluation.open() if processes.main else None)
        evaluation.do(processes, progress_bar if processes.main else no_bar)
    if processes.main:
        compared_with = evaluation.measured_reference()
        result = evaluation.result(compared_with, evaluation.unread())
        if compared_with is not None and evaluation.originals is not None:
            evaluation.keep_reference(compared_with, out / REFERENCE)
        for note in result["notes"]:
            typer.echo(f"note: {note}", err=True)
        record = {**record, **result, "seconds": round(time.perf_counter() - started, 3)}
        evaluation.keep(record)
        typer.echo(json.dumps(record, ensure_ascii=False) if as_json else "\n".join(_lines(record)))


def _lines(record: Mapping[str, Any]) -> list[str]:
    """For people: the prompts, the model, how pictures are looked at, and the numbers or what they would cost."""
    from t2i_experts.evaluation.records import steps_in_all

    prompts, reference, made, decided = record["prompts"], record.get("reference"), record["features"], record["decided_by"]
    sampling, model = decided["sampling"], record["model"]
    lines = [
        shown_prompts(prompts),
        f"model {model['source']}, fingerprint {model['fingerprint']}: {sampling['sampler']}, {steps_in_all(sampling)} steps, "
        f"guidance {sampling['guidance']:g}, seed {decided['seed']}, {decided['dtype']} on {decided['device']}",
        f"seen at {decided['resolution']} px: {decided['square']}",
    ]
    if reference is not None:
        lines.append(shown_reference(reference))
    if made is not None:
        lines.append(shown_features(made))
    lines += [shown_metric(name, metric) for name, metric in decided["metrics"].items()]
    if "estimate" in record:
        lines += _estimate_lines(record["estimate"])
    if "distance" in record:
        counts = {"the model's set": record["generated"]["count"], "the reference": record["reference"]["count"]}
        lines += distance_lines(record, made["name"], made["dimension"], counts)
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
        f"about {duration(estimate['seconds'])}: {each}, {estimate['processes']} processes; measured: {estimate['measured']}",
        f"memory: {device}{memory['process_peak_bytes'] / gib:.1f} GiB of a process, and {memory['statistics_bytes'] / gib:.1f} GiB for "
        f"statistics; {memory['parts_bytes_on_disk'] / 2**20:.0f} MiB of parts on disk",
    ]


def _score(score: Mapping[str, Any]) -> str:
    return f"{score['mean']:.4f}" + ("" if score["error"] is None else f" +- {score['error']:.4f}")
