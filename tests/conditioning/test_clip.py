from __future__ import annotations

import pickle
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer
from PIL import Image

from t2i_experts.conditioning.clip import CLIPImageEncoder, CLIPTextEncoder, CLIPTokenizer, Towers
from t2i_experts.config import EncoderConfig
from t2i_experts.types import Tokens


@pytest.fixture(scope="module")
def text(configs: dict[str, EncoderConfig]) -> CLIPTextEncoder:
    return CLIPTextEncoder.load(configs["clip_text"], None, "cpu")


@pytest.fixture(scope="module")
def image(configs: dict[str, EncoderConfig]) -> CLIPImageEncoder:
    return CLIPImageEncoder.load(configs["clip_image"], None, "cpu")


@pytest.fixture(scope="module")
def reference(clip_folder: Path) -> torch.nn.Module:
    return open_clip.create_model(f"local-dir:{clip_folder}", require_pretrained=True).eval()


@pytest.mark.parametrize("length", [77, 8, 4000])
def test_ids_are_open_clips_own(nasty: str, length: int, clip_folder: Path) -> None:
    for bpe in (SimpleTokenizer(), SimpleTokenizer(bpe_path=str(clip_folder / "merges.txt.gz"))):
        tokens = CLIPTokenizer(bpe, length).tokenize([nasty])
        assert torch.equal(tokens.ids, bpe([nasty], context_length=length))
        assert tokens.mask[0].sum() == min(length, len(bpe.encode(nasty)) + 2) == len(tokens.spans[0])
        assert (tokens.truncated[0] is None) == (len(bpe.encode(nasty)) + 2 <= length)


def test_spans_hold_what_the_tokens_spell(nasty: str) -> None:
    bpe = SimpleTokenizer()
    tokens = CLIPTokenizer(bpe, 4000).tokenize([nasty])
    assert tokens.spans[0][0] == (0, 0) and tokens.spans[0][-1][0] == tokens.spans[0][-1][1]
    inner = zip(tokens.ids[0][tokens.mask[0]].tolist()[1:-1], tokens.spans[0][1:-1], strict=True)
    for token, (start, end) in inner:
        surface = bpe.decoder[token].removesuffix("</w>")
        data = bytes(bpe.byte_decoder[c] for c in surface)
        source = bpe.clean_fn(nasty[start:end])
        assert data in (source + source.replace("σ", "ς")).encode() and nasty[start:end] == nasty[start:end].strip()
        assert start < end
    assert sorted(tokens.spans[0][1:]) == list(tokens.spans[0][1:])


class Unusual(str):
    """Text that does not own up to being plain."""

    def isascii(self) -> bool:
        return False


def test_plain_prompts_are_encoded_as_all_others_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of printable ASCII that the cleaning leaves as they are; what it changes never goes that way."""
    tokenizer = CLIPTokenizer(SimpleTokenizer(), 77)
    rng, symbols = np.random.default_rng(0), "".join(map(chr, range(32, 127)))
    prompts = [
        "",
        "A Red Apple",
        "it's 1,000 X-rays!?",
        "a <end_of_text> b<|>",
        '\\"`^_~{}',
        *("".join(rng.choice([*symbols], 40)) for _ in range(300)),
    ]
    found = [tokenizer._encode(prompt) for prompt in prompts]
    plain = CLIPTokenizer._encode_plain
    went = []
    monkeypatch.setattr(CLIPTokenizer, "_encode_plain", lambda self, text: went.append(text) or plain(self, text))
    changed = ["a  b", " a", "fish &amp; chips", "“a”", "ß", "a\tb", "a\x7fb", "doesnâ€™t"]
    assert [tokenizer._encode(prompt) for prompt in prompts] == found and len(went) > 100
    went.clear()
    assert [len(tokenizer._encode(prompt)[0]) for prompt in changed] and not went
    assert [tokenizer._encode(Unusual(prompt)) for prompt in prompts] == found and not went


def test_tokens_of_a_phrase_are_found_by_its_characters() -> None:
    bpe = SimpleTokenizer()
    prompt = "Fish &amp; “two   RED  apples”, ﬁne"
    tokens = CLIPTokenizer(bpe, 77).tokenize([prompt])
    start = prompt.index("RED")
    stop = start + len("RED  apples")
    found = [t for t, (a, b) in zip(tokens.ids[0].tolist(), tokens.spans[0], strict=False) if a < stop and b > start]
    assert found == bpe.encode("red apples")


def test_long_prompts_say_where_reading_stopped() -> None:
    prompt = "Two  red apples &amp; " * 1000
    tokens = CLIPTokenizer(SimpleTokenizer(), 20).tokenize([prompt])
    stop = tokens.truncated[0]
    assert stop is not None and prompt[max(end for _, end in tokens.spans[0]) : stop].strip() == ""
    again = CLIPTokenizer(SimpleTokenizer(), 20).tokenize([prompt[:stop]])
    assert torch.equal(again.ids, tokens.ids) and again.truncated == (None,)


def test_the_tokeniser_travels_to_another_process(text: CLIPTextEncoder) -> None:
    copy = pickle.loads(pickle.dumps(text.tokenizer))
    assert torch.equal(copy.tokenize(["a red 猫"]).ids, text.tokenizer.tokenize(["a red 猫"]).ids)


def test_text_features_are_open_clips(text: CLIPTextEncoder, reference: torch.nn.Module, nasty_prompts: list[str]) -> None:
    tokens = text.tokenizer.tokenize(nasty_prompts)
    embedding = text.encode(tokens)
    with torch.no_grad():
        pooled = reference.encode_text(tokens.ids)
    assert embedding.tokens.shape == (len(nasty_prompts), 24, 16) and embedding.pooled is not None
    torch.testing.assert_close(embedding.pooled, pooled)
    end = tokens.ids.argmax(dim=1)  # the pooled vector is the projection of the first end token's feature
    projected = embedding.tokens[torch.arange(len(end)), end] @ reference.text_projection
    torch.testing.assert_close(projected, pooled)
    assert not embedding.tokens[~embedding.mask].any()


def test_text_features_do_not_depend_on_padding_or_neighbours(text: CLIPTextEncoder, configs: dict[str, EncoderConfig]) -> None:
    prompts = ["a red apple", "two", "", "a red apple on a table"]
    together = text.encode(text.tokenizer.tokenize(prompts))
    short = CLIPTextEncoder.load(replace(configs["clip_text"], max_tokens=20), None, "cpu")
    for row, prompt in enumerate(prompts):
        tokens = short.tokenizer.tokenize([prompt])
        garbage = Tokens(tokens.ids + 3 * ~tokens.mask, tokens.mask, tokens.blank, tokens.spans, tokens.truncated)
        for alone in (short.encode(tokens), short.encode(garbage)):
            torch.testing.assert_close(together.tokens[row, :20], alone.tokens[0], atol=1e-5, rtol=1e-4)
            assert together.pooled is not None and alone.pooled is not None
            torch.testing.assert_close(together.pooled[row], alone.pooled[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("way", [{}, {"resize_mode": "squash", "interpolation": "bilinear"}], ids=["as CLIP", "as SigLIP"])
@pytest.mark.parametrize(("height", "width"), [(32, 32), (64, 64), (60, 91), (95, 64), (16, 16)])
def test_images_reach_the_tower_as_open_clip_prepares_them(
    configs: dict[str, EncoderConfig], way: dict[str, Any], height: int, width: int
) -> None:
    """Smooth pictures with noise on them, so that a shift by half a pixel shows."""
    towers = Towers.load(configs["clip_image"], None, None)
    image = CLIPImageEncoder(replace(towers, preprocess={**towers.preprocess, **way}))
    ramp = np.linspace(60, 150, height)[:, None, None] * np.array([1.0, 0.5, 0.6]) + np.linspace(0, 20, width)[None, :, None]
    pixels = (ramp + np.random.default_rng(0).integers(0, 60, ramp.shape)).astype(np.uint8)
    prepare = open_clip.image_transform(32, is_train=False, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.25), **way)
    expected = prepare(Image.fromarray(pixels))
    ours = image.preprocess(torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1)
    assert ours.shape == (1, 3, 32, 32)
    assert (ours[0] - expected).abs().max() < 0.03  # Pillow rounds to 8 bits and torch does not; one level is 0.02


def test_a_tower_that_wants_its_pictures_framed_is_refused(configs: dict[str, EncoderConfig]) -> None:
    towers = Towers.load(configs["clip_image"], None, None)
    with pytest.raises(ValueError, match="resize_mode='longest'; allowed: shortest, squash"):
        CLIPImageEncoder(replace(towers, preprocess={**towers.preprocess, "resize_mode": "longest"}))


def test_image_features_are_open_clips(image: CLIPImageEncoder, reference: torch.nn.Module) -> None:
    images = torch.rand(3, 3, 48, 40) * 2 - 1
    embedding = image.encode(images)
    with torch.no_grad():
        expected = reference.encode_image(image.preprocess(images))
    assert embedding.pooled is not None
    torch.testing.assert_close(embedding.pooled, expected)
    assert torch.equal(embedding.tokens, embedding.pooled[:, None]) and embedding.mask.all() and embedding.mask.shape == (3, 1)


def test_neither_tower_waits_for_the_device(text: CLIPTextEncoder, image: CLIPImageEncoder, no_sync: AbstractContextManager[Any]) -> None:
    tokens, images = text.tokenizer.tokenize(["a red apple", ""]), torch.rand(2, 3, 40, 32) * 2 - 1
    with no_sync:
        text.encode(tokens)
        image.encode(images)


def test_bfloat16_comes_back_as_float32(configs: dict[str, EncoderConfig], text: CLIPTextEncoder, image: CLIPImageEncoder) -> None:
    half_text = CLIPTextEncoder.load(replace(configs["clip_text"], dtype="bfloat16"), None, "cpu")
    half_image = CLIPImageEncoder.load(replace(configs["clip_image"], dtype="bfloat16"), None, "cpu")
    tokens, images = text.tokenizer.tokenize(["a red apple"]), torch.rand(1, 3, 32, 32) * 2 - 1
    for half, full in ((half_text.encode(tokens), text.encode(tokens)), (half_image.encode(images), image.encode(images))):
        assert half.tokens.dtype == torch.float32
        torch.testing.assert_close(half.tokens, full.tokens, atol=0.1, rtol=0.1)


def test_both_encoders_of_a_model_load_it_once_and_hold_their_own_tower(configs: dict[str, EncoderConfig]) -> None:
    shared: dict[object, object] = {}
    a = CLIPTextEncoder.load(configs["clip_text"], None, "cpu", shared)
    b = CLIPImageEncoder.load(configs["clip_image"], None, "cpu", shared)
    assert len(shared) == 1
    text, image = ({p.data_ptr() for p in e.model.parameters()} for e in (a, b))
    assert text and image and not text & image
    assert not any(name.startswith("visual.") for name, _ in a.model.named_parameters())


def test_wrong_models_are_refused_by_name(configs: dict[str, EncoderConfig], clip_folder: Path, tmp_path: Path) -> None:
    config = configs["clip_text"]
    for change, message in (
        ({"model": "ViT-B-32"}, "needs `pretrained`"),
        ({"model": "ViT-B-99", "pretrained": "openai"}, "cannot be loaded"),
        ({"pretrained": "openai"}, "brings its own weights"),
        ({"max_tokens": 25}, "max_tokens=25"),
        ({"dtype": "float16"}, "float16"),
    ):
        with pytest.raises(ValueError, match=message):
            CLIPTextEncoder.load(replace(config, **change), None, "cpu")  # type: ignore[arg-type]
    (tmp_path / "open_clip_config.json").write_text((clip_folder / "open_clip_config.json").read_text())
    with pytest.raises(ValueError, match="lacks open_clip_model"):
        CLIPTextEncoder.load(replace(config, model=str(tmp_path)), None, "cpu")
