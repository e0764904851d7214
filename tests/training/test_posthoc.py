"""Snapshots on disk, networks of other widths made of them, and runs that go on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from t2i_experts.config import load_config
from t2i_experts.training.checkpoints import checkpoints
from t2i_experts.training.posthoc import drop_later_snapshots, reconstruct, snapshots, write_snapshots
from t2i_experts.training.power_ema import PowerFunctionEMA
from t2i_experts.training.trainer import Trainer, train

WriteConfig = Callable[[str], Path]
STEPS, EVERY, BATCH = 640, 20, 4
TRACKED, OTHERS = [0.05, 0.1], [0.03, 0.07, 0.15, 0.2]


@pytest.fixture(scope="module")
def walk(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, dict[float, torch.Tensor]]]:
    """A run whose weights walk at random: its folder, and what was tracked directly, by images seen and width."""
    root = tmp_path_factory.mktemp("walk")
    generator = torch.Generator().manual_seed(0)
    network = nn.Linear(20, 20)
    tracked, direct = PowerFunctionEMA(network, TRACKED), PowerFunctionEMA(network, [*TRACKED, *OTHERS])
    kept = {}
    for step in range(1, STEPS + 1):
        with torch.no_grad():
            for parameter in network.parameters():
                parameter += torch.randn(parameter.shape, generator=generator)
        for ema in (tracked, direct):
            ema.update(network, BATCH, step * BATCH)
        if step % EVERY == 0:
            write_snapshots(root, step * BATCH, tracked)
            kept[step * BATCH] = {s: n.weight.clone() for s, n in zip(direct.sigma_rels, direct.networks, strict=True)}
    return root, kept


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("images_seen", [EVERY * BATCH, STEPS * BATCH // 2, None])
@pytest.mark.parametrize("sigma_rel", TRACKED)
def test_a_tracked_width_comes_back_exactly(walk, sigma_rel: float, images_seen: int | None) -> None:  # type: ignore[no-untyped-def]
    root, direct = walk
    result = reconstruct(root, sigma_rel, images_seen)
    assert torch.equal(result.weights["weight"], direct[images_seen or STEPS * BATCH][sigma_rel])
    assert (result.profile_error, result.snapshots) == (0, 1)


@pytest.mark.parametrize("images_seen", [STEPS * BATCH // 2, None])
@pytest.mark.parametrize("sigma_rel", OTHERS)
def test_another_width_comes_close_to_what_tracking_it_gives(walk, sigma_rel: float, images_seen: int | None) -> None:  # type: ignore[no-untyped-def]
    root, direct = walk
    seen = images_seen or STEPS * BATCH
    result = reconstruct(root, sigma_rel, images_seen)
    wanted = direct[seen][sigma_rel]
    error = distance(result.weights["weight"], wanted)
    assert error < 0.01
    assert error < min(distance(direct[seen][tracked], wanted) for tracked in TRACKED) / 20
    assert result.snapshots == 2 * seen // (EVERY * BATCH), "none of a later time"
    assert 0 < result.profile_error < 0.05
    assert result.weights["weight"].dtype == torch.float32


def test_what_cannot_be_reconstructed(walk, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    root, _ = walk
    with pytest.raises(ValueError, match=r"images_seen=81: .* allowed: 80, 160, 240"):
        reconstruct(root, 0.07, 81)
    with pytest.raises(ValueError, match=r"sigma_rel=0\.3 must"):
        reconstruct(root, 0.3)
    with pytest.raises(ValueError, match=r"no snapshots; train with training\.ema\.kind=power"):
        reconstruct(tmp_path, 0.07)
    write_snapshots(tmp_path, 8, PowerFunctionEMA(nn.Linear(2, 2), [0.05, 0.1]))
    (tmp_path / "snapshots" / "000000000008-0.1.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match=r"000000000008-0\.1\.safetensors cannot be read"):
        reconstruct(tmp_path, 0.07)
    write_snapshots(tmp_path, 8, PowerFunctionEMA(nn.Linear(2, 3), [0.1]))
    with pytest.raises(ValueError, match="another network"):
        reconstruct(tmp_path, 0.07)


def test_unfinished_snapshots_are_none_and_later_ones_go(tmp_path: Path) -> None:
    for seen in (8, 16, 24):
        write_snapshots(tmp_path, seen, PowerFunctionEMA(nn.Linear(2, 2), [0.05, 0.1]))
    (tmp_path / "snapshots" / ".000000000032-0.05.safetensors.tmp").write_bytes(b"")
    assert [p.images_seen for p in snapshots(tmp_path)] == [8, 8, 16, 16, 24, 24]
    drop_later_snapshots(tmp_path, 16)
    assert [(p.images_seen, p.sigma_rel) for p in snapshots(tmp_path)] == [(8, 0.05), (8, 0.1), (16, 0.05), (16, 0.1)]


def test_a_run_that_stops_and_goes_on_has_the_bits_of_one_that_did_not(write_config: WriteConfig, tmp_path: Path) -> None:
    """Validation and the model folder use the first width; what an attempt stored after its last checkpoint is dropped."""
    power = ["training.ema.kind=power", "training.ema.sigma_rel=[0.1, 0.05]", "training.ema.snapshot_every_images=8"]
    overrides = [*power, "training.preview.every_images=0", "training.keep_checkpoints=1"]
    train(load_config(write_config("unbroken"), overrides), progress=False)
    broken = write_config("broken")
    train(load_config(broken, [*overrides, "training.images=32"]), progress=False)
    (tmp_path / "broken" / "snapshots" / "000000000037-0.1.safetensors").write_bytes(b"of an attempt that did not go on")
    train(load_config(broken, overrides), progress=False)
    first, second = (
        {path.relative_to(tmp_path / name): path.read_bytes() for path in (tmp_path / name).rglob("*.safetensors")}
        for name in ("unbroken", "broken")
    )
    assert first.keys() == second.keys()
    assert sum(path.parts[0] == "snapshots" for path in first) == 16
    assert [str(path) for path in first if first[path] != second[path]] == []
    weights = load_file(tmp_path / "broken" / "model" / "base64" / "diffusion_pytorch_model.safetensors")
    shown = load_file(tmp_path / "broken" / "snapshots" / "000000000064-0.1.safetensors")
    assert all(torch.equal(weights[name], shown[name]) for name in weights)
    losses = [json.loads(line) for line in (tmp_path / "broken" / "log.jsonl").read_text().splitlines()]
    unbroken = [json.loads(line) for line in (tmp_path / "unbroken" / "log.jsonl").read_text().splitlines()]
    assert [e["loss"] for e in losses if e["event"] == "validation"] == [e["loss"] for e in unbroken if e["event"] == "validation"]
    trainer = Trainer(load_config(broken, overrides), progress=False)
    assert trainer.resumed_from == checkpoints(tmp_path / "broken")[-1]
    assert all(torch.equal(shown[name], tensor) for name, tensor in trainer.ema.network.state_dict().items())
