"""Runs on shards behind URLs: they go on after a stop, name what they cannot read, and end when that is too much."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from t2i_experts.config import load_config
from t2i_experts.training.task import Batch, DiffusionTask
from t2i_experts.training.trainer import Trainer, train

WriteConfig = Callable[[str], Path]


@pytest.fixture
def overrides(tmp_path: Path, shards: Path, tar_server: Any) -> list[str]:
    """Three tars of 16, 16 and 8 samples."""
    shutil.copytree(shards / "train", tmp_path / "remote")
    urls = f"data.train=['{tar_server.url}/remote/{{00000..00002}}.tar']"
    return [urls, "data.workers=2", "training.validation.every_images=0", "training.preview.every_images=0"]


def events(root: Path, kind: str) -> list[dict[str, Any]]:
    return [event for line in (root / "log.jsonl").read_text().splitlines() if (event := json.loads(line))["event"] == kind]


def test_a_run_reads_streams_and_goes_on_after_a_kill(
    write_config: WriteConfig,
    tmp_path: Path,
    overrides: list[str],
    tar_server: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    seen: list[Batch] = []
    losses = DiffusionTask.losses

    def dying(self: DiffusionTask, denoiser: Any, batch: Batch) -> Any:
        if len(seen) == 4:
            raise KeyboardInterrupt
        seen.append(batch)
        return losses(self, denoiser, batch)

    for i in range(3):
        tar_server.answers[f"remote/0000{i}.tar"] = [503, "cut"]
    config = load_config(write_config("run"), overrides)
    monkeypatch.setattr(DiffusionTask, "losses", dying)
    with pytest.raises(KeyboardInterrupt):
        train(config, progress=False)
    assert capsys.readouterr().err.count("data.train is read as streams from 3 tars") == 1
    monkeypatch.setattr(DiffusionTask, "losses", lambda self, denoiser, batch: seen.append(batch) or losses(self, denoiser, batch))
    trainer = Trainer(config, progress=False)
    assert trainer.state.images_seen == 32 and trainer.sizes()["tars"] == 3
    assert (trainer.run() / "model_index.json").is_file()
    assert [position for batch in seen for position in batch.positions] == list(range(64)), "each place once, on both sides of the kill"
    uniform = [float(value) for batch in seen for value in batch.uniform]
    assert len(set(uniform)) == len(uniform), "no noise level is drawn twice"
    before, after = ([key for batch in part for key in batch.keys] for part in (seen[:4], seen[4:]))
    assert before != after
    assert not events(tmp_path / "run", "unreadable")
    with pytest.raises(ValueError, match="was trained on other shards"):
        Trainer(load_config(write_config("run"), [overrides[0].replace("00002}", "00001}"), *overrides[1:]]), progress=False)


def test_a_tar_that_stays_unreadable_is_named_once_and_counts_for_the_limit(
    write_config: WriteConfig, tmp_path: Path, overrides: list[str], tar_server: Any
) -> None:
    tar_server.answers["remote/00001.tar"] = [500] * 10_000
    overrides = [*overrides, "data.max_unreadable=0.5", "training.log_every_images=8"]
    train(load_config(write_config("run"), overrides), progress=False)
    (event,) = events(tmp_path / "run", "unreadable")
    assert event["shard"] == f"{tar_server.url}/remote/00001.tar" and event["key"] is None and "HTTP Error 500" in event["why"]
    assert events(tmp_path / "run", "train")[-1]["unreadable_draws"] > 1
    with pytest.raises(ValueError, match=r"data\.max_unreadable=0\.0 allows"):
        train(load_config(write_config("other"), [*overrides, "data.max_unreadable=0"]), progress=False)


def test_nothing_to_read_is_one_message(write_config: WriteConfig, overrides: list[str], tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "remote")
    with pytest.raises(ValueError, match=r"remote/0000\d\.tar: HTTP Error 404: Not Found\. [^\n]*3 tars in a row"):
        train(load_config(write_config("run"), overrides), progress=False)


@pytest.mark.parametrize(
    ("override", "why"),
    [
        ("data.train=[shards, 'http://a/0.tar']", r"data\.train=.* mixes URLs with folders \(shards\)"),
        ("data.validation='s3://a/0.tar'", r"data\.validation='s3://a/0\.tar' must be a shard folder"),
    ],
)
def test_what_streams_cannot_be_used_for(write_config: WriteConfig, override: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        load_config(write_config("run"), [override])
