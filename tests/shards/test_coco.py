"""COCO's captions files: every image with all its captions, and errors that name the entry."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from t2i_experts.shards.coco import coco_source
from t2i_experts.shards.sources import Record, Skipped


def write(path: Path, images: Any, annotations: Any) -> Path:
    path.write_text(json.dumps({"info": {}, "images": images, "annotations": annotations}), encoding="utf-8")
    return path


def test_images_with_all_their_captions(tmp_path: Path) -> None:
    images = [
        {"id": 7, "file_name": "b.jpg", "width": 640, "license": 3},
        {"id": 5, "file_name": "val/a.jpg", "width": 480},
        {"id": 6, "file_name": "val/../b.jpg"},  # the same file under another id
        {"id": 9, "file_name": "nothing.jpg"},
    ]
    annotations = [
        {"id": 1, "image_id": 5, "caption": "one"},
        {"id": 2, "image_id": 7, "caption": "猫"},
        {"id": 3, "image_id": 5, "caption": "two"},
        {"id": 4, "image_id": 6, "caption": "three"},
        {"id": 5, "image_id": 8, "caption": "of nobody"},
    ]
    skipped = Skipped()
    path = write(tmp_path / "captions.json", images, annotations)
    assert list(coco_source(path, tmp_path / "images", skipped)) == [
        Record("b.jpg", tmp_path / "images/b.jpg", ("猫", "three"), {"id": 7, "width": 640, "license": 3}),
        Record("val/a.jpg", tmp_path / "images/val/a.jpg", ("one", "two"), {"id": 5, "width": 480}),
        Record("nothing.jpg", tmp_path / "images/nothing.jpg", (), {"id": 9}),
    ]
    assert skipped.first == {"caption of an image that is not listed": ["image_id 8: of nobody"]}
    assert next(coco_source(path, None, skipped)).file == tmp_path / "b.jpg"


IMAGE = {"id": 1, "file_name": "a.jpg"}


@pytest.mark.parametrize(
    ("images", "annotations", "message"),
    [
        ({}, [], "the lists `images` and `annotations`; its fields are: info, images, annotations"),
        ([3], [], r"images\[0\] is a int, not an object"),
        ([IMAGE, {"id": 2}], [], r"images\[1\]: `file_name` must be text; its fields are: id"),
        ([{"id": 2, "file_name": " "}], [], r"`file_name` must be text; received ' '"),
        ([{"id": True, "file_name": "a"}], [], r"`id` must be a whole number or text; received True"),
        ([IMAGE, IMAGE], [], r"images\[1\]: the id 1 occurs twice"),
        ([IMAGE], [{"image_id": 1, "bbox": []}], r"annotations\[0\]: `caption` must be text; its fields are: image_id, bbox"),
        ([IMAGE], [{"image_id": [1], "caption": "x"}], r"annotations\[0\]: `image_id` must be"),
    ],
)
def test_errors_name_file_and_entry(tmp_path: Path, images: Any, annotations: Any, message: str) -> None:
    path = write(tmp_path / "x.json", images, annotations)
    with pytest.raises(ValueError, match=rf"x\.json: .*{message}"):
        list(coco_source(path, None, Skipped()))
