"""Where prompts and reference pictures come from, as the options of `eval coco` and `eval sweep` say it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from t2i_experts.evaluation.prompts import PromptList, choose_captions, listed_images, read_ids, read_prompts

if TYPE_CHECKING:
    from t2i_experts.evaluation.originals import FolderOriginals, ShardOriginals

USUAL = 30_000
"""Pictures, if nobody says how many: FID-30K."""


@dataclass(frozen=True)
class Sources:
    """What the options say of prompts and reference pictures."""

    annotations: Path | None
    images: Path | None
    shards: Path | None
    num: int | None
    caption_seed: int
    ids: Path | None
    prompts: Path | None
    reference: str

    @property
    def compares(self) -> bool:
        """Whether there is something to compare the features of the pictures with."""
        return self.prompts is None

    def check(self, compared: Mapping[str, Any], metric: bool) -> None:
        """Raises ValueError for options that do not go together; `compared` have a meaning only with reference pictures."""
        if self.prompts is not None:
            others = {"annotations": self.annotations, "images": self.images, "shards": self.shards, "ids": self.ids, **compared}
            given = [name for name, value in others.items() if value]
            if given or self.reference != "chosen":
                raise ValueError(f"--prompts has no reference pictures: --{given[0] if given else 'reference'} does not go with it")
            if not metric:
                raise ValueError("--prompts has no reference pictures: name what to measure, such as --metric clip:model=embedded:clip")
            return
        if self.shards is not None:
            given = [name for name, value in (("annotations", self.annotations), ("images", self.images)) if value]
            if given:
                raise ValueError(f"--shards={str(self.shards)!r} has pictures and captions: --{given[0]} does not go with it")
        elif self.annotations is None and self.ids is None:
            raise ValueError(
                "give --annotations FILE or --ids FILE for pictures with captions, --shards DIR, which holds both, or --prompts FILE for "
                "prompts alone"
            )
        if self.reference not in ("chosen", "all") and not self.reference.endswith(".npz"):
            raise ValueError(f"--reference={self.reference!r} must be chosen, all, or an .npz of statistics")
        if self.images is None and self.shards is None and not self.statistics:
            raise ValueError("--images is missing: the folder of the reference pictures, such as val2014/")
        if self.images is not None and self.statistics:
            raise ValueError(f"--images={str(self.images)!r} does not go with --reference {self.reference}, which holds their statistics")
        if self.reference == "all" and self.annotations is None and self.shards is None:
            raise ValueError("--reference all are the pictures of --annotations or --shards, which are missing")

    def listed(self) -> PromptList:
        """The list. Raises ValueError."""
        if self.prompts is not None:
            if self.prompts.suffix.lower() == ".json":
                return choose_captions(self.prompts, self.num, self.caption_seed)
            listed = read_prompts(self.prompts).first(self.num, f"--num={self.num}")
            if not all(prompt.text for prompt in listed.prompts):
                raise ValueError(f"--prompts={self.prompts}: some of its rows hold no prompt")
            self._check_seed(listed)
            return listed
        if self.ids is not None:
            listed = read_ids(self.ids, self.annotations, self.caption_seed).first(self.num, f"--num={self.num}")
            self._check_seed(listed)
            return listed
        if self._sharded is not None:
            return self._sharded.choose(self.num, self.caption_seed)
        assert self.annotations is not None
        return choose_captions(self.annotations, USUAL if self.num is None else self.num, self.caption_seed)

    @cached_property
    def originals(self) -> FolderOriginals | ShardOriginals | None:
        """Where the reference pictures are; None if there are none, or statistics instead. Raises ValueError."""
        if not self.compares or self.statistics:
            return None
        if self._sharded is not None:
            return self._sharded
        from t2i_experts.evaluation.originals import FolderOriginals

        assert self.images is not None
        return FolderOriginals(self.images)

    def references(self, listed: PromptList) -> list[str]:
        """The names of the reference pictures, which are all there. Raises ValueError."""
        if self.originals is None:
            return []
        names = listed.file_names
        if self.reference == "all":
            names = listed_images(self.annotations) if self.annotations is not None else list(self._sharded.names if self._sharded else ())
        self.originals.check(names)
        return names

    @cached_property
    def _sharded(self) -> ShardOriginals | None:
        if self.shards is None:
            return None
        from t2i_experts.evaluation.originals import ShardOriginals

        return ShardOriginals(self.shards)

    def _check_seed(self, listed: PromptList) -> None:
        if self.caption_seed and "rule" not in listed.origin:
            raise ValueError(f"--caption-seed={self.caption_seed} has no meaning: {listed.origin['path']} says which captions")

    @property
    def statistics(self) -> Path | None:
        """The reference, if it is a file of statistics."""
        return Path(self.reference) if self.compares and self.reference.endswith(".npz") else None
