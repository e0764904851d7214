"""`t2i-experts experts` as a stranger uses it."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from t2i_experts.config import load_config
from t2i_experts.experts.plan import TreePlan
from t2i_experts.training.checkpoints import refuse_changed_config

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
