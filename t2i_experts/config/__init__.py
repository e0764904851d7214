"""Configs: `schema` says what there is to say, `rules` and `keys` what is allowed, `files` how it is read and written, `origins` where a
value comes from, `shipped` what ships."""

from __future__ import annotations

from t2i_experts.config.files import (
    build_config,
    changes,
    differences,
    from_plain,
    load_config,
    read_files,
    to_plain,
    to_yaml,
    trace_config,
)
from t2i_experts.config.origins import Setting
from t2i_experts.config.rules import check_sampling, check_stage, check_stage_name, is_url
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
from t2i_experts.config.shipped import shipped_configs, shipped_folder

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
    "Setting",
    "StageConfig",
    "TrainingConfig",
    "ValidationConfig",
    "build_config",
    "changes",
    "check_sampling",
    "check_stage",
    "check_stage_name",
    "differences",
    "from_plain",
    "is_url",
    "load_config",
    "read_files",
    "shipped_configs",
    "shipped_folder",
    "to_plain",
    "to_yaml",
    "trace_config",
]
