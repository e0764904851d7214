"""The learned weighting inside a run: trained with the network, stored in checkpoints, and seen nowhere else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from t2i_experts.config import OptimizerConfig, load_config
from t2i_experts.training.checkpoints import checkpoints
from t2i_experts.training.trainer import train
from t2i_experts.training.uncertainty import LearnedWeighting

WriteConfig = Callable[[str], Path]
QUICK = ["training.preview.every_images=0", "training.log_every_images=8"]
ON = [*QUICK, "training.uncertainty_weighting=true"]


def events(root: Path, kind: str) -> list[dict[str, Any]]:
    return [event for line in (root / "log.jsonl").read_text().splitlines() if (event := json.loads(line))["event"] == kind]


def test_gradients_are_averaged_over_the_processes_and_nothing_decays() -> None:
    config = OptimizerConfig(learning_rate=0.1, weight_decay=0.5)
    losses, sigma = torch.tensor([0.1, 0.2, 3.0, 4.0]), torch.tensor([0.1, 0.5, 1.0, 9.0])
    whole, *halves = (LearnedWeighting(config, torch.device("cpu")) for _ in range(3))
    for _ in range(5):
        whole.objective(losses, sigma).mean().backward()
        whole.step(0.1, lambda gradient: gradient)
        gradients = []
        for half, rows in zip(halves, (slice(0, 2), slice(2, 4)), strict=True):
            half.objective(losses[rows], sigma[rows]).mean().backward()
            gradients.append(half.module.weight.grad)
        mean = torch.stack([g for g in gradients if g is not None]).mean(0)
        for half in halves:
            half.step(0.1, lambda gradient, mean=mean: mean)  # type: ignore[misc]
    assert torch.equal(halves[0].module.weight, halves[1].module.weight)
    torch.testing.assert_close(halves[0].module.weight, whole.module.weight)
    before = whole.module.weight.detach().clone()
    whole.optimizer.state.clear()
    whole.module.weight.grad = torch.zeros_like(before)
    whole.step(0.1, lambda gradient: gradient)
    assert torch.equal(whole.module.weight, before)


def test_a_run_that_stops_and_goes_on_has_the_bits_of_one_that_did_not(write_config: WriteConfig, tmp_path: Path) -> None:
    train(load_config(write_config("unbroken"), ON), progress=False)
    broken = write_config("broken")
    train(load_config(broken, [*ON, "training.images=32"]), progress=False)
    train(load_config(broken, [*ON, "training.gradient_checkpointing=2"]), progress=False)  # which changes no bit, and may change
    first, second = (checkpoints(tmp_path / name)[-1] for name in ("unbroken", "broken"))
    files = sorted(path.name for path in first.glob("*.safetensors"))
    assert files == sorted(path.name for path in second.glob("*.safetensors"))
    assert {"weighting.safetensors", "weighting_optimizer.safetensors"} < set(files)
    assert [name for name in files if (first / name).read_bytes() != (second / name).read_bytes()] == []
    assert load_file(first / "weighting.safetensors")["weight"].abs().max() > 0.01
    with pytest.raises(ValueError, match=r"training\.uncertainty_weighting: True -> False"):
        train(load_config(broken, QUICK), progress=False)


def test_reported_losses_are_the_plain_ones_and_the_model_knows_nothing_of_it(write_config: WriteConfig, tmp_path: Path) -> None:
    """With a learning rate of zero for the network, whatever u is, the same losses are reported."""
    for name, options in (("plain", QUICK), ("weighted", ON)):
        config = load_config(write_config(name), options)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("t2i_experts.training.trainer.learning_rate", lambda *_: 0.0)
            step = LearnedWeighting.step
            patch.setattr(LearnedWeighting, "step", lambda self, rate, mean, step=step: step(self, 0.1, mean))
            train(config, progress=False)
    plain, weighted = tmp_path / "plain", tmp_path / "weighted"
    for kind in ("train", "validation"):
        assert [e["loss"] for e in events(plain, kind)] == [e["loss"] for e in events(weighted, kind)]
    norms = [[e["grad_norm"] for e in events(root, "train")] for root in (plain, weighted)]
    assert norms[0][0] == norms[1][0], "u begins at 0"
    assert norms[0][-1] != pytest.approx(norms[1][-1], rel=1e-3), "the gradients are weighted"
    model = Path("model/base64/diffusion_pytorch_model.safetensors")
    assert load_file(plain / model).keys() == load_file(weighted / model).keys()
    assert not (checkpoints(plain)[-1] / "weighting.safetensors").exists()
