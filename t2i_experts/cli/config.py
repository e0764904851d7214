"""`t2i-experts config`: what a config says in full and where it says so, whether it is right, and the configs that ship."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from t2i_experts.cli.options import Config, Json, Overrides, complete_config, complete_shipped, group

if TYPE_CHECKING:
    from t2i_experts.config import RunConfig, Setting

app = group("config", "Configs: see all values and where they come from, check, compare, list and copy them.")

_LINE = 60  # columns of a value before its origin; longer lists have a line for each element


@app.command()
def show(config: Config, overrides: Overrides = None, as_json: Json = False) -> None:
    """Show every value, and whether it is a default or which file or override gave it. What is printed is a config, too."""
    from t2i_experts.config import to_plain, trace_config

    resolved, settings = trace_config(config, overrides or [])
    if as_json:
        tree = {key: {"value": setting.value, "origin": setting.origin} for key, setting in settings.items()}
        typer.echo(json.dumps(tree, ensure_ascii=False))
        return
    lines = list(_lines(to_plain(resolved), settings))
    width = max(len(text) for text, _ in lines if len(text) <= _LINE)
    for text, origin in lines:
        typer.echo(f"{text:{width}}  # {origin}" if origin else text)


@app.command()
def check(config: Config, overrides: Overrides = None, as_json: Json = False) -> None:
    """Say OK, or what is wrong with a config (exit code 2). Shards and weights are not looked for."""
    from t2i_experts.config import load_config

    resolved = load_config(config, overrides or [])
    check_parts(resolved)
    if resolved.experts.leaves:
        from t2i_experts.experts.plan import TreePlan

        TreePlan.from_config(resolved)
    typer.echo(json.dumps({"config": config, "ok": True}) if as_json else f"{config}: OK")


def check_parts(config: RunConfig) -> None:
    """Raises ValueError, naming the key, for a part that the registry does not have; none is imported."""
    from t2i_experts.registry import registry

    kinds = {f"stage.encoders.{name}.kind": ("encoder", encoder.kind) for name, encoder in config.stage.encoders.items()}
    kinds |= {
        "stage.codec.kind": ("codec", config.stage.codec.kind),
        "stage.network.backbone": ("backbone", config.stage.network.backbone),
        "sampling.sampler": ("sampler", config.sampling.sampler),
    }
    for key, (kind, name) in kinds.items():
        try:
            registry.check(kind, name)
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from error


@app.command()
def diff(
    a: Annotated[
        str,
        typer.Argument(
            metavar="A", help="A YAML file, a shipped name, or the folder of a run, checkpoint or model.", autocompletion=complete_config
        ),
    ],
    b: Annotated[str, typer.Argument(metavar="B", help="Another.", autocompletion=complete_config)],
    as_json: Json = False,
) -> None:
    """Show the values in which two configs differ, defaults included: one line `key: a -> b` each.

    A model folder holds only the keys below stage and sampling, and only those are compared with it.
    """
    from t2i_experts.config import changes, differences

    old, new = _read(a), _read(b)
    old, new = ({key: tree[key] for key in tree if key in old and key in new} for tree in (old, new))
    if as_json:
        typer.echo(json.dumps({key: {"a": before, "b": after} for key, before, after in changes(old, new)}, ensure_ascii=False))
        return
    for line in list(differences(old, new)) or ["no differences"]:
        typer.echo(line)


@app.command("list")
def list_(as_json: Json = False) -> None:
    """List the shipped configs: their names stand for them wherever a config is asked for."""
    from t2i_experts.config import shipped_configs

    summaries = {name: _summary(path) for name, path in shipped_configs().items()}
    if as_json:
        typer.echo(json.dumps(summaries, ensure_ascii=False))
        return
    width = max(map(len, summaries), default=0)
    for name, summary in summaries.items():
        typer.echo(f"{name:{width}}  {summary}")


@app.command()
def copy(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A shipped config: see config list.", autocompletion=complete_shipped)],
    dest: Annotated[Path, typer.Argument(metavar="DEST", help="A folder, below which it keeps its name, or a .yaml file.")] = Path(),
    as_json: Json = False,
) -> None:
    """Copy a shipped config, with those that it extends, to change it. Nothing is overwritten."""
    from t2i_experts.config import read_files, shipped_configs

    shipped = shipped_configs()
    if name.removesuffix(".yaml") not in shipped:
        raise ValueError(f"NAME={name!r} is no shipped config; allowed: {', '.join(shipped)}")
    files = [layer.path for layer in reversed(read_files(shipped[name.removesuffix(".yaml")])) if layer.path]
    targets = list(_destinations(files, dest))
    for i, target in enumerate(targets):
        if os.path.lexists(target) or target in targets[:i]:
            raise ValueError(f"{target} is there already, or twice, and is not overwritten; name another DEST")
    for path, target in zip(files, targets, strict=True):
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
        except OSError as error:
            raise ValueError(f"DEST={str(dest)!r} cannot be written: {error}") from error
    typer.echo(json.dumps({"written": [str(target) for target in targets]}) if as_json else "\n".join(map(str, targets)))


def _destinations(files: list[Path], dest: Path) -> Iterator[Path]:
    """Where the first file and those that it extends are copied to, so that each still finds the next."""
    from t2i_experts.config import shipped_folder

    is_file = dest.suffix in (".yaml", ".yml")
    root = files[0].parent if is_file else shipped_folder()
    for path in files:
        relative = Path(os.path.relpath(path, root))
        if relative.parts[0] == "..":
            raise ValueError(f"DEST={str(dest)!r} must be a folder, because the config extends {relative}")
        if not is_file:
            yield dest / relative
        else:
            yield dest if path == files[0] else dest.parent / relative


def _read(config: str) -> dict[str, Any]:
    """The config in a file, of a shipped name, or of the run, the checkpoint or the model in a folder, as plain values."""
    from t2i_experts.config import RunConfig, from_plain, load_config, to_plain

    folder = Path(config)
    if (folder / "model_index.json").is_file():
        from t2i_experts.cascade.model_folder import read_configs

        stage, sampling, leaves = read_configs(folder)
        experts = {leaf.name: {"noise": str(leaf.interval), "expert": leaf.expert} for leaf in leaves}
        return {"stage": to_plain(stage), "sampling": to_plain(sampling), **({"ensemble": experts} if experts else {})}
    if (folder / "state.json").is_file():
        from t2i_experts.training.state import read_facts

        tree: dict[str, Any] = to_plain(from_plain(RunConfig, read_facts(folder)["config"]))
        return tree
    tree = to_plain(load_config(folder / "config.yaml" if (folder / "config.yaml").is_file() else config))
    return tree


def _summary(path: Path) -> str:
    """The first line of comment in a config file."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return next((line.lstrip("# ") for line in lines if line.startswith("#")), "")


def _lines(tree: Mapping[str, Any], settings: Mapping[str, Setting], at: str = "", depth: int = 0) -> Iterator[tuple[str, str]]:
    """Each line of a resolved config as YAML, with its value's origin; strings, lists and what is in them are written as JSON."""
    indent = "  " * depth
    for name, value in tree.items():
        key = f"{at}.{name}" if at else name
        text = f"{indent}{name}: {json.dumps(value, ensure_ascii=False)}"
        if isinstance(value, Mapping) and value:
            yield f"{indent}{name}:", ""
            yield from _lines(value, settings, key, depth + 1)
        elif isinstance(value, list) and len(text) > _LINE:
            yield f"{indent}{name}:", settings[key].origin
            yield from ((f"{indent}- {json.dumps(element, ensure_ascii=False)}", "") for element in value)
        else:
            yield text, settings[key].origin
