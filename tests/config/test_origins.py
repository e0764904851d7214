"""Every value's origin: the last of the files and overrides that says it."""

from __future__ import annotations

from pathlib import Path

import pytest

from t2i_experts.config import load_config, shipped_configs, to_plain, trace_config
from t2i_experts.config.origins import Setting, flatten, trace


def test_the_last_layer_that_says_a_value_is_its_origin() -> None:
    layers = [
        ("base", {"a": {"x": 1, "y": 1, "list": [1, 2]}, "b": 1, "c": "???"}),
        ("middle", {"a": {"y": 2}, "c": 2, "d": {}}),
        ("last", {"a": {"list": [3]}, "b": "???", "e": "${a}"}),
    ]
    resolved = {"a": {"x": 1, "y": 2, "list": [3]}, "b": 1, "c": 2, "d": {"z": 0}, "e": {"x": 1}, "f": None}
    assert trace(resolved, layers) == {
        "a.x": Setting(1, "base"),
        "a.y": Setting(2, "middle"),
        "a.list": Setting([3], "last"),
        "b": Setting(1, "base"),
        "c": Setting(2, "middle"),
        "d.z": Setting(0, "default"),
        "e.x": Setting(1, "last"),
        "f": Setting(None, "default"),
    }


def test_a_chain_of_files_and_overrides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("deeper").mkdir()
    Path("deeper/middle.yaml").write_text("extends: tiny/base64\ntraining: {images: 64, batch_size: 16}\n")
    Path("mine.yaml").write_text("extends: deeper/middle.yaml\ntraining: {batch_size: 4}\ndata: {train: [a]}\n")
    overrides = ["sampling.rho=5", "training={seed: 3, optimizer: {beta1: 0.5}}", "sampling.rho=6"]
    config, settings = trace_config("mine.yaml", overrides)
    assert config == load_config("mine.yaml", overrides)
    assert {key: setting.value for key, setting in settings.items()} == flatten(to_plain(config))
    assert {
        key: settings[key].origin
        for key in ("output", "data.train", "training.batch_size", "training.images", "stage.encoders.t5.drop", "training.keep_checkpoints")
    } == {
        "output": "tiny/base64 (shipped)",
        "data.train": "mine.yaml",
        "training.batch_size": "mine.yaml",
        "training.images": "deeper/middle.yaml",
        "stage.encoders.t5.drop": "tiny/base64 (shipped)",
        "training.keep_checkpoints": "default",
    }
    assert settings["sampling.rho"] == Setting(6.0, "override 'sampling.rho=6'")
    assert settings["training.seed"].origin == settings["training.optimizer.beta1"].origin == f"override {overrides[1]!r}"
    assert settings["training.optimizer.beta2"].origin == "tiny/base64 (shipped)"


@pytest.mark.parametrize("name", shipped_configs())
def test_taking_an_override_away_changes_only_what_it_is_the_origin_of(name: str) -> None:
    override = "training={seed: 77, ema: {rampup: 0.33}}"
    _, before = trace_config(name)
    _, after = trace_config(name, [override])
    changed = {key for key in before if before[key] != after[key]}
    assert changed == {key for key, setting in after.items() if setting.origin == f"override {override!r}"}
    assert changed == {"training.seed", "training.ema.rampup"}
