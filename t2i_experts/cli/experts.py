"""`t2i-experts experts`: the tree of experts that grows out of one network."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from t2i_experts.cli.experts_blend import blend
from t2i_experts.cli.experts_boundaries import boundaries
from t2i_experts.cli.experts_loss import loss
from t2i_experts.cli.experts_merge import merge
from t2i_experts.cli.experts_ranks import ranks
from t2i_experts.cli.experts_train import status, train
from t2i_experts.cli.importing import without_collecting
from t2i_experts.cli.options import Config, Json, Overrides, group, tabulated

if TYPE_CHECKING:
    from fractions import Fraction

    from torch import Tensor

    from t2i_experts.cascade.assembly import Assembly
    from t2i_experts.experts.plan import Node, TreePlan

app = group("experts", "Experts for ranges of noise: show the tree, train it, see where it stands, make one model of it.")


@app.command()
def plan(config: Config, overrides: Overrides = None, as_json: Json = False) -> None:
    """Show every node that will be trained: its noise, its share of the training and of the sampling, its parent, its images.

    A node's images are those of its own run, from its parent's weights. The steps are levels of the config's sampling schedule, with those
    that experts have of their own.
    """
    from t2i_experts.config import load_config
    from t2i_experts.experts.plan import TreePlan
    from t2i_experts.experts.sampling import schedule

    resolved = load_config(config, overrides or [])
    tree = TreePlan.from_config(resolved)
    sigmas = schedule(resolved.sampling, {leaf.name: leaf.interval for leaf in tree.leaves})
    if as_json:
        typer.echo(json.dumps(_document(tree, sigmas), ensure_ascii=False))
        return
    typer.echo("\n".join(_lines(tree, sigmas)))


@app.command()
def assemble(
    config: Config,
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(help="The model folder to write; default: ensemble in the config's output.", show_default=False)
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32 or bfloat16: of the weights on the disk; default: as they are.", show_default=False)
    ] = None,
    early: Annotated[bool, typer.Option("--early", help="Also take nodes that are still to see some of their images.")] = False,
    rank: Annotated[
        str | None, typer.Option(help="Store experts as differences of this rank from the root; full: bit for bit.", show_default=False)
    ] = None,
    budget: Annotated[
        int | None, typer.Option("--bytes", help="Store experts as differences of so many bytes together.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Make one model folder of a root and the nodes that are trained so far.

    For a leaf that is not trained, its nearest ancestor that is answers, in the worst case the root. Run it again when more is trained.
    Experts are stored whole, unless --rank or --bytes is given; those that were trained at low rank from the root, as they were trained.
    """
    from t2i_experts.cli.drawing import check_dtype
    from t2i_experts.config import load_config

    check_dtype(dtype)
    wanted = _rank(rank)
    resolved = load_config(config, overrides or [])

    with without_collecting():
        import torch

        from t2i_experts.cascade.assembly import ENSEMBLE, gather, refuse_other_folder, write_assembly
        from t2i_experts.cascade.cutting import Limit

    limit = Limit(wanted, budget)
    folder = Path(resolved.output) / ENSEMBLE if out is None else out
    refuse_other_folder(folder)
    assembly = gather(resolved, early=early)
    fingerprint, sizes = write_assembly(assembly, resolved, folder, getattr(torch, dtype) if dtype else None, limit)
    stored = {name: asdict(size) for name, size in sizes.items()}
    document = {"folder": str(folder), "fingerprint": fingerprint, "leaves": _answers(assembly), "experts": stored}
    typer.echo(json.dumps(document, ensure_ascii=False) if as_json else "\n".join(_answer_lines(document)))


def _rank(text: str | None) -> float | None:
    """Raises ValueError for a --rank that is neither a number from 1 on nor "full", which is infinity."""
    if text is None:
        return None
    if text == "full":
        return math.inf
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"--rank={text!r}; allowed: full, or a number from 1 on")
    return int(text)


def _answers(assembly: Assembly) -> list[dict[str, Any]]:
    """Who answers for each leaf. why: the leaf itself does not."""
    from t2i_experts.config import to_plain

    return [
        {
            "leaf": one.leaf.name,
            "sigma": to_plain([one.leaf.interval.sigma_lo, one.leaf.interval.sigma_hi]),
            "quantiles": [str(one.leaf.interval.u_lo), str(one.leaf.interval.u_hi)],
            "expert": one.expert.name,
            "images_seen": assembly.experts[one.expert.name].images_seen,
            "why": assembly.missing.get(one.leaf.name),
        }
        for one in assembly.covered
    ]


def _answer_lines(document: dict[str, Any]) -> list[str]:
    rows = [["leaf", "sigma", "expert", "images seen"]]
    for one in document["leaves"]:
        lo, hi = map(float, one["sigma"])
        rows.append([one["leaf"], f"{lo:.4g} .. {hi:.4g}", one["expert"], f"{one['images_seen']:,}"])
    stand_ins = [f"{one['expert']} stands in for {one['leaf']}: {one['why']}" for one in document["leaves"] if one["why"]]
    last = f"{document['folder']}, fingerprint {document['fingerprint']}"
    return [*tabulated(rows, left=(0, 2)), "", *_size_lines(document["experts"]), *stand_ins, last]


def _size_lines(stored: dict[str, Any]) -> list[str]:
    """What each expert costs, where any is a difference from the root."""
    if all(one["kind"] == "whole" for one in stored.values()):
        return []
    rows = [["expert", "stored", "bytes", "ranks (median)", "error of the weights"]]
    for name, one in stored.items():
        ranks = "{0:g} .. {2:g} ({1:g})".format(*one["ranks"]) if one["ranks"] else "-"
        rows.append([name, one["kind"], f"{one['bytes']:,}", ranks, f"{one['error']:.2%}"])
    return [*tabulated(rows, left=(0, 1)), ""]


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
app.command()(loss)
app.command()(ranks)
app.command()(merge)
app.command()(blend)
app.command()(boundaries)
