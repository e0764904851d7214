"""Configs: YAML files read into frozen dataclasses, strictly.

A config file may say `extends: OTHER.yaml` (relative to itself) and then hold only what differs; lists are replaced, not merged.
`key=value` overrides come last. An unknown key, a wrong type and a missing value are errors that name the key.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

MISSING: Any = "???"


@dataclass(frozen=True)
class ResolutionSpec:
    """One resolution of the U-Net, from the image's own downwards; each next one has half the side.

    channels: width of its residual blocks. blocks: residual blocks on the way down (the way up has one more).
    self_attention, cross_attention: whether every block is followed by attention over pixels, and over the text.
    """

    channels: int = MISSING
    blocks: int = MISSING
    self_attention: bool = False
    cross_attention: bool = False


@dataclass(frozen=True)
class NetworkConfig:
    """The U-Net. Dimensions in channels; `head_channels` is the width of one attention head."""

    resolutions: list[ResolutionSpec] = MISSING
    image_channels: int = 3
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
    or `embedded:NAME` for one that ships with this package. pretrained: open_clip's tag for an architecture's public weights.
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
    """AdamW and its learning rate, which is a function of the images seen: a linear warm-up, then constant or a decay to zero."""

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
    """Exponential moving average of the weights: half-life min(halflife_kimg, rampup * images seen), as in EDM."""

    halflife_kimg: float = 500.0
    rampup: float = 0.05


@dataclass(frozen=True)
class PreviewConfig:
    """Pictures of fixed prompts at fixed seeds (i for the i-th prompt), drawn with the EMA weights."""

    prompts: list[str] = field(default_factory=list)
    every_images: int = 0
    steps: int = 25
    guidance: float = 4.0


@dataclass(frozen=True)
class ValidationConfig:
    """Loss on held-out images at fixed noise, in `bins` equally probable ranges of sigma."""

    every_images: int = 0
    images: int = 1024
    bins: int = 8


@dataclass(frozen=True)
class TrainingConfig:
    """A training run. Everything that counts, counts images seen; batch_size is over all processes and accumulation steps.

    Seconds of wall time are bounded by `max_minutes` (0: not at all): the run then checkpoints and stops, and the same command goes on.
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
        raise ValueError(f"{path} is not valid YAML: {error}") from error
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
    for override in overrides:
        if "=" not in override:
            raise ValueError(f"override {override!r} is not of the form key=value")
    return build_config(_read(Path(path)), overrides, source=str(path))


def build_config(tree: DictConfig | dict[str, Any], overrides: Sequence[str] = (), *, source: str = "config") -> RunConfig:
    """The frozen dataclasses for a tree of plain values; see `load_config`."""
    try:
        merged = OmegaConf.merge(OmegaConf.structured(RunConfig), tree, OmegaConf.from_dotlist(list(overrides)))
        config = OmegaConf.to_object(merged)
    except (OmegaConfBaseException, TypeError) as error:
        message = str(error).split("\n")[0]
        key = getattr(error, "full_key", None)
        raise ValueError(f"{source}: {f'{key}: ' if key and key not in message else ''}{message}") from error
    assert isinstance(config, RunConfig)
    _check(config)
    return config


def _check(config: RunConfig) -> None:
    """Rules that hold between values. Each error names the key, what it received and what is allowed."""
    stage, training = config.stage, config.training
    if not stage.network.resolutions:
        raise ValueError("stage.network.resolutions is empty; the U-Net needs at least one resolution")
    factor = 2 ** (len(stage.network.resolutions) - 1)
    if stage.size % factor:
        raise ValueError(f"stage.size={stage.size} must be a multiple of {factor} for {len(stage.network.resolutions)} resolutions")
    for i, spec in enumerate(stage.network.resolutions):
        if (spec.self_attention or spec.cross_attention) and spec.channels % stage.network.head_channels:
            raise ValueError(
                f"stage.network.resolutions[{i}].channels={spec.channels} must be a multiple of head_channels={stage.network.head_channels}"
            )
    if not stage.encoders:
        raise ValueError("stage.encoders is empty; at least one encoder must condition the model")
    for name, encoder in stage.encoders.items():
        if not 0 <= encoder.drop < 1:
            raise ValueError(f"stage.encoders.{name}.drop={encoder.drop} must lie in [0, 1)")
    positive: dict[str, float] = {
        "training.images": training.images,
        "training.batch_size": training.batch_size,
        "training.accumulation": training.accumulation,
        "training.checkpoint_every_images": training.checkpoint_every_images,
        "training.log_every_images": training.log_every_images,
        "training.keep_checkpoints": training.keep_checkpoints,
        "training.validation.bins": training.validation.bins,
        "stage.noise.std": stage.noise.std,
        "stage.noise.sigma_data": stage.noise.sigma_data,
    }
    for key, value in positive.items():
        if value <= 0:
            raise ValueError(f"{key}={value} must be positive")
    if training.batch_size % training.accumulation:
        raise ValueError(f"training.batch_size={training.batch_size} must be a multiple of training.accumulation={training.accumulation}")
    if not 0 <= config.sampling.threshold < 1:
        raise ValueError(f"sampling.threshold={config.sampling.threshold} must lie in [0, 1); 0 means no dynamic thresholding")
    if not config.data.train:
        raise ValueError("data.train is empty; name at least one shard folder")


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
        raise ValueError(f"{kind.__name__}: {str(error).splitlines()[0]}") from error


def fingerprint(config: Any) -> str:
    """Sixteen hex digits that two configs share exactly if all their values are equal."""
    return hashlib.sha256(json.dumps(to_plain(config), sort_keys=True).encode()).hexdigest()[:16]


def differences(old: Any, new: Any, prefix: str = "") -> Iterable[str]:
    """One line `key: old -> new` for each value in which two plain trees differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(set(old) | set(new)):
            yield from differences(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else key)
    elif old != new:
        yield f"{prefix}: {old!r} -> {new!r}"
