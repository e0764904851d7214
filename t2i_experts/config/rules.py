"""What a config must keep to beyond its types. Each error names the key, the value received and what is allowed."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields

from t2i_experts.config.expert_rules import check_blend, check_decouple, check_expert, check_experts, read_quantiles
from t2i_experts.config.schema import (
    CodecConfig,
    EMAConfig,
    NetworkConfig,
    RunConfig,
    SamplingConfig,
    StageConfig,
    TrainingConfig,
)


def check_sampling(sampling: SamplingConfig, prefix: str = "sampling.") -> None:
    """Raises ValueError for settings that cannot be sampled with, naming the field after `prefix`. Samplers' names are the registry's."""
    if sampling.steps < 1:
        raise ValueError(f"{prefix}steps={sampling.steps} must be at least 1")
    if not 0 <= sampling.guidance < math.inf:
        raise ValueError(f"{prefix}guidance={sampling.guidance} must be finite and not negative; 1 means no guidance")
    for name, expert in sampling.experts.items():
        where = f"{prefix}experts.{name}."
        if expert.steps is not None and expert.steps < 1:
            raise ValueError(f"{where}steps={expert.steps} must be at least 1; null means as many as the schedule has there")
        if expert.guidance is not None and not 0 <= expert.guidance < math.inf:
            raise ValueError(f"{where}guidance={expert.guidance} must be finite and not negative; null means that of all experts")
    lo, hi = sampling.guidance_interval
    if not 0 <= lo < hi:
        raise ValueError(f"{prefix}guidance_interval={sampling.guidance_interval} must be [lo, hi] with 0 <= lo < hi, in units of sigma")
    if not 0 <= sampling.threshold < 1:
        raise ValueError(f"{prefix}threshold={sampling.threshold} must lie in [0, 1); 0 means no dynamic thresholding")
    if not 0 < sampling.sigma_min < sampling.sigma_max < math.inf:
        raise ValueError(f"{prefix}sigma_min={sampling.sigma_min} must be positive and below {prefix}sigma_max={sampling.sigma_max}")
    if not 0 < sampling.rho < math.inf:
        raise ValueError(f"{prefix}rho={sampling.rho} must be positive and finite")


_RANGES: dict[str, Callable[[float], bool]] = {
    "must be positive and finite": lambda value: 0 < value < math.inf,
    "must be finite and not negative": lambda value: 0 <= value < math.inf,
    "must be finite": math.isfinite,
    "must lie in [0, 1)": lambda value: 0 <= value < 1,
}
_STAGE = {
    "must be positive and finite": (
        "size",
        "noise.std",
        "noise.sigma_data",
    ),
    "must be finite": ("noise.mean",),
}
_UNET = {
    "must be positive and finite": ("patch_size", "embedding_channels", "context_channels", "head_channels"),
    "must lie in [0, 1)": ("dropout",),
}
_ENCODER = {
    "must be positive and finite": ("width", "max_tokens"),
    "must be finite and not negative": ("pooled_width",),
    "must lie in [0, 1)": ("drop",),
}
_TRAINING = {
    "must be positive and finite": (
        "images",
        "batch_size",
        "accumulation",
        "checkpoint_every_images",
        "keep_checkpoints",
        "log_every_images",
        "ema.halflife_kimg",
        "validation.images",
        "validation.bins",
    ),
    "must be finite and not negative": (
        "max_minutes",
        "divergence_factor",
        "rollbacks",
        "gradient_checkpointing",
        "rank",
        "optimizer.learning_rate",
        "optimizer.warmup_images",
        "optimizer.eps",
        "optimizer.weight_decay",
        "optimizer.clip_norm",
        "decouple.consistency",
        "ema.rampup",
        "ema.snapshot_every_images",
        "preview.every_images",
        "validation.every_images",
    ),
    "must lie in [0, 1)": ("optimizer.beta1", "optimizer.beta2"),
}


def _check_numbers(owner: object, prefix: str, table: Mapping[str, Sequence[str]]) -> None:
    """Raises ValueError for the first value of `owner` that is outside the range that `table` gives its key."""
    for allowed, keys in table.items():
        for key in keys:
            value = operator.attrgetter(key)(owner)
            if not _RANGES[allowed](value):
                raise ValueError(f"{prefix}{key}={value} {allowed}")


_NAME = re.compile(r"[A-Za-z0-9_-]+")
_RESERVED = ("t5", "clip", "tokenizer")  # what else a model folder holds


def check_stage_name(name: str, where: str) -> None:
    """Raises ValueError for a name that cannot be a stage's, which is its folder inside a model folder."""
    if not _NAME.fullmatch(name) or name in _RESERVED:
        raise ValueError(f"{where}={name!r} must be letters, digits, '_' and '-', and none of {', '.join(_RESERVED)}")


def check_stage(stage: StageConfig, prefix: str = "stage.") -> None:
    """Raises ValueError for a stage that cannot be built or saved, naming the field after `prefix`."""
    check_stage_name(stage.name, f"{prefix}name")
    _check_numbers(stage, prefix, _STAGE)
    read_quantiles(stage.noise.quantiles, f"{prefix}noise.quantiles")
    _check_buckets(stage, prefix)
    _check_codec(stage, prefix)
    if stage.network.backbone == "unet":
        _check_unet(stage, prefix)
    else:
        _check_other_backbone(stage.network, f"{prefix}network.")
    if not stage.encoders:
        raise ValueError(f"{prefix}encoders is empty; at least one encoder must condition the model")
    for name, encoder in stage.encoders.items():
        where = f"{prefix}encoders.{name}"
        if not _NAME.fullmatch(name) or name == stage.name:
            raise ValueError(f"{where}: an encoder's name must be letters, digits, '_' and '-', and not the stage's ({stage.name!r})")
        _check_numbers(encoder, f"{where}.", _ENCODER)
        if encoder.kind == "clip_image" and encoder.max_tokens != 1:
            raise ValueError(f"{where}.max_tokens={encoder.max_tokens} must be 1 for kind clip_image: a picture is one token")


def _check_buckets(stage: StageConfig, prefix: str) -> None:
    square, ratios = [stage.size, stage.size], dict[float, int]()
    for i, bucket in enumerate(stage.buckets):
        where = f"{prefix}buckets[{i}]={bucket}"
        if len(bucket) != 2 or min(bucket) < 1:
            raise ValueError(f"{where} must be [width, height], both positive")
        width, height = bucket
        if not 0.75 <= width * height / stage.size**2 <= 1.25:
            raise ValueError(
                f"{where} has {width * height} pixels; allowed is 3/4 to 5/4 of {prefix}size^2 = {stage.size**2}, so that every picture "
                "shows and costs about as much"
            )
        if width / height in ratios:
            raise ValueError(f"{where} has the aspect ratio of {prefix}buckets[{ratios[width / height]}]; each needs its own")
        ratios[width / height] = i
    if stage.buckets and square not in stage.buckets:
        raise ValueError(f"{prefix}buckets={stage.buckets} must hold the square {square}: validation, previews and `generate` use it")


CODEC_FOLDER = "vae"
"""Of a model folder, in which a codec's files are; diffusers' name for it."""


def _check_codec(stage: StageConfig, prefix: str) -> None:
    codec, where = stage.codec, f"{prefix}codec."
    if not codec.latents:
        for field in fields(codec):
            value = getattr(codec, field.name)
            if value != getattr(CodecConfig(), field.name):
                raise ValueError(f"{where}{field.name}={value!r} would be ignored: {where}kind=pixel denoises pictures as they are")
        return
    _check_numbers(codec, where, {"must be positive and finite": ("channels", "factor")})
    if codec.kind == "autoencoder_kl" and not codec.model:
        raise ValueError(f"{where}model={codec.model!r}: missing mandatory value of kind autoencoder_kl; name a folder or hub id")
    for width, height in ((stage.size, stage.size), *stage.buckets):
        if width % codec.factor or height % codec.factor:
            raise ValueError(f"{where}factor={codec.factor} must divide the sides of all pictures; received {width} x {height} px")
    folders = {"name": stage.name}  # of a model folder, by the key that they are called after
    for name, encoder in stage.encoders.items():
        folders |= {f"encoders.{name}": name, f"encoders.{name}.kind": encoder.kind.removesuffix("_text").removesuffix("_image")}
    for key, folder in folders.items():
        if folder == CODEC_FOLDER:
            raise ValueError(f"{prefix}{key} would take the folder {CODEC_FOLDER!r} of a model folder, which is the codec's; rename it")


def check_threshold(threshold: float, codec: CodecConfig, prefix: str = "sampling.") -> None:
    """Raises ValueError for dynamic thresholding of latents, which have no bounds that one could threshold to."""
    if threshold and codec.latents:
        raise ValueError(
            f"{prefix}threshold={threshold} needs pictures in [-1, 1], but this model denoises latents (codec {codec.kind}); set it to 0"
        )


def _check_unet(stage: StageConfig, prefix: str) -> None:
    network, resolutions = stage.network, stage.network.resolutions
    for key in ("embedding_channels", "context_channels"):
        if getattr(network, key) == 0:
            raise ValueError(f"{prefix}network.{key}=0 must be positive: missing mandatory value of the backbone unet")
    _check_numbers(network, f"{prefix}network.", _UNET)
    if network.options:
        raise ValueError(f"{prefix}network.options={network.options} would be ignored: the backbone unet has none, but fields of its own")
    if not resolutions:
        raise ValueError(f"{prefix}network.resolutions is empty: missing mandatory value; the U-Net needs at least one resolution")
    factor = stage.codec.factor * network.patch_size * 2 ** (len(resolutions) - 1)
    codec = f", and codec.factor {stage.codec.factor}" if stage.codec.latents else ""
    why = f"for {len(resolutions)} resolutions and patch_size {network.patch_size}{codec}"
    if stage.size % factor:
        raise ValueError(f"{prefix}size={stage.size} must be a multiple of {factor} {why}")
    for i, bucket in enumerate(stage.buckets):
        if any(side % factor for side in bucket):
            raise ValueError(f"{prefix}buckets[{i}]={bucket}: both must be multiples of {factor} {why}")
    for i, spec in enumerate(resolutions):
        where = f"{prefix}network.resolutions[{i}]"
        if spec.channels < 1 or spec.blocks < 1:
            raise ValueError(f"{where} has channels={spec.channels}, blocks={spec.blocks}; both must be positive")
        if (spec.self_attention or spec.cross_attention) and spec.channels % network.head_channels:
            raise ValueError(f"{where}.channels={spec.channels} must be a multiple of head_channels={network.head_channels}")
    if not any(spec.cross_attention for spec in resolutions):
        raise ValueError(f"{prefix}network.resolutions: at least one needs cross_attention: true, or the prompt's tokens are never read")


def _check_other_backbone(network: NetworkConfig, prefix: str) -> None:
    """The U-Net's fields would be ignored; options must come back as they were from a checkpoint and a model folder, which are JSON."""
    plain = NetworkConfig(backbone=network.backbone, options=network.options)
    for field in fields(network):
        value = getattr(network, field.name)
        if value != getattr(plain, field.name):
            received = "" if isinstance(value, list) else f"={value}"
            raise ValueError(
                f"{prefix}{field.name}{received} is the unet's; the settings of the backbone {network.backbone!r}, if that is one, "
                f"belong in {prefix}options"
            )
    _check_option(network.options, f"{prefix}options")


def _check_option(value: object, where: str) -> None:
    match value:
        case dict():
            for key, inner in value.items():
                if not isinstance(key, str):
                    raise ValueError(f"{where}: the key {key!r} must be a string")
                _check_option(inner, f"{where}.{key}")
        case list():
            for i, inner in enumerate(value):
                _check_option(inner, f"{where}[{i}]")
        case float() if not math.isfinite(value):
            raise ValueError(f"{where}={value} must be finite")
        case None | str() | int() | float():
            pass
        case _:
            raise ValueError(f"{where}={value!r}; allowed: null, true, false, numbers, strings, and lists and mappings of these")


TRACKERS = ("tensorboard", "wandb")


def _check_ema(ema: EMAConfig) -> None:
    if ema.kind != "power":
        for key in ("sigma_rel", "snapshot_every_images"):
            value = getattr(ema, key)
            if value != getattr(EMAConfig(), key):
                raise ValueError(f"training.ema.{key}={value} needs training.ema.kind=power; received kind={ema.kind}")
    widths = ema.sigma_rel
    if not widths or len(set(widths)) < len(widths) or not all(0 < width < 12**-0.5 for width in widths):
        raise ValueError(f"training.ema.sigma_rel={widths} must be one or more different widths, each positive and below 12^-0.5 = 0.2887")


def _check_training(training: TrainingConfig) -> None:
    _check_numbers(training, "training.", _TRAINING)
    if not set(training.trackers) <= set(TRACKERS) or len(set(training.trackers)) < len(training.trackers):
        raise ValueError(f"training.trackers={training.trackers} may hold {' and '.join(TRACKERS)}, each once; [] means none")
    _check_ema(training.ema)
    if training.batch_size % training.accumulation:
        raise ValueError(f"training.batch_size={training.batch_size} must be a multiple of training.accumulation={training.accumulation}")
    if training.rank and training.initial is None:
        raise ValueError(
            f"training.rank={training.rank} needs training.initial, the weights from which a low-rank difference is trained; 0 trains all"
        )
    if training.device not in (None, "cpu"):
        raise ValueError(f"training.device={training.device!r}; allowed: cpu, or null for the accelerator that the process is given")
    if 0 < training.divergence_factor <= 1:
        raise ValueError(f"training.divergence_factor={training.divergence_factor} must be above 1; 0 means no watch over the loss")
    if training.preview.every_images and not training.preview.prompts:
        raise ValueError(f"training.preview.every_images={training.preview.every_images} needs training.preview.prompts; 0 draws none")


_URL = re.compile(r"pipe:|[A-Za-z][A-Za-z0-9+.-]+://")


def is_url(path: str) -> bool:
    """Whether shards are named by URL, to be read as streams, and not as a folder."""
    return _URL.match(path) is not None


def _check_urls(config: RunConfig) -> None:
    data = config.data
    folders = [path for path in data.train if not is_url(path)]
    if folders and len(folders) < len(data.train):
        raise ValueError(f"data.train={data.train} mixes URLs with folders ({', '.join(folders)}); name only folders, or only URLs")
    if config.stage.buckets and not folders:
        raise ValueError("stage.buckets sorts pictures by their sizes beforehand; it needs folders in data.train, which names URLs")
    if data.embeddings == "stored" and not folders:
        raise ValueError("data.embeddings=stored needs folders in data.train, which names URLs; set it to online, or copy the shards")
    if data.validation is not None and is_url(data.validation):
        raise ValueError(f"data.validation={data.validation!r} must be a shard folder: only training reads streams; copy the shards")


def check(config: RunConfig) -> None:
    """All rules that OmegaConf's types do not hold. Each error names the key, what it received and what is allowed."""
    check_stage(config.stage)
    _check_training(config.training)
    depth, recomputed = len(config.stage.network.resolutions), config.training.gradient_checkpointing
    if recomputed and config.stage.network.backbone != "unet":
        raise ValueError(
            f"training.gradient_checkpointing={recomputed} is the unet's; the backbone {config.stage.network.backbone!r} has none"
        )
    if recomputed > depth:
        raise ValueError(f"training.gradient_checkpointing={recomputed}: the network has {depth} resolutions; 0 remembers all of them")
    check_sampling(config.sampling)
    check_threshold(config.sampling.threshold, config.stage.codec)
    preview = config.sampling.for_all(steps=config.training.preview.steps, guidance=config.training.preview.guidance)
    check_sampling(preview, "training.preview.")
    if not config.data.train:
        raise ValueError("data.train is empty; name at least one shard folder")
    _check_urls(config)
    _check_numbers(config, "", {"must be finite and not negative": ("data.workers",), "must lie in [0, 1)": ("data.max_unreadable",)})
    every = config.training.validation.every_images
    if every and config.data.validation is None:
        raise ValueError(f"training.validation.every_images={every} needs data.validation; set it to 0, or name a shard folder there")
    check_experts(config.experts)
    check_expert(config)
    check_decouple(config)
    check_blend(config)
    for name in config.sampling.experts:
        if name not in config.experts.leaves:
            raise ValueError(f"sampling.experts.{name}: no such expert; experts.leaves={config.experts.leaves} names those that there are")
