"""Writes the prompts of `eval judge` with what each of them claims, as t2i_experts/evaluation/emoji_prompts.jsonl.

    python scripts/judge_prompts.py --emoji EMOJI --out t2i_experts/evaluation/emoji_prompts.jsonl

A prompt describes a composed scene, which is not drawn: what is asked for can be shown, and stands out from its background. Four of each
ten lines show a combination that is held out of training (object and style, object and colour, two of two objects); the others are one
object, two in a relation (two of them), one object several times (two), and three. Each names the style, every relation and every count.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from emoji_art import Art, open_folder
from emoji_captions import _COLOUR_WORDS as COLOUR_WORDS
from emoji_captions import Description, Thing, caption
from emoji_composer import Composer

KINDS = ("held-out style", "held-out colour", "held-out pair", "held-out pair", "one", "two", "two", "count", "count", "three")
"""Of each ten lines."""

_WORDINGS = {
    "left": (("{a} to the left of {b}", ("left", "a", "b")), ("{b} to the right of {a}", ("right", "b", "a"))),
    "above": (("{a} above {b}", ("above", "a", "b")), ("{b} below {a}", ("below", "b", "a"))),
    "row": (("{a} on the left, {b} in the middle and {c} on the right", ("left", "a", "b"), ("left", "b", "c")),),
    "apex up": (("{a} above {b} and {c}", ("above", "a", "b"), ("above", "a", "c")),),
    "apex down": (("{a} below {b} and {c}", ("below", "a", "b"), ("below", "a", "c")),),
}
"""Patterns of the captions that training scenes have, with what each claims of the things a, b and c."""


def kind(scene: Description, composer: Composer) -> str:
    """Which of KINDS a scene is."""
    first = scene.things[0]
    if composer.split == "held-out":
        if len(scene.things) > 1:
            return "held-out pair"
        return "held-out style" if (first.object.name, scene.style) in composer.held_out.styles else "held-out colour"
    if any(thing.count > 1 for thing in scene.things):
        return "count"
    return ("one", "two", "three")[len(scene.things) - 1]


def prompt(scene: Description, split: str, rng: random.Random) -> dict[str, Any]:
    """The prompt of a scene with its claims, as `t2i_experts.evaluation.composition.Claim` has them."""
    relation = "above" if scene.relation == "on top" else scene.relation
    pattern, *sides = rng.choice(_WORDINGS.get(relation, ((None,),)))
    text = caption(scene, rng, style=True, relation=pattern)
    claims: list[list[str]] = [["style", scene.style]]
    for thing in scene.things:
        name = thing.object.name
        claims.append(["object", name])
        claims += [["count", name, str(thing.count)]] if thing.count > 1 else []
        claims += [["colour", name, thing.colour]] if thing.colour is not None and _says_colour(text, thing) else []
    names = {letter: thing.object.name for letter, thing in zip("abc", scene.things, strict=False)}
    claims += [[side, names[first], names[second]] for side, first, second in sides]
    if scene.background.named:
        claims.append(["background", scene.background.kind, *scene.background.colours])
    return {"prompt": text, "split": split, "claims": claims}


def _says_colour(text: str, thing: Thing) -> bool:
    """Whether the prompt asks for the colour: names like 'golden crown' leave no room for it."""
    return thing.recoloured and thing.colour is not None and any(word in text for word in COLOUR_WORDS.get(thing.colour, (thing.colour,)))


def prompts(art: Art, number: int, seed: int) -> Iterator[dict[str, Any]]:
    """`number` different prompts, in the order of KINDS again and again."""
    composers = {split: Composer(art, split=split, size=16, seed=seed) for split in ("held-out", "validation")}
    indices = {split: count() for split in composers}
    waiting: dict[str, list[dict[str, Any]]] = {name: [] for name in KINDS}
    seen: set[str] = set()
    for i in range(number):
        wanted = KINDS[i % len(KINDS)]
        split = "held-out" if wanted.startswith("held-out") else "validation"
        while not waiting[wanted]:
            index = next(indices[split])
            scene = composers[split].compose(index).description
            made = prompt(scene, split, random.Random(f"{seed}/{split}/{index}/prompt"))
            if made["prompt"] not in seen:
                seen.add(made["prompt"])
                waiting[kind(scene, composers[split])].append(made)
        yield waiting[wanted].pop(0)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--emoji", type=Path, required=True, help="folder of emoji art, see scripts/emoji_scenes.py")
    parser.add_argument("--out", type=Path, required=True, help="file to write, a JSON document a line")
    parser.add_argument("--count", type=int, default=1000, help="prompts, a multiple of ten")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(arguments)
    if args.count < 1 or args.count % len(KINDS):
        parser.error(f"--count {args.count}: allowed are multiples of {len(KINDS)}, so that each ten lines hold the same mixture")
    dump: Callable[[Any], str] = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
    lines = [dump(made) for made in prompts(open_folder(args.emoji), args.count, args.seed)]
    args.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
