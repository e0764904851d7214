"""From pictures to shards: what is kept, what is left out and named, and that the same pictures give the same bytes."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from t2i_experts.shards.build import BuildOptions, build_shards, keys_for
from t2i_experts.shards.check import check_shards
from t2i_experts.shards.reader import ShardReader

Encode = Callable[..., bytes]


def photos(folder: Path, encode: Encode) -> Path:
    for i in range(9):
        folder.joinpath(f"{i}.jpg").parent.mkdir(parents=True, exist_ok=True)
        folder.joinpath(f"{i}.jpg").write_bytes(encode(i, (90, 60), "JPEG"))
        folder.joinpath(f"{i}.txt").write_text(f"picture {i}\nagain {i}\n")
    return folder


def test_build_read_and_check(tmp_path: Path, encode: Encode) -> None:
    told: list[tuple[int, int | None]] = []
    source = photos(tmp_path / "photos", encode)
    manifest, skipped = build_shards(source, tmp_path / "out", None, BuildOptions(4), lambda done, total: told.append((done, total)))
    assert manifest.samples == 9 and [shard.samples for shard in manifest.shards] == [4, 4, 1] and not skipped.counts
    assert told == [(i, None) for i in range(1, 10)] + [(i, 9) for i in range(10)]
    reader = ShardReader([tmp_path / "out"], size=16, seed=0)
    raw = reader.raw(5)
    assert (raw.key, raw.captions, raw.metadata) == ("5", ("picture 5", "again 5"), {"file": "5.jpg"})
    assert raw.image == (source / "5.jpg").read_bytes()
    assert not check_shards(tmp_path / "out").problems


@pytest.mark.parametrize("resize", [None, 32])
def test_workers_change_nothing(tmp_path: Path, encode: Encode, resize: int | None) -> None:
    source = photos(tmp_path / "photos", encode)
    for workers in (1, 3):
        build_shards(source, tmp_path / f"{workers}", None, BuildOptions(4, resize=resize, workers=workers))
    for path in (tmp_path / "1").iterdir():
        assert path.read_bytes() == (tmp_path / "3" / path.name).read_bytes()
    image = Image.open(io.BytesIO(ShardReader([tmp_path / "1"], size=16, seed=0).raw(0).image))
    assert image.size == ((90, 60) if resize is None else (48, 32)) and image.format == "JPEG"


def test_what_is_left_out_is_counted_and_named(tmp_path: Path, encode: Encode) -> None:
    source = photos(tmp_path / "photos", encode)
    (source / "0.jpg").write_bytes((source / "0.jpg").read_bytes()[:500])
    (source / "1.jpg").write_bytes(b"not a picture")
    (source / "2.txt").write_text(" \n\n")
    (source / "3.txt").unlink()
    (source / "4.txt").write_bytes(b"caf\xe9")
    (source / "5.png").write_bytes((source / "5.jpg").read_bytes())  # a JPEG under another name
    manifest, skipped = build_shards(source, tmp_path / "out", None, BuildOptions())
    latin = "caption file is not UTF-8; it may be Latin-1: convert it with iconv -f latin1 -t utf-8 OLD > NEW"
    assert skipped.counts == {latin: 1, "picture without a caption": 2, "picture cannot be decoded": 2}
    assert [name.split(":")[0] for name in skipped.first["picture cannot be decoded"]] == ["0.jpg", "1.jpg"]
    assert manifest.samples == 5
    assert not check_shards(tmp_path / "out").problems


def test_missing_pictures_and_blank_captions_of_a_list(tmp_path: Path, encode: Encode) -> None:
    (tmp_path / "a.png").write_bytes(encode(0))
    (tmp_path / "list.csv").write_text("file,caption,source\na.png,x,web\na.png, ,web\ngone.png,y,web\n")
    manifest, skipped = build_shards(tmp_path / "list.csv", tmp_path / "out", None, BuildOptions())
    assert manifest.samples == 1 and skipped.counts == {"blank caption": 1, "picture not found": 1}
    assert skipped.first["picture not found"] == [str(tmp_path / "gone.png")]
    assert ShardReader([tmp_path / "out"], size=8, seed=0).item(0).metadata == {"file": "a.png", "source": "web"}


def test_nothing_left_is_an_error_that_says_why(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("file,caption\na.png,x\n")
    with pytest.raises(ValueError, match=r"nothing to build .* 1 pictures listed; picture not found: 1 \(.*a\.png\)"):
        build_shards(tmp_path / "list.csv", tmp_path / "out", None, BuildOptions())
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(ValueError, match="picture cannot be decoded: 1"):
        build_shards(tmp_path / "list.csv", tmp_path / "out", None, BuildOptions())
    assert not any((tmp_path / "out").iterdir())
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="0 pictures listed; none found"):
        build_shards(tmp_path / "empty", tmp_path / "out", None, BuildOptions())


def test_bad_arguments(tmp_path: Path, encode: Encode) -> None:
    source = photos(tmp_path / "photos", encode)
    for out, images, options, message in (
        (source, None, BuildOptions(), "not empty"),
        (source / "0.jpg", None, BuildOptions(), "is a file"),
        (tmp_path / "out", tmp_path / "none", BuildOptions(), "--images .* is not a folder"),
        (tmp_path / "out", None, BuildOptions(resize=0), "--resize=0"),
        (tmp_path / "out", None, BuildOptions(samples_per_shard=0), "--samples-per-shard=0"),
        (tmp_path / "out", None, BuildOptions(workers=0), "--workers=0"),
        (tmp_path / "out", None, BuildOptions(source="xml"), "unknown source 'xml'"),
    ):
        with pytest.raises(ValueError, match=message):
            build_shards(source, out, images, options)


def test_keys_are_plain_unique_and_stable() -> None:
    names = [
        "a/b.jpg",
        "a_b.jpg",
        "a.png",
        "a.jpg",
        "白猫.jpg",
        "黑猫.jpg",
        "v1.2/x.y.jpg",
        "A.gif",
        "plain.jpg",
        "/abs/q.jpg",
        "n" * 300 + ".jpg",
    ]
    keys = keys_for(names)
    assert len(set(keys)) == len(names) == len({key.lower() for key in keys})
    assert all((key.isascii() and key.replace("_", "").replace("-", "").isalnum()) or key.startswith("_") for key in keys)
    assert all("." not in key and len(key) < 100 for key in keys)
    assert keys[8] == "plain" and keys[6] == "v1_2_x_y" and keys[9] == "abs_q"
    assert keys_for(names[::-1]) == keys[::-1]
    tricky = ["a.jpg", "a.png", f"{keys_for(['a.jpg', 'a.png'])[0]}.jpg"]
    assert len(set(keys_for(tricky))) == 3
