"""Configs are read strictly, say what is wrong with them, and come back from disk as they were."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from t2i_experts.config import (
    EncoderConfig,
    ResolutionSpec,
    RunConfig,
    SamplingConfig,
    build_config,
    check_sampling,
    differences,
    from_plain,
    load_config,
    to_plain,
    to_yaml,
)

SHIPPED = sorted((Path(__file__).parents[1] / "configs").glob("**/*.yaml"))

BASE = """
output: runs/x
stage:
  size: 16
  network:
    resolutions: [{channels: 8, blocks: 1}, {channels: 16, blocks: 1, self_attention: true, cross_attention: true}]
    embedding_channels: 16
    context_channels: 16
    head_channels: 8
  encoders:
    t5: {kind: t5, model: t5, width: 16, drop: 0.2}
data: {train: [shards/a, shards/b]}
training: {images: 64, batch_size: 8, checkpoint_every_images: 16, log_every_images: 16}
"""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base.yaml"
    path.write_text(BASE)
    return path


def error_of(path: Path, *overrides: str) -> str:
    with pytest.raises(ValueError) as caught:
        load_config(path, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def child(parent: Path, text: str, name: str = "child.yaml") -> Path:
    path = parent.parent / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


# Reading


def test_values_and_defaults(base: Path) -> None:
    config = load_config(base)
    assert config.stage.network.resolutions[1] == ResolutionSpec(16, 1, self_attention=True, cross_attention=True)
    assert config.stage.encoders == {"t5": EncoderConfig("t5", "t5", width=16, drop=0.2)}
    assert config.data.train == ["shards/a", "shards/b"]
    assert config.training.optimizer.learning_rate == 1e-4
    assert config.sampling == SamplingConfig()


def test_extends_goes_over_several_files_and_folders(base: Path) -> None:
    middle = child(base, "extends: ../base.yaml\ntraining: {images: 128, batch_size: 4}\n", "deeper/middle.yaml")
    last = child(base, "extends: deeper/middle.yaml\ntraining: {batch_size: 2}\ndata: {train: [shards/c]}\n")
    config = load_config(last)
    assert (config.training.images, config.training.batch_size, config.training.checkpoint_every_images) == (128, 2, 16)
    assert config.data.train == ["shards/c"], "lists are replaced"
    assert load_config(middle).training.batch_size == 4
    assert config.stage == load_config(base).stage


def test_an_overlay_adds_to_a_mapping(base: Path) -> None:
    overlay = child(base, "extends: base.yaml\nstage: {encoders: {clip: {kind: clip_text, model: clip, width: 8}, t5: {drop: 0.5}}}\n")
    encoders = load_config(overlay).stage.encoders
    assert list(encoders) == ["t5", "clip"]
    assert (encoders["t5"].width, encoders["t5"].drop) == (16, 0.5)


def test_extends_in_a_circle_or_to_nowhere(base: Path) -> None:
    first = child(base, "extends: b.yaml\n", "a.yaml")
    child(base, "extends: a.yaml\n", "b.yaml")
    message = error_of(first)
    assert "circle" in message
    assert "a.yaml -> " in message and "b.yaml -> " in message
    assert "circle" in error_of(child(base, "extends: own.yaml\n", "own.yaml"))
    message = error_of(child(base, "extends: gone.yaml\n", "lost.yaml"))
    assert "not found" in message and "gone.yaml" in message and "lost.yaml" in message


@pytest.mark.parametrize(
    ("text", "said"), [("a: [1", "not valid YAML"), ("- 1\n- 2\n", "keys and values"), ("a: 1\na: 2\n", "not valid YAML")]
)
def test_a_file_that_is_no_config(base: Path, text: str, said: str) -> None:
    path = child(base, text)
    message = error_of(path)
    assert str(path) in message and said in message


def test_no_file_and_no_text(base: Path) -> None:
    assert "not found" in error_of(base.with_name("nowhere.yaml"))
    assert f"CONFIG='{base.parent}' is a folder, which holds the YAML files {base};" in error_of(base.parent)
    assert f"extends='.' is a folder, which holds the YAML files {base}" in error_of(child(base, "extends: .\n"))
    assert "folder" not in error_of("")
    base.write_bytes(b"output: \xff\xfe")
    assert str(base) in error_of(base)


# Overrides


def test_overrides_come_last_and_have_the_types_of_yaml(base: Path) -> None:
    config = load_config(
        child(base, "extends: base.yaml\ntraining: {optimizer: {learning_rate: 3e-4}}\n"),
        [
            "training.optimizer.eps=1e-6",
            "training.batch_size=16",
            "training.batch_size=32",
            "training.compile=true",
            "data.train=[x, 'y=z']",
            "output=runs/a=b",
            "training.preview.prompts=['a: b', '1e-4']",
            "stage.encoders.t5.pretrained=null",
            "stage.encoders.t5.drop=0",
        ],
    )
    assert config.training.optimizer.learning_rate == 3e-4
    assert config.training.optimizer.eps == 1e-6
    assert config.training.batch_size == 32
    assert config.training.compile is True
    assert config.data.train == ["x", "y=z"]
    assert config.output == "runs/a=b"
    assert config.training.preview.prompts == ["a: b", "1e-4"]
    assert config.stage.encoders["t5"].drop == 0.0


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.0e-4", "0.0001", "1_0e-5"])
def test_floats_as_people_write_them(base: Path, text: str) -> None:
    """YAML alone reads 1e-4 as a string."""
    overlay = child(base, f"extends: base.yaml\ntraining: {{optimizer: {{learning_rate: {text}}}}}\n")
    assert load_config(overlay).training.optimizer.learning_rate == pytest.approx(1e-4)
    assert load_config(base, [f"training.optimizer.learning_rate={text}"]).training.optimizer.learning_rate == pytest.approx(1e-4)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("training.images", ["'training.images'", "key=value"]),
        ("", ["key=value"]),
        ("data.train=[a", ["'data.train=[a'", "not valid YAML"]),
        ("=5", ["''", "RunConfig"]),
    ],
)
def test_what_is_no_override(base: Path, override: str, said: list[str]) -> None:
    message = error_of(base, override)
    assert all(part in message for part in said), message


# Strictness


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("training.imags=3", ["training.imags", "'images'", "batch_size"]),
        ("stage.encoders.t5.wdith=3", ["stage.encoders.t5.wdith", "'width'", "max_tokens"]),
        ("stage.network.resolutions=[{channels: 8, blocks: 1, chanels: 3}]", ["'chanels'", "'channels'", "ResolutionSpec"]),
        ("nonsense=1", ["'nonsense'", "allowed: output, stage, data, training, sampling"]),
        ("training.learning_rate=1", ["training.learning_rate", "optimizer"]),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_and_the_allowed(base: Path, override: str, said: list[str]) -> None:
    message = error_of(base, override)
    assert message.startswith(f"override {override!r}: "), "the mistake is not in the file"
    assert all(part in message for part in said), message


def test_an_unknown_key_in_a_file_is_named_too(base: Path) -> None:
    message = error_of(path := child(base, "extends: base.yaml\ntraining: {ema: {half_life_kimg: 3}}\n"))
    assert message.startswith(f"{path}: ")
    assert "training.ema.half_life_kimg" in message and "'halflife_kimg'" in message


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("training.images=many", ["training.images", "'many'", "Integer"]),
        ("training.images=1.5", ["training.images", "1.5"]),
        ("training.images=true", ["training.images", "True"]),
        ("training.images=null", ["training.images", "None"]),
        ("training.compile=maybe", ["training.compile", "'maybe'", "bool"]),
        ("training.precision=fp16", ["training.precision", "'fp16'", "['fp32', 'bf16']"]),
        ("stage.encoders.t5.dtype=float16", ["stage.encoders.t5.dtype", "'float16'", "bfloat16"]),
        ("data.train=abc", ["data.train"]),
        ("training.preview.prompts=[null]", ["training.preview.prompts[0]", "None"]),
        ("training=3", ["3", "TrainingConfig"]),
        ("stage.encoders.t5=null", ["stage.encoders.t5"]),
        ("stage.network.resolutions=3", ["stage.network.resolutions"]),
        ("sampling.guidance_interval=[1]", ["sampling.guidance_interval=[1]", "length 1", "length 2"]),
        ("output=${nowhere}", ["output", "nowhere"]),
    ],
)
def test_a_wrong_type_is_named_with_its_value(base: Path, override: str, said: list[str]) -> None:
    message = error_of(base, override)
    assert all(part in message for part in said), message


@pytest.mark.parametrize(
    "key",
    ["output", "stage.network.embedding_channels", "stage.network.resolutions", "stage.encoders.t5.model", "data.train", "training.images"],
)
def test_a_missing_value_is_named(base: Path, key: str) -> None:
    tree = to_plain(load_config(base))
    *path, last = key.split(".")
    holder = tree
    for part in path:
        holder = holder[part]
    del holder[last]
    with pytest.raises(ValueError, match="missing mandatory value") as caught:
        build_config(tree)
    assert key in str(caught.value)


def test_an_empty_file_misses_what_has_no_default(base: Path) -> None:
    """All of it is named at once, in words of ours, and where to begin; where a file has begun, only what it lacks."""
    base.write_text("# nothing but a comment\n")
    assert error_of(base).startswith(
        f"{base} is empty: missing mandatory value: data, output, stage, training; with `extends: tiny/base64`"
    )
    assert error_of(child(base, "extends: tiny/base64\nstage: {encoders: {clap_text: {drop: 0}}}\n")).endswith(
        ": missing mandatory value: stage.encoders.clap_text.kind, stage.encoders.clap_text.model, stage.encoders.clap_text.width; "
        "did you mean stage.encoders.clip_text?"
    )


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("stage.network.resolutions=[]", "stage.network.resolutions is empty"),
        ("stage.size=17", "stage.size=17 must be a multiple of 2 for 2 resolutions"),
        ("stage.size=0", "stage.size=0 must be positive"),
        ("stage.buckets=[[16, 16], [20]]", "stage.buckets[1]=[20] must be [width, height], both positive"),
        ("stage.buckets=[[16, 16], [20, 0]]", "stage.buckets[1]=[20, 0] must be [width, height], both positive"),
        ("stage.buckets=[[16, 16], [15, 17]]", "stage.buckets[1]=[15, 17]: both must be multiples of 2 for 2 resolutions"),
        ("stage.buckets=[[16, 16], [20, 18]]", "stage.buckets[1]=[20, 18] has 360 pixels; allowed is 3/4 to 5/4 of stage.size^2 = 256"),
        ("stage.buckets=[[16, 16], [18, 18]]", "stage.buckets[1]=[18, 18] has 324 pixels"),
        ("stage.buckets=[[16, 16], [14, 14]]", "stage.buckets[1]=[14, 14] has the aspect ratio of stage.buckets[0]"),
        ("stage.buckets=[[20, 12], [12, 20]]", "stage.buckets=[[20, 12], [12, 20]] must hold the square [16, 16]"),
        ("stage.buckets=[wide]", "stage.buckets"),
        ("stage.network.head_channels=0", "stage.network.head_channels=0 must be positive"),
        ("stage.network.head_channels=7", "stage.network.resolutions[1].channels=16 must be a multiple of head_channels=7"),
        ("stage.network.resolutions=[{channels: 8, blocks: 0}]", "stage.network.resolutions[0] has channels=8, blocks=0"),
        ("stage.network.embedding_channels=-1", "stage.network.embedding_channels=-1 must be positive"),
        ("stage.network.context_channels=0", "stage.network.context_channels=0 must be positive"),
        ("stage.network.patch_size=0", "stage.network.patch_size=0 must be positive"),
        ("stage.network.patch_size=16", "stage.size=16 must be a multiple of 32 for 2 resolutions and patch_size 16"),
        ("stage.network.dropout=1", "stage.network.dropout=1.0 must lie in [0, 1)"),
        (
            "stage.network.resolutions=[{channels: 8, blocks: 1, self_attention: true}]",
            "stage.network.resolutions: at least one needs cross_attention: true",
        ),
        *(
            (f"stage.name={name!r}", f"stage.name={name!r} must be letters")
            for name in ("t5", "clip", "tokenizer", "..", "a/b", "a.b", "a b")
        ),
        ("stage.name=''", "stage.name='' must be letters"),
        ("stage.encoders={a.b: {kind: t5, model: t5, width: 16}}", "stage.encoders.a.b: an encoder's name must be letters"),
        ("stage.encoders={base64: {kind: t5, model: t5, width: 16}}", "stage.encoders.base64: an encoder's name must be"),
        ("stage.encoders={x: {kind: clip_image, model: m, width: 8}}", "stage.encoders.x.max_tokens=77 must be 1 for kind clip_image"),
        ("stage.encoders.t5.width=0", "stage.encoders.t5.width=0 must be positive"),
        ("stage.encoders.t5.pooled_width=-1", "stage.encoders.t5.pooled_width=-1 must be finite and not negative"),
        ("stage.encoders.t5.max_tokens=0", "stage.encoders.t5.max_tokens=0 must be positive"),
        ("stage.noise.mean=nan", "stage.noise.mean=nan must be finite"),
        ("stage.encoders.t5.drop=1", "stage.encoders.t5.drop=1.0 must lie in [0, 1)"),
        ("stage.encoders.t5.drop=-0.1", "stage.encoders.t5.drop=-0.1 must lie in [0, 1)"),
        ("stage.noise.std=0", "stage.noise.std=0.0 must be positive"),
        ("stage.noise.std=nan", "stage.noise.std=nan must be positive"),
        ("stage.noise.std=inf", "stage.noise.std=inf must be positive and finite"),
        ("stage.noise.sigma_data=-0.5", "stage.noise.sigma_data=-0.5 must be positive"),
        ("training.images=0", "training.images=0 must be positive"),
        ("training.batch_size=0", "training.batch_size=0 must be positive"),
        ("training.accumulation=0", "training.accumulation=0 must be positive"),
        ("training.accumulation=3", "training.batch_size=8 must be a multiple of training.accumulation=3"),
        ("training.checkpoint_every_images=-1", "training.checkpoint_every_images=-1 must be positive"),
        ("training.log_every_images=0", "training.log_every_images=0 must be positive"),
        ("training.keep_checkpoints=0", "training.keep_checkpoints=0 must be positive"),
        ("training.validation.bins=0", "training.validation.bins=0 must be positive"),
        ("training.validation.images=0", "training.validation.images=0 must be positive"),
        ("training.validation.every_images=-1", "training.validation.every_images=-1 must be finite and not negative"),
        ("training.validation.every_images=8", "training.validation.every_images=8 needs data.validation; set it to 0, or name"),
        ("training.preview.every_images=-1", "training.preview.every_images=-1 must be finite and not negative"),
        ("training.preview.every_images=8", "training.preview.every_images=8 needs training.preview.prompts; 0 draws none"),
        ("training.max_minutes=-1", "training.max_minutes=-1.0 must be finite and not negative"),
        ("training.max_minutes=inf", "training.max_minutes=inf must be finite and not negative"),
        *(
            (f"training.{key}={value}", f"training.{key}={value} must be finite and not negative")
            for key in ("optimizer.learning_rate", "optimizer.clip_norm", "optimizer.weight_decay", "ema.rampup")
            for value in ("-0.5", "nan", "inf")
        ),
        ("training.optimizer.warmup_images=-1", "training.optimizer.warmup_images=-1 must be finite and not negative"),
        ("training.optimizer.beta2=1", "training.optimizer.beta2=1.0 must lie in [0, 1)"),
        (
            "training.ema.snapshot_every_images=8",
            "training.ema.snapshot_every_images=8 needs training.ema.kind=power; received kind=halflife",
        ),
        ("training.ema.sigma_rel=[0.1]", "training.ema.sigma_rel=[0.1] needs training.ema.kind=power"),
        *(
            (f"training.ema={{kind: power, sigma_rel: {widths}}}", f"training.ema.sigma_rel={widths} must be one or more different widths")
            for widths in ("[]", "[0.0]", "[0.1, 0.29]", "[0.1, 0.1]", "[nan]")
        ),
        ("training.ema={kind: power, snapshot_every_images: -1}", "training.ema.snapshot_every_images=-1 must be finite and not negative"),
        ("training.gradient_checkpointing=-1", "training.gradient_checkpointing=-1 must be finite and not negative"),
        ("training.gradient_checkpointing=3", "training.gradient_checkpointing=3: the network has 2 resolutions"),
        ("training.ema.halflife_kimg=0", "training.ema.halflife_kimg=0.0 must be positive"),
        ("data.workers=-1", "data.workers=-1 must be finite and not negative"),
        ("training.device=gpu", "training.device='gpu'; allowed: cpu, or null"),
        ("training.preview.steps=0", "training.preview.steps=0 must be at least 1"),
        ("training.preview.guidance=-1", "training.preview.guidance=-1.0 must be finite and not negative"),
        ("sampling.steps=0", "sampling.steps=0 must be at least 1"),
        ("sampling.guidance=-1", "sampling.guidance=-1.0 must be finite and not negative"),
        ("sampling.guidance=inf", "sampling.guidance=inf must be finite and not negative"),
        ("sampling.guidance_interval=[2, 1]", "sampling.guidance_interval=(2.0, 1.0) must be [lo, hi] with 0 <= lo < hi"),
        ("sampling.threshold=1", "sampling.threshold=1.0 must lie in [0, 1)"),
        ("sampling.sigma_min=90", "sampling.sigma_min=90.0 must be positive and below sampling.sigma_max=80.0"),
        ("sampling.sigma_min=0", "sampling.sigma_min=0.0 must be positive"),
        ("sampling.rho=0", "sampling.rho=0.0 must be positive and finite"),
        ("data.train=[]", "data.train is empty"),
    ],
)
def test_rules_between_values(base: Path, override: str, said: str) -> None:
    assert said in error_of(base, override)


@pytest.mark.parametrize(
    "override",
    [
        "training.optimizer.clip_norm=0",
        "training.optimizer.learning_rate=0",
        "training.ema.rampup=0",
        "training.ema={kind: power, sigma_rel: [0.28], snapshot_every_images: 0}",
        "training.gradient_checkpointing=2",
        "training.preview.prompts=[a]",
        "data.validation=v",
        "stage.name=base-64_b",
        "stage.network.patch_size=8",
        "stage.buckets=[[16, 16], [16, 12], [20, 16]]",
    ],
)
def test_what_is_allowed_at_the_edge(base: Path, override: str) -> None:
    load_config(base, [override])


def test_at_least_one_encoder(base: Path) -> None:
    base.write_text(BASE.replace("encoders:\n    t5: {kind: t5, model: t5, width: 16, drop: 0.2}", "encoders: {}"))
    assert "stage.encoders is empty" in error_of(base)


def test_the_prefix_of_a_sampling_rule_is_the_callers() -> None:
    check_sampling(SamplingConfig())
    check_sampling(SamplingConfig(steps=1, guidance=0, threshold=0.995, guidance_interval=(0.3, 5.0)))
    with pytest.raises(ValueError, match=r"^--steps=0 must"):
        check_sampling(SamplingConfig(steps=0), "--")


# Writing and comparing


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: "/".join(path.parts[-2:]))
def test_every_shipped_config_comes_back_as_it_was(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    (tmp_path / "again.yaml").write_text(to_yaml(config), encoding="utf-8")
    again = load_config(tmp_path / "again.yaml")
    assert again == config
    assert build_config(json.loads(json.dumps(to_plain(config), allow_nan=False))) == config


def test_there_are_shipped_configs() -> None:
    assert SHIPPED


def test_text_that_looks_like_something_else_comes_back_as_text(base: Path) -> None:
    prompts = ["yes", "1e-4", "null", "a: b", "# c", "猫 🐈", "inf", " x ", "two\nlines", "'\"", "{a: b}", "12:30", ""]
    config = load_config(base)
    config = replace(config, training=replace(config.training, preview=replace(config.training.preview, prompts=prompts)))
    base.write_text(to_yaml(config), encoding="utf-8")
    assert load_config(base).training.preview.prompts == prompts


def test_infinity_survives_yaml_json_and_plain_values(base: Path) -> None:
    config = load_config(base, ["sampling.guidance_interval=[0.28, inf]"])
    assert config.sampling.guidance_interval == (0.28, math.inf)
    base.write_text(to_yaml(config))
    assert load_config(base).sampling.guidance_interval == (0.28, math.inf)
    tree = json.loads(json.dumps(to_plain(config.sampling), allow_nan=False))
    again = from_plain(SamplingConfig, tree)
    assert again == config.sampling
    assert isinstance(again.guidance_interval, tuple)


def test_from_plain_is_strict() -> None:
    with pytest.raises(ValueError, match=r"SamplingConfig: .*'stepz'.*'steps'"):
        from_plain(SamplingConfig, {"stepz": 3})
    with pytest.raises(ValueError, match=r"SamplingConfig: steps.*'few'"):
        from_plain(SamplingConfig, {"steps": "few"})


def leaves(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    children = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    found = False
    for key, value in children:
        found = True
        yield from leaves(value, (*path, key))
    if not found:
        yield path


def changed(tree: Any, path: tuple[Any, ...]) -> Any:
    """A copy in which the one value at `path` is another."""
    copy = deepcopy(tree)
    holder = copy
    for key in path[:-1]:
        holder = holder[key]
    match holder[path[-1]]:
        case bool(value):
            holder[path[-1]] = not value
        case int(value) | float(value):
            holder[path[-1]] = value + 1
        case str(value):
            holder[path[-1]] = value + "x"
        case None:
            holder[path[-1]] = "x"
        case _:
            holder[path[-1]] = ["x"]
    return copy


def test_any_value_that_changes_is_a_difference(base: Path) -> None:
    plain = to_plain(load_config(base, ["training.preview.prompts=[a, b]"]))
    paths = list(leaves(plain))
    assert len(paths) > 60
    for path in paths:
        (line,) = differences(plain, changed(plain, path))
        keys = [key for key in path if not isinstance(key, int)]
        assert line.startswith(".".join(keys[: line.split(":")[0].count(".") + 1]) + ": ")
        assert " -> " in line


def test_equal_values_have_no_differences_whatever_their_order_on_the_page(base: Path) -> None:
    overlay = child(base, "sampling: {rho: 7, steps: 25}\nextends: base.yaml\n")
    assert list(differences(to_plain(load_config(base)), to_plain(load_config(overlay)))) == []


def test_differences_are_told_by_key_from_old_to_new(base: Path) -> None:
    old: RunConfig = load_config(base)
    new = load_config(base, ["training.optimizer.learning_rate=1e-3", "data.train=[z]", "data.validation=v"])
    assert list(differences(to_plain(old), to_plain(new))) == [
        "data.train: ['shards/a', 'shards/b'] -> ['z']",
        "data.validation: None -> 'v'",
        "training.optimizer.learning_rate: 0.0001 -> 0.001",
    ]
    extra = load_config(base, ["stage.encoders.clip={kind: clip_text, model: m, width: 3}"])
    (line,) = differences(to_plain(old), to_plain(extra))
    assert line.startswith("stage.encoders.clip: None -> {'kind': 'clip_text'")
