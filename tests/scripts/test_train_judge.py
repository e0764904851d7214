"""The judge's training: targets are what the scenes say, spoilt pictures stay what they are, and a few scenes are learnt."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from t2i_experts.evaluation.judge import SIZE, load_judge
from t2i_experts.shards.reader import ShardReader
from t2i_experts.shards.writer import ShardWriter

SCRIPTS = Path(__file__).parents[2] / "scripts"
DRAWN = {"owl": ("brown", "ellipse"), "apple": ("red", "rectangle"), "frog": ("green", "ellipse")}


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        import train_judge

        yield train_judge
    for name in [name for name in sys.modules if name.startswith("emoji_") or name == "train_judge"]:
        del sys.modules[name]


def scene(*placed: tuple[str, tuple[int, int, int, int]], background: str = "white") -> dict[str, Any]:
    return {
        "split": "validation",
        "size": SIZE,
        "style": "flat",
        "relations": [],
        "background": {"kind": "plain", "colours": [background], "named": background != "white"},
        "objects": [{"name": name, "style": "flat", "colour": DRAWN[name][0], "box": list(box)} for name, box in placed],
    }


def drawn(one: dict[str, Any]) -> Image.Image:
    image = Image.new("RGB", (SIZE, SIZE), one["background"]["colours"][0])
    for placed in one["objects"]:
        left, top, right, bottom = placed["box"]
        colour, shape = DRAWN[placed["name"]]
        getattr(ImageDraw.Draw(image), shape)((left, top, right - 1, bottom - 1), fill=colour)
    return image


def scenes(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """One large object, or two beside each other."""
    rng = np.random.default_rng(seed)
    made = []
    for i in range(count):
        first, second = rng.choice(list(DRAWN), 2, replace=False)
        x, y = (int(v) for v in rng.integers(2, 20, 2))
        two = [(str(first), (2, y, 26, y + 26)), (str(second), (34, y, 60, y + 26))]
        one = [(str(first), (x, y, x + 40, y + 40))]
        made.append(scene(*(two if i % 2 else one), background=("white", "yellow", "blue")[i % 3]))
    return made


def write(folder: Path, made: list[dict[str, Any]]) -> Path:
    with ShardWriter(folder) as writer:
        for i, one in enumerate(made):
            data = io.BytesIO()
            drawn(one).save(data, "PNG")
            writer.write(f"{i:04d}", data.getvalue(), "png", ["a scene"], one)
    return folder


def test_targets_are_what_the_scene_says(script: ModuleType) -> None:
    words = script.judge_words(8, 1)
    made = scene(("owl", (2, 4, 30, 40)), ("apple", (0, 0, 0, 0)), ("frog", (40, 4, 60, 40)), background="pink")
    made["objects"][0]["colour"] = None
    labels, boxes, background = script.targets(made | {"size": 32}, words)
    assert [words.objects[i] for i in labels[:2, 0]] == ["owl", "frog"] and (labels[2:] == -1).all()
    assert labels[0, 2] == len(words.colours) and words.colours[labels[1, 2]] == "green" and words.styles[labels[1, 1]] == "flat"
    assert boxes[0].tolist() == [4, 8, 60, 80]  # the judge's pictures have twice the scene's side
    assert words.background_kinds[background[0]] == "plain" and words.backgrounds[background[1]] == "pink" and background[2] == -1
    made["background"]["named"] = False  # paler than pink: of no known colour
    assert script.targets(made, words)[2].tolist() == [0, -1, -1]


def test_spoilt_pictures_stay_what_they_are(script: ModuleType) -> None:
    images = torch.stack([torch.from_numpy(np.asarray(drawn(one)).copy()).permute(2, 0, 1) for one in scenes(64)])
    spoilt = script.spoil(images, torch.Generator().manual_seed(0))
    assert torch.equal(spoilt, script.spoil(images, torch.Generator().manual_seed(0))) and spoilt.dtype == torch.uint8
    apart = (spoilt.float() - images.float()).flatten(1)
    assert (apart.mean(dim=1).abs() < 25).all() and (apart.abs().mean(dim=1) < 35).all()
    assert apart.abs().mean() > 2 and apart.abs().mean(dim=1).std() > 1


def test_rounding_frequencies_by_nothing_is_the_picture(script: ModuleType) -> None:
    x = torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    step = torch.tensor([0.0, 0.2])[:, None, None, None]
    rounded = script._round_frequencies(x, step)
    assert torch.allclose(rounded[0], x[0], atol=1e-5) and not torch.allclose(rounded[1], x[1], atol=1e-2)
    # The mean of a block is its lowest frequency over eight, which is rounded to whole steps.
    means = rounded[1].unflatten(2, (8, 8)).unflatten(1, (8, 8)).mean(dim=(2, 4))
    assert torch.allclose((means * 8 / 0.2).round(), means * 8 / 0.2, atol=1e-3)


def test_a_few_scenes_are_learnt(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unseen = [one for one in scenes(60, seed=1) if one not in scenes(48)][:40]
    shards, others = write(tmp_path / "shards", scenes(48)), write(tmp_path / "others", unseen)
    arguments = [str(shards), "--validation", str(others), "--device", "cpu", "--workers", "1", "--batch-size", "16", "--warmup", "5"]
    arguments += ["--channels", "16", "--blocks", "3", "--steps", "75", "--learning-rate", "1e-2", "--log-every", "25"]
    script.main([*arguments, "--out", str(tmp_path / "judge")])
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    judge = load_judge(str(tmp_path / "judge"))
    assert judge.accuracy == printed and set(printed) == {"all", "spoilt", "validation"}
    assert set(judge.scenes) == {ShardReader([shards], size=SIZE, seed=0).dataset_hash}
    own = printed["all"]["categories"]
    assert printed["all"]["single"]["top1"] > 0.8 and own["object"]["confirmed"] > 0.8 and own["background"]["confirmed"] > 0.8
    assert min(one["rejected"] for one in own.values()) > 0.8
    script.main([*arguments[:-6], "--steps", "2", "--out", str(tmp_path / "a")])
    script.main([*arguments[:-6], "--steps", "2", "--out", str(tmp_path / "b")])
    assert (tmp_path / "a/judge.safetensors").read_bytes() == (tmp_path / "b/judge.safetensors").read_bytes()
    script.refuse_seen(torch.zeros(1, 3, 2, 2, dtype=torch.uint8), torch.ones(9, 3, 2, 2, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"--validation: 48 of its 88 scenes are among those that train the judge"):
        script.main([*arguments[:2], str(shards), *arguments[2:], "--out", str(tmp_path / "leak")])
