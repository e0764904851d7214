"""`t2i-experts experts train` and `status`: a tree of experts, trained by processes on one host or several."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from t2i_experts.cli.options import Config, Json, Overrides, check_counts, tabulated

if TYPE_CHECKING:
    from t2i_experts.config import RunConfig
    from t2i_experts.experts.runs import NodeRun
    from t2i_experts.training.growing import Growth
    from t2i_experts.training.nodes import NodeStatus


def train(
    config: Config,
    overrides: Overrides = None,
    gpus: Annotated[
        int | None, typer.Option(help="Train so many nodes side by side, each on a GPU of its own; else one after the other.")
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option("--only", metavar="NODE", help="Train this node and no other; may be given again.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Train every node that is not trained yet, parents before their children; the root first, as train CONFIG would.

    Each is an ordinary train OUTPUT/nodes/NAME.yaml, whose output goes to OUTPUT/nodes/NAME.log. Run the same command again to go on after
    whatever has ended it, or at the same time on other hosts that share the disk: no node is trained twice. SIGTERM and Ctrl-C stop all
    with a checkpoint.
    """
    from t2i_experts.cli.config import check_parts
    from t2i_experts.config import load_config
    from t2i_experts.config.expert_rules import require_experts

    check_counts(gpus=gpus)
    if "LOCAL_RANK" in os.environ or "RANK" in os.environ:
        raise ValueError("experts train starts its processes itself: run it without accelerate launch or torchrun")
    resolved = load_config(config, overrides or [])
    require_experts(resolved)  # before what takes long to import
    check_parts(resolved)

    from t2i_experts.experts.runs import node_runs

    runs = node_runs(resolved)
    for name in only or []:
        if name not in runs:
            raise ValueError(f"--only {name}: the tree has no such node; allowed: {', '.join(runs)}")
    slots = [{}] if gpus is None else _gpu_slots(gpus, resolved)

    from t2i_experts.cli.growth_display import GrowthDisplay
    from t2i_experts.training.growing import grow
    from t2i_experts.training.nodes import tree_status

    display = GrowthDisplay()
    try:
        growth = grow(runs, only=only or list(runs), slots=slots, tell=display.tell, show=display.show)
    finally:
        display.close()
    statuses = tree_status(runs)
    for text in _notes(statuses):
        display.tell(text)
    display.tell(_summary(statuses))
    if as_json:
        facts = {"trained": growth.trained, "failed": growth.failed, "stopped_by": growth.stopped_by and growth.stopped_by.name}
        typer.echo(json.dumps({**facts, **_document(resolved, statuses)}, ensure_ascii=False))
    raise typer.Exit(_exit_code(growth))


def status(config: Config, overrides: Overrides = None, as_json: Json = False) -> None:
    """Show where every node of the tree stands: images seen, losses, speed, and which process has claimed it.

    Losses are of the node's own range of noise: those of two nodes cannot be compared.
    """
    from t2i_experts.config import load_config
    from t2i_experts.config.expert_rules import require_experts

    resolved = load_config(config, overrides or [])
    require_experts(resolved)

    from t2i_experts.experts.runs import node_runs
    from t2i_experts.training.nodes import tree_status

    statuses = tree_status(node_runs(resolved))
    if as_json:
        typer.echo(json.dumps(_document(resolved, statuses), ensure_ascii=False))
        return
    typer.echo("\n".join(_lines(statuses)))


def _gpu_slots(gpus: int, config: RunConfig) -> list[dict[str, str]]:
    """What each process that runs side by side gets to see of the GPUs that this one sees. Raises ValueError for more than there are."""
    if config.training.device == "cpu":
        raise ValueError(f"--gpus={gpus} would be ignored: training.device=cpu")
    from torch.cuda import device_count

    count, visible = device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    if gpus > count:
        limited = "" if visible is None else f" (CUDA_VISIBLE_DEVICES={visible})"
        raise ValueError(f"--gpus={gpus}: there are {count} GPUs{limited}")
    names = [str(i) for i in range(count)] if visible is None else visible.split(",")
    return [{"CUDA_VISIBLE_DEVICES": name.strip()} for name in names[:gpus]]


def _exit_code(growth: Growth) -> int:
    if growth.failed:
        return 1
    return 130 if growth.stopped_by is signal.SIGINT else 0


def _summary(statuses: Mapping[str, NodeStatus]) -> str:
    """The last line: what is left."""
    from t2i_experts.training.nodes import State

    left = [status for status in statuses.values() if status.state is not State.TRAINED]
    if not left:
        return f"all {len(statuses)} nodes are trained"
    words = ", ".join(f"{status.name} ({status.in_words})" for status in left)
    return f"{len(statuses) - len(left)} of {len(statuses)} nodes are trained; not {words}"


def _notes(statuses: Mapping[str, NodeStatus]) -> list[str]:
    """What is wrong with nodes that may well be trained."""
    from t2i_experts.training.growing import other_noise_in_words, outdated_in_words

    outdated = [f"{status.name}: {outdated_in_words(status)}" for status in statuses.values() if status.outdated]
    return outdated + [f"{status.name}: {other_noise_in_words(status)}" for status in statuses.values() if status.other_noise]


def _document(config: RunConfig, statuses: Mapping[str, NodeStatus]) -> dict[str, Any]:
    nodes = [_plain(status) for status in statuses.values()]
    totals = {key: sum(node[key] for node in nodes) for key in ("images_seen", "images")}
    return {"output": config.output, "nodes": nodes, **totals}


def _plain(status: NodeStatus) -> dict[str, Any]:
    from t2i_experts.training.nodes import told_by_log

    run, told = status.run, told_by_log(status.run)
    return {
        "name": status.name,
        "parent": run.node.parent,
        "state": str(status.state),
        "images_seen": told["images_seen"] or status.images_seen,
        "images": run.node.images,
        "checkpoint": status.images_seen,
        **{key: told[key] for key in ("loss", "validation_loss", "images_per_second")},
        "claimed_by": None if status.claim is None else {"host": status.claim.host, "pid": status.claim.pid, "since": status.claim.since},
        "failure": status.failure and status.failure.get("why"),
        "outdated": status.outdated,
        "other_noise": status.other_noise,
        "config": str(run.config_file),
        "output": str(run.output),
        "log": str(run.log),
    }


def _lines(statuses: Mapping[str, NodeStatus]) -> list[str]:
    """The table, with children indented below their parents, and below it what is wrong."""
    rows = [["node", "state", "images", "of", "loss", "validation", "images/s", "claimed by"]]
    for status in statuses.values():
        plain = _plain(status)
        rows.append(
            [
                " " * _depth(status.run, statuses) + status.name,
                plain["state"],
                f"{plain['images_seen']:,}",
                f"{plain['images']:,}",
                *(_number(plain[key], digits) for key, digits in (("loss", 4), ("validation_loss", 4), ("images_per_second", 1))),
                str(status.claim or "-"),
            ]
        )
    notes = [f"{status.name}: failed: {status.failure.get('why')}; see {status.run.log}" for status in statuses.values() if status.failure]
    notes += _notes(statuses)
    return [*tabulated(rows, left=(0, 1, 7)), *([""] if notes else []), *notes]


def _depth(run: NodeRun, statuses: Mapping[str, NodeStatus]) -> int:
    return 0 if run.node.parent is None else 1 + _depth(statuses[run.node.parent].run, statuses)


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"
