"""Stored embeddings take the place of running encoders: the conditioning is the same, up to the rounding to bfloat16."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from t2i_experts.conditioning.conditioner import TextConditioner
from t2i_experts.conditioning.stored import StoredTextEncoder, text_encoders, text_features
from t2i_experts.config import EncoderConfig
from t2i_experts.types import Conditioning, FeatureBatch, Tokens

CAPTIONS = ["a red cube", "", "word " * 60, "\u200b", "a", "dogs & cafés"]


@pytest.fixture(scope="module")
def online(configs: dict[str, EncoderConfig]) -> TextConditioner:
    return TextConditioner.from_config(configs)


@pytest.fixture(scope="module")
def stored(configs: dict[str, EncoderConfig], online: TextConditioner) -> TextConditioner:
    encoders = {
        name: StoredTextEncoder(config, "cpu") if name in text_encoders(configs) else online.encoders[name]
        for name, config in configs.items()
    }
    return TextConditioner(encoders, configs)


def batch_of(online: TextConditioner, captions: list[str]) -> dict[str, FeatureBatch]:
    text = TextConditioner({n: e for n, e in online.encoders.items() if e.reads == "text"}, online._configs)
    return {name: FeatureBatch.of(features) for name, features in text_features(text, captions, batch_size=2).items()}


def assert_same(found: Conditioning, expected: Conditioning) -> None:
    assert list(found.embeddings) == list(expected.embeddings)
    for name, wanted in expected.embeddings.items():
        embedding = found.embeddings[name]
        assert torch.equal(embedding.mask, wanted.mask), name
        assert embedding.tokens.dtype == wanted.tokens.dtype and embedding.tokens.shape == wanted.tokens.shape
        torch.testing.assert_close(embedding.tokens, wanted.tokens, rtol=2**-8, atol=1e-5, msg=name)
        assert (embedding.pooled is None) == (wanted.pooled is None)
        if wanted.pooled is not None:
            torch.testing.assert_close(embedding.pooled, wanted.pooled, rtol=2**-8, atol=1e-5, msg=name)


def test_every_caption_and_every_pattern_of_drops(online: TextConditioner, stored: TextConditioner, nasty_prompts: list[str]) -> None:
    captions = CAPTIONS + nasty_prompts
    torch.manual_seed(1)
    images = torch.rand(len(captions), 3, 40, 32) * 2 - 1
    tokens: Mapping[str, Tokens] = online.tokenizer(captions)
    features = batch_of(online, captions)
    assert all(torch.equal(features[name].blank, tokens[name].blank) and tokens[name].blank.any() for name in features)
    none, every = torch.zeros(len(captions), dtype=torch.bool), torch.ones(len(captions), dtype=torch.bool)
    for pattern in (none, every, torch.rand(len(captions)) < 0.5):
        drops: dict[str, Tensor] = {"t5": pattern, "clip_text": ~pattern if pattern.any() else none, "clip_image": pattern}
        assert_same(stored.encode(features, images, drops), online.encode(tokens, images, drops))
    assert_same(stored.null(3), online.null(3))


def test_only_real_tokens_are_kept_at_any_batch_size(online: TextConditioner) -> None:
    text = TextConditioner({n: e for n, e in online.encoders.items() if e.reads == "text"}, online._configs)
    one, many = (text_features(text, CAPTIONS, batch_size=n) for n in (1, 100))
    for name, tokens in online.tokenizer(CAPTIONS).items():
        real = tokens.mask.sum(dim=1).masked_fill(tokens.blank, 0).tolist()
        assert [len(f.tokens) for f in one[name]] == real == [len(f.tokens) for f in many[name]]
        assert max(real) == online.encoders[name].max_tokens
        for a, b in zip(one[name], many[name], strict=True):
            assert a.tokens.dtype == torch.bfloat16
            torch.testing.assert_close(a.tokens, b.tokens, rtol=2**-7, atol=1e-4)


def test_padding_before_the_end_cannot_be_stored(online: TextConditioner, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = online.encoders["t5"]
    original = encoder.encode

    def left_padded(tokens: Tokens) -> Any:
        embedding = original(tokens)
        return replace(embedding, tokens=embedding.tokens.flip(1), mask=embedding.mask.flip(1))

    monkeypatch.setattr(encoder, "encode", left_padded)
    with pytest.raises(ValueError, match=r"encoders\.t5: its padding"):
        text_features(TextConditioner({"t5": encoder}, online._configs), ["a"], 1)


def test_without_the_encoder_its_files_are_saved_and_known_captions_answered(configs: dict[str, EncoderConfig], tmp_path: Path) -> None:
    texts = text_encoders(configs)
    loaded = TextConditioner.from_config(texts)
    expected = loaded(CAPTIONS)
    remembered = text_features(loaded, CAPTIONS, batch_size=4)
    encoders = {
        name: StoredTextEncoder(texts[name], "cpu", dict(zip(CAPTIONS, remembered[name], strict=True)), encoder)
        for name, encoder in loaded.encoders.items()
    }
    assert all(parameter.is_meta for encoder in loaded.encoders.values() for parameter in encoder.model.parameters())
    stored = TextConditioner(encoders, texts, fingerprints={"t5": "known"})
    assert_same(stored(CAPTIONS), expected)
    assert stored.fingerprint("t5") == "known"
    with pytest.raises(ValueError, match="'never seen'"):
        stored(["a", "never seen"])
    again = TextConditioner.from_config(stored.save(tmp_path), root=tmp_path)
    assert_same(again(CAPTIONS), expected)
    pickle.dumps(stored.tokenizer)
