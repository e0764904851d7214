"""`t2i-experts eval clip`: how well pictures fit their captions, as CLIP sees it."""

from __future__ import annotations

from typing import Annotated

import typer

from t2i_experts.cli.eval_score import Batch, Captions, Pictures, Values, measure
from t2i_experts.cli.options import Device, Json, Workers


def clip(
    pictures: Pictures,
    model: Annotated[str, typer.Option(help="embedded:clip, an open_clip folder, hf-hub:ID, or an architecture such as ViT-L-14.")],
    weights: Annotated[
        str | None, typer.Option(help="Of an architecture: open_clip's tag, such as openai, or a local file.", show_default=False)
    ] = None,
    captions: Captions = None,
    clamp: Annotated[bool, typer.Option("--clamp", help="Count cosines below zero as zero, as Hessel et al. do.")] = False,
    prefix: Annotated[str, typer.Option(help="Text before every caption, such as 'A photo depicts '.", show_default=False)] = "",
    batch: Batch = 32,
    device: Device = None,
    workers: Workers = None,
    values: Values = None,
    as_json: Json = False,
) -> None:
    """Measure how well pictures fit their captions by CLIP.

    CLIP score is the mean cosine of their embeddings times 100, here with its standard error. Scores are comparable only if network,
    clamping and prefix are the same: --json prints the record of all that made the number. Captions that are longer than the network
    reads are counted and named. evaluation/README.md says more. If a picture or a caption is missing or cannot be read there is no
    number, and the exit code is 2.
    """
    chosen = {"model": model, "weights": weights, "prefix": prefix or None, "clamp": "true" if clamp else None}
    options = {name: value for name, value in chosen.items() if value is not None}
    measure("eval clip", "clip", options, pictures, captions, batch, device, workers, values, as_json)
