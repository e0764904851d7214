"""`t2i-experts experts ranks`: how many singular values an expert needs, by its loss on held-out pictures."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from t2i_experts.cli.importing import without_collecting
from t2i_experts.cli.options import Config, Json, Overrides, check_counts, tabulated

if TYPE_CHECKING:
    from t2i_experts.training.rank_losses import RankLoss


def ranks(
    config: Config,
    overrides: Overrides = None,
    rank: Annotated[
        list[int] | None, typer.Option(help="A rank to measure, again for more; default: 1, 2, 4, ...", show_default=False)
    ] = None,
    images: Annotated[
        int | None, typer.Option(help="Pictures of data.validation; default: training.validation.images.", show_default=False)
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Pictures in one evaluation.")] = 32,
    dtype: Annotated[
        str | None, typer.Option(help="float32 or bfloat16: as assemble would store; default: as the weights are.", show_default=False)
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; default: the best there is.", show_default=False)] = None,
    early: Annotated[bool, typer.Option("--early", help="Also take nodes that are still to see some of their images.")] = False,
    as_json: Json = False,
) -> None:
    """Measure what experts lose when they are stored at a low rank: their loss on held-out pictures, inside their own noise.

    Beside the root's loss and that of the whole expert, on the same pictures and noise. Two experts' losses cannot be compared.
    """
    from t2i_experts.cli.drawing import check_dtype
    from t2i_experts.config import load_config

    check_dtype(dtype)
    check_counts(images=images, batch_size=batch_size)
    for one in rank or []:
        check_counts(rank=one)
    resolved = load_config(config, overrides or [])

    with without_collecting():
        import torch

        from t2i_experts.cascade.assembly import gather
        from t2i_experts.cascade.device import default_device, open_device
        from t2i_experts.training.rank_losses import rank_losses

    where = default_device() if device is None else open_device(device, f"--device={device!r}")
    stored = getattr(torch, dtype) if dtype else None
    found = rank_losses(
        gather(resolved, early=early),
        resolved,
        ranks=sorted(set(rank or [])),
        images=images,
        batch_size=batch_size,
        dtype=stored,
        device=where,
    )
    document = {}
    for name, rows in found:
        document[name] = [asdict(row) for row in rows]
        if not as_json:
            typer.echo("\n".join([name, *_lines(rows), ""]))
    if not document:
        raise ValueError(f"output={resolved.output!r}: no expert is trained that has the root's network; nothing to measure")
    if as_json:
        typer.echo(json.dumps({"experts": document}, ensure_ascii=False))


def _lines(rows: list[RankLoss]) -> list[str]:
    table = [["rank", "bytes", "error of the weights", "loss", "above the expert's"]]
    for row in rows:
        name = {0: "root", None: "full"}.get(row.rank, str(row.rank))
        loss, above = f"{row.loss:.5f} +- {row.standard_error:.5f}", f"{row.above:+.5f} +- {row.above_error:.5f}"
        table.append([name, f"{row.bytes:,}", f"{row.error:.2%}", loss, "" if row.rank is None else above])
    return tabulated(table)
