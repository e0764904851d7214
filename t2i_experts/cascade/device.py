"""The device that something is computed on."""

from __future__ import annotations

import torch


def default_device() -> torch.device:
    """The first of CUDA, MPS and CPU that this machine has."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def default_dtype(device: torch.device) -> torch.dtype:
    """What a network computes in there unless the user says otherwise: bfloat16 on CUDA and on CPUs that multiply in it, or float32."""
    if device.type == "cpu":
        found = torch.cpu.get_capabilities()
        return torch.bfloat16 if found.get("avx512_bf16") or found.get("amx_bf16") else torch.float32
    return torch.bfloat16 if device.type == "cuda" else torch.float32


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
