"""Experts by range of noise on points in the plane, where the ideal denoiser is known: what each step of the idea is worth.

    python scripts/experiments/toy_experts.py [--out DIR] [--seeds N] [--steps N] [--root-steps N]

For each seed, one small network is trained on all noise, the root. Out of it grows the tree of three leaves, the lowest eighth of
the training noise, the highest eighth, and what lies between. The control is the root trained on for as many steps as all nodes of
the tree together, in one run with the same warm-up and decay. Then come the tree's first two nodes, split hard and blended; the leaves
merged into one network; experts for the same three ranges trained as DeMe does, straight from the root and with the tree's steps, each
answering for its range and merged; the leaves cut to a low rank, and such differences trained, with the tree's steps.

Writes table.md, loss.png and samples.png.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from toy_data import Mixture, sliced_wasserstein, spiral_of_rings
from toy_report import draw_losses, draw_samples, table

from t2i_experts.diffusion.loss import EDMLoss
from t2i_experts.diffusion.precond import EDMPrecond
from t2i_experts.diffusion.samplers import karras_sigmas, sample_heun
from t2i_experts.experts.blend import RatioBlend
from t2i_experts.experts.decouple import DecoupleLoss, ProbabilisticInterval
from t2i_experts.experts.ensemble import ExpertEnsemble
from t2i_experts.experts.interval import NoiseInterval, complement, node_name
from t2i_experts.experts.lowrank import Decomposition, restore
from t2i_experts.experts.lowrank_training import add_low_rank, low_rank_difference
from t2i_experts.experts.merge import merge
from t2i_experts.experts.merge_search import search_coordinates
from t2i_experts.experts.plan import COMPLEMENT, ROOT, Node, TreePlan
from t2i_experts.experts.ratio import SigmoidRatio
from t2i_experts.experts.states import State, count_bytes
from t2i_experts.nn.embeddings import fourier_features
from t2i_experts.types import Conditioning, Denoiser, Embedding

BATCH, RATE, WARMUP, DRAWN = 256, 1e-2, 50, 100
EDM_LOSS = EDMLoss()
SIGMAS = torch.logspace(math.log10(0.005), math.log10(40), 31)
STEPS, DRAWS = 24, 8192  # of the sampler, Heun's; points that it draws
CURVES = (
    "root, trained on",
    "three experts",
    "two experts, blended",
    "decoupled, merged (DeMe)",
    "low rank, trained",
)
RANK = 6  # of low-rank experts, whose matrices are 32 x 32


class Points(nn.Module):
    """Three hidden layers over waves of both coordinates and the noise, with EDM's network interface; there is no prompt."""

    def __init__(self, width: int = 32, waves: int = 8) -> None:
        super().__init__()
        self.waves = waves
        sizes = [2 + 4 * waves, width, width, width, 2]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))

    def project(self, embeddings: Mapping[str, Embedding]) -> dict[str, Tensor]:
        """Nothing depends on a prompt, and something must."""
        return {"nothing": embeddings["none"].mask}

    def forward(self, x: Tensor, c_noise: Tensor, projected: Mapping[str, Tensor]) -> Tensor:
        """x: (B, 2, 1, 1); c_noise: (B,). Returns (B, 2, 1, 1)."""
        point = x[:, :, 0, 0].float()
        waves = fourier_features(point.flatten(), self.waves, octaves=(-2, 1)).view(len(x), -1)
        h = torch.cat([point, waves, fourier_features(c_noise, 2 * self.waves, octaves=(-3, 1))], dim=1)
        for layer in self.layers[:-1]:
            h = F.silu(layer(h))
        result: Tensor = self.layers[-1](h)
        return result[:, :, None, None]


def nothing(count: int) -> Conditioning:
    """The conditioning of `count` points."""
    return Conditioning({"none": Embedding.null(count, 1, 1)})


def grow(root_steps: int, steps: int) -> TreePlan:
    """The tree whose leaves are the lowest eighth of p(sigma), the highest, and the rest. Images of a node: its batches' points."""
    everything = NoiseInterval(Fraction(0), Fraction(1))
    places = [(1, 0), (2, 0), (3, 0), (1, 1), (2, 3), (3, 7)]
    nodes = [
        Node(node_name(level, i), NoiseInterval.node(level, i), node_name(level - 1, i // 2) if level > 1 else ROOT, steps * BATCH)
        for level, i in places
    ]
    (rest,) = complement([NoiseInterval.node(3, 0), NoiseInterval.node(3, 7)], everything)
    return TreePlan((Node(ROOT, everything, None, root_steps * BATCH), Node(COMPLEMENT, rest, ROOT, 3 * steps * BATCH), *nodes))


def train(
    network: EDMPrecond,
    data: Mixture,
    interval: NoiseInterval | ProbabilisticInterval,
    steps: int,
    generator: torch.Generator,
    loss: EDMLoss | DecoupleLoss = EDM_LOSS,
    rank: int = 0,
) -> EDMPrecond:
    """Trains a copy on some noise: AdamW with a fresh state, a short warm-up, then half a cosine down to zero.

    rank: of the difference that is trained; 0 for all weights.
    """
    network, empty = copy.deepcopy(network).requires_grad_(True), nothing(BATCH)
    if rank:
        add_low_rank(network, rank)
    optimizer = torch.optim.AdamW(network.parameters(), RATE, weight_decay=0.0, fused=True)
    for step in range(steps):
        if step % DRAWN == 0:
            sigmas = interval.sample(DRAWN * BATCH, generator=generator).float().split(BATCH)
            points = data.sample(DRAWN * BATCH, generator).split(BATCH)
            eps = torch.randn(DRAWN * BATCH, 2, 1, 1, generator=generator).split(BATCH)
        rate = RATE * min((step + 1) / WARMUP, (1 + math.cos(math.pi * step / steps)) / 2)
        optimizer.param_groups[0]["lr"] = rate
        i = step % DRAWN
        loss(network, points[i], sigmas[i], eps[i], empty).mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return network.requires_grad_(False).eval()


@torch.no_grad()
def excess(denoiser: Denoiser, data: Mixture, sigma: Tensor, seed: int) -> float:
    """What the loss is above the ideal denoiser's: E lambda(sigma) |D - D_ideal|^2 / 2 at these noise levels, (B,), on fresh points."""
    generator = torch.Generator().manual_seed(seed)
    noisy = data.sample(len(sigma), generator) + sigma[:, None, None, None] * torch.randn(len(sigma), 2, 1, 1, generator=generator)
    error = (denoiser(noisy, sigma, nothing(len(sigma))) - data.denoise(noisy, sigma)).square().mean(dim=(1, 2, 3))
    return float((EDM_LOSS.weight(sigma) * error).mean())


def spread_sigmas(interval: NoiseInterval, count: int) -> Tensor:
    """Noise levels evenly spread over the quantiles of an interval, (count,)."""
    return interval.from_uniform((torch.arange(count, dtype=torch.float64) + 0.5) / count).float()


@torch.no_grad()
def denoising_loss(denoiser: Denoiser, data: Mixture, seed: int, count: int = 8192) -> float:
    """EDM's loss over all noise as one measures it where no ideal is known; the same points and noise for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    points, eps = data.sample(count, generator), torch.randn(count, 2, 1, 1, generator=generator)
    sigma = spread_sigmas(NoiseInterval(Fraction(0), Fraction(1)), count)
    return float(EDM_LOSS(denoiser, points, sigma, eps, nothing(count)).mean())


@torch.no_grad()
def draw(denoiser: Denoiser, seed: int, count: int = DRAWS) -> Tensor:
    """(count, 2, 1, 1) points drawn by Heun's sampler."""
    noise = torch.randn(count, 2, 1, 1, generator=torch.Generator().manual_seed(seed))
    return sample_heun(denoiser, 80 * noise, karras_sigmas(STEPS), nothing(count))


@dataclass
class Grown:
    """One seed's networks, as denoisers by name, their bytes, and the weights of merges."""

    denoisers: dict[str, Denoiser] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)
    weights: dict[str, tuple[float, ...]] = field(default_factory=dict)

    def add(self, name: str, denoiser: Denoiser, size: int) -> None:
        self.denoisers[name], self.bytes[name] = denoiser, size


def loaded(like: EDMPrecond, state: State) -> EDMPrecond:
    """A network with these weights."""
    network = copy.deepcopy(like)
    network.load_state_dict(dict(state))
    return network


def run(seed: int, data: Mixture, plan: TreePlan, root_steps: int) -> Grown:
    """Trains the root, the control and the tree, and makes of them what is compared."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    fresh = EDMPrecond(Points())
    root = train(fresh, data, plan.root.interval, root_steps, generator)
    networks = {ROOT: root}
    for node in plan.nodes[1:]:
        assert node.parent is not None
        networks[node.name] = train(networks[node.parent], data, node.interval, node.images // BATCH, generator)
    total = sum(node.images // BATCH for node in plan.nodes[1:])
    control = train(root, data, plan.root.interval, total, generator)

    grown, size = Grown(), count_bytes(root.state_dict())
    grown.add("root", root, size)
    grown.add("root, trained on", control, size)
    grown.add("three experts", route(plan, [networks[leaf.name] for leaf in plan.leaves]), 3 * size)
    high, low = networks["E^1_1"], networks["E^1_0"]
    grown.add("two experts, hard split", RatioBlend(high, low, SigmoidRatio(math.inf)), 2 * size)
    grown.add("two experts, blended", RatioBlend(high, low, SigmoidRatio(20.0)), 2 * size)

    leaves = [networks[leaf.name] for leaf in plan.leaves]
    own, weights = merged(root, leaves, data, seed)
    grown.add("three experts, merged", own, size)
    grown.weights["merged"] = weights

    each = total // len(leaves)  # the same steps in all, straight from the root
    near = [train(root, data, ProbabilisticInterval(leaf.interval, 0.3), each, generator, DecoupleLoss(root)) for leaf in plan.leaves]
    own, weights = merged(root, near, data, seed)
    grown.add("decoupled, routed", route(plan, near), 3 * size)
    grown.add("decoupled, merged (DeMe)", own, size)
    grown.weights["decoupled, merged"] = weights

    small = [train(root, data, leaf.interval, each, generator, rank=RANK) for leaf in plan.leaves]
    trained = [low_rank_difference(network.state_dict(), root.state_dict()) for network in small]
    cut = [Decomposition(root.state_dict(), leaf.state_dict()).within(trained[0].bytes) for leaf in leaves]
    for name, differences in ("low rank, cut", cut), ("low rank, trained", trained):
        restored = [loaded(root, restore(root.state_dict(), difference)) for difference in differences]
        grown.add(name, route(plan, restored), size + sum(difference.bytes for difference in differences))
    return grown


def merged(root: EDMPrecond, experts: Sequence[EDMPrecond], data: Mixture, seed: int) -> tuple[EDMPrecond, tuple[float, ...]]:
    """One network out of several, with weights searched for by the plain loss, and these weights."""

    def loss(split: int) -> Callable[[State], float]:
        return lambda state: denoising_loss(loaded(root, state), data, seed=split + seed)

    states = [expert.state_dict() for expert in experts]
    search = search_coordinates(root.state_dict(), states, loss(1_000), loss(2_000))
    return loaded(root, merge(root.state_dict(), states, search.best.weights)), search.best.weights


def route(plan: TreePlan, networks: Sequence[EDMPrecond]) -> ExpertEnsemble:
    """Networks for the leaves' ranges of noise as one denoiser."""
    return ExpertEnsemble([(leaf.interval, network) for leaf, network in zip(plan.leaves, networks, strict=True)])


def measure(grown: Grown, data: Mixture, plan: TreePlan, seed: int) -> dict[str, dict[str, float]]:
    """For each denoiser: the excess loss over all noise and inside each leaf's range, and the distance of its samples."""
    ranges = {"all noise": plan.root.interval, **{leaf.name: leaf.interval for leaf in plan.leaves}}
    fresh = data.spread(DRAWS, torch.Generator().manual_seed(3_000 + seed))
    rows = {}
    for name, denoiser in grown.denoisers.items():
        rows[name] = {where: excess(denoiser, data, spread_sigmas(i, 8192), 4_000 + seed) for where, i in ranges.items()}
        rows[name]["distance"] = sliced_wasserstein(draw(denoiser, 5_000 + seed), fresh)
    rows["fresh points"] = {"distance": sliced_wasserstein(data.sample(DRAWS, torch.Generator().manual_seed(6_000 + seed)), fresh)}
    return rows


def curve(grown: Sequence[Grown], name: str, data: Mixture) -> list[tuple[float, float]]:
    """The excess loss over sigma relative to the root's of the same seed, geometric means over seeds."""

    def ratio(one: Grown, sigma: Tensor) -> float:
        loss, before = (excess(one.denoisers[which], data, sigma.expand(8192), 7) for which in (name, "root"))
        return math.log(loss / before)

    return [(float(sigma), math.exp(float(np.mean([ratio(one, sigma) for one in grown])))) for sigma in SIGMAS]


def main() -> None:
    """Reads the command line, trains, measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("data/experiments/toy"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300, help="of each node of the tree but the complement, which has three times as many")
    parser.add_argument("--root-steps", type=int, default=6000)
    arguments = parser.parse_args()
    began, data, plan = time.monotonic(), spiral_of_rings(), grow(arguments.root_steps, arguments.steps)

    def timed(what: str) -> None:
        print(f"{time.monotonic() - began:5.0f} s  {what}", flush=True)

    grown, rows = [], []
    for seed in range(arguments.seeds):
        grown.append(run(seed, data, plan, arguments.root_steps))
        timed(f"seed {seed} trained")
        rows.append(measure(grown[-1], data, plan, seed))
        timed(f"seed {seed} measured")
    arguments.out.mkdir(parents=True, exist_ok=True)
    weights = {name: [one.weights[name] for one in grown] for name in grown[0].weights}
    text = table(rows, ["all noise", *(leaf.name for leaf in plan.leaves)], grown[0].bytes, weights)
    (arguments.out / "table.md").write_text(text, encoding="utf-8")
    edges = [leaf.interval.sigma_hi for leaf in plan.leaves[:-1]]
    draw_losses({name: curve(grown, name, data) for name in CURVES}, edges, len(grown)).save(arguments.out / "loss.png")
    points = {name: draw(denoiser, 5_000) for name, denoiser in grown[0].denoisers.items() if name in ("root", *CURVES)}
    draw_samples({"data": data.sample(DRAWS, torch.Generator().manual_seed(8)), **points}).save(arguments.out / "samples.png")
    timed(f"wrote {arguments.out}")
    print(text)


if __name__ == "__main__":
    main()
