"""Encoders without their weights, on torch's meta device: what memory they take can be computed before anything is downloaded."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad

from t2i_experts.conditioning.frozen import DTYPES, local_folder
from t2i_experts.conditioning.presence import cached
from t2i_experts.conditioning.t5 import additive
from t2i_experts.config import EncoderConfig
from t2i_experts.types import Embedding

T5_V1_1 = {
    "small": {"d_model": 512, "d_kv": 64, "d_ff": 1024, "num_layers": 8, "num_heads": 6},
    "base": {"d_model": 768, "d_kv": 64, "d_ff": 2048, "num_layers": 12, "num_heads": 12},
    "large": {"d_model": 1024, "d_kv": 64, "d_ff": 2816, "num_layers": 24, "num_heads": 16},
    "xl": {"d_model": 2048, "d_kv": 64, "d_ff": 5120, "num_layers": 24, "num_heads": 32},
    "xxl": {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64},
}
"""The public checkpoints google/t5-v1_1-SIZE, as their config.json files say."""


@dataclass(frozen=True)
class BlankEncoder:
    """model: on the meta device, in the dtype that it would be loaded in. encode(model, images): what it computes for a batch whose
    images are (B, 3, H, W), if every prompt is as long as may be."""

    model: nn.Module
    encode: Callable[[nn.Module, Tensor], Embedding]


def blank_encoder(config: EncoderConfig) -> BlankEncoder | None:
    """The encoder that `config` names without its weights; None if its architecture is not known here: it is a plugin's, or not there."""
    try:
        local_folder(config.model, None)
    except ValueError:
        return None
    with torch.device("meta"), _quiet():
        match config.kind:
            case "t5":
                model, encode = _t5(config), _encode_t5
            case "clip_text" | "clip_image":
                model, encode = _clip(config), _encode_text if config.kind == "clip_text" else _encode_image
            case _:
                return None
    if model is None:
        return None
    frozen = model.eval().requires_grad_(False).to(DTYPES[config.dtype])
    return BlankEncoder(frozen, lambda network, images: encode(network, images, config))


def _t5(config: EncoderConfig) -> nn.Module | None:
    from transformers import T5Config, T5EncoderModel

    folder = local_folder(config.model, None)
    file = cached(config.model, "config.json") if folder is None else folder / "config.json"
    size = config.model.removeprefix("google/t5-v1_1-")
    if file is not None and file.is_file():
        architecture = T5Config.from_pretrained(str(file))
    elif config.model.startswith("google/t5-v1_1-") and size in T5_V1_1:
        architecture = T5Config(**T5_V1_1[size], vocab_size=32128, feed_forward_proj="gated-gelu")
    else:
        return None
    network: nn.Module = T5EncoderModel(architecture)
    return network


def _encode_t5(model: Any, images: Tensor, config: EncoderConfig) -> Embedding:
    ids, mask = torch.zeros(len(images), config.max_tokens, dtype=torch.int64), torch.ones(len(images), config.max_tokens).bool()
    hidden: Tensor = model(input_ids=ids, attention_mask=additive(mask, model.dtype)).last_hidden_state
    hidden = hidden.float().masked_fill(~mask[:, :, None], 0.0)
    return Embedding(hidden, mask)


def _clip(config: EncoderConfig) -> nn.Module | None:
    """One tower: the text's without the image's, or the image's alone."""
    import open_clip

    folder = local_folder(config.model, None)
    name = config.model if folder is None else f"local-dir:{folder}"
    if folder is not None and not (folder / "open_clip_config.json").is_file():
        return None
    if name.startswith("hf-hub:") and cached(name.removeprefix("hf-hub:"), "open_clip_config.json") is None:
        return None
    if ":" not in name and open_clip.get_model_config(name) is None:
        return None
    model: Any = open_clip.create_model(name, device="meta", load_weights=False)
    image: nn.Module = model.visual
    model.visual = nn.Identity()
    text: nn.Module = model
    return text if config.kind == "clip_text" else image


def _encode_text(model: Any, images: Tensor, config: EncoderConfig) -> Embedding:
    ids = torch.zeros(len(images), config.max_tokens, dtype=torch.int64)
    mask = torch.ones(ids.shape).bool()
    ids = pad(ids, (0, model.context_length - config.max_tokens))
    output = model.forward_intermediates(text=ids, text_indices=1, normalize=False, normalize_intermediates=True)
    hidden: Tensor = output["text_intermediates"][-1][:, : config.max_tokens].float()
    return Embedding(hidden.masked_fill(~mask[..., None], 0.0), mask, output["text_features"].float())


def _encode_image(model: Any, images: Tensor, config: EncoderConfig) -> Embedding:
    pixels = interpolate(images.float(), tuple(model.image_size), mode="bicubic", antialias=True)
    pixels = ((pixels + 1) / 2).clamp(0, 1).sub(0.5).div(0.5).to(next(model.parameters()).dtype)
    features: Tensor = model(pixels).float()
    return Embedding(features[:, None], torch.ones(len(images), 1).bool(), features)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warning that weights are missing, which is the point."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
