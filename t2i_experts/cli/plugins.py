"""`t2i-experts plugins`."""

from __future__ import annotations

import json
from dataclasses import asdict

import typer

from t2i_experts.cli.options import Json


def plugins(
    context: typer.Context,
    as_json: Json = False,
) -> None:
    """List the installed plugins with what they add or why they were skipped, and every part that is chosen by name.

    PLUGINS.md in the package says how to write one. T2I_PLUGINS=0 loads none; T2I_PLUGIN_TIMEOUT is the seconds that each may take.
    """
    from t2i_experts.registry import registry
    from t2i_experts.registry.plugins import GROUP, Plugin, enabled

    found = registry.plugins()
    origins = {kind: {name: registry.origin(kind, name) for name in registry.names(kind)} for kind in registry.kinds()}
    if as_json:

        def plain(plugin: Plugin) -> dict[str, object]:
            added = [{"kind": kind, "name": name} for kind, name in plugin.added]
            return {**asdict(plugin), "state": "failed" if plugin.error else "ok", "added": added}

        def source(plugin: Plugin | None) -> dict[str, str] | None:
            return None if plugin is None else {"plugin": plugin.name, "distribution": plugin.distribution}

        parts = {kind: [{"name": name, "from": source(origin)} for name, origin in named.items()] for kind, named in origins.items()}
        print(json.dumps({"enabled": enabled(), "plugins": [plain(plugin) for plugin in found], "parts": parts}, ensure_ascii=False))
        return
    if not enabled():
        print("plugins are turned off: T2I_PLUGINS=0")
    elif not found:
        print(f"no plugins are installed (no package has an entry point in the group {GROUP})")
    for plugin in found:
        added = ", ".join(f"{kind} {name}" for kind, name in plugin.added) or "nothing"
        print(f"{plugin}: " + (f"failed: {plugin.error}" if plugin.error else f"ok, adds {added}"))
        if plugin.details and context.obj["debug"]:
            print(plugin.details.rstrip())
    print()
    for kind, named in origins.items():
        print(f"{kind}: " + ", ".join(name + (f" (plugin {origin.name})" if origin else "") for name, origin in named.items()))
