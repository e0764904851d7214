"""`eval compare`: what compares is compared with its noise, and what does not is refused by the name of the field."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from t2i_experts.evaluation.records import made_by

CLI = Callable[..., tuple[int, str, str]]
CLIP = ("--model", "clip", "--device", "cpu", "--json")
FID = ("--features", "open_clip", *CLIP)
COUNT = 12


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clip_folder: Path) -> Path:
    """`a`, `b` and `real`: twelve pictures of the same captions each, b's those of a with more noise. The working folder."""
    random = np.random.default_rng(0)
    base = random.integers(0, 200, (COUNT, 32, 32, 3))
    for name, noise in (("a", 2), ("b", 50), ("real", 200)):
        (tmp_path / name).mkdir()
        for i in range(COUNT):
            pixels = base[i] + random.integers(0, noise, base[i].shape)
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(tmp_path / name / f"{i:02}.png")
            (tmp_path / name / f"{i:02}.txt").write_text(f"a red apple {i}")
    (tmp_path / "clip").symlink_to(clip_folder)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def kept(cli: CLI, folder: Path) -> Callable[..., Any]:
    """kept(NAME, *arguments): the record that a command of eval prints, written to NAME."""

    def run(name: str, *arguments: object) -> Any:
        code, out, err = cli("eval", *arguments)
        assert code == 0, err
        Path(name).write_text(out, encoding="utf-8")
        return json.loads(out)

    return run


def changed(source: str, target: str, *keys: str, to: Any) -> None:
    """A record with another value somewhere; None takes the field away."""
    record = json.loads(Path(source).read_text())
    *above, last = keys
    inner = record
    for key in above:
        inner = inner[key]
    assert last in inner
    if to is None:
        del inner[last]
    else:
        inner[last] = to
    Path(target).write_text(json.dumps(record))


def test_distances_against_one_reference_compare_and_what_differs_is_told(kept: Callable[..., Any], cli: CLI) -> None:
    a = kept("a.json", "fid", "a", "real", *FID, "--kid", "--precision-recall", "--workers", 1)
    b = kept("b.json", "fid", "b", "real", *FID, "--precision-recall", "--workers", 2)
    code, out, err = cli("eval", "compare", "a.json", "b.json", "a.json", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["record"] == {"command": "eval compare", "version": 1} and found["obstacles"] == []
    assert [one["value"] for one in found["numbers"]["CLIP-FID"]] == [a["distance"], b["distance"], a["distance"]]
    assert found["differences"]["CLIP-FID"][0]["value"] == b["distance"] - a["distance"]
    assert found["differences"]["CLIP-FID"][0]["error"] is None and found["differences"]["CLIP-FID"][0]["within_noise"] is None
    assert found["numbers"]["KID"][1] is None and found["differences"]["KID"][0] is None
    assert found["differs"] == {"settings.workers": [1, 2, 1]}
    code, out, _ = cli("eval", "compare", "a.json", "b.json")
    row = next(line for line in out.splitlines() if line.startswith("CLIP-FID"))
    assert row.split() == ["CLIP-FID", f"{a['distance']:.4f}", f"{b['distance']:.4f}", f"{b['distance'] - a['distance']:+.4f}"]
    assert "noise" not in out


@pytest.mark.parametrize(
    ("keys", "to", "said"),
    [
        (("features", "sha256"), "0" * 64, "features.sha256: "),
        (("features", "resize"), "clean", "features.resize: 'bicubic, antialiased, centre crop' and 'clean'"),
        (("features", "protocol"), "tf1", "features.protocol: not known and 'tf1'"),
        (("features",), None, "is not a whole record of eval fid"),
        (("reference", "sha256"), "1" * 64, "reference.sha256: "),
        (("reference", "count"), 11, "reference.count: 12 and 11 (CLIP-FID)"),
        (("generated", "count"), 30000, "generated.count: 12 and 30000 (CLIP-FID)"),
        (("pictures",), "upside down", "pictures: "),
        (("distance",), None, "holds no number"),
        (("record",), None, "b.json is no record of eval fid, eval coco"),
        (("record", "version"), 9, "its record.version is 9"),
        (("features", "name"), "FID", "no number in common: a.json has CLIP-FID; b.json has FID"),
    ],
)
def test_what_does_not_compare_is_refused_by_name(
    kept: Callable[..., Any], cli: CLI, keys: tuple[str, ...], to: Any, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = kept("a.json", "fid", "a", "real", *FID)
    record["features"]["resize"], record["features"]["protocol"] = "bicubic, antialiased, centre crop", ""
    Path("a.json").write_text(json.dumps(record))
    changed("a.json", "b.json", *keys, to=to)
    if keys[-1] == "protocol":
        changed("a.json", "a.json", *keys, to=None)
    code, out, err = cli("eval", "compare", "a.json", "b.json", "--json")
    assert (code, out) == (2, "") and said in err, err
    code, out, err = cli("eval", "compare", "a.json", "b.json", "--anyway")
    if keys[-1] in ("distance", "record", "version", "name") or keys == ("features",):
        assert code == 2
    else:
        assert code == 0 and f"A and B do not compare: {said}" in err and "CLIP-FID" in out


def test_a_few_claims_that_all_change_are_no_certainty(cli: CLI, folder: Path) -> None:
    """Picture by picture the differences do not scatter; the errors of both scores remain, which count how few there are."""
    for name, right in (("a", False), ("b", True)):
        record = {
            **made_by("eval judge"),
            "scores": {"count": {"right": float(right), "standard_error": 0.3}},
            "judge": {"fingerprint": "f"},
            "prompts": {"sha256": "p"},
            "num": 3,
            "pictures": [{"claims": [["count", "owl", "2", right]]} for _ in range(3)],
        }
        Path(f"{name}.json").write_text(json.dumps(record))
    found = json.loads(cli("eval", "compare", "a.json", "b.json", "--json")[1])["differences"]["count"][0]
    assert found["value"] == 1.0 and not found["paired"] and found["error"] == pytest.approx(0.3 * 2**0.5)


def test_an_extrapolated_distance_has_no_verdict(kept: Callable[..., Any], cli: CLI) -> None:
    """Its error is that of a line through subsets of the same pictures: other pictures would move it by more."""
    record = kept("a.json", "fid", "a", "real", *FID)
    for name, value in (("a", 3.0), ("b", 2.0)):
        record["infinity"] = {"value": value, "error": 0.01, "counts": [6, 12], "distances": [1.0, 1.0]}
        Path(f"{name}.json").write_text(json.dumps(record))
    found = json.loads(cli("eval", "compare", "a.json", "b.json", "--json")[1])["differences"]["CLIP-FID infinity"][0]
    assert (found["value"], found["error"], found["within_noise"]) == (-1.0, None, None)


def test_pictures_of_one_name_in_two_tars_are_not_paired(kept: Callable[..., Any], cli: CLI) -> None:
    for name in "ab":
        record = kept(f"{name}.json", "clip", name, *CLIP, "--values", f"{name}.csv")
        lines = Path(f"{name}.csv").read_text().splitlines()
        lines[2] = lines[1].split(",")[0] + "," + lines[2].split(",")[1]
        Path(f"{name}.csv").write_text("\n".join(lines) + "\n")
        record["values"]["sha256"] = hashlib.sha256(Path(f"{name}.csv").read_bytes()).hexdigest()
        Path(f"{name}.json").write_text(json.dumps(record))
    found = json.loads(cli("eval", "compare", "a.json", "b.json", "--json")[1])["differences"]["CLIP score"][0]
    assert not found["paired"]


def test_statistics_compare_with_the_pictures_that_they_are_of(kept: Callable[..., Any], cli: CLI) -> None:
    a = kept("a.json", "fid", "a", "real", *FID)
    for name, pictures in (("real", "real"), ("other", "b")):
        kept("saved.json", "fid", pictures, *FID, "--save-stats", f"{name}.npz")
    b = kept("b.json", "fid", "b", "real.npz", *FID)
    assert b["reference"]["of"] == {"sha256": a["reference"]["sha256"]} and b["reference"]["sha256"] != a["reference"]["sha256"]
    code, out, err = cli("eval", "compare", "a.json", "b.json", "--json")
    assert code == 0 and json.loads(out)["obstacles"] == [], err
    kept("saved.json", "fid", "real.npz", "--save-stats", "again.npz", "--json")
    assert kept("again.json", "fid", "b", "again.npz", *FID)["reference"]["of"] == b["reference"]["of"]
    kept("c.json", "fid", "b", "other.npz", *FID)
    code, _, err = cli("eval", "compare", "a.json", "c.json")
    assert code == 2 and "reference.sha256: " in err
    squares = {**b["reference"], "of": {**b["reference"]["of"], "resolution": 64}}  # as `eval coco` saw the same pictures
    changed("b.json", "d.json", "reference", to=squares)
    code, _, err = cli("eval", "compare", "a.json", "d.json")
    assert code == 2 and "reference.resolution: not known and 64" in err
    with np.load("real.npz") as arrays:  # one of another program, which does not say
        np.savez("bare.npz", mu=arrays["mu"], sigma=arrays["sigma"])
    for name in ("e", "f"):
        kept(f"{name}.json", "fid", "a", "bare.npz", *FID)
    assert cli("eval", "compare", "e.json", "f.json")[0] == 0 and cli("eval", "compare", "a.json", "e.json")[0] == 2


def test_scores_of_the_same_captions_are_compared_picture_by_picture(kept: Callable[..., Any], cli: CLI) -> None:
    for name in "ab":
        kept(f"{name}.json", "clip", name, *CLIP, "--values", f"{name}.csv")

    def difference() -> Any:
        code, out, err = cli("eval", "compare", "a.json", "b.json", "--json")
        assert code == 0, err
        return json.loads(out)["differences"]["CLIP score"][0]

    a, b = (np.loadtxt(f"{name}.csv", delimiter=",", skiprows=1, usecols=1) for name in "ab")
    found = difference()
    assert found["paired"] and found["value"] == pytest.approx((b - a).mean())
    assert found["error"] == pytest.approx((b - a).std(ddof=1) / COUNT**0.5)
    assert found["within_noise"] == (abs((b - a).mean()) <= 2 * found["error"])
    text = Path("b.csv").read_text()
    Path("b.csv").write_text(text + "99.png,1.0\n")  # no longer the file that the record tells of
    apart = difference()
    expected = np.hypot(a.std(ddof=1), b.std(ddof=1)) / COUNT**0.5
    assert not apart["paired"] and apart["error"] == pytest.approx(expected) and apart["value"] == found["value"]
    Path("b.csv").write_text(text)
    Path("elsewhere").mkdir()
    for name in ("b.json", "b.csv"):  # together, they may move
        shutil.move(name, f"elsewhere/{name}")
    code, out, _ = cli("eval", "compare", "a.json", "elsewhere/b.json")
    assert code == 0 and f"{found['value']:+.4f} +- {found['error']:.4f} (paired" in out
    Path("b/03.txt").write_text("another caption")
    kept("b.json", "clip", "b", *CLIP)
    code, out, err = cli("eval", "compare", "a.json", "b.json", "--json")
    assert (code, out) == (2, "") and "captions.sha256: " in err and "(CLIP score)" in err
    code, out, err = cli("eval", "compare", "a.json", "b.json", "--anyway", "--json")
    assert code == 0 and json.loads(out)["differences"]["CLIP score"][0]["within_noise"] is None
    assert [one["field"] for one in json.loads(out)["obstacles"]] == ["captions.sha256"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["a.json"], "received 1 records"),
        (["a.json", "nowhere.json"], "nowhere.json is not there"),
        (["a.json", "list.json"], "list.json holds no JSON object"),
        (["a.json", "a/00.png"], "a/00.png cannot be read"),
        (["a.json", "odd.json"], "odd.json is no record of eval fid, eval coco"),
    ],
)
def test_what_is_no_record_is_an_error(kept: Callable[..., Any], cli: CLI, arguments: list[str], said: str) -> None:
    kept("a.json", "clip", "a", *CLIP)
    Path("list.json").write_text("[]")
    Path("odd.json").write_text('{"record": {"command": ["x"]}}')
    code, out, err = cli("eval", "compare", *arguments)
    assert (code, out) == (2, "") and said in err


def test_values_go_into_a_csv(cli: CLI, folder: Path) -> None:
    for bad in ("values.txt", "nowhere/values.csv"):
        code, _, err = cli("eval", "clip", "a", *CLIP, "--values", bad)
        assert code == 2 and f"--values {bad}" in err
