"""Configs: `schema` says what there is to say, `rules` what is allowed, `files` how it is read and written."""

from __future__ import annotations

from t2i_experts.config.files import build_config, differences, from_plain, load_config, to_plain, to_yaml
from t2i_experts.config.rules import check_sampling, check_stage, check_stage_name
from t2i_experts.config.schema import (
    DataConfig,
    EMAConfig,
    EncoderConfig,
    NetworkConfig,
    NoiseConfig,
    OptimizerConfig,
    PreviewConfig,
    ResolutionSpec,
    RunConfig,
    SamplingConfig,
    StageConfig,
    TrainingConfig,
    ValidationConfig,
)

__all__ = [
    "DataConfig",
    "EMAConfig",
    "EncoderConfig",
    "NetworkConfig",
    "NoiseConfig",
    "OptimizerConfig",
    "PreviewConfig",
    "ResolutionSpec",
    "RunConfig",
    "SamplingConfig",
    "StageConfig",
    "TrainingConfig",
    "ValidationConfig",
    "build_config",
    "check_sampling",
    "check_stage",
    "check_stage_name",
    "differences",
    "from_plain",
    "load_config",
    "to_plain",
    "to_yaml",
]
