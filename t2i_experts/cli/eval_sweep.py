"""`t2i-experts eval sweep`: guidance, steps and samplers of some models, and the curve of FID over CLIP score."""

from __future__ import annotations

import functools
import gc
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from t2i_experts.cli.drawing import check_dtype, given_sampling, open_pipeline, what_decides
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
)
from t2i_experts.cli.importing import without_collecting
from t2i_experts.cli.measuring import check_pace, machine
from t2i_experts.cli.options import (
    BatchSize,
    Compile,
    Device,
    Dtype,
    Features,
    Json,
    Kid,
    PrecisionRecall,
    Protocol,
    Resize,
    Threshold,
    Weights,
    Workers,
    complete_model,
    complete_sampler,
    one_voice,
)
from t2i_experts.cli.progress import no_bar, progress_bar

if TYPE_CHECKING:
    from t2i_experts.cascade.pipeline import CascadePipeline
    from t2i_experts.config import SamplingConfig
    from t2i_experts.evaluation.coco import Evaluation
    from t2i_experts.evaluation.seeing import Drawing
    from t2i_experts.evaluation.sweep import Point

Value = TypeVar("Value", int, float, str)


@one_voice()
def sweep(
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            help="A model folder or hub id; may be repeated; default: the embedded model.",
            show_default=False,
            autocompletion=complete_model,
        ),
    ] = None,
    guidance: Annotated[str, typer.Option("--guidance", metavar="G,G,...", help="Classifier-free guidance; 1 is none.")] = "1,2,3,4,6,8,10",
    steps: Annotated[
        str | None, typer.Option("--steps", metavar="N,N,...", help="Sampling steps; default: the model's own.", show_default=False)
    ] = None,
    sampler: Annotated[
        str | None,
        typer.Option(
            "--sampler",
            metavar="NAME,NAME,...",
            help="euler, heun or dpmpp_2m; default: the model's own.",
            show_default=False,
            autocompletion=complete_sampler,
        ),
    ] = None,
    annotations: Annotations = None,
    images: Images = None,
    shards: Shards = None,
    num: Num = None,
    caption_seed: CaptionSeed = 0,
    ids: Ids = None,
    prompts: Prompts = None,
    reference: Reference = "chosen",
    resolution: Resolution = 256,
    seed: Seed = 0,
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
    out: Annotated[Path, typer.Option(help="Folder for sweep.json, sweep.md, curve.png and a folder for each point.")] = Path("sweep"),
    workers: Workers = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Measure models at every guidance, number of steps and sampler of some lists: the curve of FID over CLIP score.

    Each point is what `eval coco` gives with its settings. Points that --out holds are not drawn again: a sweep that was stopped goes on
    with the same command, and more guidances or another --model add to it. On several GPUs or hosts: accelerate launch -m t2i_experts eval
    sweep ...
    """
    check_numbers(num=num, resolution=resolution, batch_size=batch_size, seed=seed, caption_seed=caption_seed)
    check_dtype(dtype)
    workers = check_pace(LOOKED_AT_TOGETHER, workers)
    looking = Looking(features, protocol, resize, weights, features_model, metric or (), resolution)
    looking.check()
    guidances, counts, samplers = _listed(guidance, "guidance", float), _listed(steps, "steps", int), _listed(sampler, "sampler", str)
    for one in guidances:
        given_sampling(steps=None, guidance=one, sampler=None, threshold=threshold)
    for number in counts:
        given_sampling(steps=number, guidance=None, sampler=None, threshold=None)
    for name in samplers:
        given_sampling(steps=None, guidance=None, sampler=name, threshold=None)
    sources: Sequence[str | None] = model or (None,)
    for source in sources:
        if sources.count(source) > 1:
            raise ValueError(f"--model={source!r} comes twice")

    from t2i_experts.evaluation.sources import Sources

    material_of = Sources(annotations, images, shards, num, caption_seed, ids, prompts, reference)
    compared = {**looking.comparing, "kid": kid, "precision-recall": precision_recall, "infinity": infinity}
    material_of.check(compared, bool(looking.metrics))

    with without_collecting():
        from t2i_experts.evaluation import sweep as sweeping
        from t2i_experts.evaluation.coco import Evaluation
        from t2i_experts.evaluation.processes import open_processes
        from t2i_experts.evaluation.protocol import Comparison
        from t2i_experts.evaluation.seeing import Drawing
        from t2i_experts.evaluation.sweep_page import write_page

    with open_processes() as processes:

        def drawing(pipeline: CascadePipeline, sampling: SamplingConfig) -> Drawing:
            return Drawing(pipeline, found.listed, seed, sampling, batch_size, what_decides(pipeline, sampling))

        def made(drawing: Drawing, folder: Path) -> Evaluation:
            theirs = (found.originals, found.names, found.statistics)
            return Evaluation(drawing, networks, wanted, reference, *theirs, folder, folder / "parts", None)

        def plan(source: str | None) -> list[Point]:
            pipeline = opened.of(source)
            points = whole.plan(pipeline)
            if dry_run and processes.main:
                costs.update(_costs(whole.evaluations(pipeline), points, processes.count))
            return points

        def collected() -> dict[str, Any]:
            record = sweeping.collect(out, decided, {**shared, **about}, {points[0].model: points[0].source for points in plans})
            sweeping.keep(out, record)
            if record["points"]:
                write_page(out, record)
            return record

        def begin() -> None:
            whole.open(found.listed)
            collected()

        def go_through(source: str | None, points: Sequence[Point]) -> None:
            evaluations = processes.together(lambda: whole.evaluations(opened.of(source)))
            for evaluation, point in zip(evaluations, points, strict=True):
                if not point.done:
                    title = f"{to_do.index(point) + 1} of {len(to_do)}: {point.name}: "
                    sweeping.measure(evaluation, common, about, processes, _titled(title) if processes.main else no_bar)
                    processes.together(lambda: collected() if processes.main else None)

        wanted = Comparison(kid, precision_recall, infinity)
        found = processes.together(lambda: find(material_of, wanted))
        place = processes.together(lambda: processes.device(device))
        opened = _Opened(lambda source: open_pipeline(source, str(place), dtype, compile=compile))
        processes.together(lambda: opened.of(sources[0]))
        networks = looking.open(place, workers, compares=material_of.compares, processes=processes)
        settings = [
            sweeping.Setting(name, number, one) for name in samplers or (None,) for number in counts or (None,) for one in guidances
        ]
        whole = sweeping.Sweep(settings, threshold, made, drawing, out)
        decided, shared = processes.together(lambda: whole.described(opened.of(sources[0])))
        about = {
            "settings": {"batch_size": batch_size, "workers": workers, "processes": processes.count, "compile": compile},
            **machine(networks.pace.device),
        }
        costs: dict[Path, dict[str, Any]] = {}
        plans: list[list[Point]] = []
        for source in sources:
            plans.append(processes.together(functools.partial(plan, source)))
        sweeping.refuse_twins(plans)
        everything = [point for points in plans for point in points]
        to_do = [point for point in everything if not point.done]
        processes.agree(f"the points that --out={out} holds", [str(point.folder) for point in to_do])
        if dry_run:
            if processes.main:
                record = {"dry_run": True, "decided_by": decided, **shared, **about, **_estimate(everything, costs, processes.count)}
                typer.echo(json.dumps(record, ensure_ascii=False) if as_json else "\n".join(_estimate_lines(record)))
            return
        if processes.main:
            typer.echo(f"{len(everything)} points, of which {len(everything) - len(to_do)} are there", err=True)
        processes.together(lambda: begin() if processes.main else None)
        common = sweeping.Common(out)
        for source, points in zip(sources, plans, strict=True):
            if not all(point.done for point in points):
                go_through(source, points)
    if processes.main:
        record = collected()
        for note in dict.fromkeys(note for point in record["points"] for note in point["notes"]):
            typer.echo(f"note: {note}", err=True)
        typer.echo(json.dumps(record, ensure_ascii=False) if as_json else _shown(record, out))


class _Opened:
    """The model that was asked for last, which alone stays in memory."""

    def __init__(self, load: Callable[[str | None], CascadePipeline]) -> None:
        self._load = load
        self._source: str | None = None
        self._pipeline: CascadePipeline | None = None

    def of(self, source: str | None) -> CascadePipeline:
        """Raises ValueError for a model that cannot be found or is not whole."""
        if self._pipeline is None or self._source != source:
            self._pipeline = None
            gc.collect()  # before the next one takes its room
            self._source, self._pipeline = source, self._load(source)
        return self._pipeline


def _listed(text: str | None, name: str, kind: Callable[[str], Value]) -> list[Value]:
    """The values of a list with commas. Raises ValueError, which names the value, for what is none, and for one that comes twice."""
    values: list[Value] = []
    for word in [] if text is None else text.split(","):
        try:
            value = kind(word.strip())
        except ValueError as error:
            what = "a whole number" if kind is int else "a number"
            raise ValueError(f"--{name}={text!r}: {word.strip()!r} is not {what}") from error
        if value in values:
            raise ValueError(f"--{name}={text!r}: {word.strip()} comes twice")
        values.append(value)
    return values


def _titled(title: str) -> Callable[[str], AbstractContextManager[Any]]:
    return lambda what: progress_bar(title + what)


def _costs(evaluations: Sequence[Evaluation], points: Sequence[Point], processes: int) -> dict[Path, dict[str, Any]]:
    """What each point that is not there will cost, by its folder. Points that take the same evaluations of the network are tried once."""
    from t2i_experts.evaluation.rehearsal import rehearse

    tried: dict[tuple[str, int, bool], dict[str, Any]] = {}
    found = {}
    for evaluation, point in zip(evaluations, points, strict=True):
        if point.done:
            continue
        alike = (point.sampling.sampler, point.steps, point.sampling.guidance == 1)
        if alike not in tried:
            tried[alike] = rehearse(evaluation.drawing, evaluation.networks, processes, evaluation.originals, list(evaluation.names))
        found[point.folder] = tried[alike]
    return found


def _estimate(points: Sequence[Point], costs: Mapping[Path, Mapping[str, Any]], processes: int) -> dict[str, Any]:
    """The points, which of them are there, and how long the others take; the reference, which they share, is read once."""
    listed, seconds, disk = [], 0.0, 0
    for point in points:
        cost = costs.get(point.folder)
        takes = 0.0 if cost is None else cost["seconds_a_picture"] * point.pictures / processes
        if cost is not None and not disk:
            seconds += cost["seconds_a_reference"] * point.references / processes
        sampling = {"sampler": point.sampling.sampler, "steps": point.steps, "guidance": point.sampling.guidance}
        listed.append({"model": point.source, **sampling, "exists": point.done, "pictures": point.pictures, "seconds": round(takes, 1)})
        seconds += takes
        disk += 0 if cost is None else cost["memory"]["parts_bytes_on_disk"]
    estimate = {"seconds": round(seconds, 1), "processes": processes, "parts_bytes_on_disk": disk}
    return {"count": len(listed), "existing": sum(point.done for point in points), "points": listed, "estimate": estimate}


def _estimate_lines(record: Mapping[str, Any]) -> list[str]:
    """For people."""
    from t2i_experts.evaluation.sweep_page import about

    lines = [*about(record), f"{record['count']} points, of which {record['existing']} are there:"]
    for point in record["points"]:
        left = "there" if point["exists"] else f"about {duration(point['seconds'])} for {point['pictures']:,} pictures"
        lines.append(f"  {point['model']}: {point['sampler']}, {point['steps']} steps, guidance {point['guidance']:g}: {left}")
    estimate = record["estimate"]
    disk = f"at most {estimate['parts_bytes_on_disk'] / 2**20:.0f} MiB of parts on disk"
    return [*lines, f"about {duration(estimate['seconds'])} in all, {estimate['processes']} processes; {disk}"]


def _shown(record: Mapping[str, Any], out: Path) -> str:
    """For people: a table as those of the benchmarks, and where the rest is."""
    from t2i_experts.bench.result import Result, Row, table
    from t2i_experts.evaluation.sweep import SWEEP
    from t2i_experts.evaluation.sweep_page import CURVE, PAGE, about, columns

    shown = columns(record)
    rows = [Row(point["model"], None, more={name: cell(point) for name, cell in shown.items()}) for point in record["points"]]
    lines = table(Result("eval sweep", record["machine"], record["settings"], rows)).splitlines()
    return "\n".join([*about(record), *lines, f"{out / SWEEP}, {out / PAGE}, {out / CURVE}"])
