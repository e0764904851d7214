"""Between tensors and picture files: PNGs that carry how they were made, contact sheets, reference pictures."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

METADATA_KEY = "t2i-experts"


def to_uint8(images: Tensor) -> Tensor:
    """(..., C, H, W) float in [-1, 1] to uint8 on the CPU: the one rounding that every picture goes through."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to("cpu", torch.uint8)


def from_uint8(images: Tensor) -> Tensor:
    """The inverse of `to_uint8`, on the same device: uint8 to float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_pil(image: Tensor) -> Image.Image:
    """(3, H, W) uint8 to a PIL image."""
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy(), "RGB")


def save_png(image: Image.Image, path: Path, metadata: Mapping[str, Any] | None = None) -> None:
    """Writes a PNG whose text chunk `t2i-experts` holds `metadata` as JSON; an existing file is replaced in one move."""
    info = PngImagePlugin.PngInfo()
    if metadata is not None:
        info.add_itxt(METADATA_KEY, json.dumps(metadata, ensure_ascii=False, sort_keys=True))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    image.save(temporary, format="PNG", pnginfo=info)
    temporary.replace(path)


def read_metadata(path: Path) -> dict[str, Any] | None:
    """The metadata that `save_png` wrote, or None if the file carries none."""
    with Image.open(path) as image:
        text = getattr(image, "text", {}).get(METADATA_KEY)
    return None if text is None else json.loads(text)


def read_image(path: Path) -> Tensor:
    """A picture file as (1, 3, H, W) float in [-1, 1], transparency over white. Raises ValueError if it cannot be read."""
    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image).convert("RGBA")
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot read the picture {path}: {error}") from error
    flat = Image.new("RGBA", upright.size, "white")
    flat.alpha_composite(upright)
    pixels = torch.frombuffer(bytearray(flat.convert("RGB").tobytes()), dtype=torch.uint8)
    return from_uint8(pixels.view(1, flat.height, flat.width, 3).permute(0, 3, 1, 2))


def contact_sheet(images: Sequence[Image.Image], columns: int, gap: int = 2) -> Image.Image:
    """Equally large pictures side by side, row by row, on white."""
    width, height = images[0].size
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for i, image in enumerate(images):
        sheet.paste(image, (i % columns * (width + gap), i // columns * (height + gap)))
    return sheet


def split_sheet(path: Path, count: int, columns: int, gap: int = 2) -> list[Image.Image]:
    """The inverse of `contact_sheet` for a file of `count` pictures. Raises ValueError if it cannot be read."""
    try:
        with Image.open(path) as image:
            sheet = image.convert("RGB")
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot read the picture {path}: {error}") from error
    width, height = (sheet.width + gap) // columns, (sheet.height + gap) // -(-count // columns)
    corners = [(i % columns * width, i // columns * height) for i in range(count)]
    return [sheet.crop((x, y, x + width - gap, y + height - gap)) for x, y in corners]
