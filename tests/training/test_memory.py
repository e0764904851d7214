"""The estimate of memory against what is then measured, and how it follows the settings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from t2i_experts.cascade.stage import build_network
from t2i_experts.conditioning.blank import blank_encoder
from t2i_experts.conditioning.conditioner import TextConditioner
from t2i_experts.config import EncoderConfig, StageConfig, load_config
from t2i_experts.nn.layers import rms_norm
from t2i_experts.training.allocations import Allocations, held_by, materialized, occupied
from t2i_experts.training.compiled import compiled_activations
from t2i_experts.training.measure import measure_training
from t2i_experts.training.memory import TrainingMemory, estimate_sampling, estimate_training
from t2i_experts.types import Conditioning, Embedding

WriteConfig = Callable[[str], Path]


@pytest.mark.parametrize(
    "overrides",
    [
        ["training.batch_size=2"],
        ["training.batch_size=6", "training.precision=bf16"],
        ["training.batch_size=8", "training.accumulation=2", "training.gradient_checkpointing=2", "stage.network.patch_size=2"],
    ],
    ids=["batch 2", "batch 6 in bf16", "checkpointed patches of 2, accumulated"],
)
def test_the_estimate_is_what_is_then_measured(overrides: list[str]) -> None:
    config = load_config("tiny/base64", ["training.device=cpu", *overrides])
    estimated, measured = estimate_training(config), measure_training(config)
    assert estimated.batch_size == measured.batch_size
    assert estimated.total == pytest.approx(measured.peak, rel=0.15)
    assert measured.images_per_second > 0


@pytest.mark.gpu
@pytest.mark.parametrize("more", [["training.compile=false"], ["training.compile=true"]], ids=["eager", "compiled"])
def test_the_estimate_is_what_is_then_measured_on_a_gpu(more: list[str]) -> None:
    config = load_config("emoji/base64", ["training.batch_size=256", *more])
    assert estimate_training(config).total == pytest.approx(measure_training(config).peak, rel=0.15)


def test_what_is_held_all_the_time_is_exact(write_config: WriteConfig) -> None:
    config = load_config(write_config("run"), ["training.ema.kind=power", "training.ema.sigma_rel=[0.05,0.1,0.15]"])
    memory, weights = estimate_training(config), held_by(build_network(config.stage))
    assert (memory.weights, memory.gradients, memory.optimizer, memory.averages) == (weights, weights, 2 * weights, 3 * weights)
    loaded = TextConditioner.from_config(config.stage.encoders).encoders
    assert memory.encoders == {name: held_by(encoder.model) for name, encoder in loaded.items()}


def test_it_follows_processes_checkpointing_and_compilation(write_config: WriteConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("t2i_experts.training.memory.compiled_activations", lambda *arguments: 10**9)

    def estimate(*overrides: str, processes: int = 1) -> TrainingMemory:
        return estimate_training(load_config(write_config("run"), ["training.batch_size=64", *overrides]), processes=processes)

    compiled, two = estimate("training.compile=true"), estimate(processes=2)
    checkpointed = estimate("training.compile=true", "training.gradient_checkpointing=2")
    assert compiled.compiled
    assert compiled.activations == 10**9 - compiled.gradients
    assert 0.4 * compiled.uncompiled < two.activations == two.uncompiled < 0.6 * compiled.uncompiled
    assert not checkpointed.compiled
    assert checkpointed.activations == checkpointed.uncompiled < 0.7 * compiled.uncompiled
    with pytest.raises(ValueError, match=r"training\.batch_size=64 must be a multiple of accumulation x processes = 1 x 3"):
        estimate(processes=3)


class Convolutions(nn.Module):
    """A denoiser of two convolutions with several operations on each value between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 3, 3, padding=1)

    def forward(self, x: torch.Tensor, sigma: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        h = nn.functional.silu(rms_norm(self.first(x).movedim(1, -1)).movedim(-1, 1) * 1.5)
        return self.second(nn.functional.silu(h + 1).exp())


def test_compiled_code_remembers_what_the_convolutions_need() -> None:
    """Of all the wide maps between them only the first one's output, beside one temporary; uncompiled code keeps four."""
    with torch.device("meta"):
        network = Convolutions()
    wide = 4 * 8 * 32 * 32 * 32

    def inputs() -> tuple[torch.Tensor, torch.Tensor, Conditioning]:
        return torch.empty(8, 3, 32, 32), torch.ones(8), Conditioning({"t5": Embedding.null(8, 4, 16)})

    with FakeTensorMode():
        materialized(network)
        compiled = compiled_activations(network, inputs, torch.autocast("cpu", torch.bfloat16, enabled=False))
        with Allocations() as allocations:
            output = network(*inputs())
            uncompiled = allocations.current
            del output
    assert 2 * wide < compiled < 2.5 * wide
    assert uncompiled > 4 * wide


def test_it_follows_stored_embeddings_and_buckets() -> None:
    plain = estimate_training(load_config("tiny/base64"))
    stored = estimate_training(load_config("tiny/base64", ["data.embeddings=stored"]))
    assert set(stored.encoders) == {"clip_image"} and stored.total < plain.total
    wide = estimate_training(load_config("tiny/base64", ["stage.buckets=[[64,64],[80,64]]"]))
    assert wide.activations == pytest.approx(1.25 * plain.activations, rel=0.05)


def test_sampling_takes_less_in_bfloat16_and_more_for_more_pictures(stage_config: StageConfig) -> None:
    one, many = (estimate_sampling(stage_config, images) for images in (8, 32))
    half = estimate_sampling(stage_config, 32, torch.bfloat16)
    assert many.activations == pytest.approx(4 * one.activations, rel=0.1)
    assert 2 * half.weights == many.weights == one.weights
    assert half.total < many.total


def test_encoders_are_known_before_they_are_downloaded() -> None:
    t5 = blank_encoder(EncoderConfig("t5", "google/t5-v1_1-xxl", width=4096, max_tokens=128, dtype="bfloat16"))
    clip = EncoderConfig("clip_text", "ViT-L-14", pretrained="openai", width=768, pooled_width=768)
    text, image = (blank_encoder(EncoderConfig(kind, clip.model, clip.pretrained)) for kind in ("clip_text", "clip_image"))
    assert t5 is not None
    assert text is not None
    assert image is not None
    assert held_by(t5.model) == 2 * 4_762_310_656
    assert sum(p.numel() for blank in (text, image) for p in blank.model.parameters()) == 427_616_513
    assert blank_encoder(EncoderConfig("t5", "someone/else")) is None
    assert blank_encoder(EncoderConfig("clip_text", "./nowhere")) is None


def test_allocations_count_storages_while_they_live() -> None:
    with FakeTensorMode():
        given = torch.empty(1000)
        with Allocations() as allocations:
            first = given + 1
            assert allocations.current == 4000
            view, again = first[10:], given.view(10, 100)  # nothing new
            assert allocations.current == 4000
            del first
            assert allocations.current == 4000
            second = view * 2
            assert (allocations.current, allocations.peak) == (4000 + 3960, 4000 + 3960)
            del view, second, again
        assert (allocations.current, allocations.peak) == (0, 4000 + 3960)


def test_materialized_keeps_shapes_and_ties() -> None:
    with torch.device("meta"):
        tied = torch.nn.ModuleDict({"a": torch.nn.Linear(3, 3), "b": torch.nn.Linear(3, 3)})
    tied["b"].weight = tied["a"].weight
    with FakeTensorMode():
        materialized(tied)
    assert tied["a"].weight is tied["b"].weight
    assert occupied(tied.parameters()) == 4 * (9 + 3 + 3)
    assert {parameter.device.type for parameter in tied.parameters()} == {"cpu"}
