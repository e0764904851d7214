"""Pictures of fixed prompts at fixed seeds, so that training can be watched: loss curves lie, grids don't.

An expert alone draws no picture: beyond the noise that it is trained on it says nothing of worth. In its previews another model, which was
trained on all noise, answers there, so that what changes from one preview to the next is the expert's doing.
"""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

from t2i_experts.cascade.codec import latent_shape
from t2i_experts.cascade.model_folder import find_model, read_configs, read_denoiser
from t2i_experts.cascade.picture import contact_sheet, read_metadata, save_png, split_sheet, to_pil, to_uint8
from t2i_experts.cascade.pipeline import start_noise
from t2i_experts.cascade.stage import Stage
from t2i_experts.conditioning.conditioner import TextConditioner
from t2i_experts.config import PreviewConfig, RunConfig
from t2i_experts.config.expert_rules import whole
from t2i_experts.experts.ensemble import ExpertEnsemble
from t2i_experts.experts.interval import NoiseInterval
from t2i_experts.types import Denoiser


def draw_preview(stage: Stage, conditioner: TextConditioner, config: PreviewConfig, device: torch.device, path: Path) -> None:
    """Writes one contact sheet of the prompts; the PNG's metadata lists them. Prompt i starts from the noise of (seed 0, index i)."""
    sampling = stage.sampling.for_all(steps=config.steps, guidance=config.guidance)
    noise = torch.stack([start_noise(0, i, stage.noise_shape) for i in range(len(config.prompts))]).to(device)
    images = to_uint8(stage.sample(noise, conditioner(config.prompts), conditioner.null(), sampling))
    sheet = contact_sheet([to_pil(image) for image in images], columns=_columns(len(images)))
    save_png(sheet, path, {"prompts": list(config.prompts), "steps": config.steps, "guidance": config.guidance})


def model_around(config: RunConfig) -> str | None:
    """The model that answers in previews for the noise that the run's network is not trained on; None where it is trained on all."""
    return None if whole(config.stage.noise.quantiles) else config.training.preview.around or config.training.initial


def preview_denoiser(expert: Denoiser, config: RunConfig, device: torch.device) -> Denoiser:
    """What previews of a run are drawn with: its network, and around its interval the model that the config names for that.

    That model is read anew each time, and is in the device's memory only as long. Raises ValueError if it cannot be read.
    """
    around = model_around(config)
    if around is None:
        return expert
    others = read_denoiser(find_model(around), device)
    own = NoiseInterval.from_config(config.stage.noise)
    if not isinstance(others, ExpertEnsemble):
        others = ExpertEnsemble([(NoiseInterval(Fraction(0), Fraction(1), own.distribution), others)])
    return others.with_expert(own, expert)


def refuse_partial_preview(config: RunConfig) -> None:
    """Raises ValueError if previews are to be drawn, and the model for the noise around an expert does not know that noise either."""
    around, preview = model_around(config), config.training.preview
    if around is None or not preview.every_images:
        return
    key = "training.initial" if preview.around is None else "training.preview.around"
    try:
        stage, _, _ = read_configs(find_model(around))
        if not whole(stage.noise.quantiles):
            raise ValueError(f"it was trained on the quantiles {' to '.join(stage.noise.quantiles)} and draws no picture alone")
        if latent_shape(stage, (stage.size, stage.size)) != latent_shape(config.stage, (config.stage.size, config.stage.size)):
            raise ValueError(f"it is for pictures of {stage.size} px ({stage.codec.kind}), not of {config.stage.size} px")
        if stage.encoders.keys() != config.stage.encoders.keys():
            raise ValueError(f"it reads the encoders {', '.join(stage.encoders)}, not {', '.join(config.stage.encoders)}")
    except ValueError as error:
        raise ValueError(
            f"{key}={around!r}: {error}; previews need a model for the noise that this run is not trained on: name one in "
            "training.preview.around, or set training.preview.every_images=0"
        ) from error


def read_preview(path: Path) -> list[tuple[str, Any]]:
    """Each prompt with its picture (PIL), from a file that `draw_preview` wrote. Raises ValueError for any other file."""
    metadata = read_metadata(path)
    if metadata is None or not metadata.get("prompts"):
        raise ValueError(f"{path} names no prompts: it is not a preview")
    prompts = metadata["prompts"]
    return list(zip(prompts, split_sheet(path, len(prompts), _columns(len(prompts))), strict=True))


def _columns(pictures: int) -> int:
    """Of the sheet: it is about as wide as high."""
    return math.ceil(math.sqrt(pictures))
