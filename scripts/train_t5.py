"""Trains a small T5 encoder on captions: a SentencePiece vocabulary, then span corruption (Raffel et al., arXiv 1910.10683, section 3.1.4).

The architecture is T5 v1.1's (gated GELU, relative positions, untied output layer). The decoder is only there to train and is thrown
away: what is saved is a folder that `EncoderConfig(kind="t5", model=FOLDER)` reads, and `report.json` with the held-out loss.

    python scripts/train_t5.py SHARDS captions.txt captions_train2017.json --out t5 --minutes 3

Each source is a folder of shards, a text file with a caption a line, or JSON as COCO's captions.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import sentencepiece
import torch
from torch import Tensor
from transformers import T5Config, T5EncoderModel, T5ForConditionalGeneration

from t2i_experts.shards.reader import ShardReader

PAD, EOS, UNKNOWN = 0, 1, 2
SENTINELS = 100
NOISE_DENSITY = 0.15
MEAN_SPAN = 3.0


def read_captions(source: Path, threads: int) -> list[str]:
    """All captions of a shard folder, a text file or a COCO json. Raises ValueError if there are none."""
    if source.is_dir():
        reader = ShardReader([source], size=1, seed=0)
        ranges = [range(start, min(start + 4096, reader.samples)) for start in range(0, reader.samples, 4096)]
        with ThreadPoolExecutor(threads) if threads == 1 else ProcessPoolExecutor(threads) as pool:
            captions = [caption for part in pool.map(partial(_captions, reader), ranges) for caption in part]
    elif source.suffix == ".json":
        captions = [annotation["caption"].strip() for annotation in json.loads(source.read_text("utf-8"))["annotations"]]
    else:
        captions = [line.strip() for line in source.read_text("utf-8").splitlines()]
    captions = [caption for caption in captions if caption]
    if not captions:
        raise ValueError(f"{source} holds no captions; allowed: a shard folder, a text file, a COCO captions json")
    return captions


def _captions(reader: ShardReader, indices: range) -> list[str]:
    """The captions of some samples; the images are not decoded."""
    return [caption for index in indices for caption in reader.raw(index).captions]


def train_vocabulary(captions: list[str], pieces: int, threads: int) -> bytes:
    """A unigram SentencePiece model with T5's special ids, which spells what it does not know in bytes and so never says <unk>."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(captions),
        model_writer=model,
        model_type="unigram",
        vocab_size=pieces,
        hard_vocab_limit=False,
        byte_fallback=True,
        pad_id=PAD,
        eos_id=EOS,
        unk_id=UNKNOWN,
        bos_id=-1,
        input_sentence_size=300_000,
        shuffle_input_sentence=True,
        num_threads=threads,
        minloglevel=2,
    )
    return model.getvalue()


def tokenize(captions: list[str], vocabulary: bytes, max_tokens: int, threads: int) -> tuple[Tensor, Tensor]:
    """ids (N, max_tokens - 1) int16 without </s>, and lengths (N,) int64; captions of fewer than two tokens are left out."""
    pieces = sentencepiece.SentencePieceProcessor(model_proto=vocabulary, num_threads=threads)
    encoded = [row[: max_tokens - 1] for row in pieces.encode(captions) if len(row) > 1]
    ids = torch.zeros(len(encoded), max_tokens - 1, dtype=torch.int16)
    for i, row in enumerate(encoded):
        ids[i, : len(row)] = torch.tensor(row, dtype=torch.int16)
    return ids, torch.tensor([len(row) for row in encoded])


def random_partition(total: Tensor, parts: Tensor, size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """For each row, `total` split at random into `parts` numbers of at least 1: (B, size[1]) int64, zero after the last part.

    total, parts: (B,) int64 with 1 <= parts <= total. size: the largest total and the largest number of parts that there may be.
    """
    position = torch.arange(size[0], device=total.device)
    outside = position >= total[:, None]
    keys = torch.rand(len(total), size[0], generator=generator, device=total.device).masked_fill_(outside, 2.0)
    keys[:, 0] = -1.0  # the first item always begins a part
    begins = keys.argsort(dim=1).argsort(dim=1) < parts[:, None]
    part = begins.cumsum(dim=1) - 1  # (B, size[0]): the part that each item belongs to
    sizes = torch.zeros(len(total), size[1], dtype=torch.int64, device=total.device)
    return sizes.scatter_add_(1, part, (~outside).long())


def corrupt_spans(ids: Tensor, lengths: Tensor, first_sentinel: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """T5's span corruption of a batch: (inputs, targets), both ended by </s> and padded with `PAD`.

    ids: (B, L) int64. lengths: (B,) int64, at least 2. 15 % of the tokens go, in spans of 3 on average that never touch; the i-th
    span becomes the sentinel `first_sentinel - i` in the inputs; the targets hold each sentinel followed by what it hides.
    """
    batch, width = ids.shape
    device = ids.device
    noise = (lengths * NOISE_DENSITY).round().long().clamp(min=1)
    spans = torch.minimum((noise / MEAN_SPAN).round().long().clamp(min=1), torch.minimum(noise, lengths - noise))
    most = int(width * NOISE_DENSITY) + 1
    hidden = random_partition(noise, spans, (most, most), generator)  # (B, most): lengths of the hidden stretches
    shown = random_partition(lengths - noise, spans, (width, most), generator)  # and of the shown ones, each before its hidden one
    starts = (shown + hidden).cumsum(dim=1) - hidden
    real_span = torch.arange(most, device=device) < spans[:, None]

    position = torch.arange(width, device=device)
    in_text = position < lengths[:, None]
    is_start = torch.zeros(batch, width + 1, dtype=torch.bool, device=device)
    is_start.scatter_(1, torch.where(real_span, starts, width), True)
    is_start = is_start[:, :width]
    index = is_start.long().cumsum(dim=1) - 1  # (B, L): the last span that has begun
    end = (starts + hidden).gather(1, index.clamp(min=0))
    is_hidden = in_text & (index >= 0) & (position < end)
    sentinel = first_sentinel - index

    kept = in_text & (~is_hidden | is_start)
    inputs = _compacted(torch.where(is_start, sentinel, ids), kept, width + 1)
    hidden_before = is_hidden.long().cumsum(dim=1) - 1
    targets = torch.full((batch, 2 * most + 3), PAD, dtype=torch.int64, device=device)  # the last column collects what is not written
    last = targets.shape[1] - 1
    targets.scatter_(1, torch.where(is_hidden, hidden_before + index + 1, last), ids)
    targets.scatter_(1, torch.where(is_start, hidden_before + index, last), sentinel)
    targets.scatter_(1, (noise + spans)[:, None], first_sentinel - spans[:, None])
    targets.scatter_(1, (noise + spans + 1)[:, None], EOS)
    return inputs, targets[:, :last]


def _compacted(values: Tensor, kept: Tensor, width: int) -> Tensor:
    """The kept values of each row moved to its front, then </s>, then padding: (B, width)."""
    result = torch.full((len(values), width + 1), PAD, dtype=torch.int64, device=values.device)
    result.scatter_(1, torch.where(kept, kept.long().cumsum(dim=1) - 1, width), values)
    result.scatter_(1, kept.sum(dim=1, keepdim=True), EOS)
    return result[:, :width]


def build_model(pieces: int, arguments: argparse.Namespace) -> T5ForConditionalGeneration:
    """A random T5 v1.1 with room for the pieces and the sentinels, rounded up to a multiple of 64."""
    config = T5Config(
        vocab_size=-(-(pieces + SENTINELS) // 64) * 64,
        d_model=arguments.width,
        d_kv=arguments.head_width,
        num_heads=arguments.width // arguments.head_width,
        d_ff=arguments.feed_forward,
        num_layers=arguments.layers,
        num_decoder_layers=2,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        dropout_rate=0.0,
        decoder_start_token_id=PAD,
    )
    model = T5ForConditionalGeneration(config)
    torch.nn.init.normal_(model.lm_head.weight, std=config.d_model**-0.5)  # so that the first loss is that of a uniform guess
    return model


def span_loss(
    model: T5ForConditionalGeneration, ids: Tensor, lengths: Tensor, rows: Tensor, first_sentinel: int, generator: torch.Generator
) -> Tensor:
    """Mean cross-entropy (nats a target token) of the given rows (on the CPU, as `lengths`) under one random corruption."""
    device = ids.device
    width = -(-int(lengths[rows].max()) // 8) * 8
    batch = ids[rows.to(device), :width].long()
    inputs, targets = corrupt_spans(batch, lengths[rows].to(device), first_sentinel, generator)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        loss: Tensor = model(input_ids=inputs, attention_mask=(inputs != PAD).long(), labels=targets.masked_fill(targets == PAD, -100)).loss
    return loss


@torch.no_grad()
def held_out_loss(model: T5ForConditionalGeneration, ids: Tensor, lengths: Tensor, first_sentinel: int, batch_size: int) -> float:
    """Mean loss on captions that were never trained on, under corruptions that are the same every time."""
    model.eval()
    generator = torch.Generator(ids.device).manual_seed(1)
    losses = [
        (span_loss(model, ids, lengths, rows, first_sentinel, generator).item(), len(rows))
        for rows in torch.arange(len(ids)).split(batch_size)
    ]
    model.train()
    return sum(loss * n for loss, n in losses) / sum(n for _, n in losses)


def train(
    model: T5ForConditionalGeneration, ids: Tensor, lengths: Tensor, first_sentinel: int, arguments: argparse.Namespace
) -> tuple[int, float]:
    """AdamW with a short warm-up and a linear decay to zero over the steps or the minutes, whichever end first: (steps, seconds)."""
    device = ids.device
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=arguments.learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=device.type == "cuda"
    )
    order = torch.Generator().manual_seed(arguments.seed)
    noise = torch.Generator(device).manual_seed(arguments.seed)
    batch_size = min(arguments.batch_size, len(ids))
    started, step, recent = time.monotonic(), 0, torch.zeros((), device=device)
    progress = 0.0
    queue = torch.empty(0, dtype=torch.int64)
    while progress < 1:
        if len(queue) < batch_size:
            queue = torch.randperm(len(ids), generator=order)
        rows, queue = queue[:batch_size], queue[batch_size:]
        for group in optimizer.param_groups:
            group["lr"] = arguments.learning_rate * min(1.0, (step + 1) / arguments.warmup) * (1 - progress)
        loss = span_loss(model, ids, lengths, rows, first_sentinel, noise)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        recent += loss.detach()
        if step % arguments.log_every == 0:
            elapsed = time.monotonic() - started
            mean = recent.item() / arguments.log_every
            print(f"step {step:6d}  loss {mean:.4f}  {step * batch_size / elapsed:,.0f} captions/s", flush=True)
            if not math.isfinite(mean):
                raise SystemExit(f"error: the loss is not finite any more at step {step}; lower --learning-rate")
            recent.zero_()
        by_steps = step / arguments.steps if arguments.steps else 0.0
        progress = max(by_steps, (time.monotonic() - started) / (60 * arguments.minutes))
    return step, time.monotonic() - started


def save_encoder(model: T5ForConditionalGeneration, vocabulary: bytes, dtype: torch.dtype, folder: Path) -> int:
    """Writes config.json, model.safetensors and spiece.model of the encoder alone; returns its number of parameters."""
    encoder = T5EncoderModel(model.config)
    encoder.load_state_dict({k: v for k, v in model.state_dict().items() if k.startswith(("shared.", "encoder."))})
    encoder.to(dtype).save_pretrained(folder)
    (folder / "spiece.model").write_bytes(vocabulary)
    return sum(parameter.numel() for parameter in encoder.parameters())


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", type=Path, nargs="+", help="folders of shards, text files, COCO captions json")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--minutes", type=float, default=3.0, help="length of the training")
    parser.add_argument("--steps", type=int, default=0, help="stop after so many steps if that is sooner (0: never)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pieces", type=int, default=3072, help="size of the vocabulary, 256 of it bytes")
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--feed-forward", type=int, default=384)
    parser.add_argument("--head-width", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=64, help="longer captions are cut")
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="3e-3 has diverged")
    parser.add_argument("--warmup", type=int, default=200, help="steps")
    parser.add_argument("--log-every", type=int, default=100, help="steps")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the saved weights")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="to read and tokenise with")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Reads the captions, trains, saves the encoder and its report."""
    arguments = parse_arguments(argv)
    torch.manual_seed(arguments.seed)
    captions = [caption for source in arguments.sources for caption in read_captions(source, arguments.threads)]
    vocabulary = train_vocabulary(captions, arguments.pieces, arguments.threads)
    ids, lengths = tokenize(captions, vocabulary, arguments.max_tokens, arguments.threads)
    shuffled = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))
    held_out = max(1, min(4096, len(ids) // 20))
    ids, lengths = ids[shuffled].to(arguments.device), lengths[shuffled]
    print(f"{len(captions):,} captions, {lengths.float().mean():.1f} tokens on average, {held_out:,} of them held out", flush=True)

    pieces = sentencepiece.SentencePieceProcessor(model_proto=vocabulary).get_piece_size()
    model = build_model(pieces, arguments).to(arguments.device)
    first_sentinel = model.config.vocab_size - 1  # as in T5, the sentinels count downwards from the end
    validate = (ids[:held_out], lengths[:held_out], first_sentinel, arguments.batch_size)
    before = held_out_loss(model, *validate)
    steps, seconds = train(model, ids[held_out:], lengths[held_out:], first_sentinel, arguments)
    after = held_out_loss(model, *validate)
    parameters = save_encoder(model, vocabulary, getattr(torch, arguments.dtype), arguments.out)
    report = {
        "captions": len(captions),
        "held_out_captions": held_out,
        "held_out_loss_before": before,
        "held_out_loss": after,
        "steps": steps,
        "captions_seen": steps * min(arguments.batch_size, len(ids) - held_out),
        "seconds": seconds,
        "pieces": pieces,
        "encoder_parameters": parameters,
        "settings": {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items() if key != "sources"},
    }
    (arguments.out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    print(f"held-out loss {before:.4f} -> {after:.4f}; encoder of {parameters:,} parameters in {arguments.out}")


if __name__ == "__main__":
    main()
