"""Emoji art by object and style: which objects there are, where their pictures lie, and the pictures, cropped and rasterised.

Two layouts are read. `open_folder` reads one folder with fluent-3d.tar (CODEPOINTS.webp or .png) and fluent-color, fluent-flat and noto
.tar.xz (CODEPOINTS.svg). `open_checkouts` reads checkouts of microsoft/fluentui-emoji and googlefonts/noto-emoji. Nothing is downloaded.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
from emoji_colour import Palette, measure
from numpy.typing import NDArray
from PIL import Image

STYLES = ("3D", "gradient", "flat", "Noto")
"""Fluent 3D, Fluent color, Fluent flat and Noto, as captions call them."""

VOCABULARY = Path(__file__).with_name("emoji_vocabulary.txt")
_ARCHIVES = {"3D": "fluent-3d.tar", "gradient": "fluent-color.tar.xz", "flat": "fluent-flat.tar.xz", "Noto": "noto.tar.xz"}
_FLUENT_FOLDERS = {"3D": "3D", "gradient": "Color", "flat": "Flat"}
_MEASURED_PX = 64
_SMALLEST_PX = 128

_UNCHANGED_PLURALS = ("deer", "sheep", "fish", "jellyfish", "pufferfish", "shrimp", "squid", "bison", "moose", "dice")
_IRREGULAR_PLURALS = {noun: noun for noun in _UNCHANGED_PLURALS} | {
    "mouse": "mice",
    "goose": "geese",
    "tooth": "teeth",
    "man": "men",
    "woman": "women",
    "snowman": "snowmen",
    "policeman": "policemen",
    "fireman": "firemen",
    "wolf": "wolves",
    "leaf": "leaves",
    "knife": "knives",
    "loaf": "loaves",
    "scarf": "scarves",
    "elf": "elves",
    "cactus": "cacti",
    "potato": "potatoes",
    "tomato": "tomatoes",
    "mango": "mangoes",
    "volcano": "volcanoes",
    "tornado": "tornadoes",
    "mosquito": "mosquitoes",
}

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Name:
    """One way to call an object. plural: None if it is not counted; article: "a", "the" or "" (none; "a" stands for "an" too)."""

    text: str
    plural: str | None
    article: str


@dataclass(frozen=True)
class EmojiObject:
    """One line of the vocabulary. codepoints: lower-case hex joined by '-', without fe0f; names: the first is the identity."""

    codepoints: str
    names: tuple[Name, ...]
    recolourable: bool
    common: bool = False

    @property
    def name(self) -> str:
        """The object's identity: unique in the vocabulary."""
        return self.names[0].text


def pluralise(name: str) -> str:
    """The plural of a name, of its head: 'red apple' -> 'red apples', 'slice of pizza' -> 'slices of pizza', 'wolf' -> 'wolves'."""
    head = re.split(r" (?:of|with|behind|over|at|in|on|blowing) ", name)[0]
    start, space, noun = head.rpartition(" ")
    if noun in _IRREGULAR_PLURALS:
        plural = _IRREGULAR_PLURALS[noun]
    elif re.search(r"[^aeiou]y$", noun):
        plural = noun[:-1] + "ies"
    elif re.search(r"(s|x|z|ch|sh)$", noun):
        plural = noun + "es"
    else:
        plural = noun + "s"
    return start + space + plural + name[len(head) :]


def load_vocabulary(path: Path = VOCABULARY) -> tuple[EmojiObject, ...]:
    """The objects of a vocabulary file, in its order; the file says how it is written.

    Raises ValueError if a line cannot be read or a name occurs twice.
    """
    objects, seen = [], set[str]()
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        match = re.fullmatch(r"([0-9a-f-]+)(\*?)(!?) (.+)", line.strip())
        if match is None:
            raise ValueError(f"{path}:{number}: {line!r}; a line is CODEPOINTS[*][!] NAME[, NAME...]")
        names = []
        for part in match[4].split(", "):
            text, _, mark = part.rstrip(")").partition(" (")
            plural = None if mark in ("-", "the") else mark or pluralise(text)
            names.append(Name(text, plural, {"-": "", "the": "the"}.get(mark, "a")))
            if text in seen:
                raise ValueError(f"{path}:{number}: {text!r} names two objects; every name may occur once")
            seen.add(text)
        objects.append(EmojiObject(match[1], tuple(names), recolourable=not match[3], common=bool(match[2])))
    return tuple(objects)


def open_folder(folder: Path) -> Art:
    """The art of a folder with the four archives. Raises ValueError if one is missing."""
    sources: dict[tuple[str, str], bytes] = {}
    objects = load_vocabulary()
    wanted = {obj.codepoints for obj in objects}
    for style, archive in _ARCHIVES.items():
        if not (folder / archive).is_file():
            raise ValueError(f"emoji folder {folder} has no {archive}; it needs {', '.join(_ARCHIVES.values())}")
        with tarfile.open(folder / archive) as tar:
            for member in tar:
                codepoints = _normalise(Path(member.name).stem)
                file = tar.extractfile(member)
                if file is not None and codepoints in wanted:
                    sources.setdefault((codepoints, style), file.read())
    return Art(objects, sources)


def open_checkouts(fluent: Path, noto: Path) -> Art:
    """The art of checkouts of microsoft/fluentui-emoji and googlefonts/noto-emoji. Raises ValueError if a folder is not one."""
    if not (fluent / "assets").is_dir():
        raise ValueError(f"fluent {fluent} has no folder 'assets'; it must be a checkout of microsoft/fluentui-emoji")
    if not (noto / "svg").is_dir():
        raise ValueError(f"noto {noto} has no folder 'svg'; it must be a checkout of googlefonts/noto-emoji")
    sources: dict[tuple[str, str], bytes] = {}
    objects = load_vocabulary()
    wanted = {obj.codepoints for obj in objects}
    for metadata in sorted((fluent / "assets").glob("*/metadata.json")):
        codepoints = _normalise(json.loads(metadata.read_text(encoding="utf-8"))["unicode"])
        for style, name in _FLUENT_FOLDERS.items():
            files = [*metadata.parent.glob(f"{name}/*.*"), *metadata.parent.glob(f"Default/{name}/*.*")]
            if files and codepoints in wanted:
                sources[codepoints, style] = files[0].read_bytes()
    for file in sorted((noto / "svg").glob("emoji_u*.svg")):
        codepoints = _normalise(file.stem.removeprefix("emoji_u"))
        if codepoints in wanted:
            sources.setdefault((codepoints, "Noto"), file.read_bytes())
    return Art(objects, sources)


@dataclass
class Art:
    """Pictures by (codepoints, style), rasterised when asked for; `prepared` makes that once and for all processes.

    objects: those of the vocabulary that have a picture in at least one style. Raises ValueError if there is none.
    """

    objects: tuple[EmojiObject, ...]
    sources: Mapping[tuple[str, str], bytes]
    _sprites: Pixels | None = None  # (pictures, px, px, 4), each in the upper left corner of its slot
    _shapes: Mapping[tuple[str, str], tuple[int, int, int]] = field(default_factory=dict)  # slot, height, width
    _palettes: dict[tuple[str, str], Palette] = field(default_factory=dict)

    def __post_init__(self) -> None:
        present = {codepoints for codepoints, _ in self.sources}
        self.objects = tuple(obj for obj in self.objects if obj.codepoints in present)
        if not self.objects:
            raise ValueError("no picture of any object of the vocabulary was found; file names must be codepoints, such as 1f989.svg")

    def styles(self, obj: EmojiObject) -> tuple[str, ...]:
        """The styles in which the object has a picture."""
        return tuple(style for style in STYLES if (obj.codepoints, style) in self.sources)

    def sprite(self, obj: EmojiObject, style: str, size: int) -> Pixels:
        """(H, W, 4) premultiplied uint8, cropped; the longer side is at least `size`, or all that a raster source has."""
        key = (obj.codepoints, style)
        if self._sprites is not None and size <= self._sprites.shape[1]:
            slot, height, width = self._shapes[key]
            return self._sprites[slot, :height, :width]
        return _rasterise(self.sources[key], _resolution(size))

    def palette(self, obj: EmojiObject, style: str) -> Palette:
        """The measured colours of the picture; they do not depend on the size at which it is drawn."""
        key = (obj.codepoints, style)
        if key not in self._palettes:
            self._palettes[key] = _palette(self.sources[key])
        return self._palettes[key]

    def prepared(self, folder: Path, size: int, workers: int) -> Art:
        """This art with every picture rasterised for scenes of `size` and measured, in a file of `folder` that all processes map.

        folder: must outlive the art; the full sets take 0.15 GB for `size` up to 64, four times that for twice the size.
        """
        keys, px = sorted(self.sources), _resolution(size)
        sprites = np.lib.format.open_memmap(folder / "sprites.npy", mode="w+", dtype=np.uint8, shape=(len(keys), px, px, 4))
        shapes: dict[tuple[str, str], tuple[int, int, int]] = {}
        palettes: dict[tuple[str, str], Palette] = {}
        with ProcessPoolExecutor(workers) as pool:
            made = pool.map(_prepare, (self.sources[key] for key in keys), repeat(px), chunksize=8)
            for slot, (key, (sprite, palette)) in enumerate(zip(keys, made, strict=True)):
                height, width = sprite.shape[:2]
                sprites[slot, :height, :width] = sprite
                shapes[key], palettes[key] = (slot, height, width), palette
        sprites.flush()
        return Art(self.objects, self.sources, np.load(folder / "sprites.npy", mmap_mode="r"), shapes, palettes)

    def __getstate__(self) -> dict[str, Any]:
        mapped = isinstance(self._sprites, np.memmap)
        return {**self.__dict__, "_sprites": self._sprites.filename if mapped else None}  # type: ignore[union-attr]

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if state["_sprites"] is not None:
            self._sprites = np.load(state["_sprites"], mmap_mode="r")


def _normalise(codepoints: str) -> str:
    parts = re.split(r"[-_ ]", codepoints.lower())
    return "-".join(part for part in parts if part != "fe0f")


def _resolution(size: int) -> int:
    """Longer side of the rasters for scenes of `size`: a power of two, so that the cache of single pictures is hit."""
    return max(_SMALLEST_PX, 1 << (size - 1).bit_length())


def _prepare(source: bytes, longest: int) -> tuple[Pixels, Palette]:
    return _rasterise(source, longest), _palette(source)


def _palette(source: bytes) -> Palette:
    return measure(resize(_rasterise(source, _SMALLEST_PX), _MEASURED_PX))


def resize(sprite: Pixels, longest: int) -> Pixels:
    """sprite: (H, W, 4) premultiplied -> the same with its longer side `longest` pixels, by antialiased resampling."""
    height, width = sprite.shape[:2]
    scale = longest / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    image = Image.frombuffer("RGBX", (width, height), np.ascontiguousarray(sprite))  # RGBX: Pillow must not premultiply again
    return np.asarray(image.resize(size, Image.Resampling.HAMMING if scale < 1 else Image.Resampling.BICUBIC))


@lru_cache(maxsize=64)
def _rasterise(source: bytes, longest: int) -> Pixels:
    """(H, W, 4) premultiplied uint8 of a picture file, cropped; the longer side is `longest` pixels (less if a raster source has less)."""
    if b"<svg" not in source[:4096]:
        sprite = _crop(_decode(source))
        return resize(sprite, min(longest, max(sprite.shape[:2])))
    width = round(1.25 * longest)
    sprite = _crop(_render(source, width))
    if max(sprite.shape[:2]) < longest:  # wide margins
        sprite = _crop(_render(source, round(width * (longest + 2) / max(sprite.shape[:2]))))
    return resize(sprite, longest)


def _render(svg: bytes, width: int) -> Pixels:
    try:
        import resvg_py
    except ImportError as error:
        raise RuntimeError("rendering the SVG pictures needs resvg: pip install resvg-py") from error
    return _decode(bytes(resvg_py.svg_to_bytes(svg_string=svg.decode(), width=width, height=width)))


def _decode(data: bytes) -> Pixels:
    """(H, W, 4) premultiplied uint8."""
    with Image.open(io.BytesIO(data)) as image:
        return np.array(image.convert("RGBA").convert("RGBa"))


def _crop(rgba: Pixels) -> Pixels:
    """Without the margins in which nothing is visible. Raises ValueError if nothing is."""
    visible = rgba[..., 3] > 16
    rows, columns = np.flatnonzero(visible.any(axis=1)), np.flatnonzero(visible.any(axis=0))
    if not len(rows):
        raise ValueError("a picture is empty: every pixel is transparent")
    return rgba[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].copy()
