"""Where the objects of a scene stand, and what stands behind them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from emoji_captions import Background, Description
from emoji_colour import oklab
from numpy.typing import NDArray

BACKGROUNDS = {
    "white": (255, 255, 255),
    "black": (16, 16, 18),
    "gray": (136, 136, 138),
    "light gray": (212, 212, 215),
    "dark gray": (72, 72, 76),
    "red": (222, 52, 56),
    "dark red": (130, 22, 26),
    "orange": (250, 148, 44),
    "yellow": (255, 220, 50),
    "light yellow": (255, 244, 178),
    "green": (62, 172, 76),
    "light green": (182, 232, 176),
    "dark green": (24, 92, 44),
    "teal": (38, 156, 150),
    "light blue": (172, 220, 248),
    "blue": (46, 108, 224),
    "dark blue": (20, 44, 110),
    "purple": (130, 70, 202),
    "light purple": (214, 194, 242),
    "dark purple": (66, 32, 104),
    "pink": (255, 156, 200),
    "light pink": (255, 216, 230),
    "brown": (136, 88, 46),
    "light brown": (204, 168, 128),
    "beige": (244, 230, 204),
}
"""sRGB of the backgrounds that captions name; what is drawn differs from it a little."""

_UNNAMED = ("light gray", "light blue", "light green", "light yellow", "light pink", "light purple", "beige")  # drawn half-way to white
_NAMED_CONTRAST = 0.15  # OKLab distance of an object's mean colour from the background
_WHITE_CONTRAST = 0.08


@dataclass(frozen=True)
class Box:
    """Where one copy of things[thing] stands; in units of the frame's side once the layout is done. x, y: upper left corner."""

    thing: int
    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True)
class BackgroundMix:
    """Weights of the kinds of backgrounds. unnamed: a pale plain one that no caption mentions."""

    white: float = 0.50
    white_named: float = 0.07
    unnamed: float = 0.07
    plain: float = 0.26
    gradient: float = 0.10


def place(scene: Description, aspects: Sequence[float], rng: random.Random) -> tuple[Box, ...]:
    """A box for each copy of each thing, so that the relation holds. aspects: width / height of each thing."""
    if scene.relation == "single" and scene.things[0].count == 1:
        return _fit([_leaf(0, aspects[0], 1.0)], rng.uniform(0.55, 0.95), rng)
    blocks = [_copies(index, aspects[index], thing.count, scene.in_row, rng) for index, thing in enumerate(scene.things)]
    blocks = [_scaled(block, rng.uniform(0.8, 1.2)) for block in blocks]
    gap = rng.uniform(0.06, 0.2)
    if scene.relation == "left":
        boxes = _stack(blocks, axis=0, gap=gap, jitter=0.15, rng=rng)
    elif scene.relation == "above":
        boxes = _stack(blocks, axis=1, gap=gap, jitter=0.15, rng=rng)
    elif scene.relation == "on top":
        boxes = _stack(blocks, axis=1, gap=-0.04, jitter=0.06, rng=rng)
    elif scene.relation == "row":
        boxes = _stack(blocks, axis=0, gap=0.7 * gap, jitter=0.1, rng=rng)
    elif scene.relation in ("apex up", "apex down"):
        pair = _stack(blocks[1:], axis=0, gap=gap, jitter=0.05, rng=rng)
        boxes = _stack([blocks[0], pair] if scene.relation == "apex up" else [pair, blocks[0]], axis=1, gap=0.7 * gap, jitter=0.1, rng=rng)
    else:
        boxes = blocks[0]
    return _fit(boxes, rng.uniform(0.84, 0.97), rng)


def choose_background(means: Sequence[NDArray[np.float32]], rng: random.Random, mix: BackgroundMix) -> Background:
    """A background from which every object stands out. means: (3,) OKLab mean of each object."""
    weights = (mix.white, mix.white_named, mix.unnamed, mix.plain, mix.gradient)
    (kind,) = rng.choices(("white", "white named", "unnamed", "plain", "gradient"), weights)
    if kind in ("white", "white named"):
        if _contrast(means, "white") >= _WHITE_CONTRAST:
            return Background("plain", ("white",), named=kind == "white named")
        kind = "unnamed" if kind == "white" else "plain"
    if kind == "unnamed":
        return Background("plain", (max(rng.sample(_UNNAMED, 4), key=lambda name: _contrast(means, name)),), named=False)
    names = [name for name in BACKGROUNDS if name != "white"]
    standing_out = [name for name in names if _contrast(means, name) >= _NAMED_CONTRAST]
    if kind == "gradient" and len(standing_out) >= 2:
        first, second = rng.sample(standing_out, 2)
        return Background(rng.choice(("vertical", "vertical", "radial")), (first, second), named=True)
    return Background("plain", (rng.choice(standing_out or names),), named=True)


def draw_background(background: Background, size: int, rng: random.Random) -> NDArray[np.uint8]:
    """(size, size, 3) uint8 sRGB."""
    ends = []
    for name in background.colours:
        colour: NDArray[np.floating[Any]] = np.array(BACKGROUNDS[name], np.float32)
        if not background.named and name != "white":
            colour = (colour + 255) / 2
        noise = np.zeros(3) if name == "white" else np.array([rng.uniform(-7, 7) for _ in range(3)])
        ends.append(np.clip(colour + noise, 0, 255))
    if background.kind == "plain":
        return np.broadcast_to(ends[0].astype(np.uint8), (size, size, 3)).copy()
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size
    mix: NDArray[np.floating[Any]] = np.broadcast_to(axis[:, None], (size, size))
    if background.kind == "radial":
        mix = np.minimum(np.hypot(axis[:, None] - 0.5, axis[None] - 0.5) / 0.68, 1)
    return (ends[0] + mix[..., None] * (ends[1] - ends[0]) + 0.5).astype(np.uint8)


def _contrast(means: Sequence[NDArray[np.float32]], background: str) -> float:
    behind = oklab(np.array(BACKGROUNDS[background], np.uint8))
    return min(float(np.linalg.norm(mean - behind)) for mean in means)


def _leaf(thing: int, aspect: float, longest: float) -> Box:
    return Box(thing, 0, 0, longest * min(aspect, 1), longest / max(aspect, 1))


def _copies(thing: int, aspect: float, count: int, in_row: bool, rng: random.Random) -> list[Box]:
    """`count` copies in one row, or in two rows: three as a triangle, four as a square."""
    leaves = [[_leaf(thing, aspect, 1.0)] for _ in range(count)]
    gap = rng.uniform(0.06, 0.16)
    if in_row or count < 3:
        return _stack(leaves, axis=0, gap=gap, jitter=0.08, rng=rng) if count > 1 else leaves[0]
    rows = [_stack(row, axis=0, gap=gap, jitter=0.05, rng=rng) for row in (leaves[: count // 2], leaves[count // 2 :])]
    return _stack(rows, axis=1, gap=gap, jitter=0.0, rng=rng)


def _stack(blocks: Sequence[Sequence[Box]], *, axis: int, gap: float, jitter: float, rng: random.Random) -> list[Box]:
    """Blocks one after another along an axis (0: x, 1: y), centred across it but for a jitter. gap, jitter: in mean block sizes."""
    extents = [_extent(block) for block in blocks]
    unit = sum(max(extent[2:]) for extent in extents) / len(extents)
    placed, at = [], 0.0
    for block, extent in zip(blocks, extents, strict=True):
        across = -extent[1 - axis] - extent[3 - axis] / 2 + rng.uniform(-jitter, jitter) * unit
        along = at - extent[axis]
        dx, dy = (along, across) if axis == 0 else (across, along)
        placed += [replace(box, x=box.x + dx, y=box.y + dy) for box in block]
        at += extent[2 + axis] + gap * unit
    return placed


def _scaled(block: Sequence[Box], factor: float) -> list[Box]:
    return [Box(box.thing, box.x * factor, box.y * factor, box.width * factor, box.height * factor) for box in block]


def _extent(boxes: Sequence[Box]) -> tuple[float, float, float, float]:
    """Left, top, width, height."""
    left, top = min(box.x for box in boxes), min(box.y for box in boxes)
    return left, top, max(box.x + box.width for box in boxes) - left, max(box.y + box.height for box in boxes) - top


def _fit(boxes: Sequence[Box], fill: float, rng: random.Random) -> tuple[Box, ...]:
    """The boxes scaled so that the longer extent is `fill`, and moved into the frame, more often near its middle than not."""
    left, top, width, height = _extent(boxes)
    scale = fill / max(width, height)
    x = (1 - width * scale) * (0.5 + 0.7 * (rng.random() - 0.5))
    y = (1 - height * scale) * (0.5 + 0.7 * (rng.random() - 0.5))
    return tuple(
        Box(box.thing, x + (box.x - left) * scale, y + (box.y - top) * scale, box.width * scale, box.height * scale) for box in boxes
    )
