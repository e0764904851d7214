"""All encoders of a stage together: prompts and style images in, `Conditioning` out.

eDiff-I (arXiv 2211.01324, section 4): several frozen encoders, each of which is dropped by itself in training, so that each can be
left out when sampling. A dropped encoder is one valid token of zeros, and a blank prompt is dropped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from t2i_experts.conditioning.frozen import device_of, local_folder, to_device
from t2i_experts.conditioning.frozen import fingerprint as weights_fingerprint
from t2i_experts.config import EncoderConfig
from t2i_experts.registry import registry
from t2i_experts.types import Conditioning, Embedding, FeatureBatch, Tokens

TextInput = Tokens | FeatureBatch
"""What a text encoder takes: the tokens of its own tokeniser, or features that it has computed before."""


class Tokenizer(Protocol):
    """The part of a text encoder that runs beside the data loader: picklable, without weights.

    One that can tell has `unknown(prompt) -> str` too, the characters of a prompt that its vocabulary lacks: `generate` warns of them.
    """

    max_tokens: int

    def tokenize(self, prompts: Sequence[str]) -> Tokens: ...

    def count(self, prompt: str) -> int:
        """Tokens that a prompt has before it is cut to `max_tokens`, special ones included."""
        ...


class Encoder(Protocol):
    """One frozen encoder, registered under `encoder` by its kind.

    reads: what `encode` takes: `Tokens` of its own `tokenizer`, or images (B, 3, H, W) float in [-1, 1] (and `tokenizer` is None).
    A class that reads text has, besides `load`, `load_tokenizer(config, root)`, which returns the tokeniser without reading weights.
    max_tokens: L of its embeddings; 1 for images. width, pooled_width: D and P (0: no pooled vector).
    model: its weights, frozen; `encode` runs where they are and returns float32, and its padding follows the real tokens.
    """

    kind: str
    reads: Literal["text", "image"]
    tokenizer: Any
    max_tokens: int
    width: int
    pooled_width: int
    model: nn.Module

    @classmethod
    def load(cls, config: EncoderConfig, root: Path | None, device: torch.device | str, shared: dict[Any, Any] | None = None) -> Encoder:
        """The encoder that `config` names; `shared` lives while the encoders of one stage load, so that each file is read once."""
        ...

    def encode(self, inputs: Any) -> Embedding: ...

    def save(self, folder: Path, earlier: Path | None = None) -> None:
        """Writes what `load` needs; called only for encoders whose `config.model` is a local folder. earlier: see `copy_file`."""
        ...


@dataclass(frozen=True)
class PromptTokenizer:
    """The tokenisers of all text encoders, by encoder name. Picklable, for the workers of a data loader."""

    tokenizers: Mapping[str, Tokenizer]

    @classmethod
    def from_config(cls, encoders: Mapping[str, EncoderConfig], *, root: Path | None = None) -> PromptTokenizer:
        """Loads the tokenisers of the encoders that read text, and no weights. Raises ValueError as `TextConditioner.from_config`."""
        loaded: dict[str, Tokenizer] = {}
        for name, config in encoders.items():
            try:
                kind = registry.get("encoder", config.kind)
                if kind.reads == "text":
                    loaded[name] = kind.load_tokenizer(config, root)
            except ValueError as error:
                raise ValueError(f"encoders.{name}: {error}") from error
        return cls(loaded)

    def __call__(self, prompts: Sequence[str]) -> dict[str, Tokens]:
        """Tokens of B prompts for each text encoder, on the CPU."""
        return {name: tokenizer.tokenize(prompts) for name, tokenizer in self.tokenizers.items()}


class TextConditioner:
    """The frozen encoders of a stage, by name.

    encoders: loaded. configs: what they were loaded from; widths are checked against them.
    """

    def __init__(
        self,
        encoders: Mapping[str, Encoder],
        configs: Mapping[str, EncoderConfig],
        root: Path | None = None,
        fingerprints: Mapping[str, str] | None = None,
    ) -> None:
        """fingerprints: those that are known already. Raises ValueError for an encoder whose widths are not the configured ones."""
        for name, encoder in encoders.items():
            for field in ("width", "pooled_width"):
                found, configured = getattr(encoder, field), getattr(configs[name], field)
                if found != configured:
                    raise ValueError(f"encoders.{name}.{field}={configured}, but {configs[name].model!r} has {found}")
        self.encoders = dict(encoders)
        self._configs = dict(configs)
        self._root = root
        self._fingerprints = dict(fingerprints or {})

    @classmethod
    def from_config(
        cls, encoders: Mapping[str, EncoderConfig], *, root: Path | None = None, device: torch.device | str = "cpu"
    ) -> TextConditioner:
        """Loads the encoders. Relative folders are looked for in `root`, a model folder, and then in the working directory.

        Raises ValueError naming the encoder if its kind is unknown, its model cannot be loaded, or a width is not the configured one.
        """
        shared: dict[Any, Any] = {}
        loaded: dict[str, Encoder] = {}
        for name, config in encoders.items():
            try:
                loaded[name] = registry.get("encoder", config.kind).load(config, root, device, shared)
            except ValueError as error:
                raise ValueError(f"encoders.{name}: {error}") from error
            except SafetensorError as error:
                place = local_folder(config.model, root) or config.model
                raise ValueError(f"encoders.{name}: the weights in {place} are damaged ({error}); fetch or copy them again") from error
        return cls(loaded, encoders, root)

    @property
    def names(self) -> list[str]:
        """Names of the encoders, in the order of the config."""
        return list(self.encoders)

    @property
    def tokenizer(self) -> PromptTokenizer:
        """The tokenisers of the text encoders, to be sent to loader workers."""
        return PromptTokenizer({name: e.tokenizer for name, e in self.encoders.items() if e.reads == "text"})

    def __call__(self, prompts: Sequence[str], images: Tensor | None = None) -> Conditioning:
        """Conditioning of B prompts and their B style images, (B, 3, H, W) float in [-1, 1]; without images, those encoders are null."""
        if images is not None and len(images) != len(prompts):
            raise ValueError(f"images: {len(images)} of them for {len(prompts)} prompts; allowed: one for each prompt, or none")
        return self._encode(self.tokenizer(prompts), images, {}, len(prompts))

    def encode(
        self, tokens: Mapping[str, TextInput], images: Tensor | None = None, drops: Mapping[str, Tensor] | None = None
    ) -> Conditioning:
        """Conditioning of a batch that a loader has tokenised, or whose stored features it has read.

        tokens: `tokenizer`'s, for every text encoder; stored features for a `StoredTextEncoder`.
        images: (B, 3, H, W) float in [-1, 1], or None: image encoders are null.
        drops: (B,) bool by encoder name, True = dropped; best on the CPU. Rows that are dropped or blank are never computed.
        Raises ValueError for missing tokens, unknown names and sizes that differ.
        """
        rows = {len(t.blank) for t in tokens.values()} | ({len(images)} if images is not None else set())
        if len(rows) != 1:
            raise ValueError(f"tokens and images must have one batch size; received {sorted(rows)}")
        return self._encode(tokens, images, drops or {}, rows.pop())

    def null(self, batch: int = 1) -> Conditioning:
        """The conditioning that says nothing: for each encoder one valid token of zeros, and a pooled vector of zeros."""
        return Conditioning({name: _null(encoder, batch, 1) for name, encoder in self.encoders.items()})

    def fingerprint(self, name: str) -> str:
        """sha256 of the weights of one encoder as it is loaded, for provenance; computed once."""
        if name not in self._fingerprints:
            self._fingerprints[name] = weights_fingerprint(self.encoders[name].model)
        return self._fingerprints[name]

    def save(self, folder: Path, earlier: Path | None = None) -> dict[str, EncoderConfig]:
        """Writes the encoders that came from local folders or with this package into subfolders (t5, clip) of a model folder.

        earlier: a model folder that this one takes the place of; what has not changed since is linked and not copied.
        Returns the configs to store in it: these name the subfolders (./t5), and those of public weights stay as they were.
        """
        configs: dict[str, EncoderConfig] = {}
        written: dict[Path, str] = {}
        for name, config in self._configs.items():
            source = local_folder(config.model, self._root)
            if source is not None and source not in written:
                subfolder = config.kind.removesuffix("_text").removesuffix("_image")
                taken = {*written.values(), *(other for other in self._configs if other != name)}
                written[source] = name if subfolder in taken else subfolder
                self.encoders[name].save(folder / written[source], earlier and earlier / written[source])
            configs[name] = config if source is None else replace(config, model=f"./{written[source]}")
        return configs

    def _encode(self, tokens: Mapping[str, TextInput], images: Tensor | None, drops: Mapping[str, Tensor], batch: int) -> Conditioning:
        if images is not None and (images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point()):
            raise ValueError(f"images are {images.dtype} of shape {tuple(images.shape)}; they must be float of shape (B, 3, H, W)")
        unknown = (set(drops) | set(tokens)) - set(self.encoders)
        if unknown:
            raise ValueError(f"no encoders are named {sorted(unknown)}; this conditioner has {self.names}")
        embeddings: dict[str, Embedding] = {}
        for name, encoder in self.encoders.items():
            drop = drops[name].cpu() if name in drops else torch.zeros(batch, dtype=torch.bool)
            if drop.shape != (batch,) or drop.dtype != torch.bool:
                raise ValueError(f"drops[{name!r}] is {drop.dtype} of shape {tuple(drop.shape)}; it must be bool of shape ({batch},)")
            if encoder.reads == "image":
                null = drop if images is not None else torch.ones_like(drop)
                embeddings[name] = _scattered(encoder, ~null, images)
            elif name in tokens:
                embeddings[name] = _scattered(encoder, ~(drop | tokens[name].blank), tokens[name])
            else:
                raise ValueError(f"tokens of the text encoder {name!r} are missing; received {sorted(tokens)}")
        return Conditioning(embeddings)


def _null(encoder: Encoder, batch: int, length: int) -> Embedding:
    """`batch` rows of `length` tokens that this encoder says nothing in."""
    return Embedding.null(batch, length, encoder.width, encoder.pooled_width, device=device_of(encoder.model))


def _scattered(encoder: Encoder, kept: Tensor, inputs: TextInput | Tensor | None) -> Embedding:
    """The embedding of a batch of which only the rows `kept` (B,) bool are encoded; the others are null."""
    result = _null(encoder, len(kept), encoder.max_tokens)
    rows = kept.nonzero().flatten()
    if inputs is None or len(rows) == 0:
        return result
    if len(rows) == len(kept):
        return encoder.encode(inputs)
    chosen = inputs[to_device(rows, inputs.device)] if isinstance(inputs, Tensor) else inputs.rows(rows)
    encoded = encoder.encode(chosen)
    rows = to_device(rows, result.mask.device)
    result.tokens[rows] = encoded.tokens
    result.mask[rows] = encoded.mask
    if result.pooled is not None and encoded.pooled is not None:
        result.pooled[rows] = encoded.pooled
    return result
