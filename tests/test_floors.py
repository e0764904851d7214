"""The building's statics: lower floors never import higher ones, rooms of one floor never import each other, and every
third-party package enters through its own doors. Imports inside functions count as much as those at the top."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = "t2i_experts"
ROOT = Path(__file__).parents[1]

FLOORS = {
    "types": 0,
    "config": 0,
    "registry": 0,
    "charts": 0,
    "nn": 1,
    "diffusion": 2,
    "conditioning": 2,
    "paint": 2,
    "shards": 2,
    "experts": 3,
    "cascade": 4,
    "training": 5,
    "evaluation": 5,
    "bench": 6,
    "cli": 7,
    "ui": 7,
    "__main__": 8,
}

EVERYWHERE = {"numpy", "torch", "tqdm"}

DOORS = {
    "PIL": ("bench", "charts", "shards", "paint", "cascade.picture", "cli"),
    "accelerate": ("bench", "training", "evaluation"),
    "braceexpand": ("shards.urls",),
    "diffusers": ("bench.baseline", "cascade.autoencoder_kl", "cascade.interop"),
    "fsspec": ("shards.urls",),
    "ftfy": ("conditioning.spans",),
    "gradio": ("ui",),
    "huggingface_hub": ("cascade.autoencoder_kl", "cascade.model_folder", "conditioning", "evaluation.weights", "training.state"),
    "omegaconf": ("config.files",),
    "open_clip": ("conditioning.blank", "conditioning.clip", "conditioning.presence", "evaluation.features", "evaluation.clip_score"),
    "pyarrow": ("shards.parquet",),
    "safetensors": (
        "conditioning",
        "cascade.weights",
        "experts.lowrank_file",
        "evaluation.judge",
        "evaluation.weights",
        "training.state",
        "training.posthoc",
    ),
    "sentencepiece": ("conditioning.t5",),
    "transformers": ("conditioning.blank", "conditioning.t5", "cascade.interop"),
    "typer": ("cli",),
    "wandb": ("training.trackers",),
    "webdataset": ("bench", "shards.urls"),
}

DISTRIBUTIONS = {"PIL": "pillow", "open_clip": "open-clip-torch", "huggingface_hub": "huggingface-hub"}


def imported_modules(source: str, module: str, is_package: bool) -> Iterator[str]:
    """Dotted names of all that the source imports, relative imports and `import_module("literal")` resolved."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=origin, names=names, level=level):
                parts = module.split(".")
                parents = parts[: len(parts) - level + is_package] if level else []
                base = ".".join([*parents, *([origin] if origin else [])])
                yield from (f"{base}.{alias.name}" for alias in names)
            case ast.Call(
                func=ast.Attribute(attr="import_module") | ast.Name(id="import_module" | "__import__"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                yield name


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    """What is wrong with the imports of one module, in words."""
    room = module.split(".")[1] if "." in module else ""
    inside = module.partition(".")[2]
    found = []
    for name in imported_modules(source, module, is_package):
        top, *rest = name.split(".")
        if top == PACKAGE:
            other = rest[0] if rest else ""
            if other not in FLOORS or other == room:  # the package's own names, such as __version__
                continue
            if room not in FLOORS:
                found.append(f"{module} imports {name}: {room or 'the package itself'} stands on no floor and may import nothing of ours")
            elif FLOORS[other] > FLOORS[room]:
                found.append(f"{module} (floor {FLOORS[room]}) imports {name} (floor {FLOORS[other]})")
            elif FLOORS[other] == FLOORS[room]:
                found.append(f"{module} imports {name}, another room of its floor {FLOORS[room]}")
        elif top in DOORS:
            if not any(inside == door or inside.startswith(f"{door}.") for door in DOORS[top]):
                found.append(f"{module} imports {top}, whose doors are {', '.join(DOORS[top])}")
        elif top not in sys.stdlib_module_names and top not in EVERYWHERE:
            found.append(f"{module} imports {top}, which has no door: give it one in {Path(__file__).name}")
    return found


def modules() -> Iterator[tuple[str, bool, str]]:
    """Name, whether it is a package, and source of every module."""
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        yield ".".join(parts[:-1] if is_package else parts), is_package, path.read_text(encoding="utf-8")


def test_the_package_keeps_its_floors_and_doors() -> None:
    found = [line for name, is_package, source in modules() for line in violations(source, name, is_package)]
    assert not found, "\n".join(found)


def test_every_room_stands_on_a_floor() -> None:
    rooms = {name.split(".")[1] for name, _, _ in modules() if "." in name}
    assert rooms <= set(FLOORS), f"give these a floor: {sorted(rooms - set(FLOORS))}"


def test_every_third_party_package_is_a_declared_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    required = project["dependencies"] + [line for extra in project["optional-dependencies"].values() for line in extra]
    declared = {re.split(r"[<>=!~\[; ]", line)[0] for line in required}
    tops = {name.split(".")[0] for module, is_package, source in modules() for name in imported_modules(source, module, is_package)}
    third_party = tops & (EVERYWHERE | set(DOORS))
    assert {DISTRIBUTIONS.get(top, top) for top in third_party} <= declared


@pytest.mark.parametrize(
    ("module", "source", "complaint"),
    [
        ("t2i_experts.nn.unet", "from t2i_experts.diffusion import noise", "floor 1"),
        ("t2i_experts.nn.unet", "def f():\n    import t2i_experts.cascade.pipeline", "floor 4"),
        ("t2i_experts.nn.unet", "from ..cascade import pipeline", "floor 4"),
        ("t2i_experts.nn.unet", "from t2i_experts import cli", "floor 7"),
        ("t2i_experts.nn.unet", "import importlib\nimportlib.import_module('t2i_experts.training.state')", "floor 5"),
        ("t2i_experts.paint.bias", "from t2i_experts.shards.reader import ShardReader", "another room"),
        ("t2i_experts.config", "import t2i_experts.types", "another room"),
        ("t2i_experts.diffusion.noise", "import typer", "whose doors are cli"),
        ("t2i_experts.cascade.picturesque", "from PIL import Image", "whose doors are"),
        ("t2i_experts.nn.unet", "import einops", "has no door"),
        ("t2i_experts.helpers", "from t2i_experts import nn", "no floor"),
    ],
)
def test_a_wrong_import_is_found(module: str, source: str, complaint: str) -> None:
    (line,) = violations(source, module)
    assert complaint in line


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("t2i_experts.nn.unet", "from .layers import Conv\nfrom t2i_experts.config import NetworkConfig\nimport torch, math"),
        ("t2i_experts.cascade.picture", "from PIL import Image"),
        ("t2i_experts.conditioning.t5", "def load():\n    from transformers import T5EncoderModel"),
        ("t2i_experts.cli.app", "from t2i_experts import __version__\nfrom t2i_experts.training import trainer"),
    ],
)
def test_a_right_import_passes(module: str, source: str) -> None:
    assert violations(source, module) == []
