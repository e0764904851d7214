"""Steps of several micro-batches: each is computed as it comes, and a step that is given up leaves nothing behind."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from t2i_experts.config import load_config
from t2i_experts.shards.reader import Unreadable
from t2i_experts.training.checkpoints import checkpoints
from t2i_experts.training.stopping import StopRequest
from t2i_experts.training.task import Batch
from t2i_experts.training.trainer import Trainer, train

WriteConfig = Callable[[str], Path]


def test_a_micro_batch_is_computed_before_the_next_is_waited_for(write_config: WriteConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else workers that can hold only a few batches ready would wait while all of a step's are collected, and then be waited for."""
    trainer = Trainer(load_config(write_config("run"), ["training.accumulation=4", "training.images=16"]), progress=False)
    losses, batches, order = trainer.task.losses, trainer._batches, []

    def told(give_up: Any) -> Iterator[Batch]:
        for batch in batches(give_up):
            order.append("read")
            yield batch

    monkeypatch.setattr(trainer, "_batches", told)
    monkeypatch.setattr(trainer.task, "losses", lambda *arguments: order.append("computed") or losses(*arguments))
    trainer.run()
    assert order == ["read", "computed"] * 8


def test_a_step_that_is_given_up_leaves_nothing_behind(write_config: WriteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No gradients, and nothing of the samples that it has drawn: they are drawn again when the run goes on."""
    overrides = ["training.accumulation=4", "training.uncertainty_weighting=true", "training.checkpoint_every_images=64"]
    overrides += ["data.max_unreadable=0.5", "training.log_every_images=64"]
    trainer = Trainer(load_config(write_config("run"), overrides), progress=False)
    batches = trainer._batches
    three = (replace(batch, unreadable=(Unreadable("0.tar", "a", "broken"),)) for batch in itertools.islice(batches(), 3))
    rate = trainer.optimizer.param_groups[0]["lr"]
    assert not trainer._step(three, StopRequest())
    assert trainer.weighting is not None and trainer.state.images_seen == 0 and not trainer._recent
    assert all(parameter.grad is None for module in (trainer.network, trainer.weighting.module) for parameter in module.parameters())
    assert trainer.optimizer.param_groups[0]["lr"] == rate
    trainer.unreadable.tell(0)
    assert not trainer.unreadable.drawn

    def breaks_off(give_up: Callable[[], bool]) -> Iterator[Batch]:
        yield from itertools.islice(batches(give_up), 11)
        os.kill(os.getpid(), signal.SIGTERM)
        assert give_up()

    monkeypatch.setattr(trainer, "_batches", breaks_off)
    trainer.run()
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["000000000016"]
    for name in ("run", "unbroken"):
        train(load_config(write_config(name), overrides), progress=False)
    for name in ("network", "ema", "optimizer"):
        one, other = ((checkpoints(tmp_path / run)[-1] / f"{name}.safetensors").read_bytes() for run in ("run", "unbroken"))
        assert one == other
