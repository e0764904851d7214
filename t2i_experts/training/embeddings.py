"""The encoders of a run: all of them at work, or with the text encoders' embeddings read from the shards instead."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from t2i_experts.conditioning.conditioner import Encoder, TextConditioner
from t2i_experts.conditioning.stored import StoredTextEncoder, text_encoders, text_features
from t2i_experts.config import EncoderConfig, RunConfig
from t2i_experts.shards.embeddings import refuse_other_encoders
from t2i_experts.shards.format import EncoderRecord
from t2i_experts.shards.reader import ShardReader

_REMEDY = "embed the shards again with `t2i-experts shards embed`, or train with data.embeddings=online"


def encoder_record(name: str, config: EncoderConfig, fingerprint: str) -> EncoderRecord:
    """What a manifest says of an encoder whose weights have this fingerprint."""
    return EncoderRecord(name, config.kind, config.model, config.dtype, fingerprint, config.max_tokens, config.width, config.pooled_width)


def stored_embeddings(config: RunConfig) -> tuple[str, ...]:
    """The encoders whose embeddings the run reads from its shards. Raises ValueError if it wants to, and no encoder reads text."""
    if config.data.embeddings == "online":
        return ()
    names = tuple(text_encoders(config.stage.encoders))
    if not names:
        raise ValueError("data.embeddings=stored: none of stage.encoders reads text; set it to online")
    return names


def open_conditioner(
    config: RunConfig, embeddings: Sequence[EncoderRecord], validation: ShardReader | None, *, device: torch.device, main_process: bool
) -> TextConditioner:
    """The encoders of `config` on `device`. With stored embeddings, which those records describe, only the image encoders.

    The main process then loads the text encoders too, once, into the host's memory, to see that the embeddings are theirs and to encode the
    prompts of the previews; it keeps what it needs to save them, but not their weights.

    Raises ValueError if an encoder cannot be loaded, and for embeddings of another one.
    """
    encoders = config.stage.encoders
    if config.data.embeddings == "online":
        return TextConditioner.from_config(encoders, device=device)
    where = f"data.train={config.data.train}"
    text, stored = text_encoders(encoders), {record.name: record for record in embeddings}
    like_stored = [encoder_record(name, text[name], stored[name].fingerprint) for name in text]
    refuse_other_encoders(where, embeddings, like_stored, _REMEDY)  # all but the weights, which take minutes to load
    if validation is not None:
        refuse_other_encoders(f"data.validation={config.data.validation}", validation.embeddings, embeddings, _REMEDY)
    images = TextConditioner.from_config({name: encoder for name, encoder in encoders.items() if name not in text}, device=device)
    stand_ins: dict[str, Encoder] = {name: StoredTextEncoder(text[name], device) for name in text}
    if main_process:
        loaded = TextConditioner.from_config(text)
        found = [replace(record, fingerprint=loaded.fingerprint(record.name)) for record in like_stored]
        refuse_other_encoders(where, embeddings, found, _REMEDY)
        prompts = config.training.preview.prompts
        features = text_features(loaded, prompts, batch_size=1) if prompts else {name: [] for name in text}
        for name, encoder in loaded.encoders.items():
            stand_ins[name] = StoredTextEncoder(text[name], device, dict(zip(prompts, features[name], strict=True)), encoder)
    ordered = {name: stand_ins[name] if name in text else images.encoders[name] for name in encoders}
    return TextConditioner(ordered, encoders, fingerprints={name: record.fingerprint for name, record in stored.items()})
