"""Pictures of fixed prompts at fixed seeds, so that training can be watched: loss curves lie, grids don't."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from t2i_experts.cascade.picture import contact_sheet, read_metadata, save_png, split_sheet, to_pil, to_uint8
from t2i_experts.cascade.pipeline import start_noise
from t2i_experts.cascade.stage import Stage
from t2i_experts.conditioning.conditioner import TextConditioner
from t2i_experts.config import PreviewConfig


def draw_preview(stage: Stage, conditioner: TextConditioner, config: PreviewConfig, device: torch.device, path: Path) -> None:
    """Writes one contact sheet of the prompts; the PNG's metadata lists them. Prompt i starts from the noise of (seed 0, index i)."""
    sampling = stage.sampling.for_all(steps=config.steps, guidance=config.guidance)
    noise = torch.stack([start_noise(0, i, stage.noise_shape) for i in range(len(config.prompts))]).to(device)
    images = to_uint8(stage.sample(noise, conditioner(config.prompts), conditioner.null(), sampling))
    sheet = contact_sheet([to_pil(image) for image in images], columns=_columns(len(images)))
    save_png(sheet, path, {"prompts": list(config.prompts), "steps": config.steps, "guidance": config.guidance})


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
