"""Where each node of a tree of experts stands, as far as its run's folder tells; read without touching anything there."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from t2i_experts.config import NoiseConfig, differences, from_plain, to_plain
from t2i_experts.experts.runs import NodeRun
from t2i_experts.shards.format import write_atomically
from t2i_experts.training.checkpoints import checkpoints, read_facts
from t2i_experts.training.claims import Claim, living_claim
from t2i_experts.training.history import History, read_events

_ATTEMPTS = 5
_AGAIN_AFTER = 0.2
"""Seconds between two attempts to read the newest checkpoint."""


class State(StrEnum):
    """Of a node.

    TRAINED: its newest checkpoint has all images, and the model folder beside it is of that checkpoint. FAILED: its last process did, and
    may be tried again. PROGRESS: there is a checkpoint, from which it can go on, whatever its parent does. READY: its parent is trained.
    """

    TRAINED = "trained"
    FAILED = "failed"
    PROGRESS = "in progress"
    READY = "ready"
    WAITING = "waiting"


@dataclass(frozen=True)
class NodeStatus:
    """images_seen: of its newest checkpoint. claim: of a living process. failure: what the last process left, if it failed, and see
    `record_failure`. outdated: the weights that it began with are no longer its parent's."""

    run: NodeRun
    state: State
    images_seen: int
    claim: Claim | None
    failure: Mapping[str, Any] | None
    outdated: bool
    other_noise: str | None = None

    @property
    def name(self) -> str:
        """Of the node."""
        return self.run.name

    @property
    def in_words(self) -> str:
        """The state, with how far it has come."""
        total = self.run.node.images
        return f"{self.state} at {self.images_seen:,} of {total:,} images" if self.state is State.PROGRESS else str(self.state)


def tree_status(runs: Mapping[str, NodeRun]) -> dict[str, NodeStatus]:
    """The status of every node by name. runs: parents before their children, as `node_runs` gives them.

    Raises ValueError for a checkpoint that cannot be read.
    """
    found: dict[str, NodeStatus] = {}
    weights: dict[str, str | None] = {}  # of a node's model, as its newest checkpoint tells
    for run in runs.values():
        claim = living_claim(claim_file(run))  # before all else: once a claim was given back, what was done under it is there to be seen
        facts = _newest_facts(run.output)
        weights[run.name] = facts.get("model")
        seen, failure = facts.get("images_seen", 0), _failure(run)
        parent = found.get(run.node.parent or "")
        ready = parent is None or parent.state is State.TRAINED
        if facts and seen >= run.node.images and _model_images(run.model) == seen:
            state, failure = State.TRAINED, None  # after a failure, by hand
        elif failure is not None:
            state = State.FAILED
        else:
            state = State.PROGRESS if facts else State.READY if ready else State.WAITING
        began_with = (facts.get("initial") or {}).get("fingerprint")
        outdated = parent is not None and ready and None not in (began_with, weights[parent.name]) and began_with != weights[parent.name]
        found[run.name] = NodeStatus(run, state, seen, claim, failure, outdated, _other_noise(run, facts))
    return found


def _other_noise(run: NodeRun, facts: Mapping[str, Any]) -> str | None:
    """In what the noise of a run differs from that of its node, whose place in the tree may have changed since it was trained."""
    old = facts.get("config", {}).get("stage", {}).get("noise")
    if old is None:
        return None
    known = to_plain(from_plain(NoiseConfig, old))  # what its version did not know is as by default
    return "; ".join(differences(known, to_plain(run.config.stage.noise))) or None


def _newest_facts(output: Path) -> dict[str, Any]:
    """Of a run's newest checkpoint; nothing if there is none."""
    for attempt in reversed(range(_ATTEMPTS)):
        newest = checkpoints(output)[-1:]
        if not newest:
            break
        try:
            return read_facts(newest[0])
        except ValueError:
            if not attempt:
                raise
            time.sleep(_AGAIN_AFTER)  # its run has just taken it back, which a disk that is far away may show a little later
    return {}


def claim_file(run: NodeRun) -> Path:
    """Of who trains a node."""
    return run.folder / f"{run.name}.claim"


def record_failure(run: NodeRun, why: str) -> None:
    """Remembers that a node's process failed, and why, until it is tried again."""
    facts = {"why": why, "log": str(run.log), "time": round(time.time(), 3)}
    write_atomically(_failure_file(run), [json.dumps(facts).encode() + b"\n"])


def forget_failure(run: NodeRun) -> None:
    """The inverse of `record_failure`."""
    _failure_file(run).unlink(missing_ok=True)


def told_by_log(run: NodeRun) -> dict[str, Any]:
    """The last numbers in the log of a node's run, which knows more than its checkpoints: None for what it does not tell.

    images_seen, loss, validation_loss, images_per_second.
    """
    history = History(read_events(run.output / "log.jsonl"))
    loss, validation = history.curve("train", "loss"), history.curve("validation", "loss")
    return {
        "images_seen": history.images_seen if loss else None,
        "loss": loss[-1][1] if loss else None,
        "validation_loss": validation[-1][1] if validation else None,
        "images_per_second": history.images_per_second,
    }


def _failure_file(run: NodeRun) -> Path:
    return run.folder / f"{run.name}.failed"


def _failure(run: NodeRun) -> dict[str, Any] | None:
    try:
        facts = json.loads(_failure_file(run).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return facts if isinstance(facts, dict) else None


def _model_images(model: Path) -> int | None:
    """Images seen by the weights of a model folder; None if there is none."""
    try:
        seen = json.loads((model / "model_index.json").read_text(encoding="utf-8"))["provenance"]["images_seen"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return seen if isinstance(seen, int) else None
