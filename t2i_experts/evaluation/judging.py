"""A model's pictures before the judge: drawn for prompts whose claims are known, and scored beside the judge's accuracy on real scenes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor

from t2i_experts.cascade.pipeline import CascadePipeline
from t2i_experts.config import SamplingConfig
from t2i_experts.evaluation.composition import Claim, Prompt, holds, scores
from t2i_experts.evaluation.generation import draw
from t2i_experts.evaluation.judge import Judge, Reading
from t2i_experts.evaluation.processes import ALONE, Processes, interleaved, interleaved_tensors


@dataclass(frozen=True)
class Judged:
    """Pictures, (N, 3, H, W) uint8, with the prompts that they were drawn for and what the judge sees in them."""

    prompts: Sequence[Prompt]
    images: Tensor
    readings: Sequence[Reading]

    @property
    def prompts_hash(self) -> str:
        """sha256 of the prompts with their claims, in their order."""
        listed = [[prompt.text, [_plain(claim) for claim in prompt.claims]] for prompt in self.prompts]
        return sha256(json.dumps(listed).encode()).hexdigest()

    def scores(self, split: str | None = None) -> dict[str, dict[str, Any]]:
        """The scores by category, of all pictures or those of one split, as plain numbers."""
        chosen = [(p.claims, r) for p, r in zip(self.prompts, self.readings, strict=True) if split in (None, p.split)]
        made = scores([claims for claims, _ in chosen], [reading for _, reading in chosen])
        return {category: asdict(score) for category, score in made.items()}

    def verdicts(self) -> list[dict[str, Any]]:
        """Of each picture: its prompt, the claims with whether they hold, and what the judge sees."""
        return [
            {
                "prompt": prompt.text,
                "split": prompt.split,
                "claims": [[*_plain(claim), holds(claim, reading)] for claim in prompt.claims],
                "reading": asdict(reading),
            }
            for prompt, reading in zip(self.prompts, self.readings, strict=True)
        ]

    def captions(self) -> list[str]:
        """Of each picture: its prompt, which claims do not hold, and what is seen, on a line each."""
        return [_caption(prompt, reading) for prompt, reading in zip(self.prompts, self.readings, strict=True)]


def draw_and_judge(
    pipeline: CascadePipeline,
    judge: Judge,
    prompts: Sequence[Prompt],
    *,
    seed: int = 0,
    sampling: SamplingConfig | None = None,
    batch_size: int = 64,
    progress: Callable[[int, int | None], None] = lambda done, total: None,
    processes: Processes = ALONE,
) -> Judged | None:
    """Draws one picture for each prompt, picture i out of the noise of (seed, i), and shows them to the judge.

    progress: called with the number of pictures that are drawn, and that of all. processes: share the pictures; all but the main one get
    None. Raises what was raised in any of them.
    """
    processes.agree(
        "what decides the pictures and the verdicts",
        {
            "model": pipeline.model.fingerprint,
            "judge": judge.fingerprint,
            "prompts": [prompt.text for prompt in prompts],
            "dtype": str(pipeline.dtype),
            "device": pipeline.device.type,
            "sampling": None if sampling is None else asdict(sampling),
            "seed": seed,
        },
    )
    share = processes.share(len(prompts))
    images: list[Tensor] = []

    def look() -> list[Reading]:
        texts = [prompt.text for prompt in prompts]
        for _, batch in draw(pipeline, texts, indices=share, seed=seed, sampling=sampling, batch_size=batch_size):
            images.append(batch)
            progress(sum(map(len, images)), len(share))
        return judge(torch.cat(images)) if images else []

    readings = processes.together(look)
    shares = processes.gather((torch.cat(images) if images else None, readings))  # one tensor: of a view, the whole would be sent
    if not processes.main:
        return None
    return Judged(prompts, interleaved_tensors([own for own, _ in shares]), interleaved([own for _, own in shares]))


def table(judged: Judged, judge: Judge) -> str:
    """The scores in per cent with their standard errors, and the judge's own accuracy on real scenes, as text.

    by chance: what would hold if the prompts' words were drawn from other prompts. where shown: among the cases whose objects the judge
    finds, and what would hold of these by chance. unseen: of prompts for combinations that the training scenes never show.
    """
    own = judge.accuracy.get("all", {}).get("categories", {})
    unseen = judged.scores("held-out")
    rows: list[tuple[str, ...]] = [
        ("in per cent", "right", "by chance", "cases", "where shown", "by chance", "unseen", "judge confirms", "judge rejects")
    ]
    for category, score in judged.scores().items():
        rows.append(
            (
                category,
                _share(score),
                _percent(score["chance"]),
                str(score["cases"]),
                *(("", "") if category == "object" else (_percent(score["shown"]), _percent(score["shown_chance"]))),
                _share(unseen[category]) if category in unseen else "",
                *(f"{100 * own[category][key]:.1f}" if category in own else "" for key in ("confirmed", "rejected")),
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))) for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"


def _share(score: dict[str, Any]) -> str:
    return f"{100 * score['right']:.1f} ± {100 * score['standard_error']:.1f}"


def _plain(claim: Claim) -> list[str]:
    return [claim.category, *claim.words]


def _caption(prompt: Prompt, reading: Reading) -> str:
    wrong = [" ".join(_plain(claim)) for claim in prompt.claims if not holds(claim, reading)]
    seen = ", ".join(" ".join(filter(None, (found.colour, found.name))) for found in reading.objects) or "nothing"
    verdict = f"NOT {'; '.join(wrong)}" if wrong else "all right"
    return f"{prompt.text}\n{verdict}\nseen: {seen}; {reading.style or 'no style'}; {' '.join(reading.background)}"
