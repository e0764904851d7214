"""The example data set: what its captions say is what its pictures show, and the repository's copy is what the script draws."""

from __future__ import annotations

import importlib.util
import io
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from t2i_experts.shards.check import check_shards
from t2i_experts.shards.reader import RawSample, ShardReader

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def shapes() -> ModuleType:
    spec = importlib.util.spec_from_file_location("draw_shapes", ROOT / "scripts/draw_shapes.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["draw_shapes"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def raw_samples(folder: Path) -> list[RawSample]:
    reader = ShardReader([folder], size=64, seed=0)
    return [reader.raw(i) for i in range(reader.samples)]


def test_the_repositorys_copy_is_what_the_script_draws(shapes: ModuleType) -> None:
    drawn = shapes.scenes(192 + 32, 0)
    found = [*raw_samples(ROOT / "shards/shapes/train"), *raw_samples(ROOT / "shards/shapes/validation")]
    assert len(found) == len(drawn)
    for scene, sample in zip(drawn, found, strict=True):
        assert scene.captions()[: len(sample.captions)] == list(sample.captions)
        assert (np.asarray(scene.draw(64)) == np.asarray(Image.open(io.BytesIO(sample.image)).convert("RGB"))).all()


def test_the_repositorys_copy_is_good_small_and_varied() -> None:
    for name in ("train", "validation"):
        report = check_shards(ROOT / "shards/shapes" / name)
        assert (report.problems, report.left_out, report.notes) == ([], [], [])
    assert sum(path.stat().st_size for path in (ROOT / "shards/shapes").rglob("*.*")) < 600 * 1024
    train, validation = ({s.captions[0] for s in raw_samples(ROOT / "shards/shapes" / name)} for name in ("train", "validation"))
    assert len(train) > 180 and len(validation) > 28
    assert {len(s.captions) for s in raw_samples(ROOT / "shards/shapes/train")} == {1, 2, 3}
    words = " ".join(train).split()
    assert {"circle", "square", "triangle", "star", "diamond", "cross", "left", "above", "small", "large"} <= set(words)


def test_captions_tell_the_truth(shapes: ModuleType) -> None:
    """Colour, place and size are measured in the picture itself."""
    for scene in shapes.scenes(150, 7):
        pixels = np.asarray(scene.draw(64)).astype(int)
        centres = []
        for shape in scene.shapes:
            covered = np.argwhere((pixels == shapes.COLOURS[shape.colour]).all(-1))
            assert len(covered) > 20 and shape.colour in shape.phrase
            extent = np.ptp(covered, axis=0).max() / 64
            sure = len({s.colour for s in scene.shapes}) == len(scene.shapes)  # two of one colour cannot be told apart here
            if sure:
                assert (extent < 0.29) == (shape.size == "small") and (extent > 0.45) == (shape.size == "large")
                centres.append(covered.mean(0))
        caption = scene.captions()[0]
        if len(centres) == 2:
            (y0, x0), (y1, x1) = centres
            assert ("left of" in caption and x0 < x1 - 15 and abs(y0 - y1) < 8) or (
                "above" in caption and y0 < y1 - 15 and abs(x0 - x1) < 8
            )
        assert (pixels[0, 0] == shapes.BACKGROUNDS[scene.background]).all() or len(scene.shapes) == 1


def test_words(shapes: ModuleType) -> None:
    circle, square = shapes.Shape("circle", "red", "", 0.2, 0.5), shapes.Shape("square", "orange", "small", 0.8, 0.5)
    assert shapes.Scene((circle,), "white").captions()[0] == "a red circle"
    assert shapes.Scene((circle, square), "grey").captions() == [
        "a red circle to the left of a small orange square",
        "a small orange square to the right of a red circle",
        "a red circle and a small orange square on a grey background",
    ]
    assert shapes.Shape("cross", "orange", "", 0.5, 0.5).phrase == "an orange cross"


def test_seeds_and_counts(shapes: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    assert shapes.scenes(20, 1) == shapes.scenes(20, 1) != shapes.scenes(20, 2)
    assert shapes.scenes(30, 1)[:20] == shapes.scenes(20, 1)
    many = shapes.scenes(2000, 3)
    assert len({scene.description for scene in many}) == 2000
    monkeypatch.setattr(shapes, "COLOURS", {"red": (255, 0, 0)})
    monkeypatch.setattr(shapes, "SHAPES", ("circle",))
    with pytest.raises(ValueError, match="different scenes"):
        shapes.scenes(100, 0)


def test_the_command_writes_both_parts(shapes: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        sys, "argv", ["draw_shapes.py", str(tmp_path), "--train", "6", "--validation", "2", "--samples-per-shard", "4", "--size", "32"]
    )
    shapes.main()
    assert [ShardReader([tmp_path / name], size=32, seed=0).samples for name in ("train", "validation")] == [6, 2]
    with pytest.raises(SystemExit) as exit:
        shapes.main()
    assert exit.value.code == 2
