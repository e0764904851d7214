"""`t2i-experts ema RUN --sigma-rel WIDTH --out FOLDER`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from t2i_experts.cli.options import Json


def ema(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Output folder of a run with training.ema.kind=power and snapshots.")],
    sigma_rel: Annotated[float, typer.Option(help="Width of the average: its standard deviation in parts of the run, such as 0.08.")],
    out: Annotated[Path, typer.Option(help="The model folder to write; it must not exist yet.")],
    images: Annotated[int | None, typer.Option(help="Images seen; the newest snapshot's if not given.", show_default=False)] = None,
    as_json: Json = False,
) -> None:
    """Make a model with averaged weights of another width than those that were tracked (EDM2's post-hoc EMA)."""
    if not run.is_dir():
        what = "is a file" if run.exists() else "is not there"
        raise ValueError(f"RUN={str(run)!r} {what}; give the output folder of a training run, in which its snapshots/ are")

    from t2i_experts.training.posthoc import save_reconstruction

    result = save_reconstruction(run, out, sigma_rel, images)
    if as_json:
        typer.echo(json.dumps({"out": str(out), **result.facts()}))
        return
    typer.echo(
        f"{out}: sigma_rel {sigma_rel} after {result.profile.images_seen:,} images, from {result.snapshots} snapshots that meet its "
        f"profile to {result.profile_error:.2%}"
    )
