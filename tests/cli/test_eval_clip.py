"""`eval clip`: the number is that of the metric, whatever holds pictures and captions, and its record says all that made it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from t2i_experts.evaluation.clip_score import CLIPScore

CLI = Callable[..., tuple[int, str, str]]
MODEL = ("--model", "clip", "--device", "cpu")
CAPTIONS = [f"a {word}" + (" red" * 30 if i in (3, 7) else "") for i, word in enumerate(["red apple", "apple", "dog & cat"] * 4)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clip_folder: Path) -> Path:
    """`pictures`, of three sizes, each with its caption; and `clip`, a network that reads 24 tokens. The working folder."""
    random = np.random.default_rng(0)
    (tmp_path / "pictures").mkdir()
    for i, caption in enumerate(CAPTIONS):
        width, height = [(40, 40), (48, 36), (30, 70)][i % 3]
        path = tmp_path / "pictures" / f"{i:02}.png"
        Image.fromarray(random.integers(0, 255, (height, width, 3)).astype(np.uint8)).save(path)
        path.with_suffix(".txt").write_text(f"{caption}\n")
    (tmp_path / "clip").symlink_to(clip_folder)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def clip(cli: CLI, folder: Path) -> Callable[..., Any]:
    """clip(*arguments): the record."""

    def run(*arguments: object) -> Any:
        code, out, err = cli("eval", "clip", *arguments, *MODEL, "--json")
        assert code == 0, err
        assert out.count("\n") == 1
        return json.loads(out)

    return run


def values(metric: CLIPScore) -> list[float]:
    images = [torch.from_numpy(np.array(Image.open(f"pictures/{i:02}.png"))).permute(2, 0, 1)[None] for i in range(len(CAPTIONS))]
    return [float(metric.values(metric.prepare(image), [caption])) for image, caption in zip(images, CAPTIONS, strict=True)]


def test_the_number_is_the_mean_and_the_record_is_whole(clip: Callable[..., Any], cli: CLI) -> None:
    record = clip("pictures", "--batch", 5, "--workers", 3)
    expected = np.array(values(CLIPScore("clip")))
    assert record["mean"] == pytest.approx(expected.mean(), abs=1e-4)
    assert record["error"] == pytest.approx(expected.std(ddof=1) / 12**0.5, abs=1e-4) and record["count"] == 12
    assert (record["metric"]["clamp"], record["metric"]["prefix"], record["metric"]["context"]) == (False, "", 24)
    assert record["set"]["kind"] == "folder" and record["settings"] == {"batch": 5, "workers": 3, "processes": 1}
    assert all(len(part["sha256"]) == 64 for part in (record["set"], record["captions"], record["metric"]))
    assert {"torch", "pillow", "open-clip-torch"} <= set(record["versions"]) and record["machine"]["device"] and record["seconds"] > 0
    assert "transparency on white" in record["pictures"]
    again = clip("pictures", "--batch", 1, "--workers", 1)
    assert again["mean"] == pytest.approx(record["mean"], abs=1e-4)
    assert [again[name]["sha256"] for name in ("set", "captions")] == [record[name]["sha256"] for name in ("set", "captions")]
    same = cli("eval", "score", "pictures", "--metric", "clip", "model=clip", "--device", "cpu", "--batch", 5, "--json")
    assert json.loads(same[1])["mean"] == record["mean"] and json.loads(same[1])["metric"] == record["metric"]


def test_captions_that_are_too_long_are_counted_and_named(clip: Callable[..., Any], cli: CLI) -> None:
    too_long = clip("pictures")["captions"]["too_long"]
    assert too_long["count"] == 2 and [each["picture"] for each in too_long["captions"]] == ["03.png", "07.png"]
    tokens = [len(CLIPScore("clip")._tokenizer.encode(CAPTIONS[i])) + 2 for i in (3, 7)]
    assert [each["tokens_cut"] for each in too_long["captions"]] == [n - 24 for n in tokens]
    assert too_long["captions"][0]["caption"] == CAPTIONS[3]
    code, out, _ = cli("eval", "clip", "pictures", *MODEL)
    assert code == 0 and f"whose ends do not count: 2: 03.png ({tokens[0] - 24} tokens too many), 07.png" in out
    assert "CLIP score " in out.splitlines()[-1] and " +- " in out.splitlines()[-1]


def test_clamping_and_a_prefix_are_in_number_and_record(clip: Callable[..., Any]) -> None:
    record = clip("pictures", "--clamp", "--prefix", "a photo of ")
    assert record["mean"] == pytest.approx(np.mean(values(CLIPScore("clip", clamp=True, prefix="a photo of "))), abs=1e-4)
    assert (record["metric"]["clamp"], record["metric"]["prefix"]) == (True, "a photo of ")


def test_shards_and_lists_give_the_number_of_their_folder(clip: Callable[..., Any], cli: CLI, folder: Path) -> None:
    assert cli("shards", "build", "pictures", "--out", "shards", "--samples-per-shard", 5)[0] == 0
    Path("list.jsonl").write_text("".join(json.dumps({"file": f"{i:02}.png", "caption": c}) + "\n" for i, c in enumerate(CAPTIONS)))
    beside, listed, shards = clip("pictures"), clip("pictures", "--captions", "list.jsonl"), clip("shards")
    assert beside["mean"] == listed["mean"] == pytest.approx(shards["mean"], abs=1e-4)
    assert shards["set"]["kind"] == "shards" and listed["captions"]["source"] == "list.jsonl"
    assert beside["captions"]["sha256"] == listed["captions"]["sha256"]
    Path("pictures/00.txt").write_text("a red apple\nanother\n")
    several = clip("pictures")
    assert several["captions"]["pictures_with_several"] == 1 and several["captions"]["sha256"] == beside["captions"]["sha256"]
    Path("pictures/00.txt").write_text("a green apple\n")
    other = clip("pictures")
    assert other["captions"]["sha256"] != beside["captions"]["sha256"] and other["set"]["sha256"] == beside["set"]["sha256"]


def test_pictures_that_cannot_be_read_are_listed_and_there_is_no_number(cli: CLI, folder: Path) -> None:
    Path("pictures/05.png").write_bytes(b"no picture")
    code, out, err = cli("eval", "clip", "pictures", *MODEL, "--json")
    assert (code, out) == (2, "") and "1 of the 12 pictures of pictures cannot be read" in err and "\n  05.png: " in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["clip", "pictures"], ["missing option", "--model"]),
        (["clip", "nowhere", *MODEL], ["PICTURES='nowhere' is not there"]),
        (["clip", "clip", *MODEL], ["PICTURES='clip' holds no pictures"]),
        (["clip", "pictures", *MODEL, "--captions", "nowhere.txt"], ["--captions nowhere.txt is not there"]),
        (["clip", "pictures", *MODEL, "--batch", "0"], ["--batch=0", "at least 1"]),
        (["clip", "pictures", *MODEL[:2], "--device", "gpu"], ["--device='gpu'"]),
        (["clip", "pictures", *MODEL, "--weights", "openai"], ["model='clip' with weights='openai'", "brings its own weights"]),
        (["score", "pictures", "--metric", "clop"], ["unknown metric 'clop'; did you mean 'clip'?"]),
        (["score", "pictures", "--metric", "clip", "model"], ["'model' must be of the form KEY=VALUE"]),
        (["score", "pictures", "--metric", "clip", "model=a", "model=b"], ["'model=b' names model again"]),
        (["score", "pictures", "--metric", "clip", "modle=clip"], ["modle='clip' is no option of the metric clip; it has model, weights"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_mistakes_are_told_in_one_line(cli: CLI, folder: Path, arguments: list[str], said: list[str]) -> None:
    code, out, err = cli("eval", *arguments)
    assert (code, out) == (2, "") and err.startswith("error: "), err
    assert all(part in err for part in said), err
