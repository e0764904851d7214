"""`t2i-experts shards`: pictures with captions become shards, and shards are checked and looked at."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from t2i_experts.shards.check import CheckReport
    from t2i_experts.shards.format import Manifest

app = typer.Typer(
    name="shards",
    help="Training data: build shards from captioned pictures, check them, look at a sample.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

_LISTED = 20

Workers = Annotated[int | None, typer.Option(help="Threads that decode pictures; all cores if not given.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]


@app.command()
def build(
    source: Annotated[Path, typer.Argument(help="A folder with captions beside its images, or a .csv, .tsv, .jsonl or .ndjson file.")],
    out: Annotated[Path, typer.Option(help="Folder for the shards: new or empty.")],
    images: Annotated[Path | None, typer.Option(help="Folder of the images that a CSV or JSONL file names; its own if not given.")] = None,
    resize: Annotated[int | None, typer.Option(help="Shrink larger images to this shorter side, in pixels (Lanczos).")] = None,
    samples_per_shard: Annotated[int, typer.Option(help="Samples in one tar.")] = 8192,
    kind: Annotated[str | None, typer.Option(help="Name of the kind of source, where its path does not tell (plugins).")] = None,
    workers: Workers = None,
    as_json: Json = False,
) -> None:
    """Build shards from captioned pictures.

    A folder is searched with its subfolders: IMAGE.txt beside an image holds its captions, one a line; IMAGE.json may hold "caption" or
    "captions" and other fields. A CSV or JSONL file names "file" and "caption"; several rows of one file are several captions.
    """
    from t2i_experts.shards.build import BuildOptions, build_shards

    options = BuildOptions(samples_per_shard, resize, _workers(workers), kind)
    with _progress("building") as progress:
        manifest, skipped = build_shards(source, out, images, options, progress)
    if as_json:
        reasons = {reason: {"count": count, "first": skipped.first[reason]} for reason, count in skipped.counts.items()}
        typer.echo(json.dumps({"out": str(out), **_plain(manifest), "skipped": reasons}, ensure_ascii=False))
        return
    for reason, count in skipped.counts.items():
        names = skipped.first[reason]
        typer.echo(
            f"skipped, {reason}: {count}\n" + "\n".join(f"  {name}" for name in names) + ("\n  ..." if count > len(names) else ""), err=True
        )
    typer.echo(f"{out}: {_summary(manifest)}")


@app.command()
def check(
    folder: Annotated[Path, typer.Argument(help="A folder of tars, of this program or of img2dataset.")],
    write_manifest: Annotated[bool, typer.Option("--write-manifest", help="Write a manifest that leaves broken samples out.")] = False,
    workers: Workers = None,
    as_json: Json = False,
) -> None:
    """Check every byte, image and caption of a shard folder; exit with 1 if something is wrong."""
    from t2i_experts.shards.check import check_shards

    with _progress("checking") as progress:
        report = check_shards(folder, write_manifest=write_manifest, workers=_workers(workers), progress=progress)
    if as_json:
        typer.echo(json.dumps(_report(report, write_manifest), ensure_ascii=False))
    else:
        for title, problems in (("problem", report.problems), ("left out", report.left_out)):
            for problem in problems[:_LISTED]:
                typer.echo(f"{title}: {problem.shard}{f' {problem.key!r}' if problem.key else ''}: {problem.detail}", err=True)
            if len(problems) > _LISTED:
                typer.echo(f"{title}: ... {len(problems)} in all; --json lists them", err=True)
        for note in report.notes:
            typer.echo(f"note: {note}", err=True)
        verdict = f"{len(report.problems)} problems" if report.problems else "good"
        left_out = f", {len(report.left_out)} samples left out" if report.left_out else ""
        written = "; manifest written" if write_manifest else ""
        typer.echo(f"{folder}: {verdict}: {_summary(report.manifest)}{left_out}{written}")
    if report.problems:
        raise typer.Exit(1)


@app.command()
def show(
    folder: Annotated[Path, typer.Argument(help="A shard folder.")],
    index: Annotated[int, typer.Argument(help="Number of the sample, from 0, in the order of tars and keys.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Also write the image as it is stored to this file.")] = None,
    as_json: Json = False,
) -> None:
    """Show the captions and fields of one sample."""
    from t2i_experts.shards.images import image_size
    from t2i_experts.shards.reader import ShardReader

    reader = ShardReader([folder], size=1, seed=0)
    if not 0 <= index < reader.samples:
        raise ValueError(f"INDEX={index} must lie in [0, {reader.samples})")
    sample = reader.raw(index)
    width, height = image_size(sample.image)
    if out is not None:
        out.write_bytes(sample.image)
    if as_json:
        document = {"index": index, "shard": str(sample.shard), "key": sample.key, "width": width, "height": height}
        document |= {"bytes": len(sample.image), "captions": list(sample.captions), "metadata": sample.metadata}
        typer.echo(json.dumps(document, ensure_ascii=False))
        return
    typer.echo(f"sample {index} of {reader.samples}: {sample.key} in {sample.shard}, {width}x{height} pixels, {len(sample.image):,} bytes")
    for caption in sample.captions:
        typer.echo(f"caption: {caption}")
    for name, value in sample.metadata.items():
        typer.echo(f"{name}: {value}")


def _workers(workers: int | None) -> int:
    return workers if workers is not None else len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr with a rate and an end time, from the moment at which the number of samples is known."""
    from tqdm import tqdm

    with contextlib.ExitStack() as stack:
        bar: tqdm | None = None

        def progress(done: int, total: int) -> None:
            nonlocal bar
            if bar is None:
                bar = stack.enter_context(tqdm(desc=what, unit=" samples", file=sys.stderr, mininterval=0.5, dynamic_ncols=True))
            bar.total = total
            bar.update(done - bar.n)

        yield progress


def _summary(manifest: Manifest) -> str:
    captions, width, height = (getattr(manifest.statistics, n) for n in ("caption_characters", "image_width", "image_height"))
    size = sum(shard.bytes for shard in manifest.shards)
    return (
        f"{manifest.samples:,} samples with {captions.count:,} captions in {len(manifest.shards):,} tars, {size / 2**20:,.1f} MiB; "
        f"images {width.min}-{width.max} x {height.min}-{height.max} pixels; captions {captions.min}-{captions.max} characters"
    )


def _plain(manifest: Manifest) -> dict[str, Any]:
    return {
        "samples": manifest.samples,
        "captions": manifest.statistics.caption_characters.count,
        "bytes": sum(shard.bytes for shard in manifest.shards),
        "hash": manifest.hash,
        "statistics": asdict(manifest.statistics),
        "shards": [asdict(shard) for shard in manifest.shards],
    }


def _report(report: CheckReport, written: bool) -> dict[str, Any]:
    return {
        "folder": report.folder,
        "good": not report.problems,
        "problems": [asdict(problem) for problem in report.problems],
        "left_out": [asdict(problem) for problem in report.left_out],
        "notes": report.notes,
        "manifest_written": written,
        **_plain(report.manifest),
    }
