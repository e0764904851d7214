"""`t2i-experts shards embed`: shards get the embeddings of their captions, so that training need not run the text encoders."""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from t2i_experts.cli.options import Json, complete_config
from t2i_experts.cli.progress import progress_bar

if TYPE_CHECKING:
    from t2i_experts.shards.embed import EmbedResult

_LISTED = 5


def embed(
    folder: Annotated[Path, typer.Argument(help="A shard folder.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Values that replace the config's, such as an encoder's model.")
    ] = None,
    *,
    config: Annotated[
        str,
        typer.Option(
            "--config", metavar="CONFIG", help="The training config whose text encoders are to run.", autocompletion=complete_config
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the new shards: new, empty, or with the same work unfinished.")],
    batch_size: Annotated[int, typer.Option(help="Captions that an encoder gets at once.")] = 64,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1, mps; default: this process's GPU, or the best there is.", show_default=False)
    ] = None,
    rank: Annotated[int, typer.Option(envvar="RANK", help="Number of this process among several, from 0; launchers set it.")] = 0,
    world_size: Annotated[int, typer.Option(envvar="WORLD_SIZE", help="How many processes share the tars; launchers set it.")] = 1,
    as_json: Json = False,
) -> None:
    """Copy shards into a new folder, with the embeddings of all captions by the text encoders of a training config.

    They are stored at their true length, in bfloat16. Training reads them with data.embeddings=stored, and does not run the encoders.

    On several GPUs: accelerate launch -m t2i_experts shards embed ..., or one call for each --rank of --world-size, on any hosts that share
    the folders. Each process writes its own tars, and prints its own JSON. The same command goes on where it was interrupted.
    """
    from t2i_experts.config import load_config

    encoders = load_config(config, overrides or []).stage.encoders
    if batch_size < 1:
        raise ValueError(f"--batch-size={batch_size} must be at least 1")
    if not 0 <= rank < world_size:
        raise ValueError(f"--rank={rank} must lie in [0, --world-size) = [0, {world_size})")

    from t2i_experts.shards.format import Manifest

    Manifest.load(folder)  # before minutes are spent on loading encoders

    from t2i_experts.conditioning.conditioner import TextConditioner
    from t2i_experts.conditioning.stored import text_encoders, text_features
    from t2i_experts.shards.embed import embed_shards
    from t2i_experts.training.embeddings import encoder_record

    text = text_encoders(encoders)
    if not text:
        raise ValueError(f"--config {config}: none of its stage.encoders reads text; they are {', '.join(encoders)}")
    conditioner = TextConditioner.from_config(text, device=_device(device))
    records = [encoder_record(name, encoder, conditioner.fingerprint(name)) for name, encoder in text.items()]
    try:
        with progress_bar("embedding") if _shows_progress() else contextlib.nullcontext(_silent) as progress:
            result = embed_shards(
                folder,
                out,
                records,
                lambda captions: text_features(conditioner, captions, batch_size),
                rank=rank,
                world_size=world_size,
                progress=progress,
            )
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted; the same command goes on after the last complete tar") from None
    document = {
        "folder": str(folder),
        "out": str(out),
        "rank": rank,
        "world_size": world_size,
        "complete": result.manifest is not None,
        "hash": result.manifest and result.manifest.hash,
        "tars": result.tars,
        "samples": result.samples,
        "captions": result.captions,
        "encoders": {record.name: {**asdict(record), **_amount(result, record.name)} for record in records},
        "unreadable": [asdict(what) for what in result.unreadable],
    }
    if as_json:
        typer.echo(json.dumps(document, ensure_ascii=False))
    else:
        _tell(out, result)


def _shows_progress() -> bool:
    """Of the processes that a launcher started on this host, one does; the shares of the others are as large."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def _silent(done: int, total: int | None) -> None:
    pass


def _device(name: str | None) -> Any:
    """The device of that name, or this process's own. Raises ValueError for one that this machine lacks."""
    import torch

    from t2i_experts.cascade.device import default_device, open_device

    device = default_device() if name is None else name
    if name is None and torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return open_device(device, f"--device {device}")


def _amount(result: EmbedResult, name: str) -> dict[str, Any]:
    """What one encoder's embeddings come to; GiB per million captions is None if nothing was written."""
    size, captions = result.bytes.get(name, 0), result.captions
    return {
        "tokens": result.tokens.get(name, 0),
        "bytes": size,
        "gib_per_million_captions": round(size / captions * 1e6 / 2**30, 3) if captions else None,
    }


def _tell(out: Path, result: EmbedResult) -> None:
    for what in result.unreadable[:_LISTED]:
        typer.echo(f"left out: {what.shard} {what.key!r}: {what.why}", err=True)
    if len(result.unreadable) > _LISTED:
        typer.echo(f"left out: ... {len(result.unreadable)} in all; --json lists them", err=True)
    typer.echo(f"{out}: {result.captions:,} captions of {result.samples:,} samples in {result.tars:,} tars embedded now")
    for name in result.bytes:
        amount = _amount(result, name)
        typer.echo(
            f"{name}: {amount['tokens'] / result.captions:.1f} tokens a caption, {amount['bytes'] / 2**20:,.1f} MiB, "
            f"{amount['gib_per_million_captions']:,.2f} GiB for a million captions"
        )
    if result.manifest is None:
        typer.echo("other processes have tars to write yet; the last one writes the manifest")
    else:
        typer.echo(f"complete: {result.manifest.samples:,} samples; train with data.train=[{out}] data.embeddings=stored")
