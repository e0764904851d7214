"""`t2i-experts doctor`: whether this machine can do what it is asked for, and what to do if not."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from t2i_experts.cli.options import Json, check_counts, complete_config

if TYPE_CHECKING:
    from t2i_experts.cli.findings import Finding


def doctor(
    config: Annotated[
        str | None,
        typer.Argument(
            metavar="CONFIG", help="What is to be trained: a YAML file, or a shipped config's name.", autocompletion=complete_config
        ),
    ] = None,
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Values that replace the file's.")] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Run training steps, and compare memory with the estimate.")] = False,
    shards: Annotated[bool, typer.Option(help="Measure how fast the training shards are read, if they are there.")] = True,
    processes: Annotated[int, typer.Option(help="Processes that share a training batch, one a GPU.")] = 1,
    pictures: Annotated[int, typer.Option(help="Pictures drawn together, for the estimate of sampling's memory.")] = 8,
    as_json: Json = False,
) -> None:
    """Look at the installation, the GPUs and the disk; with CONFIG also whether it can be trained here, and with how much memory.

    No weights are downloaded; shards behind URLs are read for some seconds (and pipe: commands run) unless --no-shards. Exit code 1 if
    something is wrong; each problem comes with what to do about it.
    """
    check_counts(processes=processes, pictures=pictures)
    if config is None and measure:
        raise ValueError("--measure needs a CONFIG to measure")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before anything reads it

    from t2i_experts.cli.environment import devices, disks, packages, parts
    from t2i_experts.cli.findings import document, problems, table

    sections: dict[str, Sequence[Finding]] = {"packages": packages()}
    if problems(sections):
        print("the packages first: what follows needs them", file=sys.stderr)
    else:
        sections |= {"machine": [*devices(), *disks()], "parts": parts()}
        if config is not None:
            sections |= _examine(config, overrides or [], measure=measure, shards=shards, processes=processes, pictures=pictures)
    print(json.dumps(document(sections), ensure_ascii=False) if as_json else table(sections))
    if problems(sections):
        raise typer.Exit(1)


def _examine(
    name: str, overrides: Sequence[str], *, measure: bool, shards: bool, processes: int, pictures: int
) -> dict[str, Sequence[Finding]]:
    """The sections about a config. Raises ValueError for one that is wrong."""
    from t2i_experts.config import load_config

    config = load_config(name, overrides)

    import torch

    from t2i_experts.cli import preflight
    from t2i_experts.cli.findings import Finding
    from t2i_experts.registry import registry
    from t2i_experts.training.measure import measure_training, training_device
    from t2i_experts.training.memory import estimate_sampling, estimate_training, micro_batch
    from t2i_experts.training.trackers import refuse_missing_trackers

    registry.get("sampler", config.sampling.sampler)
    refuse_missing_trackers(config.training.trackers)
    micro_batch(config.training, processes)
    missing = preflight.missing_encoders(config)
    sections: dict[str, Sequence[Finding]] = {"encoders": preflight.encoders(config)}
    codec = preflight.codec(config)
    if codec:
        sections["codec"] = codec
    if begins_with := preflight.initial(config):
        sections["weights"] = begins_with
    sections["shards"] = preflight.shards(config)
    if config.training.compile:
        print("tracing the network as the compiler would, for its memory: up to a minute", file=sys.stderr)
    device = training_device(config)
    memory = estimate_training(config, processes=processes)
    sampling = estimate_sampling(config.stage, pictures, torch.bfloat16 if device.type == "cuda" else torch.float32)
    sections |= {"disk": preflight.disk(config, memory), "memory": preflight.memory_rows(config, memory, sampling)}
    measured = None
    lacking = [f"the encoders {', '.join(missing)}"] if missing else []
    lacking += ["the codec"] if any(row.problem for row in codec) else []
    if measure and lacking:
        problem = f"--measure: get {' and '.join(lacking)} first"
        sections["measured"] = [Finding("training", "not measured", problem=problem)]
    elif measure:
        try:
            measured = measure_training(config, processes=processes)
            sections["measured"] = preflight.measured_rows(memory, measured)
        except torch.OutOfMemoryError as error:
            problem = f"--measure: {str(error).split('. ')[0]}; what to do is said under memory"
            sections["measured"] = [Finding("training", "out of memory", problem=problem)]
    if shards and not any(row.problem for row in sections["shards"] if row.name.startswith("train")):
        sections["throughput"] = preflight.throughput(config, missing, measured, processes=processes)
    return sections
