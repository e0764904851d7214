"""Plugins: installed packages that add parts through the entry-point group `t2i_experts.plugins` (see PLUGINS.md).

An entry point names a module, or an object in one, with `register(registry)`. It is imported and `register` called when the registry needs
to know what there is beyond the built-in parts, and not before. That happens in a thread of its own with a time limit, so that a plugin
that waits for something that never comes costs seconds and no more.

What cannot be guaranteed: Python can stop no thread. One that has run out of time goes on, unheard, until it or the process ends, and
keeps the lock of each module that it was importing: whoever imports that module next waits too. Code that hangs while it holds the
interpreter's own lock, or that ends the process, takes everything with it. Not being in the main thread, a plugin cannot set signal
handlers, and one that imports the very module whose import made the registry look waits until its time is over.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import traceback
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

GROUP = "t2i_experts.plugins"
SECONDS = 10.0

_thread = threading.local()


@dataclass(frozen=True)
class Plugin:
    """An installed plugin, and what became of it.

    name, target: of its entry point. distribution, version: of the package that it came with. error: why it was skipped, in one line;
    None if it was not. details: where that happened, in many. added: kind and name of each of its parts.
    """

    name: str
    target: str
    distribution: str
    version: str
    error: str | None = None
    details: str = ""
    added: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        return f"{self.name!r} ({self.distribution} {self.version})"


def enabled() -> bool:
    """Whether plugins are to be loaded: not with T2I_PLUGINS=0. Raises ValueError for a value other than 0 and 1."""
    value = os.environ.get("T2I_PLUGINS") or "1"
    if value not in ("0", "1"):
        raise ValueError(f"T2I_PLUGINS={value!r} in the environment; allowed: 1, or 0 to load no plugins")
    return value == "1"


def time_limit() -> float:
    """Seconds that one plugin may take: T2I_PLUGIN_TIMEOUT, or 10. Raises ValueError for what is no positive, finite number."""
    value = os.environ.get("T2I_PLUGIN_TIMEOUT") or str(SECONDS)
    with contextlib.suppress(ValueError):
        if 0 < float(value) <= threading.TIMEOUT_MAX:
            return float(value)
    raise ValueError(f"T2I_PLUGIN_TIMEOUT={value!r} in the environment must be a positive number of seconds")


def installed() -> list[EntryPoint]:
    """The plugins' entry points, in an order that is the same in every process.

    Of several packages of one name the first on the path counts, as for imports. A package whose own description of its entry points
    cannot be read is passed over.
    """
    from importlib import metadata  # costs more than all else here, and most processes need no plugin

    found: dict[str, list[EntryPoint]] = {}
    for distribution in metadata.distributions():
        with contextlib.suppress(Exception):
            points = list(distribution.entry_points.select(group=GROUP))
            if points and distribution.name and distribution.version:
                found.setdefault(distribution.name, points)
    return sorted((point for points in found.values() for point in points), key=lambda point: (point.name, _distribution(point)))


def given() -> Any:
    """In a thread that is loading a plugin, the registry that the plugin is given; elsewhere None."""
    return getattr(_thread, "registry", None)


def load(point: EntryPoint, registry: Any, seconds: float) -> Plugin:
    """Imports a plugin and calls its `register(registry)`; what it prints goes to stderr. Raises nothing: the result has the error."""
    failed: list[BaseException] = []

    def run() -> None:
        _thread.registry = registry
        try:
            register = getattr(point.load(), "register", None)
            if not callable(register):
                raise TypeError(f"{point.value} has no register(registry)")
            register(registry)
        except BaseException as error:  # SystemExit too
            failed.append(error)

    thread = threading.Thread(target=run, name=f"plugin {point.name}", daemon=True)
    with contextlib.redirect_stdout(sys.stderr):
        thread.start()
        thread.join(seconds)
    error, details = None, ""
    if thread.is_alive():
        error = f"it was not ready after {seconds:g} s (T2I_PLUGIN_TIMEOUT)"
        details = "".join(traceback.format_stack(sys._current_frames().get(thread.ident or 0)))
    elif failed:
        error = f"{type(failed[0]).__name__}: {' '.join(str(failed[0]).split())}"
        details = "".join(traceback.format_exception(failed[0]))
    return Plugin(point.name, point.value, *_distribution(point), error, details)


def _distribution(point: EntryPoint) -> tuple[str, str]:
    """Name and version of the package that an entry point came with."""
    return (point.dist.name, point.dist.version) if point.dist is not None else ("unknown", "")
