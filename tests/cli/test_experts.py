"""`t2i-experts experts` as a stranger uses it."""

from __future__ import annotations

import functools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from t2i_experts.cli.growth_display import GrowthDisplay
from t2i_experts.config import load_config
from t2i_experts.experts.plan import TreePlan
from t2i_experts.experts.runs import node_runs
from t2i_experts.training.checkpoints import refuse_changed_config
from t2i_experts.training.claims import HeldClaim, take_claim
from t2i_experts.training.growing import Growth
from t2i_experts.training.nodes import claim_file, record_failure, tree_status

Experts = Callable[..., tuple[int, str, str]]


@pytest.fixture
def plan(cli: Experts) -> Experts:
    """plan(*arguments) -> exit code, stdout, stderr."""
    return functools.partial(cli, "experts", "plan")


def test_the_table_has_a_line_for_every_node(plan: Experts) -> None:
    code, out, err = plan("ediffi/experts")
    assert (code, err) == (0, "")
    head, *rows, empty, summary = out.splitlines()
    cells = [" ".join(row.split()) for row in rows]
    tree = TreePlan.from_config(load_config("ediffi/experts"))
    assert [row.split()[0] for row in cells] == [node.name for node in tree.nodes]
    assert " ".join(head.split()) == "node sigma quantiles training noise of 25 steps parent images" and empty == ""
    assert cells[4] == "complement * 0.07574 .. 9.61 1/8 .. 511/512 87.305% 11 (44%) root 102,400,000"
    assert cells[-1] == "E^9_511 * 9.61 .. inf 511/512 .. 1 0.195% 9 (36%) E^8_255 102,400,000"
    assert rows[4].startswith(" complement * ") and rows[-1].startswith(" " * 9 + "E^9_511 * "), "children below their parents"
    assert summary == "* the ensemble: 3 of 14 nodes; 2,355,200,000 images in all"


@pytest.mark.parametrize(("steps", "shares"), [(18, (4, 8, 6)), (25, (5, 11, 9)), (40, (8, 18, 14)), (256, (49, 121, 86))])
def test_the_document(plan: Experts, steps: int, shares: tuple[int, int, int]) -> None:
    code, out, err = plan("ediffi/experts", f"sampling.steps={steps}", "--json")
    document = json.loads(out)
    assert (code, err, document["steps"], document["images"]) == (0, "", steps, 2_355_200_000)
    leaves = [node for node in document["nodes"] if node["leaf"]]
    assert [leaf["name"] for leaf in leaves] == ["E^3_0", "complement", "E^9_511"]
    assert tuple(leaf["steps"] for leaf in leaves) == shares
    assert [leaf["schedule_share"] for leaf in leaves] == [share / steps for share in shares]
    assert [leaf["training_share"] for leaf in leaves] == [1 / 8, 1 - 1 / 8 - 1 / 512, 1 / 512]
    assert [leaf["quantiles"] for leaf in leaves] == [["0", "1/8"], ["1/8", "511/512"], ["511/512", "1"]]
    assert leaves[0]["sigma"][1] == leaves[1]["sigma"][0] == pytest.approx(0.07574, abs=5e-6)
    assert float(leaves[2]["sigma"][1]) == math.inf and [leaf["parent"] for leaf in leaves] == ["E^2_0", "root", "E^8_255"]


def test_any_tree_from_a_few_lines(plan: Experts, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "extends: tiny/base64\nexperts:\n  leaves: [low, E^1_1, mid]\n  images: 1000\n  nodes:\n"
        "    low: {quantiles: [0, 0.1234567890123]}\n    mid: {quantiles: [0.1234567890123, 1/2], images: 500}\n"
    )
    code, out, err = plan(str(path))
    assert (code, err) == (0, "") and "0 .. 0.123457" in out and " 0.123457 .. 1/2 " in out
    document = json.loads(plan(str(path), "--json")[1])
    assert {node["name"]: node["images"] for node in document["nodes"]} == {"root": 8000, "low": 1000, "mid": 500, "E^1_1": 1000}
    assert document["nodes"][1]["quantiles"] == ["0", "1234567890123/10000000000000"], "exact"


@pytest.mark.parametrize("command", [["experts", "plan"], ["config", "check"]])
def test_a_gap_is_a_mistake_of_the_users(cli: Experts, command: list[str]) -> None:
    code, out, err = cli(*command, "ediffi/experts", "experts.leaves=[E^3_0, E^9_511]")
    assert (code, out) == (2, "")
    assert (
        err == "error: the leaves have a gap between E^3_0 and E^9_511: no expert for sigma in (0.07574, 9.61], quantiles 1/8 to 511/512\n"
    )


def test_a_plan_may_be_made_and_changed_for_a_root_that_is_trained_already(trained: Path) -> None:
    checkpoint, config = max((trained / "checkpoints").iterdir()), trained.with_suffix(".yaml")
    overrides = ["experts.leaves=[E^1_0, E^1_1]", "experts.images=5"]
    refuse_changed_config(checkpoint, load_config(config, overrides))
    with pytest.raises(ValueError, match=r"training\.seed: 0 -> 9"):
        refuse_changed_config(checkpoint, load_config(config, [*overrides, "training.seed=9"]))


def test_a_config_without_experts_and_help_need_no_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; from t2i_experts.cli.app import main; main(sys.argv[1:])"
    for arguments, status, said in (
        (["train", "tiny/base64"], 2, "error: experts.leaves=[] names no experts"),
        (["status", "tiny/base64"], 2, "error: experts.leaves=[] names no experts"),
        (["train", "tiny/experts", "--gpus", "0"], 2, "error: --gpus=0 must be at least 1"),
        (["train", "tiny/experts", "experts.overrides=[output=x]"], 2, "error: experts.overrides: 'output=x' is not of a node's own"),
        (["train", "--help"], 0, ""),
    ):
        done = subprocess.run([sys.executable, "-c", code, "experts", *arguments], capture_output=True, text=True)
        assert (done.returncode, done.stderr.startswith(said)) == (status, True), done.stderr


NODES = "root, E^1_0, E^2_0, complement, E^1_1, E^2_3"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--only", "E^1_0", "--only", "E^7_7"], f"--only E^7_7: the tree has no such node; allowed: {NODES}"),
        (["--gpus", "2", "training.device=cpu"], "--gpus=2 would be ignored: training.device=cpu"),
        (["--gpus", "9"], "--gpus=9: there are 3 GPUs (CUDA_VISIBLE_DEVICES=4,GPU-a,6)"),
        (["--only", "E^1_0"], "--only E^1_0: E^1_0 begins with root, which is not trained (ready); name it, too"),
    ],
)  # fmt: skip
def test_what_cannot_be_trained(cli: Experts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-a,6")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    assert cli("experts", "train", "tiny/experts", f"output={tmp_path / 'run'}", *arguments) == (2, "", f"error: {said}\n")


def test_a_launcher_is_not_needed(cli: Experts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    code, _, err = cli("experts", "train", "tiny/experts")
    assert code == 2 and "starts its processes itself: run it without accelerate launch" in err


@pytest.mark.parametrize(
    ("growth", "exit_code"),
    [
        (Growth(trained=["root"]), 0),
        (Growth(stopped_by=signal.SIGTERM), 0),
        (Growth(stopped_by=signal.SIGINT), 130),
        (Growth(trained=["root"], failed={"E^1_0": "exit code 2: no"}), 1),
    ],
)
def test_how_it_ends(cli: Experts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, growth: Growth, exit_code: int) -> None:
    asked = {}

    def grow(runs: object, **settings: object) -> Growth:
        asked.update(settings)
        return growth

    monkeypatch.setattr("t2i_experts.training.growing.grow", grow)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-a,6")
    output = f"output={tmp_path / 'run'}"
    code, out, err = cli("experts", "train", "tiny/experts", output, "--gpus", "2", "--only", "root", "--json")
    document = json.loads(out)
    assert code == exit_code and document["trained"] == growth.trained and document["failed"] == growth.failed
    assert document["stopped_by"] == (growth.stopped_by and growth.stopped_by.name) and len(document["nodes"]) == 6
    assert asked["only"] == ["root"] and asked["slots"] == [{"CUDA_VISIBLE_DEVICES": "4"}, {"CUDA_VISIBLE_DEVICES": "GPU-a"}]
    assert err.endswith("0 of 6 nodes are trained; not root (ready), E^1_0 (waiting), E^2_0 (waiting), complement (waiting), "
                        "E^1_1 (waiting), E^2_3 (waiting)\n")  # fmt: skip
    cli("experts", "train", "tiny/experts", output)
    assert asked["only"] == ["root", "E^1_0", "E^2_0", "complement", "E^1_1", "E^2_3"] and asked["slots"] == [{}]


def test_where_a_tree_stands(cli: Experts, trained: Path, tmp_path: Path) -> None:
    config, output = str(trained.with_suffix(".yaml")), tmp_path / "tree"
    shutil.copytree(trained, output)
    tree = [f"output={output}", "experts={leaves: [E^1_0, E^1_1], images: 40}"]
    runs = node_runs(load_config(config, tree))
    runs["E^1_0"].folder.mkdir()
    record_failure(runs["E^1_0"], "exit code 2: no room")
    claim = take_claim(claim_file(runs["E^1_1"]))
    assert isinstance(claim, HeldClaim)
    before = sorted(output.rglob("*"))
    document = json.loads(cli("experts", "status", config, *tree, "--json")[1])
    root, low, high = document["nodes"]
    assert (root["state"], root["images_seen"], root["images"]) == ("trained", 64, 64)
    assert root["loss"] > 0 and root["validation_loss"] > 0 and root["images_per_second"] > 0
    assert (low["state"], low["failure"], low["claimed_by"]) == ("failed", "exit code 2: no room", None)
    assert (high["state"], high["claimed_by"]["pid"], high["parent"]) == ("ready", os.getpid(), "root")
    assert (document["images_seen"], document["images"]) == (64, 144)
    code, out, err = cli("experts", "status", config, *tree)
    head, *rows, empty, note = out.splitlines()
    assert (code, err, empty) == (0, "", "") and " ".join(head.split()) == "node state images of loss validation images/s claimed by"
    assert rows[1].split() == ["E^1_0", "failed", "0", "40", "-", "-", "-", "-"] and rows[1].startswith(" E")
    assert rows[2].endswith(str(claim.claim))
    assert note == f"E^1_0: failed: exit code 2: no room; see {runs['E^1_0'].log}"
    assert sorted(output.rglob("*")) == before, "it looks and touches nothing"


def test_an_experts_run_does_not_offer_to_draw(cli: Experts, trained: Path, tmp_path: Path) -> None:
    config = str(trained.with_suffix(".yaml"))
    part = ["stage.noise.quantiles=[0, 1/2]", f"training.initial={trained / 'model'}", "training.images=8", f"output={tmp_path / 'run'}"]
    code, _, err = cli("train", config, *part, "training.ema.snapshot_every_images=0", "--quiet")
    assert code == 0 and "an expert for a part of the noise, which draws no picture alone" in err and "generate" not in err


def test_progress_is_a_line_for_each_node(trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    runs = node_runs(load_config(trained.with_suffix(".yaml"), ["experts={leaves: [E^1_0, E^1_1], images: 40}"]))
    nodes = tree_status(runs).values()
    display = GrowthDisplay()
    display.show(nodes)
    assert capsys.readouterr().err == "", "no terminal: not before half a minute"
    display._next = 0
    display.show(nodes)
    first, second, _ = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"root: 64 of 64 images \(100 %\), [0-9.,]+ images/s, ends \d\d:\d\d", first)
    assert second == "E^1_0: 0 of 40 images (0 %)"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    terminal = GrowthDisplay()
    terminal.show(nodes)
    terminal.tell("root: trained")
    shown = capsys.readouterr().err
    assert shown.endswith("\x1b[3A\x1b[Jroot: trained\n") and shown.startswith("root: 64 of 64")
