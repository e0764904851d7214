"""Experts by range of noise on points in the plane, where the ideal denoiser is known: what each step of the idea is worth, in a minute.

    python scripts/experiments/toy_experts.py [--out DIR] [--seeds N] [--steps N] [--root-steps N]

For each seed, one small network is trained on all noise, the root. Out of it grows the tree of three leaves, the lowest eighth of
the training noise, the highest eighth, and what lies between. The control is the root trained on for as many steps as all nodes of
the tree together, in one run with the same warm-up and decay. Then come a blend of the tree's first two nodes, the leaves merged into one
network, and the leaves as low-rank differences from the root.

Writes table.md, loss.png and samples.png.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from toy_data import Mixture, sliced_wasserstein, spiral_of_rings
from torch import Tensor, nn
from torch.nn import functional as F

from t2i_experts.charts import Chart, Marks, Series, draw_chart, draw_grid, palette
from t2i_experts.diffusion.loss import EDMLoss
from t2i_experts.diffusion.precond import EDMPrecond
from t2i_experts.diffusion.samplers import karras_sigmas, sample_heun
from t2i_experts.experts.blend import RatioBlend
from t2i_experts.experts.ensemble import ExpertEnsemble
from t2i_experts.experts.interval import NoiseInterval, complement
from t2i_experts.experts.lowrank import Decomposition, restore
from t2i_experts.experts.merge import merge
from t2i_experts.experts.merge_search import search_coordinates
from t2i_experts.experts.plan import COMPLEMENT, ROOT, Node, TreePlan
from t2i_experts.experts.ratio import SigmoidRatio
from t2i_experts.experts.states import State, count_bytes
from t2i_experts.nn.embeddings import fourier_features
from t2i_experts.types import Conditioning, Denoiser, Embedding

BATCH, RATE, WARMUP, DRAWN = 256, 2e-3, 50, 100
LOW, HIGH = "E^3_0", "E^3_7"
SIGMAS = torch.logspace(math.log10(0.005), math.log10(40), 31)
STEPS = 32  # of the sampler, Heun's
RANK_SHARE = 0.3  # of an expert's bytes, for its low-rank form


class Points(nn.Module):
    """Three hidden layers over a point and the noise, with EDM's network interface; there is no prompt."""

    def __init__(self, width: int = 32, features: int = 16) -> None:
        super().__init__()
        self.features = features
        sizes = [2 + features, width, width, width, 2]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False))

    def project(self, embeddings: Mapping[str, Embedding]) -> dict[str, Tensor]:
        return {"nothing": embeddings["none"].mask}

    def forward(self, x: Tensor, c_noise: Tensor, projected: Mapping[str, Tensor]) -> Tensor:
        noise = fourier_features(c_noise, self.features, octaves=(-3, 1))
        h = torch.cat([x[:, :, 0, 0].float(), noise], dim=1)
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
    parents: dict[str, str | None] = {"E^1_0": ROOT, "E^2_0": "E^1_0", LOW: "E^2_0", "E^1_1": ROOT, "E^2_3": "E^1_1", HIGH: "E^2_3"}
    places = {name: NoiseInterval.node(int(name[2]), int(name[4])) for name in parents}
    (rest,) = complement([places[LOW], places[HIGH]], everything)
    nodes = [Node(name, interval, parents[name], steps * BATCH) for name, interval in places.items()]
    return TreePlan((Node(ROOT, everything, None, root_steps * BATCH), Node(COMPLEMENT, rest, ROOT, 3 * steps * BATCH), *nodes))


def train(network: EDMPrecond, data: Mixture, interval: NoiseInterval, steps: int, generator: torch.Generator) -> EDMPrecond:
    """Trains a copy on one range of noise: AdamW with a fresh state, a short warm-up, then half a cosine down to zero."""
    network = copy.deepcopy(network).requires_grad_(True)
    optimizer = torch.optim.AdamW(network.parameters(), RATE, weight_decay=0.0, fused=True)
    loss, empty = EDMLoss(), nothing(BATCH)
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
    return float((EDMLoss().weight(sigma) * error).mean())


def spread_sigmas(interval: NoiseInterval, count: int) -> Tensor:
    """Noise levels evenly spread over the quantiles of an interval, (count,)."""
    return interval.from_uniform((torch.arange(count, dtype=torch.float64) + 0.5) / count).float()


@torch.no_grad()
def denoising_loss(denoiser: Denoiser, data: Mixture, seed: int, count: int = 8192) -> float:
    """EDM's loss over all noise as one measures it where no ideal is known; the same points and noise for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    points, eps = data.sample(count, generator), torch.randn(count, 2, 1, 1, generator=generator)
    sigma = spread_sigmas(NoiseInterval(Fraction(0), Fraction(1)), count)
    return float(EDMLoss()(denoiser, points, sigma, eps, nothing(count)).mean())


@torch.no_grad()
def draw(denoiser: Denoiser, seed: int, count: int = 4096) -> Tensor:
    """(count, 2, 1, 1) points drawn by Heun's sampler."""
    noise = torch.randn(count, 2, 1, 1, generator=torch.Generator().manual_seed(seed))
    return sample_heun(denoiser, 80 * noise, karras_sigmas(STEPS), nothing(count))


@dataclass
class Grown:
    """One seed's networks, as denoisers by name, their bytes, and the merge's weights."""

    denoisers: dict[str, Denoiser] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)
    weights: tuple[float, ...] = ()

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
    control = train(root, data, plan.root.interval, sum(node.images // BATCH for node in plan.nodes[1:]), generator)

    grown, size = Grown(), count_bytes(root.state_dict())
    grown.add("root", root, size)
    grown.add("root, trained on", control, size)
    grown.add("three experts", route(plan, networks), 3 * size)
    high, low = networks["E^1_1"], networks["E^1_0"]
    grown.add("two experts, hard split", RatioBlend(high, low, SigmoidRatio(math.inf)), 2 * size)
    grown.add("two experts, blended", RatioBlend(high, low, SigmoidRatio(20.0)), 2 * size)

    root_state, leaves = root.state_dict(), [networks[leaf.name].state_dict() for leaf in plan.leaves]
    search = search_coordinates(
        root_state,
        leaves,
        loss=lambda state: denoising_loss(loaded(root, state), data, seed=1_000 + seed),
        held_out=lambda state: denoising_loss(loaded(root, state), data, seed=2_000 + seed),
    )
    grown.weights = search.best.weights
    grown.add("three experts, merged", loaded(root, merge(root_state, leaves, search.best.weights)), size)

    differences = [Decomposition(root_state, leaf).within(int(RANK_SHARE * size)) for leaf in leaves]
    cut = {leaf.name: loaded(root, restore(root_state, d)) for leaf, d in zip(plan.leaves, differences, strict=True)}
    grown.add("three experts, low rank", route(plan, cut), size + sum(d.bytes for d in differences))
    return grown


def route(plan: TreePlan, networks: Mapping[str, EDMPrecond]) -> ExpertEnsemble:
    """The leaves as one denoiser."""
    return ExpertEnsemble([(leaf.interval, networks[leaf.name]) for leaf in plan.leaves])


def measure(grown: Grown, data: Mixture, plan: TreePlan, seed: int) -> dict[str, dict[str, float]]:
    """For each denoiser: the excess loss over all noise and inside each leaf's range, and the distance of its samples."""
    ranges = {"all noise": plan.root.interval, **{leaf.name: leaf.interval for leaf in plan.leaves}}
    fresh = data.sample(4096, torch.Generator().manual_seed(3_000 + seed))
    rows = {}
    for name, denoiser in grown.denoisers.items():
        rows[name] = {where: excess(denoiser, data, spread_sigmas(i, 8192), 4_000 + seed) for where, i in ranges.items()}
        rows[name]["distance"] = sliced_wasserstein(draw(denoiser, 5_000 + seed), fresh)
    rows["fresh points"] = {"distance": sliced_wasserstein(data.sample(4096, torch.Generator().manual_seed(6_000 + seed)), fresh)}
    return rows


def mean_and_error(values: list[float], scale: float = 1.0) -> str:
    """Mean and standard error over seeds."""
    error = np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else math.nan
    return f"{scale * np.mean(values):.2f} ± {scale * error:.2f}"


def table(rows: list[dict[str, dict[str, float]]], grown: list[Grown]) -> str:
    """The means over seeds as Markdown."""
    columns = ["all noise", LOW, COMPLEMENT, HIGH, "distance"]
    lines = [
        "| denoiser | bytes | excess loss x 1000, all noise | lowest eighth | between | highest eighth | samples' distance x 1000 |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in rows[0]:
        cells = [mean_and_error([row[name][c] for row in rows], 1000) if c in rows[0][name] else "" for c in columns]
        lines.append(f"| {name} | {grown[0].bytes[name]:,} | " + " | ".join(cells) + " |" if name in grown[0].bytes else f"| {name} | | " + " | ".join(cells) + " |")
    weights = "; ".join("(" + ", ".join(f"{w:.3g}" for w in one.weights) + ")" for one in grown)
    return "\n".join([*lines, "", f"Weights of the merges, from low noise to high: {weights}.", ""])


def draw_losses(grown: list[Grown], data: Mixture, plan: TreePlan) -> Image.Image:
    """The excess loss over the noise, means over seeds."""
    names = [name for name in grown[0].denoisers if name != "two experts, hard split"]
    series = [
        Series(name, [(float(s), float(np.mean([excess(g.denoisers[name], data, s.expand(4096), 7) for g in grown]))) for s in SIGMAS], colour)
        for name, colour in zip(names, palette(len(names)), strict=True)
    ]
    edges = [leaf.interval.sigma_hi for leaf in plan.leaves[:-1]]
    return draw_chart(
        Chart(
            "Loss above the ideal denoiser's, by noise",
            "sigma",
            "lambda(sigma) |D - ideal|^2",
            series,
            [Marks("edges of the leaves", edges, "#999999")],
            log=True,
            log_x=True,
            better=(0, -1),
            subtitle=f"Points on rings on a spiral; means over {len(grown)} seeds.",
        ),
        height=520,
    )


def draw_samples(grown: Grown, data: Mixture) -> Image.Image:
    """Where the points of data and of each denoiser lie."""

    def picture(points: Tensor) -> Image.Image:
        counts, _, _ = np.histogram2d(*points[:, :, 0, 0].numpy().T, bins=220, range=[[-1.2, 1.2]] * 2)
        return Image.fromarray((255 * np.exp(-0.7 * counts)).astype(np.uint8))

    points = {"data": data.sample(4096, torch.Generator().manual_seed(8))}
    points |= {name: draw(denoiser, 5_000) for name, denoiser in grown.denoisers.items()}
    names = list(points)
    rows = [names[:4], names[4:]]
    halves = [draw_grid([[picture(points[name]) for name in row]], [""], row, cell=240) for row in rows]
    sheet = Image.new("RGB", (halves[0].width, sum(half.height for half in halves)), "white")
    for half, y in zip(halves, (0, halves[0].height), strict=True):
        sheet.paste(half, (0, y))
    return sheet.crop((160, 0, *sheet.size))


def main() -> None:
    """Reads the command line, trains, measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("data/experiments/toy"))
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=400, help="of each node of the tree")
    parser.add_argument("--root-steps", type=int, default=3000)
    arguments = parser.parse_args()
    began, data, plan = time.monotonic(), spiral_of_rings(), grow(arguments.root_steps, arguments.steps)
    timed: Callable[[str], None] = lambda what: print(f"{time.monotonic() - began:5.0f} s  {what}", flush=True)  # noqa: E731
    grown, rows = [], []
    for seed in range(arguments.seeds):
        grown.append(run(seed, data, plan, arguments.root_steps))
        timed(f"seed {seed} trained")
        rows.append(measure(grown[-1], data, plan, seed))
        timed(f"seed {seed} measured")
    arguments.out.mkdir(parents=True, exist_ok=True)
    text = table(rows, grown)
    (arguments.out / "table.md").write_text(text, encoding="utf-8")
    draw_losses(grown, data, plan).save(arguments.out / "loss.png")
    draw_samples(grown[0], data).save(arguments.out / "samples.png")
    timed(f"wrote {arguments.out}")
    print(text)


if __name__ == "__main__":
    main()
