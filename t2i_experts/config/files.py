"""Config files: YAML read strictly into the dataclasses of `schema`, and written back.

A file may say `extends: OTHER.yaml` (relative to itself) and then hold only what differs; lists are replaced, not merged. `key=value`
overrides come last. An unknown key, a wrong type and a missing value are errors that name the key.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from t2i_experts.config.rules import check
from t2i_experts.config.schema import RunConfig


def _read(path: Path, chain: tuple[Path, ...] = ()) -> DictConfig:
    """The file merged over the one that it extends."""
    path = path.resolve()
    if path in chain:
        raise ValueError(f"extends goes in a circle: {' -> '.join(str(p) for p in (*chain, path))}")
    if not path.is_file():
        raise ValueError(f"config file not found: {path}" + (f" (extended by {chain[-1]})" if chain else ""))
    try:
        config = OmegaConf.load(path)
    except Exception as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(config, DictConfig):
        raise ValueError(f"{path} must hold keys and values at its top level")
    if "extends" in config:
        parent = config.pop("extends")
        config = cast(DictConfig, OmegaConf.merge(_read(path.parent / str(parent), (*chain, path)), config))
    return config


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a config file and its `key=value` overrides.

    Raises ValueError naming the key, for an unknown key, a wrong type, a missing value or an impossible combination.
    """
    return build_config(_read(Path(path)), overrides, source=str(path))


def build_config(tree: DictConfig | dict[str, Any], overrides: Sequence[str] = (), *, source: str = "config") -> RunConfig:
    """The frozen dataclasses for a tree of plain values; see `load_config`."""
    merged = OmegaConf.structured(RunConfig)
    for origin, part in [(source, tree), *((f"override {text!r}", _override(text)) for text in overrides)]:
        try:
            merged = OmegaConf.merge(merged, part)
        except (OmegaConfBaseException, TypeError) as error:
            raise ValueError(f"{origin}: {_explain(error)}") from error
    try:
        config = OmegaConf.to_object(merged)
    except (OmegaConfBaseException, TypeError) as error:
        raise ValueError(f"{source}: {_explain(error)}") from error
    assert isinstance(config, RunConfig)
    check(config)
    return config


def _override(text: str) -> DictConfig:
    """The tree of one `key=value`, whose value is YAML. Raises ValueError if it is not of that form."""
    if not text.partition("=")[1]:
        raise ValueError(f"override {text!r} is not of the form key=value")
    try:
        return OmegaConf.from_dotlist([text])
    except Exception as error:
        raise ValueError(f"override {text!r}: the value is not valid YAML: {' '.join(str(error).split())}") from error


def _explain(error: Exception) -> str:
    """What OmegaConf complains of, in one line that names the key and, for an unknown one, the keys that there are."""
    message = str(error).split("\n")[0]
    if "is not a ListConfig" in message:
        message = "needs a list, such as '[a, b]'"
    key = getattr(error, "full_key", None)
    kind = getattr(error, "object_type", None)
    if isinstance(error, ConfigKeyError) and isinstance(kind, type) and dataclasses.is_dataclass(kind):
        message += f"; allowed: {', '.join(field.name for field in dataclasses.fields(kind))}"
    return f"{key}: {message}" if key and key not in message else message


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
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), tree))
    except (OmegaConfBaseException, TypeError) as error:
        raise ValueError(f"{kind.__name__}: {_explain(error)}") from error


def differences(old: Any, new: Any, prefix: str = "") -> Iterable[str]:
    """One line `key: old -> new` for each value in which two plain trees differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(set(old) | set(new)):
            yield from differences(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else key)
    elif old != new:
        yield f"{prefix}: {old!r} -> {new!r}"
