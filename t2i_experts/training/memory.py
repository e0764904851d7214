"""How much memory a training step and a picture take, computed from the network itself before anything is trained.

The network runs forward and backward on fake tensors (torch's `FakeTensorMode`: shapes and types, no numbers) with the config's own batch,
precision and gradient checkpointing, and the storages that are alive are counted. So it holds for every network, plugins' too. Compiled
code fuses operations and remembers less; see `compiled`. What is not in it: CUDA's own few hundred MiB a process, fragmentation, and what
a kernel needs within itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from t2i_experts.cascade.codec import Codec, blank_codec, latent_shape
from t2i_experts.cascade.stage import IMAGE_CHANNELS, build_network
from t2i_experts.conditioning.blank import BlankEncoder, blank_encoder
from t2i_experts.conditioning.stored import text_encoders
from t2i_experts.config import RunConfig, StageConfig, TrainingConfig
from t2i_experts.diffusion.loss import EDMLoss
from t2i_experts.diffusion.precond import EDMPrecond
from t2i_experts.experts.decouple import DecoupleLoss
from t2i_experts.experts.projections import add_projections
from t2i_experts.training.allocations import Allocations, held_by, materialized
from t2i_experts.training.compiled import compiled_activations
from t2i_experts.training.initial import at_rank
from t2i_experts.training.trainable import build_trainable
from t2i_experts.types import Conditioning, Embedding


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes on the device of one process.

    weights: of the network. optimizer: AdamW's two moments. averages: of the weights, one or several. encoders: each encoder's weights by
    name, None if its architecture is not known here; such an encoder is missing in the sum. gradients: of all weights. activations: what
    there is beside all these at the worst moment of a step: what the backward pass remembers, its temporaries, the encoders' outputs.
    compiled: whether the activations are those of compiled code. uncompiled: the activations of code that is not. codec: the weights of
    the codec, as for an encoder. parent: the weights that a run with `training.decouple.consistency` is to stay near to.
    """

    batch_size: int
    parameters: int
    weights: int
    gradients: int
    optimizer: int
    averages: int
    encoders: Mapping[str, int | None]
    activations: int
    compiled: bool
    uncompiled: int
    codec: int | None = 0
    parent: int = 0

    @property
    def total(self) -> int:
        """At the worst moment."""
        known = sum(size for size in (*self.encoders.values(), self.codec) if size is not None)
        return self.weights + self.gradients + self.optimizer + self.averages + self.parent + known + self.activations


@dataclass(frozen=True)
class SamplingMemory:
    """Bytes on the device when `images` pictures are drawn together, with guidance. encoders, codec: as in `TrainingMemory`."""

    images: int
    dtype: str
    weights: int
    encoders: Mapping[str, int | None]
    activations: int
    codec: int | None = 0

    @property
    def total(self) -> int:
        """At the worst moment."""
        return self.weights + sum(size for size in (*self.encoders.values(), self.codec) if size is not None) + self.activations


def micro_batch(training: TrainingConfig, processes: int = 1) -> int:
    """Images that one process computes together. Raises ValueError for a batch that the processes cannot share equally."""
    share = training.accumulation * processes
    if training.batch_size % share:
        raise ValueError(
            f"training.batch_size={training.batch_size} must be a multiple of accumulation x processes = "
            f"{training.accumulation} x {processes}"
        )
    return training.batch_size // share


def estimate_training(config: RunConfig, *, processes: int = 1) -> TrainingMemory:
    """The memory of one of `processes` processes that train `config`. Nothing is read but the architectures of encoders and codec.

    Raises ValueError for a batch that the processes cannot share.
    """
    training, stage = config.training, config.stage
    batch = micro_batch(training, processes)
    with torch.device("meta"):
        network = build_trainable(config)
        at_rank(network, training)
        if training.decouple.projections:
            add_projections(network, "branch")
        parent = build_network(stage).requires_grad_(False) if training.decouple.consistency else None
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    weights, gradients = held_by(network), sum(parameter.nbytes for parameter in trained)
    stored = text_encoders(stage.encoders) if config.data.embeddings == "stored" else ()  # never on the device
    blanks = {name: blank_encoder(encoder) for name, encoder in stage.encoders.items() if name not in stored}
    codec = blank_codec(stage)
    with FakeTensorMode():
        codec_weights = _codec_weights(codec)
        encoders = {name: blank and _faked(blank) for name, blank in blanks.items()}
        materialized(network)
        loss_of: EDMLoss | DecoupleLoss = EDMLoss(stage.noise.sigma_data)
        if parent is not None:
            loss_of = DecoupleLoss(materialized(parent), training.decouple.consistency, stage.noise.sigma_data)
        bf16 = torch.autocast("cpu", torch.bfloat16, enabled=training.precision == "bf16")
        # Gradients that are added to exist all the time: those of a step's earlier batches, and those that processes share in buckets.
        passes = 1 if training.accumulation == processes == 1 else 2
        with Allocations() as allocations:
            encoding = 0
            for _ in range(passes):
                images = _images(stage, batch)
                conditioning = _encoded(stage, encoders, images, {name: 1 - e.drop for name, e in stage.encoders.items()})
                latents = _denoised(stage, batch) if codec is None else codec.encode(images)
                latents = latents.contiguous(memory_format=torch.channels_last)
                sigma, eps = torch.rand(batch), torch.randn(latents.shape)
                if parent is not None and not encoding:
                    with bf16, torch.no_grad():
                        parent(latents, sigma, conditioning)  # as it will be in the loss: before the network, for what counts as encoding
                encoding = encoding or allocations.peak
                with bf16:
                    loss = loss_of(network, latents, sigma, eps, conditioning)
                del conditioning
                loss.mean().backward()
        peak = uncompiled = max(allocations.peak, gradients)
        remembered = _compiled(config, network, batch, bf16) if training.compile and isinstance(network, EDMPrecond) else None
        if remembered is not None:
            peak = max(max(remembered, encoding) + (gradients if passes > 1 else 0), gradients)
    return TrainingMemory(
        batch_size=batch,
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        weights=weights,
        gradients=gradients,
        optimizer=2 * gradients,
        averages=weights * (len(training.ema.sigma_rel) if training.ema.kind == "power" else 1),
        encoders=_sizes(encoders),
        activations=peak - gradients,
        compiled=remembered is not None,
        uncompiled=uncompiled - gradients,
        codec=codec_weights,
        parent=0 if parent is None else held_by(parent),
    )


@torch.no_grad()
def estimate_sampling(stage: StageConfig, images: int, dtype: torch.dtype = torch.float32) -> SamplingMemory:
    """The memory of drawing `images` pictures together, with guidance, by a network in `dtype`."""
    with torch.device("meta"):
        network = build_network(stage).to(dtype)
    blanks = {name: blank_encoder(encoder) for name, encoder in stage.encoders.items()}
    codec = blank_codec(stage)
    with FakeTensorMode():
        codec_weights = _codec_weights(codec)
        encoders = {name: blank and _faked(blank) for name, blank in blanks.items()}
        materialized(network)
        with Allocations() as allocations:
            x, history = _denoised(stage, images), _denoised(stage, images)  # a multistep sampler's
            style = _images(stage, images) if stage.codec.latents else x
            conditioning = _encoded(stage, encoders, style, dict.fromkeys(stage.encoders, 1.0))
            both = Conditioning.cat([conditioning, conditioning])
            prepared = network.prepare(both)
            denoised = network(torch.cat([x, x]), torch.ones(2 * images), prepared)
            del history, denoised
            if codec is not None:
                codec.decode(x)
    return SamplingMemory(
        images=images,
        dtype=str(dtype).removeprefix("torch."),
        weights=held_by(network),
        encoders=_sizes(encoders),
        activations=allocations.peak,
        codec=codec_weights,
    )


def _compiled(config: RunConfig, network: EDMPrecond, batch: int, precision: torch.autocast) -> int | None:
    """See `compiled_activations`; None for a network that cannot be traced as one graph, and with gradient checkpointing, whose second
    computation this trace would take for the first one over again."""
    if config.training.gradient_checkpointing:
        return None
    stage = config.stage

    def inputs() -> tuple[Tensor, Tensor, Conditioning]:
        x = _denoised(stage, batch)
        return x + torch.randn(x.shape), torch.rand(batch), _encoded(stage, dict.fromkeys(stage.encoders), x, {})

    try:
        return compiled_activations(network, inputs, precision)
    except Exception:
        if stage.network.backbone == "unet":
            raise
        return None  # a plugin's: the compiler, too, would take it in pieces


def _faked(blank: BlankEncoder) -> BlankEncoder:
    return BlankEncoder(materialized(blank.model), blank.encode)


def _sizes(encoders: Mapping[str, BlankEncoder | None]) -> dict[str, int | None]:
    return {name: None if blank is None else held_by(blank.model) for name, blank in encoders.items()}


def largest_shape(stage: StageConfig) -> tuple[int, int]:
    """(width, height) of the largest pictures that a stage is trained on."""
    return max(((width, height) for width, height in stage.buckets), key=math.prod, default=(stage.size, stage.size))


def _images(stage: StageConfig, batch: int) -> Tensor:
    width, height = largest_shape(stage)
    return torch.rand(batch, IMAGE_CHANNELS, height, width).contiguous(memory_format=torch.channels_last)


def _denoised(stage: StageConfig, batch: int) -> Tensor:
    """As many of what the denoiser works on."""
    return torch.rand(batch, *latent_shape(stage, largest_shape(stage))).contiguous(memory_format=torch.channels_last)


def _codec_weights(codec: Codec | None) -> int | None:
    """Bytes of a codec's weights, which become fake ones; None for one that is not known."""
    if codec is None:
        return None
    return 0 if codec.model is None else held_by(materialized(codec.model))


def _encoded(stage: StageConfig, encoders: Mapping[str, BlankEncoder | None], images: Tensor, kept: Mapping[str, float]) -> Conditioning:
    """A batch's conditioning, of which each encoder computes the share of rows that is in `kept`."""
    embeddings: dict[str, Embedding] = {}
    for name, config in stage.encoders.items():
        embeddings[name] = Embedding.null(len(images), config.max_tokens, config.width, config.pooled_width)
        blank, rows = encoders.get(name), round(kept.get(name, 0.0) * len(images))
        if blank is not None and rows:
            with torch.no_grad():
                blank.encode(blank.model, images[:rows])
    return Conditioning(embeddings)
