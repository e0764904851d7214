"""The device that something is computed on."""

from __future__ import annotations

import torch


def default_device() -> torch.device:
    """The first of CUDA, MPS and CPU that this machine has."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def open_device(device: torch.device | str, received: str) -> torch.device:
    """The device of that name. Raises ValueError, which begins with what was `received`, for one that this machine lacks."""
    try:
        device = torch.device(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"{received} is not to be had here: {str(error).splitlines()[0]}") from error
    return device


def synchronize(device: torch.device) -> None:
    """Waits until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
