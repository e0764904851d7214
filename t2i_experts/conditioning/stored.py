"""Text embeddings that are computed once: made with the encoders, and then read instead of running them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from t2i_experts.conditioning.conditioner import Encoder, TextConditioner
from t2i_experts.conditioning.frozen import device_of, to_device
from t2i_experts.config import EncoderConfig
from t2i_experts.registry import registry
from t2i_experts.types import Embedding, FeatureBatch, TextFeatures


def text_encoders(encoders: Mapping[str, EncoderConfig]) -> dict[str, EncoderConfig]:
    """Those that read text. Raises ValueError for an unknown kind."""
    return {name: config for name, config in encoders.items() if registry.get("encoder", config.kind).reads == "text"}


def text_features(conditioner: TextConditioner, captions: Sequence[str], batch_size: int) -> dict[str, list[TextFeatures]]:
    """What each text encoder says of each caption, on the CPU: at its true length, in bfloat16; length 0 for a blank caption.

    Captions of like lengths are encoded together, `batch_size` at a time, so that little padding is computed.
    Raises ValueError for an encoder whose padding does not follow its real tokens: no true length would say which these are.
    """
    found: dict[str, list[TextFeatures]] = {}
    for name, tokens in conditioner.tokenizer(captions).items():
        encoder = conditioner.encoders[name]
        pooled = torch.zeros(encoder.pooled_width, dtype=torch.bfloat16) if encoder.pooled_width else None
        blank = TextFeatures(torch.zeros(0, encoder.width, dtype=torch.bfloat16), pooled)
        features = [blank] * len(captions)
        order = tokens.mask.sum(dim=1).argsort(stable=True)
        for rows in order[~tokens.blank[order]].split(batch_size):
            for row, feature in zip(rows.tolist(), _rows(name, encoder.encode(tokens.rows(rows))), strict=True):
                features[row] = feature
        found[name] = features
    return found


def _rows(name: str, embedding: Embedding) -> list[TextFeatures]:
    """The rows of an embedding at their true lengths."""
    mask = embedding.mask.cpu()
    lengths = mask.sum(dim=1)
    if not torch.equal(mask, torch.arange(mask.shape[1]) < lengths[:, None]):
        raise ValueError(f"encoders.{name}: its padding does not follow its real tokens, and such embeddings cannot be stored")
    tokens = embedding.tokens[:, : int(lengths.max())].bfloat16().cpu()
    pooled = [None] * len(tokens) if embedding.pooled is None else list(embedding.pooled.bfloat16().cpu())
    return [TextFeatures(row[:length], vector) for row, length, vector in zip(tokens, lengths.tolist(), pooled, strict=True)]


class RememberedCaptions:
    """Stands where a tokeniser does: gives the features of captions that were encoded before, and of no others. Picklable."""

    def __init__(self, features: Mapping[str, TextFeatures], max_tokens: int) -> None:
        self._features = dict(features)
        self.max_tokens = max_tokens

    def tokenize(self, prompts: Sequence[str]) -> FeatureBatch:
        """Raises ValueError for a caption that is not remembered."""
        unknown = [prompt for prompt in prompts if prompt not in self._features]
        if unknown:
            raise ValueError(f"no text encoder is loaded, and the embeddings of {unknown[0]!r} are not at hand")
        return FeatureBatch.of([self._features[prompt] for prompt in prompts])


class StoredTextEncoder:
    """Stands where a text encoder does, and computes nothing: its input are features that are stored. An `Encoder` without weights.

    What it gives is what the encoder itself would give, rounded to bfloat16.
    """

    reads: Literal["text", "image"] = "text"

    def __init__(
        self,
        config: EncoderConfig,
        device: torch.device | str,
        remembered: Mapping[str, TextFeatures] | None = None,
        encoder: Encoder | None = None,
    ) -> None:
        """device: where its embeddings are to be. remembered: of captions that are no samples'. encoder: the true one, for `save`; its
        weights are let go of."""
        self.kind = config.kind
        self.width, self.pooled_width, self.max_tokens = config.width, config.pooled_width, config.max_tokens
        self.tokenizer: Any = RememberedCaptions(remembered or {}, config.max_tokens)
        self.model: nn.Module = nn.ParameterList([torch.empty(0, device=device)]).requires_grad_(False)  # says where, as weights would
        self._encoder = encoder
        if encoder is not None:
            encoder.model.to("meta")

    @classmethod
    def load(cls, config: EncoderConfig, root: Path | None, device: torch.device | str, shared: dict[Any, Any] | None = None) -> Encoder:
        """Loads nothing."""
        return cls(config, device)

    def encode(self, features: FeatureBatch) -> Embedding:
        """The embedding of captions that say something, padded to `max_tokens`, so that shapes never change."""
        device, batch = device_of(self.model), len(features.lengths)
        mask = torch.arange(self.max_tokens) < features.lengths[:, None]  # (B, L)
        places = to_device(mask.flatten().nonzero().flatten(), device)  # found on the CPU, which then need not wait for the device
        tokens = torch.zeros(batch * self.max_tokens, self.width, device=device)
        tokens[places] = to_device(features.tokens, device).float()
        pooled: Tensor | None = None if features.pooled is None else to_device(features.pooled, device).float()
        return Embedding(tokens.view(batch, self.max_tokens, self.width), to_device(mask, device), pooled)

    def save(self, folder: Path, earlier: Path | None = None) -> None:
        """Writes the files of the true encoder."""
        assert self._encoder is not None, "the process that saves knows the encoder"
        self._encoder.save(folder, earlier)
