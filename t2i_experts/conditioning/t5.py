"""T5 text encoder (Raffel et al., arXiv 1910.10683; eDiff-I uses T5-v1.1-XXL): a sequence of token features.

The tokeniser is sentencepiece itself: it gives character offsets into the prompt as typed, which transformers' T5 tokeniser does not,
and it reads a typed `</s>` or `<extra_id_0>` as the plain text that it is. T5 never runs in float16, where its residual stream
overflows to NaN, and always gets the attention mask.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from sentencepiece import SentencePieceProcessor
from torch import Tensor
from torch.nn.functional import pad

from t2i_experts.conditioning.frozen import copy_file, device_of, dtype_named, freeze, frozen_forward, local_folder, to_device
from t2i_experts.conditioning.spans import trimmed
from t2i_experts.config import EncoderConfig
from t2i_experts.types import Embedding, Span, Tokens

VOCABULARY = "spiece.model"
_SURROGATES = re.compile("[\ud800-\udfff]")


class T5Tokenizer:
    """Prompts to T5's ids, with the characters that each token covers. Picklable; holds the vocabulary and no weights.

    A span leaves out the space that SentencePiece folds into the front of a word, so that the tokens of a phrase are those whose spans
    overlap its characters. Tokens that together spell one character (byte fallback, compatibility characters) all cover it.
    """

    def __init__(self, vocabulary: bytes, max_tokens: int) -> None:
        if max_tokens < 1:
            raise ValueError(f"max_tokens={max_tokens} must be positive")
        try:
            self.pieces = SentencePieceProcessor(model_proto=vocabulary)
        except RuntimeError as error:
            raise ValueError(f"the SentencePiece vocabulary is damaged: {error}") from error
        if not vocabulary:
            raise ValueError("the SentencePiece vocabulary is empty")
        self.max_tokens = max_tokens

    def tokenize(self, prompts: Sequence[str]) -> Tokens:
        """Tokens padded to `max_tokens` with id 0; each row ends with `</s>`, also where the prompt is too long."""
        ids = np.zeros((len(prompts), self.max_tokens), np.int64)
        mask = np.zeros((len(prompts), self.max_tokens), np.bool_)
        spans: list[tuple[Span, ...]] = []
        truncated: list[int | None] = []
        for row, prompt in enumerate(prompts):
            row_ids, row_spans = self._encode(prompt)
            room = self.max_tokens - 1
            truncated.append(next((start for start, end in row_spans[room:] if start < end), None))
            row_ids, row_spans = [*row_ids[:room], self.pieces.eos_id()], row_spans[:room]
            end = row_spans[-1][1] if row_spans else 0
            spans.append((*row_spans, (end, end)))
            ids[row, : len(row_ids)] = row_ids
            mask[row, : len(row_ids)] = True
        return Tokens.covering(torch.from_numpy(ids), torch.from_numpy(mask), spans, truncated)

    def count(self, prompt: str) -> int:
        """Tokens that a prompt has before it is cut, `</s>` included."""
        return len(self.pieces.encode(_SURROGATES.sub("\ufffd", prompt))) + 1

    def unknown(self, prompt: str) -> str:
        """The different characters of a prompt, in its order, that no piece of the vocabulary spells: they become <unk> or single bytes."""
        ids, spans = self._encode(prompt)
        lost = [span for i, span in zip(ids, spans, strict=True) if self.pieces.is_unknown(i) or self.pieces.is_byte(i)]
        return "".join(dict.fromkeys("".join(prompt[start:end] for start, end in lost)))

    def _encode(self, prompt: str) -> tuple[list[int], list[Span]]:
        """All ids of a prompt, without `</s>`, and their spans."""
        readable = _SURROGATES.sub("\ufffd", prompt)  # half a surrogate pair has no UTF-8
        encoded: dict[str, Any] = self.pieces.encode(readable, return_type="offset_mapping")
        spans: list[Span] = [(start, end) for start, end in encoded["offsets"]]
        for i in reversed(range(len(spans) - 1)):
            # Only the last of the pieces that spell one character has its characters; a bare word boundary spells none.
            empty = spans[i][0] == spans[i][1]
            if empty and encoded["pieces"][i] != "▁" and spans[i + 1][0] == spans[i][0]:
                spans[i] = spans[i + 1]
        for i, piece in enumerate(encoded["pieces"]):
            spans[i] = (spans[i][1], spans[i][1]) if piece == "▁" else trimmed(prompt, spans[i])
        return encoded["ids"], spans


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Keeps transformers' progress bars off stderr, which belongs to the command."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, L) bool, True = real token, to what is added to the scores, (B, 1, 1, L): 0, or the lowest number of `dtype` at padding.

    transformers takes four dimensions as they are. From two it would make the same, but first ask the device whether there is any padding
    at all, and wait for the answer.
    """
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)[:, None, None, :]


def _not_loaded(model: str, folder: Path | None, error: OSError) -> ValueError:
    place = "is not a local folder and cannot be loaded from the hub" if folder is None else "is not a complete T5 folder"
    return ValueError(f"encoder model {model!r} {place}: {error}")


class T5Encoder:
    """A frozen T5 encoder: token features (B, L, D) after its final norm, zero at padding; no pooled vector.

    They come back as float32 whatever dtype the weights have: one batch is small beside the network, and everything after it then
    has one dtype.
    """

    kind = "t5"
    reads: Literal["text"] = "text"
    pooled_width = 0

    def __init__(self, model: Any, tokenizer: T5Tokenizer, source: Path | None = None) -> None:
        if any(parameter.dtype == torch.float16 for parameter in model.parameters()):
            raise ValueError("T5 in float16 overflows to NaN; allowed: float32, bfloat16")
        pieces = tokenizer.pieces.get_piece_size()
        if pieces > model.config.vocab_size:
            raise ValueError(f"T5's vocabulary has {pieces} pieces, but its model has embeddings for {model.config.vocab_size}")
        self.model = model
        self.tokenizer = tokenizer
        self.width: int = model.config.d_model
        self.max_tokens = tokenizer.max_tokens
        self._source = source

    @classmethod
    def load_tokenizer(cls, config: EncoderConfig, root: Path | None) -> T5Tokenizer:
        """Reads spiece.model alone, from a local folder or a hub id. Raises ValueError if it is missing or damaged."""
        from transformers.utils import cached_file

        folder = local_folder(config.model, root)
        try:
            vocabulary = cached_file(config.model if folder is None else str(folder), VOCABULARY)
        except OSError as error:
            raise _not_loaded(config.model, folder, error) from error
        assert vocabulary is not None
        try:
            return T5Tokenizer(Path(vocabulary).read_bytes(), config.max_tokens)
        except ValueError as error:
            raise ValueError(f"{vocabulary}: {error}") from error

    @classmethod
    def load(cls, config: EncoderConfig, root: Path | None, device: torch.device | str, shared: dict[Any, Any] | None = None) -> T5Encoder:
        """Reads config.json, the weights and spiece.model from a local folder or a hub id (`config.model`).

        `shared` is not used: two encoders never want one T5. Raises ValueError if the files are missing or do not fit.
        """
        from transformers import T5EncoderModel

        if config.pretrained is not None:
            raise ValueError(f"encoder model {config.model!r}: pretrained={config.pretrained!r} does not apply to T5; leave it out")
        dtype = dtype_named(config.dtype, config.model)
        folder = local_folder(config.model, root)
        source = config.model if folder is None else str(folder)
        tokenizer = cls.load_tokenizer(config, root)
        try:
            with _no_progress_bar():
                model, report = T5EncoderModel.from_pretrained(source, dtype=dtype, output_loading_info=True)
        except OSError as error:
            raise _not_loaded(config.model, folder, error) from error
        lacking = set(report["missing_keys"]) - {"encoder.embed_tokens.weight"}
        if lacking:
            raise ValueError(f"encoder model {config.model!r} lacks the weights {sorted(lacking)[:3]} ({len(lacking)} in all)")
        return cls(freeze(model, device, dtype), tokenizer, folder)

    def encode(self, tokens: Tokens) -> Embedding:
        """Features of every token; the network runs on the longest prompt's length and not on the padding after it."""
        device = device_of(self.model)
        length = max(1, int(tokens.mask.sum(dim=1).max()))
        mask = to_device(tokens.mask, device)
        with frozen_forward(device):
            hidden: Tensor = self.model(
                input_ids=to_device(tokens.ids[:, :length], device), attention_mask=additive(mask[:, :length], self.model.dtype)
            ).last_hidden_state  # (B, length, D)
            hidden = hidden.float().masked_fill(~mask[:, :length, None], 0.0)
        return Embedding(pad(hidden, (0, 0, 0, mask.shape[1] - length)), mask)

    def save(self, folder: Path, earlier: Path | None = None) -> None:
        """Copies the files that `load` needs, in the dtype that they have. Raises ValueError if they came from no local folder."""
        if self._source is None:
            raise ValueError("only a T5 that was loaded from a local folder is saved; refer to the others by their hub id")
        folder.mkdir(parents=True, exist_ok=True)
        wanted = [self._source / "config.json", self._source / VOCABULARY, *self._source.glob("*.safetensors*")]
        if len(wanted) == 2:
            raise ValueError(f"{self._source} holds no safetensors; convert its weights with transformers' save_pretrained first")
        for file in wanted:
            copy_file(file, folder / file.name, earlier and earlier / file.name)
