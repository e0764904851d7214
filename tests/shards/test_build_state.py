"""A build that was killed goes on, gives the bytes of one that was not, and is never mixed with another."""

from __future__ import annotations

import fcntl
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from t2i_experts.shards import build
from t2i_experts.shards.build import BuildOptions, build_shards
from t2i_experts.shards.check import check_shards
from t2i_experts.shards.format import BUILD_STATE, MANIFEST
from t2i_experts.shards.images import prepare

Encode = Callable[..., bytes]

OPTIONS = BuildOptions(samples_per_shard=3, resize=16)


class Killed(BaseException):
    """Stands for the end of the process: nothing in the package catches it."""


@pytest.fixture
def photos(tmp_path: Path, encode: Encode) -> Path:
    """14 pictures, of which 03 and 10 cannot be decoded."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(14):
        (folder / f"{i:02d}.jpg").write_bytes(b"broken" if i in (3, 10) else encode(i, (40, 30), "JPEG"))
        (folder / f"{i:02d}.txt").write_text(f"picture {i}")
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def interrupt(monkeypatch: pytest.MonkeyPatch, source: Path, out: Path, options: BuildOptions, pictures: int) -> None:
    """Builds until so many pictures have been prepared."""
    seen = 0

    def killed(data: bytes, side: int | None) -> tuple[bytes, str]:
        nonlocal seen
        seen += 1
        if seen > pictures:
            raise Killed
        return prepare(data, side)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(build, "prepare", killed)
        build_shards(source, out, None, options)


@pytest.mark.parametrize("pictures", [1, 3, 4, 9, 13])
def test_it_goes_on_and_gives_the_same_bytes(
    tmp_path: Path, photos: Path, encode: Encode, monkeypatch: pytest.MonkeyPatch, pictures: int
) -> None:
    whole, whole_skipped = build_shards(photos, tmp_path / "whole", None, OPTIONS)
    out = tmp_path / "out"
    interrupt(monkeypatch, photos, out, OPTIONS, pictures)
    complete = len(list(out.glob("*.tar")))
    assert (out / BUILD_STATE).is_file() == (complete > 0) and not (out / MANIFEST).exists()
    (out / ".00007.tar.partial").write_bytes(b"left by a kill") if complete else None
    stamps = {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    told: list[tuple[int, int | None]] = []
    manifest, skipped = build_shards(photos, out, None, replace(OPTIONS, workers=2), lambda done, total: told.append((done, total)))
    assert files(out) == files(tmp_path / "whole") and manifest == whole
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    assert skipped.first == whole_skipped.first
    building = [done for done, total in told if total is not None]
    assert building == list(range(3 * complete, 15))


def test_killed_between_the_last_tar_and_the_end(tmp_path: Path, photos: Path) -> None:
    build_shards(photos, tmp_path / "whole", None, OPTIONS)
    out = tmp_path / "out"
    script = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom t2i_experts.shards import build, writer\n"
        "writer.write_manifest = lambda folder: os.kill(os.getpid(), signal.SIGKILL)\n"
        "build.build_shards(Path(sys.argv[1]), Path(sys.argv[2]), None, build.BuildOptions(samples_per_shard=3, resize=16))\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(photos), str(out)], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (out / BUILD_STATE).is_file() and len(list(out.glob("*.tar"))) == 4
    with pytest.raises(ValueError, match="unfinished build"):
        check_shards(out, write_manifest=True)
    build_shards(photos, out, None, OPTIONS)
    assert files(out) == files(tmp_path / "whole")


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"resize": 20}, "resize was 16 and is 20 now"),
        ({"resize": None}, "resize was 16 and is None now"),
        ({"samples_per_shard": 4}, "samples-per-shard was 3 and is 4 now"),
        ({"where": "x > 1"}, "where was None and is 'x > 1' now"),
    ],
)
def test_other_arguments_are_refused_with_the_difference(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, object], difference: str
) -> None:
    interrupt(monkeypatch, photos, tmp_path / "out", OPTIONS, 5)
    before = files(tmp_path / "out")
    with pytest.raises(ValueError, match=f"not finished and had other arguments: {difference}\\. "):
        build_shards(photos, tmp_path / "out", None, replace(OPTIONS, **change))  # type: ignore[arg-type]
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match=r"source was .*photos' and is .*other' now"):
        build_shards(tmp_path / "other", tmp_path / "out", None, OPTIONS)
    assert files(tmp_path / "out") == before


def test_a_source_that_has_changed_is_refused(tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(monkeypatch, photos, tmp_path / "out", OPTIONS, 5)
    before = files(tmp_path / "out")
    (photos / "12.txt").write_text("another caption")
    with pytest.raises(ValueError, match="its source has changed since"):
        build_shards(photos, tmp_path / "out", None, OPTIONS)
    assert files(tmp_path / "out") == before


def test_a_finished_folder_and_a_damaged_state_are_left_alone(tmp_path: Path, photos: Path) -> None:
    build_shards(photos, tmp_path / "out", None, OPTIONS)
    before = files(tmp_path / "out")
    with pytest.raises(ValueError, match="holds finished shards"):
        build_shards(photos, tmp_path / "out", None, OPTIONS)
    assert files(tmp_path / "out") == before
    (tmp_path / "out" / BUILD_STATE).write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        build_shards(photos, tmp_path / "out", None, OPTIONS)


def test_a_picture_that_reads_only_the_second_time_stays_out(tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its place in the order is in a tar that is written already."""
    interrupt(monkeypatch, photos, tmp_path / "out", OPTIONS, 9)
    (photos / "03.jpg").write_bytes((photos / "04.jpg").read_bytes())
    manifest, skipped = build_shards(photos, tmp_path / "out", None, OPTIONS)
    assert manifest.samples == 12
    assert skipped.first["picture cannot be decoded"][0] == "03.jpg: it could not be read when its tar was written"


def test_two_processes_never_build_in_one_folder(tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    interrupt(monkeypatch, photos, out, OPTIONS, 5)
    with open(out / BUILD_STATE, "rb") as running:
        fcntl.flock(running, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another process"):
            build_shards(photos, out, None, OPTIONS)
    build_shards(photos, out, None, OPTIONS)
