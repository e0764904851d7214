"""Tiny random encoders on disk, as `load` reads them, made once for all tests of this folder."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path

import open_clip
import pytest
import sentencepiece
import torch
from safetensors.torch import save_file
from transformers import T5Config, T5EncoderModel

from t2i_experts.config import EncoderConfig

CAPTIONS = [
    f"a {colour} {shape} on the {side} of {n} dogs & cafés"
    for colour in ("red", "green")
    for shape in ("apple", "cube")
    for side in ("left", "right")
    for n in range(9)
]
NASTY = [
    "",
    " ",
    "\t\n",
    "a red apple",
    "  A   Red\n\tAPPLE  ",
    "fish &amp; chips &lt;3 &amp;lt;b&amp;gt; &#233; &eacute;",
    "a < b &lt; c &amp; d",
    "“curly” ‘quotes’ and ﬁne ﬂuff",
    "İstanbul ΟΔΟΣ Straße",
    "cafe\u0301 na\u0308ive",
    "âœ” No problems, schÃ¶n",
    "日本語の猫 and 猫",
    "한국어 ㄱㅏ",
    "👩‍👩‍👧 family 🏳️‍🌈 👍🏽",
    "ｆｕｌｌ ｗｉｄｔｈ ㍿ ½",
    "</s> <extra_id_0> <pad> <unk>",
    "before <end_of_text> after <start_of_text> <END_OF_TEXT>",
    "\u200bzero\u200bwidth\ufeff",
    "nul\x00 bell\x07 \x1b[31mred\x1b[0m",
    "half \ud83d surrogate",
    "line\r\nbreak\u2028other",
    "don't we'll I'm it's 1234 !!!???",
    "مرحبا بالعالم שלום",
    "▁ underscore▁",
    "&" * 40 + ";" * 40,
    "word " * 600 + "&amp; “end”",
]


def write_t5(folder: Path, *, width: int = 16, seed: int = 0) -> Path:
    """A random T5 encoder with a vocabulary that falls back to bytes."""
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


@pytest.fixture(scope="session")
def configs(t5_folder: Path, clip_folder: Path) -> dict[str, EncoderConfig]:
    return {
        "t5": EncoderConfig("t5", str(t5_folder), width=16, max_tokens=32),
        "clip_text": EncoderConfig("clip_text", str(clip_folder), width=16, pooled_width=12, max_tokens=24),
        "clip_image": EncoderConfig("clip_image", str(clip_folder), width=12, pooled_width=12),
    }


@pytest.fixture(params=NASTY, ids=range(len(NASTY)))
def nasty(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def nasty_prompts() -> list[str]:
    return list(NASTY)
