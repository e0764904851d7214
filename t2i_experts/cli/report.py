"""`t2i-experts report RUN`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from t2i_experts.cli.options import Json


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The output folder of a training run, at work or ended.")],
    out: Annotated[Path | None, typer.Option("--out", help="Where report.md and report/ are written; default: the run's folder.")] = None,
    as_json: Json = False,
) -> None:
    """Write a page about a training run: progress, loss, previews, speed, and how to go on.

    `train` writes the same page itself, at every checkpoint and at the end.
    """
    from t2i_experts.training.report import write_report

    facts = write_report(run, out)
    typer.echo(json.dumps(facts, ensure_ascii=False) if as_json else facts["report"])
