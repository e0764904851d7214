"""Which scenes there are: what is drawn how often, what is held out, and the composition of the scene of an index."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
from emoji_art import STYLES, Art, EmojiObject
from emoji_captions import Background, Description, Thing, captions
from emoji_colour import COLOURS, target_lab
from emoji_drawing import Scene, draw
from emoji_layout import BackgroundMix, choose_background, draw_background, place
from numpy.typing import NDArray

Split = Literal["train", "validation", "held-out"]
SPLITS: tuple[Split, ...] = ("train", "validation", "held-out")
HELD_OUT = Path(__file__).with_name("held_out.json")
_TRIES = 1000


@dataclass(frozen=True)
class Mix:
    """What scenes are made of, as weights and probabilities; meant for a small model, which learns one object before two.

    common: how many times as often as another object one is drawn that the vocabulary calls common. recoloured: of single objects;
    recoloured_in_company: of each of several. styles: in the order of STYLES.
    """

    single: float = 0.50
    two: float = 0.30
    counted: float = 0.10
    three: float = 0.10
    common: float = 6.0
    recoloured: float = 0.33
    recoloured_in_company: float = 0.30
    counted_with_another: float = 0.35
    captions: tuple[int, ...] = (2, 3, 3, 4)
    styles: tuple[float, ...] = (0.3, 0.2, 0.25, 0.25)
    background: BackgroundMix = field(default_factory=BackgroundMix)


@dataclass(frozen=True)
class HeldOut:
    """What is never in training, by the objects' names. pairs: two objects in one scene, in either order."""

    styles: frozenset[tuple[str, str]]
    colours: frozenset[tuple[str, str]]
    pairs: frozenset[frozenset[str]]

    @classmethod
    def load(cls, path: Path = HELD_OUT) -> HeldOut:
        """Raises ValueError for a style or a colour that is not known."""
        plain = json.loads(path.read_text(encoding="utf-8"))
        for field_name, allowed in (("object_style", STYLES), ("object_colour", tuple(COLOURS))):
            for name, value in plain[field_name]:
                if value not in allowed:
                    raise ValueError(f"{path}: {field_name} {name!r}: {value!r}; allowed: {', '.join(allowed)}")
        return cls(
            frozenset((name, style) for name, style in plain["object_style"]),
            frozenset((name, colour) for name, colour in plain["object_colour"]),
            frozenset(frozenset(pair) for pair in plain["object_pair"]),
        )

    def found(self, scene: Description) -> bool:
        """Whether the scene shows anything that is held out."""
        names = [thing.object.name for thing in scene.things]
        return (
            any((name, scene.style) in self.styles for name in names)
            or any((thing.object.name, thing.colour) in self.colours for thing in scene.things)
            or any(frozenset((a, b)) in self.pairs for a in names for b in names)
        )


class Composer:
    """Composes the scenes of one split. Picklable, so that processes can share the work."""

    def __init__(
        self, art: Art, *, split: Split = "train", size: int = 64, seed: int = 0, mix: Mix | None = None, held_out: HeldOut | None = None
    ) -> None:
        """Raises ValueError for an unknown split and a size outside 16 to 1024."""
        if split not in SPLITS:
            raise ValueError(f"split {split!r}; allowed: {', '.join(SPLITS)}")
        if not 16 <= size <= 1024:
            raise ValueError(f"size {size}; allowed: 16 to 1024")
        self.art, self.split, self.size, self.seed = art, split, size, seed
        self.mix = mix or Mix()
        self.held_out = held_out or HeldOut.load()
        self._pools = {style: tuple(obj for obj in art.objects if style in art.styles(obj)) for style in STYLES}
        self._by_name = {obj.name: obj for obj in art.objects}

    def compose(self, index: int) -> Scene:
        """The scene of an index: always the same one. Raises ValueError if the art has too few objects for any."""
        rng = random.Random(f"{self.seed}/{self.split}/{index}")
        description = self._describe(rng)
        if self.split != "held-out":
            assert not self.held_out.found(description), f"scene {index} of {self.split} shows what is held out"
        aspects = [_aspect(self.art.sprite(thing.object, description.style, self.size)) for thing in description.things]
        boxes = place(description, aspects, rng)
        image = draw_background(description.background, self.size, rng)
        objects = draw(image, self.art, description, boxes)
        return Scene(image, captions(description, rng, rng.choice(self.mix.captions)), objects, description, self.split)

    def _describe(self, rng: random.Random) -> Description:
        for _ in range(_TRIES):
            scene = self._sketch_held_out(rng) if self.split == "held-out" else self._sketch(rng)
            if scene is not None and self.held_out.found(scene) == (self.split == "held-out"):
                return replace(
                    scene,
                    background=choose_background([self._mean(thing, scene.style) for thing in scene.things], rng, self.mix.background),
                )
        raise ValueError(f"no scene of split {self.split!r} can be composed from the {len(self.art.objects)} objects of this art")

    def _sketch(self, rng: random.Random) -> Description | None:
        """A scene without its background, or None for a choice of objects that cannot be."""
        mix = self.mix
        (style,) = rng.choices(STYLES, mix.styles)
        (kind,) = rng.choices(("single", "two", "counted", "three"), (mix.single, mix.two, mix.counted, mix.three))
        objects = self._pick(style, rng)
        if not objects:
            return None
        if kind == "single":
            return self._scene([self._thing(objects[0], style, rng, mix.recoloured)], "single", style)
        if kind == "counted":
            return self._counted(objects, style, rng)
        wanted = 2 if kind == "two" else 3
        if len(objects) < wanted:
            return None
        things = [self._thing(obj, style, rng, mix.recoloured_in_company) for obj in objects[:wanted]]
        return self._scene(things, _two(rng) if kind == "two" else rng.choice(("row", "row", "apex up", "apex down")), style)

    def _pick(self, style: str, rng: random.Random) -> list[EmojiObject]:
        """Three different objects of a style, or all that there are."""
        pool = self._pools[style]
        weights = [self.mix.common if obj.common else 1.0 for obj in pool]
        picked: list[EmojiObject] = []
        while len(picked) < min(3, len(pool)):
            (obj,) = rng.choices(pool, weights)
            if obj not in picked:
                picked.append(obj)
        return picked

    def _counted(self, objects: Sequence[EmojiObject], style: str, rng: random.Random) -> Description | None:
        countable = [obj for obj in objects if any(name.plural for name in obj.names)]
        if not countable:
            return None
        obj = countable[0]
        others = [other for other in objects if other is not obj]
        with_another = bool(others) and rng.random() < self.mix.counted_with_another
        count = rng.choice((2, 2, 3) if with_another else (2, 2, 3, 3, 4))
        things = [replace(self._thing(obj, style, rng, self.mix.recoloured_in_company), count=count)]
        relation = "single"
        if with_another:
            things.append(self._thing(others[0], style, rng, self.mix.recoloured_in_company))
            relation = "above" if rng.random() < 0.7 else "left"
            if rng.random() < 0.5:
                things.reverse()
        in_row = count == 2 or (count == 3 and rng.random() < 0.6)
        return self._scene(things, relation, style, in_row=in_row)

    def _sketch_held_out(self, rng: random.Random) -> Description | None:
        """A scene around one held-out combination; None if this art cannot show it."""
        kind = rng.choice(("style", "colour", "pair"))
        if kind == "style":
            name, style = rng.choice(sorted(self.held_out.styles))
            obj = self._by_name.get(name)
            if obj is None or style not in self.art.styles(obj):
                return None
            return self._scene([self._thing(obj, style, rng, 0.2)], "single", style)
        (style,) = rng.choices(STYLES, self.mix.styles)
        if kind == "colour":
            name, colour = rng.choice(sorted(self.held_out.colours))
            obj = self._by_name.get(name)
            if obj is None or style not in self.art.styles(obj) or colour not in self.art.palette(obj, style).targets:
                return None
            return self._scene([Thing(obj, colour, recoloured=True)], "single", style)
        names = sorted(rng.choice(sorted(self.held_out.pairs, key=sorted)))
        rng.shuffle(names)
        if not all(name in self._by_name and style in self.art.styles(self._by_name[name]) for name in names):
            return None
        return self._scene([self._thing(self._by_name[name], style, rng, 0.2) for name in names], _two(rng), style)

    def _scene(self, things: Sequence[Thing], relation: str, style: str, *, in_row: bool = False) -> Description:
        return Description(tuple(things), relation, style, Background("plain", ("white",), named=False), in_row)

    def _thing(self, obj: EmojiObject, style: str, rng: random.Random, recoloured: float) -> Thing:
        if not obj.recolourable:
            return Thing(obj)
        palette = self.art.palette(obj, style)
        if palette.targets and rng.random() < recoloured:
            return Thing(obj, rng.choice(palette.targets), recoloured=True)
        return Thing(obj, palette.own)

    def _mean(self, thing: Thing, style: str) -> NDArray[np.float32]:
        if thing.recoloured and thing.colour is not None:
            return target_lab(thing.colour)
        return np.array(self.art.palette(thing.object, style).mean, np.float32)


def _two(rng: random.Random) -> str:
    return rng.choices(("left", "above", "on top"), (0.55, 0.33, 0.12))[0]


def _aspect(sprite: NDArray[np.uint8]) -> float:
    return float(sprite.shape[1] / sprite.shape[0])
