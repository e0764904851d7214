"""What all frozen encoders, and codecs, share: where their files lie, how they are frozen, and a fingerprint of their weights."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

EMBEDDED = "embedded:"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

Module = TypeVar("Module", bound=nn.Module)


def local_folder(model: str, root: Path | None, what: str = "encoder") -> Path | None:
    """The folder that an `EncoderConfig.model` names, or None if it names something public (a hub id, an architecture).

    `embedded:NAME` ships with this package; `./NAME` lies in `root`, a model folder, if one is given; any other name is tried as a folder
    relative to `root`, then to the working directory. Raises ValueError for an embedded name that does not exist, and for what can only
    be a path but is no folder. what: whose model it is, in messages.
    """
    if model.startswith(EMBEDDED):
        shelf = Path(str(resources.files("t2i_experts"))) / "pretrained"
        folders = {path.name: path for path in shelf.iterdir() if path.is_dir()} if shelf.is_dir() else {}
        name = model.removeprefix(EMBEDDED)
        if name not in folders:
            raise ValueError(f"{what} model {model!r} does not ship with this package; allowed: {', '.join(sorted(folders)) or 'none'}")
        return folders[name]
    if root is not None and model.startswith("./"):
        if not (root / model).is_dir():
            raise ValueError(f"{what} model {model!r}: the model folder {root} is not whole, it lacks {Path(model)}")
        return (root / model).resolve()
    path = Path(model).expanduser()
    for folder in (path,) if root is None else (root / path, path):
        if folder.is_dir():
            return folder.resolve()
    if path.is_absolute() or model.startswith((".", "~")):
        raise ValueError(f"{what} model {model!r} is not a folder")
    return None


def copy_file(source: Path, target: Path, earlier: Path | None = None) -> None:
    """Copies a file, or makes `target` a hard link to `earlier` if that is a copy of the file as it is now (same size and time of change).

    A model folder is written again and again in a run, and its encoders, which may be gigabytes, are on the disk once. What the copies are
    linked to is another copy and never the source, which its owner may change in place.
    """
    if earlier is not None and earlier.is_file():
        old, new = earlier.stat(), source.stat()
        if (old.st_size, old.st_mtime_ns) == (new.st_size, new.st_mtime_ns):
            try:
                os.link(earlier, target)
                return
            except OSError:  # another file system, or one without hard links
                pass
    shutil.copy2(source, target)


def dtype_named(name: str, model: str, what: str = "encoder") -> torch.dtype:
    """float32 or bfloat16. Raises ValueError for anything else: in float16 the residual stream of T5, and SDXL's VAE, overflow to NaN."""
    if name not in DTYPES:
        raise ValueError(f"{what} model {model!r}: dtype {name!r} is not one of {', '.join(DTYPES)}; float16 overflows")
    return DTYPES[name]


def freeze(model: Module, device: torch.device | str, dtype: torch.dtype) -> Module:
    """The same model in evaluation mode, on `device` in `dtype`, without gradients."""
    return model.eval().requires_grad_(False).to(device=device, dtype=dtype)


def device_of(model: nn.Module) -> torch.device:
    """Where the model's parameters are."""
    return next(model.parameters()).device


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`; through page-locked memory where that is CUDA, since a copy from ordinary memory waits for the device."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


@contextmanager
def frozen_forward(device: torch.device) -> Iterator[None]:
    """No gradients, and the encoder's own dtype even inside a caller's autocast (which may be float16).

    Not inference mode: the outputs are inputs of a network that trains.
    """
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


def fingerprint(model: nn.Module) -> str:
    """sha256 (hex) over the names, shapes and float32 values of a model's parameters and saved buffers.

    It does not depend on the device or on the format on disk; bfloat16 weights have the same fingerprint when read as float32.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        values = tensor.detach().to("cpu", torch.float32).contiguous()
        digest.update(f"{name}{tuple(values.shape)}".encode())
        digest.update(values.numpy().data)
    return digest.hexdigest()
