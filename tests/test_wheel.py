"""A wheel of this project, installed elsewhere, lists and copies its configs, builds shards, trains and draws without the repository."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

ROOT = Path(__file__).parents[1]

COMMAND = """
import sys
from t2i_experts.cli.app import main

site = sys.argv.pop(1)
try:
    main(sys.argv[1:])
finally:
    ours = {name: module.__file__ for name, module in sys.modules.items() if name.split(".")[0] == "t2i_experts"}
    elsewhere = {name: file for name, file in ours.items() if not file.startswith(site)}
    assert not elsewhere, f"not out of the wheel: {elsewhere}"
"""


def run(*command: object, cwd: Path, site: Path | None = None) -> str:
    """What a command prints, in a process that finds packages in `site` before those of this environment."""
    environment = os.environ | {"PIP_USER": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PYTHONPATH": str(site or "")}
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def t2i(site: Path, cwd: Path, *arguments: object) -> str:
    """`t2i-experts ARGUMENTS` out of the wheel, and out of nowhere else."""
    return run(sys.executable, "-c", COMMAND, site, *arguments, cwd=cwd, site=site)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that a wheel, built now, is installed into."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip")
    run(*pip, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder, ROOT, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    run(*pip, "install", "--quiet", "--no-deps", "--no-index", "--no-compile", "--target", folder / "site", wheel, cwd=folder)
    return folder / "site"


@pytest.fixture(scope="module")
def shards(site: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards that the wheel built of a dozen drawn pictures with captions."""
    folder = tmp_path_factory.mktemp("shards")
    (folder / "drawn").mkdir()
    for i in range(12):
        colour = ("red", "green", "blue")[i % 3]
        picture = Image.new("RGB", (64, 64), "white")
        ImageDraw.Draw(picture).ellipse((8, 8, 24 + 3 * i, 24 + 3 * i), fill=colour)
        picture.save(folder / "drawn" / f"{i}.png")
        (folder / "drawn" / f"{i}.txt").write_text(f"a {colour} circle\n", encoding="utf-8")
    report = json.loads(t2i(site, folder, "shards", "build", "drawn", "--out", "circles", "--json"))
    assert (report["samples"], report["captions"], report["skipped"]) == (12, 12, {})
    return folder / "circles"


def test_the_command_of_the_wheel_lists_every_config_of_the_repository(site: Path, tmp_path: Path) -> None:
    listed = json.loads(run(site / "bin" / "t2i-experts", "config", "list", "--json", cwd=tmp_path, site=site))
    configs = ROOT / "configs"
    assert set(listed) == {path.relative_to(configs).with_suffix("").as_posix() for path in configs.rglob("*.yaml")}
    assert t2i(site, tmp_path, "config", "check", "tiny/photos") == "tiny/photos: OK\n"


def test_a_copied_config_is_the_one_that_is_then_meant(site: Path, tmp_path: Path) -> None:
    assert t2i(site, tmp_path, "config", "copy", "tiny/base64") == "tiny/base64.yaml\n"
    copy = tmp_path / "tiny" / "base64.yaml"
    assert copy.read_bytes() == (ROOT / "configs" / "tiny" / "base64.yaml").read_bytes()
    copy.write_text(copy.read_text(encoding="utf-8").replace("images: 8000", "images: 16"), encoding="utf-8")
    shown = json.loads(t2i(site, tmp_path, "config", "show", "tiny/base64", "--json"))
    assert shown["training.images"] == {"value": 16, "origin": "tiny/base64.yaml"}


@pytest.mark.slow
def test_a_shipped_config_trains_on_built_shards_and_its_model_draws(site: Path, shards: Path, tmp_path: Path) -> None:
    overrides = [f"data.train=[{shards}]", "data.validation=null", "data.workers=0", "output=run"]
    overrides += ["training.images=12", "training.batch_size=4", "training.device=cpu"]
    overrides += ["training.preview.every_images=0", "training.validation.every_images=0"]
    t2i(site, tmp_path, "train", "tiny/base64", *overrides, "--quiet")
    drawn = t2i(
        site, tmp_path, "generate", "a red circle", "--model", "run/model", "--steps", 2, "--device", "cpu", "--out", "x.png", "--json"
    )
    assert json.loads(drawn)["model"]["source"] == "run/model"
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.size == (64, 64)
