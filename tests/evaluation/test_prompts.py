"""Lists of prompts: chosen by a rule that anybody can follow, written, read back, and told by their hash."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from t2i_experts.evaluation.prompts import Prompt, PromptList, choose_captions, read_ids, read_prompts


def write(path: Path, *, count: int = 40, reverse: bool = False, **others: Any) -> Path:
    """A captions file of images 1000, 1001... with one to five captions each."""
    entries = [{"id": 1000 + i, "file_name": f"val/{i:03}.jpg"} for i in range(count)]
    annotations = [
        {"image_id": 1000 + i, "caption": f' "picture", {i}\n caption {k} ', "id": 9 * k + i} for k in range(5) for i in range(count)
    ]
    annotations = [one for one in annotations if int(one["caption"].split()[-1]) <= one["image_id"] % 5]
    if reverse:
        entries.reverse()
    path.write_text(json.dumps({"images": entries, "annotations": annotations, **others}), encoding="utf-8")
    return path


def number(text: str) -> int:
    return int(hashlib.sha256(text.encode()).hexdigest(), 16)


def test_captions_are_chosen_by_the_rule_that_is_stated(tmp_path: Path) -> None:
    chosen = choose_captions(write(tmp_path / "a.json"), 12, seed=3)
    ids = sorted(range(1000, 1040), key=lambda one: number(f"3/image/{one}"))[:12]
    expected = [Prompt(f'"picture", {i - 1000} caption {number(f"3/caption/{i}") % (i % 5 + 1)}', i, f"val/{i - 1000:03}.jpg") for i in ids]
    assert list(chosen.prompts) == expected
    assert chosen.origin["file_sha256"] == hashlib.sha256((tmp_path / "a.json").read_bytes()).hexdigest()
    assert "sha256('SEED/image/ID')" in chosen.origin["rule"] and chosen.origin["caption_seed"] == 3 and chosen.origin["images"] == 40


def test_a_choice_does_not_depend_on_the_order_of_the_file_and_begins_every_longer_one(tmp_path: Path) -> None:
    one, other = write(tmp_path / "a.json"), write(tmp_path / "b.json", reverse=True)
    chosen = choose_captions(one, 12, seed=0)
    assert chosen.sha256 == choose_captions(other, 12, seed=0).sha256
    assert chosen.prompts == choose_captions(one, None, seed=0).prompts[:12]
    assert len({prompt.image_id for prompt in choose_captions(one, 40, seed=0).prompts}) == 40
    assert chosen.sha256 != choose_captions(one, 12, seed=1).sha256


def test_a_written_list_is_read_back_and_its_hash_is_that_of_the_file(tmp_path: Path) -> None:
    chosen = choose_captions(write(tmp_path / "a.json"), 12, seed=0)
    path = tmp_path / "ids.csv"
    path.write_text(chosen.csv(), encoding="utf-8", newline="")
    assert hashlib.sha256(path.read_bytes()).hexdigest() == chosen.sha256
    for captions in (None, tmp_path / "a.json"):
        again = read_ids(path, captions, 0)
        assert again.prompts == chosen.prompts and again.sha256 == chosen.sha256
    assert again.file_names == [prompt.file_name for prompt in chosen.prompts] and "rule" not in again.origin


def test_ids_may_be_numbers_that_are_written_as_text(tmp_path: Path) -> None:
    plain = json.loads(write(tmp_path / "a.json").read_text())
    for entry in plain["images"]:
        entry["id"] = f"{entry['id']:06}"
    for entry in plain["annotations"]:
        entry["image_id"] = f"{entry['image_id']:06}"
    (tmp_path / "a.json").write_text(json.dumps(plain))
    chosen = choose_captions(tmp_path / "a.json", 12, seed=0)
    (tmp_path / "ids.csv").write_text(chosen.csv(), encoding="utf-8", newline="")
    again = read_ids(tmp_path / "ids.csv", tmp_path / "a.json", 0)
    assert again.prompts == chosen.prompts and again.sha256 == chosen.sha256


@pytest.mark.parametrize(
    "text",
    [
        "image_id,id,caption\n1007,31,two dogs\n",  # id is the caption's where there is image_id
        ",case_number,prompt,evaluation_seed,coco_id\n0,1,two dogs,77,1007\n",
        "caption,file_name\ntwo dogs,007.jpg\n",
        "ID\tCaption\n000001007\ttwo  dogs\n",
    ],
)
def test_published_lists_are_completed_by_the_captions_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / ("list.tsv" if "\t" in text else "list.csv")
    path.write_text(text)
    assert list(read_ids(path, write(tmp_path / "a.json"), 0).prompts) == [Prompt("two dogs", 1007, "val/007.jpg")]


def test_ids_alone_get_the_captions_of_the_rule(tmp_path: Path) -> None:
    (tmp_path / "ids.csv").write_text("image_id\n1014\n1003\n")
    found = read_ids(tmp_path / "ids.csv", write(tmp_path / "a.json"), 5)
    chosen = {prompt.image_id: prompt for prompt in choose_captions(tmp_path / "a.json", None, 5).prompts}
    assert list(found.prompts) == [chosen[1014], chosen[1003]] and found.origin["caption_seed"] == 5


def test_prompts_without_pictures(tmp_path: Path) -> None:
    tsv, text = tmp_path / "PartiPrompts.tsv", tmp_path / "prompts.txt"
    tsv.write_text('Prompt\tCategory\tChallenge\tNote\n"Stop", says a  sign\tArtifacts\tWriting & Symbols\t\nan owl\tAnimals\tBasic\tx\n')
    assert read_prompts(tsv).prompts == (Prompt('"Stop", says a sign', category="Artifacts"), Prompt("an owl", category="Animals"))
    text.write_text("\ufeffan owl\n\n  two owls \n", encoding="utf-8")
    assert read_prompts(text).texts == ["an owl", "two owls"]
    again = tmp_path / "again.csv"
    again.write_text(read_prompts(tsv).csv())
    assert again.read_text().startswith("caption,category\n") and read_prompts(again).prompts == read_prompts(tsv).prompts
    assert read_prompts(tsv).first(1, "--num=1").texts == ['"Stop", says a sign']
    with pytest.raises(ValueError, match=r"--num=3: there are only 2 in .*tsv"):
        read_prompts(tsv).first(3, "--num=3")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.json", {"annotations": [{"id": 1, "image_id": 7, "bbox": []}]}, r"annotations\[0\]: `caption` must be text"),
        ("a.json", {"images": [{"id": 7, "file_name": "x.jpg"}], "annotations": []}, "1 of its 1 images have no caption: x.jpg"),
        ("a.json", {"images": []}, "120 captions of images that it does not list: 1000, 1001, 1002, 1003, 1004 and 35 more"),
        ("a.json", {"images": [], "annotations": []}, "lists no images"),
        ("a.json", {}, "--num=41: .*a.json has captions of only 40 images"),
        ("l.csv", "image_id,caption\n7,x\n1000,y\n", "1 of the 2 pictures of .*l.csv are not in .*a.json: 7"),
        ("l.csv", "image_id,file_name\n1000,val/001.jpg\n", "image_id 1000 is val/001.jpg there and val/000.jpg in"),
        ("l.csv", "caption\nx\n", "names no pictures"),
        ("l.csv", "width,height\n1,2\n", "line 1: no column of prompts or pictures; its columns are: width, height; known: .*image_id"),
        ("l.csv", "image_id,caption\n1000\n", "line 2: 1 cells where the header has 2"),
        ("l.csv", 'image_id,caption\n1000,"x\n', "line 2: unexpected end of data"),
        ("l.csv", "image_id,caption\n", "holds no prompt"),
    ],
)
def test_mistakes_name_the_file_and_the_place(tmp_path: Path, name: str, content: Any, said: str) -> None:
    annotations = write(tmp_path / "a.json", **(content if name == "a.json" else {}))
    with pytest.raises(ValueError, match=said):
        if name == "a.json":
            choose_captions(annotations, 41, 0)
        else:
            (tmp_path / name).write_text(content)
            read_ids(tmp_path / name, annotations, 0)


def test_a_list_without_captions_or_names_needs_the_captions_file(tmp_path: Path) -> None:
    (tmp_path / "l.csv").write_text("image_id,caption\n1000,x\n")
    with pytest.raises(ValueError, match="picture 1 has no file_name; give --annotations too"):
        read_ids(tmp_path / "l.csv", None, 0)
    assert PromptList((Prompt("x"),)).csv() == "caption\nx\n"
