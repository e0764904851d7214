"""The one registry: every part that is chosen by name is found here, and plugins enter by the same door as the built-in parts.

Plugins (see `plugins.py` beside this) are loaded the first time that a name is looked up which is not built in, that names are listed,
or that the plugins themselves are; never at import, and not at all where only built-in parts are named. Each process loads its own.
"""

from __future__ import annotations

import difflib
import importlib
import os
import re
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from t2i_experts.registry.plugins import Plugin, enabled, given, installed, load, time_limit


@dataclass(frozen=True)
class LazyCommand:
    """A sub-command that is not imported yet.

    target: "module:attribute" of a function, which becomes a command, or of a `typer.Typer`, which becomes a group.
    help: its line in the root's help, kept here so that listing the commands imports none of them.
    """

    target: str
    help: str


Part = Callable[..., Any] | type | str | LazyCommand

BUILT_IN: Mapping[str, Mapping[str, str] | str] = {
    "sampler": {
        "euler": "t2i_experts.diffusion.samplers:sample_euler",
        "heun": "t2i_experts.diffusion.samplers:sample_heun",
        "dpmpp_2m": "t2i_experts.diffusion.samplers:sample_dpmpp_2m",
    },
    "encoder": {
        "t5": "t2i_experts.conditioning.t5:T5Encoder",
        "clip_text": "t2i_experts.conditioning.clip:CLIPTextEncoder",
        "clip_image": "t2i_experts.conditioning.clip:CLIPImageEncoder",
    },
    "source": {
        "folder": "t2i_experts.shards.sources:folder_source",
        "csv": "t2i_experts.shards.sources:csv_source",
        "jsonl": "t2i_experts.shards.sources:jsonl_source",
        "coco": "t2i_experts.shards.coco:coco_source",
        "img2dataset": "t2i_experts.shards.tars:img2dataset_source",
        "parquet": "t2i_experts.shards.parquet:parquet_source",
    },
    "backbone": {
        "unet": "t2i_experts.cascade.stage:build_unet",
    },
    "codec": {
        "pixel": "t2i_experts.cascade.codec:PixelCodec",
        "autoencoder_kl": "t2i_experts.cascade.autoencoder_kl:AutoencoderKLCodec",
    },
    "features": {
        "inception": "t2i_experts.evaluation.features:InceptionFeatures",
        "squeezenet": "t2i_experts.evaluation.features:SqueezeNetFeatures",
        "open_clip": "t2i_experts.evaluation.features:OpenCLIPFeatures",
    },
    "metric": {
        "clip": "t2i_experts.evaluation.clip_score:CLIPScore",
    },
    "command": "t2i_experts.cli.app:COMMANDS",
}
"""Kind -> name -> "module:attribute", imported when it is asked for, so that listing names costs nothing. Commands have their table."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_TARGET = re.compile(r"[\w.]+:\w+")


class Registry:
    """Names to parts, by kind. A part is an object, or "module:attribute" to be imported on first use; a command is a `LazyCommand`."""

    def __init__(self, parts: Mapping[str, Mapping[str, Any] | str] = BUILT_IN, plugins: tuple[Plugin, ...] | None = None) -> None:
        """parts: kind -> name -> part, copied, or "module:attribute" of such a table. plugins: None loads those that are installed."""
        self._parts: dict[str, dict[str, Any] | str] = {k: named if isinstance(named, str) else dict(named) for k, named in parts.items()}
        self._plugins = plugins
        self._added: list[tuple[str, str]] = []
        self._lock = threading.Lock()

    def add(self, kind: str, name: str, part: Part) -> None:
        """Adds a part. Raises ValueError for an unknown kind, a name that is taken, and what cannot be a name or a part of this kind."""
        if given() not in (None, self):
            raise ValueError("a plugin adds its parts to the registry that its register(registry) is given, and to no other")
        named = self._named(kind)
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ValueError(f"the name {name!r} of a {kind} must be letters, digits, '_', '-' and '.', and begin with a letter or digit")
        if name in named:
            raise ValueError(f"the {kind} {name!r} exists already and cannot be replaced")
        target = part.target if isinstance(part, LazyCommand) else part
        if isinstance(target, str) and not _TARGET.fullmatch(target):
            raise ValueError(f"the {kind} {name!r} is {target!r}; a string must be of the form module:attribute")
        if kind == "command":
            part = LazyCommand(part, "(a plugin's command)") if isinstance(part, str) else part
            if not isinstance(part, LazyCommand):
                raise ValueError(
                    f"the command {name!r} is {part!r}; it must be a LazyCommand or 'module:attribute', imported when it is run"
                )
        elif not isinstance(part, str) and not callable(part):
            raise ValueError(f"the {kind} {name!r} is {part!r}; it must be a function, a class or 'module:attribute'")
        named[name] = part
        self._added.append((kind, name))

    def kinds(self) -> list[str]:
        """The kinds of parts, sorted."""
        return sorted(self._parts)

    def names(self, kind: str) -> list[str]:
        """The names of a kind, sorted. Raises ValueError for an unknown kind."""
        self._named(kind)
        self.plugins()
        return sorted(self._named(kind))

    def check(self, kind: str, name: str) -> None:
        """Raises ValueError for an unknown kind or name, listing those that there are and the plugins that were skipped.

        No part is imported: a wrong name is told before anything that takes seconds.
        """
        if name not in self._named(kind):
            self.plugins()
        named = self._named(kind)
        if name not in named:
            near = difflib.get_close_matches(name, named, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            skipped = "".join(f"; the plugin {plugin} was skipped: {plugin.error}" for plugin in self.plugins() if plugin.error)
            raise ValueError(f"unknown {kind} {name!r}; {hint}allowed: {', '.join(sorted(named))}{skipped}")

    def get(self, kind: str, name: str) -> Any:
        """The part, imported now if it was not yet. Raises ValueError as `check`."""
        self.check(kind, name)
        named = self._named(kind)
        part = named[name]
        if isinstance(part, str):
            try:
                part = named[name] = _imported(part)
            except Exception as error:
                plugin = self.origin(kind, name)
                if plugin is None:
                    raise
                raise RuntimeError(f"the {kind} {name!r} of the plugin {plugin}: {type(error).__name__}: {error}") from error
        return part

    def origin(self, kind: str, name: str) -> Plugin | None:
        """The plugin that added a part; None for one that is built in, or not known yet."""
        return next((plugin for plugin in self._plugins or () if (kind, name) in plugin.added), None)

    def plugins(self) -> tuple[Plugin, ...]:
        """Every installed plugin, in the order of their names, skipped ones too; loads them if that is still to be done.

        Nobody but a plugin's own thread sees it half loaded, and a plugin that looks here while it is being loaded sees none. Raises
        ValueError for environment variables that make no sense.
        """
        if given() is not None:
            return ()
        with self._lock:
            if self._plugins is None:
                self._plugins = self._load_plugins() if enabled() else ()
            return self._plugins

    def _load_plugins(self) -> tuple[Plugin, ...]:
        """Gives each plugin a copy to add to, which takes the place of this registry's own parts, or is dropped if the plugin fails."""
        seconds = time_limit()
        parts, loaded = self._parts, []
        for point in installed():
            copy = Registry(parts, plugins=())
            plugin = load(point, copy, seconds)
            if plugin.error is None:
                plugin = replace(plugin, added=tuple(copy._added))
                parts = copy._parts
            elif os.environ.get("LOCAL_RANK", "0") == "0":  # of the processes that a launcher started on this host, one says it
                print(f"warning: the plugin {plugin} was skipped: {plugin.error}", file=sys.stderr)
            loaded.append(plugin)
        self._parts = Registry(parts)._parts
        return tuple(loaded)

    def _named(self, kind: str) -> dict[str, Any]:
        if kind not in self._parts:
            raise ValueError(f"unknown kind of part {kind!r}; allowed: {', '.join(self.kinds())}")
        named = self._parts[kind]
        if isinstance(named, str):
            named = self._parts[kind] = dict(_imported(named))
        return named


def _imported(target: str) -> Any:
    module, attribute = target.split(":")
    return getattr(importlib.import_module(module), attribute)


registry = Registry()
