"""`t2i-experts experts loss`: what experts are worth, as loss on held-out pictures in their ranges of noise."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any

import typer

from t2i_experts.cli.importing import without_collecting
from t2i_experts.cli.options import Json, check_counts, tabulated

if TYPE_CHECKING:
    from t2i_experts.cascade.model_folder import LoadedModel
    from t2i_experts.experts.interval import NoiseInterval
    from t2i_experts.training.range_loss import RangeLoss

_DTYPES = ("float32", "bfloat16")


def loss(
    models: Annotated[list[str], typer.Argument(help="Model folders or hub ids; the others are compared with the first.")],
    shards: Annotated[str, typer.Option(help="Shard folder of pictures with captions that none of them was trained on.")],
    at: Annotated[
        str | None,
        typer.Option(
            "--at", metavar="1/8,511/512", help="Quantiles between the ranges; default: those of the first ensemble.", show_default=False
        ),
    ] = None,
    images: Annotated[int, typer.Option(help="Pictures to measure on.")] = 1024,
    draws: Annotated[int, typer.Option(help="Noise levels for each picture in every range.")] = 4,
    batch_size: Annotated[int, typer.Option(help="Pictures in one evaluation.")] = 64,
    dtype: Annotated[str, typer.Option(help="Precision of the networks: float32 or bfloat16.")] = "float32",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; default: the best there is.", show_default=False)] = None,
    as_json: Json = False,
) -> None:
    """Measure the loss on held-out pictures in each expert's range of noise, on the same draws for all models.

    Beside each model's loss stands its change from the first model's in per cent, with the standard error of the paired differences.
    """
    check_counts(images=images, draws=draws, batch_size=batch_size)
    if dtype not in _DTYPES:
        raise ValueError(f"--dtype={dtype} must be {' or '.join(_DTYPES)}")

    with without_collecting():
        from t2i_experts.cascade.device import default_device, open_device
        from t2i_experts.cascade.model_folder import load_model
        from t2i_experts.cli.progress import progress_bar
        from t2i_experts.shards.reader import ShardReader
        from t2i_experts.training.range_loss import range_losses

    chosen = default_device() if device is None else open_device(device, f"--device={device}")
    loaded = [load_model(model, device=chosen) for model in models]
    intervals = _ranges(loaded, at)
    (stage,) = loaded[0].stages.values()
    reader = ShardReader([shards], size=stage.config.size, seed=0)
    with progress_bar("measuring") as progress:
        found = range_losses(
            loaded,
            reader,
            intervals,
            images=images,
            draws=draws,
            batch_size=batch_size,
            device=chosen,
            bf16=dtype == "bfloat16",
            progress=progress,
        )
    if as_json:
        typer.echo(json.dumps(_document(loaded, found, reader.dataset_hash), ensure_ascii=False))
        return
    typer.echo("\n".join(_lines(models, found)))


def _ranges(models: list[LoadedModel], at: str | None) -> list[NoiseInterval]:
    """The ranges between the quantiles that were given, or of the first ensemble's leaves. Raises ValueError if there are none."""
    from dataclasses import replace
    from fractions import Fraction

    from t2i_experts.experts.interval import NoiseInterval

    (first,) = models[0].stages.values()
    if at is None:
        for model in models:
            (stage,) = model.stages.values()
            if stage.leaves:
                return sorted(stage.leaves.values(), key=lambda interval: interval.u_lo)
        raise ValueError("none of the models is an ensemble, which would say the ranges of noise: give --at, for example 1/8,511/512")
    noise = NoiseInterval.from_config(replace(first.config.noise, quantiles=[])).distribution
    try:
        ends = [Fraction(0), *(Fraction(part.strip()) for part in at.split(",")), Fraction(1)]
        return [NoiseInterval(lower, upper, noise) for lower, upper in pairwise(ends)]
    except (ValueError, ZeroDivisionError) as error:
        raise ValueError(f"--at={at} must be ascending quantiles between 0 and 1, numbers or fractions such as 1/8,511/512") from error


def _document(models: list[LoadedModel], found: list[RangeLoss], shards: str) -> dict[str, Any]:
    from t2i_experts.config import to_plain

    def plain(one: RangeLoss) -> dict[str, Any]:
        losses = []
        for i in range(len(models)):
            (mean, error), (change, error_of_change) = one.mean(i), one.change(i)
            losses.append({"loss": mean, "standard_error": error, "change": change, "standard_error_of_change": error_of_change})
        return {
            "quantiles": [str(one.interval.u_lo), str(one.interval.u_hi)],
            "sigma": to_plain([one.interval.sigma_lo, one.interval.sigma_hi]),
            "models": losses,
        }

    return {
        "models": [{"source": model.source, "fingerprint": model.fingerprint} for model in models],
        "shards": shards,
        "images": found[0].losses.shape[1],
        "ranges": [plain(one) for one in found],
    }


def _lines(models: list[str], found: list[RangeLoss]) -> list[str]:
    """A line for each range, and a last one for all noise; two columns for each model but the first."""
    rows = [["sigma", models[0], *(cell for model in models[1:] for cell in (model, "change"))]]
    for one in found:
        (first, error) = one.mean(0)
        cells = [f"{first:.5f} ± {error:.5f}"]
        for i in range(1, len(models)):
            (mean, _), (change, error) = one.mean(i), one.change(i)
            cells += [f"{mean:.5f}", f"{change:+.2%} ± {error:.2%}"]
        rows.append([f"{one.interval.sigma_lo:.4g} .. {one.interval.sigma_hi:.4g}", *cells])
    return tabulated(rows)
