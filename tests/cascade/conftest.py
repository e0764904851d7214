"""A model folder with random weights that do something."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from t2i_experts.cascade.model_folder import save_model
from t2i_experts.cascade.stage import build_network
from t2i_experts.conditioning.conditioner import TextConditioner
from t2i_experts.config import EncoderConfig, NetworkConfig, ResolutionSpec, SamplingConfig, StageConfig


@pytest.fixture(scope="session")
def stage_config(t5_folder: Path, clip_folder: Path) -> StageConfig:
    return StageConfig(
        size=16,
        network=NetworkConfig([ResolutionSpec(8, 1), ResolutionSpec(16, 1, True, True)], 3, 16, 16, 8),
        encoders={
            "t5": EncoderConfig("t5", str(t5_folder), width=16, max_tokens=32),
            "clip_text": EncoderConfig("clip_text", str(clip_folder), width=16, pooled_width=12, max_tokens=24),
            "clip_image": EncoderConfig("clip_image", str(clip_folder), width=12, pooled_width=12, max_tokens=1),
        },
    )


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory, stage_config: StageConfig) -> Path:
    torch.manual_seed(0)
    network = build_network(stage_config)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    folder = tmp_path_factory.mktemp("model") / "tiny"
    conditioner = TextConditioner.from_config(stage_config.encoders)
    save_model(folder, stage_config, SamplingConfig(steps=4, guidance=3.0), network.state_dict(), conditioner)
    return folder
