"""Pictures one after the other as squares of one size: those of a folder or of shards, or those that a model draws for prompts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from t2i_experts.evaluation.pictures import (
    Picture,
    PictureSet,
    Unreadable,
    printable,
    refuse_unreadable,
    set_hash,
)
from t2i_experts.evaluation.seeing import Drawing
from t2i_experts.evaluation.squares import centre_square
from t2i_experts.shards.parallel import in_order


@dataclass(frozen=True)
class Shown:
    """A picture as the comparison sees it. pixels: (3, R, R) uint8. sides: the shorter side of the picture as it was."""

    pixels: Tensor
    name: str
    caption: str
    digest: bytes
    side: int


class Source(Protocol):
    """Pictures that are looked at: those of a folder, or a model's."""

    @property
    def count(self) -> int:
        """Of the pictures."""
        ...

    @property
    def listing(self) -> Any:
        """What is known of all of them before any is looked at, as JSON's plain values."""
        ...

    def squares(self, indices: Sequence[int], resolution: int, workers: int) -> Iterator[Shown]:
        """Of these pictures, in this order. Raises ValueError if any cannot be had."""
        ...

    def described(self, digests: Sequence[bytes]) -> dict[str, Any]:
        """path, kind and sha256 of the set, for its record. digests: of all its pictures, in order."""
        ...


@dataclass(frozen=True)
class Stored:
    """The pictures of a folder or of shards."""

    pictures: PictureSet

    @property
    def count(self) -> int:
        """See `Source`."""
        return self.pictures.count

    @property
    def listing(self) -> str:
        """See `Source`."""
        return self.pictures.listing

    def squares(self, indices: Sequence[int], resolution: int, workers: int) -> Iterator[Shown]:
        """See `Source`. Pictures that cannot be read are named together, at the end."""

        def look(index: int) -> Shown | Unreadable:
            match self.pictures.decoded(index):
                case Picture(pixels, digest, name, captions):
                    caption = captions[0] if captions else ""
                    return Shown(centre_square(pixels, resolution), printable(name), caption, digest, min(pixels.shape[1:]))
                case Unreadable() as unreadable:
                    return unreadable

        lost: list[Unreadable] = []
        with ThreadPoolExecutor(workers) as pool:
            for found in in_order(pool, workers, look, indices):
                if isinstance(found, Unreadable):
                    lost.append(found)
                else:
                    yield found
        refuse_unreadable(lost, self.pictures)

    def first_side(self) -> int:
        """The shorter side of the first picture. Raises ValueError if it cannot be read."""
        found = self.pictures.decoded(0)
        refuse_unreadable([found] if isinstance(found, Unreadable) else [], self.pictures)
        assert isinstance(found, Picture)
        return min(found.pixels.shape[1:])

    def name(self, index: int) -> str:
        """Of a picture in the set."""
        return printable(self.pictures.names[index] if self.pictures.names else self.pictures.load(index).name)

    def described(self, digests: Sequence[bytes]) -> dict[str, Any]:
        """See `Source`."""
        return {"path": str(self.pictures.path), "kind": self.pictures.kind, "sha256": set_hash(digests)}


@dataclass(frozen=True)
class Drawn:
    """A model's pictures of a list of prompts, drawn when they are looked at and not kept."""

    drawing: Drawing

    @property
    def count(self) -> int:
        """See `Source`."""
        return len(self.drawing.prompts.prompts)

    @property
    def listing(self) -> dict[str, Any]:
        """See `Source`."""
        return {**self.drawing.facts, "prompts": self.drawing.prompts.sha256, "seed": self.drawing.seed}

    def squares(self, indices: Sequence[int], resolution: int, workers: int) -> Iterator[Shown]:
        """See `Source`."""
        texts, side = self.drawing.prompts.texts, self.drawing.pipeline.base.config.size
        for i, square in zip(indices, self.drawing.squares(indices, resolution), strict=True):
            digest = hashlib.sha256(square.contiguous().numpy().tobytes()).digest()
            yield Shown(square, f"picture {i}", texts[i], digest, side)

    def described(self, digests: Sequence[bytes]) -> dict[str, Any]:
        """See `Source`."""
        return {"path": "the sampler's pictures", "kind": "generated", "sha256": hashlib.sha256(b"".join(digests)).hexdigest()}
