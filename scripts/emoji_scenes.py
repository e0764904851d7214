"""Composes captioned scenes from emoji art, in shards for training: one object, recoloured objects, objects in stated relations, counts.

    python scripts/emoji_scenes.py --emoji EMOJI --out data/scenes --split train --count 300000 --size 64 --workers 16
    python scripts/emoji_scenes.py --fluent FLUENTUI_EMOJI --noto NOTO_EMOJI --out data/scenes --count 300000

A scene is a pure function of (seed, split, index, size). scripts/held_out.json lists pairs of object and style, of object and colour, and
of two objects that `train` and `validation` never show; `held-out` shows one of them in every scene. Each sample's json holds its captions
and, for each object, its box and mask: see `Scene.metadata`.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from pathlib import Path

from emoji_art import Art, open_checkouts, open_folder
from emoji_composer import SPLITS, Composer
from emoji_drawing import EXTENSIONS, Scene
from PIL import Image

from t2i_experts.charts import draw_captioned
from t2i_experts.shards.writer import ShardWriter, write_manifest

_CACHED_UP_TO = 256  # larger rasters would fill gigabytes; each process then renders what it draws


def write_scenes(
    composer: Composer, folder: Path, *, count: int, workers: int, extension: str = "png", samples_per_shard: int = 4096
) -> None:
    """Writes the scenes of indices 0 to count - 1 into shards in `folder`, which must hold none yet, and then the manifest."""
    starts = range(0, count, samples_per_shard)
    stops = [min(start + samples_per_shard, count) for start in starts]
    chunk = -(-len(starts) // workers)  # one each, so that the composer travels once to each process
    with ProcessPoolExecutor(workers) as pool:
        shards = pool.map(
            _write_shard, repeat(composer), repeat(folder), range(len(starts)), starts, stops, repeat(extension), chunksize=chunk
        )
        for _ in shards:  # raises what a process raised
            pass
    write_manifest(folder)


def sheet(scenes: Sequence[Scene], columns: int = 6) -> Image.Image:
    """A picture of the scenes with their captions below them."""
    pictures = [(Image.fromarray(scene.image), "\n".join(f"- {caption}" for caption in scene.captions)) for scene in scenes]
    return draw_captioned(pictures, columns, side=max(192, scenes[0].image.shape[0]), lines=6)


def _write_shard(composer: Composer, folder: Path, number: int, start: int, stop: int, extension: str) -> None:
    with ShardWriter(folder, samples_per_shard=stop - start, first_shard=number) as writer:
        for index in range(start, stop):
            scene = composer.compose(index)
            writer.write(f"{index:08d}", scene.encode(extension), extension, scene.captions, scene.metadata())


def _open(args: argparse.Namespace) -> Art:
    if args.emoji is not None:
        if args.fluent is not None or args.noto is not None:
            raise ValueError("--emoji was given with --fluent or --noto: give --emoji alone, or the other two together")
        return open_folder(args.emoji)
    if args.fluent is None or args.noto is None:
        raise ValueError("no art: give --emoji FOLDER, or --fluent and --noto with checkouts of the two repositories")
    return open_checkouts(args.fluent, args.noto)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Compose captioned scenes from emoji art, in shards for training.")
    parser.add_argument("--emoji", type=Path, help="folder with fluent-3d.tar, fluent-color.tar.xz, fluent-flat.tar.xz and noto.tar.xz")
    parser.add_argument("--fluent", type=Path, help="checkout of microsoft/fluentui-emoji")
    parser.add_argument("--noto", type=Path, help="checkout of googlefonts/noto-emoji")
    parser.add_argument("--out", type=Path, help="new folder of shards")
    parser.add_argument("--sheet", type=Path, help="picture to draw of the first 48 scenes with their captions, to look at")
    parser.add_argument("--split", choices=SPLITS, default="train")
    parser.add_argument("--count", type=int, default=1000, help="number of scenes")
    parser.add_argument("--size", type=int, default=64, help="side in pixels, 16 to 1024")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument("--images", choices=EXTENSIONS, default="png", help="png and webp without loss, jpg at quality 95")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = _parser()
    args = parser.parse_args(arguments)
    try:
        if args.out is None and args.sheet is None:
            raise ValueError("nothing to do: give --out, --sheet or both")
        if args.count < 1 or args.workers < 1:
            raise ValueError(f"--count {args.count} and --workers {args.workers} must be positive")
        if args.out is not None and any(args.out.glob("*.tar")):
            raise ValueError(f"--out {args.out} holds shards already: name a new folder")
        art = _open(args)
        composer = Composer(art, split=args.split, size=args.size, seed=args.seed)
    except ValueError as error:
        parser.error(str(error))
    if args.sheet is not None:
        sheet([composer.compose(index) for index in range(min(48, args.count))]).save(args.sheet)
    if args.out is not None:
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as cache:
            if args.size <= _CACHED_UP_TO:
                composer = Composer(art.prepared(Path(cache), args.size, args.workers), split=args.split, size=args.size, seed=args.seed)
            print(f"{len(art.objects)} objects, {len(art.sources)} pictures, ready after {time.perf_counter() - started:.1f} s")
            write_scenes(composer, args.out, count=args.count, workers=args.workers, extension=args.images)
        print(f"{args.count} scenes in {args.out} after {time.perf_counter() - started:.1f} s")


if __name__ == "__main__":
    main()
