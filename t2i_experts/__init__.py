"""t2i-experts: text-to-image diffusion whose denoiser is an ensemble of experts, each for its own range of noise."""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"

_LAZY = {"CascadePipeline": "t2i_experts.cascade.pipeline"}


def __getattr__(name: str) -> Any:
    """Imports the public names on first use, so that `import t2i_experts` touches neither torch nor the network."""
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
