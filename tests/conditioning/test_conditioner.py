from __future__ import annotations

import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from t2i_experts.conditioning.conditioner import PromptTokenizer, TextConditioner
from t2i_experts.conditioning.frozen import local_folder
from t2i_experts.config import EncoderConfig
from t2i_experts.types import Conditioning, Embedding

PROMPTS = ["a red apple", "  ", "two dogs", "&nbsp;"]


@pytest.fixture(scope="module")
def conditioner(configs: dict[str, EncoderConfig]) -> TextConditioner:
    return TextConditioner.from_config(configs)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def assert_same(a: Embedding, b: Embedding) -> None:
    torch.testing.assert_close(a.tokens, b.tokens, atol=1e-5, rtol=1e-4)
    assert torch.equal(a.mask, b.mask) and (a.pooled is None) == (b.pooled is None)
    if a.pooled is not None and b.pooled is not None:
        torch.testing.assert_close(a.pooled, b.pooled, atol=1e-5, rtol=1e-4)


def assert_equal(a: Conditioning, b: Conditioning) -> None:
    assert list(a.embeddings) == list(b.embeddings)
    for name in a.embeddings:
        assert_same(a.embeddings[name], b.embeddings[name])


def row(e: Embedding, i: int) -> Embedding:
    return Embedding(e.tokens[i : i + 1], e.mask[i : i + 1], None if e.pooled is None else e.pooled[i : i + 1])


def padded_null(like: Embedding) -> Embedding:
    """What a dropped row of such a batch is."""
    return Embedding.null(1, *like.tokens.shape[1:], 0 if like.pooled is None else like.pooled.shape[1])


def test_shapes_widths_and_names(conditioner: TextConditioner, images: torch.Tensor) -> None:
    embeddings = conditioner(PROMPTS, images).embeddings
    assert conditioner.names == list(embeddings) == ["t5", "clip_text", "clip_image"]
    assert [tuple(e.tokens.shape) for e in embeddings.values()] == [(4, 32, 16), (4, 24, 16), (4, 1, 12)]
    assert [None if e.pooled is None else tuple(e.pooled.shape) for e in embeddings.values()] == [None, (4, 12), (4, 12)]
    assert all(e.tokens.dtype == torch.float32 and e.mask.dtype == torch.bool for e in embeddings.values())


def test_blank_prompts_are_null_and_so_are_missing_images(conditioner: TextConditioner, images: torch.Tensor) -> None:
    with_images, without = conditioner(PROMPTS, images), conditioner(PROMPTS)
    null = conditioner.null()
    for name in ("t5", "clip_text"):
        encoded = with_images.embeddings[name]
        assert_same(row(encoded, 1), padded_null(encoded))
        assert encoded.tokens[0].any() and encoded.tokens[2].any()
        assert encoded.tokens[3].any() == (name == "t5")  # which reads an HTML entity as the characters that it has
    assert_same(without.embeddings["clip_image"], conditioner.null(4).embeddings["clip_image"])
    padded = Conditioning.cat([null, conditioner(["", ""]), conditioner(["a red apple"])])
    assert_equal(padded.rows(0, 1), padded.rows(1, 2))
    assert_equal(padded.rows(0, 1), padded.rows(2, 3))


def test_dropping_while_encoding_is_dropping_afterwards(conditioner: TextConditioner, images: torch.Tensor) -> None:
    prompts = ["a red apple", "a green cube", "two dogs", "one"]
    drops = {
        "t5": torch.tensor([True, False, True, False]),
        "clip_text": torch.tensor([True, True, True, True]),
        "clip_image": torch.tensor([False, True, True, False]),
    }
    tokens = conditioner.tokenizer(prompts)
    dropped, whole = conditioner.encode(tokens, images, drops).embeddings, conditioner(prompts, images).embeddings
    for name, drop in drops.items():
        for i in range(4):
            assert_same(row(dropped[name], i), padded_null(whole[name]) if drop[i] else row(whole[name], i))


def test_dropped_rows_are_not_computed(conditioner: TextConditioner, images: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, int] = {}
    for name, encoder in conditioner.encoders.items():

        def encode(inputs: Any, name: str = name, encode: Any = encoder.encode) -> Embedding:
            embedding: Embedding = encode(inputs)
            seen[name] = len(embedding.mask)
            return embedding

        monkeypatch.setattr(encoder, "encode", encode)
    drops = {"t5": torch.tensor([True, False, False, False]), "clip_image": torch.tensor([True, True, True, False])}
    conditioner.encode(conditioner.tokenizer(["a", "", "b", "c"]), images, drops)
    assert seen == {"t5": 2, "clip_text": 3, "clip_image": 1}


def test_the_tokeniser_has_no_weights_and_travels(conditioner: TextConditioner) -> None:
    data = pickle.dumps(conditioner.tokenizer)
    copy, here = pickle.loads(data)(PROMPTS), conditioner.tokenizer(PROMPTS)
    assert list(copy) == ["t5", "clip_text"]
    assert all(torch.equal(copy[name].ids, here[name].ids) and copy[name].spans == here[name].spans for name in here)


def test_the_tokeniser_loads_without_weights(
    conditioner: TextConditioner,
    configs: dict[str, EncoderConfig],
    t5_folder: Path,
    clip_folder: Path,
    tmp_path: Path,
    nasty_prompts: list[str],
) -> None:
    (tmp_path / "t5").mkdir()
    (tmp_path / "clip").mkdir()
    shutil.copy(t5_folder / "spiece.model", tmp_path / "t5")
    for file in ("open_clip_config.json", "merges.txt.gz"):
        shutil.copy(clip_folder / file, tmp_path / "clip")
    bare = {name: replace(config, model=config.kind.split("_")[0]) for name, config in configs.items()}
    loaded = PromptTokenizer.from_config(bare, root=tmp_path)
    whole = conditioner.tokenizer
    assert list(loaded.tokenizers) == list(whole.tokenizers)
    for name, tokens in loaded(nasty_prompts).items():
        assert torch.equal(tokens.ids, whole(nasty_prompts)[name].ids)
        for prompt, length, truncated in zip(nasty_prompts, tokens.mask.sum(dim=1).tolist(), tokens.truncated, strict=True):
            count, most = loaded.tokenizers[name].count(prompt), loaded.tokenizers[name].max_tokens
            assert min(count, most) == length and (count > most or truncated is None)
    text = next(name for name, config in configs.items() if config.kind == "t5")
    with pytest.raises(ValueError, match=f"encoders.{text}: encoder model .* is not a folder"):
        PromptTokenizer.from_config({text: replace(configs[text], model="./absent")})


def test_wrong_inputs_name_what_is_wrong(conditioner: TextConditioner, images: torch.Tensor) -> None:
    tokens = conditioner.tokenizer(PROMPTS)
    with pytest.raises(ValueError, match="one batch size"):
        conditioner.encode(tokens, images[:3])
    with pytest.raises(ValueError, match="3 of them for 4"):
        conditioner(PROMPTS, images[:3])
    with pytest.raises(ValueError, match="style"):
        conditioner.encode(tokens, images, {"style": torch.zeros(4, dtype=torch.bool)})
    with pytest.raises(ValueError, match="must be bool"):
        conditioner.encode(tokens, images, {"t5": torch.zeros(4)})
    with pytest.raises(ValueError, match="'clip_text' are missing"):
        conditioner.encode({"t5": tokens["t5"]}, images)
    with pytest.raises(ValueError, match="uint8"):
        conditioner.encode(tokens, images.to(torch.uint8))


@pytest.mark.parametrize(("name", "field"), [("t5", "width"), ("clip_text", "pooled_width"), ("clip_image", "width")])
def test_a_width_other_than_configured_is_refused(configs: dict[str, EncoderConfig], name: str, field: str) -> None:
    wrong = replace(configs[name], **{field: 999})
    with pytest.raises(ValueError, match=rf"encoders\.{name}\.{field}=999.*has 1[26]"):
        TextConditioner.from_config({name: wrong})


def test_an_encoder_that_fails_to_load_is_named(configs: dict[str, EncoderConfig]) -> None:
    with pytest.raises(ValueError, match=r"encoders\.words: unknown encoder 't6'"):
        TextConditioner.from_config({"words": replace(configs["t5"], kind="t6")})
    with pytest.raises(ValueError, match=r"encoders\.words: .*not a folder"):
        TextConditioner.from_config({"words": replace(configs["t5"], model="./absent")})


def test_saved_encoders_say_the_same_from_the_model_folder(
    conditioner: TextConditioner, configs: dict[str, EncoderConfig], images: torch.Tensor, tmp_path: Path
) -> None:
    saved = conditioner.save(tmp_path)
    assert {name: config.model for name, config in saved.items()} == {"t5": "./t5", "clip_text": "./clip", "clip_image": "./clip"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["clip", "t5"]
    again = TextConditioner.from_config(saved, root=tmp_path)
    assert_equal(again(PROMPTS, images), conditioner(PROMPTS, images))
    assert [again.fingerprint(n) for n in again.names] == [conditioner.fingerprint(n) for n in conditioner.names]
    twice = again.save(tmp_path / "again")  # also from a root that is no working directory
    assert twice == saved and (tmp_path / "again" / "clip" / "merges.txt.gz").is_file()


def test_two_models_of_a_kind_get_folders_of_their_own(configs: dict[str, EncoderConfig], t5_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(t5_folder, tmp_path / "other")
    two = {"first": configs["t5"], "second": replace(configs["t5"], model=str(tmp_path / "other"))}
    saved = TextConditioner.from_config(two).save(tmp_path / "model")
    assert [config.model for config in saved.values()] == ["./t5", "./second"]
    named = TextConditioner.from_config({"x": two["first"], "t5": two["second"]}).save(tmp_path / "named")
    assert [config.model for config in named.values()] == ["./x", "./t5"], "each has its own"


def test_fingerprints_tell_weights_apart_and_ignore_how_they_are_stored(
    conditioner: TextConditioner, configs: dict[str, EncoderConfig]
) -> None:
    marks = [conditioner.fingerprint(name) for name in conditioner.names]
    assert len(set(marks)) == 3 and all(len(mark) == 64 for mark in marks)
    half = TextConditioner.from_config({"t5": replace(configs["t5"], dtype="bfloat16")})
    assert half.fingerprint("t5") != marks[0]
    as_float = half.encoders["t5"].model.float()
    assert TextConditioner({"t5": half.encoders["t5"]}, {"t5": configs["t5"]}).fingerprint("t5") == half.fingerprint("t5")
    assert next(as_float.parameters()).dtype == torch.float32


def test_folders_are_found_in_the_root_first_then_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("root/t5", "here/t5", "here/only"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    assert local_folder("t5", tmp_path / "root") == tmp_path / "root" / "t5"
    assert local_folder("only", tmp_path / "root") == tmp_path / "here" / "only"
    assert local_folder(str(tmp_path / "here"), None) == tmp_path / "here"
    assert local_folder("google/t5-v1_1-xxl", tmp_path) is None
    assert local_folder("./t5", tmp_path / "root") == tmp_path / "root" / "t5"
    assert local_folder("./only", None) == tmp_path / "here" / "only"
    with pytest.raises(ValueError, match=r"'\./only': the model folder .*root is not whole, it lacks only"):
        local_folder("./only", tmp_path / "root")
    for wrong in ("embedded:", "embedded:..", "embedded:absent", "/absent", "../absent"):
        with pytest.raises(ValueError):
            local_folder(wrong, None)
