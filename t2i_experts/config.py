"""Configs: YAML files read into frozen dataclasses, strictly.

A config file may say `extends: OTHER.yaml` (relative to itself) and then hold only what differs; lists are replaced, not merged.
`key=value` overrides come last. An unknown key, a wrong type and a missing value are errors that name the key.
"""

from __future__ import annotations

import dataclasses
import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

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
    """The U-Net. Dimensions in channels; `head_channels` is the width of one attention head.

    patch_size: with p > 1 the first resolution has 1/p of the image's side, each of its pixels holding p x p of the image's. Most of the
    cost of a U-Net lies in its first resolution, which becomes p^2 times cheaper.
    """

    resolutions: list[ResolutionSpec] = MISSING
    patch_size: int = 1
    embedding_channels: int = MISSING
    context_channels: int = MISSING
    head_channels: int = 64
    dropout: float = 0.0


@dataclass(frozen=True)
class NoiseConfig:
    """ln sigma ~ N(mean, std^2) in training (EDM's P_mean, P_std); sigma_data is the standard deviation of the images in [-1, 1]."""

    mean: float = -1.2
    std: float = 1.2
    sigma_data: float = 0.5


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
class StageConfig:
    """One stage of the cascade: what is trained, at which resolution, under which noise, on which encoders."""

    name: str = "base64"
    size: int = 64
    network: NetworkConfig = MISSING
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    encoders: dict[str, EncoderConfig] = MISSING


@dataclass(frozen=True)
class DataConfig:
    """Shard folders. `validation` is never trained on; `workers` decode images beside each training process."""

    train: list[str] = MISSING
    validation: str | None = None
    workers: int = 2


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
    """Exponential moving average of the weights: half-life min(halflife_kimg, rampup * images seen), as in EDM; rampup 0: no ramp."""

    halflife_kimg: float = 500.0
    rampup: float = 0.05


@dataclass(frozen=True)
class PreviewConfig:
    """Pictures of fixed prompts at fixed seeds (i for the i-th prompt), drawn with the EMA weights; every_images 0: never."""

    prompts: list[str] = field(default_factory=list)
    every_images: int = 0
    steps: int = 25
    guidance: float = 4.0


@dataclass(frozen=True)
class ValidationConfig:
    """Loss on held-out images at fixed noise, in `bins` equally probable ranges of sigma; every_images 0: never."""

    every_images: int = 0
    images: int = 1024
    bins: int = 8


@dataclass(frozen=True)
class TrainingConfig:
    """A training run. Everything that counts, counts images seen; batch_size is over all processes and accumulation steps.

    device: `cpu`, or None for the accelerator that the process is given. Seconds of wall time are bounded by `max_minutes` (0: not at
    all): the run then checkpoints and stops, and the same command goes on.
    """

    images: int = MISSING
    batch_size: int = MISSING
    accumulation: int = 1
    seed: int = 0
    precision: Literal["fp32", "bf16"] = "fp32"
    compile: bool = False
    device: str | None = None
    max_minutes: float = 0.0
    checkpoint_every_images: int = MISSING
    keep_checkpoints: int = 3
    log_every_images: int = MISSING
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    ema: EMAConfig = field(default_factory=EMAConfig)
    preview: PreviewConfig = field(default_factory=PreviewConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)


@dataclass(frozen=True)
class SamplingConfig:
    """How a finished model is sampled unless the caller says otherwise; stored in its model folder."""

    sampler: str = "dpmpp_2m"
    steps: int = 25
    guidance: float = 4.0
    guidance_interval: tuple[float, float] = (0.0, float("inf"))
    threshold: float = 0.0
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0


@dataclass(frozen=True)
class RunConfig:
    """What `t2i-experts train CONFIG` reads."""

    output: str = MISSING
    stage: StageConfig = MISSING
    data: DataConfig = MISSING
    training: TrainingConfig = MISSING
    sampling: SamplingConfig = field(default_factory=SamplingConfig)


def _read(path: Path, chain: tuple[Path, ...] = ()) -> DictConfig:
    """The file merged over the one that it extends."""
    path = path.resolve()
    if path in chain:
        raise ValueError(f"extends goes in a circle: {' -> '.join(str(p) for p in (*chain, path))}")
    if not path.is_file():
        raise ValueError(f"config file not found: {path}" + (f" (extended by {chain[-1]})" if chain else ""))
    try:
        config = OmegaConf.load(path)
    except Exception as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(config, DictConfig):
        raise ValueError(f"{path} must hold keys and values at its top level")
    if "extends" in config:
        parent = config.pop("extends")
        config = cast(DictConfig, OmegaConf.merge(_read(path.parent / str(parent), (*chain, path)), config))
    return config


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a config file and its `key=value` overrides.

    Raises ValueError naming the key, for an unknown key, a wrong type, a missing value or an impossible combination.
    """
    return build_config(_read(Path(path)), overrides, source=str(path))


def build_config(tree: DictConfig | dict[str, Any], overrides: Sequence[str] = (), *, source: str = "config") -> RunConfig:
    """The frozen dataclasses for a tree of plain values; see `load_config`."""
    merged = OmegaConf.structured(RunConfig)
    for origin, part in [(source, tree), *((f"override {text!r}", _override(text)) for text in overrides)]:
        try:
            merged = OmegaConf.merge(merged, part)
        except (OmegaConfBaseException, TypeError) as error:
            raise ValueError(f"{origin}: {_explain(error)}") from error
    try:
        config = OmegaConf.to_object(merged)
    except (OmegaConfBaseException, TypeError) as error:
        raise ValueError(f"{source}: {_explain(error)}") from error
    assert isinstance(config, RunConfig)
    _check(config)
    return config


def _override(text: str) -> DictConfig:
    """The tree of one `key=value`, whose value is YAML. Raises ValueError if it is not of that form."""
    if not text.partition("=")[1]:
        raise ValueError(f"override {text!r} is not of the form key=value")
    try:
        return OmegaConf.from_dotlist([text])
    except Exception as error:
        raise ValueError(f"override {text!r}: the value is not valid YAML: {' '.join(str(error).split())}") from error


def _explain(error: Exception) -> str:
    """What OmegaConf complains of, in one line that names the key and, for an unknown one, the keys that there are."""
    message = str(error).split("\n")[0]
    key = getattr(error, "full_key", None)
    kind = getattr(error, "object_type", None)
    if isinstance(error, ConfigKeyError) and isinstance(kind, type) and dataclasses.is_dataclass(kind):
        message += f"; allowed: {', '.join(field.name for field in dataclasses.fields(kind))}"
    return f"{key}: {message}" if key and key not in message else message


def check_sampling(sampling: SamplingConfig, prefix: str = "sampling.") -> None:
    """Raises ValueError for settings that cannot be sampled with, naming the field after `prefix`. Samplers' names are the registry's."""
    if sampling.steps < 1:
        raise ValueError(f"{prefix}steps={sampling.steps} must be at least 1")
    if not 0 <= sampling.guidance < math.inf:
        raise ValueError(f"{prefix}guidance={sampling.guidance} must be finite and not negative; 1 means no guidance")
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
        "network.patch_size",
        "network.embedding_channels",
        "network.context_channels",
        "network.head_channels",
        "noise.std",
        "noise.sigma_data",
    ),
    "must be finite": ("noise.mean",),
    "must lie in [0, 1)": ("network.dropout",),
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
        "optimizer.learning_rate",
        "optimizer.warmup_images",
        "optimizer.eps",
        "optimizer.weight_decay",
        "optimizer.clip_norm",
        "ema.rampup",
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
    network, resolutions = stage.network, stage.network.resolutions
    check_stage_name(stage.name, f"{prefix}name")
    _check_numbers(stage, prefix, _STAGE)
    if not resolutions:
        raise ValueError(f"{prefix}network.resolutions is empty; the U-Net needs at least one resolution")
    factor = network.patch_size * 2 ** (len(resolutions) - 1)
    if stage.size % factor:
        raise ValueError(
            f"{prefix}size={stage.size} must be a multiple of {factor} for {len(resolutions)} resolutions and "
            f"patch_size {network.patch_size}"
        )
    for i, spec in enumerate(resolutions):
        where = f"{prefix}network.resolutions[{i}]"
        if spec.channels < 1 or spec.blocks < 1:
            raise ValueError(f"{where} has channels={spec.channels}, blocks={spec.blocks}; both must be positive")
        if (spec.self_attention or spec.cross_attention) and spec.channels % network.head_channels:
            raise ValueError(f"{where}.channels={spec.channels} must be a multiple of head_channels={network.head_channels}")
    if not any(spec.cross_attention for spec in resolutions):
        raise ValueError(f"{prefix}network.resolutions: at least one needs cross_attention: true, or the prompt's tokens are never read")
    if not stage.encoders:
        raise ValueError(f"{prefix}encoders is empty; at least one encoder must condition the model")
    for name, encoder in stage.encoders.items():
        where = f"{prefix}encoders.{name}"
        if not _NAME.fullmatch(name) or name == stage.name:
            raise ValueError(f"{where}: an encoder's name must be letters, digits, '_' and '-', and not the stage's ({stage.name!r})")
        _check_numbers(encoder, f"{where}.", _ENCODER)
        if encoder.kind == "clip_image" and encoder.max_tokens != 1:
            raise ValueError(f"{where}.max_tokens={encoder.max_tokens} must be 1 for kind clip_image: a picture is one token")


def _check_training(training: TrainingConfig) -> None:
    _check_numbers(training, "training.", _TRAINING)
    if training.batch_size % training.accumulation:
        raise ValueError(f"training.batch_size={training.batch_size} must be a multiple of training.accumulation={training.accumulation}")
    if training.device not in (None, "cpu"):
        raise ValueError(f"training.device={training.device!r}; allowed: cpu, or null for the accelerator that the process is given")
    if training.preview.every_images and not training.preview.prompts:
        raise ValueError(f"training.preview.every_images={training.preview.every_images} needs training.preview.prompts; 0 draws none")


def _check(config: RunConfig) -> None:
    """All rules that OmegaConf's types do not hold. Each error names the key, what it received and what is allowed."""
    check_stage(config.stage)
    _check_training(config.training)
    check_sampling(config.sampling)
    preview = replace(config.sampling, steps=config.training.preview.steps, guidance=config.training.preview.guidance)
    check_sampling(preview, "training.preview.")
    if not config.data.train:
        raise ValueError("data.train is empty; name at least one shard folder")
    _check_numbers(config, "", {"must be finite and not negative": ("data.workers",)})
    every = config.training.validation.every_images
    if every and config.data.validation is None:
        raise ValueError(f"training.validation.every_images={every} needs data.validation; set it to 0, or name a shard folder there")


def to_plain(config: Any) -> Any:
    """A dataclass instance as dicts, lists and scalars that JSON and YAML can hold (infinity becomes the string 'inf')."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {f.name: to_plain(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, dict):
        return {str(key): to_plain(value) for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return [to_plain(value) for value in config]
    if isinstance(config, float) and config in (float("inf"), float("-inf")):
        return str(config)
    return config


def to_yaml(config: RunConfig) -> str:
    """The resolved config as YAML that `load_config` reads back to an equal value."""
    return OmegaConf.to_yaml(OmegaConf.create(to_plain(config)))


def from_plain(kind: type, tree: Any) -> Any:
    """The inverse of `to_plain` for one of this module's dataclasses. Raises ValueError for unknown keys or wrong types."""
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), tree))
    except (OmegaConfBaseException, TypeError) as error:
        raise ValueError(f"{kind.__name__}: {_explain(error)}") from error


def differences(old: Any, new: Any, prefix: str = "") -> Iterable[str]:
    """One line `key: old -> new` for each value in which two plain trees differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(set(old) | set(new)):
            yield from differences(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else key)
    elif old != new:
        yield f"{prefix}: {old!r} -> {new!r}"
