"""Trains the judge (t2i_experts/evaluation/judge.py) on shards of emoji scenes, and measures it on scenes that it has not seen.

    python scripts/train_judge.py data/judge/train data/judge/held-out --validation data/emoji/validation data/emoji/held-out --out judge

All pictures (64 px, uint8) and boxes are held on the device, and pictures are spoilt there, as a generator's pictures are: warped,
blurred, noisy, blotched, with a JPEG's rounding, and slightly other in colour. Never flipped, because claims say left and right. Train it
on scenes of another seed than the generator's, and also on the combinations that are held out from the generator: a judge that has never
seen a purple owl would tell its own weakness for the generator's.

With --steps in the place of --minutes, the same seed gives the same judge, bit for bit on one CPU; on a GPU, convolutions are asked to be
deterministic.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from functools import partial
from math import pi
from pathlib import Path
from typing import Any

import numpy as np
import torch
from emoji_art import STYLES, load_vocabulary
from emoji_colour import COLOURS
from emoji_layout import BACKGROUNDS
from torch import Tensor
from torch.nn.functional import (
    binary_cross_entropy_with_logits,
    conv2d,
    cross_entropy,
    grid_sample,
    interpolate,
    pad,
    smooth_l1_loss,
)
from training_parts import set_learning_rate, shuffled_rows, workers

from t2i_experts.evaluation.composition import measure
from t2i_experts.evaluation.judge import CELL, GRID, SIZE, Cells, Judge, JudgeConfig, JudgeNetwork, encode_boxes, save_judge
from t2i_experts.shards.reader import ShardReader
from t2i_experts.shards.transforms import decode_image

MOST = 8  # objects in a scene
KINDS = JudgeConfig.background_kinds
THRESHOLDS = (0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6)
_SPREAD = 0.8  # cells: standard deviation of the target around an object's centre


@dataclass
class Scenes:
    """Pictures and what they show. images: (N, 3, 64, 64) uint8.

    labels: (N, M, 3) int64, name, style and colour of each object, -1 where there is none. boxes: (N, M, 4) float32, pixels.
    background: (N, 3) int64, kind and its two colours, -1 for a colour that is not known or not there.
    """

    images: Tensor
    labels: Tensor
    boxes: Tensor
    background: Tensor

    def to(self, device: str) -> Scenes:
        """The same on a device."""
        return Scenes(*(tensor.to(device) for tensor in (self.images, self.labels, self.boxes, self.background)))

    def rows(self, rows: Tensor) -> Scenes:
        """Some of the scenes."""
        return Scenes(self.images[rows], self.labels[rows], self.boxes[rows], self.background[rows])


def judge_words(channels: int, blocks: int) -> JudgeConfig:
    """A judge with the vocabulary of the scenes."""
    objects = tuple(obj.name for obj in load_vocabulary())
    return JudgeConfig(objects, STYLES, tuple(COLOURS), tuple(BACKGROUNDS), channels=channels, blocks=blocks)


def targets(scene: dict[str, Any], words: JudgeConfig) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels, boxes and background of a scene's json, as `Scenes` has them. An object that others cover completely is left out."""
    labels, boxes = np.full((MOST, 3), -1, np.int64), np.zeros((MOST, 4), np.float32)
    visible = [one for one in scene["objects"] if one["box"][2] > one["box"][0]]
    for i, one in enumerate(visible):
        colour = len(words.colours) if one["colour"] is None else words.colours.index(one["colour"])
        labels[i] = words.objects.index(one["name"]), words.styles.index(one["style"]), colour
        boxes[i] = np.array(one["box"], np.float32) * (SIZE / scene["size"])
    behind = scene["background"]
    background = np.full(3, -1, np.int64)
    background[0] = words.background_kinds.index(behind["kind"])
    if behind["named"] or behind["colours"] == ["white"]:  # an unnamed one is paler than its name
        background[1 : 1 + len(behind["colours"])] = [words.backgrounds.index(colour) for colour in behind["colours"]]
    return labels, boxes, background


def read_part(reader: ShardReader, words: JudgeConfig, indices: Sequence[int]) -> tuple[np.ndarray, ...]:
    """Pictures and targets; arrays, because tensors would cross processes through shared memory."""
    samples = [reader.raw(index) for index in indices]
    images = [decode_image(sample.image, SIZE).numpy() for sample in samples]
    labels, boxes, background = zip(*(targets(sample.metadata, words) for sample in samples), strict=True)
    return tuple(np.stack(several) for several in (images, labels, boxes, background))


def read_scenes(folders: Sequence[Path], words: JudgeConfig, pool: Executor) -> Scenes:
    """All scenes of some shard folders."""
    reader = ShardReader(list(folders), size=SIZE, seed=0)
    parts = [range(start, min(start + 2048, reader.samples)) for start in range(0, reader.samples, 2048)]
    arrays = zip(*pool.map(partial(read_part, reader, words), parts), strict=True)
    return Scenes(*(torch.from_numpy(np.concatenate(several)) for several in arrays))


def read_metadata(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """The json of each scene, in the order of `read_scenes`."""
    reader = ShardReader(list(folders), size=SIZE, seed=0)
    return [reader.raw(index).metadata for index in range(reader.samples)]


def refuse_seen(training: Tensor, validation: Tensor) -> None:
    """Raises ValueError if pictures that are to measure the judge train it; both (N, 3, 64, 64) uint8 on the CPU.

    One of a hundred may, for two scenes of one small object on white may be alike by chance.
    """
    seen = {hash(image.tobytes()) for image in training.numpy()}
    again = sum(hash(image.tobytes()) in seen for image in validation.numpy())
    if again > len(validation) / 100:
        raise ValueError(f"--validation: {again:,} of its {len(validation):,} scenes are among those that train the judge; take others")


def spoil(images: Tensor, generator: torch.Generator) -> Tensor:
    """(B, 3, 64, 64) uint8 -> the same, spoilt as a generator's pictures are; each way in half of the pictures, in strength at random.

    Colours move by less than what makes another word fit. Boxes stay true to about two pixels.
    """
    device, batch = images.device, len(images)

    def random(*shape: int) -> Tensor:
        return torch.rand(batch, *shape, generator=generator, device=device)

    def normal(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=generator, device=device)

    def strength(most: float) -> Tensor:
        return most * random(1, 1, 1) * (random(1, 1, 1) < 0.5)

    x = images.float() / 255
    rows = (torch.arange(SIZE, device=device) + 0.5) * (2 / SIZE) - 1
    places = torch.stack([rows.expand(SIZE, SIZE), rows[:, None].expand(SIZE, SIZE)])  # x, y
    warp = interpolate(normal(2, 6, 6), (SIZE, SIZE), mode="bicubic", align_corners=True) * strength(2 / SIZE * 1.5)
    x = grid_sample(x, (places + warp).permute(0, 2, 3, 1), "bilinear", "border", align_corners=False)
    bell = torch.exp(-0.5 * (torch.arange(-2, 3, device=device) / 1.2) ** 2)
    bell = bell / bell.sum()
    blurred = conv2d(pad(x, (2, 2, 2, 2), "replicate").flatten(0, 1)[:, None], (bell[:, None] * bell)[None, None]).view_as(x)
    x = x + strength(1.0) * (blurred - x)
    x = x * (1 + strength(0.06) * normal(3, 1, 1)) + strength(0.03) * normal(3, 1, 1)
    x = x + strength(0.05) * interpolate(normal(3, 8, 8), (SIZE, SIZE), mode="bilinear") + strength(0.06) * normal(3, SIZE, SIZE)
    x = _round_frequencies(x, strength(0.05))
    return (255 * x + 0.5).clamp(0, 255).to(torch.uint8)


def _round_frequencies(x: Tensor, step: Tensor) -> Tensor:
    """The cosine transform of each 8 x 8 block in multiples of `step`, (B, 1, 1, 1), which grow with the frequency; 0 rounds none."""
    n = torch.arange(8, device=x.device, dtype=x.dtype)
    basis = torch.cos(pi / 8 * (n + 0.5) * n[:, None]) * 0.5
    basis[0] = 8**-0.5
    blocks = x.unflatten(3, (8, 8)).unflatten(2, (8, 8)).permute(0, 1, 2, 4, 3, 5)  # (B, 3, 8, 8, y, x)
    frequencies = basis @ blocks @ basis.T
    steps = step[..., None, None] * (1 + 0.5 * (n + n[:, None]))
    rounded = torch.where(steps > 0, (frequencies / steps.clamp_min(1e-6)).round() * steps, frequencies)
    return (basis.T @ rounded @ basis).permute(0, 1, 2, 4, 3, 5).reshape(x.shape)


def loss(cells: Cells, scenes: Scenes, generator: torch.Generator) -> dict[str, Tensor]:
    """What the network is trained with, part by part, each a mean over objects or pictures.

    objects: the penalty-reduced focal loss of CenterNet (eq. 1). An object's box and words are asked of the cell of its centre, and of a
    neighbour at random, for the judge's peak may lie one beside.
    """
    device = scenes.boxes.device
    there = scenes.labels[..., 0] >= 0  # (B, M)
    number = there.sum().clamp_min(1)
    centres = (scenes.boxes[..., :2] + scenes.boxes[..., 2:]).flip(-1) / (2 * CELL)  # (B, M, 2): row and column
    own = centres.floor().clamp(0, GRID - 1)
    middles = torch.arange(GRID, device=device) + 0.5
    along = torch.exp(-0.5 * ((middles - centres[..., None]) / _SPREAD) ** 2)  # (B, M, 2, G)
    bells = along[:, :, 0, :, None] * along[:, :, 1, None, :] * there[..., None, None]
    target = bells.amax(dim=1)  # (B, G, G)
    rows = torch.arange(len(there), device=device)[:, None].expand_as(there)
    peak = torch.zeros_like(target)
    peak.index_put_((rows, own[..., 0].long(), own[..., 1].long()), there.to(target.dtype), accumulate=True)
    peak = peak.clamp_max(1)
    logits = cells.objects.float()
    likely = logits.sigmoid()
    each = binary_cross_entropy_with_logits(logits, peak, reduction="none")
    focal = each * torch.where(peak > 0, (1 - likely) ** 2, likely**2 * (1 - target) ** 4)

    beside = (own + torch.randint(-1, 2, own.shape, generator=generator, device=device)).clamp(0, GRID - 1)
    asked = torch.stack([own, beside], dim=2)  # (B, M, 2, 2)
    places = (asked[..., 0] * GRID + asked[..., 1]).long().flatten(1)  # (B, 2M)
    valid = there[..., None].expand(-1, -1, 2).flatten(1).float()

    def at(values: Tensor) -> Tensor:
        return values.flatten(1, 2)[rows[:, :1], places].float()

    def words(values: Tensor, which: int) -> Tensor:
        labels = scenes.labels[..., which, None].expand(-1, -1, 2).flatten(1)
        each = cross_entropy(at(values).flatten(0, 1), labels.flatten(), ignore_index=-1, reduction="sum")
        return each / (2 * number)

    boxes = encode_boxes(scenes.boxes[:, :, None].expand(-1, -1, 2, -1), asked).flatten(1, 2)
    apart = smooth_l1_loss(at(cells.boxes), boxes, reduction="none", beta=0.1).sum(dim=-1)
    behind = cross_entropy(cells.kinds.float(), scenes.background[:, 0])
    ends = cross_entropy(cells.ends.float().flatten(0, 1), scenes.background[:, 1:].flatten(), ignore_index=-1, reduction="sum")
    return {
        "objects": focal.sum() / number,
        "boxes": (apart * valid).sum() / (2 * number),
        "names": words(cells.names, 0),
        "styles": words(cells.styles, 1),
        "colours": words(cells.colours, 2),
        "background": behind + ends / (scenes.background[:, 1:] >= 0).sum().clamp_min(1),
    }


def train(network: JudgeNetwork, scenes: Scenes, arguments: argparse.Namespace) -> tuple[int, float]:
    """AdamW with a warm-up and a linear decay to zero over the steps, or else the minutes: (steps, seconds)."""
    torch.backends.cudnn.deterministic = True
    device = scenes.images.device
    optimizer = torch.optim.AdamW(network.parameters(), lr=arguments.learning_rate, weight_decay=0.05, fused=device.type == "cuda")
    generator = torch.Generator(device).manual_seed(arguments.seed)
    samples = len(scenes.images)
    batch_size = min(arguments.batch_size, samples)
    batches = shuffled_rows(samples, batch_size, generator)
    started, step, progress, recent = time.monotonic(), 0, 0.0, {}
    network.train()
    while progress < 1:
        rows = next(batches)
        set_learning_rate(optimizer, arguments.learning_rate, step=step, warmup=arguments.warmup, progress=progress)
        batch = scenes.rows(rows)
        x = (spoil(batch.images, generator).float() / 127.5 - 1).to(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            cells = network(x)
        parts = loss(cells, batch, generator)
        optimizer.zero_grad(set_to_none=True)
        sum(parts.values(), torch.zeros((), device=device)).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        optimizer.step()
        step += 1
        recent = {name: recent.get(name, 0.0) + part.detach() for name, part in parts.items()}
        if step % arguments.log_every == 0:
            rate = step * batch_size / (time.monotonic() - started)
            shown = "  ".join(f"{name} {float(total) / arguments.log_every:.3f}" for name, total in recent.items())
            print(f"step {step:6d}  {shown}  {rate:,.0f} images/s", flush=True)
            recent = {}
        progress = step / arguments.steps if arguments.steps else (time.monotonic() - started) / (60 * arguments.minutes)
    return step, time.monotonic() - started


def best_threshold(judge: Judge, images: Tensor, scenes: Sequence[dict[str, Any]]) -> float:
    """The threshold with which the number of objects is most often right."""
    numbers = [sum(one["box"][2] > one["box"][0] for one in scene["objects"]) for scene in scenes]
    readings = replace(judge, config=replace(judge.config, threshold=THRESHOLDS[0]))(images)

    def right(threshold: float) -> int:
        found = (sum(one.certainty >= threshold for one in reading.objects) for reading in readings)
        return sum(a == b for a, b in zip(found, numbers, strict=True))

    return max(THRESHOLDS, key=right)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", type=Path, nargs="+", help="shard folders to train on")
    parser.add_argument("--validation", type=Path, nargs="+", required=True, help="shard folders to measure the judge on")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, default=4.0, help="length of the training itself")
    length.add_argument("--steps", type=int, default=0, help="length in steps instead")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--warmup", type=int, default=200, help="steps")
    parser.add_argument("--channels", type=int, default=128)
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--log-every", type=int, default=100, help="steps")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the saved weights")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that read")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Reads the shards, trains, measures, saves the judge; prints its accuracy as JSON on the last line."""
    arguments = parse_arguments(argv)
    words = judge_words(arguments.channels, arguments.blocks)
    started = time.monotonic()
    with workers(arguments.workers) as pool:
        scenes = read_scenes(arguments.shards, words, pool)
        validation = read_scenes(arguments.validation, words, pool).images
    refuse_seen(scenes.images, validation)
    scenes = scenes.to(arguments.device)
    metadata = read_metadata(arguments.validation)
    torch.manual_seed(arguments.seed)
    network = JudgeNetwork(words).to(arguments.device, memory_format=torch.channels_last)
    parameters = sum(p.numel() for p in network.parameters())
    print(f"{len(scenes.images):,} scenes, {parameters:,} parameters, {time.monotonic() - started:.0f} s to read", flush=True)
    steps, seconds = train(network, scenes, arguments)

    dtype = getattr(torch, arguments.dtype)
    network.eval().requires_grad_(False)
    saved = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in network.state_dict().items()}
    network.load_state_dict(saved)  # what is measured is what is saved
    # The threshold is chosen on scenes of the training shards, so that the scenes that measure the judge decide nothing.
    few = min(2048, len(scenes.images))
    judge = Judge(words, network)
    some = [reader.raw(i).metadata for reader in [ShardReader(arguments.shards, size=SIZE, seed=0)] for i in range(few)]
    judge = replace(judge, config=replace(words, threshold=best_threshold(judge, scenes.images[:few], some)))
    generator = torch.Generator(arguments.device).manual_seed(arguments.seed)
    readings = judge(validation)
    spoilt = judge(torch.cat([spoil(images.to(arguments.device), generator) for images in validation.split(1024)]))
    accuracy = {"all": measure(words, metadata, readings), "spoilt": measure(words, metadata, spoilt)}
    for split in sorted({scene["split"] for scene in metadata}):
        rows = [i for i, scene in enumerate(metadata) if scene["split"] == split]
        accuracy[split] = measure(words, [metadata[i] for i in rows], [readings[i] for i in rows])
    training = {
        "scenes": len(scenes.images),
        "shards": {str(folder): ShardReader([folder], size=SIZE, seed=0).dataset_hash for folder in arguments.shards},
        "measured_on": {str(folder): ShardReader([folder], size=SIZE, seed=0).dataset_hash for folder in arguments.validation},
        "steps": steps,
        "images_seen": steps * min(arguments.batch_size, len(scenes.images)),
        "seconds": seconds,
        "parameters": parameters,
        "settings": {k: v for k, v in vars(arguments).items() if isinstance(v, (int, float, str))},
    }
    save_judge(replace(judge, accuracy=accuracy), arguments.out, dtype, training)
    print(json.dumps(accuracy))


if __name__ == "__main__":
    main()
