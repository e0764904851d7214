"""`t2i-experts shards` as a stranger uses it."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from t2i_experts.cli.app import main
from t2i_experts.cli.progress import progress_bar


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = 0
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as exit:
        code = int(exit.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    (folder / "trip").mkdir(parents=True)
    for i, name in enumerate(("a", "b", "trip/c")):
        pixels = np.random.default_rng(i).integers(0, 256, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.jpg")
        (folder / f"{name}.txt").write_text(f"picture {name}\n猫 🐈 {name}\n", encoding="utf-8")
    return folder


def test_build_check_and_show(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "data"
    code, stdout, stderr = run(capsys, "shards", "build", photos, "--out", out)
    assert code == 0 and "3 samples with 6 captions in 1 tars" in stdout and "samples/s" in stderr
    code, stdout, stderr = run(capsys, "shards", "check", out)
    assert code == 0 and "good: 3 samples" in stdout and "; hash " in stdout and "samples/s" in stderr
    code, stdout, _ = run(capsys, "shards", "show", out, 2, "--out", tmp_path / "c.jpg")
    assert code == 0 and "caption: 猫 🐈 trip/c" in stdout and "file: trip/c.jpg" in stdout
    assert (tmp_path / "c.jpg").read_bytes() == (photos / "trip/c.jpg").read_bytes()


def test_json_is_one_document_on_stdout(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (photos / "b.jpg").write_bytes(b"broken")
    code, stdout, _ = run(capsys, "shards", "build", photos, "--out", tmp_path / "data", "--json", "--resize", 16, "--samples-per-shard", 1)
    built = json.loads(stdout)
    assert code == 0 and built["samples"] == 2 and len(built["shards"]) == 2
    assert built["skipped"]["picture cannot be decoded"] == {"count": 1, "first": ["b.jpg: it is no picture of a known format"]}
    assert built["statistics"]["image_height"] == {"count": 2, "min": 16, "max": 16, "total": 32}
    code, stdout, _ = run(capsys, "shards", "check", tmp_path / "data", "--json")
    checked = json.loads(stdout)
    assert code == 0 and checked["good"] and checked["hash"] == built["hash"] and not checked["manifest_written"]
    code, stdout, _ = run(capsys, "shards", "show", tmp_path / "data", "--json")
    assert code == 0 and json.loads(stdout)["captions"] == ["picture a", "猫 🐈 a"]


def test_what_is_skipped_is_said(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (photos / "a.txt").unlink()
    code, _, stderr = run(capsys, "shards", "build", photos, "--out", tmp_path / "data", "--workers", 2)
    assert code == 0 and "skipped, picture without a caption: 1\n  a.jpg" in stderr


def test_csv_with_images_elsewhere(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "list.csv").write_text("file,caption\na.jpg,one\na.jpg,two\n")
    code, stdout, _ = run(capsys, "shards", "build", tmp_path / "list.csv", "--images", photos, "--out", tmp_path / "data")
    assert code == 0 and "1 samples with 2 captions" in stdout


def test_a_failed_check_exits_with_1(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "data"
    run(capsys, "shards", "build", photos, "--out", out)
    tar = out / "00000.tar"
    tar.write_bytes(tar.read_bytes().replace(b"picture b", b"picture x"))
    code, stdout, stderr = run(capsys, "shards", "check", out)
    assert code == 1 and "1 problem:" in stdout and f"problem: {out}/00000.tar: has sha256" in stderr
    code, stdout, _ = run(capsys, "shards", "check", out, "--json")
    assert code == 1 and not json.loads(stdout)["good"]
    code, stdout, _ = run(capsys, "shards", "check", out, "--write-manifest")
    assert code == 0 and "manifest written" in stdout
    assert run(capsys, "shards", "check", out)[0] == 0


def test_several_folders_are_checked_each_by_itself(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, zipped, none = (tmp_path / name for name in ("good", "zipped", "none"))
    run(capsys, "shards", "build", photos, "--out", good)
    zipped.mkdir()
    (zipped / "00000.tar").write_bytes(gzip.compress((good / "00000.tar").read_bytes()))

    code, stdout, stderr = run(capsys, "shards", "check", good, zipped)
    first, second = stdout.splitlines()
    assert code == 1 and first.startswith(f"{good}: good: 3 samples")
    assert second == f"{zipped}: 2 problems: no sample can be read", "no figures over nothing"
    assert f"problem: {zipped}/00000.tar: is gzip-compressed" in stderr and f"gunzip < {zipped}/00000.tar" in stderr

    code, stdout, stderr = run(capsys, "shards", "check", none, zipped, good)
    assert code == 2 and stdout.splitlines() == [second, first] and f"error: shard folder not found: {none}" in stderr

    single = json.loads(run(capsys, "shards", "check", good, "--json")[1])
    code, stdout, _ = run(capsys, "shards", "check", good, none, "--json")
    assert code == 2 and json.loads(stdout) == {
        "good": False,
        "folders": [single, {"folder": str(none), "good": False, "error": f"shard folder not found: {none}"}],
    }
    code, stdout, _ = run(capsys, "shards", "check", good, good, "--json")
    assert code == 0 and json.loads(stdout) == {"good": True, "folders": [single, single]}

    other = tmp_path / "other"
    shutil.copytree(good, other)
    (other / "manifest.json").unlink()
    (other / "manifest.json").mkdir()  # to read or write it is an OSError
    code, stdout, _ = run(capsys, "shards", "check", other, good, "--write-manifest", "--json")
    broken, fine = json.loads(stdout)["folders"]
    assert code == 1 and fine["good"] and str(other) in broken["error"]


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress])
def test_how_a_tar_is_compressed_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], compress: Callable[[bytes], bytes]) -> None:
    (tmp_path / "00000.tar").write_bytes(compress(bytes(1024)))
    name = {"gzip": "gzip", "bz2": "bzip2", "lzma": "xz"}[compress.__module__]
    assert f"00000.tar: is {name}-compressed; " in run(capsys, "shards", "check", tmp_path)[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["build", "{photos}", "--out", "{photos}"], "is not empty"),
        (["build", "{photos}/none", "--out", "{tmp}/x"], "source not found"),
        (["build", "{photos}", "--out", "{tmp}/x", "--resize", "0"], "--resize=0"),
        (["build", "{photos}", "--out", "{tmp}/x", "--kind", "folders"], "did you mean 'folder'"),
        (["build", "{photos}", "--out", "{tmp}/x", "--resize", "big"], "--resize"),
        (["check", "{tmp}/none"], "not found"),
        (["check", "{photos}"], "holds no tars"),
        (["show", "{photos}"], "shards build"),
        (["stats", "{photos}"], "shards build"),
        (["stats", "{photos}", "--config", "{tmp}/none.yaml"], "config file not found"),
        (["build", "{photos}", "--out", "{tmp}/x", "--where", "score > "], "invalid syntax"),
        (["build", "{photos}", "--out", "{tmp}/x", "--where", "score > 5"], "IMAGE.json"),
    ],
)
def test_mistakes_exit_with_2_and_one_message(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    code, stdout, stderr = run(capsys, "shards", *(argument.format(photos=photos, tmp=tmp_path) for argument in arguments))
    assert code == 2 and stdout == "" and message in stderr and "Traceback" not in stderr
    assert not (tmp_path / "x").exists()


def test_show_names_the_range(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "shards", "build", photos, "--out", tmp_path / "data")
    code, _, stderr = run(capsys, "shards", "show", tmp_path / "data", 3)
    assert code == 2 and re.search(r"INDEX=3 must lie in \[0, 3\)", stderr)


def test_help_imports_nothing_heavy() -> None:
    code = "import sys, t2i_experts.cli.shards; print([m for m in ('torch', 'numpy', 'PIL', 'tqdm') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_show_several_as_a_table_and_a_contact_sheet(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (photos / "b.json").write_text('{"caption": "\\u001b[31mred\\nand more", "note": "\\ud800"}')
    (photos / "b.txt").unlink()
    out, sheet = tmp_path / "data", tmp_path / "sheet.png"
    run(capsys, "shards", "build", photos, "--out", out)
    tar = out / "00000.tar"
    image = (photos / "trip/c.jpg").read_bytes()
    tar.write_bytes(tar.read_bytes().replace(image, bytes(len(image))))
    code, stdout, _ = run(capsys, "shards", "show", out, "--num", 10, "--sheet", sheet)
    lines = stdout.splitlines()
    assert code == 0 and len(lines) == 4 and "\x1b" not in stdout
    assert re.match(r"\s+0  a\s+40x30 +[\d,]+ +2  picture a$", lines[1])
    assert lines[2].endswith(" [31mred and more") and "cannot be read: it is no picture" in lines[3]
    with Image.open(sheet) as drawn:
        pixels = np.asarray(drawn.convert("RGB")).astype(int)
    assert pixels.shape[1] > 3 * 192
    third = pixels[: pixels.shape[0] // 2, -160:-32]
    assert third.std() < 1  # the grey square of what cannot be read
    assert pixels[: pixels.shape[0] // 2, 32:160].std() > 20
    below = pixels[200:, :192]
    assert (below < 100).any() and (below > 200).any()  # the caption
    code, stdout, _ = run(capsys, "shards", "show", out, 1, "--num", 2, "--json")
    samples = json.loads(stdout)["samples"]
    assert code == 0 and [sample["index"] for sample in samples] == [1, 2]
    assert samples[0]["captions"] == ["\x1b[31mred\nand more"] and "no picture" in samples[1]["unreadable"]
    code, stdout, _ = run(capsys, "shards", "show", out, "--num", 1)
    assert code == 0 and len(stdout.splitlines()) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--num", "0"], "--num=0"), (["--sheet", "x.jpg"], "must end in .png"), (["--num", "2", "--out", "x.jpg"], "one sample")],
)
def test_show_refuses_what_it_would_ignore(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    run(capsys, "shards", "build", photos, "--out", tmp_path / "data")
    code, stdout, stderr = run(capsys, "shards", "show", tmp_path / "data", *arguments)
    assert code == 2 and stdout == "" and message in stderr


def test_where_keeps_what_is_wanted_and_points_at_mistakes(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "list.csv").write_text("file,caption,score\na.jpg,one,0.9\nb.jpg,two,10\ntrip/c.jpg,three,\n")
    arguments = ["shards", "build", tmp_path / "list.csv", "--images", photos, "--out", tmp_path / "data"]
    code, stdout, stderr = run(capsys, *arguments, "--where", "scor > 5")
    assert code == 2 and not stdout and "the fields are: score\n  scor > 5\n  ^^^^\n" in stderr and not (tmp_path / "data").exists()
    code, stdout, stderr = run(capsys, *arguments, "--where", "score > 5", "--json")
    document = json.loads(stdout)
    assert code == 0 and document["samples"] == 1
    assert document["skipped"]["left out by --where"] == {"count": 1, "first": ["a.jpg"]}
    assert document["skipped"]["--where: no value of score"] == {"count": 1, "first": ["trip/c.jpg"]}


def test_stats(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], write_config: Callable[[str], Path]) -> None:
    run(capsys, "shards", "build", photos, "--out", tmp_path / "data")
    code, stdout, _ = run(capsys, "shards", "stats", tmp_path / "data", "--sample", 2)
    assert code == 0 and "3 samples, of which 2 drawn" in stdout and "sigma_data 0." in stdout
    assert "2 of 2 (100.0%) pictures are smaller than 64 pixels" in stdout
    code, stdout, _ = run(capsys, "shards", "stats", tmp_path / "data", "--config", write_config("run"), "--json")
    document = json.loads(stdout)
    assert code == 0 and document["size"] == 16 and document["configured_sigma_data"] == 0.5
    assert set(document["tokens"]) == {"t5", "clip_text"} and document["tokens"]["t5"]["tokens"]["count"] == 6
    code, stdout, _ = run(capsys, "shards", "stats", tmp_path / "data", "--config", write_config("run"), "--size", 8)
    assert code == 0 and "clip_text tokens" in stdout and "captions are cut off at max_tokens=24" in stdout and "8 x 8" in stdout


@pytest.mark.parametrize(("grey", "warned"), [(64, True), (0, True), (127, False)])
def test_stats_warns_where_sigma_data_is_far_off(tmp_path: Path, capsys: pytest.CaptureFixture[str], grey: int, warned: bool) -> None:
    """Halves of grey and white or black: a standard deviation of 0.75, 1 and 0.5."""
    (tmp_path / "photos").mkdir()
    pixels = np.full((64, 64, 3), 255 if grey < 127 else 0, dtype=np.uint8)
    pixels[:32] = grey
    Image.fromarray(pixels).save(tmp_path / "photos" / "a.png")
    (tmp_path / "photos" / "a.txt").write_text("grey")
    run(capsys, "shards", "build", tmp_path / "photos", "--out", tmp_path / "data")
    code, stdout, stderr = run(capsys, "shards", "stats", tmp_path / "data")
    expected = f"sigma_data {abs(float(pixels[0, 0, 0]) - float(pixels[63, 0, 0])) / 255:.4f}"
    assert code == 0 and expected in stdout and ("warning: sigma_data=0.5 is" in stderr) == warned


def test_the_bar_counts_what_this_run_does(capsys: pytest.CaptureFixture[str]) -> None:
    """Its rate begins where the interrupted build stopped, and listing has a bar of its own."""
    with progress_bar("building") as progress:
        for i in range(1, 6):
            progress(i, None)
        progress(3, 5)
        before = capsys.readouterr().err
        progress(5, 5)
    after = capsys.readouterr().err
    assert before.startswith("\rlisting: ") and re.search(r"building:  60%.* 3/5 \[00:00<\?, \? samples/s\]$", before)
    assert re.search(r"building: 100%.* 5/5 ", after) and "listing" not in after
