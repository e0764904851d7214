"""`t2i-experts experts boundaries`: where a trained model would have the noise split, so that each expert has the same amount to learn."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from t2i_experts.cli.importing import without_collecting
from t2i_experts.cli.options import Json, check_counts

if TYPE_CHECKING:
    from t2i_experts.experts.boundaries import Batch
    from t2i_experts.shards.reader import ShardReader
    from t2i_experts.training.task import DiffusionTask

_KINDS = ("acceleration", "dirichlet")


def boundaries(
    shards: Annotated[str, typer.Option(help="Shard folder of pictures with captions to measure on.")],
    model: Annotated[str | None, typer.Option(help="Model folder or hub id; default: the embedded model.", show_default=False)] = None,
    parts: Annotated[int, typer.Option(help="Experts.")] = 3,
    kind: Annotated[str, typer.Option(help=f"What is measured: {' or '.join(_KINDS)}.")] = "acceleration",
    images: Annotated[int, typer.Option(help="Pictures to measure on.")] = 256,
    batch_size: Annotated[int, typer.Option(help="Pictures in one evaluation.")] = 32,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; default: the best there is.", show_default=False)] = None,
    as_json: Json = False,
) -> None:
    """Measure along the noise how much there is to learn, and split it into equal parts.

    The quantiles are what experts.nodes.NAME.quantiles takes. A small model that was trained for a short time will do.
    """
    check_counts(parts=parts, images=images, batch_size=batch_size)
    if kind not in _KINDS:
        raise ValueError(f"--kind={kind} must be {' or '.join(_KINDS)}")

    with without_collecting():
        import torch

        from t2i_experts.cascade.pipeline import CascadePipeline
        from t2i_experts.diffusion.noise import LogNormalSigma
        from t2i_experts.experts.boundaries import MonitorKind, balanced_quantiles, estimate_monitor
        from t2i_experts.experts.interval import NoiseInterval
        from t2i_experts.shards.reader import ShardReader
        from t2i_experts.training.task import DiffusionTask

    assert get_args(MonitorKind) == _KINDS
    pipeline = CascadePipeline.from_pretrained(model, device=device, dtype=torch.float32)
    stage = pipeline.base
    task = DiffusionTask(stage.config, pipeline.model.conditioner, seed=0, device=pipeline.device, codec=stage.codec)
    reader = ShardReader([shards], size=stage.config.size, seed=0)
    batches = _batches(task, reader, min(images, reader.samples), batch_size)
    noise = LogNormalSigma(stage.config.noise.mean, stage.config.noise.std)
    ends = {"sigma_min": stage.sampling.sigma_min, "sigma_max": stage.sampling.sigma_max}
    monitor = estimate_monitor(stage.denoiser, batches, kind=kind, sigma_data=stage.config.noise.sigma_data, **ends)  # type: ignore[arg-type]
    intervals = [NoiseInterval(u_lo, u_hi, noise) for u_lo, u_hi in balanced_quantiles(monitor, parts, noise)]
    document = {
        "kind": kind,
        "parts": [_plain(interval) for interval in intervals],
        "monitor": {"sigma": monitor.sigmas.tolist(), "density": monitor.density.tolist()},
    }
    typer.echo(json.dumps(document) if as_json else "\n".join(map(str, intervals)))


def _batches(task: DiffusionTask, reader: ShardReader, count: int, batch_size: int) -> Iterator[Batch]:
    """The first pictures with their first captions, as the network sees them in sampling: without the image encoder."""
    import torch

    from t2i_experts.shards.reader import UnreadableSample
    from t2i_experts.training.task import text_inputs

    for start in range(0, count, batch_size):
        samples = []
        for i in range(start, min(start + batch_size, count)):
            try:
                samples.append(reader.item(i))
            except UnreadableSample as error:
                typer.echo(f"left out: {error}", err=True)
        if not samples:
            continue
        pixels = task.images(torch.stack([sample.image for sample in samples]))
        texts = text_inputs(task.conditioner.tokenizer, [s.caption for s in samples], [s.features for s in samples])
        drops = {name: torch.full((len(samples),), name == "clip_image") for name in task.stage.encoders}
        yield task.latents(pixels), task.conditioner.encode(texts, pixels, drops)


def _plain(interval: Any) -> dict[str, Any]:
    from t2i_experts.config import to_plain

    return {
        "quantiles": [str(interval.u_lo), str(interval.u_hi)],
        "sigma": to_plain([interval.sigma_lo, interval.sigma_hi]),
        "training_share": float(interval.share),
    }
