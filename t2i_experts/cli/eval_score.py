"""`t2i-experts eval score`: pictures with their captions, by any metric of the registry."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from t2i_experts.cli.measuring import check_pace, machine
from t2i_experts.cli.options import Device, Json, Workers, complete_metric, one_voice
from t2i_experts.cli.progress import no_bar, progress_bar

_NAMED = 5  # captions that are too long

Pictures = Annotated[
    Path, typer.Argument(metavar="PICTURES", help="A folder of shards, or of pictures with a .txt of the same name beside each.")
]
Captions = Annotated[
    Path | None,
    typer.Option(
        help="Captions of a folder of pictures: .jsonl with file and caption, .tsv of the same two, or .txt in the order of the names.",
        show_default=False,
    ),
]
Batch = Annotated[int, typer.Option(help="Pictures that go through the network together.")]
Values = Annotated[
    Path | None, typer.Option(help="Also write the value of each picture to this CSV, which eval compare reads.", show_default=False)
]


def score(
    pictures: Pictures,
    metric: Annotated[str, typer.Option(help="Its name: a plugin's, or clip, which eval clip has too.", autocompletion=complete_metric)],
    options: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="The metric's own options.")] = None,
    captions: Captions = None,
    batch: Batch = 32,
    device: Device = None,
    workers: Workers = None,
    values: Values = None,
    as_json: Json = False,
) -> None:
    """Measure pictures with captions by a plugin's metric.

    The number is the mean of its values, with the standard error; --json prints the record of all that made it. If a picture or a caption
    is missing or cannot be read there is no number, and the exit code is 2.
    """
    chosen: dict[str, str] = {}
    for option in options or ():
        key, equals, value = option.partition("=")
        if not (key and equals) or key in chosen:
            raise ValueError(f"{option!r} {'names ' + key + ' again' if key in chosen else 'must be of the form KEY=VALUE'}")
        chosen[key] = value
    measure("eval score", metric, chosen, pictures, captions, batch, device, workers, values, as_json)


@one_voice()
def measure(
    command: str,
    name: str,
    options: Mapping[str, str],
    pictures: Path,
    captions: Path | None,
    batch: int,
    device: str | None,
    workers: int | None,
    values: Path | None,
    as_json: bool,
) -> None:
    """Prints the mean of a metric over a set of pictures, with its record. Raises ValueError for what the user got wrong."""
    workers = check_pace(batch, workers)
    if values is not None and (values.suffix != ".csv" or not values.absolute().parent.is_dir()):
        raise ValueError(f"--values {values} must be a file that ends in .csv, in a folder that exists")

    from t2i_experts.registry import registry

    registry.check("metric", name)

    from t2i_experts.evaluation.captioned import CaptionedPictures, open_captioned
    from t2i_experts.evaluation.metrics import Metric, load_metric, measure_captioned
    from t2i_experts.evaluation.processes import open_processes
    from t2i_experts.evaluation.protocol import PICTURES, Pace
    from t2i_experts.evaluation.records import made_by, write_values

    started = time.perf_counter()
    with open_processes() as processes:
        place = processes.together(lambda: processes.device(device))

        def load() -> tuple[CaptionedPictures, Metric]:
            return open_captioned(pictures, captions), load_metric(name, options, place)

        captioned, metric = processes.once_a_host_first(load)
        with (progress_bar if processes.main else no_bar)(pictures.name) as progress:
            measured = measure_captioned(captioned, metric, Pace(place, batch, workers), progress=progress, processes=processes)
    if not processes.main:
        return
    record = {
        **made_by(command),
        **measured.record,
        "pictures": PICTURES,
        "settings": {"batch": batch, "workers": workers, "processes": processes.count},
        **({} if values is None else {"values": write_values(values, "picture", measured.names, {name: measured.values.tolist()})}),
        **machine(place),
        "seconds": round(time.perf_counter() - started, 3),
    }
    typer.echo(json.dumps(record, ensure_ascii=False) if as_json else "\n".join(_lines(record)))


def _lines(record: Mapping[str, Any]) -> list[str]:
    """For people: the set, the network, what was cut off, and the number."""
    found, captions, made = record["set"], record["captions"], record["metric"]
    several = captions["pictures_with_several"]
    lines = [
        f"{found['path']}: {found['kind']}, {found['count']:,} pictures, hash {found['sha256'][:16]}",
        f"captions: {captions['source']}, hash {captions['sha256'][:16]}"
        + (f"; {several:,} pictures have several, of which the first counts" if several else ""),
        ", ".join(f"{key} {value[:16] if key.endswith('sha256') else value}" for key, value in made.items() if value and key != "name"),
    ]
    too_long = captions["too_long"]
    if too_long["count"]:
        named = ", ".join(f"{each['picture']} ({each['tokens_cut']} tokens too many)" for each in too_long["captions"][:_NAMED])
        more = f" and {too_long['count'] - _NAMED:,} more" if too_long["count"] > _NAMED else ""
        lines.append(f"captions longer than the network reads, whose ends do not count: {too_long['count']:,}: {named}{more}")
    error = "" if record["error"] is None else f" +- {record['error']:.4f}"
    lines.append(f"{made['name']} {record['mean']:.4f}{error}")
    return lines
