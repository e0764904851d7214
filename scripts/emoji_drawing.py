"""A scene drawn: its picture, and the box and the mask of each object in it."""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from emoji_art import Art, resize
from emoji_captions import Description
from emoji_colour import recolour
from emoji_layout import Box
from numpy.typing import NDArray
from PIL import Image

_MASK_ALPHA = 64  # a pixel at least a quarter covered belongs to the object
_SAVE: dict[str, dict[str, Any]] = {
    "png": {"format": "PNG"},
    "webp": {"format": "WEBP", "lossless": True},
    "jpg": {"format": "JPEG", "quality": 95, "subsampling": 0},
}
EXTENSIONS = tuple(_SAVE)


@dataclass(frozen=True)
class Placed:
    """An object in the picture. box: (x0, y0, x1, y1) pixels, half-open, tight on mask; mask: (H, W) bool, the visible part."""

    name: str
    codepoints: str
    style: str
    colour: str | None
    box: tuple[int, int, int, int]
    mask: NDArray[np.bool_]


@dataclass(frozen=True)
class Scene:
    """A picture and all that is known of it. image: (H, W, 3) uint8 sRGB."""

    image: NDArray[np.uint8]
    captions: tuple[str, ...]
    objects: tuple[Placed, ...]
    description: Description
    split: str

    def metadata(self) -> dict[str, Any]:
        """What the json of a sample holds besides the captions.

        objects: name, codepoints, style, colour (null if it is not one colour), box, mask; relations: [name, relation, name];
        background: kind, colours, named. A mask is COCO's uncompressed run-length encoding: {"size": [H, W], "counts": [...]}, the lengths
        of runs in column-major order, beginning with the pixels outside.
        """
        background = self.description.background
        return {
            "split": self.split,
            "size": self.image.shape[0],
            "style": self.description.style,
            "relations": [list(relation) for relation in relations(self.description)],
            "background": {"kind": background.kind, "colours": list(background.colours), "named": background.named},
            "objects": [
                {
                    "name": placed.name,
                    "codepoints": placed.codepoints,
                    "style": placed.style,
                    "colour": placed.colour,
                    "box": list(placed.box),
                    "mask": run_lengths(placed.mask),
                }
                for placed in self.objects
            ],
        }

    def encode(self, extension: str) -> bytes:
        """The image as the bytes of a file; extension: "png", "webp" (lossless) or "jpg" (quality 95)."""
        buffer = io.BytesIO()
        Image.fromarray(self.image).save(buffer, **_SAVE[extension])
        return buffer.getvalue()


def draw(image: NDArray[np.uint8], art: Art, scene: Description, boxes: Iterable[Box]) -> tuple[Placed, ...]:
    """Draws the things of a scene into `image`, (S, S, 3) uint8, in place, later boxes before earlier ones; returns them as placed."""
    size = image.shape[0]
    placed: list[Placed] = []
    for box in boxes:
        thing = scene.things[box.thing]
        sprite = resize(art.sprite(thing.object, scene.style, size), min(size, max(4, round(size * max(box.width, box.height)))))
        if thing.recoloured and thing.colour is not None:
            sprite = recolour(sprite, art.palette(thing.object, scene.style), thing.colour)
        height, width = sprite.shape[:2]
        x, y = (min(max(round(size * at), 0), size - extent) for at, extent in ((box.x, width), (box.y, height)))
        behind = image[y : y + height, x : x + width]
        alpha = sprite[..., 3]
        behind[:] = np.minimum(sprite[..., :3] + (behind * (255 - alpha.astype(np.uint16))[..., None] + 127) // 255, 255)
        mask = np.zeros((size, size), bool)
        mask[y : y + height, x : x + width] = alpha >= min(_MASK_ALPHA, int(alpha.max()))
        placed = [replace(earlier, mask=earlier.mask & ~mask) for earlier in placed]
        placed.append(Placed(thing.object.name, thing.object.codepoints, scene.style, thing.colour, (0, 0, 0, 0), mask))
    return tuple(replace(one, box=_tight(one.mask)) for one in placed)


def relations(scene: Description) -> tuple[tuple[str, str, str], ...]:
    """What holds between the objects: (name, "left of" | "above" | "on top of", name)."""
    names = [thing.object.name for thing in scene.things]
    match scene.relation:
        case "left":
            return ((names[0], "left of", names[1]),)
        case "above":
            return ((names[0], "above", names[1]),)
        case "on top":
            return ((names[0], "on top of", names[1]),)
        case "row":
            return ((names[0], "left of", names[1]), (names[1], "left of", names[2]))
        case "apex up":
            return ((names[0], "above", names[1]), (names[0], "above", names[2]), (names[1], "left of", names[2]))
        case "apex down":
            return ((names[1], "above", names[0]), (names[2], "above", names[0]), (names[1], "left of", names[2]))
        case _:
            return ()


def run_lengths(mask: NDArray[np.bool_]) -> dict[str, list[int]]:
    """COCO's uncompressed run-length encoding of an (H, W) mask."""
    flat = np.concatenate([[False], mask.ravel(order="F"), [False]])
    edges = np.flatnonzero(flat[1:] != flat[:-1])
    counts = np.diff(np.concatenate([[0], edges, [mask.size]]))
    if len(counts) > 1 and counts[-1] == 0:
        counts = counts[:-1]
    return {"size": [int(side) for side in mask.shape], "counts": [int(count) for count in counts]}


def _tight(mask: NDArray[np.bool_]) -> tuple[int, int, int, int]:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1) if len(rows) else (0, 0, 0, 0)
