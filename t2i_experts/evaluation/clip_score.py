"""CLIP score: the mean cosine between CLIP's embeddings of pictures and of their captions, times 100 (Hessel et al., arXiv 2104.08718).

Hessel et al. have 2.5 max(cos, 0) with the prefix "A photo depicts "; papers on text-to-image mostly have the plain cosine, as here.
Which network it was, whether it was clamped and what prefix it had stand in the record: scores of unlike ones do not compare.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import open_clip
import torch
from open_clip.model import CLIP, CustomTextCLIP
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from torch import Tensor
from torch.nn.functional import normalize

from t2i_experts.conditioning.clip import Towers
from t2i_experts.conditioning.frozen import device_of, fingerprint, freeze, frozen_forward, to_device
from t2i_experts.evaluation.features import FeatureOptions, OpenCLIPFeatures, exact_convolutions, open_towers


class CLIPScore:
    """100 cos(picture, caption) of each picture, or 100 max(cos, 0) if clamped; a metric of `metrics.py`.

    Float32 without TF32 in convolutions. A caption that is longer than the network reads loses its end, as open_clip cuts it.
    """

    options: Sequence[str] = ("model", "weights", "clamp", "prefix")

    def __init__(
        self, model: str, weights: str | None = None, *, clamp: bool = False, prefix: str = "", device: torch.device | str = "cpu"
    ) -> None:
        """Loads the network that `open_towers` finds. prefix: stands before every caption, as it is. Raises ValueError."""
        towers = open_towers(model, weights)
        if not isinstance(towers.text, (CLIP, CustomTextCLIP)):
            raise ValueError(f"model={model!r} is a {type(towers.text).__name__}; a CLIP score needs a CLIP: two towers and nothing else")
        self.clamp, self.prefix = clamp, prefix
        self._images = OpenCLIPFeatures(towers, FeatureOptions(model=model, weights=weights), device)
        self._text: Any = freeze(towers.text, device, torch.float32)
        self._tokenizer = _tokenizer(towers, model)
        self.context: int = self._tokenizer.context_length
        made = self._images.record
        self.record: Mapping[str, Any] = {
            "name": "CLIP score",
            "metric": "clip",
            "model": model,
            "weights": weights,
            "sha256": made["sha256"],
            "text_sha256": fingerprint(self._text),
            "resize": made["resize"],
            "size": made["size"],
            "context": self.context,
            "clamp": clamp,
            "prefix": prefix,
            "scale": 100,
        }

    @classmethod
    def load(cls, options: Mapping[str, str], device: torch.device) -> CLIPScore:
        """The metric with its options as words: clamp is `true` or `false`. Raises ValueError."""
        if "model" not in options:
            raise ValueError("the metric clip needs model: embedded:clip, a folder, hf-hub:ID, or an architecture with weights=TAG")
        clamp = options.get("clamp", "false")
        if clamp not in ("true", "false"):
            raise ValueError(f"clamp={clamp!r} must be true or false")
        return cls(options["model"], options.get("weights"), clamp=clamp == "true", prefix=options.get("prefix", ""), device=device)

    def prepare(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 to the tower's normalised (B, 3, size, size) float32."""
        return self._images.prepare(images)

    def values(self, prepared: Tensor, captions: Sequence[str]) -> Tensor:
        """What `prepare` gave, and B captions, to (B,) float32 in [-100, 100], or in [0, 100] if clamped."""
        device = device_of(self._text)
        with frozen_forward(device), exact_convolutions():
            ids = to_device(self._tokenizer([self.prefix + caption for caption in captions]), device)
            text: Tensor = self._text.encode_text(ids).float()
        cosines = (normalize(self._images.encode(prepared), dim=-1) * normalize(text, dim=-1)).sum(-1)
        return 100 * (cosines.clamp_min(0) if self.clamp else cosines)

    def cut(self, captions: Sequence[str]) -> list[int]:
        """Tokens at the end of each caption, its prefix before it, that do not fit into the text tower's context."""
        return [max(0, _length(self._tokenizer, self.prefix + caption) - self.context) for caption in captions]


def _tokenizer(towers: Towers, model: str) -> SimpleTokenizer | HFTokenizer:
    """The network's own. Raises ValueError if it is not to be had."""
    name = model if towers.source is None else f"local-dir:{towers.source}"
    text = towers.model_config["text_cfg"]
    merges = (text.get("tokenizer_kwargs") or {}).get("bpe_path")
    own = {"bpe_path": str(towers.source / merges)} if merges and towers.source is not None else {}
    try:
        tokenizer: SimpleTokenizer | HFTokenizer = open_clip.get_tokenizer(name, **own)
    except (RuntimeError, OSError, EOFError, ValueError, ImportError) as error:
        raise ValueError(f"model={model!r}: its tokeniser cannot be loaded by open_clip: {error}") from error
    if isinstance(tokenizer, SimpleTokenizer) and tokenizer.vocab_size != text["vocab_size"]:
        raise ValueError(f"model={model!r}: its text tower knows {text['vocab_size']} tokens, and its tokeniser {tokenizer.vocab_size}")
    return tokenizer


def _length(tokenizer: Any, text: str) -> int:
    """Tokens of a text that nobody cuts, with those that stand at its start and end."""
    if isinstance(tokenizer, SimpleTokenizer):
        return len(tokenizer.encode(text)) + 2
    own = tokenizer.tokenizer_mode == "clips"  # open_clip itself then adds a start, an end and a class token
    ids = tokenizer.tokenizer(tokenizer.clean_fn(text), add_special_tokens=not own, truncation=False, verbose=False).input_ids
    return len(ids) + 3 * own
