"""Whether the files of an encoder are on this machine, where, and how to get them otherwise; nothing is loaded or downloaded."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants, try_to_load_from_cache

from t2i_experts.conditioning.frozen import EMBEDDED, local_folder
from t2i_experts.config import EncoderConfig

_T5_FILES = ("config.json", "spiece.model")
_T5_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_CLIP_FILES = ("open_clip_config.json",)
_CLIP_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")


@dataclass(frozen=True)
class Presence:
    """place: the folder or file in which the weights are, None if they are not here. bytes: of these weights on the disk. local: whether
    they are in a folder of the user's or of this package, which model folders copy.

    remedy: how to get them, in one line; empty where nothing is missing. known: False for an encoder of a plugin, which alone knows what
    its files are.
    """

    place: Path | None = None
    bytes: int = 0
    local: bool = False
    remedy: str = ""
    known: bool = True


def hub_cache() -> Path:
    """Where downloads from the Hugging Face hub are kept."""
    return Path(constants.HF_HUB_CACHE)


def find_encoder(config: EncoderConfig) -> Presence:
    """Looks for the files that loading this encoder would read: in its folder, or among what the hub has given before.

    Raises nothing: a folder that does not exist is a `remedy`, too.
    """
    if config.kind not in ("t5", "clip_text", "clip_image"):
        return Presence(known=False)
    try:
        folder = local_folder(config.model, None)
    except ValueError as error:
        return Presence(remedy=f"{error}; put the encoder there, or name a hub id")
    t5 = config.kind == "t5"
    files, weights = (_T5_FILES, _T5_WEIGHTS) if t5 else (_CLIP_FILES, _CLIP_WEIGHTS[:1])
    if folder is not None:
        return _in_folder(config.model, folder, files, weights)
    if t5:
        return _in_cache(config.model, files, weights, '"*.json" spiece.model "*.safetensors" "pytorch_model*.bin"')
    if config.model.startswith("hf-hub:"):
        return _in_cache(config.model.removeprefix("hf-hub:"), _CLIP_FILES, _CLIP_WEIGHTS, '"open_clip*"')
    return _architecture(config)


def _in_folder(model: str, folder: Path, files: Iterable[str], weights: Iterable[str]) -> Presence:
    lacking = [name for name in files if not (folder / name).is_file()]
    if not any((folder / name).is_file() for name in weights):
        lacking.append(next(iter(weights)))
    if lacking:
        remedy = "install the package again" if model.startswith(EMBEDDED) else "copy the whole model there"
        return Presence(remedy=f"{folder} lacks {' and '.join(lacking)}: {remedy}")
    return Presence(folder, _weight_bytes(folder), local=True)


def _in_cache(repository: str, files: Iterable[str], weights: Iterable[str], patterns: str) -> Presence:
    """A repository of the hub; what it lacks is fetched by `hf download`, of which patterns say what is wanted."""
    remedy = f"hf download {repository} --include {patterns}, or set model to a local folder that holds it"
    if repository.count("/") > 1 or not repository:
        return Presence(remedy=f"{repository!r} is neither a folder nor a hub id: correct the encoder's model")
    found = [cached(repository, name) for name in files]
    place = next((path for name in weights if (path := cached(repository, name))), None)
    if place is None or None in found:
        return Presence(remedy=remedy)
    return Presence(place.parent, _weight_bytes(place.parent))


def _architecture(config: EncoderConfig) -> Presence:
    """One of open_clip's architectures with the public weights that its tag names."""
    import open_clip

    public = open_clip.get_pretrained_cfg(config.model, config.pretrained or "")
    if not public:
        known = ", ".join(open_clip.list_pretrained_tags_by_model(config.model))
        tags = f"open_clip has the tags {known}" if known else "open_clip knows no such architecture, and there is no folder of that name"
        return Presence(remedy=f"model={config.model!r} with pretrained={config.pretrained!r}: {tags}")
    repository, _, file = str(public.get("hf_hub") or "").rpartition("/")
    old = Path("~/.cache/clip").expanduser() / Path(str(public.get("url", ""))).name  # open_clip's own, where it has no hub id
    names = [file] if file else list(_CLIP_WEIGHTS)
    place = next((path for name in names if repository and (path := cached(repository, name))), old if old.is_file() else None)
    if place is not None:
        return Presence(place, place.stat().st_size)
    if repository:
        return Presence(remedy=f"hf download {repository} {names[0]}, or set model to a local open_clip folder")
    return Presence(remedy=f"curl -Lo {old} --create-dirs {public.get('url')}, or set model to a local open_clip folder")


def cached(repository: str, file: str) -> Path | None:
    """A file of a repository, if the hub has given it before."""
    try:
        path = try_to_load_from_cache(repository, file)
    except ValueError:  # what cannot be a repository's name
        return None
    return Path(path) if isinstance(path, str) else None


def _weight_bytes(folder: Path) -> int:
    """Bytes of the safetensors in a folder, or of its pickled weights if there are none."""
    files = list(folder.glob("*.safetensors")) or list(folder.glob("*.bin"))
    return sum(file.stat().st_size for file in files)
