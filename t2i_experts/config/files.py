"""Config files: YAML read strictly into the dataclasses of `schema`, and written back.

A file may say `extends: OTHER.yaml` (relative to itself, or the name of a shipped config) and then hold only what differs; lists are
replaced, not merged. `key=value` overrides come last. An unknown key, a wrong type and a missing value are errors that name the key.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from t2i_experts.config.keys import check_keys, check_shapes
from t2i_experts.config.origins import Setting, trace
from t2i_experts.config.rules import check
from t2i_experts.config.schema import RunConfig
from t2i_experts.config.shipped import find_config, shown


@dataclass(frozen=True)
class Layer:
    """Part of a config: what one file or one override says. origin: its name in messages. path: the file, None for an override."""

    origin: str
    tree: DictConfig
    path: Path | None = None


def read_files(config: str | Path, beside: Path | None = None, chain: tuple[Path, ...] = ()) -> list[Layer]:
    """A config file, or a shipped one by its name, and before it those that it extends, the most general one first.

    Raises ValueError for a file that is not there or not YAML, and for files that extend each other in a circle.
    """
    try:
        path = find_config(config, beside)
    except ValueError as error:
        meant = Path(config) if beside is None else beside / config
        message = f"{'extends' if chain else 'CONFIG'}={str(config)!r} {_held(meant)}" if str(config) and meant.is_dir() else str(error)
        raise ValueError(f"{message} (extended by {chain[-1]})" if chain else message) from None
    here = path.resolve()
    if here in chain:
        raise ValueError(f"extends goes in a circle: {' -> '.join(str(p) for p in (*chain, here))}")
    try:
        tree = OmegaConf.load(path)
    except Exception as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, DictConfig):
        raise ValueError(f"{path} must hold keys and values at its top level")
    parents = read_files(str(tree.pop("extends")), path.parent, (*chain, here)) if "extends" in tree else []
    return [*parents, Layer(shown(path), tree, path)]


def _held(folder: Path) -> str:
    """Of a folder in the place of a config file: which files may have been meant."""
    files = sorted(str(file) for file in folder.glob("*.yaml"))
    held = f"the YAML files {', '.join(files[:5])}{', ...' if len(files) > 5 else ''}" if files else "no YAML file"
    return f"is a folder, which holds {held}; a config is a YAML file, or one of `t2i-experts config list`"


def load_config(config: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a config file, or a shipped one by its name, and its `key=value` overrides.

    Raises ValueError naming the key, for an unknown key, a wrong type, a missing value or an impossible combination.
    """
    return _build([*read_files(config), *map(_override, overrides)])


def trace_config(config: str | Path, overrides: Sequence[str] = ()) -> tuple[RunConfig, dict[str, Setting]]:
    """As `load_config`, and every value by dotted key with where it comes from."""
    layers = [*read_files(config), *map(_override, overrides)]
    resolved = _build(layers)
    return resolved, trace(to_plain(resolved), [(layer.origin, OmegaConf.to_container(layer.tree)) for layer in layers])


def build_config(tree: DictConfig | dict[str, Any], overrides: Sequence[str] = (), *, source: str = "config") -> RunConfig:
    """The frozen dataclasses for a tree of plain values; see `load_config`."""
    return _build([Layer(source, OmegaConf.create(tree)), *map(_override, overrides)])


def _build(layers: Sequence[Layer]) -> RunConfig:
    """The layers merged, each over those before it."""
    merged = OmegaConf.structured(RunConfig)
    for layer in layers:
        try:
            check_keys(RunConfig, OmegaConf.to_container(layer.tree), also=["extends"] if layer.path else [])
            check_shapes(RunConfig, OmegaConf.to_container(layer.tree))
            merged = OmegaConf.merge(merged, layer.tree)
        except (OmegaConfBaseException, TypeError, ValueError) as error:
            raise ValueError(f"{layer.origin}: {_explain(error)}") from error
    try:
        config = OmegaConf.to_object(merged)
    except (OmegaConfBaseException, TypeError) as error:
        source = next((layer for layer in reversed(layers) if layer.path), layers[0])
        message = _lacking(merged, source) if isinstance(error, MissingMandatoryValue) else f": {_explain(error)}"
        raise ValueError(f"{source.origin}{message}{_others(merged, error)}") from error
    assert isinstance(config, RunConfig)
    check(config)
    return config


def _override(text: str) -> Layer:
    """What is said by one `key=value`, whose value is YAML. Raises ValueError if it is not of that form, or says nothing."""
    if not text.partition("=")[1]:
        raise ValueError(f"override {text!r} is not of the form key=value")
    try:
        layer = Layer(f"override {text!r}", OmegaConf.from_dotlist([text]))
    except Exception as error:
        raise ValueError(f"override {text!r}: the value is not valid YAML: {' '.join(str(error).split())}") from error
    if text.partition("=")[2].replace(" ", "") == "{}":
        raise ValueError(f"{layer.origin} changes nothing: keys and values are added to those that there are, and do not replace them")
    return layer


def _explain(error: Exception) -> str:
    """What OmegaConf complains of, in one line that names the key."""
    message = str(error).split("\n")[0]
    key = getattr(error, "full_key", None)
    if key and isinstance(error, MissingMandatoryValue):
        return f"missing mandatory value: {key}"
    return f"{key}: {message}" if key and key not in message else message


def _lacking(merged: Any, source: Layer) -> str:
    """What a config still needs, all at once; for one that has hardly begun, where to begin."""
    missing = sorted(OmegaConf.missing_keys(merged))
    begun = not any(field.name in missing for field in dataclasses.fields(RunConfig) if field.name != "output")
    begin = "" if begun else "; with `extends: tiny/base64`, or another of `t2i-experts config list`, a file holds only what differs"
    return f"{'' if source.tree else ' is empty'}: missing mandatory value: {', '.join(missing)}{begin}"


def _others(merged: Any, error: Exception) -> str:
    """For a value that a named entry lacks, such as an encoder's kind: the other entries, one of which may have been meant."""
    entry = str(getattr(error, "full_key", None) or "").rpartition(".")[0]
    holder, _, name = entry.rpartition(".")
    entries = OmegaConf.select(merged, holder) if holder else None
    if not isinstance(entries, DictConfig) or OmegaConf.get_type(entries) is not dict or len(entries) < 2:
        return ""
    others = [str(other) for other in entries if other != name]
    near = difflib.get_close_matches(name, others, n=1)
    return f"; did you mean {holder}.{near[0]}?" if near else f"; beside {name!r}, {holder} has {', '.join(others)}"


def to_plain(config: Any) -> Any:
    """A dataclass instance as dicts, lists and scalars that JSON and YAML can hold (infinity becomes the string 'inf')."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {f.name: to_plain(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, dict):
        return {str(key): to_plain(value) for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return [to_plain(value) for value in config]
    if isinstance(config, float) and config in (float("inf"), float("-inf")):
        return str(config)
    return config


def to_yaml(config: RunConfig) -> str:
    """The resolved config as YAML that `load_config` reads back to an equal value."""
    return OmegaConf.to_yaml(OmegaConf.create(to_plain(config)))


def from_plain(kind: type, tree: Any) -> Any:
    """The inverse of `to_plain` for one of this module's dataclasses. Raises ValueError for unknown keys or wrong types."""
    try:
        check_keys(kind, tree)
        check_shapes(kind, tree)
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), tree))
    except (OmegaConfBaseException, TypeError, ValueError) as error:
        raise ValueError(f"{kind.__name__}: {_explain(error)}") from error


def changes(old: Any, new: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(key, old, new) for each value in which two plain trees differ; None stands for one that is not there."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(set(old) | set(new)):
            yield from changes(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else key)
    elif old != new:
        yield prefix, old, new


def differences(old: Any, new: Any) -> Iterator[str]:
    """One line `key: old -> new` for each value in which two plain trees differ."""
    for key, before, after in changes(old, new):
        yield f"{key}: {before!r} -> {after!r}"
