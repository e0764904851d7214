from __future__ import annotations

import dataclasses
import io
import json
import random
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from t2i_experts.shards.format import Manifest

SCRIPTS = Path(__file__).parents[2] / "scripts"
STYLES = ("3D", "gradient", "flat", "Noto")
# Stand-ins for the art: a shape and a colour each, by codepoints of the vocabulary.
SHAPES = {
    "1f989": ("owl", "ellipse", "#8a5a2e"),
    "1f408": ("cat", "rectangle", "#f09030"),
    "1f415": ("dog", "triangle", "#c89050"),
    "1f34e": ("apple", "ellipse", "#d82c30"),
    "1f916": ("robot", "rectangle", "#909498"),
    "1f355": ("pizza", "triangle", "#f0b840"),
    "1f418": ("elephant", "ellipse", "#8c8c90"),
    "1f332": ("pine tree", "triangle", "#2e9c48"),
    "1f347": ("grapes", "ellipse", "#7a40b8"),
    "2601": ("cloud", "ellipse", "#f4f4f4"),
}
_POINTS = {"ellipse": "", "rectangle": "8,20 120,20 120,108 8,108", "triangle": "64,10 118,118 10,118"}


@pytest.fixture(scope="module")
def emoji() -> Iterator[SimpleNamespace]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        import emoji_art
        import emoji_captions
        import emoji_colour
        import emoji_composer
        import emoji_drawing
        import emoji_scenes

        yield SimpleNamespace(
            art=emoji_art, captions=emoji_captions, colour=emoji_colour, composer=emoji_composer, drawing=emoji_drawing, scenes=emoji_scenes
        )
    for name in [name for name in sys.modules if name.startswith("emoji_")]:
        del sys.modules[name]


def svg(shape: str, colour: str) -> bytes:
    body = (
        f'<ellipse cx="64" cy="64" rx="50" ry="44" fill="{colour}"/>'
        if shape == "ellipse"
        else f'<polygon points="{_POINTS[shape]}" fill="{colour}"/>'
    )
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 128 128">{body}</svg>'.encode()


def raster(shape: str, colour: str, extension: str) -> bytes:
    image = Image.new("RGBA", (256, 256))
    pen = ImageDraw.Draw(image)
    if shape == "ellipse":
        pen.ellipse((28, 40, 228, 216), fill=colour)
    else:
        numbers = [tuple(2 * int(n) for n in point.split(",")) for point in _POINTS[shape].split()]
        pen.polygon(numbers, fill=colour)
    buffer = io.BytesIO()
    image.save(buffer, extension, lossless=True)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("art")
    for archive, mode in (("fluent-3d.tar", "w"), ("fluent-color.tar.xz", "w:xz"), ("fluent-flat.tar.xz", "w:xz"), ("noto.tar.xz", "w:xz")):
        with tarfile.open(folder / archive, mode) as tar:  # type: ignore[call-overload]
            for codepoints, (_, shape, colour) in SHAPES.items():
                data = raster(shape, colour, "webp") if archive == "fluent-3d.tar" else svg(shape, colour)
                info = tarfile.TarInfo(f"{codepoints}.{'webp' if archive == 'fluent-3d.tar' else 'svg'}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return folder


@pytest.fixture(scope="module")
def art(emoji: Any, folder: Path) -> Any:
    pytest.importorskip("resvg_py")
    return emoji.art.open_folder(folder)


@pytest.fixture(scope="module")
def train(emoji: Any, art: Any) -> list[Any]:
    composer = emoji.composer.Composer(art, size=64)
    return [composer.compose(index) for index in range(400)]


def test_common_objects_are_drawn_as_many_times_as_often_as_the_mix_says(emoji: Any, art: Any) -> None:
    objects = tuple(dataclasses.replace(obj, common=obj.name == "owl") for obj in art.objects)
    mix = emoji.composer.Mix(single=1.0, two=0.0, counted=0.0, three=0.0, common=9.0)
    nothing = emoji.composer.HeldOut(frozenset(), frozenset(), frozenset())
    composer = emoji.composer.Composer(emoji.art.Art(objects, art.sources), mix=mix, held_out=nothing)
    names = [composer.compose(index).description.things[0].object.name for index in range(200)]
    assert 0.4 < names.count("owl") / len(names) < 0.6  # 9 of 18; without the weight it would be one of ten
    assert set(names) == {obj.name for obj in objects}


def decoded(mask: dict[str, list[int]]) -> np.ndarray:
    values = np.repeat(np.arange(len(mask["counts"])) % 2 == 1, mask["counts"])
    return values.reshape(mask["size"], order="F")


def test_scene_is_a_pure_function_of_seed_split_and_index(emoji: Any, art: Any) -> None:
    def scene(index: int, **options: Any) -> Any:
        return emoji.composer.Composer(art, **options).compose(index)

    for index in range(5):
        a, b = scene(index), scene(index)
        assert a.captions == b.captions and a.metadata() == b.metadata() and np.array_equal(a.image, b.image)
    for other in (scene(0, seed=1), scene(0, split="validation"), scene(1)):
        assert not np.array_equal(other.image, scene(0).image)


def test_prepared_art_draws_the_same_scenes(emoji: Any, art: Any, tmp_path: Path) -> None:
    prepared = art.prepared(tmp_path, 64, 1)
    for index in range(10):
        a, b = (emoji.composer.Composer(one, size=64).compose(index) for one in (art, prepared))
        assert a.captions == b.captions and np.array_equal(a.image, b.image)


def test_train_and_validation_never_show_what_is_held_out(emoji: Any, art: Any) -> None:
    held_out = emoji.composer.HeldOut(
        styles=frozenset({("owl", "flat"), ("cat", "3D")}),
        colours=frozenset({("owl", "purple"), ("elephant", "red"), ("apple", "red")}),  # an apple is red by itself
        pairs=frozenset({frozenset({"robot", "pizza"}), frozenset({"cat", "dog"})}),
    )
    for split in ("train", "validation"):
        composer = emoji.composer.Composer(art, split=split, held_out=held_out)
        for index in range(300):
            placed = composer.compose(index).objects
            names = {one.name for one in placed}
            assert not {(one.name, one.style) for one in placed} & held_out.styles
            assert not {(one.name, one.colour) for one in placed} & held_out.colours
            assert not any(pair <= names for pair in held_out.pairs)
    composer = emoji.composer.Composer(art, split="held-out", held_out=held_out)
    for index in range(100):
        placed = composer.compose(index).objects
        names = {one.name for one in placed}
        assert (
            {(one.name, one.style) for one in placed} & held_out.styles
            or {(one.name, one.colour) for one in placed} & held_out.colours
            or any(pair <= names for pair in held_out.pairs)
        )


def test_relations_hold_between_boxes(train: list[Any]) -> None:
    seen = set()
    for scene in train:
        for first, relation, second in scene.metadata()["relations"]:
            seen.add(relation)
            a, b = ([one.box for one in scene.objects if one.name == name] for name in (first, second))
            if relation == "left of":
                assert max(box[2] for box in a) <= min(box[0] for box in b) + 1
            else:
                assert max(box[3] for box in a) <= min(box[1] for box in b) + (4 if relation == "on top of" else 1)
                overlap = min(max(box[2] for box in a), max(box[2] for box in b)) - max(min(box[0] for box in a), min(box[0] for box in b))
                assert overlap > 0, "what is above shares columns with what is below"
    assert seen == {"left of", "above", "on top of"}


def test_boxes_are_tight_on_masks_that_show_the_object(train: list[Any]) -> None:
    for scene in train[:100]:
        for placed, plain in zip(scene.objects, scene.metadata()["objects"], strict=True):
            mask = decoded(plain["mask"])
            assert np.array_equal(mask, placed.mask)
            rows, columns = np.nonzero(mask)
            assert placed.box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        if scene.description.background.kind == "plain":
            outside = ~np.any([one.mask for one in scene.objects], axis=0)
            corner = scene.image[0, 0] if outside[0, 0] else scene.image[-1, -1]
            assert (scene.image[outside] == corner).all(axis=1).mean() > 0.9


def test_captions_say_what_is_there(emoji: Any, train: list[Any]) -> None:
    backgrounds = emoji.captions._COLOUR_WORDS
    for scene in train:
        assert 1 <= len(scene.captions) <= 4 and len(set(scene.captions)) == len(scene.captions)
        description = scene.description
        for caption in scene.captions:
            for thing in description.things:
                forms = [form for name in thing.object.names for form in (name.text, name.plural) if form]
                assert any(form in caption for form in forms), (caption, thing)
                if thing.recoloured:
                    assert any(word in caption for word in backgrounds.get(thing.colour, (thing.colour,))), caption
                if thing.count > 1:
                    assert emoji.captions.COUNT_WORDS[thing.count] in caption or str(thing.count) in caption
            assert ("background" in caption) == description.background.named, caption
        assert description.style in scene.captions[0]


def test_recolouring_turns_the_dominant_hue_and_keeps_the_alpha(emoji: Any, art: Any) -> None:
    for obj in art.objects:
        palette = art.palette(obj, "flat")
        sprite = emoji.art.resize(art.sprite(obj, "flat", 64), 64)
        for colour in palette.targets:
            turned = emoji.colour.recolour(sprite, palette, colour)
            assert np.array_equal(turned[..., 3], sprite[..., 3]) and (turned[..., :3] <= turned[..., 3:]).all()
            again = emoji.colour.measure(turned)
            assert again.own in (colour, None)
            assert np.linalg.norm(np.array(again.mean) - emoji.colour.target_lab(colour)) < 0.2, (obj.name, colour)
    own = {obj.name: art.palette(obj, "flat").own for obj in art.objects}
    assert own["apple"] == "red" and own["elephant"] == "gray" and own["cloud"] == "white" and own["pine tree"] == "green"


def test_oklab_round_trip_and_reference(emoji: Any) -> None:
    grid = np.stack(np.meshgrid(*[np.arange(0, 256, 15, dtype=np.uint8)] * 3), axis=-1).reshape(-1, 3)
    assert np.abs(emoji.colour.srgb(emoji.colour.oklab(grid)).astype(int) - grid).max() <= 1
    # Ottosson's post gives L, a, b of white and of sRGB red.
    assert emoji.colour.oklab(np.array([255, 255, 255], np.uint8)) == pytest.approx([1, 0, 0], abs=1e-3)
    assert emoji.colour.oklab(np.array([255, 0, 0], np.uint8)) == pytest.approx([0.628, 0.225, 0.126], abs=1e-3)


def test_articles_and_plurals(emoji: Any) -> None:
    assert [emoji.captions.with_article(w) for w in ("owl", "unicorn", "hourglass", "UFO", "umbrella", "x-ray", "house", "eight ball")] == [
        "an owl",
        "a unicorn",
        "an hourglass",
        "a UFO",
        "an umbrella",
        "an x-ray",
        "a house",
        "an eight ball",
    ]
    singular = (
        "red apple",
        "wolf",
        "mouse",
        "strawberry",
        "slice of pizza",
        "fox",
        "tooth",
        "sheep",
        "sun behind a cloud",
        "face with a mask",
        "house with a garden",
        "bus",
    )
    assert [emoji.art.pluralise(word) for word in singular] == [
        "red apples",
        "wolves",
        "mice",
        "strawberries",
        "slices of pizza",
        "foxes",
        "teeth",
        "sheep",
        "suns behind a cloud",
        "faces with a mask",
        "houses with a garden",
        "buses",
    ]


def test_vocabulary_and_held_out_list_agree(emoji: Any) -> None:
    objects = emoji.art.load_vocabulary()
    names = {obj.name for obj in objects}
    recolourable = {obj.name for obj in objects if obj.recolourable}
    assert 450 <= len(objects) <= 650
    held_out = emoji.composer.HeldOut.load()
    assert len(held_out.styles) == len(held_out.colours) == len(held_out.pairs) == 60
    assert {name for name, _ in held_out.styles} | {name for pair in held_out.pairs for name in pair} <= names
    assert {name for name, _ in held_out.colours} <= recolourable
    assert ("owl", "purple") in held_out.colours and frozenset({"robot", "pizza"}) in held_out.pairs


def test_every_evaluation_prompt_asks_for_something_held_out(emoji: Any) -> None:
    prompts = (SCRIPTS / "eval_prompts.txt").read_text(encoding="utf-8").splitlines()
    held_out = emoji.composer.HeldOut.load()
    plurals = {obj.name: (obj.name, obj.names[0].plural or obj.name) for obj in emoji.art.load_vocabulary()}

    def says(prompt: str, name: str, before: str = "") -> bool:
        padded = f" {prompt.replace(',', ' ')} "
        return any(f" {before}{form} " in padded for form in plurals[name])

    assert len(prompts) == len(set(prompts)) == 48
    for prompt in prompts:
        assert (
            any(says(prompt, name) and style in prompt for name, style in held_out.styles)
            or any(says(prompt, name, f"{colour} ") for name, colour in held_out.colours)
            or any(all(says(prompt, name) for name in pair) for pair in held_out.pairs)
        ), prompt


def test_command_writes_the_same_shards_with_one_process_and_with_two(emoji: Any, folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("resvg_py")
    hashes = []
    for workers in (1, 2):
        out = tmp_path / str(workers)
        composer = emoji.composer.Composer(emoji.art.open_folder(folder), size=32)
        emoji.scenes.write_scenes(composer, out, count=25, workers=workers, samples_per_shard=10)
        manifest = Manifest.load(out)
        assert manifest.samples == 25 and len(manifest.shards) == 3
        hashes.append(manifest.hash)
    assert hashes[0] == hashes[1]
    with tarfile.open(tmp_path / "1" / "00002.tar") as tar:
        file = tar.extractfile("00000024.json")
        assert file is not None
        fields = json.load(file)
    scene = composer.compose(24)
    assert fields["captions"] == list(scene.captions) and fields["objects"] == scene.metadata()["objects"]


def test_command_line(emoji: Any, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("resvg_py")
    arguments = ["--emoji", str(folder), "--count", "6", "--size", "32"]
    emoji.scenes.main([*arguments, "--out", str(tmp_path / "scenes"), "--sheet", str(tmp_path / "sheet.png"), "--images", "webp"])
    assert Manifest.load(tmp_path / "scenes").samples == 6 and Image.open(tmp_path / "sheet.png").width > 0
    for wrong in (["--out", str(tmp_path / "scenes")], ["--fluent", str(folder), "--out", str(tmp_path / "new")], []):
        with pytest.raises(SystemExit):
            emoji.scenes.main([*arguments, *wrong])


def test_checkouts_give_the_same_art_as_the_folder(emoji: Any, art: Any, tmp_path: Path) -> None:
    fluent, noto = tmp_path / "fluentui-emoji", tmp_path / "noto-emoji"
    (noto / "svg").mkdir(parents=True)
    for number, (codepoints, (name, shape, colour)) in enumerate(SHAPES.items()):
        base = fluent / "assets" / name.title()
        base.mkdir(parents=True)
        (base / "metadata.json").write_text(json.dumps({"cldr": name, "unicode": f"{codepoints} fe0f", "keywords": []}))
        skin = base / "Default" if number == 0 else base
        for style, data, file in (
            ("3D", raster(shape, colour, "png"), "a_3d.png"),
            ("Color", svg(shape, colour), "a.svg"),
            ("Flat", svg(shape, colour), "a.svg"),
        ):
            (skin / style).mkdir(parents=True)
            (skin / style / file).write_bytes(data)
        (noto / "svg" / f"emoji_u{codepoints}.svg").write_bytes(svg(shape, colour))
    checkouts = emoji.art.open_checkouts(fluent, noto)
    assert [obj.name for obj in checkouts.objects] == [obj.name for obj in art.objects]
    for obj in art.objects:
        assert checkouts.styles(obj) == STYLES
        for style in STYLES:
            assert np.abs(checkouts.sprite(obj, style, 64).astype(int) - art.sprite(obj, style, 64)).max() <= 1
    with pytest.raises(ValueError, match="microsoft/fluentui-emoji"):
        emoji.art.open_checkouts(noto, noto)


def test_errors_name_what_is_allowed(emoji: Any, art: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="size 2000; allowed: 16 to 1024"):
        emoji.composer.Composer(art, size=2000)
    with pytest.raises(ValueError, match="split 'test'"):
        emoji.composer.Composer(art, split="test")
    with pytest.raises(ValueError, match=r"fluent-3d\.tar"):
        emoji.art.open_folder(tmp_path)
    (tmp_path / "vocabulary.txt").write_text("1f989 owl\n1f408 cat, owl\n")
    with pytest.raises(ValueError, match="'owl' names two objects"):
        emoji.art.load_vocabulary(tmp_path / "vocabulary.txt")


def test_sizes_agree(emoji: Any, art: Any) -> None:
    for index in range(12):
        small, large = (emoji.composer.Composer(art, size=size).compose(index) for size in (64, 256))
        assert small.captions == large.captions
        for a, b in zip(small.objects, large.objects, strict=True):
            assert np.abs(np.array(a.box) - np.array(b.box) / 4).max() <= 1.5


def test_what_a_prompt_of_the_judge_claims_holds_of_its_scene(emoji: Any, art: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from t2i_experts.evaluation.composition import scene_claims

    monkeypatch.syspath_prepend(str(SCRIPTS))
    import judge_prompts

    held_out = emoji.composer.HeldOut(
        frozenset({("owl", "flat")}), frozenset({("owl", "purple"), ("apple", "blue")}), frozenset({frozenset({"robot", "pizza"})})
    )
    kinds: set[str] = set()
    claimed: set[str] = set()
    for split in ("held-out", "validation"):
        composer = emoji.composer.Composer(art, split=split, size=64, held_out=held_out)
        for index in range(60):
            scene = composer.compose(index)
            made = judge_prompts.prompt(scene.description, split, random.Random(index))
            true = {(claim.category, *claim.words) for claim in scene_claims(scene.metadata())}
            assert {tuple(claim) for claim in made["claims"]} <= true, made
            things = scene.description.things
            assert sum(claim[0] == "colour" for claim in made["claims"]) == sum(thing.recoloured for thing in things), made
            kinds.add(judge_prompts.kind(scene.description, composer))
            claimed |= {claim[0] for claim in made["claims"]}
    assert kinds == set(judge_prompts.KINDS)
    assert claimed == {"object", "style", "colour", "count", "left", "right", "above", "below", "background"}
    del sys.modules["judge_prompts"]
