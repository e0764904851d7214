"""Growing a tree: the order, side by side, with others, and after whatever has ended it.

The nodes are trained by a stand-in that keeps a run's folder as the trainer does, in milliseconds: its weights are words that say where
they come from. `test_growing_really.py` has the trainer itself.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from t2i_experts.config import load_config
from t2i_experts.experts.runs import NodeRun, node_runs
from t2i_experts.training import growing, node_process, nodes
from t2i_experts.training.checkpoints import checkpoints, read_facts
from t2i_experts.training.claims import HeldClaim, living_claim, take_claim
from t2i_experts.training.growing import Growth, grow
from t2i_experts.training.nodes import State, claim_file, record_failure, tree_status

Runs = Mapping[str, NodeRun]

TRAINER = r"""
import fcntl, json, os, pathlib, re, shutil, signal, sys, time

told = []
signal.signal(signal.SIGTERM, lambda *_: told.append(1))
config = pathlib.Path(sys.argv[1])
text, name = config.read_text(), config.stem
output = pathlib.Path(re.search(r"^output: (.*)$", text, re.M)[1])
images = int(re.search(r"^  images: (.*)$", text, re.M)[1])
parent = re.search(r"^  initial: (.*)$", text, re.M)[1]

def trace(event):
    with open(os.environ["TRACE"], "a") as file:
        file.write(json.dumps([event, name, os.getpid(), os.environ.get("CUDA_VISIBLE_DEVICES")]) + "\n")

def write(folder, name, facts):
    # a folder with one file, whole from the moment on when it is there
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    (temporary / name).write_text(json.dumps(facts))
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)

output.mkdir(parents=True, exist_ok=True)
lock = (output / ".lock").open("a")
fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
trace("begin")
if name in os.environ.get("FAILING", "").split():
    print("error: there is no such thing", file=sys.stderr)
    sys.exit(3)
together = os.environ.get("TOGETHER", "").split()
deadline = time.monotonic() + 60
while name in together and not all(f'"begin", "{other}"' in open(os.environ["TRACE"]).read() for other in together):
    assert time.monotonic() < deadline, "the others do not begin"
    time.sleep(0.01)
found = sorted(output.glob("checkpoints/[0-9]*/state.json"))
if found:
    state = json.loads(found[-1].read_text())
else:
    begin = "nothing" if parent == "null" else json.loads((pathlib.Path(parent) / "model_index.json").read_text())["weights"]
    state = {"images_seen": 0, "config": {}, "model": begin, "initial": {"fingerprint": begin}}
while state["images_seen"] < images and not told:
    time.sleep(float(os.environ.get("STEP", 0.01)))
    state["images_seen"] += 40
    state["model"] += f" {name}@{state['images_seen']}"
    write(output / "checkpoints" / f"{state['images_seen']:012d}", "state.json", state)
    while name in os.environ.get("STUCK", "").split() and not told:
        time.sleep(0.01)
write(output / "model", "model_index.json", {"weights": state["model"], "provenance": {"images_seen": state["images_seen"]}})
trace("end")
"""

ORDER = ["root", "E^1_0", "E^2_0", "complement", "E^1_1", "E^2_3"]


@pytest.fixture(scope="module")
def elsewhere() -> Runs:
    """Made once, which takes longer than to train them."""
    return node_runs(load_config("tiny/experts", ["output=ELSEWHERE"]))


@pytest.fixture
def runs(elsewhere: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runs:
    (tmp_path / "trainer.py").write_text(TRAINER)
    monkeypatch.setenv("TRACE", str(tmp_path / "trace"))
    monkeypatch.setattr(
        node_process, "train_command", lambda run: [sys.executable, "-S", str(tmp_path / "trainer.py"), str(run.config_file)]
    )
    monkeypatch.setattr(growing, "_LOOK_EVERY", 0.05)
    monkeypatch.setattr(growing, "_TURN_EVERY", 0.01)

    def here(path: str | Path | None) -> str:
        return str(path).replace("ELSEWHERE", str(tmp_path / "tree"))

    def moved(run: NodeRun) -> NodeRun:
        initial = here(run.config.training.initial) if run.node.parent else None
        training = replace(run.config.training, initial=initial)
        return NodeRun(run.node, replace(run.config, output=here(run.output), training=training), Path(here(run.folder)))

    return {name: moved(run) for name, run in elsewhere.items()}


def grown(
    runs: Runs, *, only: Sequence[str] = (), slots: Sequence[Mapping[str, str]] = ({},), meanwhile: Callable[[], object] = lambda: None
) -> tuple[Growth, list[str]]:
    """What came of it, and what was told. meanwhile: called after each look that leaves something to wait for."""
    told: list[str] = []
    return grow(runs, only=only or list(runs), slots=slots, tell=told.append, show=lambda nodes: meanwhile()), told


def traced(kind: str = "begin") -> list[Any]:
    """Name, pid and GPU of every process that began or ended, in this order."""
    path = Path(os.environ["TRACE"])
    events = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [event[1:] for event in events if event[0] == kind]


def started() -> list[str]:
    return [name for name, _, _ in traced()]


def weights(runs: Runs) -> dict[str, str]:
    return {name: json.loads((run.model / "model_index.json").read_text())["weights"] for name, run in runs.items()}


def steps(name: str, images: int) -> str:
    return "".join(f" {name}@{seen}" for seen in range(40, images + 1, 40))


def expected() -> dict[str, str]:
    root = "nothing" + steps("root", 320)
    low, high = root + steps("E^1_0", 80), root + steps("E^1_1", 80)
    return {
        "root": root, "E^1_0": low, "E^2_0": low + steps("E^2_0", 80), "complement": root + steps("complement", 160),
        "E^1_1": high, "E^2_3": high + steps("E^2_3", 80),
    }  # fmt: skip


def soon(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_parents_come_before_children_and_nothing_is_trained_twice(runs: Runs) -> None:
    growth, told = grown(runs)
    assert growth == Growth(trained=ORDER) and started() == ORDER and weights(runs) == expected()
    assert next(line for line in told if "begins" in line).startswith("root: begins, 320 images (process ")
    assert grown(runs) == (Growth(), [f"{name}: trained already" for name in ORDER]) and started() == ORDER
    assert {path.suffix for path in runs["root"].folder.iterdir() if path.is_file()} == {".yaml", ".log"}, "claims are given back"


def test_side_by_side_each_has_its_own_gpu(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOGETHER", "E^1_0 complement")  # each waits for the other
    slots = [{"CUDA_VISIBLE_DEVICES": "3"}, {"CUDA_VISIBLE_DEVICES": "5"}]
    growth, told = grown(runs, slots=slots)
    assert sorted(growth.trained) == sorted(ORDER) and weights(runs) == expected()
    events = [json.loads(line) for line in Path(os.environ["TRACE"]).read_text().splitlines()]
    at_work: dict[str, str] = {}
    most, ended = 0, set()
    for event, name, _, gpu in events:
        if event == "begin":
            assert gpu not in at_work.values() and (name == "root" or runs[name].node.parent in ended)
            at_work[name] = gpu
        else:
            ended.add(name)
            del at_work[name]
        most = max(most, len(at_work))
    assert most == 2 and {gpu for _, _, gpu in traced()} == {"3", "5"}
    assert any("CUDA_VISIBLE_DEVICES=5" in line for line in told)


def test_a_node_that_fails_stops_its_descendants_alone_and_is_tried_again(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAILING", "E^1_0")
    growth, told = grown(runs)
    assert growth.failed == {"E^1_0": "exit code 3: there is no such thing"}
    assert growth.trained == ["root", "complement", "E^1_1", "E^2_3"] and "E^2_0" not in started()
    assert f"E^1_0: failed (exit code 3: there is no such thing); see {runs['E^1_0'].log}" in told
    statuses = tree_status(runs)
    assert (statuses["E^1_0"].state, statuses["E^2_0"].state) == (State.FAILED, State.WAITING)
    assert statuses["E^1_0"].failure is not None and statuses["E^1_0"].failure["why"] == growth.failed["E^1_0"]
    monkeypatch.delenv("FAILING")
    assert grown(runs)[0] == Growth(trained=["E^1_0", "E^2_0"]) and weights(runs) == expected()
    assert tree_status(runs)["E^1_0"].failure is None


def test_a_node_that_fails_elsewhere_meanwhile_counts_as_failed(runs: Runs) -> None:
    def tell(line: str) -> None:
        if line.startswith("root: trained"):
            (runs["root"].folder / "E^1_0.failed").write_text('{"why": "the disk was full"}')

    growth = grow(runs, only=list(runs), slots=[{}], tell=tell, show=lambda nodes: None)
    assert growth.failed == {"E^1_0": "the disk was full"} and growth.trained == ["root", "complement", "E^1_1", "E^2_3"]


def test_only_some_nodes(runs: Runs) -> None:
    with pytest.raises(ValueError, match=r"--only complement: complement begins with root, which is not trained \(ready\); name it, too"):
        grown(runs, only=["complement"])
    assert started() == []
    assert grown(runs, only=["root"])[0].trained == ["root"]
    with pytest.raises(ValueError, match=r"--only E\^2_0: E\^2_0 begins with E\^1_0, which is not trained"):
        grown(runs, only=["complement", "E^2_0"])
    assert grown(runs, only=["E^2_3", "E^1_1"])[0].trained == ["E^1_1", "E^2_3"]
    assert {name: status.state for name, status in tree_status(runs).items()} == {
        "root": State.TRAINED, "E^1_0": State.READY, "E^2_0": State.WAITING, "complement": State.READY,
        "E^1_1": State.TRAINED, "E^2_3": State.TRAINED,
    }  # fmt: skip


def test_a_node_that_is_claimed_is_left_alone_and_what_descends_from_it_waited_for(runs: Runs) -> None:
    grown(runs, only=["root"])
    taken = {name: take_claim(claim_file(runs[name])) for name in ("E^1_0", "complement")}
    told: list[str] = []

    def tell(line: str) -> None:
        told.append(line)
        if line.startswith("E^2_3: trained"):  # nothing is left but to wait for E^1_0
            assert "E^1_0" not in started()
            claim = taken["E^1_0"]
            assert isinstance(claim, HeldClaim)
            threading.Timer(0.3, claim.release).start()

    growth = grow(runs, only=list(runs), slots=[{}], tell=tell, show=lambda nodes: None)
    assert growth.trained == ["E^1_1", "E^2_3", "E^1_0", "E^2_0"], "the complement, which nothing waits for, is left to who claims it"
    assert f"complement: left to process {os.getpid()} on {os.uname().nodename}, which is training it" in told


def far_away(path: Path) -> None:
    """Makes a claim that of a process which cannot be looked at."""
    held = take_claim(path)
    assert isinstance(held, HeldClaim)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"host": "far", "place": "far away", "pid": 1}))


def test_a_node_whose_claim_gives_no_sign_of_life_is_waited_for_and_taken_over(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a host was lost, when the same command runs on another one: it must not end with nothing done."""
    grown(runs, only=["root"])
    far_away(claim_file(runs["complement"]))

    def wait_long() -> None:
        monkeypatch.setattr("t2i_experts.training.claims.STALE_AFTER", 0.0)

    growth, told = grown(runs, only=["complement"], meanwhile=wait_long)
    assert growth.trained == ["complement"]
    assert "complement: left to process 1 on far, which is training it" in told
    assert "complement: taken over from a process that has ended" in told


def test_a_node_whose_claim_gives_a_sign_of_life_is_not_waited_for(runs: Runs) -> None:
    grown(runs, only=["root"])
    path = claim_file(runs["complement"])
    far_away(path)
    touched: list[int] = []

    def touch() -> None:
        touched.append(path.stat().st_mtime_ns + 1000)
        os.utime(path, ns=(0, touched[-1]))

    growth, _ = grown(runs, only=["complement"], meanwhile=touch)
    assert growth == Growth() and touched and path.exists()


def test_a_parent_that_was_finished_elsewhere_may_be_seen_late(runs: Runs) -> None:
    """Its claim is gone before a disk that is far away shows its last checkpoint."""
    grown(runs, only=["root"])
    root, hidden = runs["root"].output, runs["root"].output / "hidden"
    (root / "checkpoints").rename(hidden)
    claim = take_claim(claim_file(runs["root"]))
    assert isinstance(claim, HeldClaim)
    released: list[float] = []

    def go_on() -> None:
        if not released:
            claim.release()
            released.append(time.monotonic())
        elif hidden.exists() and time.monotonic() - released[0] > 0.5:
            hidden.rename(root / "checkpoints")

    assert grown(runs, only=["E^1_0"], meanwhile=go_on)[0].trained == ["E^1_0"]


def test_what_was_done_under_a_claim_is_seen_once_it_is_given_back(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the other does while this process looks."""
    grown(runs, only=["root"])
    root, hidden = runs["root"].output, runs["root"].output / "hidden"
    (root / "checkpoints").rename(hidden)

    def just_given_back(path: Path) -> None:
        if hidden.exists() and path == claim_file(runs["root"]):
            hidden.rename(root / "checkpoints")

    monkeypatch.setattr("t2i_experts.training.nodes.living_claim", just_given_back)
    assert tree_status(runs)["root"].state is State.TRAINED


def test_a_parent_that_fails_elsewhere_counts_as_failed(runs: Runs) -> None:
    grown(runs, only=["root"])
    claim = take_claim(claim_file(runs["E^1_0"]))
    assert isinstance(claim, HeldClaim)

    def fail() -> None:
        record_failure(runs["E^1_0"], "the disk was full")
        claim.release()

    growth, told = grown(runs, only=["E^2_0"], meanwhile=fail)
    assert growth == Growth(failed={"E^1_0": "the disk was full"}) and "E^1_0: failed elsewhere: the disk was full" in told


def test_a_checkpoint_that_a_far_disk_does_not_show_yet_is_read_again(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    grown(runs, only=["root"])
    failures = [ValueError("stale")] * 3

    def read(folder: Path) -> dict[str, Any]:
        if failures:
            raise failures.pop()
        return read_facts(folder)

    monkeypatch.setattr(nodes, "read_facts", read)
    monkeypatch.setattr(nodes, "_AGAIN_AFTER", 0.0)
    assert tree_status(runs)["root"].state is State.TRAINED
    newest = checkpoints(runs["root"].output)[-1]
    (newest / "state.json").write_text("")
    with pytest.raises(ValueError, match=f"cannot read the checkpoint {newest}"):
        tree_status(runs)


def test_a_node_that_was_trained_by_hand_after_its_failure_has_not_failed(runs: Runs) -> None:
    grown(runs, only=["root"])
    record_failure(runs["root"], "the disk was full")
    status = tree_status(runs)["root"]
    assert status.state is State.TRAINED and status.failure is None


def test_a_node_of_other_noise_than_the_plan_has_is_refused(runs: Runs) -> None:
    """As after a change of the leaves, which gives the complement another range."""
    grown(runs)
    newest = checkpoints(runs["complement"].output)[-1] / "state.json"
    facts = json.loads(newest.read_text())
    newest.write_text(json.dumps(facts | {"config": {"stage": {"noise": {"quantiles": ["1/4", "3/4"]}}}}))
    assert tree_status(runs)["complement"].other_noise is None
    newest.write_text(json.dumps(facts | {"config": {"stage": {"noise": {"quantiles": ["1/8", "3/4"]}}}}))
    with pytest.raises(ValueError, match=r"complement: its run is of other .*\['1/8', '3/4'\] -> \['1/4', '3/4'\].* remove .*complement"):
        grown(runs)


def test_a_network_that_its_parents_weights_do_not_fit_is_refused_before_anything_is_trained(runs: Runs) -> None:
    stage = runs["E^2_0"].config.stage
    narrow = replace(stage, network=replace(stage.network, context_channels=32))
    changed = {**runs, "E^2_0": replace(runs["E^2_0"], config=replace(runs["E^2_0"].config, stage=narrow))}
    with pytest.raises(ValueError, match=r"the run of E\^2_0, by its overrides .*: the weights of E\^1_0: does not fit its own"):
        grown(changed)
    assert not started()
    fine = replace(stage, network=replace(stage.network, dropout=0.1, projections=True))  # which begin as identities
    same = {**runs, "E^2_0": replace(runs["E^2_0"], config=replace(runs["E^2_0"].config, stage=fine))}
    assert grown(same, only=["root"])[0].trained == ["root"]


def test_two_at_once_never_train_a_node_twice(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two growers, which take turns."""
    monkeypatch.setattr(growing, "_LOOK_EVERY", 0.0)
    growing.write_configs(runs)
    growers = [growing._Grower(runs, list(runs), [{}, {}], lambda line: None) for _ in range(2)]
    with growing._Signals() as signals:
        busy = [True]
        while any(busy):
            busy = [grower.turn(signals) for grower in growers]
            time.sleep(0.005)
    assert sorted(started()) == sorted(ORDER) and weights(runs) == expected()
    assert sorted(name for grower in growers for name in grower.growth.trained) == sorted(ORDER)
    assert all(grower.growth.trained for grower in growers), "each has had its share"


def test_sigterm_stops_all_with_a_checkpoint_and_the_same_command_goes_on(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STUCK", "root")

    def told_to_stop() -> None:
        soon(lambda: checkpoints(runs["root"].output))
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=told_to_stop)
    thread.start()
    growth, told = grown(runs)
    thread.join()
    assert growth == Growth(stopped_by=signal.SIGTERM) and traced("end")
    status = tree_status(runs)["root"]
    assert status.state is State.PROGRESS and 0 < status.images_seen < 320 and status.claim is None
    assert f"root: stopped at {status.images_seen} of 320 images; the same command goes on" in told
    monkeypatch.delenv("STUCK")
    assert grown(runs)[0].trained == ORDER and weights(runs) == expected()


def test_a_child_that_is_killed_has_failed_and_its_siblings_go_on(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STUCK", "E^1_0")
    grown(runs, only=["root"])

    def kill() -> None:
        soon(lambda: checkpoints(runs["E^1_0"].output))
        os.kill({name: pid for name, pid, _ in traced()}["E^1_0"], signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    growth, _ = grown(runs, slots=[{}, {}])
    thread.join()
    monkeypatch.delenv("STUCK")
    assert growth.failed == {"E^1_0": "killed by SIGKILL"} and sorted(growth.trained) == ["E^1_1", "E^2_3", "complement"]
    assert grown(runs)[0].trained == ["E^1_0", "E^2_0"] and weights(runs) == expected()


GROWER = """
import sys
from t2i_experts.config import load_config
from t2i_experts.experts.runs import node_runs
from t2i_experts.training import growing, node_process

node_process.train_command = lambda run: [sys.executable, "-S", sys.argv[2], str(run.config_file)]
growing._LOOK_EVERY = growing._TURN_EVERY = 0.05
runs = node_runs(load_config("tiny/experts", [f"output={sys.argv[1]}"]))
growth = growing.grow(runs, only=list(runs), slots=[{}, {}], tell=print, show=lambda nodes: None)
sys.exit(len(growth.failed))
"""


def grower(runs: Runs) -> subprocess.Popen[bytes]:
    output, trainer = runs["root"].output, Path(os.environ["TRACE"]).with_name("trainer.py")
    return subprocess.Popen([sys.executable, "-c", GROWER, str(output), str(trainer)], stdout=subprocess.DEVNULL)


def test_killed_itself_it_leaves_no_process_behind_and_the_same_command_goes_on(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STUCK", "root")
    process = grower(runs)
    soon(lambda: checkpoints(runs["root"].output))
    assert tree_status(runs)["root"].claim == living_claim(claim_file(runs["root"])) is not None
    process.kill()
    process.wait()
    monkeypatch.delenv("STUCK")
    growth, told = grown(runs)  # at once: the child may still be writing its checkpoint
    assert "root: taken over from a process that has ended" in told and not any("left to" in line for line in told), told
    assert growth.trained == ORDER and weights(runs) == expected(), told
    assert len(traced("end")) == len(traced()) == 1 + len(ORDER), "the child of the killed one stopped with a checkpoint"


@pytest.mark.slow
def test_three_at_once_killed_and_started_again_and_again(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEP", "0.15")
    generator = random.Random(0)
    processes = [grower(runs) for _ in range(3)]
    for _ in range(8):
        time.sleep(generator.uniform(0.5, 2))
        victim = generator.randrange(3)
        processes[victim].send_signal(generator.choice([signal.SIGKILL, signal.SIGTERM]))
        processes[victim].wait()
        processes[victim] = grower(runs)
    assert [process.wait(120) for process in processes] == [0, 0, 0]
    assert weights(runs) == expected()


def test_who_has_lost_its_claim_ends_its_process(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a laptop's sleep, in which another host took the node over."""
    monkeypatch.setenv("STEP", "5")
    monkeypatch.setattr("t2i_experts.training.claims.TOUCH_EVERY", 0.0)
    path = claim_file(runs["root"])

    def take_away() -> None:
        soon(started)
        facts = json.loads(path.read_text())
        path.write_text(json.dumps(facts | {"token": "another"}))

    thread = threading.Thread(target=take_away)
    thread.start()
    growth, told = grown(runs)
    thread.join()
    assert growth == Growth() and any("its claim was taken over" in line for line in told)
    assert path.exists(), "it is the other's"
    with pytest.raises(ProcessLookupError):
        os.kill(traced()[0][1], 0)


HOLDER = """
import fcntl, sys
lock = open(sys.argv[1], "a")
fcntl.lockf(lock, fcntl.LOCK_EX)
lock.write("process 7 on here")
lock.flush()
print(flush=True)
input()
"""


def test_a_run_that_is_trained_by_hand_is_left_alone(runs: Runs) -> None:
    """It has no claim, but holds its folder's lock."""
    runs["root"].output.mkdir()
    command = [sys.executable, "-S", "-c", HOLDER, str(runs["root"].output / ".lock")]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout is not None and holder.stdout.readline()
    growth, told = grown(runs, only=["root"])
    assert growth == Growth() and told == ["root: left to process 7 on here, which is training it"]
    holder.communicate(b"\n")
    assert grown(runs, only=["root"])[0].trained == ["root"]


def test_a_parent_that_was_trained_anew_is_told(runs: Runs) -> None:
    grown(runs)
    assert not any(status.outdated for status in tree_status(runs).values())
    newest = checkpoints(runs["E^1_0"].output)[-1] / "state.json"
    newest.write_text(json.dumps(json.loads(newest.read_text()) | {"model": "other weights"}))
    assert [status.name for status in tree_status(runs).values() if status.outdated] == ["E^2_0"]
    growth, told = grown(runs)
    assert growth == Growth() and any(line.startswith("E^2_0: its parent E^1_0 has other weights now") for line in told)


def test_a_node_is_trained_when_its_model_is_of_its_last_checkpoint(runs: Runs) -> None:
    """A kill may come between the two; a child must not begin with what was there before."""
    grown(runs, only=["root"])
    index = runs["root"].model / "model_index.json"
    index.write_text(json.dumps({"weights": "older", "provenance": {"images_seen": 280}}))
    assert [tree_status(runs)[name].state for name in ("root", "E^1_0")] == [State.PROGRESS, State.WAITING]
    assert grown(runs)[0].trained == ORDER and weights(runs) == expected()
