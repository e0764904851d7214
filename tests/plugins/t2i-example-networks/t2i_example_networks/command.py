"""`t2i-experts mixer`."""

from __future__ import annotations

import typer

app = typer.Typer()


@app.command()
def parameters(channels: int) -> None:
    """Count the parameters of one layer."""
    if channels < 1:
        raise ValueError(f"CHANNELS={channels} must be positive")
    print(9 * channels**2 + channels)


@app.command()
def describe() -> None:
    """Say what it is."""
    print("a stack of convolutions")
