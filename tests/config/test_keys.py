"""An unknown key is named in full, with the one that was meant, wherever it stands."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from t2i_experts.config import RunConfig, TrainingConfig, load_config, to_plain
from t2i_experts.config.keys import check_keys, check_shapes
from t2i_experts.config.shipped import shipped_configs


@pytest.mark.parametrize(
    ("tree", "key", "hint"),
    [
        ({"trainig": {"images": 3}}, "trainig", "did you mean 'training'?"),
        ({"training": {"optimzer": {"learning_rate": 1}}}, "training.optimzer", "did you mean 'optimizer'?"),
        ({"training": {"optimizer": {"learning_rte": 1}}}, "training.optimizer.learning_rte", "did you mean 'learning_rate'?"),
        ({"stage": {"encoders": {"any": {"wdith": 1}}}}, "stage.encoders.any.wdith", "did you mean 'width'?"),
        ({"stage": {"network": {"resolutions": [{}, {"chanels": 8}]}}}, "stage.network.resolutions[1].chanels", "did you mean 'channels'?"),
        ({"training": {"learning_rate": 1}}, "training.learning_rate", "did you mean 'training.optimizer.learning_rate'?"),
        ({"lerning_rate": 1}, "lerning_rate", "did you mean 'training.optimizer.learning_rate'?"),
        ({"batch_size": 1}, "batch_size", "did you mean 'training.batch_size'?"),
        ({"stage": {"max_tokens": 1}}, "stage.max_tokens", "did you mean 'stage.encoders.NAME.max_tokens'?"),
        ({"steps": 1}, "steps", "did you mean 'training.preview.steps' or 'sampling.steps' or 'sampling.experts.NAME.steps'?"),
    ],
)
def test_the_key_that_was_meant(tree: Any, key: str, hint: str) -> None:
    with pytest.raises(ValueError) as caught:
        check_keys(RunConfig, tree)
    assert str(caught.value).startswith(f"{key}: unknown key ")
    assert hint in str(caught.value)


def test_what_is_like_nothing_gets_no_hint_but_all_that_is_allowed() -> None:
    with pytest.raises(ValueError) as caught:
        check_keys(RunConfig, {"training": {"nonsense": 1}})
    assert "did you mean" not in str(caught.value)
    assert str(caught.value).endswith(f"allowed: {', '.join(field.name for field in fields(TrainingConfig))}")


def test_a_slip_in_any_one_key_of_a_whole_config_is_put_right() -> None:
    """Every key of a config, at every depth, with its last letter doubled, leads back to the key."""

    def slips(tree: Any, rebuild: Any) -> None:
        items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
        for name, value in items:
            if isinstance(name, str) and name not in encoders:
                broken = {key: inner for key, inner in tree.items() if key != name} | {name + name[-1]: value}
                with pytest.raises(ValueError, match=f"unknown key '{name + name[-1]}' in .*; did you mean '{name}'"):
                    check_keys(RunConfig, rebuild(broken))
                tried.append(name)
            holder = dict(tree) if isinstance(tree, dict) else dict(enumerate(tree))
            is_list = isinstance(tree, list)

            def inside(inner: Any, name: Any = name, holder: Any = holder, is_list: bool = is_list) -> Any:
                changed = holder | {name: inner}
                return rebuild(list(changed.values()) if is_list else changed)

            slips(value, inside)

    config = load_config("tiny/base64")
    encoders, tried = set(config.stage.encoders), list[str]()
    slips(to_plain(config), lambda tree: tree)
    assert len(tried) > 90


@pytest.mark.parametrize("name", shipped_configs())
def test_what_is_right_passes(name: str) -> None:
    check_keys(RunConfig, to_plain(load_config(name)))
    check_keys(RunConfig, {"stage": 3, "training": "${other}", "data": None})  # wrong types are told of elsewhere


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ({"training": 3}, ["training: ", "TrainingConfig", "3"]),
        ({"training": {"optimizer": None}}, ["training.optimizer: ", "OptimizerConfig", "None"]),
        ({"stage": {"encoders": [1]}}, ["stage.encoders: ", "[1]"]),
        ({"stage": {"encoders": {"t5": 3}}}, ["stage.encoders.t5: ", "EncoderConfig", "3"]),
        ({"data": {"train": "x"}}, ["data.train: ", "'x'", "[a, b]"]),
        ({"data": {"train": {"0": "x"}}}, ["data.train: ", "as a whole"]),
        ({"stage": {"network": {"resolutions": [{}, 3]}}}, ["stage.network.resolutions[1]: ", "ResolutionSpec", "3"]),
        ({"sampling": {"guidance_interval": [1]}}, ["sampling.guidance_interval: ", "length 1", "length 2"]),
    ],
)
def test_what_has_no_values_below_it_where_it_should_is_named(tree: Any, said: list[str]) -> None:
    check_keys(RunConfig, tree)
    with pytest.raises(ValueError) as caught:
        check_shapes(RunConfig, tree)
    assert all(part in str(caught.value) for part in said), caught.value


@pytest.mark.parametrize("name", shipped_configs())
def test_what_is_rightly_shaped_passes(name: str) -> None:
    check_shapes(RunConfig, to_plain(load_config(name)))
    check_shapes(RunConfig, {"stage": "???", "training": "${other}", "data": {"train": "${all}"}, "output": 3})
