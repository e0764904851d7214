"""What a config may say: the fields, their types, their defaults and what they mean."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

MISSING: Any = "???"


@dataclass(frozen=True)
class ResolutionSpec:
    """One resolution of the U-Net, from the image's own downwards; each next one has half the side.

    channels: width of its residual blocks. blocks: residual blocks on the way down (the way up has one more).
    self_attention, cross_attention: whether these blocks are followed by attention over pixels, and over the text. The blocks that
    only change the resolution and the second of the two middle blocks (at the lowest resolution) have none.
    """

    channels: int = MISSING
    blocks: int = MISSING
    self_attention: bool = False
    cross_attention: bool = False


@dataclass(frozen=True)
class NetworkConfig:
    """The network that is trained: the U-Net, of which all fields but the last two are, or the backbone of a plugin.

    Dimensions in channels; `head_channels` is the width of one attention head. The U-Net must be given `resolutions`,
    `embedding_channels` and `context_channels`.
    patch_size: with p > 1 the first resolution has 1/p of the image's side, each of its pixels holding p x p of the image's. Most of the
    cost of a U-Net lies in its first resolution, which becomes p^2 times cheaper.
    projections: 1x1 convolutions, at first the identity, behind the last block of each resolution on the way down and up, and behind the
    middle: where DeMe has them (Xie et al. 2410.06664) in experts that are to be merged. They can be added to weights without them.
    backbone: its name in the registry. options: settings of any other backbone than `unet`, which are its own.
    """

    resolutions: list[ResolutionSpec] = field(default_factory=list)
    patch_size: int = 1
    embedding_channels: int = 0
    context_channels: int = 0
    head_channels: int = 64
    dropout: float = 0.0
    projections: bool = False
    backbone: str = "unet"
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class NoiseConfig:
    """ln sigma ~ N(mean, std^2) in training (EDM's P_mean, P_std); sigma_data is the standard deviation of the images in [-1, 1],
    and the one that a codec gives its latents.

    quantiles: [u_lo, u_hi], numbers or fractions such as 511/512: the part of that distribution which the network is trained on and answers
    for; empty: all of it. One trained on a part is an expert, which draws no picture alone.
    """

    mean: float = -1.2
    std: float = 1.2
    sigma_data: float = 0.5
    quantiles: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class EncoderConfig:
    """One frozen encoder.

    kind: its name in the registry (`t5`, `clip_text`, `clip_image`). model: a local folder, a hub id, an open_clip architecture,
    or `embedded:NAME` for one that ships with this package; `./NAME` in a model folder is that folder's own. pretrained: open_clip's tag
    for an architecture's public weights.
    width, pooled_width: of its tokens and its pooled vector (0: none), checked when it is loaded. drop: how often training drops it.
    """

    kind: str = MISSING
    model: str = MISSING
    pretrained: str | None = None
    width: int = MISSING
    pooled_width: int = 0
    max_tokens: int = 77
    dtype: Literal["float32", "bfloat16"] = "float32"
    drop: float = 0.0


@dataclass(frozen=True)
class CodecConfig:
    """What the denoiser works on: pictures as they are, or what a codec makes of them, their latents (Rombach et al., arXiv 2112.10752).

    kind: its name in the registry: `pixel` (eDiff-I), to which nothing else here applies, or `autoencoder_kl`, a VAE of diffusers.
    model: a local folder, or a hub id with the folder inside it, as in `stabilityai/stable-diffusion-xl-base-1.0/vae`; `./vae` in a model
    folder is that folder's own. channels, factor: latents of (width, height) pixels are (channels, height / factor, width / factor),
    checked when it is loaded. dtype: that it computes in, whatever the network does.
    """

    kind: str = "pixel"
    model: str | None = None
    channels: int = 3
    factor: int = 1
    dtype: Literal["float32", "bfloat16"] = "float32"

    @property
    def latents(self) -> bool:
        """Whether the denoiser works on anything but pictures."""
        return self.kind != "pixel"


@dataclass(frozen=True)
class StageConfig:
    """One stage of the cascade: what is trained, at which resolution, under which noise, on which encoders, on pictures or their latents.

    size: side of the square pictures, in pixels, whatever the codec. buckets: aspect-ratio buckets, [width, height] each, the square among
    them; empty: off, all pictures are cut to squares. With buckets each is cut to the nearest one's shape, and every batch has one shape.
    """

    name: str = "base64"
    size: int = 64
    buckets: list[list[int]] = field(default_factory=list)
    network: NetworkConfig = MISSING
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    encoders: dict[str, EncoderConfig] = MISSING
    codec: CodecConfig = field(default_factory=CodecConfig)


@dataclass(frozen=True)
class DataConfig:
    """Shard folders. `validation` is never trained on; `workers` decode images beside each training process.

    train: folders, or URLs of tars, which are read as streams with a weaker guarantee (shards/README.md).
    max_unreadable: a sample that cannot be read is replaced by another one; the run ends when more than this share of draws was unreadable.
    embeddings: `online`, the text encoders run beside the training; or `stored`, they do not, and the shards (of validation too) bring what
    `t2i-experts shards embed` has added. Image encoders always run.
    """

    train: list[str] = MISSING
    validation: str | None = None
    workers: int = 2
    max_unreadable: float = 0.1
    embeddings: Literal["online", "stored"] = "online"


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its learning rate, which is a function of the images seen: a linear warm-up, then constant or a decay to zero.

    clip_norm: gradients of a larger norm are scaled down to it; 0 means no clipping.
    """

    learning_rate: float = 1e-4
    warmup_images: int = 0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip_norm: float = 1.0


@dataclass(frozen=True)
class EMAConfig:
    """Moving average of the weights.

    kind: `halflife`, EDM's exponential one with a half-life of min(halflife_kimg, rampup * images seen) (rampup 0: no ramp); or `power`,
    EDM2's, whose profile grows with the run, and which does not read these two.
    sigma_rel: the widths that `power` tracks, as the profile's standard deviation in parts of the run. The first is the one that is
    validated, previewed and saved as the model. snapshot_every_images: how often all of them are stored, so that `t2i-experts ema` can
    make others of them; 0: never. A snapshot has 4 bytes a parameter and width, and none is removed.
    """

    kind: Literal["halflife", "power"] = "halflife"
    halflife_kimg: float = 500.0
    rampup: float = 0.05
    sigma_rel: list[float] = field(default_factory=lambda: [0.05, 0.10])
    snapshot_every_images: int = 0


@dataclass(frozen=True)
class PreviewConfig:
    """Pictures of fixed prompts at fixed seeds (i for the i-th prompt), drawn with the EMA weights; every_images 0: never.

    around: for a run with `stage.noise.quantiles`, the model folder that answers for all other noise, of one network that was trained on
    all of it; None: `training.initial`.
    """

    prompts: list[str] = field(default_factory=list)
    every_images: int = 0
    steps: int = 25
    guidance: float = 4.0
    around: str | None = None


@dataclass(frozen=True)
class ValidationConfig:
    """Loss on held-out images at fixed noise, in `bins` equally probable ranges of sigma; every_images 0: never."""

    every_images: int = 0
    images: int = 1024
    bins: int = 8


@dataclass(frozen=True)
class RatioConfig:
    """How much of a blend's answer is the high-noise expert's, by the quantile u of the noise (t2i_experts/experts/ratio.py).

    kind: `linear`, u; `sigmoid`, 1 / (1 + exp(-steepness (u - middle))); `learned`, which begins there. steepness: inf is the hard split.
    middle: a quantile, a number or a fraction such as 1/2.
    """

    kind: Literal["linear", "sigmoid", "learned"] = "sigmoid"
    steepness: float = 20.0
    middle: str = "1/2"


@dataclass(frozen=True)
class BlendConfig:
    """Training of two networks and the ratio in which they answer, together, over all noise; off unless high and low are said.

    high, low: the model folders, of this stage and network, with whose weights the two begin. A run that has a checkpoint needs them no
    more.
    """

    high: str | None = None
    low: str | None = None
    ratio: RatioConfig = field(default_factory=RatioConfig)


@dataclass(frozen=True)
class DecoupleConfig:
    """Training of an expert that is to be merged with others, as DeMe's (Xie et al. 2410.06664); off unless said.

    consistency: weight, in the loss, of the squared distance from what the parent, `training.initial`, denoises; the paper's is 1.
    everywhere: probability that a noise level is drawn from all noise and not the run's own part; the paper's is 0.3.
    projections: matrices over channels on the last convolution of each residual branch, at first the identity, train with the weights;
    the model folder holds the products, an ordinary network. The paper's own placement is `stage.network.projections`.
    """

    consistency: float = 0.0
    everywhere: float = 0.0
    projections: bool = False


@dataclass(frozen=True)
class TrainingConfig:
    """A training run. Everything that counts, counts images seen; batch_size is over all processes and accumulation steps.

    initial: a model folder or hub id, of the same stage, with whose (averaged) weights the run begins; the optimiser, its warm-up and the
    average begin anew. None: fresh weights. A run that has a checkpoint needs it no more.
    rank: train at low rank, from `initial`: of every matrix W only a difference up @ down with so many columns and rows, and what is no
    matrix; 0: all weights. The model folder holds an ordinary network, and beside it the difference.
    device: `cpu`, or None for the accelerator that the process is given. Seconds of wall time are bounded by `max_minutes` (0: not at
    all): the run then checkpoints and stops, and the same command goes on.
    keep_checkpoints: the newest ones, beside the best in validation. divergence_factor: two reports in a row whose loss is so many times
    the lowest so far are a divergence (0: only what is not finite is one). rollbacks: how often a run that diverges goes back
    to its newest checkpoint, and on with half the learning rate, before it gives up.
    trackers: `tensorboard` writes to OUTPUT/tensorboard, `wandb` to Weights & Biases (project `t2i-experts`; its own WANDB_PROJECT,
    WANDB_ENTITY and WANDB_MODE=offline hold); each must be installed.
    gradient_checkpointing: the blocks of this many resolutions, from the finest downwards, are computed again in the backward pass
    instead of remembered; it changes memory and speed alone. uncertainty_weighting: EDM2's, every noise level pulls on the weights
    equally hard; the losses that are reported stay EDM's.
    """

    images: int = MISSING
    batch_size: int = MISSING
    initial: str | None = None
    rank: int = 0
    accumulation: int = 1
    seed: int = 0
    precision: Literal["fp32", "bf16"] = "fp32"
    compile: bool = False
    gradient_checkpointing: int = 0
    uncertainty_weighting: bool = False
    device: str | None = None
    max_minutes: float = 0.0
    checkpoint_every_images: int = MISSING
    keep_checkpoints: int = 3
    divergence_factor: float = 4.0
    rollbacks: int = 0
    log_every_images: int = MISSING
    trackers: list[str] = field(default_factory=list)
    decouple: DecoupleConfig = field(default_factory=DecoupleConfig)
    blend: BlendConfig = field(default_factory=BlendConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    ema: EMAConfig = field(default_factory=EMAConfig)
    preview: PreviewConfig = field(default_factory=PreviewConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)


@dataclass(frozen=True)
class ExpertSamplingConfig:
    """What one expert is sampled with; None: as all others.

    guidance: of the evaluations that it makes. steps: noise levels in its range, spaced by rho like those of the whole schedule.
    """

    guidance: float | None = None
    steps: int | None = None


@dataclass(frozen=True)
class SamplingConfig:
    """How a finished model is sampled unless the caller says otherwise; stored in its model folder.

    experts: what particular experts of an ensemble are sampled with, by the name of the leaf. The levels of a leaf without steps of its own
    are those that lie there in the schedule of `steps` levels.
    """

    sampler: str = "dpmpp_2m"
    steps: int = 25
    guidance: float = 4.0
    guidance_interval: tuple[float, float] = (0.0, float("inf"))
    threshold: float = 0.0
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    experts: dict[str, ExpertSamplingConfig] = field(default_factory=dict)

    def for_all(self, *, steps: int | None = None, guidance: float | None = None) -> SamplingConfig:
        """With so many steps, or this guidance, for every expert, in the place of what some have of their own. None leaves all as is."""
        experts = {
            name: ExpertSamplingConfig(one.guidance if guidance is None else None, one.steps if steps is None else None)
            for name, one in self.experts.items()
        }
        return replace(
            self,
            steps=self.steps if steps is None else steps,
            guidance=self.guidance if guidance is None else guidance,
            experts={name: one for name, one in experts.items() if one != ExpertSamplingConfig()},
        )


@dataclass(frozen=True)
class NodeConfig:
    """What is particular about one node of the tree of experts.

    parent: the node from whose weights it starts; of E^level_index, unless said, the one of the level above, else the root.
    quantiles: [u_lo, u_hi] of p(sigma), numbers or fractions such as 1/8, for a node whose name does not say them.
    images: that it is trained on; None: experts.images. overrides: as `experts.overrides`, after these, of this node alone.
    """

    parent: str | None = None
    quantiles: list[str] = field(default_factory=list)
    images: int | None = None
    overrides: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class ExpertsConfig:
    """The tree of experts that grows out of the network that `training` trains, its root (t2i_experts/experts/README.md).

    leaves: the nodes of the ensemble, E^level_index or `complement` (all that the others leave); their ancestors are trained as well.
    Empty: no experts. images: that each node but the root is trained on. overrides: `key=value` settings of the runs of all nodes but the
    root, of `training`, `data` and `stage.network`. nodes: what is particular about some, by name.
    """

    leaves: list[str] = field(default_factory=list)
    images: int = 0
    overrides: list[str] = field(default_factory=list)
    nodes: dict[str, NodeConfig] = field(default_factory=dict)


@dataclass(frozen=True)
class RunConfig:
    """What `t2i-experts train CONFIG` reads, and `t2i-experts experts` about the tree that grows out of that network."""

    output: str = MISSING
    stage: StageConfig = MISSING
    data: DataConfig = MISSING
    training: TrainingConfig = MISSING
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)
