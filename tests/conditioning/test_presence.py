"""Encoders are found where loading would look, and otherwise the user reads how to get them; the network is never asked."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import constants

from t2i_experts.conditioning.presence import find_encoder, hub_cache
from t2i_experts.config import EncoderConfig


def put(cache: Path, repository: str, **files: int) -> Path:
    """Files of so many bytes, as the hub's cache keeps them."""
    root = cache / f"models--{repository.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text("0123")
    snapshot = root / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    for name, length in files.items():
        (snapshot / name.replace("__", ".")).write_bytes(b"x" * length)
    return snapshot


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HOME", str(tmp_path))
    return hub_cache()


def test_local_folders_are_found_and_a_missing_file_is_named(t5_folder: Path, clip_folder: Path, tmp_path: Path) -> None:
    t5, clip = find_encoder(EncoderConfig("t5", str(t5_folder))), find_encoder(EncoderConfig("clip_image", str(clip_folder)))
    assert (t5.place, t5.local, t5.remedy) == (t5_folder.resolve(), True, "")
    assert t5.bytes == (t5_folder / "model.safetensors").stat().st_size
    assert clip.bytes == (clip_folder / "open_clip_model.safetensors").stat().st_size
    (tmp_path / "config.json").write_text("{}")
    half = find_encoder(EncoderConfig("t5", str(tmp_path)))
    assert half.place is None
    assert f"{tmp_path} lacks spiece.model and model.safetensors" in half.remedy
    assert "is not a folder" in find_encoder(EncoderConfig("t5", str(tmp_path / "none"))).remedy
    assert "does not ship" in find_encoder(EncoderConfig("t5", "embedded:t6")).remedy


def test_embedded_encoders_are_found() -> None:
    assert find_encoder(EncoderConfig("t5", "embedded:t5")).bytes > 10**6
    assert find_encoder(EncoderConfig("clip_text", "embedded:clip")).bytes > 10**6


def test_a_hub_id_is_looked_for_in_the_cache(cache: Path) -> None:
    config = EncoderConfig("t5", "google/t5-v1_1-xxl")
    assert find_encoder(config).remedy.startswith("hf download google/t5-v1_1-xxl --include")
    snapshot = put(cache, config.model, config__json=2, model__safetensors=1000)
    assert "hf download" in find_encoder(config).remedy  # there is no vocabulary yet
    (snapshot / "spiece.model").write_bytes(b"x")
    found = find_encoder(config)
    assert (found.place, found.bytes, found.local, found.remedy) == (snapshot, 1000, False, "")


def test_open_clips_public_weights(cache: Path) -> None:
    config = EncoderConfig("clip_text", "ViT-L-14", pretrained="openai")
    repository = "timm/vit_large_patch14_clip_224.openai"
    assert find_encoder(config).remedy.startswith(f"hf download {repository} open_clip_model.safetensors")
    snapshot = put(cache, repository, open_clip_model__safetensors=500)
    found = find_encoder(config)
    assert (found.place, found.bytes) == (snapshot / "open_clip_model.safetensors", 500)
    assert "openai" in find_encoder(EncoderConfig("clip_text", "ViT-L-14", pretrained="closedai")).remedy
    assert "no such architecture" in find_encoder(EncoderConfig("clip_text", "data/clip", pretrained="openai")).remedy


def test_only_a_plugin_knows_its_own_encoders() -> None:
    assert not find_encoder(EncoderConfig("somebodys", "model")).known
