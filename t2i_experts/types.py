"""The nouns that every floor speaks: what goes into a denoiser, and what an encoder says of a prompt."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

Span = tuple[int, int]
"""Half-open range of characters [start, end) in the prompt as the user typed it; (i, i) covers nothing."""


@dataclass(frozen=True, eq=False)
class Tokens:
    """A batch of tokenised prompts, on the CPU, ready to travel from a loader's worker to the encoder.

    ids: (B, L) int64, padded to the encoder's own `max_tokens`, so that shapes never change.
    mask: (B, L) bool, True = real token (special tokens included, padding excluded).
    blank: (B,) bool, True = no token of this prompt covers any character: it says nothing.
    spans: for each prompt, for each real token, the characters of the prompt that it covers; special tokens cover nothing.
    truncated: for each prompt, the character at which the encoder stopped reading, or None if it read all of it.
    `rows` and `bare` leave both of these out: ().
    """

    ids: Tensor
    mask: Tensor
    blank: Tensor
    spans: tuple[tuple[Span, ...], ...]
    truncated: tuple[int | None, ...]

    @staticmethod
    def covering(ids: Tensor, mask: Tensor, spans: Sequence[tuple[Span, ...]], truncated: Sequence[int | None]) -> Tokens:
        """Tokens with these spans, from which `blank` follows."""
        blank = [all(start == end for start, end in row) for row in spans]
        return Tokens(ids, mask, torch.tensor(blank, dtype=torch.bool), tuple(spans), tuple(truncated))

    def rows(self, rows: Tensor) -> Tokens:
        """The rows of these indices, (N,) int64, as far as an encoder needs them: without spans."""
        return Tokens(self.ids[rows], self.mask[rows], self.blank[rows], (), ())

    def bare(self) -> Tokens:
        """What an encoder needs, without spans: between processes, these would cost more than the images."""
        return replace(self, spans=(), truncated=())


@dataclass(frozen=True, eq=False)
class TextFeatures:
    """What one text encoder says of one caption, on the CPU, as shards store it.

    tokens: (L, D) bfloat16 at the caption's true length, without padding; L = 0 for a caption that says nothing.
    pooled: (P,) bfloat16, or None for an encoder without a pooled vector.
    """

    tokens: Tensor
    pooled: Tensor | None = None


@dataclass(frozen=True, eq=False)
class FeatureBatch:
    """The stored features of a batch of captions, which take the place of its `Tokens`; not padded, on the CPU.

    tokens: (sum of lengths, D) bfloat16, caption after caption. lengths: (B,) int64. pooled: (B, P) bfloat16 or None.
    """

    tokens: Tensor
    lengths: Tensor
    pooled: Tensor | None = None

    @staticmethod
    def of(features: Sequence[TextFeatures]) -> FeatureBatch:
        """The features of captions side by side; all of them, or none, have a pooled vector."""
        pooled = [f.pooled for f in features if f.pooled is not None]
        lengths = torch.tensor([len(f.tokens) for f in features], dtype=torch.int64)
        return FeatureBatch(torch.cat([f.tokens for f in features]), lengths, torch.stack(pooled) if pooled else None)

    @property
    def blank(self) -> Tensor:
        """(B,) bool, True = this caption says nothing."""
        return self.lengths == 0

    def rows(self, rows: Tensor) -> FeatureBatch:
        """The rows of these indices, (N,) int64."""
        parts = self.tokens.split(self.lengths.tolist())
        tokens = torch.cat([parts[row] for row in rows.tolist()]) if len(rows) else self.tokens[:0]
        return FeatureBatch(tokens, self.lengths[rows], None if self.pooled is None else self.pooled[rows])

    def pin_memory(self) -> FeatureBatch:
        """In page-locked memory, from which a GPU fetches in the background."""
        return replace(self, tokens=self.tokens.pin_memory(), pooled=None if self.pooled is None else self.pooled.pin_memory())


@dataclass(frozen=True, eq=False)
class Embedding:
    """What one frozen encoder says of a batch.

    tokens: (B, L, D) float; a row that is dropped is all zeros.
    mask: (B, L) bool, True = real token; a dropped row has exactly its first token real.
    pooled: (B, P) float, or None for an encoder without a pooled vector.
    """

    tokens: Tensor
    mask: Tensor
    pooled: Tensor | None = None

    @classmethod
    def null(cls, batch: int, length: int, width: int, pooled_width: int = 0, *, device: torch.device | str = "cpu") -> Embedding:
        """`batch` dropped rows of `length` tokens: one valid token of zeros, and a pooled vector of zeros (none for pooled_width 0)."""
        mask = torch.zeros(batch, length, dtype=torch.bool, device=device)
        mask[:, 0] = True
        pooled = torch.zeros(batch, pooled_width, device=device) if pooled_width else None
        return cls(torch.zeros(batch, length, width, device=device), mask, pooled)


@dataclass(frozen=True, eq=False)
class Conditioning:
    """All that a denoiser may know besides x and sigma: for each encoder, by name, its embedding of the batch.

    `projected` holds what a network has computed from the embeddings alone (see `EDMPrecond.prepare`), so that it is computed
    once a prompt and not once a step. Every tensor has the batch as its first dimension.

    each_for_itself: the networks of an ensemble have each its own projections, which are kept with this object (`once`) instead of in
    `projected`. `rows` of the same range are the same object every time, so that whoever has taken it in once knows it again.
    """

    embeddings: Mapping[str, Embedding]
    projected: Mapping[str, Tensor] = field(default_factory=dict)
    each_for_itself: bool = False
    _made: dict[Hashable, Conditioning] = field(default_factory=dict, init=False, repr=False)

    @property
    def batch(self) -> int:
        """Number of rows."""
        assert self.embeddings, "a conditioning names at least one encoder"
        return next(iter(self.embeddings.values())).mask.shape[0]

    def map(self, function: Callable[[Tensor], Tensor]) -> Conditioning:
        """Every tensor replaced by function(tensor)."""

        def embedding(e: Embedding) -> Embedding:
            return Embedding(function(e.tokens), function(e.mask), None if e.pooled is None else function(e.pooled))

        return Conditioning(
            {name: embedding(e) for name, e in self.embeddings.items()},
            {name: function(t) for name, t in self.projected.items()},
            self.each_for_itself,
        )

    def rows(self, start: int, stop: int) -> Conditioning:
        """The rows [start, stop), as views."""
        return self.once((start, stop), lambda: self.map(lambda tensor: tensor[start:stop]))

    def expand(self, batch: int) -> Conditioning:
        """A batch of one row repeated `batch` times, without copying."""
        return self.map(lambda tensor: tensor.expand(batch, *tensor.shape[1:]))

    def once(self, key: Hashable, make: Callable[[], Conditioning]) -> Conditioning:
        """What `make` gives: made when it is first asked for under this key, and kept with this object, the same one every time."""
        return self._made.get(key) or self._made.setdefault(key, make())

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """The rows of all parts, in order; shorter token sequences are padded with masked zeros. `projected` must be empty.

        Raises ValueError if the parts differ in their encoders or in which of them have pooled vectors, or already hold projections.
        """
        names = list(parts[0].embeddings)
        if any(set(part.embeddings) != set(names) for part in parts):
            raise ValueError(f"cannot join conditionings of different encoders: {[sorted(part.embeddings) for part in parts]}")
        if any(part.projected for part in parts):
            raise ValueError("cannot join prepared conditionings: join first, then prepare")

        def join(name: str) -> Embedding:
            embeddings = [part.embeddings[name] for part in parts]
            length = max(e.mask.shape[1] for e in embeddings)
            pooled = [e.pooled for e in embeddings if e.pooled is not None]
            if pooled and len(pooled) < len(parts):
                raise ValueError(f"cannot join conditionings of which only some have a pooled vector of {name!r}")
            return Embedding(
                torch.cat([pad(e.tokens, (0, 0, 0, length - e.mask.shape[1])) for e in embeddings]),
                torch.cat([pad(e.mask, (0, length - e.mask.shape[1])) for e in embeddings]),
                torch.cat(pooled) if pooled else None,
            )

        return Conditioning({name: join(name) for name in names})


class Denoiser(Protocol):
    """Estimates the clean image from a noisy one: the only thing that a sampler knows. Where there is a codec, "image" means its latents.

    x: (B, C, H, W) = y + sigma * eps with y in [-1, 1]; sigma: 0-d tensor (float64 on the CPU when sampling) or (B,);
    conditioning: of B rows. Returns the denoised images, (B, C, H, W) float32.
    """

    def __call__(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor: ...
