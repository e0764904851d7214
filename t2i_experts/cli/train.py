"""`t2i-experts train CONFIG [key=value ...]`."""

from __future__ import annotations

import json
import signal
import sys
from typing import Annotated

import typer

from t2i_experts.cli.options import Config, Json, Overrides


def train(
    config: Config,
    overrides: Overrides = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
    as_json: Json = False,
) -> None:
    """Train one stage, or go on where it stopped: run the same command again.

    On several GPUs or hosts: accelerate launch -m t2i_experts train CONFIG. SIGTERM and Ctrl-C end the step, write a checkpoint and stop.
    """
    from t2i_experts.cli.config import check_parts
    from t2i_experts.config import load_config
    from t2i_experts.config.expert_rules import whole

    resolved = load_config(config, overrides or [])
    check_parts(resolved)  # an unknown sampler would be noticed only when the trained model is used

    from t2i_experts.training.trainer import Trainer

    trainer = Trainer(resolved, progress=not quiet)
    main = trainer.accelerator.is_main_process
    if main and trainer.resumed_from:
        print(f"going on from {trainer.resumed_from}", file=sys.stderr)
    if main:
        seen, total, size = trainer.state.images_seen, resolved.training.images, trainer.sizes()
        data = f"{size['samples']:,} samples" if "samples" in size else f"{size['tars']:,} remote tars"
        print(f"{size['parameters']:,} parameters on {trainer.device}, {data}, into {trainer.root}", file=sys.stderr)
        if seen > total:
            print(f"the run has already seen {seen:,} images, more than training.images={total:,}", file=sys.stderr)
    try:
        model = trainer.run()
    except KeyboardInterrupt:
        seen = trainer.state.images_seen
        raise KeyboardInterrupt(f"interrupted after {seen:,} images; the same command goes on from the last checkpoint") from None
    stopped = trainer.stopped_by
    if main:
        seen, total = trainer.state.images_seen, resolved.training.images
        why = f" by {stopped.name}" if stopped else ""
        state = "finished" if seen >= total else f"stopped{why} at {seen} of {total} images; the same command goes on"
        print(f"{state}; model: {model}", file=sys.stderr)
        expert = not whole(resolved.stage.noise.quantiles)
        alone = "an expert for a part of the noise, which draws no picture alone"
        print(alone if expert else f't2i-experts generate "..." --model {model}', file=sys.stderr)
        if as_json:
            facts = {"output": str(trainer.root), "model": str(model), "images_seen": seen, "images": total, "finished": seen >= total}
            print(json.dumps({**facts, "stopped_by": stopped.name if stopped else None, "parameters": trainer.sizes()["parameters"]}))
    if stopped is signal.SIGINT:
        raise typer.Exit(130)
