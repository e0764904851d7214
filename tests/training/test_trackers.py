"""Trackers get what the log gets, never end a run, and continue where it does."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from accelerate.tracking import GeneralTracker

from t2i_experts.config import load_config
from t2i_experts.training import trackers
from t2i_experts.training.trackers import Trackers, open_trackers
from t2i_experts.training.trainer import Trainer, train

WriteConfig = Callable[[str], Path]


class Standin(GeneralTracker):
    """Keeps what it is given; fails from the `fails_after`-th call on."""

    name = "standin"
    requires_logging_directory = False

    def __init__(self, fails_after: int = 10**9) -> None:
        super().__init__()
        self.logged: list[tuple[int | None, Mapping[str, Any]]] = []
        self.shown: list[tuple[int, list[str]]] = []
        self.calls, self.fails_after, self.finished = 0, fails_after, False

    @property
    def tracker(self) -> None:
        return None

    def log(self, values: Mapping[str, Any], step: int | None = None, **_: Any) -> None:
        self.calls += 1
        if self.calls >= self.fails_after:
            raise ConnectionError("the network\nis down")
        self.logged.append((step, values))

    def pictures(self, images_seen: int, previews: Any) -> None:
        self.shown.append((images_seen, [prompt for prompt, picture in previews if picture.size == (16, 16)]))

    def finish(self) -> None:
        self.finished = True


def test_they_get_the_numbers_of_the_log_and_the_previews_with_their_prompts(
    write_config: WriteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    standin = Standin()
    monkeypatch.setattr("t2i_experts.training.trainer.open_trackers", lambda config, images_seen: Trackers([standin]))
    train(load_config(write_config("run")), progress=False)
    events = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    told = [event for event in events if event["event"] in ("train", "validation")]
    assert [step for step, _ in standin.logged] == [event["images_seen"] for event in told]
    for (_, values), event in zip(standin.logged, told, strict=True):
        assert values[f"{event['event']}/loss"] == event["loss"]
        if event["event"] == "train":
            assert {"train/learning_rate", "train/grad_norm", "train/images_per_second", "train/data_wait"} <= values.keys()
        else:
            ranges = [value for key, value in values.items() if key.startswith("validation_sigma/")]
            assert ranges == [part["loss"] for part in event["bins"]]
    assert standin.shown == [(64, ["a red cube", "dogs"])]
    assert standin.finished


def test_one_that_fails_is_left_out_and_the_run_goes_on(
    write_config: WriteConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing, sound = Standin(fails_after=2), Standin()
    monkeypatch.setattr("t2i_experts.training.trainer.open_trackers", lambda config, images_seen: Trackers([failing, sound]))
    model = train(load_config(write_config("run"), ["training.preview.every_images=0"]), progress=False)
    assert (model / "model_index.json").is_file()
    assert (len(failing.logged), failing.calls, len(sound.logged)) == (1, 2, 6)
    assert capsys.readouterr().err.count("standin failed and is left out") == 1


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ("[tensorboard, wandb]", "not installed: wandb. pip install wandb"),
        ("[mlflow]", "tensorboard and wandb"),
        ("[wandb, wandb]", "once"),
    ],
)
def test_one_that_cannot_be_is_refused_before_anything_is_written(
    write_config: WriteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: str, said: str
) -> None:
    monkeypatch.setattr(trackers, "INSTALLED", {"tensorboard": lambda: True, "wandb": lambda: False})
    with pytest.raises(ValueError, match=r"training\.trackers=") as caught:
        Trainer(load_config(write_config("run"), [f"training.trackers={names}"]), progress=False)
    assert said in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_trackers_may_change_when_a_run_goes_on(write_config: WriteConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config, opened = write_config("run"), []
    train(load_config(config, ["training.images=16", "training.preview.every_images=0"]), progress=False)
    monkeypatch.setattr(trackers, "INSTALLED", {"wandb": lambda: True})

    def no_network(self: Any) -> None:
        opened.append(self)
        raise ConnectionError("the network is down")

    monkeypatch.setattr(trackers.WandB, "start", no_network)
    changed = load_config(config, ["training.images=32", "training.preview.every_images=0", "training.trackers=[wandb]"])
    train(changed, progress=False)  # it goes on, and nobody may be watching
    assert opened
    with pytest.raises(ValueError, match=r"wandb cannot be opened: ConnectionError: the network is down"):
        open_trackers(changed, images_seen=0)


class FakeRun:
    """What `wandb.init` returns."""

    def __init__(self, wanted: Mapping[str, Any]) -> None:
        self.wanted, self.id = wanted, wanted["id"] or "abc123"
        self.rows: list[Mapping[str, Any]] = []
        self.metrics: dict[str, str | None] = {}

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.metrics[name] = step_metric

    def log(self, values: Mapping[str, Any], step: int | None = None) -> None:
        assert step is None, "its own step may not go back"
        self.rows.append(values)

    def finish(self) -> None:
        pass


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> list[FakeRun]:
    """A stand-in for the package; the runs that it opens."""
    module, runs, config = ModuleType("wandb"), [], {}

    def init(**wanted: Any) -> FakeRun:
        runs.append(FakeRun(wanted))
        return runs[-1]

    class Config:
        @staticmethod
        def update(values: Mapping[str, Any], allow_val_change: bool) -> None:
            assert allow_val_change
            config.update(values)

    vars(module).update(init=init, config=Config, Image=lambda picture, caption: (caption, picture.size))
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setattr(trackers, "INSTALLED", {"wandb": lambda: True})
    return runs


def test_wandb_goes_on_with_the_same_run_over_images_seen(
    write_config: WriteConfig, tmp_path: Path, wandb: list[FakeRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "emoji")
    for images in (32, 64):
        train(load_config(write_config("run"), ["training.trackers=[wandb]", f"training.images={images}"]), progress=False)
    first, second = wandb
    assert first.wanted["id"] is None and (tmp_path / "run" / "wandb_id").read_text() == "abc123\n"
    assert second.wanted["id"] == "abc123" and second.wanted["resume"] == "allow"
    assert second.wanted["project"] == "emoji" and second.wanted["name"] == "run"
    assert second.metrics == {"images_seen": None, "*": "images_seen"}
    losses = [(row["images_seen"], row["train/loss"]) for run in wandb for row in run.rows if "train/loss" in row]
    events = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert losses == [(event["images_seen"], event["loss"]) for event in events if event["event"] == "train"]
    assert [row["previews"] for row in second.rows if "previews" in row] == [[("a red cube", (16, 16)), ("dogs", (16, 16))]]


def test_tensorboard_is_told_which_steps_are_void(write_config: WriteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for the package: what the run repeats has steps above its checkpoint's, and those at the checkpoint stay."""
    writers: list[Any] = []

    class SummaryWriter:
        def __init__(self, folder: str, purge_step: int) -> None:
            self.folder, self.purge_step, self.scalars, self.images, self.texts = folder, purge_step, {}, {}, {}
            writers.append(self)

        def add_scalar(self, tag: str, value: float, global_step: int) -> None:
            self.scalars[tag, global_step] = value

        def add_text(self, tag: str, value: str, global_step: int) -> None:
            self.texts[tag] = value

        def add_images(self, tag: str, value: np.ndarray, global_step: int, dataformats: str) -> None:
            assert dataformats == "NHWC" and value.dtype == np.uint8
            self.images[tag, global_step] = value.shape

        def flush(self) -> None: ...

        def close(self) -> None: ...

    module = ModuleType("torch.utils.tensorboard")
    vars(module).update(SummaryWriter=SummaryWriter)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr("torch.utils.tensorboard", module, raising=False)
    monkeypatch.setattr(trackers, "INSTALLED", {"tensorboard": lambda: True})
    for images in (32, 64):
        train(load_config(write_config("run"), ["training.trackers=[tensorboard]", f"training.images={images}"]), progress=False)
    assert [(writer.folder, writer.purge_step) for writer in writers] == [(str(tmp_path / "run" / "tensorboard"), n) for n in (1, 33)]
    steps = [sorted(step for tag, step in writer.scalars if tag == "train/loss") for writer in writers]
    assert steps == [[16, 32], [48, 64]]
    assert writers[1].images == {("previews/01 a red cube", 64): (1, 16, 16, 3), ("previews/02 dogs", 64): (1, 16, 16, 3)}
    assert "halflife_kimg" in writers[0].texts["config"]


def test_the_real_tensorboard(write_config: WriteConfig, tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for images in (32, 64):
        train(load_config(write_config("run"), ["training.trackers=[tensorboard]", f"training.images={images}"]), progress=False)
    events = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [16, 32, 48, 64]
    assert set(events.Tags()["images"]) == {"previews/01 a red cube", "previews/02 dogs"}


def test_the_real_wandb_offline(write_config: WriteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    train(load_config(write_config("run"), ["training.trackers=[wandb]", "training.images=32"]), progress=False)
    assert (tmp_path / "run" / "wandb_id").read_text().strip()
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*"))
