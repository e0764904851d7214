"""`eval nearest`: copies are found and named, shifted ones too, and held-out pictures say what is near."""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from t2i_experts.evaluation import spaces
from tests.evaluation.test_processes import command, launched

CLI = Callable[..., tuple[int, str, str]]
CPU = ("--device", "cpu", "--workers", 1)


def smooth(random: np.random.Generator, size: int = 64) -> np.ndarray:
    """A picture of blobs, so that a shift by a pixel changes little."""
    small = Image.fromarray(random.integers(0, 256, (6, 6, 3)).astype(np.uint8))
    return np.array(small.resize((size, size), Image.Resampling.BICUBIC))


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`train`, 60 pictures of which 50 to 59 are 0 to 9 again; `real`, 40 others; `drawn`, 20: 3.png copies train's 07.png, 5.png
    shifts its 11.png by a pixel, the others are new. The working folder."""
    random = np.random.default_rng(0)
    train = [smooth(random) for _ in range(50)]
    train += train[:10]
    drawn = [smooth(random) for _ in range(20)]
    drawn[3], drawn[5] = train[7], np.roll(train[11], 1, axis=1)
    for name, pictures in (("train", train), ("real", [smooth(random) for _ in range(40)]), ("drawn", drawn)):
        (tmp_path / name).mkdir()
        for i, pixels in enumerate(pictures):
            Image.fromarray(pixels).save(tmp_path / name / f"{i:02}.png")
            (tmp_path / name / f"{i:02}.txt").write_text(f"blobs {i}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def nearest(cli: CLI, world: Path) -> Callable[..., Any]:
    """nearest(*arguments): the record."""

    def run(*arguments: object) -> Any:
        code, out, err = cli("eval", "nearest", *arguments, *CPU, "--json")
        assert code == 0, err
        return json.loads(out)

    return run


def root_mean_square(a: str, b: str) -> float:
    """At 32 px, by averages of 2 x 2 pixels."""
    first, second = (np.array(Image.open(path)).astype(float).reshape(32, 2, 32, 2, 3).mean((1, 3)) / 255 for path in (a, b))
    return float(np.sqrt(((first - second) ** 2).mean()))


def test_copies_and_shifted_copies_are_found_and_shown(nearest: Callable[..., Any], cli: CLI, world: Path) -> None:
    record = nearest("drawn", "--train", "train", "--held-out", "real", "--out", "out", "--pairs", 4)
    first, second = record["closest"][:2]
    assert (first["generated"], first["train"], first["distance"]) == ("03.png", "07.png", 0.0)  # 57.png is as near
    assert (second["generated"], second["train"]) == ("05.png", "11.png") and second["held_out_nearer"] == 0
    assert second["distance"] == pytest.approx(root_mean_square("drawn/05.png", "train/11.png"), rel=1e-5)
    assert record["copies"] == {"generated": 1, "held_out": 0} and record["below"]["count"] == 2 and record["below"]["p"] < 0.15
    assert record["below"]["threshold"] == record["distances"]["held_out"]["nearest"] and record["copying"]["p"] > 0.05
    assert [record[what]["count"] for what in ("generated", "train", "held_out")] == [20, 60, 40] and record["resolution"] == 64
    assert sum(record["histogram"]["generated"]) == 20 and sum(record["histogram"]["held_out"]) == 40
    assert record["notes"] == [] and record["record"]["command"] == "eval nearest" and record["versions"]["torch"]

    with open("out/pairs.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        distances = [root_mean_square(f"drawn/{row['generated']}", f"train/{i:02}.png") for i in range(60)]
        assert row["train"] == f"{int(np.argmin(distances)):02}.png" and float(row["distance"]) == pytest.approx(min(distances), abs=1e-6)
    assert len(rows) == 20 and json.loads(Path("out/result.json").read_text()) == record
    sheet = np.array(Image.open("out/generated.png"))
    for column in (0, 1):  # the copy and what it copies
        seen = Image.fromarray(sheet[:160, 168 * column : 168 * column + 160])
        expected = Image.open("train/07.png").resize((160, 160), Image.Resampling.NEAREST)
        assert np.array_equal(np.array(seen), np.array(expected))
    assert Image.open("out/held-out.png").width == sheet.shape[1] and Image.open("out/distances.png").height > 300

    code, out, _ = cli("eval", "nearest", "drawn", "--train", "train", *CPU)
    assert code == 0 and "1 generated pictures are at distance 0 of a training picture" in out and "C_T" not in out


def test_batches_and_what_holds_the_pictures_change_nothing(nearest: Callable[..., Any], cli: CLI, world: Path, clip_folder: Path) -> None:
    def numbers(record: Any) -> Any:
        return [record[name] for name in ("distances", "histogram", "below", "copying", "closest")]

    assert cli("shards", "build", "train", "--out", "shards", "--samples-per-shard", 25)[0] == 0
    one = nearest("drawn", "--train", "train", "--held-out", "real")
    assert numbers(nearest("drawn", "--train", "train", "--held-out", "real", "--batch", 7, "--workers", 3)) == numbers(one)
    packed = nearest("drawn", "--train", "shards", "--held-out", "real")
    assert numbers(packed)[:4] == numbers(one)[:4] and packed["train"]["kind"] == "shards"
    clip = ("--features", "open_clip", "--features-model", clip_folder)
    found = [nearest("drawn", "--train", "train", "--held-out", "real", *clip, "--batch", batch) for batch in (256, 9)]
    assert found[0]["distances"]["generated"]["median"] == pytest.approx(found[1]["distances"]["generated"]["median"], abs=1e-5)
    assert {"03.png"} == {record["closest"][0]["generated"] for record in found} and found[0]["features"]["sha256"]
    assert nearest("drawn", "--train", "train", "--features", "tiles")["closest"][0]["generated"] == "03.png"


def test_held_out_pictures_that_are_not_and_enlarged_ones_are_noted(nearest: Callable[..., Any], world: Path) -> None:
    shutil.copy("train/20.png", "real/copy.png")
    Image.open("train/30.png").resize((40, 50)).save("train/30.png")
    notes = nearest("drawn", "--train", "train", "--held-out", "real")["notes"]
    assert len(notes) == 2 and notes[0].startswith("1 held-out pictures are training pictures") and "train: pictures of 40 px" in notes[1]
    assert "without --held-out" in nearest("drawn", "--train", "train", "--resolution", 32)["notes"][0]
    assert nearest("drawn", "--train", "train", "--resolution", 32)["resolution"] == 32


def test_a_models_pictures_are_those_of_generate(nearest: Callable[..., Any], cli: CLI, world: Path, model_folder: Path) -> None:
    Path("lines.txt").write_text("a red cube\na green apple\na red cube 2\n")
    made = ("--model", model_folder, "--seed", 3, "--steps", 2, "--dtype", "float32")
    record = nearest("--prompts", "lines.txt", "--num", 3, *made, "--train", "train", "--out", "out", "--batch-size", 2)
    assert cli("generate", "--prompts", "lines.txt", *made, "--device", "cpu", "--out", "pictures")[0] == 0
    files = nearest("pictures", "--train", "train")
    assert record["resolution"] == files["resolution"] == 16 and record["generated"]["count"] == 3
    assert record["distances"]["generated"]["mean"] == pytest.approx(files["distances"]["generated"]["mean"], abs=0.01)
    assert (record["seed"], record["sampling"]["steps"], record["prompts"]["count"]) == (3, 2, 3) and record["model"]["fingerprint"]
    assert record["closest"][0]["generated"].startswith("picture ") and Image.open("out/generated.png").width > 0


def test_two_processes_say_what_one_does(nearest: Callable[..., Any], world: Path) -> None:
    arguments = ["drawn", "--train", "train", "--held-out", "real"]
    one = nearest(*arguments)
    (code, out, err), others = launched(2, command("eval", "nearest", *arguments, *map(str, CPU), "--json"), world)
    assert code == 0 and others == (0, "", ""), err
    two = json.loads(out)
    for what in ("distances", "closest", "below", "copying"):
        assert two[what] == one[what]
    for what in ("generated", "train", "held_out"):
        assert [two[what][key] for key in ("sha256", "count", "shorter_side")] == [
            one[what][key] for key in ("sha256", "count", "shorter_side")
        ]


def test_hosts_that_see_other_pictures_are_told_apart(world: Path) -> None:
    """As many on each, or the numbers of pictures would tell."""
    shutil.copytree("drawn", "elsewhere/drawn")
    first = min((world / "elsewhere/drawn").iterdir())
    first.rename(first.with_name(f"another{first.suffix}"))

    def on_its_host(rank: int) -> Any:
        os.chdir(world / "elsewhere" if rank else world)
        return command("eval", "nearest", "drawn", "--train", world / "train", *CPU)(rank)

    (code, out, err), others = launched(2, on_its_host, world)
    assert (code, out, others) == (2, "", (2, "", "")) and "the pictures of generated: processes 0 and 1 see different ones" in err


def test_a_folder_that_cannot_be_made_is_known_before_pictures_are_read(cli: CLI, world: Path) -> None:
    (world / "file").write_text("")
    next((world / "train").rglob("*.png")).write_bytes(b"no picture")
    code, _, err = cli("eval", "nearest", "drawn", "--train", "train", *CPU, "--out", "file/out")
    assert code == 2 and "--out: the folder file/out cannot be made" in err


def test_names_that_are_no_text_can_be_written(nearest: Callable[..., Any], world: Path) -> None:
    os.rename(b"drawn/03.png", b"drawn/\xff3.png")
    os.rename(b"train/07.png", b"train/\xff7.png")
    (world / "train/57.png").unlink()
    record = nearest("drawn", "--train", "train", "--out", "out")
    assert record == json.loads((world / "out/result.json").read_text())
    assert [record["closest"][0][name] for name in ("generated", "train")] == ["\\xff3.png", "\\xff7.png"]


def test_records_compare_if_training_and_held_out_pictures_are_the_same(nearest: Callable[..., Any], cli: CLI, world: Path) -> None:
    for name, generated, held_out in (("a", "drawn", "real"), ("b", "real", "real"), ("c", "drawn", "drawn")):
        Path(f"{name}.json").write_text(json.dumps(nearest(generated, "--train", "train", "--held-out", held_out)))
    code, out, err = cli("eval", "compare", "a.json", "b.json", "--json")
    assert (code, out) == (2, "") and "generated.count: 20 and 40 (C_T)" in err
    code, out, err = cli("eval", "compare", "a.json", "b.json", "--anyway", "--json")
    assert code == 0 and json.loads(out)["differences"]["share below"][0]["error"] > 0
    code, out, err = cli("eval", "compare", "a.json", "c.json")
    assert code == 2 and "held_out.sha256: " in err and "(share below, C_T)" in err and "train.sha256" not in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["drawn"], "option '--train'"),
        (["--train", "train"], "give either GENERATED, a folder of pictures, or --prompts FILE to draw them; received neither"),
        (["drawn", "--train", "train", "--prompts", "p.txt"], "received both"),
        (["drawn", "--train", "nowhere"], "--train='nowhere' is not there"),
        (["drawn", "--train", "empty"], "--train='empty' holds no pictures"),
        (["empty", "--train", "train"], "GENERATED='empty' holds no pictures"),
        (["drawn", "--train", "train", "--held-out", "drawn/00.png"], "--held-out='drawn/00.png' is no folder"),
        (["drawn", "--train", "bad"], "1 of the 2 pictures of bad cannot be read; mend them or take them away:\n  1.png: it is no picture"),
        (["bad", "--train", "train"], "1 of the 2 pictures of bad"),
        (["drawn", "--train", "train", "--steps", "3"], "--steps=3 has no meaning"),
        (["drawn", "--train", "train", "--seed", "3"], "--seed=3 has no meaning"),
        (["drawn", "--train", "train", "--pairs", "0"], "--pairs=0"),
        (["drawn", "--train", "train", "--pairs", "999"], "--pairs=999"),
        (["drawn", "--train", "train", "--resolution", "0"], "--resolution=0"),
        (["drawn", "--train", "train", "--features", "sscd"], "sscd"),
        (["drawn", "--train", "train", "--features", "pixels", "--weights", "x"], "--weights='x' does not apply"),
        (["drawn", "--train", "train", "--features", "open_clip"], "needs --features-model"),
        (["--train", "train", "--prompts", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_what_is_wrong_is_said(cli: CLI, world: Path, arguments: list[str], said: str) -> None:
    (world / "empty").mkdir()
    (world / "bad").mkdir()
    shutil.copy("train/00.png", "bad/0.png")
    (world / "bad/1.png").write_text("no picture")
    code, out, err = cli("eval", "nearest", *arguments, "--device", "cpu")
    assert (code, out) == (2, "") and said in err, err


def test_features_that_are_not_finite_name_their_picture(cli: CLI, world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = spaces._pixels

    def broken(side: int, tiles: int) -> spaces.Space:
        space = made(side, tiles)
        return replace(space, see=lambda images: space.see(images) / (images.flatten(1).float().mean(1) > 0)[:, None, None])

    Image.new("RGB", (64, 64)).save("train/33.png")
    monkeypatch.setattr(spaces, "_pixels", broken)
    code, out, err = cli("eval", "nearest", "drawn", "--train", "train", *CPU)
    assert (code, out) == (2, "") and "the features of 33.png hold NaN or infinity" in err


def test_an_unknown_space_is_told_what_there_is(cli: CLI, world: Path) -> None:
    code, _, err = cli("eval", "nearest", "drawn", "--train", "train", "--features", "pixel", *CPU)
    assert code == 2 and "allowed: " in err and "pixels, tiles" in err
