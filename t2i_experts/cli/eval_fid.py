"""`t2i-experts eval fid`: distances between two sets of pictures."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from t2i_experts.cli.measuring import check_pace, distance_lines, machine
from t2i_experts.cli.options import Device, Features, Json, Kid, PrecisionRecall, Protocol, Resize, Weights, Workers, one_voice
from t2i_experts.cli.progress import no_bar, progress_bar

if TYPE_CHECKING:
    from t2i_experts.evaluation.protocol import MeasuredSet


@one_voice()
def fid(
    a: Annotated[
        Path, typer.Argument(metavar="A", help="What is judged: a folder of pictures, a folder of shards, or an .npz of statistics.")
    ],
    b: Annotated[Path | None, typer.Argument(metavar="B", help="The reference, of the same kinds; not needed with --save-stats.")] = None,
    features: Features = "inception",
    protocol: Protocol = None,
    resize: Resize = None,
    weights: Weights = None,
    model: Annotated[
        str | None, typer.Option(help="Of open_clip: embedded:clip, a folder, hf-hub:ID or an architecture.", show_default=False)
    ] = None,
    kid: Kid = False,
    precision_recall: PrecisionRecall = False,
    infinity: Annotated[
        bool, typer.Option("--infinity", help="Also the distance that infinitely many pictures like A would have.")
    ] = False,
    save_stats: Annotated[
        Path | None, typer.Option(help="Write mean and covariance of A to this .npz, which may stand for A or B later.", show_default=False)
    ] = None,
    batch: Annotated[int, typer.Option(help="Pictures that go through the network together.")] = 32,
    seed: Annotated[int, typer.Option(help="Of the subsets that --kid and --infinity draw.")] = 2020,
    device: Device = None,
    workers: Workers = None,
    as_json: Json = False,
) -> None:
    """Compare two sets of pictures by the Frechet distance between their features: FID, with --features inception.

    --json prints the record of all that made the number: network, weights' sha256, resizing, counts and hashes of both sets, versions,
    machine. Numbers are comparable only if all of that is the same; evaluation/README.md says what the protocols are. If a picture
    cannot be read there is no number, and the exit code is 2.

    On several GPUs or hosts: accelerate launch -m t2i_experts eval fid A B. The processes share the pictures; the number stays the same.
    """
    workers = check_pace(batch, workers)
    if b is None and save_stats is None:
        raise ValueError("B is missing: give the reference, or --save-stats FILE to keep the statistics of A")
    if save_stats is not None and (save_stats.suffix != ".npz" or not save_stats.absolute().parent.is_dir()):
        raise ValueError(f"--save-stats {save_stats} must be a file that ends in .npz, in a folder that exists")
    if not 0 <= seed < 2**32:
        raise ValueError(f"--seed={seed} must lie in [0, 2^32)")
    for option, given in (("kid", kid), ("precision-recall", precision_recall), ("infinity", infinity)):
        if given and b is None:
            raise ValueError(f"--{option} compares A with B, and B is missing")

    from t2i_experts.registry import registry

    registry.check("features", features)

    from t2i_experts.evaluation.features import FeatureOptions
    from t2i_experts.evaluation.processes import open_processes
    from t2i_experts.evaluation.protocol import PICTURES, Comparison, Pace, compare, keep_statistics, measure_sets, remarks
    from t2i_experts.evaluation.records import made_by

    started = time.perf_counter()
    wanted = Comparison(kid, precision_recall, infinity, seed)
    paths = {"A": a} if b is None else {"A": a, "B": b}
    options = FeatureOptions(protocol, resize, weights, model)
    with open_processes() as processes:
        place = processes.together(lambda: processes.device(device))
        bar = progress_bar if processes.main else no_bar
        sets = measure_sets(paths, features, options, wanted, Pace(place, batch, workers), bar, processes)
    if not processes.main:
        return
    notes = remarks(sets)
    for note in notes:
        typer.echo(f"note: {note}", err=True)
    if save_stats is not None:
        keep_statistics(save_stats, sets["A"])
    numbers = compare(sets["A"], sets["B"], wanted, place) if b is not None else {}
    made = next((measured.made for _, measured in sorted(sets.items()) if measured.made is not None), None)
    called = {"A": "set"} if b is None else {"A": "generated", "B": "reference"}
    record: dict[str, Any] = {
        **made_by("eval fid"),
        **numbers,
        "features": made,
        "pictures": PICTURES,
        **{called[what]: measured.record for what, measured in sorted(sets.items())},
        "notes": notes,
        "saved": None if save_stats is None else str(save_stats),
        "settings": {"batch": batch, "workers": workers, "processes": processes.count, "seed": seed},
        **machine(place),
        "seconds": round(time.perf_counter() - started, 3),
    }
    if as_json:
        typer.echo(json.dumps(record, ensure_ascii=False))
        return
    for line in _lines(record, sets):
        typer.echo(line)


def _lines(record: dict[str, Any], sets: dict[str, MeasuredSet]) -> list[str]:
    """For people: the sets, how they were looked at, and the numbers."""
    lines = []
    for what, measured in sorted(sets.items()):
        count = measured.record["count"]
        digest = measured.record.get("sha256")
        facts = [measured.record["kind"], "pictures unknown" if count is None else f"{count:,} pictures"]
        lines.append(f"{what}: {measured.record['path']}: {', '.join(facts)}" + (f", hash {digest[:16]}" if digest else ""))
    made = record["features"] or {}
    shown = [f"{key} {made[key]}" for key in ("features", "model", "protocol", "resize") if made.get(key)]
    lines.append(", ".join(shown) + (f", weights {made['sha256'][:16]}" if made.get("sha256") else "") if made else "features: unknown")
    if record["saved"]:
        lines.append(f"statistics of A: {record['saved']}")
    if "distance" in record:
        counts = {what: measured.record["count"] for what, measured in sorted(sets.items())}
        lines += distance_lines(record, made.get("name", "Frechet distance"), len(sets["A"].gaussian.mean), counts)
    return lines
