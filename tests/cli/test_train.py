"""`t2i-experts train` as a stranger uses it: one command that trains, goes on, and says what is wrong with a config."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest

from t2i_experts.cli.app import main
from t2i_experts.config import load_config

WriteConfig = Callable[[str], Path]
Train = Callable[..., tuple[int, str, str]]


@pytest.fixture
def train(cli: Train) -> Train:
    """train(*arguments) -> exit code, stdout, stderr."""
    return functools.partial(cli, "train")


def test_it_trains_goes_on_and_says_when_it_is_finished(
    train: Train, write_config: WriteConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, model = write_config("run"), tmp_path / "run" / "model"
    command = (config, "training.preview.every_images=0", "--quiet")
    code, out, err = train(*command, "training.images=32", "training.max_minutes=1e-9")
    assert (code, out) == (0, "")
    assert err.splitlines() == [
        f"55,463 parameters on cpu, 40 samples, into {tmp_path / 'run'}",
        f"stopped at 8 of 32 images; the same command goes on; model: {model}",
        f't2i-experts generate "..." --model {model}',
    ]
    first = (model / "base64" / "diffusion_pytorch_model.safetensors").read_bytes()

    code, _, err = train(*command, "training.images=32")
    assert code == 0
    assert err.splitlines()[0] == f"going on from {tmp_path / 'run' / 'checkpoints' / '000000000008'}"
    assert err.splitlines()[2] == f"finished; model: {model}"
    weights = (model / "base64" / "diffusion_pytorch_model.safetensors").read_bytes()
    assert weights != first

    code, _, err = train(*command, "training.images=32")
    assert code == 0
    assert f"finished; model: {model}" in err
    assert (model / "base64" / "diffusion_pytorch_model.safetensors").read_bytes() == weights
    assert load_config(tmp_path / "run" / "config.yaml").training.images == 32

    code, _, err = train(*command, "training.images=16")
    assert "the run has already seen 32 images, more than training.images=16" in err

    with pytest.raises(SystemExit) as exit:
        main(["generate", "a red cube", "--model", str(model), "--device", "cpu", "--out", str(tmp_path / "x.png")])
    assert not exit.value.code
    assert (tmp_path / "x.png").is_file()


def test_overrides_and_the_progress_bar(train: Train, write_config: WriteConfig, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    code, out, err = train(write_config("run"), f"output={elsewhere}", "training.images=16", "training.optimizer.learning_rate=2e-3")
    assert (code, out) == (0, "")
    assert "100%" in err and "img/s" in err
    assert f"finished; model: {elsewhere / 'model'}" in err
    assert load_config(elsewhere / "config.yaml").training.optimizer.learning_rate == 2e-3
    assert not (tmp_path / "run").exists()


def test_another_config_for_an_existing_run_is_refused_with_the_difference(train: Train, write_config: WriteConfig) -> None:
    command = (write_config("run"), "training.images=16", "training.preview.every_images=0", "--quiet")
    assert train(*command)[0] == 0
    code, _, err = train(*command, "training.seed=1")
    assert code == 2
    assert err.startswith("error: ") and "training.seed: 0 -> 1" in err and "another output" in err


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["training.imags=3"], ["training.imags", "'images'"]),
        (["training.images"], ["'training.images'", "key=value"]),
        (["training.images=many"], ["training.images", "'many'"]),
        (["data.train=[a"], ["data.train=[a", "YAML"]),
        (["training.batch_size=9", "training.accumulation=2"], ["training.batch_size=9", "training.accumulation=2"]),
        (["training.device=cuda:7"], ["training.device='cuda:7'", "cpu"]),
        (["sampling.sampler=dpmp_2m"], ["sampler 'dpmp_2m'", "'dpmpp_2m'"]),
        (["data.train=[{tmp}/nowhere]"], ["{tmp}/nowhere", "not found"]),
        (["data.train=[{tmp}]"], ["{tmp}", "shards build"]),
        (["data.validation={tmp}/nowhere"], ["{tmp}/nowhere", "not found"]),
        (["stage.encoders.t5.model={tmp}/nowhere"], ["encoders.t5", "{tmp}/nowhere", "not a folder"]),
        (["stage.encoders.t5.model={tmp}"], ["encoders.t5", "{tmp}"]),
        (["stage.encoders.t5.model=embedded:nonsense"], ["encoders.t5", "embedded:nonsense", "allowed"]),
        (["stage.encoders.t5.kind=t6"], ["encoders.t5", "encoder 't6'", "clip_image, clip_text, t5"]),
        (["stage.encoders.t5.width=17"], ["encoders.t5.width=17", "16"]),
        (["stage.encoders.clip_text.pooled_width=0"], ["encoders.clip_text.pooled_width=0", "12"]),
    ],
)
def test_a_mistake_exits_with_2_and_leaves_no_run(
    train: Train, write_config: WriteConfig, tmp_path: Path, overrides: list[str], said: list[str]
) -> None:
    code, out, err = train(write_config("run"), *(override.format(tmp=tmp_path) for override in overrides))
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and "Traceback" not in err
    assert len(err.splitlines()) == 1
    assert all(part.format(tmp=tmp_path) in err for part in said), err
    assert not (tmp_path / "run").exists()


def test_a_config_that_is_not_there_or_not_yaml(train: Train, tmp_path: Path) -> None:
    (tmp_path / "broken.yaml").write_text("a: [1")
    for name, said in (("nowhere.yaml", "not found"), ("broken.yaml", "not valid YAML")):
        code, out, err = train(tmp_path / name)
        assert (code, out) == (2, "")
        assert err.startswith("error: ") and str(tmp_path / name) in err and said in err and "Traceback" not in err
    code, _, err = train()
    assert code == 2 and "CONFIG" in err


def test_an_interrupted_run_says_how_to_go_on(train: Train, write_config: WriteConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("t2i_experts.training.trainer.Trainer._report", interrupt)
    code, _, err = train(write_config("run"), "--quiet")
    assert code == 130
    assert "interrupted after 16 images; the same command goes on from the last checkpoint" in err
