"""What one training run computes: from samples to batches (in the loader's workers), and from a batch to losses (on the device)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from t2i_experts.cascade.codec import PIXEL, Codec, fits
from t2i_experts.cascade.picture import from_uint8
from t2i_experts.conditioning.conditioner import PromptTokenizer, TextConditioner, TextInput
from t2i_experts.conditioning.frozen import to_device
from t2i_experts.config import DecoupleConfig, StageConfig
from t2i_experts.diffusion.loss import EDMLoss
from t2i_experts.experts.decouple import DecoupleLoss, ProbabilisticInterval
from t2i_experts.experts.interval import NoiseInterval
from t2i_experts.shards.order import PositionDraws, position_rng
from t2i_experts.shards.reader import Sample, Unreadable
from t2i_experts.types import Denoiser, FeatureBatch, TextFeatures


@dataclass(frozen=True)
class Batch:
    """Samples side by side, on the CPU.

    positions: places in the global order. images: (B, 3, H, W) uint8. uniform: (B,) float64 in [0, 1), the draw behind each row's sigma.
    tokens: for each text encoder what it takes, stored features if the samples bring them.
    drops: encoder name -> (B,) bool, True = this row goes without it. unreadable: what samples of this batch stand in for.
    """

    positions: tuple[int, ...]
    keys: tuple[str, ...]
    images: Tensor
    uniform: Tensor
    tokens: Mapping[str, TextInput]
    drops: Mapping[str, Tensor]
    unreadable: tuple[Unreadable, ...] = ()

    def pin_memory(self) -> Batch:
        """What is large in page-locked memory, so that it travels to the GPU in the background (called by torch's DataLoader)."""
        tokens = {name: text.pin_memory() if isinstance(text, FeatureBatch) else text for name, text in self.tokens.items()}
        return replace(self, images=self.images.pin_memory(), tokens=tokens)


@dataclass(frozen=True)
class Collate:
    """Makes a batch of samples. What is drawn for a row, its noise level and which encoders it goes without, depends on (seed, its
    position) alone."""

    tokenizer: PromptTokenizer
    drop_rates: Mapping[str, float]
    seed: int

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        return Batch(
            positions=tuple(sample.position for sample in samples),
            keys=tuple(sample.key for sample in samples),
            images=torch.stack([sample.image for sample in samples]),
            uniform=self._draws(samples, "sigma"),
            tokens=text_inputs(self.tokenizer, [sample.caption for sample in samples], [sample.features for sample in samples]),
            drops={name: self._draws(samples, f"drop {name}") < rate for name, rate in self.drop_rates.items()},
            unreadable=tuple(what for sample in samples for what in sample.unreadable),
        )

    def _draws(self, samples: Sequence[Sample], purpose: str) -> Tensor:
        """A uniform number for each sample, (B,) float64 in [0, 1)."""
        draws = PositionDraws(self.seed, purpose)
        return torch.tensor([draws.at(sample.position).random() for sample in samples], dtype=torch.float64)


def text_inputs(
    tokenizer: PromptTokenizer, captions: Sequence[str], features: Sequence[Mapping[str, TextFeatures]]
) -> dict[str, TextInput]:
    """What each text encoder takes: the features of the captions where the shards bring them, or else their tokens."""
    if features[0]:
        return {name: FeatureBatch.of([row[name] for row in features]) for name in features[0]}
    return {name: tokens.bare() for name, tokens in tokenizer(captions).items()}


class DiffusionTask:
    """EDM's objective for a stage: noise drawn from its part of p(sigma), all encoders dropped independently (eDiff-I section 4.2).

    interval, loss: the stage's noise and EDM's loss, those of validation. draws, objective: those of training, the same unless an expert
    is trained to be merged (`DecoupleConfig`).
    """

    def __init__(
        self,
        stage: StageConfig,
        conditioner: TextConditioner,
        *,
        seed: int,
        device: torch.device,
        bf16: bool = False,
        codec: Codec = PIXEL,
        decouple: DecoupleConfig | None = None,
        parent: Denoiser | None = None,
    ) -> None:
        """bf16: the denoiser (not encoders and codec, which have their own dtype) computes under bfloat16 autocast. codec: the stage's.
        decouple: what training changes in draws and loss; validation has the stage's own noise and EDM's loss all the same. parent: frozen
        and on the device, for `decouple.consistency`, which needs it.

        Raises ValueError for `stage.noise.quantiles` so close to each other that no float32 sigma lies between them.
        """
        assert fits(codec, stage), "a task needs the codec of its stage: load_codec(stage)"
        self.stage = stage
        self.conditioner = conditioner
        self.codec = codec
        self.seed = seed
        self.device = device
        self.bf16 = bf16
        self.interval = NoiseInterval.from_config(stage.noise)
        self.interval.ends(torch.float32)
        self.loss = EDMLoss(stage.noise.sigma_data)
        decouple = decouple or DecoupleConfig()
        self.draws = ProbabilisticInterval(self.interval, decouple.everywhere) if decouple.everywhere else self.interval
        self.objective: EDMLoss | DecoupleLoss = self.loss
        if decouple.consistency:
            assert parent is not None, "a distance from the parent needs one"
            self.objective = DecoupleLoss(parent, decouple.consistency, stage.noise.sigma_data)

    def collate(self) -> Collate:
        """How the loader makes batches."""
        rates = {name: encoder.drop for name, encoder in self.stage.encoders.items()}
        return Collate(self.conditioner.tokenizer, rates, self.seed)

    def images(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 on the CPU to float32 in [-1, 1] on the device, channels last."""
        return from_uint8(pixels.to(self.device, non_blocking=True)).contiguous(memory_format=torch.channels_last)

    def latents(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """What is denoised for images (B, 3, H, W), channels last: themselves, or what a codec makes of them (see `Codec.encode`)."""
        return self.codec.encode(images, generator).contiguous(memory_format=torch.channels_last)

    def losses(self, denoiser: Denoiser, batch: Batch) -> tuple[Tensor, Tensor]:
        """The loss of each image, and the noise level at which it was taken, both (B,) float32 on the device.

        Seeds torch's generators from (seed, first position): eps, dropout and what a codec draws are the same whenever the run comes to
        this batch, and however many processes and accumulation steps share the work as long as their product stays.
        """
        seed = int(position_rng(self.seed, batch.positions[0], "noise").integers(2**63))
        torch.manual_seed(seed)  # for dropout
        generator = torch.Generator(self.device).manual_seed(seed)
        images = self.images(batch.images)
        conditioning = self.conditioner.encode(batch.tokens, images, batch.drops)
        sigma = to_device(self.draws.from_uniform(batch.uniform, torch.float32), self.device)
        latents = self.latents(images, generator)
        eps = torch.randn(latents.shape, generator=generator, device=self.device)
        with self.autocast():
            return self.objective(denoiser, latents, sigma, eps, conditioning), sigma

    def autocast(self) -> torch.autocast:
        """The precision that the denoiser computes in; its weights stay float32."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)
