"""Configs: `schema` says what there is to say, `rules` and `keys` what is allowed, `files` how it is read and written, `origins` where a
value comes from, `shipped` what ships. `files` is imported on first use: OmegaConf takes longer than all that a wrong option needs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from t2i_experts.config.expert_rules import check_node_name, check_ratio
from t2i_experts.config.origins import Setting
from t2i_experts.config.rules import check_sampling, check_stage, check_stage_name, check_threshold, is_url
from t2i_experts.config.schema import (
    BlendConfig,
    CodecConfig,
    DataConfig,
    DecoupleConfig,
    EMAConfig,
    EncoderConfig,
    ExpertSamplingConfig,
    ExpertsConfig,
    NetworkConfig,
    NodeConfig,
    NoiseConfig,
    OptimizerConfig,
    PreviewConfig,
    RatioConfig,
    ResolutionSpec,
    RunConfig,
    SamplingConfig,
    StageConfig,
    TrainingConfig,
    ValidationConfig,
)
from t2i_experts.config.shipped import shipped_configs, shipped_folder

if TYPE_CHECKING:
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

__all__ = [
    "BlendConfig",
    "CodecConfig",
    "DataConfig",
    "DecoupleConfig",
    "EMAConfig",
    "EncoderConfig",
    "ExpertSamplingConfig",
    "ExpertsConfig",
    "NetworkConfig",
    "NodeConfig",
    "NoiseConfig",
    "OptimizerConfig",
    "PreviewConfig",
    "RatioConfig",
    "ResolutionSpec",
    "RunConfig",
    "SamplingConfig",
    "Setting",
    "StageConfig",
    "TrainingConfig",
    "ValidationConfig",
    "build_config",
    "changes",
    "check_node_name",
    "check_ratio",
    "check_sampling",
    "check_stage",
    "check_stage_name",
    "check_threshold",
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


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from t2i_experts.config import files

    return getattr(files, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
