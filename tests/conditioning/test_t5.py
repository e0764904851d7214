from __future__ import annotations

import io
import pickle
import shutil
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unicodedata import normalize

import pytest
import torch
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceTrainer
from transformers import T5EncoderModel, T5Tokenizer

from t2i_experts.conditioning.t5 import T5Encoder, additive
from t2i_experts.conditioning.t5 import T5Tokenizer as Tokenizer
from t2i_experts.config import EncoderConfig
from t2i_experts.types import Tokens


@pytest.fixture(scope="module")
def encoder(configs: dict[str, EncoderConfig]) -> T5Encoder:
    return T5Encoder.load(configs["t5"], None, "cpu")


@pytest.fixture(scope="module")
def tokenizer(t5_folder: Path) -> Tokenizer:
    return Tokenizer((t5_folder / "spiece.model").read_bytes(), 5000)


def test_ids_are_those_of_transformers_tokeniser(tokenizer: Tokenizer) -> None:
    pieces = tokenizer.pieces
    reference = T5Tokenizer(vocab=[(pieces.id_to_piece(i), pieces.get_score(i)) for i in range(pieces.get_piece_size())])
    for prompt in ("a red apple", "  the   green\tcube on the left ", "a red cube on the right of 7 apples", ""):
        tokens = tokenizer.tokenize([prompt])
        assert tokens.ids[tokens.mask].tolist() == reference(prompt)["input_ids"]


def test_spans_hold_what_the_tokens_spell(tokenizer: Tokenizer, nasty: str) -> None:
    tokens = tokenizer.tokenize([nasty])
    ids, spans = tokens.ids[0][tokens.mask[0]].tolist(), tokens.spans[0]
    assert len(ids) == len(spans) and ids[-1] == 1 and spans[-1][0] == spans[-1][1]
    assert tokens.truncated == (None,)
    for token, (start, end) in zip(ids[:-1], spans, strict=False):
        piece, surface = tokenizer.pieces.id_to_piece(token), nasty[start:end]
        assert surface == surface.strip() and 0 <= start <= end <= len(nasty)
        if tokenizer.pieces.is_byte(token):
            assert int(piece[1:-1], 16) in (normalize("NFKC", surface) + surface + "\ufffd").encode(errors="replace")
            assert start < end
        else:
            assert piece.strip("▁") in normalize("NFKC", surface)
            assert (start == end) == (piece == "▁")
    assert sorted(spans) == list(spans)


def test_count_is_the_length_before_the_cut(tokenizer: Tokenizer, t5_folder: Path, nasty: str) -> None:
    whole = tokenizer.tokenize([nasty])
    assert tokenizer.count(nasty) == int(whole.mask.sum())
    exact, short = (Tokenizer((t5_folder / "spiece.model").read_bytes(), tokenizer.count("a red apple") - cut) for cut in (0, 1))
    assert exact.tokenize(["a red apple"]).truncated == (None,) and short.tokenize(["a red apple"]).truncated != (None,)


def test_what_looks_like_a_special_token_is_plain_text(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.tokenize(["a </s> b <pad> <extra_id_0>"])
    assert tokens.ids[0][tokens.mask[0]].tolist()[:-1].count(1) == 0
    assert 2 not in tokens.ids and tokens.ids.max() < tokenizer.pieces.get_piece_size()


def test_long_prompts_keep_their_end_token_and_say_where_reading_stopped(t5_folder: Path) -> None:
    tokenizer = Tokenizer((t5_folder / "spiece.model").read_bytes(), 16)
    prompt = "a red apple on the left " * 1000
    tokens = tokenizer.tokenize([prompt, "a red"])
    assert tokens.mask[0].all() and tokens.ids[0, -1] == 1
    stop = tokens.truncated[0]
    assert stop is not None and tokens.truncated[1] is None
    assert max(end for _, end in tokens.spans[0]) <= stop
    assert prompt[max(end for _, end in tokens.spans[0]) : stop].strip() == ""
    assert tokenizer.tokenize(["猫" * 30]).truncated[0] is not None
    exact = tokenizer.tokenize([prompt[:stop]])
    read = exact.ids[exact.mask].tolist()[:-1]  # a bare word boundary at the very end says nothing
    assert tokens.ids[0].tolist()[: len(read)] == read and len(read) >= 14 and exact.truncated == (None,)


def test_the_tokeniser_travels_to_another_process(tokenizer: Tokenizer) -> None:
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert torch.equal(copy.tokenize(["a red cat 猫"]).ids, tokenizer.tokenize(["a red cat 猫"]).ids)


def test_features_are_transformers_own(encoder: T5Encoder, t5_folder: Path) -> None:
    tokens = encoder.tokenizer.tokenize(["a red apple"])
    real = tokens.ids[tokens.mask][None]
    with torch.no_grad():
        expected = T5EncoderModel.from_pretrained(t5_folder)(input_ids=real).last_hidden_state
    embedding = encoder.encode(tokens)
    assert embedding.tokens.shape == (1, 32, 16) and embedding.pooled is None
    torch.testing.assert_close(embedding.tokens[:, : real.shape[1]], expected)
    assert torch.equal(embedding.mask, tokens.mask) and not embedding.tokens[~embedding.mask].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_mask_of_four_dimensions_is_transformers_own(encoder: T5Encoder, t5_folder: Path, dtype: torch.dtype) -> None:
    model = T5EncoderModel.from_pretrained(t5_folder, dtype=dtype).eval()
    tokens = encoder.tokenizer.tokenize(["a red apple", "one", "of 3 dogs on the left of a cube"])
    with torch.no_grad():
        expected = model(input_ids=tokens.ids, attention_mask=tokens.mask.long()).last_hidden_state
        ours = model(input_ids=tokens.ids, attention_mask=additive(tokens.mask, dtype)).last_hidden_state
    torch.testing.assert_close(ours[tokens.mask], expected[tokens.mask])


def test_the_network_runs_without_waiting_for_the_device(
    encoder: T5Encoder, monkeypatch: pytest.MonkeyPatch, no_sync: AbstractContextManager[Any]
) -> None:
    """The longest prompt's length is read on the CPU; after that no value decides what is computed."""
    forward = encoder.model.forward

    def watched(*args: Any, **kwargs: Any) -> Any:
        with no_sync:
            return forward(*args, **kwargs)

    monkeypatch.setattr(encoder.model, "forward", watched)
    with pytest.raises(AssertionError, match="waits for the device"):
        encoder.model(input_ids=torch.ones(2, 3, dtype=torch.int64), attention_mask=torch.ones(2, 3, dtype=torch.int64))
    encoder.encode(encoder.tokenizer.tokenize(["a red apple", "one"]))


def test_features_do_not_depend_on_padding_or_neighbours(encoder: T5Encoder, nasty_prompts: list[str]) -> None:
    together = encoder.encode(encoder.tokenizer.tokenize(nasty_prompts))
    for row, prompt in enumerate(nasty_prompts[:8]):
        alone = encoder.encode(encoder.tokenizer.tokenize([prompt]))
        torch.testing.assert_close(together.tokens[row], alone.tokens[0], atol=1e-5, rtol=1e-4)
    tokens = encoder.tokenizer.tokenize(["a red apple"])
    garbage = Tokens(tokens.ids + 7 * ~tokens.mask, tokens.mask, tokens.blank, tokens.spans, tokens.truncated)
    torch.testing.assert_close(encoder.encode(garbage).tokens, encoder.encode(tokens).tokens)


def test_bfloat16_is_finite_and_close_and_comes_back_as_float32(encoder: T5Encoder, configs: dict[str, EncoderConfig]) -> None:
    half = T5Encoder.load(replace(configs["t5"], dtype="bfloat16"), None, "cpu")
    assert {p.dtype for p in half.model.parameters()} == {torch.bfloat16}
    tokens = encoder.tokenizer.tokenize(["a red apple", "of 3 dogs"])
    embedding = half.encode(tokens).tokens
    assert embedding.dtype == torch.float32 and embedding.isfinite().all()
    torch.testing.assert_close(embedding, encoder.encode(tokens).tokens, atol=0.1, rtol=0.1)


def test_a_callers_autocast_and_gradients_do_not_reach_it(encoder: T5Encoder) -> None:
    tokens = encoder.tokenizer.tokenize(["a red apple"])
    with torch.autocast("cpu", torch.bfloat16):
        embedding = encoder.encode(tokens).tokens
    assert torch.equal(embedding, encoder.encode(tokens).tokens)
    assert not embedding.requires_grad and not embedding.is_inference() and not encoder.model.training
    assert not any(p.requires_grad for p in encoder.model.parameters())


def test_float16_is_refused(encoder: T5Encoder, configs: dict[str, EncoderConfig]) -> None:
    with pytest.raises(ValueError, match="float16"):
        T5Encoder.load(replace(configs["t5"], dtype="float16"), None, "cpu")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="float16"):
        T5Encoder(T5EncoderModel(encoder.model.config).half(), encoder.tokenizer)


def test_incomplete_folders_are_refused(configs: dict[str, EncoderConfig], t5_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a folder"):
        T5Encoder.load(replace(configs["t5"], model="./absent"), None, "cpu")
    with pytest.raises(ValueError, match="does not ship"):
        T5Encoder.load(replace(configs["t5"], model="embedded:absent"), None, "cpu")
    shutil.copytree(t5_folder, tmp_path / "t5")
    (tmp_path / "t5" / "spiece.model").unlink()
    with pytest.raises(ValueError, match="not a complete T5 folder"):
        T5Encoder.load(replace(configs["t5"], model="t5"), tmp_path, "cpu")
    shutil.copy(t5_folder / "spiece.model", tmp_path / "t5")
    weights = load_file(tmp_path / "t5" / "model.safetensors")
    del weights["encoder.block.1.layer.0.SelfAttention.q.weight"]
    save_file(weights, tmp_path / "t5" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks the weights"):
        T5Encoder.load(replace(configs["t5"], model="t5"), tmp_path, "cpu")
    with pytest.raises(ValueError, match="pretrained"):
        T5Encoder.load(replace(configs["t5"], pretrained="openai"), None, "cpu")


def test_characters_that_the_vocabulary_lacks(tokenizer: Tokenizer) -> None:
    """The same are named whether they become single bytes or, as in T5's own vocabulary, <unk>."""
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(["a red apple on the left of a table"] * 9), model_writer=model, vocab_size=24, hard_vocab_limit=False,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    for found in (tokenizer, Tokenizer(model.getvalue(), 16)):
        assert found.unknown("a red apple") == found.unknown("") == found.unknown(" \n") == ""
        assert found.unknown("猫 a 红苹果 red 🍎 猫") == "猫红苹果🍎"
        assert found.unknown("ａ") == "", "a wide letter is the letter to T5"
