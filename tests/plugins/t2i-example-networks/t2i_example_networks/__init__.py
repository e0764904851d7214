"""A plugin that is an object of a package, with a backbone, a codec, features, a metric and a group of commands, imported when used."""

from __future__ import annotations

from typing import Any

from t2i_experts.registry import LazyCommand


class _Plugin:
    def register(self, registry: Any) -> None:
        registry.add("backbone", "mixer", "t2i_example_networks.mixer:build")
        registry.add("codec", "pooled", "t2i_example_networks.pooled:PooledCodec")
        registry.add("features", "brightness", "t2i_example_networks.brightness:BrightnessFeatures")
        registry.add("metric", "lightness", "t2i_example_networks.lightness:LightnessMetric")
        registry.add("command", "mixer", LazyCommand("t2i_example_networks.command:app", "What a mixer is."))


plugin = _Plugin()
