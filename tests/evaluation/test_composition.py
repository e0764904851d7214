"""Claims hold of what they say and of nothing else; scores are shares with the error of pictures; the shipped prompts are sound."""

from __future__ import annotations

import random
from collections import Counter
from math import sqrt
from typing import Any

import pytest

from t2i_experts.evaluation.composition import (
    BLOCK,
    CATEGORIES,
    RELATIONS,
    WHOLE,
    Claim,
    contrary,
    holds,
    load_prompts,
    measure,
    scene_claims,
    scores,
)
from t2i_experts.evaluation.judge import Found, JudgeConfig, Reading

WORDS = JudgeConfig(("owl", "cat", "dog", "fox"), ("3D", "flat"), ("red", "blue"), ("white", "pink", "green"))


def found(name: str, x: float, y: float, side: float = 0.2, colour: str | None = "red") -> Found:
    return Found((name, "dog"), colour, (x - side / 2, y - side / 2, x + side / 2, y + side / 2), 0.9, (0.8, 0.2))


def seen(*objects: Found, background: tuple[str, ...] = ("plain", "pink")) -> Reading:
    return Reading(objects, "3D" if objects else None, background)


def claim(category: str, *words: str) -> Claim:
    return Claim(category, words)


def test_relations_hold_on_one_side_alone() -> None:
    positions = {"left": (-0.3, 0.0), "right": (0.3, 0.0), "above": (0.0, -0.3), "below": (0.0, 0.3)}
    for place, (dx, dy) in positions.items():
        reading = seen(found("owl", 0.5 + dx, 0.5 + dy), found("cat", 0.5, 0.5))
        assert [side for side in RELATIONS if holds(claim(side, "owl", "cat"), reading)] == [place]
        (opposite,) = (side for side in RELATIONS if holds(claim(side, "cat", "owl"), reading))
        assert {place, opposite} in ({"left", "right"}, {"above", "below"})
    near = seen(found("owl", 0.45, 0.5), found("cat", 0.55, 0.5))
    assert not any(holds(claim(side, "owl", "cat"), near) for side in RELATIONS)
    assert not any(holds(claim(side, "owl", "fox"), near) for side in RELATIONS)
    three = seen(found("owl", 0.2, 0.5), found("cat", 0.5, 0.5), found("owl", 0.8, 0.5))
    assert not holds(claim("left", "owl", "cat"), three) and not holds(claim("right", "owl", "cat"), three)


def test_words_counts_styles_and_backgrounds() -> None:
    reading = seen(
        found("owl", 0.2, 0.5), found("owl", 0.5, 0.5), found("cat", 0.8, 0.5, colour=None), background=("radial", "pink", "white")
    )
    right = [("object", "owl"), ("count", "owl", "2"), ("colour", "owl", "red"), ("style", "3D"), ("background", "radial", "pink", "white")]
    wrong = [("object", "dog"), ("count", "owl", "3"), ("colour", "owl", "blue"), ("colour", "cat", "red"), ("style", "flat")]
    wrong += [("background", "radial", "white", "pink"), ("background", "plain", "pink"), ("count", "dog", "1"), ("colour", "dog", "red")]
    assert all(holds(claim(*one), reading) for one in right) and not any(holds(claim(*one), reading) for one in wrong)
    mixed = seen(found("owl", 0.2, 0.5), found("owl", 0.5, 0.5, colour="blue"))
    assert not holds(claim("colour", "owl", "red"), mixed)
    assert not holds(claim("style", "3D"), seen())


def scene(*objects: tuple[str, float, float], relations: list[list[str]], named: bool = True) -> dict[str, Any]:
    placed = [{"name": name, "colour": "red"} for name, _, _ in objects]
    return {
        "style": "3D",
        "objects": placed,
        "relations": relations,
        "background": {"kind": "plain", "colours": ["pink"], "named": named},
    }


def test_a_perfect_reading_confirms_a_scene_and_rejects_its_contraries() -> None:
    places = [("owl", 0.2, 0.5), ("owl", 0.45, 0.5), ("cat", 0.8, 0.5)]
    made = scene(*places, relations=[["owl", "left of", "cat"]])
    reading = seen(*(found(*place) for place in places))
    claims = scene_claims(made)
    assert {one.category for one in claims} == set(CATEGORIES) - {"above", "below"}
    assert claim("left", "owl", "cat") in claims and claim("right", "cat", "owl") in claims and claim("count", "owl", "2") in claims
    assert not [one for one in claims if one.words == ("cat", "1")]
    on_top = scene(*places, relations=[["owl", "on top of", "cat"]], named=False)
    assert {one.category for one in scene_claims(on_top)} == {"style", "object", "colour", "count", "above", "below"}
    assert all(holds(one, reading) for one in claims)
    rng = random.Random(0)
    for _ in range(50):
        assert not any(holds(contrary(one, WORDS, ["owl", "owl", "cat"], rng), reading) for one in claims)
    accuracy = measure(WORDS, [made] * 3, [reading] * 3)
    assert {(own["confirmed"], own["rejected"]) for own in accuracy["categories"].values()} == {(1.0, 1.0)}


def test_accuracy_of_single_objects_is_by_the_likeliest_names() -> None:
    owl, dog = (scene((name, 0.5, 0.5), relations=[]) for name in ("owl", "dog"))
    accuracy = measure(WORDS, [owl, dog, dog, dog], [*[seen(found("owl", 0.5, 0.5))] * 3, seen()])
    assert accuracy["single"] == {"cases": 4, "top1": 0.25, "top5": 0.75}  # found() has dog as its second name


def test_the_error_is_that_of_pictures() -> None:
    """One claim a picture: the binomial error. The same claims twice in each picture tell no more than once."""
    readings = [seen(found("owl", 0.5, 0.5))] * 3 + [seen()] * 7
    once = scores([[claim("object", "owl")]] * 10, readings)
    twice = scores([[claim("object", "owl")] * 2] * 10, readings)
    assert once["object"].right == 0.3 and once["object"].standard_error == pytest.approx(sqrt(0.3 * 0.7 / 10))
    assert (twice["object"].cases, twice["object"].standard_error) == (20, pytest.approx(once["object"].standard_error))
    assert once[WHOLE].right == 0.3 and set(once) == {"object", WHOLE}
    colours = scores([[claim("colour", "owl", "red")]] * 10, readings)["colour"]
    assert (colours.right, colours.shown, colours.shown_cases) == (0.3, 1.0, 3)


def test_all_or_none_of_a_few_pictures_is_not_certain() -> None:
    """The standard deviation of a share of which nothing was known, after ten of ten draws: that of the distribution Beta(11, 1)."""
    readings = [seen(found("owl", 0.5, 0.5))] * 10
    all_or_none = [scores([[claim("object", name)] * 2] * 10, readings) for name in ("owl", "cat")]
    assert [one["object"].right for one in all_or_none] == [1, 0]
    for one in all_or_none:
        assert one["object"].standard_error == one[WHOLE].standard_error == pytest.approx(sqrt(11 / (12**2 * 13)))
    assert scores([], []) == {}


def test_chance_is_the_score_of_pictures_that_do_not_heed_their_prompts() -> None:
    """Half of the prompts say one thing and half another: what always shows the same is right by chance, what heeds them is not."""
    claims = [[claim("left", "owl", "cat"), claim("colour", "owl", "red"), claim("count", "cat", "2"), claim("object", "owl")]] * 5
    claims += [[claim("right", "owl", "cat"), claim("colour", "owl", "blue"), claim("count", "cat", "3"), claim("object", "dog")]] * 5
    styles = [[claim("style", "3D"), claim("background", "plain", "pink")]] * 5
    styles += [[claim("style", "flat"), claim("background", "plain", "blue")]] * 5
    claims = [first + second for first, second in zip(claims, styles, strict=True)]
    cats = (found("cat", 0.6, 0.2), found("cat", 0.8, 0.8))
    same = scores(claims, [seen(found("owl", 0.2, 0.5), *cats)] * 10)
    heeding = [seen(found("owl", 0.2, 0.5), *cats)] * 5
    heeding += [
        Reading((found("owl", 0.8, 0.5, colour="blue"), *(found("cat", x, 0.2) for x in (0.1, 0.3, 0.5))), "flat", ("plain", "blue"))
    ] * 5
    heeded, blank = scores(claims, heeding), scores(claims, [seen(background=("plain", "white"))] * 10)
    for category in ("colour", "count", "object", "style", "background"):
        assert same[category].right == same[category].chance == 0.5
        assert heeded[category].chance == 0.5 and blank[category].chance == blank[category].right == 0
    assert heeded["colour"].right == heeded["count"].right == heeded["style"].right == 1
    assert (same["left"].right, same["right"].right, same["left"].chance, same["right"].chance) == (1, 0, 0.5, 0.5)
    assert same["colour"].shown_chance == 0.5 and blank["colour"].shown_chance is None and same[WHOLE].chance is None
    half = scores(claims, [seen(found("owl", 0.2, 0.5))] * 5 + [seen()] * 5)["colour"]
    assert (half.right, half.chance, half.shown, half.shown_chance) == (0.5, 0.25, 1, 0.5)


def test_the_prompts_that_ship_are_sound() -> None:
    prompts = load_prompts(1000)
    assert len({prompt.text for prompt in prompts}) == 1000
    for block in range(0, 1000, BLOCK):
        assert Counter(prompt.split for prompt in prompts[block : block + BLOCK]) == {"held-out": 4, "validation": 6}
    for prompt in prompts:
        claimed = Counter(one.category for one in prompt.claims)
        assert set(claimed) <= set(CATEGORIES) and claimed["style"] == 1 and claimed["object"] >= 1 and claimed["background"] <= 1
        assert claimed["background"] == ("background" in prompt.text)
        objects = {one.words[0] for one in prompt.claims if one.category == "object"}
        assert all(set(one.names) <= objects for one in prompt.claims)
        for one in prompt.claims:
            if one.category in RELATIONS:
                assert one.category in prompt.text and len(set(one.words)) == 2
    total = Counter(one.category for prompt in prompts for one in prompt.claims)
    assert min(total[category] for category in CATEGORIES) >= 100


def test_prompts_are_chosen_by_the_seed() -> None:
    assert load_prompts(200) == load_prompts(200) and load_prompts(50) == load_prompts(200)[:50]
    assert load_prompts(50, seed=1) != load_prompts(50)
    many = load_prompts(1010)
    assert many[1000:] == many[:10]
    with pytest.raises(ValueError, match="num=0"):
        load_prompts(0)
