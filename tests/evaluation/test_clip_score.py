"""CLIP scores are those that open_clip's own model, transform and tokeniser give, and their mean knows no order."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from t2i_experts.evaluation.clip_score import CLIPScore
from t2i_experts.evaluation.features import FeatureOptions, load_features
from t2i_experts.evaluation.metrics import load_metric, mean_score

CAPTIONS = ["a red apple", "two red apples & a café", "", "a photo of nothing at all " * 9, "red"]


def pictures(height: int, width: int) -> Tensor:
    """As many as there are captions; their values stay where no filter overshoots."""
    generator = torch.Generator().manual_seed(height)
    return torch.randint(64, 192, (len(CAPTIONS), 3, height, width), dtype=torch.uint8, generator=generator)


def by_open_clip(name: str, tokenizer: Any, images: Tensor, captions: list[str]) -> Tensor:
    """100 cos, with open_clip alone."""
    model, _, transform = open_clip.create_model_and_transforms(name, require_pretrained=True)
    model.eval()
    pixels = torch.stack([transform(Image.fromarray(image.permute(1, 2, 0).numpy())) for image in images])
    with torch.no_grad():
        a, b = model.encode_image(pixels, normalize=True), model.encode_text(tokenizer(captions), normalize=True)
    return 100 * (a * b).sum(1)


def scores(metric: CLIPScore, images: Tensor, captions: list[str]) -> Tensor:
    return metric.values(metric.prepare(images), captions)


@pytest.fixture(scope="module")
def tokenizer(clip_folder: Path) -> SimpleTokenizer:
    return SimpleTokenizer(bpe_path=str(clip_folder / "merges.txt.gz"), context_length=24)


@pytest.mark.parametrize(("size", "tolerance"), [((32, 32), 1e-4), ((60, 91), 0.5)])
def test_scores_are_open_clips(clip_folder: Path, tokenizer: Any, size: tuple[int, int], tolerance: float) -> None:
    """Where pictures are resized, Pillow rounds to whole numbers and torch does not."""
    images, metric = pictures(*size), CLIPScore(str(clip_folder))
    found, expected = scores(metric, images, CAPTIONS), by_open_clip(f"local-dir:{clip_folder}", tokenizer, images, CAPTIONS)
    assert found.shape == (5,) and found.dtype == torch.float32 and expected.std() > 2
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)
    for i, caption in enumerate(CAPTIONS):
        torch.testing.assert_close(scores(metric, images[i : i + 1], [caption])[0], found[i], atol=1e-4, rtol=0)


def test_a_prefix_stands_before_the_caption_and_clamping_ends_at_zero(clip_folder: Path, tokenizer: Any) -> None:
    images = pictures(32, 32)
    prefixed = CLIPScore(str(clip_folder), prefix="A photo depicts ")
    expected = by_open_clip(f"local-dir:{clip_folder}", tokenizer, images, [f"A photo depicts {caption}" for caption in CAPTIONS])
    torch.testing.assert_close(scores(prefixed, images, CAPTIONS), expected, atol=1e-4, rtol=0)
    plain = CLIPScore(str(clip_folder))
    raw = scores(plain, images, CAPTIONS)
    assert (raw - expected).abs().max() > 0.5
    images = images[raw.argsort()[:2]]  # those for which the random towers say the least
    clamped = load_metric("clip", {"model": str(clip_folder), "clamp": "true"}, "cpu")
    for captions in (CAPTIONS[:2], CAPTIONS[3:]):
        torch.testing.assert_close(clamped.values(clamped.prepare(images), captions), scores(plain, images, captions).clamp_min(0))
    assert (prefixed.record["prefix"], prefixed.record["clamp"], clamped.record["clamp"]) == ("A photo depicts ", False, True)


def test_the_tokens_that_are_cut_are_counted(clip_folder: Path, tokenizer: Any) -> None:
    metric = CLIPScore(str(clip_folder))
    assert metric.record["context"] == 24
    fits, over = "red " * 22, "red " * 25  # one token a word, and two for the ends
    assert metric.cut([fits, over, "", over + "!"]) == [0, 3, 0, 4]
    assert CLIPScore(str(clip_folder), prefix="red red ").cut([fits, over, ""]) == [2, 5, 0]
    images = pictures(32, 32)[:2]
    values = scores(metric, images[:1].expand(2, -1, -1, -1), [over, over + "apple"])
    assert values[0] == values[1], "what is cut does not count"


def test_the_record_says_which_network_it_was(clip_folder: Path) -> None:
    record = CLIPScore(str(clip_folder)).record
    features = load_features("open_clip", FeatureOptions(model=str(clip_folder)), "cpu").record
    assert {name: record[name] for name in ("model", "weights", "sha256", "resize", "size")} == {
        name: features[name] for name in ("model", "weights", "sha256", "resize", "size")
    }
    assert record["text_sha256"] != record["sha256"] and record["scale"] == 100 and json.dumps(record)
    assert CLIPScore("embedded:clip").record["sha256"] != record["sha256"]


def test_a_tokeniser_of_another_network_is_refused(clip_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(clip_folder, tmp_path / "clip")
    merges = gzip.decompress((clip_folder / "merges.txt.gz").read_bytes())
    (tmp_path / "clip/merges.txt.gz").write_bytes(gzip.compress(merges + b"\nt w"))
    with pytest.raises(ValueError, match="its text tower knows 520 tokens, and its tokeniser 521"):
        CLIPScore(str(tmp_path / "clip"))


def test_an_architecture_with_weights_in_a_file(clip_folder: Path, tmp_path: Path) -> None:
    config = json.loads((clip_folder / "open_clip_config.json").read_text())["model_cfg"]
    config["text_cfg"]["tokenizer_kwargs"] = {"bpe_path": str(clip_folder / "merges.txt.gz")}
    (tmp_path / "tiny-for-this-test.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "tiny-for-this-test.json")
    record = CLIPScore("tiny-for-this-test", str(clip_folder / "open_clip_model.safetensors")).record
    folders = CLIPScore(str(clip_folder)).record
    assert [record[name] for name in ("sha256", "text_sha256")] == [folders[name] for name in ("sha256", "text_sha256")]


def test_a_network_with_another_tokeniser_and_another_way_to_resize(tmp_path: Path) -> None:
    """As SigLIP's: words from a Hugging Face tokeniser, attention that sees all, pictures squeezed to a square by the bilinear filter."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, "a": 2, "red": 3, "apple": 4, "photo": 5}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(tmp_path)
    text = {"context_length": 8, "vocab_size": 6, "width": 16, "heads": 2, "layers": 1, "hf_tokenizer_name": "words"}
    text |= {"tokenizer_kwargs": {"clean": "canonicalize"}, "no_causal_mask": True, "pool_type": "last"}
    vision = {"image_size": 32, "patch_size": 8, "width": 16, "head_width": 8, "layers": 1}
    config = {"embed_dim": 12, "vision_cfg": vision, "text_cfg": text, "custom_text": True}
    torch.manual_seed(0)
    plain = {name: value for name, value in config.items() if name != "custom_text"}
    save_file(open_clip.model.CustomTextCLIP(**plain).state_dict(), tmp_path / "open_clip_model.safetensors")
    shown = {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash", "interpolation": "bilinear"}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": shown}))

    captions = ["A red, red apple!", "a photo of a red red apple and a red apple", "red", "apple", "a"]
    metric, name = CLIPScore(str(tmp_path)), f"local-dir:{tmp_path}"
    for size, tolerance in (((32, 32), 1e-4), ((48, 90), 0.5)):
        expected = by_open_clip(name, open_clip.get_tokenizer(name), pictures(*size), captions)
        torch.testing.assert_close(scores(metric, pictures(*size), captions), expected, atol=tolerance, rtol=0)
    assert metric.cut(captions) == [0, 3, 0, 0, 0]
    assert metric.record["resize"] == "bilinear, antialiased, both sides to the size"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "needs model: embedded:clip"),
        ({"model": "embedded:clip", "clamp": "yes"}, "clamp='yes' must be true or false"),
        ({"model": "embedded:clip", "wieghts": "x"}, "wieghts='x' is no option of the metric clip; it has model, weights, clamp, prefix"),
        ({"model": "embedded:clip", "weights": "openai"}, "model='embedded:clip' with weights='openai': .* brings its own weights"),
        ({"model": "embedded:clap"}, "embedded:clap"),
        ({"model": "ViT-L-14"}, "model='ViT-L-14' with weights=None: .* such as openai"),
    ],
)
def test_wrong_options_are_named(options: dict[str, str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        load_metric("clip", options, "cpu")


def test_the_mean_knows_no_order_and_its_error_is_that_of_the_mean() -> None:
    values = np.random.default_rng(0).normal(30, 4, 1001).astype(np.float32)
    score = mean_score(torch.from_numpy(values))
    assert mean_score(values[::-1].tolist()) == score
    assert score.mean == pytest.approx(values.astype(np.float64).mean(), rel=1e-12) and score.count == 1001
    assert score.error == pytest.approx(values.astype(np.float64).std(ddof=1) / 1001**0.5, rel=1e-9)
    assert mean_score([3.5]).error is None
    with pytest.raises(ValueError, match="no values"):
        mean_score([])
