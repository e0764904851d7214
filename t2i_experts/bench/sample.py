"""From a prompt to a picture: the whole time, and whether anything in the loop waits, is compiled again or is copied from the device."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters

from t2i_experts.bench.error import exact_float32, relative_rms
from t2i_experts.bench.floor import bandwidth, flops, matrix_rate
from t2i_experts.bench.machine import describe
from t2i_experts.bench.result import Result, Row
from t2i_experts.bench.timing import interleave
from t2i_experts.cascade.graphs import GraphedDenoiser
from t2i_experts.cascade.pipeline import CascadePipeline, start_noise
from t2i_experts.config import SamplingConfig
from t2i_experts.experts.ensemble import ExpertEnsemble, each_network
from t2i_experts.training.allocations import held_by
from t2i_experts.types import Denoiser

PROMPTS = ["a red apple", "a cat to the left of a pine tree", "two blue fish", "a house on a pink background", "a 3D emoji of an owl"]
_GUIDANCES = (3.0, 2.0, 4.0, 3.5, 5.0)
_SIGMAS = (80.0, 60.0, 40.0, 70.0, 50.0)


def bench_sample(
    model: str | None, device: torch.device, *, steps: int = 25, batch: int = 1, compile: bool = False, repeats: int = 10
) -> Result:
    """`batch` pictures of a prompt, from its text to uint8 on the CPU, by `steps` of DPM-Solver++(2M) with guidance.

    Rows: every kernel launched by itself; on CUDA, evaluations replayed as graphs; and the better of these compiled. floor: all evaluations
    at the matrix rate and all weights once an evaluation at the bandwidth of this run. error: of the picture, against float32. The other
    columns are counts a step in five pictures of other prompts, guidances and noise levels, after the first: compilations and graph
    breaks, copies from the device beside the picture itself, and launches by the CPU. Raises ValueError for a model that cannot be loaded.
    """
    pipelines = {"eager": _eager(CascadePipeline.from_pretrained(model, device=device))}
    graphs = ", graphs" if device.type == "cuda" else ""
    if graphs:
        pipelines["eager, graphs"] = CascadePipeline.from_pretrained(model, device=device)
    if compile:
        pipelines[f"compiled{graphs}"] = CascadePipeline.from_pretrained(model, device=device, compile=True)
    first = pipelines["eager"]
    sampling = first.settings(sampler="dpmpp_2m", steps=steps)

    def drawing(pipeline: CascadePipeline) -> Callable[[], Tensor]:
        return lambda: pipeline([PROMPTS[0]] * batch, sampling=sampling)

    timings = interleave({name: drawing(pipeline) for name, pipeline in pipelines.items()}, device, repeats=repeats)
    with exact_float32():
        exact = _denoised(_eager(CascadePipeline.from_pretrained(model, device=device, dtype=torch.float32)), sampling)
    least = steps * _floor(first, sampling, batch)
    slowest = timings["eager"].median
    rows = []
    for name, pipeline in pipelines.items():
        error = relative_rms([_denoised(pipeline, sampling)], [exact])
        ratio = None if name == "eager" else slowest / timings[name].median
        rows.append(Row(name, timings[name], ratio, timings[name].median / least, error=error, more=_counts(pipeline, sampling, batch)))
    settings = {"model": model or "embedded", "steps": steps, "batch": batch, "guidance": sampling.guidance, "repeats": repeats}
    return Result("sample", describe(device), settings, rows)


def _eager(pipeline: CascadePipeline) -> CascadePipeline:
    """The same pipeline without graphs."""

    def plain(network: Denoiser) -> Denoiser:
        return network.denoiser if isinstance(network, GraphedDenoiser) else network

    stages = {name: replace(stage, denoiser=each_network(stage.denoiser, plain)) for name, stage in pipeline.model.stages.items()}
    return CascadePipeline(replace(pipeline.model, stages=stages), pipeline.device, pipeline.dtype)


def _denoised(pipeline: CascadePipeline, sampling: SamplingConfig) -> Tensor:
    """The picture as the sampler gives it, (1, 3, H, W) float32."""
    stage = pipeline.base
    noise = start_noise(0, 0, stage.noise_shape)[None].to(pipeline.device)
    return stage.sample(noise, pipeline.model.conditioner([PROMPTS[0]]), pipeline.model.conditioner.null(), sampling)


def _floor(pipeline: CascadePipeline, sampling: SamplingConfig, batch: int) -> float:
    """Seconds of one evaluation at best: the operations of both branches at the matrix rate, and the weights at the bandwidth.

    Of an ensemble: the operations of the expert at sigma 1, and the weights of the average one.
    """
    stage, device = pipeline.base, pipeline.device
    rows = batch if sampling.guidance == 1 else 2 * batch
    denoiser: Any = stage.denoiser
    x = torch.zeros(rows, *stage.noise_shape, device=device)
    conditioning = pipeline.model.conditioner(PROMPTS[:1] * rows)
    with torch.no_grad():
        prepared = denoiser.prepare(conditioning)
    operations = flops(lambda: denoiser(x, torch.ones(()), prepared))
    networks = denoiser.networks if isinstance(denoiser, ExpertEnsemble) else (denoiser,)
    weights = sum(map(held_by, networks)) / len(networks)
    return operations / matrix_rate(device, pipeline.dtype) + weights / bandwidth(device)


def _counts(pipeline: CascadePipeline, sampling: SamplingConfig, batch: int) -> Mapping[str, float]:
    """What happens in five pictures that differ in everything but their size, per step."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # its lines on stderr say nothing about this
    from torch.profiler import ProfilerActivity, profile

    steps = len(PROMPTS) * sampling.steps
    before = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if pipeline.device.type == "cuda" else [])]
    with profile(activities=activities) as profiler:
        for prompt, guidance, sigma in zip(PROMPTS, _GUIDANCES, _SIGMAS, strict=True):
            pipeline([prompt] * batch, sampling=replace(sampling, guidance=guidance, sigma_max=sigma))
    found = {"compilations": counters["stats"]["unique_graphs"] - before[0], "breaks": sum(counters["graph_break"].values()) - before[1]}
    if pipeline.device.type == "cuda":
        events = [event.key for event in profiler.key_averages() for _ in range(event.count)]
        found["copies"] = sum("Memcpy DtoH" in key for key in events) - len(PROMPTS)
        found["launches"] = sum(key in ("cudaLaunchKernel", "cuLaunchKernel", "cudaLaunchKernelExC", "cudaGraphLaunch") for key in events)
    return {name: count / steps for name, count in found.items()}
