"""For all tests: one thread a process, no network, `gpu` tests only where there is CUDA, and tiny random encoders on disk."""

from __future__ import annotations

import gzip
import io
import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; the processes that tests start inherit it
os.environ["HF_HUB_OFFLINE"] = "1"

LOCAL = ("127.", "::1", "localhost", "0.0.0.0")


@pytest.fixture(autouse=True, scope="session")
def _no_network() -> Any:
    """Refuses connections to other machines; processes on this one may still talk to each other."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and not str(address[0]).startswith(LOCAL):
            raise AssertionError(f"a test tried to reach {address}: tests must not use the network")
        connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded)
        yield


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs CUDA")


CAPTIONS = [
    f"a {colour} {shape} on the {side} of {n} dogs & cafés"
    for colour in ("red", "green")
    for shape in ("apple", "cube")
    for side in ("left", "right")
    for n in range(9)
]


def write_t5(folder: Path, *, width: int = 16, seed: int = 0) -> Path:
    """A random T5 encoder with a vocabulary that falls back to bytes."""
    import sentencepiece
    import torch
    from transformers import T5Config, T5EncoderModel

    folder.mkdir(parents=True)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CAPTIONS), model_writer=model, vocab_size=330, model_type="unigram", byte_fallback=True,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    (folder / "spiece.model").write_bytes(model.getvalue())
    torch.manual_seed(seed)
    config = T5Config(vocab_size=448, d_model=width, d_kv=8, d_ff=32, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu")
    T5EncoderModel(config).save_pretrained(folder)
    return folder


def write_clip(folder: Path, *, merges: list[str] | None = None, seed: int = 0) -> Path:
    """A random open_clip model; with `merges`, it brings its own small vocabulary."""
    import open_clip
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    text = {"context_length": 24, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}
    if merges is not None:
        (folder / "merges.txt.gz").write_bytes(gzip.compress("\n".join(["#", *merges]).encode(), mtime=0))
        text |= {"vocab_size": 512 + len(merges) + 2, "tokenizer_kwargs": {"bpe_path": "merges.txt.gz"}}
    vision = {"image_size": 32, "patch_size": 8, "width": 16, "head_width": 8, "layers": 2}
    model_config = {"embed_dim": 12, "vision_cfg": vision, "text_cfg": text}
    torch.manual_seed(seed)
    model = open_clip.model.CLIP(**model_config)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    preprocess = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.25]}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model_config, "preprocess_cfg": preprocess}))
    return folder


@pytest.fixture(scope="session")
def t5_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_t5(tmp_path_factory.mktemp("t5") / "model")


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip") / "model", merges=["r e", "re d</w>", "a p", "ap p", "app l", "appl e</w>"])
