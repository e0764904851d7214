"""Runs over aspect-ratio buckets: batches of one shape each, bit-identical after a stop, and a model that draws all shapes."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from t2i_experts.cascade.pipeline import CascadePipeline
from t2i_experts.cli.app import main
from t2i_experts.config import load_config
from t2i_experts.shards.writer import ShardWriter
from t2i_experts.training.checkpoints import checkpoints
from t2i_experts.training.stopping import StopRequest
from t2i_experts.training.task import Batch, DiffusionTask
from t2i_experts.training.trainer import Trainer, train
from t2i_experts.types import Denoiser

WriteConfig = Callable[[str], Path]
FILES = ("network.safetensors", "ema.safetensors", "optimizer.safetensors")


@pytest.fixture(scope="module")
def discs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Discs on grey: 12 square pictures, 18 wide and 6 high ones."""
    rng = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("discs") / "shards"
    with ShardWriter(folder, samples_per_shard=16) as writer:
        for i, (width, height) in enumerate(6 * [(32, 32), (40, 24), (60, 30), (24, 40), (48, 30), (30, 32)]):
            image = Image.new("RGB", (width, height), "grey")
            x, y = width * (i % 3 + 1) // 4, height // 2
            ImageDraw.Draw(image).ellipse((x - 9, y - 9, x + 9, y + 9), fill=tuple(rng.integers(0, 256, 3).tolist()))
            data = io.BytesIO()
            image.save(data, "PNG")
            writer.write(f"{i:04d}", data.getvalue(), "png", [f"a red cube {i}"], {})
    return folder


@pytest.fixture
def overrides(discs: Path) -> list[str]:
    return [f"data.train=[{discs}]", "stage.buckets=[[16, 16], [20, 12], [12, 20]]", "training.accumulation=2", "training.images=96"]


def test_a_run_that_stops_and_goes_on_ends_in_the_same_bits(
    write_config: WriteConfig, overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses, shapes = DiffusionTask.losses, dict[int, tuple[int, ...]]()

    def watched(task: DiffusionTask, denoiser: Denoiser, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        shapes[batch.positions[0]] = tuple(batch.images.shape)
        return losses(task, denoiser, batch)

    monkeypatch.setattr(DiffusionTask, "losses", watched)
    train(load_config(write_config("unbroken"), overrides), progress=False)
    unbroken = dict(shapes)
    assert list(unbroken) == list(range(0, 96, 4))
    assert set(unbroken.values()) == {(4, 3, 16, 16), (4, 3, 12, 20), (4, 3, 20, 12)}
    assert all(unbroken[position] == unbroken[position + 4] for position in range(0, 96, 8)), "one shape in all of a step"
    shapes.clear()
    for more in (["training.images=40"], ["data.workers=2"]):
        model = train(load_config(write_config("broken"), [*overrides, *more]), progress=False)
    assert shapes == unbroken
    first, second = (checkpoints(tmp_path / name)[-1] for name in ("unbroken", "broken"))
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in FILES)
    start = json.loads((tmp_path / "unbroken" / "log.jsonl").read_text().splitlines()[0])
    assert (start["event"], start["buckets"]) == ("start", {"16x16": 12, "20x12": 18, "12x20": 6})

    pipeline = CascadePipeline.from_pretrained(model, device="cpu")
    assert pipeline.base.shapes == [(16, 16), (20, 12), (12, 20)]
    assert pipeline("a red cube").shape == (1, 3, 16, 16)
    high = pipeline("a red cube", shape=(12, 20))
    assert high.shape == (1, 3, 20, 12)
    with pytest.raises(ValueError, match="shape=20x20; this model makes pictures of 16x16, 20x12, 12x20"):
        pipeline("a red cube", shape=(20, 20))
    with pytest.raises(SystemExit) as exit:
        out = tmp_path / "high.png"
        main(["generate", "a red cube", "--model", str(model), "--device", "cpu", "--width", "12", "--height", "20", "--out", str(out)])
    assert not exit.value.code
    assert (np.asarray(Image.open(tmp_path / "high.png")) == high[0].permute(1, 2, 0).numpy()).all()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("stage.buckets=[[16, 16], [20, 12]]", r"stage\.buckets: \[\[16, 16\], \[20, 12\], \[12, 20\]\] -> "),
        ("training.batch_size=4", r"training\.batch_size: 8 -> 4"),
    ],
)
def test_other_buckets_or_batches_are_another_run(write_config: WriteConfig, overrides: list[str], change: str, said: str) -> None:
    config = write_config("run")
    train(load_config(config, [*overrides, "training.images=8", "training.preview.every_images=0"]), progress=False)
    with pytest.raises(ValueError, match=said):
        Trainer(load_config(config, [*overrides, change]), progress=False)


def test_each_shape_is_compiled_once_and_for_itself(write_config: WriteConfig, discs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when there are more shapes than torch compiles a function for by default (8): it would silently go on uncompiled."""
    graphs: list[tuple[int, ...]] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., object]:
        graphs.extend({tuple(tensor.shape[-2:]) for tensor in inputs if isinstance(tensor, torch.Tensor) and tensor.dim() == 4})
        assert not any(isinstance(value, torch.SymInt) for value in inputs)
        return graph.forward

    compile = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda module, **given: compile(module, **{**given, "backend": backend, "options": None})
    )
    monkeypatch.setattr("torch._dynamo.config.recompile_limit", 1)
    overrides = [f"data.train=[{discs}]", "stage.buckets=[[16, 16], [20, 12], [12, 20]]", "training.compile=true"]
    trainer = Trainer(load_config(write_config("run"), overrides), progress=False)
    batches = trainer._batches()
    for _ in range(8):
        trainer._step(batches, StopRequest())
    assert {shape for shape in graphs if min(shape) > 10} == {(16, 16), (12, 20), (20, 12)}
    assert len([shape for shape in graphs if min(shape) > 10]) == 3
