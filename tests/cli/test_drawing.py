"""What the commands that draw have in common."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from t2i_experts.cli.drawing import pipeline_settings
from t2i_experts.config import CodecConfig, SamplingConfig


def test_latents_are_not_thresholded() -> None:
    """A command's --threshold is checked against the model that it opens, and named as the option that it is."""

    def pipeline(kind: str) -> Any:
        stage = SimpleNamespace(config=SimpleNamespace(codec=CodecConfig(kind=kind, model="vae", channels=4, factor=8)))
        stage.leaves = {}
        return SimpleNamespace(settings=lambda **given: SamplingConfig(**given), base=stage)

    with pytest.raises(ValueError, match=r"--threshold=0.9 .*latents"):
        pipeline_settings(pipeline("autoencoder_kl"), {"threshold": 0.9})
    assert pipeline_settings(pipeline("pixel"), {"threshold": 0.9}).threshold == 0.9
