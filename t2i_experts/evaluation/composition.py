"""Whether a picture shows what its prompt says: claims of one thing each, which a judge's reading bears out or not.

A prompt for an emoji scene makes claims: that an object is there, in which colour, how often, left or right of, above or below another one,
in which style, on which background. A category's score is the share of its claims that hold. `emoji_prompts.jsonl` holds prompts with
their claims, by `scripts/judge_prompts.py`: half of them of combinations that the training scenes never show.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from math import sqrt
from typing import Any

from t2i_experts.evaluation.judge import Found, JudgeConfig, Reading

RELATIONS = {"left": (0, 1), "right": (0, -1), "above": (1, 1), "below": (1, -1)}
"""Axis of each (0: x, 1: y), and the sign of the way from the first object to the second."""
CATEGORIES = ("object", "style", "colour", "count", *RELATIONS, "background")
WHOLE = "all of the prompt"
PROMPTS = "emoji_prompts.jsonl"
BLOCK = 10
"""Each ten lines of the prompts' file hold the same mixture of kinds."""

_APART = 0.35  # of the sum of two objects' extents: the least distance of their centres; boxes that touch are 0.5 apart
_OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}


@dataclass(frozen=True)
class Claim:
    """One thing that a prompt says, or that holds of a scene.

    words: ("owl",) for an object; ("owl", "purple") a colour; ("owl", "3") a count; ("owl", "cat") a relation, in which the owl is left of
    the cat, and so on; ("3D",) a style; ("plain", "blue") or ("vertical", "blue", "pink") a background.
    """

    category: str
    words: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The objects that it speaks of."""
        if self.category in RELATIONS:
            return self.words
        return self.words[:1] if self.category in ("object", "colour", "count") else ()


@dataclass(frozen=True)
class Prompt:
    """A prompt and its claims. split: "held-out" if it names a combination that the training scenes never show, else "validation"."""

    text: str
    split: str
    claims: tuple[Claim, ...]


def load_prompts(num: int, seed: int = 0) -> list[Prompt]:
    """`num` of the prompts that ship, in the file's mixture; the same ones for the same seed, and each again if they are too few.

    Raises ValueError for num < 1.
    """
    if num < 1:
        raise ValueError(f"num={num}; allowed: 1 or more prompts")
    text = resources.files(__package__).joinpath(PROMPTS).read_text(encoding="utf-8")
    plain = [json.loads(line) for line in text.splitlines()]
    prompts = [Prompt(one["prompt"], one["split"], tuple(Claim(c, tuple(words)) for c, *words in one["claims"])) for one in plain]
    blocks = [prompts[start : start + BLOCK] for start in range(0, len(prompts), BLOCK)]
    rng = random.Random(f"{seed}/prompts")
    rng.shuffle(blocks)
    ordered = [prompt for block in blocks for prompt in rng.sample(block, len(block))]
    return [ordered[i % len(ordered)] for i in range(num)]


def holds(claim: Claim, reading: Reading) -> bool:
    """Whether the reading bears the claim out. Of several objects of a name, all must have the colour and stand in the relation."""
    match claim.category:
        case "style":
            return reading.style == claim.words[0]
        case "background":
            return reading.background == claim.words
    found = [reading.called(name) for name in claim.names]
    if not all(found):
        return False
    match claim.category:
        case "object":
            return True
        case "colour":
            return all(one.colour == claim.words[1] for one in found[0])
        case "count":
            return len(found[0]) == int(claim.words[1])
    axis, sign = RELATIONS[claim.category]
    return all(sign * _gap(a, b, axis) > 0 for a in found[0] for b in found[1])


def _gap(a: Found, b: Found, axis: int) -> float:
    """How far the centre of b lies after that of a; 0 if they stand too near to each other for either to come first."""
    distance = (b.box[axis] + b.box[axis + 2] - a.box[axis] - a.box[axis + 2]) / 2
    extents = sum(one.box[axis + 2] - one.box[axis] for one in (a, b))
    return distance if abs(distance) >= _APART * extents else 0.0


def scene_claims(scene: Mapping[str, Any]) -> list[Claim]:
    """All that holds of a real scene, from its json (`Scene.metadata` in scripts/emoji_drawing.py); each relation in both orders.

    A background that no caption names is left out, unless it is white.
    """
    claims = [Claim("style", (scene["style"],))]
    names = [one["name"] for one in scene["objects"]]
    for name in dict.fromkeys(names):
        claims.append(Claim("object", (name,)))
        claims += [Claim("count", (name, str(names.count(name))))] if names.count(name) > 1 else []
        claims += [Claim("colour", (name, one["colour"])) for one in scene["objects"] if one["name"] == name and one["colour"]][:1]
    for first, relation, second in scene["relations"]:
        category = "left" if relation == "left of" else "above"
        claims += [Claim(category, (first, second)), Claim(_OPPOSITE[category], (second, first))]
    background = scene["background"]
    if background["named"] or background["colours"] == ["white"]:
        claims.append(Claim("background", (background["kind"], *background["colours"])))
    return claims


def contrary(claim: Claim, words: JudgeConfig, present: Sequence[str], rng: random.Random) -> Claim:
    """The claim with one thing changed, so that it is wrong: another object, style, colour, a count one more or less, the other side.

    present: the names of all objects of the scene.
    """

    def other(allowed: Iterable[str], not_these: Sequence[str]) -> str:
        return rng.choice([word for word in allowed if word not in not_these])

    first, *rest = claim.words
    match claim.category:
        case "object":
            return Claim("object", (other(words.objects, present),))
        case "style":
            return Claim("style", (other(words.styles, claim.words),))
        case "colour":
            return Claim("colour", (first, other(words.colours, rest)))
        case "count":
            return Claim("count", (first, str(int(rest[0]) + rng.choice((-1, 1)))))
        case "background":
            return Claim("background", (first, other(words.backgrounds, rest), *rest[1:]))
    return Claim(_OPPOSITE[claim.category], claim.words)


@dataclass(frozen=True)
class Score:
    """The share of claims that hold, and its standard error with the pictures as the independent draws.

    shown: that share among the cases in which all objects that the claim names are found; None for claims that name none.
    chance, shown_chance: the shares that would hold by chance, see `by_chance`; None for whole prompts.
    """

    right: float
    standard_error: float
    cases: int
    shown: float | None
    shown_cases: int
    chance: float | None = None
    shown_chance: float | None = None


def by_chance(claim: Claim, reading: Reading, said: Mapping[str, Counter[tuple[str, ...]]]) -> float:
    """How likely the claim would hold if what it says were drawn from all claims of its kind, as it is for pictures that do not heed it.

    An object, a style or a background is that of some claim; a colour, a count or a side is some claim's, of the same objects as before.
    said: how often each is said, as `things_said` counts it.
    """
    true: set[tuple[str, ...]]
    match claim.category:
        case "object":
            true = {(found.name,) for found in reading.objects}
        case "style":
            true = {(reading.style,)} if reading.style else set()
        case "background":
            true = {reading.background}
        case "colour" | "count":
            true = {word for word in said[claim.category] if holds(Claim(claim.category, claim.words[:1] + word), reading)}
        case _:
            true = {(side,) for side in RELATIONS if holds(Claim(side, claim.words), reading)}
    counted = said[_kind(claim.category)]
    return sum(counted[thing] for thing in true) / counted.total()


def things_said(claims: Iterable[Sequence[Claim]]) -> dict[str, Counter[tuple[str, ...]]]:
    """By kind of claim, how often each thing is said of objects or pictures; the four relations are one kind, "side"."""
    said: dict[str, Counter[tuple[str, ...]]] = {_kind(category): Counter() for category in CATEGORIES}
    for claim in (claim for some in claims for claim in some):
        thing = (claim.category,) if claim.category in RELATIONS else claim.words
        said[_kind(claim.category)][thing[1:] if claim.category in ("colour", "count") else thing] += 1
    return said


def _kind(category: str) -> str:
    return "side" if category in RELATIONS else category


def scores(claims: Sequence[Sequence[Claim]], readings: Sequence[Reading]) -> dict[str, Score]:
    """The score of each category that occurs, and of whole prompts. claims: of each picture."""
    pictures = list(zip(claims, readings, strict=True))
    said = things_said(claims)
    made = {category: _score(pictures, category, said) for category in CATEGORIES}
    whole = [all(holds(claim, reading) for claim in some) for some, reading in pictures]
    right = sum(whole) / max(len(whole), 1)
    made[WHOLE] = Score(right, _error([(held, 1) for held in whole]), len(whole), None, 0)
    return {category: score for category, score in made.items() if score.cases}


def _score(pictures: Sequence[tuple[Sequence[Claim], Reading]], category: str, said: Mapping[str, Counter[tuple[str, ...]]]) -> Score:
    counted: list[tuple[int, int]] = []  # of each picture: claims that hold, claims
    shown: list[bool] = []
    chances: list[float] = []
    shown_chances: list[float] = []
    for claims, reading in pictures:
        verdicts = [(holds(claim, reading), by_chance(claim, reading, said), claim) for claim in claims if claim.category == category]
        counted.append((sum(right for right, _, _ in verdicts), len(verdicts)))
        chances += [chance for _, chance, _ in verdicts]
        there = [(right, chance) for right, chance, claim in verdicts if claim.names and all(map(reading.called, claim.names))]
        shown += [right for right, _ in there]
        shown_chances += [chance for _, chance in there]
    cases = sum(count for _, count in counted)
    right = sum(count for count, _ in counted) / max(cases, 1)
    return Score(right, _error(counted), cases, _mean(shown), len(shown), _mean(chances), _mean(shown_chances))


def _error(counted: Sequence[tuple[int, int]]) -> float:
    """The standard error of the share of claims that hold, from how many hold and how many there are in each picture.

    The share is a ratio of two sums over pictures, whose variance is that of the residuals (Cochran 1977, 6.4). Where all hold, or none,
    these are zero whatever the share is: then it is the standard deviation that Laplace's rule of succession leaves.
    """
    held, cases = (sum(column) for column in zip(*counted, strict=True)) if counted else (0, 0)
    if held in (0, cases):
        pictures = sum(count > 0 for _, count in counted)
        return sqrt((pictures + 1) / (pictures + 3)) / (pictures + 2)
    return sqrt(sum((right - held / cases * count) ** 2 for right, count in counted)) / cases


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def measure(words: JudgeConfig, scenes: Sequence[Mapping[str, Any]], readings: Sequence[Reading], seed: int = 0) -> dict[str, Any]:
    """A judge's own accuracy on real scenes.

    single: of scenes with one object, how often the most certain object has its name, and has it among the five likeliest.
    confirmed, rejected: by category, the share of what holds that it confirms, and of what does not hold that it rejects. chance: the
    share that it would confirm if the claims were those of any scenes.
    """
    claims = [scene_claims(scene) for scene in scenes]
    rng = random.Random(seed)
    present = [[one["name"] for one in scene["objects"]] for scene in scenes]
    wrong = [[contrary(claim, words, names, rng) for claim in some] for some, names in zip(claims, present, strict=True)]
    true, false = scores(claims, readings), scores(wrong, readings)
    alone = [(scene["objects"][0]["name"], r.objects[:1]) for scene, r in zip(scenes, readings, strict=True) if len(scene["objects"]) == 1]
    single = {f"top{k}": sum(name in found.names[:k] for name, objects in alone for found in objects) / max(len(alone), 1) for k in (1, 5)}
    return {
        "scenes": len(scenes),
        "single": {"cases": len(alone), **single},
        "categories": {
            category: {
                "confirmed": true[category].right,
                "rejected": 1 - false[category].right,
                "chance": true[category].chance,
                "cases": true[category].cases,
            }
            for category in CATEGORIES
            if category in true
        },
    }
