"""The scripts that train the small encoders, on a few drawn pictures."""

from __future__ import annotations

import importlib.util
import io
import json
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from open_clip.model import CLIP
from open_clip.tokenizer import SimpleTokenizer
from PIL import Image

from t2i_experts.conditioning.conditioner import TextConditioner
from t2i_experts.config import EncoderConfig
from t2i_experts.shards.writer import ShardWriter

SCRIPTS = Path(__file__).parents[2] / "scripts"
COLOURS = ("red", "green", "blue", "white", "yellow", "black")
SIDES = ("left", "right")


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))  # as Python does for a script that it runs
        spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Coloured squares on grey, to the left or to the right, with two captions each."""
    folder = tmp_path_factory.mktemp("shards")
    with ShardWriter(folder, samples_per_shard=64) as writer:
        for i in range(192):
            colour, side = COLOURS[i % 6], SIDES[i // 6 % 2]
            image = Image.new("RGB", (64, 64), "gray")
            image.paste(colour, (4 + 34 * (side == "right") + i % 3, 16 + i % 5, 28 + 34 * (side == "right"), 44))
            data = io.BytesIO()
            image.save(data, "PNG")
            writer.write(f"{i:05d}", data.getvalue(), "png", [f"a {colour} square on the {side}", f"{side}: something {colour}"])
    return folder


def test_t5_learns_and_is_read_back(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train_t5 = script("train_t5")
    (tmp_path / "more.txt").write_text("a café on the left\n\na red and a green square\n")
    coco = {"annotations": [{"caption": " two black squares on the right "}]}
    (tmp_path / "coco.json").write_text(json.dumps(coco))
    sizes = {"width": 32, "head-width": 16, "layers": 1, "feed-forward": 32, "pieces": 400, "max-tokens": 16, "batch-size": 64}
    small = [part for name, value in sizes.items() for part in (f"--{name}", str(value))]
    out = tmp_path / "t5"
    train_t5.main([
        str(shards), str(tmp_path / "more.txt"), str(tmp_path / "coco.json"), "--out", str(out), "--steps", "60", "--log-every", "20",
        "--warmup", "5", "--learning-rate", "1e-2", "--device", "cpu", "--threads", "1", *small,
    ])  # fmt: skip
    assert "step     60  loss" in capsys.readouterr().out
    report = json.loads((out / "report.json").read_text())
    assert report["captions"] == 2 * 192 + 2 + 1
    assert report["held_out_loss"] < 0.6 * report["held_out_loss_before"]
    conditioner = TextConditioner.from_config({"t5": EncoderConfig("t5", str(out), width=32, max_tokens=16)})
    embedding = conditioner(["a red square", "猫 of an unknown word"]).embeddings["t5"]
    tokens = conditioner.tokenizer(["猫 of an unknown word"])["t5"]
    assert embedding.tokens.isfinite().all() and 2 not in tokens.ids


def test_span_corruption_hides_and_tells_all_tokens() -> None:
    train_t5 = script("train_t5")
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 61, (500,), generator=generator)
    lengths[:2] = torch.tensor([2, 60])
    ids = torch.randint(3, 200, (500, 60), generator=generator) * (torch.arange(60) < lengths[:, None])
    inputs, targets = train_t5.corrupt_spans(ids, lengths, 299, generator)
    hidden = spans = 0
    for row, length in enumerate(lengths.tolist()):
        told: dict[int, list[int]] = {}
        ends = targets[row].tolist().index(1)
        for token in targets[row, :ends].tolist():
            if token >= 200:
                told[token] = []
            else:
                told[list(told)[-1]].append(token)
        *sentinels, closing = told
        assert sentinels == [299 - i for i in range(len(sentinels))] and told[closing] == [] and all(told[s] for s in sentinels)
        shown = inputs[row].tolist()
        assert shown.count(1) == 1 and not any(shown[shown.index(1) + 1 :]) and not targets[row, ends + 1 :].any()
        restored = [token for piece in shown[: shown.index(1)] for token in told.get(piece, [piece])]
        assert restored == ids[row, :length].tolist()
        hidden += sum(map(len, told.values()))
        spans += len(sentinels)
    assert hidden / lengths.sum() == pytest.approx(0.15, abs=0.01)
    assert 2 < hidden / spans < 3.5


def test_clip_learns_and_is_read_back(shards: Path, tmp_path: Path) -> None:
    train_clip = script("train_clip")
    config = json.loads((SCRIPTS / "small_clip.json").read_text())
    config["model_cfg"]["vision_cfg"] |= {"width": 32, "head_width": 16, "layers": 2, "patch_size": 16}
    config["model_cfg"]["text_cfg"] |= {"width": 32, "heads": 2, "layers": 1, "vocab_size": 560, "context_length": 16}
    (tmp_path / "tiny.json").write_text(json.dumps(config))
    out = tmp_path / "clip"
    train_clip.main([
        str(shards), "--validation", str(shards), "--out", str(out), "--config", str(tmp_path / "tiny.json"), "--steps", "120",
        "--batch-size", "48", "--warmup", "5", "--learning-rate", "3e-3", "--device", "cpu", "--workers", "2",
    ])  # fmt: skip
    report = json.loads((out / "report.json").read_text())
    assert report["retrieval"]["pool"] == 192 and report["retrieval"]["distinct_captions"] == 12

    configs = {
        "clip_text": EncoderConfig("clip_text", str(out), width=32, pooled_width=192, max_tokens=16),
        "clip_image": EncoderConfig("clip_image", str(out), width=192, pooled_width=192),
    }
    captions = [f"a {colour} square on the {side}" for colour in COLOURS for side in SIDES]
    images = []
    for colour in COLOURS:
        for side in SIDES:
            image = Image.new("RGB", (64, 64), "gray")
            image.paste(colour, (4 + 34 * (side == "right"), 16, 28 + 34 * (side == "right"), 44))
            images.append(torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1)
    embeddings = TextConditioner.from_config(configs)(captions, torch.stack(images)).embeddings
    text, image = embeddings["clip_text"].pooled, embeddings["clip_image"].pooled
    assert text is not None and image is not None
    similarity = torch.nn.functional.normalize(image, dim=1) @ torch.nn.functional.normalize(text, dim=1).T
    assert (similarity.argmax(dim=1) == torch.arange(12)).float().mean() > 0.8


def test_the_shipped_clip_config_has_the_promised_size() -> None:
    config = json.loads((SCRIPTS / "small_clip.json").read_text())["model_cfg"]
    model = CLIP(**config)
    image = sum(p.numel() for p in model.visual.parameters())
    text = sum(p.numel() for p in model.parameters()) - image
    assert 1.2e6 < image < 2.0e6 and 1.2e6 < text < 1.6e6


def test_merges_are_the_most_frequent_pairs_and_open_clip_applies_them(tmp_path: Path) -> None:
    train_clip = script("train_clip")
    merges = train_clip.learn_merges(Counter({"aab": 10, "ab": 5, "猫": 1}), 3)
    assert merges[:2] == [("a", "b</w>"), ("a", "ab</w>")]
    train_clip.write_merges(merges, tmp_path / "merges.txt.gz")
    tokenizer = SimpleTokenizer(bpe_path=str(tmp_path / "merges.txt.gz"))
    assert tokenizer.vocab_size == 512 + 3 + 2
    assert len(tokenizer.encode("aab ab")) == 2
    assert train_clip.learn_merges(Counter({"aab": 10, "ab": 5}), 100) == merges[:2]


def test_merges_agree_with_counting_all_pairs_anew_each_time() -> None:
    train_clip = script("train_clip")
    generator = torch.Generator().manual_seed(0)
    words = Counter("".join("abcde"[k] for k in torch.randint(5, (n,), generator=generator)) for n in (2, 3, 5, 8, 8, 9) * 30)
    spelled = {word: [*word[:-1], word[-1] + "</w>"] for word in words}
    expected = []
    for _ in range(40):
        totals: Counter[tuple[str, str]] = Counter()
        for word, symbols in spelled.items():
            for pair in pairwise(symbols):
                totals[pair] += words[word]
        best = min(totals, key=lambda pair: (-totals[pair], pair))
        expected.append(best)
        spelled = {word: train_clip._merged(symbols, best) for word, symbols in spelled.items()}
    assert train_clip.learn_merges(words, 40) == expected


def test_crops_stay_inside_and_are_never_mirrored() -> None:
    train_clip = script("train_clip")
    ramp = torch.linspace(0, 1, 64).expand(200, 3, 64, 64)
    crops = train_clip.random_crops(ramp, torch.Generator().manual_seed(0))
    assert (crops.diff(dim=-1) > -1e-6).all() and crops.min() >= 0 and crops.max() <= 1
    shown = crops[:, 0, 0, -1] - crops[:, 0, 0, 0]
    assert shown.min() > 0.75 and shown.max() <= 1 and shown.std() > 0.01
