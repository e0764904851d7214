"""Draws the example data set: small pictures of one or two coloured shapes, with captions that say what is seen and where.

    python scripts/draw_shapes.py OUT [--train 192] [--validation 32] [--samples-per-shard 48] [--size 64] [--seed 0]

writes the shard folders OUT/train and OUT/validation, which share no scene. `shards/shapes` in the repository is what
the defaults draw; ask for more pictures to train on them in earnest.
"""

from __future__ import annotations

import argparse
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TypeVar

import numpy as np
from PIL import Image, ImageDraw

from t2i_experts.shards.writer import ShardWriter

COLOURS = {
    "red": (214, 39, 40),
    "orange": (255, 140, 20),
    "yellow": (250, 210, 40),
    "green": (44, 150, 60),
    "blue": (40, 90, 210),
    "purple": (130, 60, 170),
    "pink": (245, 140, 185),
    "black": (25, 25, 25),
}
BACKGROUNDS = {"white": (255, 255, 255), "grey": (190, 190, 190)}
SHAPES = ("circle", "square", "triangle", "star", "diamond", "cross")
SIZES = {"small": 0.13, "": 0.2, "large": 0.34}
"""Word (none for the middle) -> distance from the centre to the outline, as a fraction of the picture's side."""

Option = TypeVar("Option")


@dataclass(frozen=True)
class Shape:
    """One shape; x and y of its centre run from 0 to 1, left to right and top to bottom."""

    name: str
    colour: str
    size: str
    x: float
    y: float

    @property
    def phrase(self) -> str:
        """Such as "a small red circle"."""
        words = " ".join(word for word in (self.size, self.colour, self.name) if word)
        return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"

    def outline(self) -> list[tuple[float, float]]:
        """Corners of the polygon, in the picture's coordinates; for a circle those of its bounding square."""
        r = SIZES[self.size]
        match self.name:
            case "circle":
                points = [(-1.0, -1.0), (1.0, 1.0)]
            case "square":
                points = [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)]
            case "triangle":
                points = _star(3, 1.0)
            case "star":
                points = _star(5, 0.42)
            case "diamond":
                points = [(0.0, -1.0), (0.75, 0.0), (0.0, 1.0), (-0.75, 0.0)]
            case _:
                a = 0.33
                points = [(-a, -1), (a, -1), (a, -a), (1, -a), (1, a), (a, a), (a, 1), (-a, 1), (-a, a), (-1, a), (-1, -a), (-a, -a)]
        return [(self.x + r * x, self.y + r * y) for x, y in points]


@dataclass(frozen=True)
class Scene:
    """One shape, or two of which the first lies to the left of the second or above it."""

    shapes: tuple[Shape, ...]
    background: str

    @property
    def description(self) -> tuple[object, ...]:
        """What the scene shows, but for exact places: scenes that differ in it look different."""
        first, last = self.shapes[0], self.shapes[-1]
        return tuple((shape.name, shape.colour, shape.size) for shape in self.shapes), self.background, first.x < last.x

    def captions(self) -> list[str]:
        """Ways to say it, the plainest first."""
        ground = f" on a {self.background} background"
        if len(self.shapes) == 1:
            phrase = self.shapes[0].phrase
            return [phrase, phrase + ground, f"a picture of {phrase}"]
        first, second = (shape.phrase for shape in self.shapes)
        there, back = ("to the left of", "to the right of") if self.shapes[0].x < self.shapes[1].x else ("above", "below")
        return [f"{first} {there} {second}", f"{second} {back} {first}", f"{first} and {second}{ground}"]

    def draw(self, size: int) -> Image.Image:
        """The scene at size x size pixels, RGB; each pixel is the mean of 2 x 2 points."""
        fine = Image.new("RGB", (2 * size, 2 * size), BACKGROUNDS[self.background])
        pen = ImageDraw.Draw(fine)
        for shape in self.shapes:
            points = [(round(2 * size * x), round(2 * size * y)) for x, y in shape.outline()]
            draw = pen.ellipse if shape.name == "circle" else pen.polygon
            draw(points, fill=COLOURS[shape.colour])
        return fine.resize((size, size), Image.Resampling.BOX)


def scenes(count: int, seed: int) -> list[Scene]:
    """Different scenes, about half of them with two shapes; the same for the same seed. Raises ValueError if there are not so many."""
    random = Random(seed)
    found: dict[tuple[object, ...], Scene] = {}
    for _ in range(100 * count):
        if len(found) == count:
            break
        scene = _scene(random)
        found.setdefault(scene.description, scene)
    if len(found) < count:
        raise ValueError(f"only {len(found)} different scenes were found, where {count} are asked for")
    return list(found.values())


def png(image: Image.Image) -> bytes:
    """The picture as a small PNG: with a palette if it has no more than 256 colours, which loses nothing."""
    pixels = np.asarray(image)
    colours, indices = np.unique(pixels.reshape(-1, 3), axis=0, return_inverse=True)
    if len(colours) <= 256:
        image = Image.fromarray(indices.reshape(pixels.shape[:2]).astype(np.uint8), "P")
        image.putpalette(colours.tobytes())
    out = io.BytesIO()
    image.save(out, "PNG", optimize=True, bits=4 if len(colours) <= 16 else 8)
    return out.getvalue()


def write(folder: Path, drawn: Sequence[Scene], *, size: int, samples_per_shard: int) -> None:
    """One shard folder. Every other scene has one caption, the others two or three."""
    with ShardWriter(folder, samples_per_shard=samples_per_shard) as writer:
        for i, scene in enumerate(drawn):
            writer.write(f"{i:06d}", png(scene.draw(size)), "png", scene.captions()[: (1, 2, 1, 3)[i % 4]])


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Draw the example data set of coloured shapes.")
    parser.add_argument("out", type=Path, help="folder that gets train/ and validation/")
    parser.add_argument("--train", type=int, default=192, help="pictures to train on (192)")
    parser.add_argument("--validation", type=int, default=32, help="further pictures to validate on (32)")
    parser.add_argument("--samples-per-shard", type=int, default=48, help="pictures in one tar (48)")
    parser.add_argument("--size", type=int, default=64, help="pixels of a side (64)")
    parser.add_argument("--seed", type=int, default=0, help="another seed draws other scenes (0)")
    arguments = parser.parse_args()
    try:
        drawn = scenes(arguments.train + arguments.validation, arguments.seed)
        for name, part in (("train", drawn[: arguments.train]), ("validation", drawn[arguments.train :])):
            write(arguments.out / name, part, size=arguments.size, samples_per_shard=arguments.samples_per_shard)
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")


def _scene(random: Random) -> Scene:
    background = _pick(random, tuple(BACKGROUNDS))
    if random.random() < 0.5:
        size = _pick(random, tuple(SIZES))
        return Scene((_shape(random, size, *(_between(random, SIZES[size] + 0.02, 0.98 - SIZES[size]) for _ in "xy")),), background)
    jitter = [_between(random, -0.06, 0.06) for _ in range(4)]
    places = [(0.26, 0.5), (0.74, 0.5)] if random.random() < 0.5 else [(0.5, 0.26), (0.5, 0.74)]
    sideways = places[0][0] < places[1][0]
    shapes = []
    for i, (x, y) in enumerate(places):
        dx, dy = jitter[2 * i : 2 * i + 2]
        size = _pick(random, ("small", ""))
        # Two shapes stand beside each other or above each other, never askew: the direction across is shared.
        shapes.append(_shape(random, size, x + (dx / 3 if sideways else jitter[0]), y + (jitter[1] if sideways else dy / 3)))
    return Scene(tuple(shapes), background)


def _shape(random: Random, size: str, x: float, y: float) -> Shape:
    return Shape(_pick(random, SHAPES), _pick(random, tuple(COLOURS)), size, x, y)


def _star(points: int, inner: float) -> list[tuple[float, float]]:
    """A star with its first point up; with `inner` = 1 its 2 n corners are reduced to the n of a regular polygon."""
    corners = []
    for i in range(points if inner == 1 else 2 * points):
        angle = 2 * math.pi * i / (points if inner == 1 else 2 * points) - math.pi / 2
        radius = inner if i % 2 and inner != 1 else 1.0
        corners.append((radius * math.cos(angle), radius * math.sin(angle)))
    return corners


def _between(random: Random, low: float, high: float) -> float:
    return low + (high - low) * random.random()


def _pick(random: Random, options: Sequence[Option]) -> Option:
    """Only `random()` itself is promised to stay the same in all versions of Python."""
    return options[int(random.random() * len(options))]


if __name__ == "__main__":
    main()
