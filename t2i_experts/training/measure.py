"""What a training step really takes: memory and time, on random pictures, without shards and without a run's folder."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from t2i_experts.cascade.codec import load_codec
from t2i_experts.cascade.device import default_device, synchronize
from t2i_experts.cascade.stage import IMAGE_CHANNELS, build_network
from t2i_experts.conditioning.conditioner import Encoder, TextConditioner
from t2i_experts.conditioning.stored import StoredTextEncoder, text_encoders
from t2i_experts.config import EncoderConfig, RunConfig
from t2i_experts.diffusion.compiling import compile_denoiser
from t2i_experts.experts.projections import add_projections
from t2i_experts.shards.reader import Sample
from t2i_experts.training.allocations import occupied
from t2i_experts.training.ema import build_ema
from t2i_experts.training.initial import at_rank
from t2i_experts.training.memory import largest_shape, micro_batch
from t2i_experts.training.optim import build_optimizer
from t2i_experts.training.step import add_gradients, apply_gradients, avoid_cudnn_attention
from t2i_experts.training.task import DiffusionTask
from t2i_experts.training.trainable import build_trainable, networks_of
from t2i_experts.training.uncertainty import LearnedWeighting
from t2i_experts.types import TextFeatures


@dataclass(frozen=True)
class MeasuredStep:
    """peak: bytes that tensors occupied on the device at the worst moment of a training step; None on devices that cannot tell.
    images_per_second: of one process, without waiting for data."""

    device: str
    batch_size: int
    peak: int | None
    images_per_second: float


def training_device(config: RunConfig) -> torch.device:
    """Where a process of this config trains."""
    return torch.device(config.training.device) if config.training.device else default_device()


def measure_training(config: RunConfig, *, processes: int = 1) -> MeasuredStep:
    """Runs training steps of one of `processes` processes, without the others: one to warm up, one for the clock, one for the memory.

    On CUDA the peak is the caching allocator's; on the CPU it is what torch's profiler saw allocated during a step, and the tensors that
    were there before it. Raises ValueError as training would, for encoders and a codec that cannot be loaded.
    """
    training, device = config.training, training_device(config)
    batch_size = micro_batch(training, processes)
    torch.manual_seed(training.seed)
    avoid_cudnn_attention()
    text = text_encoders(config.stage.encoders) if config.data.embeddings == "stored" else {}
    at_work = TextConditioner.from_config({n: e for n, e in config.stage.encoders.items() if n not in text}, device=device)
    stand_ins: dict[str, Encoder] = {name: StoredTextEncoder(encoder, device) for name, encoder in text.items()}
    conditioner = TextConditioner({**stand_ins, **at_work.encoders}, config.stage.encoders)
    codec = load_codec(config.stage, device=device)
    bf16 = training.precision == "bf16"
    parent = build_network(config.stage).to(device).eval().requires_grad_(False) if training.decouple.consistency else None
    task = DiffusionTask(
        config.stage, conditioner, seed=training.seed, device=device, bf16=bf16, codec=codec, decouple=training.decouple, parent=parent
    )
    network = build_trainable(config)
    at_rank(network, training)
    network = network.to(device)
    if training.decouple.projections:
        add_projections(network, "branch")
    ema, optimizer = build_ema(network, training.ema), build_optimizer(network, training.optimizer)
    weighting = LearnedWeighting(training.optimizer, device) if training.uncertainty_weighting else None
    if training.compile:
        for one in networks_of(network):
            compile_denoiser(one, training=True, dynamic=False if config.stage.buckets else None)
        if parent is not None:
            compile_denoiser(parent, training=False, dynamic=False if config.stage.buckets else None)
    width, height = largest_shape(config.stage)
    pictures = torch.randint(256, (batch_size, IMAGE_CHANNELS, height, width), dtype=torch.uint8)
    caption = "a picture of many things " * max(encoder.max_tokens for encoder in config.stage.encoders.values())
    features = {name: _full(encoder) for name, encoder in text.items()}
    batch = task.collate()([Sample(i, str(i), picture, caption, {}, features=features) for i, picture in enumerate(pictures)])

    def step() -> None:
        for _ in range(training.accumulation):
            add_gradients(task, network, batch, training.accumulation, weighting)
        apply_gradients(network, optimizer, training.optimizer.clip_norm)
        if weighting:
            weighting.step(training.optimizer.learning_rate, lambda gradient: gradient)
        ema.update(network, training.batch_size, training.batch_size)

    def held() -> int:
        moments = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
        modules = [network, getattr(ema, "networks", ema.network), *(encoder.model for encoder in conditioner.encoders.values())]
        modules += [module for module in (codec.model, parent) if module is not None]
        return occupied([*moments, *(t for module in modules for t in (*module.parameters(), *module.buffers()))])

    step()  # the moments come into being; code is compiled
    synchronize(device)
    started = time.monotonic()
    step()
    synchronize(device)
    rate = training.accumulation * batch_size / (time.monotonic() - started)
    return MeasuredStep(str(device), batch_size, _peak(step, held, device), round(rate, 2))


def _full(encoder: EncoderConfig) -> TextFeatures:
    """What would be stored of a caption that fills an encoder."""
    pooled = torch.zeros(encoder.pooled_width, dtype=torch.bfloat16) if encoder.pooled_width else None
    return TextFeatures(torch.zeros(encoder.max_tokens, encoder.width, dtype=torch.bfloat16), pooled)


def _peak(step: Callable[[], None], held: Callable[[], int], device: torch.device) -> int | None:
    match device.type:
        case "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            step()
            synchronize(device)
            return torch.cuda.max_memory_allocated(device)
        case "cpu":
            return held() + most_allocated(step)
        case _:
            return None


def most_allocated(work: Callable[[], None]) -> int:
    """The most bytes that the CPU's allocator gave out during `work` and had not got back; what was there before does not count."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # its lines on stderr say nothing about this
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most
