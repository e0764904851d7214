"""Training on CUDA: the same loss as on the CPU, and a step that never waits for the device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from t2i_experts.cli.app import main
from t2i_experts.config import load_config
from t2i_experts.training.stopping import StopRequest
from t2i_experts.training.trainer import Trainer

pytestmark = pytest.mark.gpu


def test_first_losses_agree_with_the_cpu(write_config: Callable[[str], Path]) -> None:
    """Same weights, samples and noise levels; eps comes from the device's own generator, so means over a batch are compared."""
    losses = []
    for name, device in (("cpu", "cpu"), ("cuda", "null")):
        trainer = Trainer(load_config(write_config(name), [f"training.device={device}", "training.batch_size=40"]), progress=False)
        batch = next(trainer._batches())
        losses.append(float(trainer.task.losses(trainer.model, batch)[0].mean()))
    assert losses[1] == pytest.approx(losses[0], rel=0.1)


@pytest.mark.parametrize("embeddings", ["online", "stored"])
@pytest.mark.parametrize("compiled", ["false", "true"])
def test_a_step_does_not_wait_for_the_device(write_config: Callable[[str], Path], tmp_path: Path, compiled: str, embeddings: str) -> None:
    overrides = ["training.device=null", "training.precision=bf16", f"training.compile={compiled}"]
    if embeddings == "stored":
        train = tmp_path / "embedded"
        plain = load_config(write_config("run")).data.train[0]
        with pytest.raises(SystemExit, match="0"):
            main(["shards", "embed", plain, "--config", str(write_config("run")), "--out", str(train)])
        overrides += ["data.embeddings=stored", f"data.train=[{train}]", "data.validation=null", "training.validation.every_images=0"]
    trainer = Trainer(load_config(write_config("run"), overrides), progress=False)
    batches = trainer._batches()
    for _ in range(3):
        trainer._step(batches, StopRequest())
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            trainer._step(batches, StopRequest())
    finally:
        torch.cuda.set_sync_debug_mode("default")
