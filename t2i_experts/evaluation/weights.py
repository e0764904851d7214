"""Weights of the networks that metrics look through: from a file, a URL or the Hugging Face hub, with their sha256.

Nothing is unpickled but tensors: a file that asks for more is refused.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import re
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError

import numpy as np
import torch
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

_PICKLED = (".pth", ".pt", ".bin")
_UNUSED = "num_batches_tracked"
_SUFFIXES = (*_PICKLED, ".safetensors", ".npz")


@dataclass(frozen=True)
class Weights:
    """tensors: by the names of a state dict. source: where they came from, as it was given. sha256: of the file, in hex."""

    tensors: dict[str, Tensor]
    source: str
    sha256: str

    def into(self, network: nn.Module, what: str) -> None:
        """Fills the network. Raises ValueError in one line if these are the weights of another one; what: the right one's name.

        How many batches a norm has seen, which files from before PyTorch 0.4.1 do not say, changes no feature and may be missing.
        """
        wanted = network.state_dict()
        missing, extra = wanted.keys() - self.tensors.keys(), self.tensors.keys() - wanted.keys()
        missing = {name for name in missing if not name.endswith(_UNUSED)}
        odd = [name for name in wanted.keys() & self.tensors.keys() if wanted[name].shape != self.tensors[name].shape]
        if missing or extra or odd:
            found = [f"{len(names)} {how} ({min(names)})" for how, names in (("missing", missing), ("unknown", extra)) if names]
            if odd:
                name = min(odd)
                found.append(f"{len(odd)} of another shape ({name}: {tuple(self.tensors[name].shape)}, not {tuple(wanted[name].shape)})")
            raise ValueError(f"weights {self.source!r} are not those of {what}: of its {len(wanted)} tensors, {', '.join(found)}")
        network.load_state_dict(self.tensors, strict=False)


def load_weights(source: str) -> Weights:
    """Reads a local file (.pth, .pt or .bin with tensors alone, .safetensors, .npz), an http(s) URL of one, or OWNER/REPO/FILE of the hub.

    Downloads are kept, in torch's folder of checkpoints and in the hub's cache. Raises ValueError for what is not there or no such file.
    """
    path = _local(source)
    if path.suffix.lower() not in _SUFFIXES:
        raise ValueError(f"weights {source!r} must end in one of {', '.join(_SUFFIXES)}")
    try:
        tensors = _read(path)
        with open(path, "rb") as file:
            return Weights(tensors, source, hashlib.file_digest(file, "sha256").hexdigest())
    except EOFError:
        reason = "it ends too early" if path.stat().st_size else "it is empty"
    except pickle.UnpicklingError:
        reason = "it is no file of tensors alone; what else a pickle holds would run as a program, and is never read"
    except (OSError, RuntimeError, ValueError, zipfile.BadZipFile, SafetensorError) as error:
        reason = " ".join(str(error).split())
    raise ValueError(f"weights {source!r} cannot be read: {reason}")


def _read(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name."""
    match path.suffix.lower():
        case ".safetensors":
            return load_file(path)
        case ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    if _is_script(path):
        raise ValueError("it is a TorchScript program, which would run; give a file of its tensors alone")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the pickle's protocol
        found = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(found, dict) or not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in found.items()):
        raise ValueError("it is no state dict, which has names and tensors and nothing else")
    return dict(found)


def _is_script(path: Path) -> bool:
    """Whether a file is what torch.jit.save writes."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _local(source: str) -> Path:
    """The file on this machine, downloaded if need be."""
    if re.match(r"https?://", source):
        return _downloaded(source)
    path = Path(source).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        raise ValueError(f"weights {source!r} is a folder; name the file in it")
    parts = source.split("/")
    if len(parts) < 3 or source.startswith((".", "/", "~")):
        raise ValueError(f"weights {source!r}: no such file")
    try:
        return Path(hf_hub_download("/".join(parts[:2]), "/".join(parts[2:])))
    except (OSError, ValueError, RuntimeError) as error:  # the hub's own errors are such
        raise ValueError(f"weights {source!r} are no file here, and not to be had from the hub: {' '.join(str(error).split())}") from error


def _downloaded(url: str) -> Path:
    """A file of torch's folder of checkpoints, whose name says which URL it came from. Checked where the URL's name ends in -HASH."""
    name = url.rpartition("/")[2]
    path = Path(torch.hub.get_dir()) / "checkpoints" / f"{hashlib.sha256(url.encode()).hexdigest()[:12]}-{name}"
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    hashed = re.search(r"-([0-9a-f]{8,})\.\w+$", name)
    try:
        torch.hub.download_url_to_file(url, str(partial), hash_prefix=hashed and hashed[1], progress=False)
        os.replace(partial, path)
    except (URLError, OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"weights {url} cannot be downloaded: {' '.join(str(error).split())}; give a local file instead") from error
    finally:
        partial.unlink(missing_ok=True)
    return path
