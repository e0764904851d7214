"""`t2i-experts eval nearest`: the nearest training picture of each generated one: has the model learnt pictures by heart?"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from t2i_experts.cli.drawing import check_dtype, given_sampling, open_pipeline, pipeline_settings, what_decides
from t2i_experts.cli.evaluating import FeaturesModel, Seed, features_model_named
from t2i_experts.cli.generate import make_folder
from t2i_experts.cli.importing import without_collecting
from t2i_experts.cli.measuring import check_pace, machine
from t2i_experts.cli.options import (
    BatchSize,
    Device,
    Dtype,
    Guidance,
    Json,
    Model,
    Protocol,
    Resize,
    Sampler,
    Steps,
    Threshold,
    Weights,
    Workers,
    check_counts,
    complete_features,
    one_voice,
)
from t2i_experts.cli.progress import no_bar, progress_bar

if TYPE_CHECKING:
    from t2i_experts.evaluation.looking import Source, Stored
    from t2i_experts.evaluation.memorisation import Comparing, Memorisation

_MOST_PAIRS = 200


def _complete_features(incomplete: str) -> list[str]:
    """Those without a network, and the networks."""
    return [*(name for name in ("pixels", "tiles") if name.startswith(incomplete)), *complete_features(incomplete)]


@one_voice()
def nearest(
    train: Annotated[Path, typer.Option(help="What the model was trained on: a folder of pictures or of shards, of any size.")],
    generated: Annotated[
        Path | None, typer.Argument(metavar="GENERATED", help="A folder of pictures or of shards; or draw them for --prompts.")
    ] = None,
    held_out: Annotated[
        Path | None,
        typer.Option(
            help="Real pictures of the same kind that it was not trained on: they say which distance is small.", show_default=False
        ),
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Draw a picture for each of these: lines, CSV, TSV or COCO JSON.", show_default=False)
    ] = None,
    num: Annotated[int | None, typer.Option(help="Of the prompts; all if not given.", show_default=False)] = None,
    model: Model = None,
    seed: Seed = 0,
    steps: Steps = None,
    guidance: Guidance = None,
    sampler: Sampler = None,
    threshold: Threshold = None,
    batch_size: BatchSize = 8,
    device: Device = None,
    dtype: Dtype = None,
    features: Annotated[
        str,
        typer.Option(
            help="pixels, tiles (both against exact copies), or a network: inception, open_clip, squeezenet, a plugin's.",
            autocompletion=_complete_features,
        ),
    ] = "pixels",
    protocol: Protocol = None,
    resize: Resize = None,
    weights: Weights = None,
    features_model: FeaturesModel = None,
    resolution: Annotated[
        int | None,
        typer.Option(help="Side of the square as which all pictures are compared; that of GENERATED if not given.", show_default=False),
    ] = None,
    pairs: Annotated[int, typer.Option(help="Pairs on each sheet.")] = 24,
    out: Annotated[
        Path | None, typer.Option(help="Folder for result.json, pairs.csv, generated.png, held-out.png, distances.png.", show_default=False)
    ] = None,
    batch: Annotated[int, typer.Option(help="Pictures that are compared together.")] = 256,
    workers: Workers = None,
    as_json: Json = False,
) -> None:
    """Find the nearest training picture of each generated picture, and say whether it is nearer than it should be.

    --held-out gives the measure: a model that has learnt pictures by heart draws some that lie nearer to a training picture than real
    pictures do that it has not seen. --out keeps sheets of the nearest pairs side by side: look at them, no distance sees what a person
    sees. evaluation/README.md says what the distances are and what the numbers mean.

    On several GPUs or hosts: accelerate launch -m t2i_experts eval nearest ... The processes share the pictures of all sets.
    """
    if (generated is None) == (prompts is None):
        raise ValueError(
            "give either GENERATED, a folder of pictures, or --prompts FILE to draw them; received " + ("both" if prompts else "neither")
        )
    check_counts(num=num, resolution=resolution, batch_size=batch_size, pairs=pairs)
    if seed < 0:
        raise ValueError(f"--seed={seed} must be at least 0")
    if pairs > _MOST_PAIRS:
        raise ValueError(f"--pairs={pairs} must be at most {_MOST_PAIRS}: pairs.csv in --out lists all")
    check_dtype(dtype)
    workers = check_pace(batch, workers)
    given = given_sampling(steps=steps, guidance=guidance, sampler=sampler, threshold=threshold)
    if prompts is None:
        for name, value in {"num": num, "model": model, "seed": seed or None, "dtype": dtype, **given}.items():
            if value is not None:
                raise ValueError(f"--{name}={value} has no meaning for the pictures of {generated}; it goes with --prompts")

    from t2i_experts.registry import registry

    if features not in ("pixels", "tiles"):
        try:
            registry.check("features", features)
        except ValueError as error:
            raise ValueError(f"{error}; and pixels, tiles") from error

    with without_collecting():
        from t2i_experts.evaluation.features import FeatureOptions
        from t2i_experts.evaluation.looking import Drawn, Stored
        from t2i_experts.evaluation.memorisation import Comparing, find_nearest
        from t2i_experts.evaluation.pictures import find_pictures
        from t2i_experts.evaluation.processes import open_processes
        from t2i_experts.evaluation.protocol import PICTURES, Pace
        from t2i_experts.evaluation.records import made_by
        from t2i_experts.evaluation.seeing import Drawing
        from t2i_experts.evaluation.sources import Sources
        from t2i_experts.evaluation.spaces import load_space
        from t2i_experts.evaluation.squares import HOW

    def open_generated() -> tuple[Source, int, dict[str, Any]]:
        """The pictures, the side at which they are compared if nobody says, and what decides them."""
        if generated is not None:
            stored = Stored(find_pictures(generated, "GENERATED"))
            return stored, stored.first_side(), {}
        listed = Sources(None, None, None, num, 0, None, prompts, "chosen").listed()
        pipeline = open_pipeline(model, str(place), dtype)
        settings = pipeline_settings(pipeline, given)
        facts = what_decides(pipeline, settings)
        told = {"prompts": {**listed.origin, "count": len(listed.prompts), "sha256": listed.sha256}, "seed": seed, **facts}
        return Drawn(Drawing(pipeline, listed, seed, settings, batch_size, facts)), pipeline.base.config.size, told

    def load() -> Comparing:
        with features_model_named():
            space = load_space(features, FeatureOptions(protocol, resize, weights, features_model), place)
        return Comparing(space, resolution or side, Pace(place, batch, workers), processes)

    started = time.perf_counter()
    with open_processes() as processes:
        place = processes.together(lambda: processes.device(device))
        training = processes.together(lambda: Stored(find_pictures(train, "--train")))
        real = processes.together(lambda: None if held_out is None else Stored(find_pictures(held_out, "--held-out")))
        if out is not None:
            processes.together(lambda: make_folder(out) if processes.main else None)  # what cannot be written is known before the work
        asked, side, decided = processes.together(open_generated)
        how = processes.once_a_host_first(load)
        found = find_nearest(asked, training, real, how, progress_bar if processes.main else no_bar)
    if not processes.main:
        return
    notes = found.notes(how.resolution)
    for note in notes:
        typer.echo(f"note: {note}", err=True)
    record = {
        **made_by("eval nearest"),
        **found.numbers(),
        "closest": _closest(found, training, pairs),
        "features": dict(how.space.record),
        "resolution": how.resolution,
        "square": HOW,
        "pictures": PICTURES,
        **found.sets,
        **decided,
        "notes": notes,
        "settings": {"batch": batch, "workers": workers, "processes": processes.count},
        **machine(place),
        "seconds": round(time.perf_counter() - started, 3),
    }
    if out is not None:
        _write(out, record, found, asked, real, training, how, pairs)
    typer.echo(json.dumps(record, ensure_ascii=False) if as_json else "\n".join(_lines(record)))


def _closest(found: Memorisation, train: Stored, pairs: int) -> list[dict[str, Any]]:
    """The nearest pairs, by their names."""
    some = []
    for i in found.nearest_first(found.generated, pairs):
        distance = float(found.generated.distances[i])
        pair = {"generated": found.generated.names[i], "train": train.name(int(found.generated.nearest[i])), "distance": distance}
        some.append({**pair, "held_out_nearer": found.rarity(distance)})
    return some


def _write(
    out: Path,
    record: Mapping[str, Any],
    found: Memorisation,
    generated: Source,
    held_out: Source | None,
    train: Stored,
    how: Comparing,
    pairs: int,
) -> None:
    """The record, all pairs as a table, and what there is to look at."""
    from t2i_experts.evaluation.memorisation import draw_distances, draw_pairs
    from t2i_experts.evaluation.records import write_json, write_table

    every = found.generated
    rows = (
        (name, float(distance), train.name(int(nearest)))
        for name, distance, nearest in zip(every.names, every.distances, every.nearest, strict=True)
    )
    write_table(out / "pairs.csv", ["generated", "distance", "train"], rows)
    for name, source, what in (("generated", generated, found.generated), ("held-out", held_out, found.held_out)):
        if source is None or what is None:
            continue
        listed = []
        for i in found.nearest_first(what, pairs):
            distance, rarity = float(what.distances[i]), found.rarity(float(what.distances[i]))
            words = f"{name.replace('-', ' ')}, distance {distance:.4f}" + (
                "" if rarity is None else f"; of those held out, {rarity:.1%} are nearer"
            )
            listed.append((i, int(what.nearest[i]), words))
        draw_pairs(listed, source, train, how.resolution, how.pace.workers).save(out / f"{name}.png")
    draw_distances(found, how.space).save(out / "distances.png")
    write_json(out / "result.json", record)


def _lines(record: Mapping[str, Any]) -> list[str]:
    """For people: the sets, the distance, and what it says."""
    lines = []
    for what in ("generated", "train", "held_out"):
        if what in record:
            found = record[what]
            lines.append(
                f"{what.replace('_', '-')}: {found['path']}: {found['kind']}, {found['count']:,} pictures, hash {found['sha256'][:16]}"
            )
    made = record["features"]
    lines.append(f"distance: {made['features']}, {made['distance']}; pictures at {record['resolution']} px")
    names = list(record["distances"]["generated"])
    lines += ["", f"{'to the nearest':24}" + "".join(f"{name:>10}" for name in names)]
    for what, quantiles in record["distances"].items():
        lines.append(f"{what.replace('_', '-'):24}" + "".join(f"{quantiles[name]:10.4f}" for name in names))
    copies = record["copies"]["generated"]
    lines += [
        "",
        f"{copies:,} generated pictures are at distance 0 of a training picture" if copies else "no generated picture is at distance 0",
    ]
    if "below" in record:
        below, test = record["below"], record["copying"]
        lines += [
            f"nearer than {below['threshold']:.4f}: {below['count']:,} generated pictures, {below['share']:.2%} +- {below['error']:.2%}",
            f"  {below['expected']:.2%} would be, if they were like those held out; so many or more by chance: p = {below['p']:.2g}",
            f"a generated picture is further than a held-out one in {test['further']:.1%} of all cases",
            f"  C_T {test['z']:+.2f}, below zero if they are nearer than they should be; so low by chance: p = {test['p']:.2g}",
        ]
    return lines
