"""CLIP's two towers (Radford et al., arXiv 2103.00020; eDiff-I uses ViT-L/14), through open_clip.

The text tower gives a sequence (last layer, after its final LayerNorm, as in Stable Diffusion) and a pooled vector; the image tower
gives one vector, eDiff-I's style reference. Pooled vectors are raw, as `encode_text` and `encode_image` return them: the elements of a
unit vector of 768 would be about 0.036, far below the LayerNormed tokens beside it, while raw ViT-L/14 image features
have norms near 20 and elements near 0.7.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import open_clip
import torch
from open_clip.model import CLIP, CustomTextCLIP
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor, nn
from torch.nn.functional import interpolate

from t2i_experts.conditioning.frozen import copy_file, device_of, dtype_named, freeze, frozen_forward, local_folder, to_device
from t2i_experts.conditioning.spans import cleaned_spans, covering
from t2i_experts.config import EncoderConfig
from t2i_experts.types import Embedding, Span, Tokens

CONFIG = "open_clip_config.json"
WEIGHTS = "open_clip_model.safetensors"
HUB = "hf-hub:"
_NOT_CLIP = "encoder model {!r}: only CLIP's causal text tower with byte-pair encoding is supported; clip_image works"


class CLIPTokenizer:
    """Prompts to the ids of open_clip's own tokeniser, with the characters that each token covers. Picklable; holds no weights.

    Tokens that are parts of one character all cover it. A typed `<end_of_text>` becomes the special id, as open_clip has it, and
    covers its own characters.
    """

    def __init__(self, tokenizer: SimpleTokenizer, max_tokens: int) -> None:
        if max_tokens < 2:
            raise ValueError(f"max_tokens={max_tokens} must be at least 2, for the start and the end of the text")
        self.bpe = tokenizer
        self.max_tokens = max_tokens

    def tokenize(self, prompts: Sequence[str]) -> Tokens:
        """Tokens padded to `max_tokens` with id 0; real are the start token, the text, and the end token, always present."""
        ids = np.zeros((len(prompts), self.max_tokens), np.int64)
        mask = np.zeros((len(prompts), self.max_tokens), np.bool_)
        spans: list[tuple[Span, ...]] = []
        truncated: list[int | None] = []
        for row, prompt in enumerate(prompts):
            text_ids, text_spans = self._encode(prompt)
            room = self.max_tokens - 2
            truncated.append(text_spans[room][0] if len(text_spans) > room else None)
            row_ids = [self.bpe.sot_token_id, *text_ids[:room], self.bpe.eot_token_id]
            end = text_spans[:room][-1][1] if text_spans[:room] else 0
            spans.append(((0, 0), *text_spans[:room], (end, end)))
            ids[row, : len(row_ids)] = row_ids
            mask[row, : len(row_ids)] = True
        return Tokens.covering(torch.from_numpy(ids), torch.from_numpy(mask), spans, truncated)

    def count(self, prompt: str) -> int:
        """Tokens that a prompt has before it is cut, its start and end tokens included."""
        return len(self.bpe.encode(prompt)) + 2

    def _encode(self, prompt: str) -> tuple[list[int], list[Span]]:
        """All ids of a prompt, without start and end, and the characters of the prompt that each stands for."""
        cleaned: str = self.bpe.clean_fn(prompt)
        if prompt.isascii() and prompt.isprintable() and cleaned == prompt.lower():
            return self._encode_plain(cleaned)
        characters = cleaned_spans(prompt, cleaned)
        ids: list[int] = []
        spans: list[Span] = []
        for word in self.bpe.pat.finditer(cleaned):
            data = word.group().encode("utf-8")
            # Position in the cleaned text of the character to which each byte of the word belongs.
            origin = [word.start() + i for i, c in enumerate(word.group()) for _ in c.encode("utf-8")]
            at = 0
            for piece in self.bpe.bpe("".join(self.bpe.byte_encoder[byte] for byte in data)).split(" "):
                length = len(piece.removesuffix("</w>"))
                ids.append(self.bpe.encoder[piece])
                spans.append(covering(characters[origin[at] : origin[at + length - 1] + 1]))
                at += length
        return ids, spans

    def _encode_plain(self, text: str) -> tuple[list[int], list[Span]]:
        """`_encode` of what most captions are: each character is one byte, and stands for itself."""
        ids: list[int] = []
        spans: list[Span] = []
        for word in self.bpe.pat.finditer(text):
            at = word.start()
            for piece in self.bpe.bpe(word.group()).split(" "):
                end = at + len(piece.removesuffix("</w>"))
                ids.append(self.bpe.encoder[piece])
                spans.append((at, end))
                at = end
        return ids, spans


@dataclass(frozen=True)
class Towers:
    """One loaded open_clip network, taken apart: a tower that no encoder takes is freed with this.

    text: the network without its image tower. image: the image tower. model_config: open_clip's `model_cfg`.
    preprocess: open_clip's size, mean, std, resize_mode and interpolation of the images. source: the local folder, or None for public
    weights.
    """

    text: Any
    image: nn.Module
    model_config: dict[str, Any]
    preprocess: dict[str, Any]
    source: Path | None

    @classmethod
    def load(cls, config: EncoderConfig, root: Path | None, shared: dict[Any, Any] | None) -> Towers:
        """Reads the network that `config` names, in float32 on the CPU, or takes it from `shared` if another encoder has read it.

        Raises ValueError if it does not exist, is incomplete, or if `pretrained` is missing or does not apply.
        """
        folder = local_folder(config.model, root)
        key = ("open_clip", str(folder or config.model), config.pretrained)
        if shared is not None and key in shared:
            towers: Towers = shared[key]
            return towers
        name = config.model if folder is None else f"local-dir:{folder}"
        is_architecture = folder is None and not name.startswith(HUB)
        if is_architecture and config.pretrained is None:
            raise ValueError(
                f"encoder model {name!r} is an open_clip architecture and needs `pretrained`, the tag of its weights, such as openai; "
                "if it is meant to be a folder, there is none of that name"
            )
        if not is_architecture and config.pretrained is not None:
            raise ValueError(f"encoder model {config.model!r} brings its own weights: leave out pretrained={config.pretrained!r}")
        lacking = [file for file in (CONFIG, WEIGHTS) if folder is not None and not (folder / file).is_file()]
        if lacking:
            raise ValueError(f"encoder model {config.model!r}: {folder} lacks {' and '.join(lacking)}")
        # OpenAI's weights want QuickGELU; open_clip only warns if the architecture's name does not say so.
        tag = open_clip.get_pretrained_cfg(name, config.pretrained) if config.pretrained else {}
        try:
            model: Any = open_clip.create_model(
                name, config.pretrained, force_quick_gelu=bool(tag.get("quick_gelu")), require_pretrained=True
            )
            model_config = open_clip.get_model_config(name)
        except (RuntimeError, OSError, ValueError) as error:
            raise ValueError(f"encoder model {config.model!r} cannot be loaded by open_clip: {error}") from error
        image, preprocess = model.visual, open_clip.get_model_preprocess_cfg(model)
        model.visual = nn.Identity()
        towers = cls(model, image, model_config, preprocess, folder)
        if shared is not None:
            shared[key] = towers
        return towers


def _save(source: Path | None, folder: Path, earlier: Path | None) -> None:
    """Copies an open_clip folder: both towers, in the dtype that they have. Raises ValueError if there is no source folder."""
    if source is None:
        raise ValueError("only a CLIP that was loaded from a local folder is saved; refer to the others by name")
    folder.mkdir(parents=True, exist_ok=True)
    merges = _merges_file(json.loads((source / CONFIG).read_text())["model_cfg"])
    for file in [CONFIG, WEIGHTS] + ([merges] if merges else []):
        copy_file(source / file, folder / file, earlier and earlier / file)


def _merges_file(model_config: dict[str, Any]) -> str | None:
    """The file name of the model's own byte-pair merges, or None for CLIP's public ones."""
    name = (model_config["text_cfg"].get("tokenizer_kwargs") or {}).get("bpe_path")
    return None if name is None else str(name)


def _tokenizer(model_config: dict[str, Any], folder: Path | None, model: str) -> SimpleTokenizer:
    """The tokeniser of the text tower. Raises ValueError if it is not CLIP's, or not the one the network was trained with."""
    text_config = model_config["text_cfg"]
    unknown = set(text_config.get("tokenizer_kwargs") or {}) - {"bpe_path"}
    if text_config.get("hf_tokenizer_name") or text_config.get("embed_cls") or unknown or text_config.get("no_causal_mask"):
        raise ValueError(_NOT_CLIP.format(model))
    merges = _merges_file(model_config)
    if merges is not None and folder is None:
        raise ValueError(f"encoder model {model!r}: its own merges file {merges!r} is read from a local folder only; download the model")
    try:
        tokenizer = SimpleTokenizer() if merges is None else SimpleTokenizer(bpe_path=str(Path(str(folder)) / merges))
    except (OSError, EOFError) as error:
        raise ValueError(f"encoder model {model!r}: its merges file {merges} cannot be read: {error}") from error
    if tokenizer.vocab_size != text_config["vocab_size"]:
        raise ValueError(
            f"encoder model {model!r}: vocab_size={text_config['vocab_size']}, but its tokeniser has {tokenizer.vocab_size} tokens"
        )
    return tokenizer


class CLIPTextEncoder:
    """A frozen CLIP text tower: tokens (B, L, width), zero after the end token, and pooled (B, P); float32.

    Its attention is causal, so that no real token ever attends to padding.
    """

    kind = "clip_text"
    reads: Literal["text"] = "text"

    def __init__(self, towers: Towers, tokenizer: CLIPTokenizer) -> None:
        self.model = towers.text
        self.tokenizer = tokenizer
        self.max_tokens = tokenizer.max_tokens
        self.width: int = towers.model_config["text_cfg"].get("width", 512)
        self.pooled_width: int = towers.model_config["embed_dim"]
        self._context: int = towers.model_config["text_cfg"].get("context_length", 77)
        self._source = towers.source
        if self.max_tokens > self._context:
            raise ValueError(f"max_tokens={self.max_tokens} is more than the {self._context} positions of this CLIP text tower")

    @classmethod
    def load_tokenizer(cls, config: EncoderConfig, root: Path | None) -> CLIPTokenizer:
        """The tokeniser alone, from the model's config and without its weights. Raises ValueError if there is no such model."""
        folder = local_folder(config.model, root)
        try:
            model_config = open_clip.get_model_config(config.model if folder is None else f"local-dir:{folder}")
        except (RuntimeError, OSError, ValueError) as error:
            raise ValueError(f"encoder model {config.model!r} cannot be loaded by open_clip: {error}") from error
        if model_config is None:
            raise ValueError(f"encoder model {config.model!r} is neither a folder nor an architecture that open_clip knows")
        return CLIPTokenizer(_tokenizer(model_config, folder, config.model), config.max_tokens)

    @classmethod
    def load(
        cls, config: EncoderConfig, root: Path | None, device: torch.device | str, shared: dict[Any, Any] | None = None
    ) -> CLIPTextEncoder:
        """Reads `config.model`: a local open_clip folder, an architecture with its `pretrained` tag, or an `hf-hub:` id.

        A local folder may name its own merges file in text_cfg.tokenizer_kwargs.bpe_path, relative to itself.
        """
        towers = Towers.load(config, root, shared)
        if not isinstance(towers.text, (CLIP, CustomTextCLIP)):
            raise ValueError(_NOT_CLIP.format(config.model))
        encoder = cls(towers, CLIPTokenizer(_tokenizer(towers.model_config, towers.source, config.model), config.max_tokens))
        freeze(encoder.model, device, dtype_named(config.dtype, config.model))
        return encoder

    def encode(self, tokens: Tokens) -> Embedding:
        """Features of every token, and the projected feature of the end token."""
        device = device_of(self.model)
        mask = to_device(tokens.mask, device)
        length = mask.shape[1]
        ids = nn.functional.pad(to_device(tokens.ids, device), (0, self._context - length))
        with frozen_forward(device):
            output = self.model.forward_intermediates(text=ids, text_indices=1, normalize=False, normalize_intermediates=True)
            hidden: Tensor = output["text_intermediates"][-1][:, :length].float()
        return Embedding(hidden.masked_fill(~mask[..., None], 0.0), mask, output["text_features"].float())

    def save(self, folder: Path, earlier: Path | None = None) -> None:
        """Copies the folder that this was loaded from. Raises ValueError if there is none."""
        _save(self._source, folder, earlier)


class CLIPImageEncoder:
    """A frozen CLIP image tower: one vector an image, as one token (B, 1, P) and as the pooled vector (B, P); float32."""

    kind = "clip_image"
    reads: Literal["image"] = "image"
    tokenizer = None
    max_tokens = 1

    def __init__(self, towers: Towers) -> None:
        self.model = towers.image
        self.width: int = towers.model_config["embed_dim"]
        self.pooled_width = self.width
        size = towers.preprocess["size"]
        self.size: int = size if isinstance(size, int) else size[0]
        resize_mode = towers.preprocess.get("resize_mode") or "shortest"
        if resize_mode not in ("shortest", "squash"):
            raise ValueError(f"this image tower wants its pictures resized by resize_mode={resize_mode!r}; allowed: shortest, squash")
        self._squash = resize_mode == "squash"
        self._filter = "bilinear" if towers.preprocess.get("interpolation") == "bilinear" else "bicubic"
        self._mean = torch.tensor(towers.preprocess["mean"])[:, None, None]
        self._std = torch.tensor(towers.preprocess["std"])[:, None, None]
        self._source = towers.source

    @classmethod
    def load(
        cls, config: EncoderConfig, root: Path | None, device: torch.device | str, shared: dict[Any, Any] | None = None
    ) -> CLIPImageEncoder:
        """Reads `config.model` as `CLIPTextEncoder.load` does; both towers of one model are read once through `shared`."""
        encoder = cls(Towers.load(config, root, shared))
        freeze(encoder.model, device, dtype_named(config.dtype, config.model))
        return encoder

    def encode(self, images: Tensor) -> Embedding:
        """Features of images: (B, 3, H, W) float in [-1, 1]."""
        device = device_of(self.model)
        with frozen_forward(device):
            pixels = self.preprocess(images.to(device)).to(next(self.model.parameters()).dtype)
            features: Tensor = self.model(pixels).float()
        return Embedding(features[:, None], torch.ones(len(images), 1, dtype=torch.bool, device=device), features)

    @property
    def resizing(self) -> str:
        """How pictures come to the tower's size, in words."""
        return f"{self._filter}, antialiased, {'both sides to the size' if self._squash else 'centre crop'}"

    def preprocess(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, 3, size, size), normalised, as open_clip's own transform, but not rounded to whole numbers.

        The shorter side comes to `size`, and what the longer one has more is cut off at both ends; or both sides come to `size`, where
        the tower was trained so.
        """
        height, width = images.shape[-2:]
        shorter = min(height, width)
        height, width = (self.size, self.size) if self._squash else (self.size * height // shorter, self.size * width // shorter)
        images = interpolate(images.float(), (height, width), mode=self._filter, antialias=True)
        top, left = round((height - self.size) / 2), round((width - self.size) / 2)
        images = images[..., top : top + self.size, left : left + self.size]
        if self._mean.device != images.device:  # once, since such a copy waits for the device
            self._mean, self._std = self._mean.to(images.device), self._std.to(images.device)
        return ((images + 1) / 2).clamp(0, 1).sub(self._mean).div(self._std)

    def save(self, folder: Path, earlier: Path | None = None) -> None:
        """Copies the folder that this was loaded from. Raises ValueError if there is none."""
        _save(self._source, folder, earlier)
