"""`eval fid`: the number is that of the features, whatever holds the pictures, and its record says all that made it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from t2i_experts.evaluation.features import FeatureOptions, load_features
from t2i_experts.evaluation.frechet import frechet_distance
from t2i_experts.evaluation.kid import kernel_distance

CLI = Callable[..., tuple[int, str, str]]
SETS = ("generated", "reference")
CLIP = ("--features", "open_clip", "--device", "cpu")


@pytest.fixture
def sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clip_folder: Path) -> Path:
    """Folders `a`, of three sizes, and `b`, in which one picture lies deeper; `captions`, in which a picture is missing; and `clip`, a
    network of 12 features. The working folder."""
    random = np.random.default_rng(0)
    for name, most, count in (("a", 255, 34), ("b", 180, 20)):
        for i in range(count):
            width, height = [(40, 40), (40, 40), (48, 36), (30, 70)][i % 4]
            path = tmp_path / name / ("deeper" if (name, i) == ("b", 3) else "") / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(random.integers(0, most, (height, width, 3)).astype(np.uint8)).save(path)
            path.with_suffix(".txt").write_text("a red square")
    (tmp_path / "captions").mkdir()
    for name in ("0.png", "0.txt", "1.png", "1.txt", "2.txt"):
        shutil.copy(tmp_path / "a" / name, tmp_path / "captions")
    (tmp_path / "clip").symlink_to(clip_folder)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def fid(cli: CLI, sets: Path) -> Callable[..., Any]:
    """fid(*arguments): the record."""

    def run(*arguments: object) -> Any:
        code, out, err = cli("eval", "fid", *arguments, "--json")
        assert code == 0, err
        assert out.count("\n") == 1
        return json.loads(out)

    return run


def features(folder: Path) -> torch.Tensor:
    extractor = load_features("open_clip", FeatureOptions(model="clip"), "cpu")
    images = [torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)[None] for path in sorted(folder.rglob("*.png"))]
    return torch.cat([extractor.encode(extractor.prepare(image)) for image in images])


def test_the_numbers_are_those_of_the_features_and_the_record_is_whole(fid: Callable[..., Any], sets: Path) -> None:
    a, b = features(sets / "a"), features(sets / "b")
    exact = frechet_distance(a.double().mean(0), torch.cov(a.double().T), b.double().mean(0), torch.cov(b.double().T))
    record = fid("a", "b", *CLIP, "--model", "clip", "--kid", "--precision-recall", "--infinity", "--batch", 7, "--workers", 3)
    assert record["distance"] == pytest.approx(exact, rel=1e-5)
    assert (record["kid"]["size"], record["kid"]["subsets"], record["precision_recall"]["neighbours"]) == (20, 100, 3)
    assert record["kid"]["spread"] > 0 and 0 <= record["precision_recall"]["precision"] <= 1
    assert len(record["infinity"]["distances"]) == 15 and record["infinity"]["distances"][-1] == pytest.approx(record["distance"])
    assert abs(record["kid"]["mean"] - kernel_distance(a[torch.randperm(34)], b, subsets=100).mean) < 5 * record["kid"]["spread"]
    assert (record["generated"]["count"], record["reference"]["count"], record["generated"]["kind"]) == (34, 20, "folder")
    assert record["features"]["name"] == "CLIP-FID" and len(record["features"]["sha256"]) == len(record["generated"]["sha256"]) == 64
    assert record["settings"] == {"batch": 7, "workers": 3, "processes": 1, "seed": 2020}
    assert {"torch", "pillow", "libjpeg-turbo"} <= set(record["versions"]) and record["machine"]["device"] and record["seconds"] > 0
    again = fid("a", "b", *CLIP, "--model", "clip", "--batch", 32, "--workers", 1)
    assert again["distance"] == pytest.approx(record["distance"], rel=1e-6)
    assert [again[name]["sha256"] for name in SETS] == [record[name]["sha256"] for name in SETS]


def test_shards_give_the_number_of_their_folder(fid: Callable[..., Any], cli: CLI) -> None:
    assert cli("shards", "build", "a", "--out", "shards", "--samples-per-shard", 10)[0] == 0
    one, two = (fid(a, "b", *CLIP, "--model", "clip") for a in ("a", "shards"))
    assert two["generated"]["kind"] == "shards" and two["generated"]["count"] == 34
    assert two["distance"] == pytest.approx(one["distance"], rel=1e-6)


def test_statistics_stand_for_their_pictures_and_say_how_they_were_made(fid: Callable[..., Any], cli: CLI, sets: Path) -> None:
    whole = fid("a", "b", *CLIP, "--model", "clip", "--save-stats", "a.npz")
    alone = fid("b", *CLIP, "--model", "clip", "--save-stats", "b.npz")
    assert "distance" not in alone and alone["saved"] == "b.npz" and not set(SETS) & set(alone)
    for pair in (("a", "b.npz"), ("a.npz", "b")):
        assert fid(*pair, *CLIP, "--model", "clip")["distance"] == pytest.approx(whole["distance"], rel=1e-8)
    files = fid("a.npz", "b.npz")
    assert files["distance"] == pytest.approx(whole["distance"], rel=1e-8)
    assert files["features"] == whole["features"] and files["generated"]["kind"] == "statistics" and files["generated"]["count"] == 34
    code, out, err = cli("eval", "fid", "a", "b.npz", *CLIP, "--model", "embedded:clip")
    assert (code, out) == (2, "") and "were made differently: dimension=12 and dimension=" in err
    with np.load("b.npz") as found:
        np.savez("c.npz", mu=found["mu"], sigma=found["sigma"])
    code, out, err = cli("eval", "fid", "a", "c.npz", *CLIP, "--model", "clip")
    assert code == 0 and "note: c.npz does not say how its features were made" in err
    assert f"CLIP-FID {whole['distance']:.4f}" in out and "B: c.npz: statistics, pictures unknown" in out


def test_a_sets_hash_is_that_of_names_and_bytes(fid: Callable[..., Any], sets: Path) -> None:
    def digest() -> str:
        return str(fid("b", *CLIP, "--model", "clip", "--save-stats", "b.npz")["set"]["sha256"])

    before = digest()
    shutil.copytree("b", "c")
    (sets / "b").rename("old")
    (sets / "c").rename("b")
    assert digest() == before
    for end in ("png", "txt"):
        Path(f"b/1.{end}").rename(f"b/1a.{end}")
    assert digest() != before
    for end in ("png", "txt"):
        Path(f"b/1a.{end}").rename(f"b/1.{end}")
    shutil.copy("b/2.png", "b/1.png")
    assert digest() != before


def test_pictures_that_cannot_be_read_are_listed_and_there_is_no_number(cli: CLI, sets: Path) -> None:
    Path("a/5.png").write_bytes(Path("a/5.png").read_bytes()[:60])
    for i in range(12):
        Path(f"b/x{i:02}.jpg").write_text("no picture")
    for pair, said in (
        (("a", "b"), ["1 of the 34 pictures of a cannot be read", "\n  5.png: "]),
        (("b", "a"), ["12 of the 32 pictures of b cannot be read", "\n  x00.jpg: it is no picture", "\n  x09.jpg: ", "\n  and 2 more"]),
    ):
        code, out, err = cli("eval", "fid", *pair, *CLIP, "--model", "clip", "--json")
        assert (code, out) == (2, "") and all(part in err for part in said), err
        assert "x10.jpg" not in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["a"], ["B is missing", "--save-stats"]),
        (["a", "--save-stats", "x.npz", "--kid"], ["--kid compares A with B"]),
        (["a", "b", "--save-stats", "x.pt"], ["--save-stats x.pt", ".npz"]),
        (["a", "b", "--save-stats", "nowhere/x.npz"], ["--save-stats nowhere/x.npz", "folder that exists"]),
        (["a", "captions"], ["1 of the 3 captions under captions have no picture: 2.txt;"]),
        (["a", "b", "--batch", "0"], ["--batch=0", "at least 1"]),
        (["a", "b", "--workers", "0"], ["--workers=0", "at least 1"]),
        (["a", "b", "--seed", "-1"], ["--seed=-1"]),
        (["a", "b", "--features", "incepton"], ["'incepton'", "did you mean 'inception'?", "open_clip"]),
        (["a", "b", "--device", "gpu"], ["--device='gpu'", "not to be had"]),
        (["a", "nowhere"], ["B='nowhere' is not there"]),
        (["a/1.txt", "b"], ["A='a/1.txt' is neither a folder nor an .npz file"]),
        (["clip", "b"], ["A='clip' holds 0 pictures", "at least 2", "png"]),
        (["b/deeper", "a"], ["A='b/deeper' holds 1 pictures"]),
        (["b", "a", "--infinity"], ["--infinity needs at least 30 pictures", "holds 20"]),
        (["a", "nowhere.npz"], ["statistics file not found: nowhere.npz"]),
        (["a", "b", "--features", "squeezenet"], ["needs --weights"]),
        (["a", "b", "--weights", "nowhere.pth"], ["'nowhere.pth'", "no such file"]),
    ],
    ids=" ".join,
)
def test_mistakes_are_told_in_one_line(cli: CLI, sets: Path, arguments: list[str], said: list[str]) -> None:
    code, out, err = cli("eval", "fid", *arguments)
    assert (code, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1, err
    assert all(part in err for part in said), err
    assert not list(sets.glob("x*"))


def test_statistics_alone_have_no_features(cli: CLI, sets: Path) -> None:
    np.savez("s.npz", mu=np.zeros(12), sigma=np.eye(12))
    for arguments, said in (
        (["a", "s.npz", "--kid"], "B='s.npz' holds statistics alone: --kid"),
        (["s.npz", "b", "--infinity"], "A='s.npz' holds statistics alone"),
        (["s.npz", "s.npz", "--weights", "x"], "there are statistics alone: --protocol"),
    ):
        code, out, err = cli("eval", "fid", *arguments)
        assert (code, out) == (2, "") and said in err
