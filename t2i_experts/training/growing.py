"""Grows a tree of experts: trains what is pending, parents before their children, each node in a process of its own.

Whatever kills such a process, or this one, costs no more than the steps since its last checkpoint. Several hosts may grow one tree at once;
a claim on each node keeps them apart.
"""

from __future__ import annotations

import math
import signal
import subprocess
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from t2i_experts.experts.runs import NodeRun, write_configs
from t2i_experts.training.checkpoints import lock_owner
from t2i_experts.training.claims import HeldClaim, take_claim
from t2i_experts.training.elsewhere import Elsewhere
from t2i_experts.training.initial import refuse_unlike_parents
from t2i_experts.training.node_process import STOPPED, how_it_ended, start_process
from t2i_experts.training.nodes import NodeStatus, State, claim_file, forget_failure, record_failure, tree_status

Tell = Callable[[str], None]
Show = Callable[[Collection[NodeStatus]], None]

_TURN_EVERY = 0.2
_LOOK_EVERY = 1.0
"""Seconds between two turns, in which processes that have ended are noticed, and between two looks at a disk that may be far away."""


@dataclass
class Growth:
    """What came of it. trained, failed: nodes that this process trained, and that failed meanwhile (why, by name), here or elsewhere.
    stopped_by: the signal that ended it before its end."""

    trained: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    stopped_by: signal.Signals | None = None


@dataclass
class _Child:
    run: NodeRun
    process: subprocess.Popen[bytes]
    claim: HeldClaim
    slot: Mapping[str, str]


def grow(runs: Mapping[str, NodeRun], *, only: Sequence[str], slots: Sequence[Mapping[str, str]], tell: Tell, show: Show) -> Growth:
    """Trains the nodes `only` that are not trained, as soon as their parents are, until none is left that could be.

    runs: of the whole tree, parents first. slots: the environment of each process that may run side by side, beyond this one's. tell: is
    given a line about what happens. show: is given, a few times a second, the nodes that are being trained here.

    A node that is claimed elsewhere, and whose claim gives signs of life, is left to who claims it; what descends from it is waited for.
    SIGTERM and SIGINT stop all processes with a checkpoint, and a second SIGINT without.

    Raises ValueError for a node whose parent is not trained and is trained by nobody, for one whose run is of another noise, and for one
    whose network its parent's weights do not fit.
    """
    refuse_unlike_parents(runs)
    statuses = tree_status(runs)
    _refuse_other_noise(statuses)
    _refuse_orphans(statuses, only)
    write_configs(runs)
    grower = _Grower(runs, [name for name in runs if name in only], slots, tell)
    for status in statuses.values():
        if status.name in only and status.state is State.TRAINED:
            tell(f"{status.name}: trained already")
        if status.outdated:
            tell(f"{status.name}: {outdated_in_words(status)}")
        if status.failure is not None and status.name in only:
            forget_failure(status.run)  # it is tried again
    with _Signals() as signals:
        try:
            while grower.turn(signals):
                show(grower.at_work())
                time.sleep(_TURN_EVERY)
        finally:
            grower.end()
        grower.blame_others()
        grower.growth.stopped_by = signals.first
    return grower.growth


def outdated_in_words(status: NodeStatus) -> str:
    """What is wrong with a node that began with other weights than its parent has now, and what to do about it."""
    return (
        f"its parent {status.run.node.parent} has other weights now than those that it began with; to train it anew, remove "
        f"{status.run.output}"
    )


def other_noise_in_words(status: NodeStatus) -> str:
    """What is wrong with a node whose run was of another noise than the plan has for it, and what to do about it."""
    return (
        f"its run is of other noise than the plan's ({status.other_noise}); take the change back, call the node otherwise, or, to train it "
        f"anew, remove {status.run.output}"
    )


def _refuse_other_noise(statuses: Mapping[str, NodeStatus]) -> None:
    for status in statuses.values():
        if status.other_noise is not None:
            raise ValueError(f"{status.name}: {other_noise_in_words(status)}")


def _refuse_orphans(statuses: Mapping[str, NodeStatus], only: Collection[str]) -> None:
    for name in only:
        status = statuses[name]
        while status.state in (State.WAITING, State.FAILED) and not status.images_seen and status.run.node.parent is not None:
            child, status = status, statuses[status.run.node.parent]
            if status.state is State.TRAINED or status.name in only:
                break
            if status.claim is None and lock_owner(status.run.output) is None:
                raise ValueError(
                    f"--only {name}: {child.name} begins with {status.name}, which is not trained ({status.in_words}); name it, too"
                )


class _Grower:
    """The state of `grow` between two looks at the tree."""

    def __init__(self, runs: Mapping[str, NodeRun], wanted: Sequence[str], slots: Sequence[Mapping[str, str]], tell: Tell) -> None:
        self.runs = runs
        self.wanted = wanted
        self.free = list(slots)
        self.tell = tell
        self.growth = Growth()
        self.children: dict[str, _Child] = {}
        self.waiting: dict[str, HeldClaim] = {}  # claims that were taken over, until who left them has ended as well
        self.ended: set[str] = set()  # that stopped by themselves before their end, as after max_minutes
        self.told: dict[str, str] = {}
        self.statuses: Mapping[str, NodeStatus] = {}
        self.elsewhere = Elsewhere()
        self._looked = -math.inf

    def turn(self, signals: _Signals) -> bool:
        """Looks once at all, starts what can be started. Returns whether there is anything left to wait for."""
        for child in list(self.children.values()):
            if not child.claim.touch():
                self._lost(child)
            elif child.process.poll() is not None:
                self._ended(child)
        if signals.first is not None:
            for child in self.children.values():
                self._stop(child, signals)
            return bool(self.children)
        if time.monotonic() - self._looked < _LOOK_EVERY:
            return True
        self.statuses, self._looked = tree_status(self.runs), time.monotonic()
        for name in [name for name in self.waiting if not self.waiting[name].touch() or self._settled(name)]:
            self.waiting.pop(name).release()
        for name in self.wanted:
            self._consider(self.statuses[name])
        return bool(self.children or self.waiting) or self._outlived() or any(self._hopes(name) for name in self.wanted)

    def at_work(self) -> list[NodeStatus]:
        """The nodes that are being trained here."""
        return [self.statuses[name] for name in self.runs if name in self.children]

    def end(self) -> None:
        """Leaves nothing behind, however it came to this."""
        for child in self.children.values():  # none, but after an error here
            child.process.terminate()
        for child in self.children.values():
            child.process.wait()
            child.claim.release()
        for held in self.waiting.values():
            held.release()

    def _settled(self, name: str) -> bool:
        """Whether this process will not train the node (any more)."""
        return self.statuses[name].state is State.TRAINED or name in self.growth.failed or name in self.ended

    def blame_others(self) -> None:
        """Counts the nodes that failed elsewhere and without which some that were wanted cannot begin."""
        for name in [name for name in self.wanted if self.statuses and not self._settled(name)]:
            parent = self.statuses[name].run.node.parent
            while parent is not None:
                self._note_failure(self.statuses[parent])
                parent = self.statuses[parent].run.node.parent

    def _outlived(self) -> bool:
        """Whether the last look has been found out of date."""
        return self._looked == -math.inf

    def _hopes(self, name: str) -> bool:
        """Whether a node may still come to be trained here: its parent is at work elsewhere, or who claims it may be dead."""
        status = self.statuses[name]
        if self._settled(name) or self._startable(name) or status.run.node.parent is None:
            return not self._settled(name) and self.elsewhere.silent(status)
        parent = self.statuses[status.run.node.parent]
        return not self._settled(parent.name) and (self.elsewhere.at_work(parent) or self._hopes(parent.name))

    def _startable(self, name: str) -> bool:
        """Whether nothing but a free slot and the claim is missing."""
        status = self.statuses[name]
        parent = status.run.node.parent
        return bool(status.images_seen) or parent is None or self.statuses[parent].state is State.TRAINED

    def _consider(self, status: NodeStatus) -> None:
        """Starts the node if it can be, and tells once why not if somebody else is at it."""
        name = status.name
        self._note_failure(status)  # since this process began, or it would be forgotten
        if self._settled(name) or name in self.children or not self.free or not self._startable(name):
            return
        held = self.waiting.pop(name, None)
        if held is None:
            taken = status.claim or take_claim(claim_file(status.run))
            if not isinstance(taken, HeldClaim):
                self._tell(name, f"left to {taken}, which is training it")
                return
            held = taken
            if held.inherited:
                self._tell(name, "taken over from a process that has ended")
        if (owner := lock_owner(status.run.output)) is not None:
            if held.inherited:  # a process that was left behind, and is about to end
                self.waiting[name] = held
                self._tell(name, f"waiting for {owner}, which is still in {status.run.output}")
            else:
                held.release()
                self._tell(name, f"left to {owner}, which is training it")
            return
        if tree_status(self.runs)[name].state is State.TRAINED:  # between the look and the claim
            held.release()
            self._looked = -math.inf
            return
        self._start(status, held)

    def _note_failure(self, status: NodeStatus) -> None:
        if status.failure is not None and status.name not in self.growth.failed:
            self.growth.failed[status.name] = str(status.failure.get("why"))
            self._tell(status.name, f"failed elsewhere: {status.failure.get('why')}")

    def _start(self, status: NodeStatus, claim: HeldClaim) -> None:
        run, slot = status.run, self.free.pop(0)
        process = start_process(run, slot, by=str(claim.claim))
        self.children[run.name] = _Child(run, process, claim, slot)
        where = "".join(f", {key}={value}" for key, value in slot.items())
        begins = f"goes on at {status.images_seen:,} of" if status.images_seen else "begins,"
        self._tell(run.name, f"{begins} {run.node.images:,} images (process {process.pid}{where}; {run.log})")

    def _ended(self, child: _Child) -> None:
        """Looks at what a process that has ended leaves behind."""
        run, code = child.run, child.process.returncode
        self._looked = -math.inf
        self._forget(child)
        status = tree_status(self.runs)[run.name]
        if status.state is State.TRAINED and code == 0:
            self.growth.trained.append(run.name)
            self._tell(run.name, f"trained; model: {run.model}")
        elif code in STOPPED:
            self.ended.add(run.name)
            self._tell(run.name, f"stopped at {status.images_seen:,} of {run.node.images:,} images; the same command goes on")
        else:
            why = how_it_ended(run, code)
            record_failure(run, why)
            self.growth.failed[run.name] = why
            self._tell(run.name, f"failed ({why}); see {run.log}")
        child.claim.release()

    def _lost(self, child: _Child) -> None:
        """Ends a process whose claim another one has taken over, after this host slept for long."""
        child.process.kill()
        child.process.wait()
        self._forget(child)
        self.ended.add(child.run.name)
        self._tell(child.run.name, "stopped: its claim was taken over, because it gave no sign of life for long")

    def _stop(self, child: _Child, signals: _Signals) -> None:
        if signals.again:
            child.process.kill()
        elif child.run.name not in self.ended:
            self.ended.add(child.run.name)
            child.process.send_signal(signal.SIGTERM)

    def _forget(self, child: _Child) -> None:
        del self.children[child.run.name]
        self.free.append(child.slot)

    def _tell(self, name: str, text: str) -> None:
        """Tells a thing of a node, unless it is what was told last."""
        if self.told.get(name) != text:
            self.told[name] = text
            self.tell(f"{name}: {text}")


class _Signals:
    """SIGTERM and SIGINT while it is entered: the first one, and whether SIGINT came again."""

    def __init__(self) -> None:
        self.first: signal.Signals | None = None
        self.again = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> _Signals:
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.again = self.again or (self.first is not None and number == signal.SIGINT)
        self.first = self.first or signal.Signals(number)
