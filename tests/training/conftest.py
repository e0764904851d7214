"""A run that takes seconds: little coloured pictures, random encoders, a U-Net of a few thousand parameters."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from t2i_experts.shards.writer import ShardWriter

NETWORK = """
    resolutions:
      - {channels: 8, blocks: 1}
      - {channels: 16, blocks: 1, self_attention: true, cross_attention: true}
    embedding_channels: 16
    context_channels: 16
    head_channels: 8
"""


def write_shards(folder: Path, count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    with ShardWriter(folder, samples_per_shard=16) as writer:
        for i in range(count):
            pixels = np.full((16, 16, 3), rng.integers(0, 256, 3), dtype=np.uint8)
            data = io.BytesIO()
            Image.fromarray(pixels).save(data, "PNG")
            writer.write(f"{i:06d}", data.getvalue(), "png", [f"a red cube {i}", f"picture {i}"], {})


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("shards")
    write_shards(root / "train", 40, seed=0)
    write_shards(root / "validation", 8, seed=1)
    return root


@pytest.fixture
def write_config(tmp_path: Path, shards: Path, t5_folder: Path, clip_folder: Path) -> Callable[[str], Path]:
    """Writes the config of a run with the given name, whose output is tmp_path / name."""

    def write(name: str) -> Path:
        path = tmp_path / f"{name}.yaml"
        path.write_text(
            f"""
output: {tmp_path / name}
stage:
  size: 16
  network: {NETWORK}
  encoders:
    t5: {{kind: t5, model: {t5_folder}, width: 16, max_tokens: 32, drop: 0.2}}
    clip_text: {{kind: clip_text, model: {clip_folder}, width: 16, pooled_width: 12, max_tokens: 24, drop: 0.2}}
    clip_image: {{kind: clip_image, model: {clip_folder}, width: 12, pooled_width: 12, max_tokens: 1, drop: 0.5}}
data: {{train: [{shards / "train"}], validation: {shards / "validation"}, workers: 0}}
training:
  images: 64
  batch_size: 8
  device: cpu
  checkpoint_every_images: 16
  log_every_images: 16
  optimizer: {{learning_rate: 1.0e-2}}
  ema: {{halflife_kimg: 0.02}}
  preview: {{prompts: [a red cube, dogs], every_images: 64, steps: 2, guidance: 2.0}}
  validation: {{every_images: 32, images: 8, bins: 2}}
sampling: {{steps: 3, guidance: 2.0}}
""",
            encoding="utf-8",
        )
        return path

    return write
