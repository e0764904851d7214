"""Shards and loaders that are compared give the same samples, or the comparison is refused."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from t2i_experts.bench import resume, shards
from t2i_experts.bench.drawn import draw_jpegs, write_shards
from t2i_experts.bench.loader import PictureFolder
from t2i_experts.shards.reader import ShardReader


def test_pictures_are_about_as_hard_to_compress_as_photographs() -> None:
    first, second = draw_jpegs(2, 256, quality=88)
    assert 0.3 < len(first) / 256**2 < 1.0  # bytes a pixel; those of COCO have about half a byte
    assert first != second
    assert draw_jpegs(1, 256, quality=88) == [first]
    with Image.open(io.BytesIO(first)) as image:
        assert (image.size, image.mode) == ((256, 256), "RGB")
    with pytest.raises(ValueError, match="side=0"):
        draw_jpegs(1, 0, quality=88)


def test_shards_are_filled_with_copies_that_have_keys_and_captions_of_their_own(tmp_path: Path) -> None:
    jpegs = draw_jpegs(2, 16, quality=88)
    write_shards(tmp_path, jpegs, 5, samples_per_shard=3)
    reader = ShardReader([tmp_path], size=16, seed=0)
    samples = [reader.raw(i) for i in range(5)]
    assert len(list(tmp_path.glob("*.tar"))) == 2
    assert [sample.image for sample in samples] == [jpegs[i % 2] for i in range(5)]
    assert len({sample.key for sample in samples}) == len({sample.captions for sample in samples}) == 5


def test_shards_that_differ_are_not_compared(tmp_path: Path) -> None:
    for name, seed, count in (("a", 0, 4), ("b", 1, 4), ("c", 0, 3)):
        write_shards(tmp_path / name, draw_jpegs(2, 16, quality=88, seed=seed), count)
    tars = {name: [str(tmp_path / name / "00000.tar")] for name in "abc"}
    shards._refuse_difference(tmp_path / "a", tars["a"], 16)
    with pytest.raises(RuntimeError, match="sample 0"):
        shards._refuse_difference(tmp_path / "a", tars["b"], 16)
    with pytest.raises(RuntimeError, match="webdataset gives 3 samples, the reader 4"):
        shards._refuse_difference(tmp_path / "a", tars["c"], 16)


def test_the_batch_after_a_resumption_is_that_of_the_run_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shards(tmp_path, draw_jpegs(2, 16, quality=88), 10)
    resume._refuse_another_batch(tmp_path, 1000, 16, 4)
    from_beginning = resume._keys(tmp_path, 0, 16, 4, 6)
    assert resume._keys(tmp_path, 20, 16, 4, 1) == from_beginning[5:]
    honest = resume._keys
    monkeypatch.setattr(resume, "_keys", lambda folder, start, *rest: honest(folder, start % 999, *rest))
    with pytest.raises(RuntimeError, match="the batch at 1000 differs"):
        resume._refuse_another_batch(tmp_path, 1000, 16, 4)


def test_a_replay_reads_all_that_comes_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shards(tmp_path, draw_jpegs(2, 16, quality=88), 10)
    honest, read = resume._as_tensor, []

    def as_tensor(sample: Any) -> torch.Tensor:
        read.append(sample["__key__"])
        return honest(sample)

    monkeypatch.setattr(resume, "_as_tensor", as_tensor)
    assert len(resume._replayed([str(tmp_path / "00000.tar")], 4000, 4, decoded=True)) == 4
    assert len(read) >= 4004, "from the first sample on"


def test_picture_folder(tmp_path: Path) -> None:
    Image.new("RGB", (40, 20), (255, 0, 128)).save(tmp_path / "wide.png")
    picture = PictureFolder(tmp_path, 10)[0]
    assert picture.shape == (3, 10, 10)
    assert torch.allclose(picture, torch.tensor([1.0, 0.0, 128 / 255])[:, None, None].expand(3, 10, 10))
    assert len(PictureFolder(tmp_path, 10)) == 1
