"""`t2i-experts experts`: the tree of experts that grows out of one network."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import typer

from t2i_experts.cli.experts_train import status, train
from t2i_experts.cli.options import Config, Json, Overrides, group, tabulated

if TYPE_CHECKING:
    from fractions import Fraction

    from torch import Tensor

    from t2i_experts.experts.plan import Node, TreePlan

app = group("experts", "Experts for ranges of noise: show the tree, train it, see where it stands.")


@app.command()
def plan(config: Config, overrides: Overrides = None, as_json: Json = False) -> None:
    """Show every node that will be trained: its noise, its share of the training and of the sampling, its parent, its images.

    A node's images are those of its own run, from its parent's weights. The steps are levels of the config's sampling schedule.
    """
    from t2i_experts.config import load_config
    from t2i_experts.diffusion.samplers import karras_sigmas
    from t2i_experts.experts.plan import TreePlan

    resolved = load_config(config, overrides or [])
    tree, sampling = TreePlan.from_config(resolved), resolved.sampling
    sigmas = karras_sigmas(sampling.steps, sampling.sigma_min, sampling.sigma_max, sampling.rho)
    if as_json:
        typer.echo(json.dumps(_document(tree, sigmas), ensure_ascii=False))
        return
    typer.echo("\n".join(_lines(tree, sigmas)))


def _document(tree: TreePlan, sigmas: Tensor) -> dict[str, Any]:
    from t2i_experts.config import to_plain

    steps = len(sigmas) - 1

    def plain(node: Node) -> dict[str, Any]:
        interval = node.interval
        return {
            "name": node.name,
            "parent": node.parent,
            "leaf": node in tree.leaves,
            "images": node.images,
            "sigma": to_plain([interval.sigma_lo, interval.sigma_hi]),
            "quantiles": [str(interval.u_lo), str(interval.u_hi)],
            "training_share": float(interval.share),
            "steps": interval.evaluations(sigmas),
            "schedule_share": interval.evaluations(sigmas) / steps,
        }

    return {"nodes": [plain(node) for node in tree.nodes], "steps": steps, "images": sum(node.images for node in tree.nodes)}


def _lines(tree: TreePlan, sigmas: Tensor) -> list[str]:
    """The table, in which children stand indented below their parents, and leaves are marked."""
    steps = len(sigmas) - 1
    rows = [["node", "sigma", "quantiles", "training noise", f"of {steps} steps", "parent", "images"]]
    for node in tree.nodes:
        interval, inside = node.interval, node.interval.evaluations(sigmas)
        rows.append(
            [
                " " * (len(tree.lineage(node.name)) - 1) + node.name + (" *" if node in tree.leaves else ""),
                f"{interval.sigma_lo:.4g} .. {interval.sigma_hi:.4g}",
                f"{_quantile(interval.u_lo)} .. {_quantile(interval.u_hi)}",
                f"{float(interval.share):.3%}",
                f"{inside} ({inside / steps:.0%})",
                node.parent or "-",
                f"{node.images:,}",
            ]
        )
    leaves, images = len(tree.leaves), sum(node.images for node in tree.nodes)
    return [*tabulated(rows, left=(0, 5)), "", f"* the ensemble: {leaves} of {len(tree.nodes)} nodes; {images:,} images in all"]


def _quantile(u: Fraction) -> str:
    """As a fraction, or rounded where that is long; the document has it exactly."""
    text = str(u)
    return text if len(text) <= len("1023/1024") else f"{float(u):.6g}"


app.command()(train)
app.command()(status)
