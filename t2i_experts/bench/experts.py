"""An ensemble beside a single network of the same size: what it costs to hold several and to choose among them.

Sampling itself, without encoders: a prompt is projected by every network that evaluates, and evaluated in each of the steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import pairwise

import torch
from torch import Tensor

from t2i_experts.bench.device import free
from t2i_experts.bench.machine import describe
from t2i_experts.bench.network import Size, captions, noise_images, own_network, size_named
from t2i_experts.bench.result import Result, Row
from t2i_experts.bench.timing import interleave
from t2i_experts.cascade.device import default_dtype
from t2i_experts.cascade.graphs import GraphedDenoiser, GraphMemory
from t2i_experts.diffusion.guidance import ClassifierFreeGuidance
from t2i_experts.diffusion.samplers import karras_sigmas, sample_dpmpp_2m
from t2i_experts.experts.ensemble import ExpertEnsemble
from t2i_experts.experts.interval import NoiseInterval
from t2i_experts.types import Conditioning, Denoiser

EDGES = tuple(Fraction(u) for u in ("0", "1/8", "511/512", "1"))
"""Of eDiff-I's three base experts, in quantiles."""
GUIDANCE = 4.0
_CALLS = 10_000


def bench_experts(
    network: str, batches: Sequence[int], device: torch.device, *, steps: int = 25, eager: bool = False, repeats: int = 20
) -> Result:
    """Sampling with one network, and with three that have weights of their own and are all on the device.

    ratio: over one network. routing us: what the ensemble's choice takes of an evaluation, on the CPU. weights MB: of all networks.
    Raises ValueError for settings that are out of range.
    """
    size = size_named(network)
    if not batches or min(batches) < 1 or steps < 1:
        raise ValueError(f"--batch={list(batches)} and --steps={steps} must be numbers of at least 1")
    rows: list[Row] = []
    for compiled in [False] if eager else [False, True]:
        how = "eager" if not compiled else "compiled, graphs" if device.type == "cuda" else "compiled"
        nets = [_network(size, device, seed, compiled=compiled) for seed in range(len(EDGES) - 1)]
        single, ensemble = _ready([nets[0]] * len(nets), device, compiled), _ready(nets, device, compiled)
        for batch in batches:
            candidates = {
                f"batch {batch}: one network, {how}": _sampling(single.networks[0], size, batch, device, steps),
                f"batch {batch}: {len(nets)} experts, {how}": _sampling(ensemble, size, batch, device, steps),
            }
            timings = interleave(candidates, device, repeats=repeats)
            (one, first), (several, second) = timings.items()
            weights = sum(tensor.nbytes for tensor in nets[0].parameters()) / 1e6
            rows.append(Row(one, first, more={"weights MB": weights}))
            more = {"routing us": routing_seconds(ensemble) * 1e6, "weights MB": len(nets) * weights}
            rows.append(Row(several, second, ratio=first.median / second.median, more=more))
        del nets, single, ensemble, candidates
        free(device)
    settings = {"network": network, "steps": steps, "guidance": GUIDANCE, "dtype": str(default_dtype(device)), "repeats": repeats}
    return Result("experts", describe(device), settings, rows)


def routing_seconds(ensemble: ExpertEnsemble) -> float:
    """Seconds that an ensemble takes of an evaluation: with networks in the place of its own that do nothing."""
    idle = ensemble.map(lambda network: lambda x, sigma, conditioning: x)
    x, sigma = torch.zeros(1), torch.tensor(1.0, dtype=torch.float64)
    text = idle.prepare(captions(1, torch.device("cpu")))
    (_, first), *_ = idle.experts
    seconds = []
    for denoiser in (idle, first):
        started = time.perf_counter()
        for _ in range(_CALLS):
            denoiser(x, sigma, text)
        seconds.append((time.perf_counter() - started) / _CALLS)
    return seconds[0] - seconds[1]


def _network(size: Size, device: torch.device, seed: int, *, compiled: bool) -> torch.nn.Module:
    """Weights of its own, in the dtype that sampling computes in."""
    network = own_network(size, device).eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(seed)
    for parameter in network.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator, device=device) * parameter.std(correction=0) * 0.01)
    network = network.to(default_dtype(device))
    if compiled:
        network.compile(dynamic=False)
    return network


def _ready(networks: Sequence[torch.nn.Module], device: torch.device, compiled: bool) -> ExpertEnsemble:
    """The networks as an ensemble, as `CascadePipeline` has it; of one network several times, it holds that one."""
    intervals = [NoiseInterval(lo, hi) for lo, hi in pairwise(EDGES)]
    ensemble = ExpertEnsemble(list(zip(intervals, networks, strict=True)))
    memory = GraphMemory()
    return ensemble.map(lambda network: GraphedDenoiser(network, memory)) if compiled and device.type == "cuda" else ensemble


def _sampling(denoiser: Denoiser, size: Size, batch: int, device: torch.device, steps: int) -> Callable[[], Tensor]:
    noise = noise_images(size, batch, device, 0) * 80
    text, null, sigmas = captions(batch, device), captions(1, device), karras_sigmas(steps)
    guided = ClassifierFreeGuidance(denoiser, null, GUIDANCE)

    def call() -> Tensor:
        with torch.no_grad():
            prompt = Conditioning(text.embeddings)  # of which nothing is known yet
            return sample_dpmpp_2m(guided, noise, sigmas, guided.prepare(prompt))

    return call
