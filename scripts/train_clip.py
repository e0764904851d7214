"""Trains a small CLIP on captioned shards: byte-pair merges, then the contrastive loss (Radford et al., arXiv 2103.00020), by open_clip.

All images (64 px, uint8) and all tokenised captions are held on the device, where they are also cropped: 300,000 pairs are 3.7 GB,
and no loader has to keep up. Pictures are never flipped, because captions say left and right.

    python scripts/train_clip.py SHARDS --out clip --minutes 3

What is saved is an open_clip folder that `EncoderConfig(kind="clip_text", model=FOLDER)` and `clip_image` read, with the merges as
open_clip's `SimpleTokenizer` wants them, and `report.json` with the retrieval of held-out pairs.
"""

from __future__ import annotations

import argparse
import gzip
import heapq
import json
import os
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from math import log
from pathlib import Path
from typing import Any

import numpy as np
import torch
from open_clip.loss import ClipLoss
from open_clip.model import CLIP
from open_clip.tokenizer import SimpleTokenizer
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample
from training_parts import set_learning_rate, shuffled_rows, workers

from t2i_experts.shards.reader import ShardReader
from t2i_experts.shards.transforms import decode_image

MERGES = "merges.txt.gz"
RESERVED = 2 * 256 + 2  # ids of the bytes, of the bytes that end a word, and of the start and the end of the text
POOL = 1000  # pairs among which retrieval is measured


@dataclass
class Pairs:
    """Images with their captions, on the device.

    images: (N, 3, S, S) uint8. ids: (C, L) int32, captions in the order of the images. first, count: (N,) int64, where in `ids` the
    captions of an image are.
    """

    images: Tensor
    ids: Tensor
    first: Tensor
    count: Tensor

    def rows(self, start: int, stop: int) -> Pairs:
        """The pairs [start, stop), sharing the captions."""
        return Pairs(self.images[start:stop], self.ids, self.first[start:stop], self.count[start:stop])


def chunks(total: int, size: int) -> list[range]:
    """[0, total) in ranges of at most `size`."""
    return [range(start, min(start + size, total)) for start in range(0, total, size)]


def read_samples(reader: ShardReader, indices: Sequence[int]) -> tuple[np.ndarray, list[tuple[str, ...]]]:
    """Images (n, 3, S, S) uint8 and the captions of each; an array, because tensors would cross processes through shared memory."""
    samples = [reader.raw(index) for index in indices]
    images = [decode_image(sample.image, reader.size).numpy() for sample in samples]
    return np.stack(images), [sample.captions for sample in samples]


def count_words(captions: Sequence[str]) -> Counter[str]:
    """How often each word of CLIP's cleaning and splitting occurs."""
    tokenizer = SimpleTokenizer()
    return Counter(word for caption in captions for word in tokenizer.pat.findall(tokenizer.clean_fn(caption)))


def learn_merges(words: Counter[str], number: int) -> list[tuple[str, str]]:
    """Byte-pair encoding as CLIP has it: again and again, the most frequent pair of symbols is merged (of equals, the first in order).

    Symbols are bytes in CLIP's printable alphabet; the last one of a word carries `</w>`. Stops before `number` if no pair is left.
    """
    alphabet = SimpleTokenizer().byte_encoder
    spelled: list[list[str]] = []
    counts: list[int] = []
    for word, count in sorted(words.items()):
        symbols = [alphabet[byte] for byte in word.encode()]
        spelled.append([*symbols[:-1], symbols[-1] + "</w>"])
        counts.append(count)
    totals: Counter[tuple[str, str]] = Counter()
    homes: dict[tuple[str, str], set[int]] = defaultdict(set)
    for i, symbols in enumerate(spelled):
        for pair in pairwise(symbols):
            totals[pair] += counts[i]
            homes[pair].add(i)
    # A heap whose entries may be out of date: what is popped counts only if its total still holds.
    heap = [(-total, pair) for pair, total in totals.items()]
    heapq.heapify(heap)
    merges: list[tuple[str, str]] = []
    while heap and len(merges) < number:
        total, best = heapq.heappop(heap)
        if totals[best] != -total:
            if totals[best] > 0:
                heapq.heappush(heap, (-totals[best], best))
            continue
        merges.append(best)
        grown: set[tuple[str, str]] = set()
        for i in homes.pop(best):
            totals.subtract({pair: counts[i] * n for pair, n in Counter(pairwise(spelled[i])).items()})
            spelled[i] = _merged(spelled[i], best)
            for pair in pairwise(spelled[i]):
                totals[pair] += counts[i]
                homes[pair].add(i)
                grown.add(pair)
        for pair in grown:
            heapq.heappush(heap, (-totals[pair], pair))
    return merges


def _merged(symbols: Sequence[str], pair: tuple[str, str]) -> list[str]:
    """The symbols with each occurrence of the pair, from the left, joined."""
    result: list[str] = []
    for symbol in symbols:
        if result and (result[-1], symbol) == pair:
            result[-1] += symbol
        else:
            result.append(symbol)
    return result


def write_merges(merges: Iterable[tuple[str, str]], path: Path) -> None:
    """The file that SimpleTokenizer(bpe_path=...) reads: a line of comment, then a merge a line, and no newline at the end."""
    lines = ["# byte-pair merges", *(" ".join(pair) for pair in merges)]
    path.write_bytes(gzip.compress("\n".join(lines).encode(), mtime=0))


def tokenize(merges: Path, context_length: int, captions: list[str]) -> np.ndarray:
    """(n, context_length) int32 ids."""
    tokenizer = SimpleTokenizer(bpe_path=str(merges), context_length=context_length)
    ids: np.ndarray = tokenizer(captions).int().numpy()
    return ids


def load_pairs(
    folders: Sequence[Path], model_config: dict[str, Any], out: Path, pool: Executor, *, merges: bool, device: str
) -> tuple[Pairs, list[str]]:
    """All pairs of some shard folders, and the first caption of each.

    merges: learn the vocabulary from these captions first, write it into `out` and note it in `model_config`.
    """
    reader = ShardReader(list(folders), size=model_config["vision_cfg"]["image_size"], seed=0)
    parts = list(pool.map(partial(read_samples, reader), chunks(reader.samples, 2048)))
    images = torch.from_numpy(np.concatenate([images for images, _ in parts]))
    captions = [several for _, part in parts for several in part]
    flat = [caption for several in captions for caption in several]
    pieces = [flat[part.start : part.stop] for part in chunks(len(flat), 16384)]
    text_config = model_config["text_cfg"]
    if merges:
        words: Counter[str] = sum(pool.map(count_words, pieces), Counter())
        learned = learn_merges(words, text_config["vocab_size"] - RESERVED)
        write_merges(learned, out / MERGES)
        text_config |= {"vocab_size": RESERVED + len(learned), "tokenizer_kwargs": {"bpe_path": MERGES}}
    ids = torch.from_numpy(np.concatenate(list(pool.map(partial(tokenize, out / MERGES, text_config["context_length"]), pieces))))
    count = torch.tensor([len(several) for several in captions])
    pairs = Pairs(*(tensor.to(device) for tensor in (images, ids, count.cumsum(0) - count, count)))
    return pairs, [several[0] for several in captions]


def normalise(images: Tensor, preprocess: dict[str, Any]) -> Tensor:
    """uint8 (B, 3, S, S) -> float, by the model's own mean and standard deviation of values in [0, 1]."""
    mean, std = (torch.tensor(preprocess[key], device=images.device)[:, None, None] for key in ("mean", "std"))
    return (images.float() / 255 - mean) / std


def random_crops(images: Tensor, generator: torch.Generator) -> Tensor:
    """A random rectangle of 80 to 100 % of each side of each float image (B, 3, S, S), resized to S; never mirrored."""
    side = 0.8 + 0.2 * torch.rand(len(images), 2, generator=generator, device=images.device)
    centre = (2 * torch.rand(len(images), 2, generator=generator, device=images.device) - 1) * (1 - side)
    theta = torch.cat([torch.diag_embed(side), centre[..., None]], dim=2)  # (B, 2, 3)
    return grid_sample(images, affine_grid(theta, list(images.shape), align_corners=False), "bilinear", "reflection", align_corners=False)


def train(model: CLIP, pairs: Pairs, preprocess: dict[str, Any], arguments: argparse.Namespace) -> tuple[int, float]:
    """AdamW with a warm-up and a linear decay to zero over the steps or the minutes, whichever end first: (steps, seconds)."""
    device = pairs.images.device
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=arguments.learning_rate,
        betas=(0.9, 0.98),
        eps=1e-6,
        fused=device.type == "cuda",
    )
    contrast = ClipLoss()
    generator = torch.Generator(device).manual_seed(arguments.seed)
    samples = len(pairs.images)
    batch_size = min(arguments.batch_size, samples)
    started, step, progress, recent = time.monotonic(), 0, 0.0, torch.zeros((), device=device)
    batches = shuffled_rows(samples, batch_size, generator)
    model.train()
    while progress < 1:
        rows = next(batches)
        set_learning_rate(optimizer, arguments.learning_rate, step=step, warmup=arguments.warmup, progress=progress)
        choice = (torch.rand(batch_size, generator=generator, device=device) * pairs.count[rows]).long()
        ids = pairs.ids[pairs.first[rows] + choice].long()
        images = random_crops(normalise(pairs.images[rows], preprocess), generator)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            image_features, text_features, scale = model(images, ids)
        loss = contrast(image_features.float(), text_features.float(), scale.float())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, log(100))
        step += 1
        recent += loss.detach()
        if step % arguments.log_every == 0:
            rate = step * batch_size / (time.monotonic() - started)
            print(f"step {step:6d}  loss {recent.item() / arguments.log_every:.4f}  {rate:,.0f} pairs/s", flush=True)
            recent.zero_()
        by_steps = step / arguments.steps if arguments.steps else 0.0
        progress = max(by_steps, (time.monotonic() - started) / (60 * arguments.minutes))
    return step, time.monotonic() - started


@torch.no_grad()
def retrieval(model: CLIP, pairs: Pairs, captions: Sequence[str], preprocess: dict[str, Any]) -> dict[str, Any]:
    """Top-1 and top-5 accuracy (fractions) of finding the own caption among the first captions of a pool, and the own image.

    A tie counts as a miss, so that pairs with equal captions are never counted as found by luck; their number is reported.
    """
    model.eval()
    image_features = torch.cat([model.encode_image(normalise(images, preprocess), normalize=True) for images in pairs.images.split(256)])
    text_features = torch.cat([model.encode_text(ids.long(), normalize=True) for ids in pairs.ids[pairs.first].split(256)])
    similarity = image_features @ text_features.T
    result: dict[str, Any] = {"pool": len(captions), "distinct_captions": len(set(captions))}
    for name, scores in (("image_to_text", similarity), ("text_to_image", similarity.T)):
        rank = (scores >= scores.diagonal()[:, None]).sum(dim=1) - 1  # the others that are at least as similar
        result[name] = {f"top{k}": (rank < k).float().mean().item() for k in (1, 5)}
    return result


def save(model: CLIP, config: dict[str, Any], dtype: torch.dtype, folder: Path) -> None:
    """Writes open_clip_config.json and open_clip_model.safetensors."""
    weights = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=4) + "\n")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", type=Path, nargs="+", help="shard folders to train on")
    parser.add_argument("--validation", type=Path, help="a shard folder to measure retrieval on; without it, some pairs are held out")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument(
        "--config", type=Path, default=Path(__file__).with_name("small_clip.json"), help="open_clip's model and preprocessing"
    )
    parser.add_argument("--minutes", type=float, default=3.0, help="length of the training itself")
    parser.add_argument("--steps", type=int, default=0, help="stop after so many steps if that is sooner (0: never)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=2048)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--warmup", type=int, default=300, help="steps")
    parser.add_argument("--log-every", type=int, default=100, help="steps")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the saved weights")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that read and tokenise")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Reads the shards, trains, measures retrieval, saves the model and its report."""
    arguments = parse_arguments(argv)
    arguments.out.mkdir(parents=True, exist_ok=True)
    config = json.loads(arguments.config.read_text())
    model_config, preprocess = config["model_cfg"], config["preprocess_cfg"]
    started = time.monotonic()
    with workers(arguments.workers) as pool:
        load = partial(load_pairs, model_config=model_config, out=arguments.out, pool=pool, device=arguments.device)
        pairs, captions = load(arguments.shards, merges=True)
        if arguments.validation is None:
            held_out = max(1, min(POOL, len(captions) // 10))
            order = torch.randperm(len(captions), generator=torch.Generator().manual_seed(0))
            rows = order.to(arguments.device)
            pairs = Pairs(pairs.images[rows], pairs.ids, pairs.first[rows], pairs.count[rows])
            captions = [captions[i] for i in order.tolist()]
            validation, validation_captions = pairs.rows(0, held_out), captions[:held_out]
            pairs = pairs.rows(held_out, len(captions))
        else:
            validation, validation_captions = load([arguments.validation], merges=False)
            validation, validation_captions = validation.rows(0, POOL), validation_captions[:POOL]
    vocabulary = model_config["text_cfg"]["vocab_size"]
    print(f"{len(pairs.images):,} pairs, a vocabulary of {vocabulary}, {time.monotonic() - started:.0f} s to read them", flush=True)

    torch.manual_seed(arguments.seed)
    model = CLIP(**model_config).to(arguments.device)
    steps, seconds = train(model, pairs, preprocess, arguments)
    dtype = getattr(torch, arguments.dtype)
    model.load_state_dict({name: tensor.to(dtype) for name, tensor in model.state_dict().items()})  # what is measured is what is saved
    image_parameters = sum(p.numel() for p in model.visual.parameters())
    report = {
        "retrieval": retrieval(model, validation, validation_captions, preprocess),
        "held_out_from": "the training shards" if arguments.validation is None else "the validation shards",
        "training_pairs": len(pairs.images),
        "steps": steps,
        "pairs_seen": steps * min(arguments.batch_size, len(pairs.images)),
        "seconds": seconds,
        "vocabulary": vocabulary,
        "image_parameters": image_parameters,
        "text_parameters": sum(p.numel() for p in model.parameters()) - image_parameters,
        "settings": {k: v for k, v in vars(arguments).items() if isinstance(v, (int, float, str))},
    }
    save(model, config, dtype, arguments.out)
    (arguments.out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report["retrieval"]))


if __name__ == "__main__":
    main()
