"""What one would type for a scene: several captions each, all true, in varied wording, from a whole sentence to a bare word."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from emoji_art import EmojiObject

COUNT_WORDS = {2: "two", 3: "three", 4: "four"}

_COLOUR_WORDS = {"light blue": ("light blue", "sky blue", "cyan"), "gray": ("gray", "grey"), "purple": ("purple", "purple", "violet")}
_STYLE_PREFIXES = {
    "3D": ("a 3D emoji of", "a 3D emoji of", "a 3D render of", "a 3D icon of", "3D art of"),
    "gradient": ("a gradient emoji of", "a gradient emoji of", "a gradient icon of", "gradient art of"),
    "flat": ("a flat emoji of", "a flat emoji of", "a flat icon of", "a flat design of", "flat art of"),
    "Noto": ("a Noto emoji of", "a Noto emoji of", "a Noto icon of", "Noto art of"),
}
_STYLE_SUFFIXES = {
    "3D": (", 3D emoji", ", 3D style", " in 3D", ", 3D render"),
    "gradient": (", gradient emoji", ", gradient style", " in gradient style"),
    "flat": (", flat emoji", ", flat style", " in flat style", ", flat design"),
    "Noto": (", Noto emoji", ", Noto style", " in Noto style"),
}
_PLAIN_PREFIXES = ("an emoji of", "a picture of", "an image of", "an icon of", "an illustration of", "clip art of", "a drawing of")
_LEFT = (
    "{a} to the left of {b}",
    "{a} to the left of {b}",
    "{a} on the left of {b}",
    "{a} left of {b}",
    "{a} on the left and {b} on the right",
    "{b} to the right of {a}",
    "{b} to the right of {a}",
    "{b} on the right of {a}",
    "{b} right of {a}",
)
_BESIDE = (
    "{a} next to {b}",
    "{b} next to {a}",
    "{a} beside {b}",
    "{b} beside {a}",
    "{a} and {b} side by side",
    "{a} and {b}",
    "{b} and {a}",
)
_ABOVE = (
    "{a} above {b}",
    "{a} above {b}",
    "{a} over {b}",
    "{a} at the top and {b} at the bottom",
    "{b} below {a}",
    "{b} below {a}",
    "{b} under {a}",
    "{b} underneath {a}",
)
_TOGETHER = ("{a} and {b}", "{b} and {a}", "{a} with {b}")
_ON_TOP = ("{a} on top of {b}", "{a} on top of {b}", "{a} sitting on {b}", "{b} under {a}", "{b} with {a} on top")
_ROW = (
    "{a}, {b} and {c} from left to right",
    "{a}, {b} and {c} in a row",
    "{a} to the left of {b}, and {c} to the right of {b_again}",
    "{b} between {a} and {c}",
    "{b} in the middle, {a} on the left and {c} on the right",
    "{a} on the left, {b} in the middle and {c} on the right",
)
_APEX_UP = ("{a} above {b} and {c}", "{b} and {c} below {a}", "{a} at the top, {b} at the bottom left and {c} at the bottom right")
_APEX_DOWN = ("{b} and {c} above {a}", "{a} below {b} and {c}", "{a} at the bottom, {b} at the top left and {c} at the top right")
_ALL_THREE = ("{a}, {b} and {c}", "{c}, {a} and {b}")
_AN = re.compile(r"(?!uni|use|eu|one|ufo|uk)[aeiou]|(?:hour|x-ray|8|atm|f1)", re.IGNORECASE)
_COLOUR_WORD = re.compile(r"\b(red|orange|yellow|green|blue|purple|pink|brown|black|white|gr[ae]y|golden|gold)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Thing:
    """What a caption speaks of: an object, `count` times. colour: what it visibly has; recoloured: whether that must be said."""

    object: EmojiObject
    colour: str | None = None
    recoloured: bool = False
    count: int = 1


@dataclass(frozen=True)
class Background:
    """plain: colours = (colour,); vertical: (top, bottom); radial: (centre, edge). named: whether captions must say it."""

    kind: str
    colours: tuple[str, ...]
    named: bool


@dataclass(frozen=True)
class Description:
    """A scene as captions know it.

    relation: "single", "left" (things[0] left of things[1]), "above", "on top", "row" (left to right), "apex up" or "apex down"
    (things[0] alone, things[1] left of things[2]). in_row: whether repeated things stand in one row.
    """

    things: tuple[Thing, ...]
    relation: str
    style: str
    background: Background
    in_row: bool = False


def captions(scene: Description, rng: random.Random, count: int) -> tuple[str, ...]:
    """`count` different captions, all true. The first is a whole phrase with the style, and with any named background."""
    made = [caption(scene, rng, style=True)]
    while len(made) < count:
        another = _keywords(scene, rng) if rng.random() < 0.15 else caption(scene, rng, style=rng.random() < 0.25)
        if another not in made:
            made.append(another)
    return tuple(made)


def caption(scene: Description, rng: random.Random, *, style: bool, relation: str | None = None) -> str:
    """One sentence or phrase. style: whether it names the style. relation: the pattern of the relation, "{a} above {b}"; None: any."""
    phrase = _relation(scene, rng, relation)
    bare = not style and not scene.background.named and scene.relation == "single" and scene.things[0].count == 1
    if bare and rng.random() < 0.4:
        return _noun(scene.things[0], rng, article=False)
    if style:
        form = rng.random()
        single = scene.relation == "single"
        if form < 0.2 and single:
            phrase = _noun(scene.things[0], rng, before=scene.style, article=rng.random() < 0.6)
        elif form < 0.65:
            phrase = f"{rng.choice(_STYLE_PREFIXES[scene.style])} {phrase}"
        else:
            return phrase + _background(scene.background, rng) + rng.choice(_STYLE_SUFFIXES[scene.style])
    elif rng.random() < 0.15:
        phrase = f"{rng.choice(_PLAIN_PREFIXES)} {phrase}"
    return phrase + _background(scene.background, rng)


def with_article(phrase: str) -> str:
    """'owl' -> 'an owl', 'unicorn' -> 'a unicorn'."""
    return f"{'an' if _AN.match(phrase) else 'a'} {phrase}"


def background_words(background: Background, rng: random.Random) -> str:
    """'light blue background', 'gradient background from blue to pink', ..."""
    if background.kind == "plain":
        return f"{background.colours[0]} background"
    first, second = background.colours
    if background.kind == "radial":
        return rng.choice(
            (
                f"radial gradient background from {first} to {second}",
                f"radial gradient background, {first} in the center and {second} at the edges",
            )
        )
    return rng.choice(
        (
            f"gradient background from {first} to {second}",
            f"{first} to {second} gradient background",
            f"gradient background, {first} at the top and {second} at the bottom",
            f"background fading from {first} to {second}",
        )
    )


def _relation(scene: Description, rng: random.Random, pattern: str | None) -> str:
    things = scene.things
    if pattern is not None:
        return pattern.format(**{letter: _noun(thing, rng) for letter, thing in zip("abc", things, strict=False)})
    if scene.relation == "single":
        phrase = _noun(things[0], rng)
        if things[0].count > 1 and scene.in_row and rng.random() < 0.3:
            phrase += rng.choice((" in a row", " side by side"))
        return phrase
    a, b = _noun(things[0], rng), _noun(things[1], rng)
    if scene.relation == "left":
        return rng.choice(_LEFT if rng.random() < 0.75 else _BESIDE).format(a=a, b=b)
    if scene.relation == "above":
        return rng.choice(_ABOVE if rng.random() < 0.85 else _TOGETHER).format(a=a, b=b)
    if scene.relation == "on top":
        return rng.choice(_ON_TOP).format(a=a, b=b)
    patterns = {"row": _ROW, "apex up": _APEX_UP, "apex down": _APEX_DOWN}[scene.relation]
    c = _noun(things[2], rng)
    return rng.choice(patterns if rng.random() < 0.85 else _ALL_THREE).format(a=a, b=b, c=c, b_again=re.sub(r"^an? ", "the ", b))


def _noun(thing: Thing, rng: random.Random, *, before: str = "", article: bool = True) -> str:
    """The thing with its colour and article: 'a purple owl', 'two red apples', 'grapes'. before: an adjective, such as the style."""
    names = thing.object.names
    if thing.colour is not None:  # 'a blue mandarin', not 'a blue golden crown'
        names = tuple(name for name in names if not _COLOUR_WORD.search(name.text)) or names
    if thing.count > 1:
        names = tuple(name for name in names if name.plural is not None)
    name = names[0] if rng.random() < 0.6 else rng.choice(names)
    say_colour = thing.colour is not None and (thing.recoloured or rng.random() < 0.3) and not _COLOUR_WORD.search(name.text)
    colour = rng.choice(_COLOUR_WORDS.get(thing.colour, (thing.colour,))) if say_colour and thing.colour is not None else ""
    words = " ".join(word for word in (before, colour, name.text if thing.count == 1 else name.plural) if word)
    if thing.count > 1:
        count = str(thing.count) if rng.random() < 0.2 else COUNT_WORDS[thing.count]
        return f"{count} {words}"
    if not article or not name.article:
        return words
    return f"the {words}" if name.article == "the" else with_article(words)


def _background(background: Background, rng: random.Random) -> str:
    """', light blue background' or the like, or nothing where none needs to be named."""
    if not background.named:
        return ""
    words = background_words(background, rng)
    return rng.choice((f" on {with_article(words)}", f" on {with_article(words)}", f" against {with_article(words)}", f", {words}"))


def _keywords(scene: Description, rng: random.Random) -> str:
    """'owl, purple, 3D, blue background'."""
    nouns: Sequence[str] = [_noun(thing, rng, article=False) for thing in scene.things]
    words = [
        *nouns,
        *([scene.style] if rng.random() < 0.5 else []),
        *([background_words(scene.background, rng)] if scene.background.named else []),
    ]
    return ", ".join(words)
