"""`t2i-experts experts blend`: two experts that answer together, in a ratio of the noise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from t2i_experts.cli.importing import without_collecting
from t2i_experts.cli.options import Config, Json, Overrides, check_counts

_KINDS = ("linear", "sigmoid", "learned")


def blend(
    config: Config,
    overrides: Overrides = None,
    ratio: Annotated[str, typer.Option(help="linear, sigmoid or learned: how much the high-noise expert says, by the noise.")] = "sigmoid",
    k: Annotated[float | None, typer.Option(help="Steepness of the sigmoid, at which a learned ratio begins; default: 20.")] = None,
    u0: Annotated[str | None, typer.Option(help="Quantile of the noise that both share evenly; default: 1/2.")] = None,
    high: Annotated[str | None, typer.Option("--high", metavar="LEAF", help="The expert for high noise; default: of two leaves.")] = None,
    low: Annotated[str | None, typer.Option("--low", metavar="LEAF", help="The expert for low noise; default: of two leaves.")] = None,
    images: Annotated[
        int | None, typer.Option(help="Train both experts and a learned ratio together, on so many images; default: as they are.")
    ] = None,
    early: Annotated[bool, typer.Option("--early", help="Also take nodes that are still to see some of their images.")] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="The model folder, or the training run; default: in OUTPUT/blends, by the ratio's name.", show_default=False),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32 or bfloat16: of the weights on the disk; default: as they are.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Let two trained leaves of a tree answer together: D = r D_high + (1 - r) D_low.

    With --images an ordinary training run over all noise begins with the two, and trains them and a learned ratio; the same command goes
    on with it.
    """
    from t2i_experts.cli.drawing import check_dtype
    from t2i_experts.config import RatioConfig, check_ratio, load_config, to_yaml
    from t2i_experts.config.expert_rules import require_experts

    check_dtype(dtype)
    check_counts(images=images)
    if ratio not in _KINDS:
        raise ValueError(f"--ratio={ratio} must be one of {', '.join(_KINDS)}")
    if ratio == "linear" and (k is not None or u0 is not None):
        raise ValueError(f"--k={k} --u0={u0} would be ignored: a linear ratio is the quantile itself")
    if ratio == "learned" and images is None:
        raise ValueError("--ratio=learned needs --images: before it is trained it is the sigmoid")
    if images is not None and dtype is not None:
        raise ValueError(f"--dtype={dtype} would be ignored: a training run saves its weights as they are")
    chosen = RatioConfig(kind=ratio, steepness=20.0 if k is None else k, middle="1/2" if u0 is None else u0)  # type: ignore[arg-type]
    check_ratio(chosen, "--ratio")
    resolved = load_config(config, overrides or [])
    require_experts(resolved)

    with without_collecting():
        import torch

        from t2i_experts.training.blending import BLENDS, blend_run, blended_leaves, refuse_other_folder, write_blend_model

    blends = Path(resolved.output) / BLENDS
    if images is not None:
        from t2i_experts.cli.train import train

        run = blends / f"{ratio}-trained" if out is None else out
        experts = blended_leaves(resolved, high, low, early=early)
        text = to_yaml(blend_run(resolved, experts, chosen, images, run))
        file = run.with_name(f"{run.name}.yaml")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
        train(str(file), as_json=as_json)
        return
    folder = blends / ratio if out is None else out
    refuse_other_folder(folder)
    experts = blended_leaves(resolved, high, low, early=early)
    fingerprint = write_blend_model(resolved, experts, chosen, folder, getattr(torch, dtype) if dtype else None)
    names = {side: node.node.name for side, node in experts.items()}
    document = {"folder": str(folder), "fingerprint": fingerprint, **names, "ratio": ratio}
    text = f"{ratio} ratio of {names['high']} above {names['low']}\n{folder}, fingerprint {fingerprint}"
    typer.echo(json.dumps(document, ensure_ascii=False) if as_json else text)
