"""What an evaluation will cost, measured on its first pictures: time by the steps of two short samplings, memory as it was seen."""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import replace
from typing import Any

import torch

from t2i_experts.cascade.device import synchronize
from t2i_experts.evaluation.originals import Originals
from t2i_experts.evaluation.seeing import Drawing, Networks, read_squares

_FEW, _MORE = 2, 4


def rehearse(drawing: Drawing, networks: Networks, processes: int, originals: Originals | None, names: list[str]) -> dict[str, Any]:
    """Draws one batch a few times, and shows it and as many of the reference pictures to the networks. Writes nothing.

    processes: that will share the work, each with a device like this. originals, names: of the reference pictures. Raises ValueError as the
    evaluation would for the pictures that it looks at.
    """
    device = drawing.pipeline.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    count = len(drawing.prompts.prompts)
    indices = range(min(drawing.batch_size, count))
    steps = drawing.pipeline.base.steps(drawing.sampling)
    _seconds_to_draw(drawing, networks, indices, min(_FEW, steps))  # what is loaded, compiled or recorded only once
    if steps <= _MORE:
        batch_seconds, how = _seconds_to_draw(drawing, networks, indices, steps), f"all {steps} steps"
    else:
        few, more = (_seconds_to_draw(drawing, networks, indices, n) for n in (_FEW, _MORE))
        batch_seconds = few + max(more - few, 0.0) * (steps - _FEW) / (_MORE - _FEW)
        how = f"{_FEW} and {_MORE} of {steps} steps, drawn on in a straight line"
    short = replace(drawing, sampling=drawing.sampling.for_all(steps=min(_FEW, steps)))
    squares = torch.stack(list(short.squares(indices, networks.resolution)))
    captions = [drawing.prompts.texts[i] for i in indices]
    labels = [f"picture {i}" for i in indices]
    networks.see(squares, captions, labels)
    started = time.perf_counter()
    networks.see(squares, captions, labels)
    picture_seconds = (batch_seconds + time.perf_counter() - started) / len(indices)
    reference_seconds = 0.0
    if originals is not None and names:
        some = names[: networks.pace.batch]
        started = time.perf_counter()
        found = list(read_squares(originals, some, networks))
        bad = [line for line in found if isinstance(line, str)]
        if bad:
            raise ValueError(f"{originals.path}: {bad[0]}")
        networks.see(torch.stack([one[0] for one in found if not isinstance(one, str)]), None, some)
        reference_seconds = (time.perf_counter() - started) / len(some)
    seconds = (picture_seconds * count + reference_seconds * len(names)) / processes
    dimension = 0 if networks.extractor is None else networks.extractor.dimension
    row = 4 * dimension + 40
    memory = {
        "device_peak_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        "process_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        "statistics_bytes": 8 * 8 * dimension**2,
        "parts_bytes_on_disk": row * (count + len(names)) + 8 * len(networks.metrics) * count,
    }
    return {
        "seconds": round(seconds, 1),
        "seconds_a_picture": round(picture_seconds, 4),
        "seconds_a_reference": round(reference_seconds, 4),
        "processes": processes,
        "measured": f"one batch of {len(indices)}: {how}; {min(len(names), networks.pace.batch)} reference pictures",
        "memory": memory,
    }


def _seconds_to_draw(drawing: Drawing, networks: Networks, indices: range, steps: int) -> float:
    short = replace(drawing, sampling=drawing.sampling.for_all(steps=steps))
    started = time.perf_counter()
    for _ in short.squares(indices, networks.resolution):
        pass
    synchronize(drawing.pipeline.device)
    return time.perf_counter() - started
