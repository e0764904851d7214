"""`t2i-experts config` as a stranger uses it."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from t2i_experts.config import load_config, shipped_configs, to_plain, trace_config

Config = Callable[..., tuple[int, str, str]]


@pytest.fixture
def config(cli: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Config:
    """config(*arguments) -> exit code, stdout, stderr, in an empty working directory."""
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    return functools.partial(cli, "config")


@pytest.mark.parametrize("name", shipped_configs())
def test_what_show_prints_is_the_same_config_again(config: Config, name: str) -> None:
    prompts = '["# no comment", "yes", "a: b", "two\\nlines", "猫 🐈", "null"]'
    overrides = [f"training.preview.prompts={prompts}", "sampling.guidance_interval=[0.28, inf]", "training.optimizer.eps=1e-12"]
    code, out, err = config("show", name, *overrides)
    assert (code, err) == (0, "")
    Path("again.yaml").write_text(out, encoding="utf-8")
    assert load_config("again.yaml") == load_config(name, overrides)


def test_show_has_an_origin_for_every_value(config: Config) -> None:
    Path("mine.yaml").write_text("extends: tiny/photos\nsampling: {rho: 5}\n")
    code, out, _ = config("show", "mine.yaml", "training.seed=3")
    lines = {line.split("#")[0].strip(): line.rpartition("  # ")[2] for line in out.splitlines()}
    assert code == 0
    assert lines["seed: 3"] == "override 'training.seed=3'"
    assert lines["rho: 5.0"] == "mine.yaml"
    assert lines['train: ["data/photos"]'] == "tiny/photos (shipped)"
    assert lines["batch_size: 8"] == lines["resolutions:"] == "tiny/base64 (shipped)"
    assert lines["weight_decay: 0.01"] == "default"
    assert out.count("  # ") == len(trace_config("mine.yaml")[1])

    code, out, _ = config("show", "mine.yaml", "training.seed=3", "--json")
    document = json.loads(out)
    assert document["training.seed"] == {"value": 3, "origin": "override 'training.seed=3'"}
    assert document == {
        key: {"value": setting.value, "origin": setting.origin}
        for key, setting in trace_config("mine.yaml", ["training.seed=3"])[1].items()
    }


def test_check(config: Config) -> None:
    assert config("check", "tiny/base64", "training.images=24") == (0, "tiny/base64: OK\n", "")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["tiny/base64", "training.optimzer.beta1=0.5"], ["training.optimzer", "'optimizer'"]),
        (["tiny/base64", "training.batch_size=9", "training.accumulation=2"], ["training.batch_size=9"]),
        (["tiny/base64", "sampling.sampler=dpmp_2m"], ["sampling.sampler", "'dpmp_2m'", "'dpmpp_2m'"]),
        (["tiny/base64", "stage.encoders.t5.kind=t6"], ["stage.encoders.t5.kind", "'t6'", "clip_image, clip_text, t5"]),
        (["tiny/base64", "stage.codec.kind=pixle"], ["stage.codec.kind: unknown codec 'pixle'", "'pixel'"]),
        (["tny/base64"], ["tny/base64", "did you mean 'tiny/base64'?"]),
    ],
)
def test_check_says_what_is_wrong(config: Config, arguments: list[str], said: list[str]) -> None:
    code, out, err = config("check", *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and len(err.splitlines()) == 1
    assert all(part in err for part in said), err


def test_diff(config: Config) -> None:
    Path("mine.yaml").write_text("extends: tiny/base64\nsampling: {rho: 5}\ntraining: {seed: 0, images: 24}\n")
    lines = "sampling.rho: 7.0 -> 5.0\ntraining.images: 8000 -> 24\n"
    assert config("diff", "tiny/base64", "mine.yaml") == (0, lines, ""), "a default that is spelt out is no difference"
    code, out, _ = config("diff", "mine.yaml", "tiny/base64", "--json")
    assert code == 0
    assert json.loads(out) == {"sampling.rho": {"a": 5.0, "b": 7.0}, "training.images": {"a": 24, "b": 8000}}
    assert config("diff", "tiny/base64", "tiny/base64.yaml") == (0, "no differences\n", "")
    code, _, err = config("diff", "tiny/base64", "nowhere")
    assert code == 2 and "nowhere" in err


def test_diff_with_a_run_and_its_checkpoint(config: Config) -> None:
    resolved = to_plain(load_config("tiny/base64", ["training.seed=9"]))
    checkpoint = Path("run/checkpoints/000000000016")
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text(json.dumps({"images_seen": 16, "config": resolved}))
    Path("run/config.yaml").write_text(json.dumps(resolved))
    assert config("diff", "run", checkpoint) == (0, "no differences\n", "")
    for folder in ("run", checkpoint):
        assert config("diff", "tiny/base64", folder) == (0, "training.seed: 0 -> 9\n", "")


def test_diff_with_a_model_folder_is_of_what_it_holds(config: Config, model_folder: Path, trained: Path) -> None:
    assert config("diff", trained / "model", trained / "best") == (0, "no differences\n", "")
    code, out, _ = config("diff", model_folder, trained, "--json")
    document = json.loads(out)
    assert code == 0 and document["sampling.steps"] == {"a": 4, "b": 3}
    assert document["stage.encoders.t5.model"]["a"] == "./t5" and document["stage.encoders.t5.drop"] == {"a": 0.0, "b": 0.2}
    assert {key.split(".")[0] for key in document} == {"stage", "sampling"}


def test_list(config: Config) -> None:
    code, out, _ = config("list")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == list(shipped_configs())
    assert "A base model that trains on a laptop's CPU in minutes" in out
    summaries = json.loads(config("list", "--json")[1])
    assert list(summaries) == list(shipped_configs())
    for name, summary in summaries.items():
        assert summary.endswith("."), f"the first line of {name} is a whole sentence"


def test_copy_brings_what_is_extended_and_overwrites_nothing(config: Config) -> None:
    assert config("copy", "tiny/photos") == (0, "tiny/photos.yaml\ntiny/base64.yaml\n", "")
    for name in ("tiny/photos", "tiny/base64"):
        assert Path(f"{name}.yaml").read_bytes() == shipped_configs()[name].read_bytes()
    origins = {setting.origin for setting in trace_config("tiny/photos")[1].values()}
    assert origins == {"tiny/photos.yaml", "tiny/base64.yaml", "default"}

    Path("tiny/photos.yaml").unlink()
    Path("tiny/base64.yaml").write_text("mine")
    code, out, err = config("copy", "tiny/photos")
    assert (code, out) == (2, "") and "tiny/base64.yaml" in err
    assert Path("tiny/base64.yaml").read_text() == "mine"
    assert not Path("tiny/photos.yaml").exists(), "all or nothing"


def test_copy_to_a_folder_or_a_file(config: Config) -> None:
    assert config("copy", "tiny/photos", "new")[1] == "new/tiny/photos.yaml\nnew/tiny/base64.yaml\n"
    assert config("copy", "tiny/photos", "own/mine.yaml")[1] == "own/mine.yaml\nown/base64.yaml\n"
    assert load_config("own/mine.yaml") == load_config("tiny/photos")
    assert config("copy", "tiny/base64.yaml", "mine.yaml")[1] == "mine.yaml\n"
    code, _, err = config("copy", "tiny/photos", "base64.yaml")
    assert code == 2 and "twice" in err and not Path("base64.yaml").exists()
    code, _, err = config("copy", "tiny/base64", "mine.yaml/inside")
    assert code == 2 and "DEST=" in err
    code, _, err = config("copy", "tiny")
    assert code == 2 and "NAME='tiny'" in err and "tiny/base64" in err


def test_a_config_that_extends_another_folders_is_copied_to_folders_only(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = tmp_path / "shipped"
    for name, text in {"a/base": "output: x\n", "b/child": "extends: ../a/base.yaml\n"}.items():
        (shipped / name).parent.mkdir(parents=True)
        (shipped / f"{name}.yaml").write_text(text)
    monkeypatch.setattr("t2i_experts.config.shipped.shipped_folder", lambda: shipped)
    monkeypatch.setattr("t2i_experts.config.shipped_folder", lambda: shipped)
    assert config("copy", "b/child")[1] == "b/child.yaml\na/base.yaml\n"
    code, _, err = config("copy", "b/child", "mine.yaml")
    assert code == 2 and "must be a folder" in err and "../a/base.yaml" in err
