"""`t2i-experts experts boundaries`: quantiles that a config takes, from a model and shards."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from t2i_experts.cli.app import main
from t2i_experts.config import load_config
from t2i_experts.experts.plan import TreePlan

SHARDS = str(Path(__file__).parents[2] / "shards" / "shapes" / "validation")


@pytest.mark.parametrize("kind", ["acceleration", "dirichlet"])
def test_its_quantiles_are_those_of_a_plan(kind: str, model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--shards", SHARDS, "--model", str(model_folder), "--images", "3", "--batch-size", "2", "--device", "cpu"]
    with pytest.raises(SystemExit) as ended:
        main(["experts", "boundaries", *arguments, "--kind", kind, "--parts", "3", "--json"])
    assert ended.value.code == 0
    document = json.loads(capsys.readouterr().out)
    assert document["kind"] == kind and len(document["parts"]) == 3
    assert len(document["monitor"]["sigma"]) == len(document["monitor"]["density"]) == 33
    names = ["low", "middle", "high"]
    nodes = [f"experts.nodes.{name}.quantiles={json.dumps(p['quantiles'])}" for name, p in zip(names, document["parts"], strict=True)]
    plan = TreePlan.from_config(load_config("ediffi/experts", [f"experts.leaves={json.dumps(names)}", *nodes]))
    assert [leaf.name for leaf in plan.leaves] == names
    assert sum(part["training_share"] for part in document["parts"]) == pytest.approx(1)


@pytest.mark.parametrize(
    ("option", "complaint"),
    [("--kind=energy", "--kind=energy must be acceleration or dirichlet"), ("--parts=0", "--parts=0 must be at least 1")],
)
def test_wrong_options_are_refused_before_anything_is_loaded(option: str, complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["experts", "boundaries", "--shards", SHARDS, option])
    assert ended.value.code == 2
    assert complaint in capsys.readouterr().err
