"""From a tree to ordinary configs, one for each node."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from t2i_experts.config import RunConfig, changes, load_config, to_plain
from t2i_experts.experts.plan import TreePlan
from t2i_experts.experts.runs import NodeRun, node_runs, write_configs


def runs_of(*overrides: str) -> tuple[RunConfig, Mapping[str, NodeRun]]:
    config = load_config("ediffi/experts", ["output=runs/tree", *overrides])
    return config, node_runs(config)


def test_a_node_differs_from_the_root_in_its_noise_its_images_and_where_it_comes_from() -> None:
    config, runs = runs_of("experts.nodes.complement={images: 7}")
    assert list(runs) == [node.name for node in TreePlan.from_config(config).nodes]
    assert runs["root"].config == config and runs["root"].model == Path("runs/tree/model")

    def differing(name: str) -> dict[str, Any]:
        found = {key: new for key, _, new in changes(to_plain(config), to_plain(runs[name].config)) if not key.startswith("experts.")}
        assert runs[name].config.experts.leaves == []
        return found

    assert differing("complement") == {
        "output": "runs/tree/nodes/complement",
        "stage.noise.quantiles": ["1/8", "511/512"],
        "training.images": 7,
        "training.initial": "runs/tree/model",
        "training.preview.around": "runs/tree/model",
    }
    deepest = differing("E^9_511")
    assert deepest["training.initial"] == "runs/tree/nodes/E^8_255/model" == str(runs["E^8_255"].model)
    assert (deepest["stage.noise.quantiles"], deepest["training.images"]) == (["511/512", "1"], 102_400_000)
    assert deepest["training.preview.around"] == "runs/tree/model", "its parent has not seen all noise"


def test_overrides_of_all_nodes_come_before_those_of_one_and_leave_the_root_alone() -> None:
    everyones = "experts.overrides=[training.seed=1, training.optimizer.learning_rate=3e-5]"
    _, runs = runs_of(everyones, "experts.nodes.E^1_1={overrides: [training.seed=2, 'training.preview={steps: 9}']}")
    assert [runs[name].config.training.seed for name in ("root", "E^1_0", "E^1_1")] == [0, 1, 2]
    assert [runs[name].config.training.optimizer.learning_rate for name in ("root", "E^1_0", "E^1_1")] == [1e-4, 3e-5, 3e-5]
    preview = runs["E^1_1"].config.training.preview
    assert (preview.steps, preview.around) == (9, "runs/tree/model")


def test_the_files_are_the_configs(tmp_path: Path) -> None:
    config = load_config("tiny/experts", [f"output={tmp_path / 'run'}"])
    runs = node_runs(config)
    write_configs(runs)
    assert {run.config_file for run in runs.values()} == set((tmp_path / "run" / "nodes").iterdir())
    assert all(load_config(run.config_file) == run.config for run in runs.values())
    runs["root"].config_file.write_text("else")
    kept = runs["E^1_0"].config_file.stat().st_mtime_ns
    write_configs(runs)
    assert load_config(runs["root"].config_file) == config and runs["E^1_0"].config_file.stat().st_mtime_ns == kept


def test_a_node_of_all_noise_is_a_control_inside_the_tree() -> None:
    config = load_config("tiny/base64", ["experts={leaves: [control], images: 80, nodes: {control: {quantiles: [0, 1]}}}"])
    control = node_runs(config)["control"].config
    assert (control.stage.noise.quantiles, control.training.initial, control.training.preview.around) == ([], "runs/tiny/model", None)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("experts.overrides=[seed=1]", "experts.overrides: 'seed=1' is not of a node's own"),
        ("experts.overrides=[training.seed]", "not of the form key=value"),
        ("experts.overrides=[output=elsewhere]", "allowed: training.NAME, data.NAME, stage.network.NAME"),
        ("experts.overrides=[stage.noise.mean=0]", "of the whole tree"),
        ("experts.overrides=['training={images: 5}']", "of the whole tree"),
        ("experts.nodes.E^1_0={overrides: [training.images=5]}", r"experts.nodes.E^1_0.overrides: .* say experts.images"),
        ("experts.nodes.E^1_0={overrides: [training.initial=x]}", "its parent's weights"),
        ("experts.overrides=[training.sed=5]", "the run of E^1_0, by experts.overrides: override 'training.sed=5'.*did you mean"),
        ("experts.nodes.E^2_0={overrides: [training.seed=x]}", "the run of E^2_0, by experts.nodes.E^2_0.overrides: .*training.seed"),
        ("experts.overrides=[training.batch_size=0]", "batch_size=0 must be positive"),
        ("stage.noise.quantiles=[0, 1/2]", r"stage.noise.quantiles=\['0', '1/2'\]: the root of experts.leaves=.* needs all noise"),
    ],
)
def test_what_cannot_be_overridden(override: str, said: str) -> None:
    with pytest.raises(ValueError, match=said.replace("^", r"\^")):
        runs_of(override)


def test_a_config_without_experts() -> None:
    with pytest.raises(ValueError, match=r"experts\.leaves=\[\] names no experts"):
        node_runs(load_config("tiny/base64"))


def test_settings_of_experts_are_the_ensembles_alone() -> None:
    config, runs = runs_of("sampling.experts={E^9_511: {guidance: 7.0, steps: 6}}")
    assert config.sampling.experts and not runs["E^9_511"].config.sampling.experts
