"""`t2i-experts shards`: pictures with captions become shards, and shards are checked, looked at and measured."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from t2i_experts.cli.options import Json, Workers, complete_config, group
from t2i_experts.cli.progress import progress_bar
from t2i_experts.cli.shards_embed import embed
from t2i_experts.shards.parallel import cores

if TYPE_CHECKING:
    from t2i_experts.shards.check import CheckReport
    from t2i_experts.shards.format import Manifest
    from t2i_experts.shards.reader import RawSample, ShardReader
    from t2i_experts.shards.stats import ShardStatistics

app = group("shards", "Training data: build shards from captioned pictures, check them, look at samples and statistics, add embeddings.")

_LISTED = 20


@app.command()
def build(
    source: Annotated[
        Path, typer.Argument(help="A folder of images or tars, or a file: .csv, .tsv, .jsonl, .ndjson, .json (COCO) or .parquet.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the shards: new, empty, or with the same build unfinished.")],
    images: Annotated[Path | None, typer.Option(help="Folder of the images that a list names; the list's own if not given.")] = None,
    resize: Annotated[
        int | None, typer.Option(help="Shrink larger images to this shorter side, in pixels, with the Lanczos filter, antialiased.")
    ] = None,
    where: Annotated[
        str | None,
        typer.Option("--where", metavar="CONDITION", help="Keep what fulfils it: \"similarity > 0.28 and license in ('cc0', 'cc-by')\"."),
    ] = None,
    samples_per_shard: Annotated[int, typer.Option(help="Samples in one tar.")] = 8192,
    kind: Annotated[
        str | None,
        typer.Option(help="Kind of source where its path does not tell: folder, csv, jsonl, coco, img2dataset, parquet, or a plugin's."),
    ] = None,
    workers: Workers = None,
    as_json: Json = False,
) -> None:
    """Build shards from captioned pictures.

    A folder is searched with its subfolders: IMAGE.txt beside an image holds its captions, one a line; IMAGE.json may hold "caption" or
    "captions" and other fields. A CSV, JSONL or Parquet file names "file" and "caption"; several rows of one file are several captions.
    Parquet may also hold the images, as "image". A COCO captions file has "images" and "annotations". From a folder of tars, such as
    img2dataset's output or other shards, the samples are read where they lie.

    --where compares the metadata fields (<, <=, >, >=, ==, !=, in, not in; and, or, not); what lacks one of its fields is left out.

    A build that was interrupted goes on after its last complete tar when the same command is repeated.
    """
    from t2i_experts.shards.build import BuildOptions, build_shards

    options = BuildOptions(samples_per_shard, resize, _workers(workers), kind, where)
    try:
        with progress_bar("building") as progress:
            manifest, skipped = build_shards(source, out, images, options, progress)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted; the same command goes on after the last complete tar") from None
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
    folders: Annotated[list[Path], typer.Argument(metavar="FOLDER", help="Folders of tars, of this program or of img2dataset.")],
    write_manifest: Annotated[bool, typer.Option("--write-manifest", help="Write a manifest that leaves broken samples out.")] = False,
    workers: Workers = None,
    as_json: Json = False,
) -> None:
    """Check every byte, image and caption of shard folders; exit with 1 if something is wrong.

    Each folder is checked by itself: one that cannot be checked (exit code 2, or 1 if reading fails) does not keep the others from it.
    """
    from t2i_experts.shards.check import check_shards

    documents: list[dict[str, Any]] = []
    worst = 0
    for folder in folders:
        try:
            with progress_bar("checking") as progress:
                report = check_shards(folder, write_manifest=write_manifest, workers=_workers(workers), progress=progress)
        except (ValueError, OSError) as error:
            if len(folders) == 1:
                raise
            typer.echo(f"error: {error}", err=True)
            documents.append({"folder": str(folder), "good": False, "error": str(error)})
            worst = max(worst, 2 if isinstance(error, ValueError) else 1)
            continue
        documents.append(_report(report, write_manifest))
        worst = max(worst, 1 if report.problems else 0)
        if not as_json:
            _tell(report, write_manifest)
    if as_json:
        document = documents[0] if len(folders) == 1 else {"good": worst == 0, "folders": documents}
        typer.echo(json.dumps(document, ensure_ascii=False))
    if worst:
        raise typer.Exit(worst)


def _tell(report: CheckReport, written: bool) -> None:
    """What is wrong with a folder on stderr, a line each, and a line with the verdict on stdout."""
    for title, problems in (("problem", report.problems), ("left out", report.left_out)):
        for problem in problems[:_LISTED]:
            place = f"{report.folder}/{problem.shard}{f' {problem.key!r}' if problem.key else ''}"
            typer.echo(f"{title}: {place}: {problem.detail}", err=True)
        if len(problems) > _LISTED:
            typer.echo(f"{title}: ... {len(problems)} in all; --json lists them", err=True)
    for note in report.notes:
        typer.echo(f"note: {note}", err=True)
    count = len(report.problems)
    facts = [f"{count} problem{'' if count == 1 else 's'}" if count else "good", f": {_summary(report.manifest)}"]
    if report.left_out:
        facts.append(f", {len(report.left_out)} samples left out")
    if written:
        facts.append("; manifest written")
    if report.manifest.samples:
        facts.append(f"; hash {report.manifest.hash[:16]}")
    typer.echo(f"{report.folder}: {''.join(facts)}")


@app.command()
def show(
    folder: Annotated[Path, typer.Argument(help="A shard folder.")],
    index: Annotated[
        int | None, typer.Argument(help="Number of the sample, from 0, in the order of tars and keys.", show_default=False)
    ] = None,
    num: Annotated[
        int | None,
        typer.Option(help="A table of so many samples: from INDEX on, or else spread over the whole folder.", show_default=False),
    ] = None,
    sheet: Annotated[
        Path | None, typer.Option(help="Also write them as a contact sheet with captions to this PNG; 24 of them without --num.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Also write the image of one sample as it is stored to this file.")] = None,
    as_json: Json = False,
) -> None:
    """Show the captions and fields of one sample, or a table and a contact sheet of several."""
    from t2i_experts.shards.reader import ShardReader

    several = num is not None or sheet is not None
    num = 24 if num is None else num
    if num < 1:
        raise ValueError(f"--num={num} must be at least 1")
    if several and out is not None:
        raise ValueError(f"--out {out} writes the image of one sample; leave out --num and --sheet")
    if sheet is not None and sheet.suffix.lower() != ".png":
        raise ValueError(f"--sheet {sheet} must end in .png")
    reader = ShardReader([folder], size=1, seed=0)
    if index is not None and not 0 <= index < reader.samples:
        raise ValueError(f"INDEX={index} must lie in [0, {reader.samples})")
    if several:
        num = min(num, reader.samples)
        spread = [i * reader.samples // num for i in range(num)]
        _show_several(reader, spread if index is None else range(index, min(index + num, reader.samples)), sheet, as_json)
    else:
        _show_one(reader, index or 0, out, as_json)


def _show_one(reader: ShardReader, index: int, out: Path | None, as_json: bool) -> None:
    sample = reader.raw(index)
    document = _described(index, sample)
    if out is not None:
        with _writing("--out", out):
            out.write_bytes(sample.image)
    if as_json:
        typer.echo(_json(document))
        return
    typer.echo(
        f"sample {index} of {reader.samples}: {_printable(sample.key)} in {sample.shard}, "
        f"{document['width']}x{document['height']} pixels, {len(sample.image):,} bytes"
    )
    for caption in sample.captions:
        typer.echo(f"caption: {_printable(caption)}")
    for name, value in sample.metadata.items():
        typer.echo(f"{_printable(name)}: {_printable(str(value))}")


def _show_several(reader: ShardReader, indices: Sequence[int], sheet: Path | None, as_json: bool) -> None:
    """A line for each sample; one that cannot be read says why."""
    import shutil

    documents: list[dict[str, Any]] = []
    cells: list[tuple[bytes | None, str]] = []
    for index in indices:
        image = None
        try:
            sample = reader.raw(index)
            documents.append(_described(index, sample))
            image, text = sample.image, sample.captions[0]
        except ValueError as error:
            text = f"cannot be read: {error}"
            documents.append({"index": index, "unreadable": str(error)})
        if sheet is not None:
            cells.append((image, f"{index}: {_printable(text)}"))
    if sheet is not None:
        from t2i_experts.cli.sample_sheet import draw_sheet

        with _writing("--sheet", sheet):
            draw_sheet(cells).save(sheet)
    if as_json:
        typer.echo(_json({"samples": documents, "sheet": None if sheet is None else str(sheet)}))
        return
    width = shutil.get_terminal_size((120, 0)).columns
    rows = [("index", "key", "pixels", "bytes", "captions", "first caption")]
    for document in documents:
        if "unreadable" in document:
            rows.append((str(document["index"]), "-", "-", "-", "-", f"cannot be read: {document['unreadable']}"))
        else:
            size, captions = f"{document['width']}x{document['height']}", document["captions"]
            rows.append((str(document["index"]), document["key"], size, f"{document['bytes']:,}", str(len(captions)), captions[0]))
    cells_of = [[_printable(cell)[: 32 if i == 1 else None] for i, cell in enumerate(row)] for row in rows]
    widths = [max(len(row[i]) for row in cells_of) for i in range(5)]
    for row in cells_of:
        line = "  ".join(cell.ljust(n) if i == 1 else cell.rjust(n) for i, (cell, n) in enumerate(zip(row, widths, strict=False)))
        typer.echo(f"{line}  {row[5]}"[: max(width, len(line) + 20)])
    if sheet is not None:
        typer.echo(f"contact sheet: {sheet}", err=True)


@contextlib.contextmanager
def _writing(option: str, path: Path) -> Iterator[None]:
    """Raises ValueError that names the option if its file cannot be written."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{option} {path} cannot be written: {error.strerror or error}") from error


def _described(index: int, sample: RawSample) -> dict[str, Any]:
    """A sample as plain values. Raises ValueError if the header of its image cannot be read."""
    from t2i_experts.shards.images import image_size

    width, height = image_size(sample.image)
    place = {"index": index, "shard": str(sample.shard), "key": sample.key, "width": width, "height": height}
    return {**place, "bytes": len(sample.image), "captions": list(sample.captions), "metadata": sample.metadata}


def _printable(text: str) -> str:
    """On one line, and without characters that would do something to a terminal."""
    return "".join(character if character.isprintable() else " " for character in text)


def _json(document: dict[str, Any]) -> str:
    """Half surrogate pairs, which JSON in shards may hold and no stream takes, stay escaped."""
    return json.dumps(document, ensure_ascii=False).encode(errors="backslashreplace").decode()


@app.command()
def stats(
    folder: Annotated[Path, typer.Argument(help="A shard folder.")],
    sample: Annotated[
        int, typer.Option(help="Pictures to look at: drawn at random, the same ones each time; all if there are fewer.")
    ] = 10_000,
    size: Annotated[
        int | None, typer.Option(help="Side of the squares that training sees, in pixels; the config's, or 64.", show_default=False)
    ] = None,
    config: Annotated[
        str | None,
        typer.Option(
            "--config",
            metavar="CONFIG",
            help="A training config: count its text encoders' tokens, and compare its sigma_data.",
            autocompletion=complete_config,
        ),
    ] = None,
    workers: Workers = None,
    as_json: Json = False,
) -> None:
    """Show sizes of pictures, lengths of captions, and sigma_data, the standard deviation of the pixels that training supposes.

    The pixels are those of the centre squares, in [-1, 1]; they say nothing about latents, which a codec scales to sigma_data. With
    --config, how many captions each text encoder would cut off.
    """
    if size is not None and size < 1:
        raise ValueError(f"--size={size} must be at least 1")
    configured, tokenizers, latents = 0.5, None, False
    if config is not None:
        from t2i_experts.config import load_config

        stage = load_config(config).stage
        size, configured, latents = stage.size if size is None else size, stage.noise.sigma_data, stage.codec.latents

        from t2i_experts.conditioning.conditioner import PromptTokenizer

        tokenizers = PromptTokenizer.from_config(stage.encoders).tokenizers

    from t2i_experts.shards.stats import TOLERANCE, shard_statistics

    with progress_bar("reading") as progress:
        found = shard_statistics(
            folder,
            size=64 if size is None else size,
            sample=sample,
            workers=_workers(workers),
            tokenizers=tokenizers,
            progress=progress,
        )
    if as_json:
        document = {"folder": str(folder), **asdict(found), "configured_sigma_data": configured}
        fits = None if latents else found.misfit(configured) <= TOLERANCE
        typer.echo(json.dumps({**document, "sigma_data_fits": fits}, ensure_ascii=False))
        return
    typer.echo(f"{folder}: {found.samples:,} samples" + (f", of which {found.drawn:,} drawn" if found.drawn < found.samples else ""))
    typer.echo("\n".join(_quantile_table(found)))
    typer.echo(
        f"sigma_data {found.sigma_data:.4f}, mean {found.pixel_mean:+.4f} (pixels in [-1, 1] of the {found.size} x {found.size} squares)"
    )
    if found.enlarged:
        typer.echo(f"{_share(found.enlarged, found.drawn)} pictures are smaller than {found.size} pixels and get enlarged")
    for name, tokens in found.tokens.items():
        typer.echo(f"{name}: {_share(tokens.truncated, tokens.tokens.count)} captions are cut off at max_tokens={tokens.max_tokens}")
    if latents:
        typer.echo("note: the config's codec scales its latents to sigma_data; that of the pixels says nothing about them", err=True)
    elif found.misfit(configured) > TOLERANCE:
        typer.echo(
            f"warning: sigma_data={configured:g} is {found.misfit(configured):.0%} off; "
            f"train with stage.noise.sigma_data={found.sigma_data:.2f}",
            err=True,
        )


app.command()(embed)


def _quantile_table(found: ShardStatistics) -> Iterator[str]:
    """Lines: a head, and one for each thing that is measured."""
    rows = {name: getattr(found, name) for name in ("width", "height", "aspect", "captions", "characters", "words")}
    rows["shorter side"] = found.shorter_side
    rows |= {f"{name} tokens": tokens.tokens for name, tokens in found.tokens.items()}
    first = max(len(name) for name in rows)
    yield " " * first + "".join(f"{head:>10}" for head in ("mean", "min", "5 %", "25 %", "50 %", "75 %", "95 %", "max"))
    for name, row in rows.items():
        values = (row.mean, row.min, row.p05, row.p25, row.p50, row.p75, row.p95, row.max)
        digits = 2 if name == "aspect" else 1
        yield f"{name:<{first}}" + "".join(f"{value:>10,.{0 if value == int(value) else digits}f}" for value in values)


def _share(part: int, whole: int) -> str:
    return f"{part:,} of {whole:,} ({part / whole:.1%})"


def _workers(workers: int | None) -> int:
    return cores() if workers is None else workers


def _summary(manifest: Manifest) -> str:
    if not manifest.samples:
        return "no sample can be read"
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
        "embeddings": [asdict(record) for record in manifest.embeddings],
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
