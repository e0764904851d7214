"""Plugins that pip installs, used through the command line in processes of their own: two examples, and the one of PLUGINS.md."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import t2i_experts
from t2i_experts.cascade.pipeline import CascadePipeline
from t2i_experts.config import load_config
from t2i_experts.evaluation.features import FeatureOptions, load_features
from t2i_experts.evaluation.metrics import load_metric
from t2i_experts.registry import Registry
from t2i_experts.training.trainer import train

ROOT = Path(t2i_experts.__file__).parents[1]
EXAMPLES = [Path(__file__).parent / "plugins" / name for name in ("t2i-example-sampling", "t2i-example-networks")]
PIP = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index", "--no-deps", "--no-build-isolation"]


def environment(*path: Path) -> dict[str, str]:
    return os.environ | {"T2I_PLUGINS": "1", "PYTHONPATH": os.pathsep.join(map(str, (ROOT, *path))), "T2I_DEBUG": "1"}


@dataclass(frozen=True)
class Installed:
    """A folder into which the examples are installed; calling it runs the command line with them on the path."""

    folder: Path

    def __call__(
        self, *arguments: object, code: int = 0, python: Sequence[str] = ("-m", "t2i_experts")
    ) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *python, *map(str, arguments)]
        done = subprocess.run(command, env=environment(self.folder), capture_output=True, text=True, timeout=120)
        assert done.returncode == code, done.stderr
        return done


@pytest.fixture(scope="module")
def t2i(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    folder = tmp_path_factory.mktemp("installed")
    done = subprocess.run([sys.executable, *PIP, "--target", folder, *EXAMPLES], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return Installed(folder)


def test_they_are_listed(t2i: Installed) -> None:
    document = json.loads(t2i("plugins", "--json").stdout)
    found = {plugin["name"]: (plugin["distribution"], plugin["version"], plugin["state"]) for plugin in document["plugins"]}
    assert found == {"sampling": ("t2i-example-sampling", "1.2.3", "ok"), "networks": ("t2i-example-networks", "0.1", "ok")}
    sources = {(kind, part["name"]): part["from"]["plugin"] for kind, parts in document["parts"].items() for part in parts if part["from"]}
    assert sources == {
        ("sampler", "at_once"): "sampling",
        ("source", "colon"): "sampling",
        ("backbone", "mixer"): "networks",
        ("codec", "pooled"): "networks",
        ("features", "brightness"): "networks",
        ("metric", "lightness"): "networks",
        ("command", "mixer"): "networks",
    }


def test_the_help_lists_their_commands_and_imports_nothing_heavy(t2i: Installed) -> None:
    program = """
import sys
import t2i_experts
assert not any(name.startswith("t2i_example") for name in sys.modules)
from t2i_experts.cli.app import main
try:
    main(["--help"])
finally:
    assert "t2i_example_sampling" in sys.modules
    heavy = {"torch", "numpy", "PIL", "transformers", "omegaconf", "t2i_example_networks.mixer", "t2i_example_networks.command"}
    assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""
    done = t2i(python=("-c", program))
    assert re.search(r"^  mixer +What a mixer is\.$", done.stdout, re.M)
    assert done.stderr == ""


def test_their_commands_run(t2i: Installed) -> None:
    assert t2i("mixer", "parameters", 10).stdout == "910\n"
    assert "Count the parameters" in t2i("mixer", "--help").stdout
    assert "error: CHANNELS=0 must be positive" in t2i("mixer", "parameters", 0, code=2).stderr


def test_shards_are_built_from_their_source(t2i: Installed, tmp_path: Path) -> None:
    for name, colour in (("a.png", "red"), ("b.png", "green")):
        Image.new("RGB", (8, 8), colour).save(tmp_path / name)
    (tmp_path / "list.captions").write_text("a.png: all red\nnothing\nb.png: all: green\n")
    done = t2i("shards", "build", tmp_path / "list.captions", "--kind", "colon", "--out", tmp_path / "data", "--workers", 1, "--json")
    built = json.loads(done.stdout)
    assert (built["samples"], built["captions"]) == (2, 2)
    assert built["skipped"] == {"line without a caption": {"count": 1, "first": ["nothing"]}}
    shown = t2i("shards", "show", tmp_path / "data", 1, "--json")
    assert json.loads(shown.stdout)["captions"] == ["all: green"]


def test_pictures_are_compared_by_their_features(t2i: Installed, tmp_path: Path) -> None:
    for folder, colours in (("dark", ("#000000", "#202020")), ("light", ("#404040", "#606060"))):
        (tmp_path / folder).mkdir()
        for i, colour in enumerate(colours):
            Image.new("RGB", (8 + i, 8), colour).save(tmp_path / folder / f"{i}.png")
    done = t2i("eval", "fid", tmp_path / "dark", tmp_path / "light", "--features", "brightness", "--device", "cpu", "--json")
    record = json.loads(done.stdout)
    assert record["distance"] == pytest.approx(64**2)
    assert record["features"]["name"] == "brightness distance"
    wrong = t2i("eval", "fid", tmp_path / "dark", tmp_path / "light", "--features", "brightness", "--weights", "x", code=2)
    assert "--weights='x' does not apply to --features brightness; it has no options" in wrong.stderr


def test_pictures_with_captions_are_measured_by_their_metric(t2i: Installed, tmp_path: Path) -> None:
    for name, colour in (("bright", "#ffffff"), ("dark", "#333333"), ("grey", "#666666")):
        Image.new("RGB", (8, 8), colour).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(f"a {name} wall")
    done = t2i("eval", "score", tmp_path, "--metric", "lightness", "word=bright", "--device", "cpu", "--json")
    record = json.loads(done.stdout)
    assert record["mean"] == pytest.approx((1 + 0.8 + 0.6) / 3) and record["error"] == pytest.approx(0.2 / 3**0.5)
    assert record["metric"] == {"name": "lightness", "metric": "lightness", "word": "bright"} and record["count"] == 3


@pytest.mark.slow
def test_a_model_with_their_backbone_and_codec_is_trained_and_drawn_with_their_sampler(
    t2i: Installed, write_config: Callable[[str], Path], tmp_path: Path
) -> None:
    """By two processes with loader workers, and from the model folder alone: it names the backbone with its options, and the codec."""
    config = write_config("run")
    text = config.read_text()
    network = re.compile(r"  network: .*?(?=  encoders:)", re.S)
    config.write_text(network.sub("  network: {backbone: mixer, options: {channels: 6}}\n", text))
    few = ("training.images=16", "training.preview.every_images=16", "training.preview.prompts=[a]", "training.validation.every_images=16")
    two = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "t2i_experts")
    codec = ("stage.codec.kind=pooled", "stage.codec.factor=2")
    t2i("train", config, *few, *codec, "data.workers=1", "sampling.sampler=at_once", "--quiet", python=two)
    model = tmp_path / "run" / "model"
    stage = json.loads((model / "base64" / "config.json").read_text())
    assert stage["_class_name"] == "mixer"
    assert stage["network"]["options"] == {"channels": 6}
    assert (stage["codec"]["kind"], stage["codec"]["factor"]) == ("pooled", 2)
    drawn = t2i("generate", "a red cube", "--model", model, "--device", "cpu", "--out", tmp_path / "cube.png", "--json")
    assert json.loads(drawn.stdout)["sampling"]["sampler"] == "at_once"
    assert Image.open(tmp_path / "cube.png").size == (16, 16)


# The page


def code_blocks(page: str) -> tuple[dict[str, str], str]:
    """The files of the page, each of which is named at the beginning of the paragraph before it, and its shell commands."""
    files = dict(re.findall(r"^`([\w./-]+)`[^\n]*\n(?:[^\n]+\n)*\n```(?:toml|python)\n(.*?)^```", page, re.M | re.S))
    (commands,) = re.findall(r"^```bash\n(.*?)^```", page, re.M | re.S)
    return files, commands


@pytest.mark.slow
def test_the_page_tells_the_truth(model_folder: Path, tmp_path: Path) -> None:
    """Its files and its commands as they are written; `pip` and `t2i-experts` on the path are this interpreter's."""
    files, commands = code_blocks((ROOT / "t2i_experts" / "PLUGINS.md").read_text(encoding="utf-8"))
    assert sorted(files) == ["t2i-midpoint/pyproject.toml", "t2i-midpoint/t2i_midpoint.py"]
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert len(files["t2i-midpoint/t2i_midpoint.py"].splitlines()) < 60
    installed, programs = tmp_path / "installed", tmp_path / "programs"
    programs.mkdir()
    pip = [sys.executable, *PIP[:2], '"$@"', *PIP[3:], "--target", str(installed)]
    for name, command in {"pip": pip, "t2i-experts": [sys.executable, "-m", "t2i_experts", '"$@"']}.items():
        (programs / name).write_text(f"#!/bin/sh\nexec {' '.join(command)}\n")
        (programs / name).chmod(0o755)
    (tmp_path / "runs" / "photos").mkdir(parents=True)
    (tmp_path / "runs" / "photos" / "model").symlink_to(model_folder)
    variables: dict[str, Any] = environment(installed)
    variables["PATH"] = f"{programs}{os.pathsep}{variables['PATH']}"
    done = subprocess.run(["bash", "-ec", commands], cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "'midpoint' (t2i-midpoint 1.0): ok, adds sampler midpoint, command sigmas"
    start = lines.index("80.000")
    levels = [float(line) for line in lines[start : start + 5]]
    assert levels == sorted(levels, reverse=True)
    assert levels[-2:] == [0.002, 0]
    assert lines[start + 5 :] == ["apple.png"]
    assert Image.open(tmp_path / "apple.png").size == (16, 16)


def test_the_codec_of_the_page_trains_and_draws(
    write_config: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (ROOT / "t2i_experts" / "PLUGINS.md").read_text(encoding="utf-8")
    (block,) = (text for text in re.findall(r"^```python\n(.*?)^```", page, re.M | re.S) if "class FoldCodec" in text)
    (settings,) = (text for text in re.findall(r"^```yaml\n(.*?)^```", page, re.M | re.S) if "fold" in text)
    registry, names = Registry(plugins=()), dict[str, Any]()
    exec(block, names)
    names["register"](registry)
    monkeypatch.setattr("t2i_experts.cascade.codec.registry", registry)
    config = write_config("run")
    config.write_text(config.read_text().replace("stage:\n", settings))
    model = train(load_config(config, ["training.images=16", "training.preview.every_images=16"]), progress=False)
    pipeline = CascadePipeline.from_pretrained(model, device="cpu")
    assert pipeline("a red cube").shape == (1, 3, 16, 16) and pipeline.base.noise_shape == (12, 8, 8)
    images = torch.rand(2, 3, 16, 16)
    codec = pipeline.base.codec
    assert torch.equal(codec.decode(codec.encode(images)), images)


def test_the_features_of_the_page_compare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "t2i_experts" / "PLUGINS.md").read_text(encoding="utf-8")
    (block,) = (text for text in re.findall(r"^```python\n(.*?)^```", page, re.M | re.S) if "class ColourFeatures" in text)
    registry, names = Registry(plugins=()), dict[str, Any]()
    exec(block, names)
    names["register"](registry)
    monkeypatch.setattr("t2i_experts.evaluation.features.registry", registry)
    extractor = load_features("colours", FeatureOptions(), "cpu")
    images = torch.arange(2 * 3 * 6 * 4, dtype=torch.uint8).view(2, 3, 6, 4)
    features = extractor.encode(extractor.prepare(images))
    assert features.shape == (2, extractor.dimension)
    assert features[0, 0] == images[0, 0, :3, :2].float().mean()
    with pytest.raises(ValueError, match="--weights='x' does not apply"):
        load_features("colours", FeatureOptions(weights="x"), "cpu")


def test_the_metric_of_the_page_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "t2i_experts" / "PLUGINS.md").read_text(encoding="utf-8")
    (block,) = (text for text in re.findall(r"^```python\n(.*?)^```", page, re.M | re.S) if "class ColourMetric" in text)
    registry, names = Registry(plugins=()), dict[str, Any]()
    exec(block, names)
    names["register"](registry)
    monkeypatch.setattr("t2i_experts.evaluation.metrics.registry", registry)
    metric = load_metric("colour", {"green": "lawn"}, "cpu")
    images = torch.tensor([[200, 100, 0], [0, 50, 0], [0, 9, 200]], dtype=torch.uint8)[:, :, None, None].expand(-1, -1, 6, 4)
    captions = ["a red sky", "the lawn", "blue and red"]
    assert metric.values(metric.prepare(images), captions).tolist() == pytest.approx([200 / 300, 1, 100 / 209])
    assert metric.cut(captions) == [0, 0, 0]
    with pytest.raises(ValueError, match="pink='x' is no option of the metric colour; it has red, green, blue"):
        load_metric("colour", {"pink": "x"}, "cpu")
