"""Picture files: what is accepted, and how one is checked, shrunk and cut. Everything that touches Pillow is here."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image, UnidentifiedImageError

from t2i_experts.shards.jpeg import ordinary_size

MAX_PIXELS = 2**27
"""A larger picture is refused before it is decoded: a small file can claim any size (a decompression bomb)."""

STORED = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
"""Pillow's names of the formats that shards hold, with their extensions. MPO, a JPEG with further pictures behind it, is opened as JPEG."""

_READ = ("JPEG", "PNG", "WEBP")

CONVERTED = ("BMP", "GIF", "TIFF")
"""Formats that become PNG when shards are built."""

SOURCE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff")

_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = (_TURNS[5], _TURNS[6], _TURNS[7], _TURNS[8])


@contextmanager
def open_image(data: bytes, formats: tuple[str, ...] = _READ) -> Iterator[Image.Image]:
    """The picture in `data`, opened but not yet decoded. ValueError for whatever goes wrong with it, also inside the block."""
    try:
        with Image.open(io.BytesIO(data), formats=formats) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"it has {image.width}x{image.height} pixels; at most {MAX_PIXELS} in all are decoded")
            yield image
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise nearly everything on damaged data: OSError, SyntaxError, struct.error, ...
        reason = "it is no picture of a known format" if isinstance(error, UnidentifiedImageError) else str(error)
        raise ValueError(reason or type(error).__name__) from error


def image_size(data: bytes) -> tuple[int, int]:
    """(width, height) as stored, from the header alone. Raises ValueError."""
    with open_image(data) as image:
        return image.size


def verify(data: bytes) -> tuple[int, int]:
    """Decodes the picture, a JPEG at an eighth of its size, and returns its (width, height) as stored. Raises ValueError."""
    with open_image(data) as image:
        size = image.size
        image.draft(None, (1, 1))
        image.load()
        return size


def upright_size(data: bytes) -> tuple[int, int]:
    """(width, height) after the EXIF orientation, from what a file says before its pixels, so that its beginning may be enough.

    Raises ValueError.
    """
    with open_image(data) as image:
        width, height = image.size
        return (height, width) if _early_turn(image) in _SIDEWAYS else (width, height)


def square(data: bytes, size: int) -> Image.Image:
    """The centre square of the picture at size x size: `centre_crop` with equal sides."""
    return centre_crop(data, size, size)


def centre_crop(data: bytes, width: int, height: int) -> Image.Image:
    """The largest part in the picture's centre that has the shape of width x height, resized to that, RGB.

    Transparency is laid on white, the EXIF orientation is applied, colour profiles are not. The filter is Lanczos with
    antialiasing; a JPEG more than four times as large is first decoded at a half, quarter or eighth, never below twice the size wanted.
    A picture that has this size keeps its pixels. Raises ValueError for data that is no readable JPEG, PNG or WebP.
    """
    image = decode(data, width, height)
    return resize(image, width, height, centre_box(image.size, width, height))


def resize(image: Image.Image, width: int, height: int, box: tuple[float, float, float, float]) -> Image.Image:
    """What lies in a box (left, top, right, bottom) of a picture, at width x height; by Lanczos's filter."""
    return image.resize((width, height), Image.Resampling.LANCZOS, box=box)


def decode(data: bytes, width: int, height: int) -> Image.Image:
    """The whole picture, upright and RGB, a JPEG as small as `centre_crop` says. Raises ValueError."""
    ordinary = _decode_ordinary(data, width, height)
    if ordinary is not None:
        return ordinary
    with open_image(data) as image:
        _draft(image, *((height, width) if _early_turn(image) in _SIDEWAYS else (width, height)))
        image.load()
        turn = _turn(image)
        image = _opaque(_eight_bit(image))
        return image if turn is None else image.transpose(turn)


def whole(data: bytes) -> Image.Image:
    """The picture at its own size, upright and RGB, transparency on white; any format that `shards build` takes. Raises ValueError."""
    with open_image(data, (*_READ, *CONVERTED)) as image:
        image.load()
        turn = _turn(image)
        image = _opaque(_eight_bit(image))
        return image if turn is None else image.transpose(turn)


def centre_box(size: tuple[int, int], width: int, height: int) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of the largest part with the shape of width x height, in the centre of a picture of some size."""
    part_width, part_height = min(size[0], size[1] * width / height), min(size[1], size[0] * height / width)
    left, top = (size[0] - part_width) / 2, (size[1] - part_height) / 2
    if (part_width, part_height) == (width, height):
        left, top = int(left), int(top)  # a crop alone: half a pixel's shift would blur
    return left, top, left + part_width, top + part_height


def prepare(data: bytes, shorter_side: int | None = None) -> tuple[bytes, str]:
    """The bytes to store and their extension, for a picture in any format that `shards build` takes.

    JPEG, PNG and WebP stay as they are, byte for byte; others become PNG. With `shorter_side`, larger pictures are resized to it
    (Lanczos, as in `square`) with their EXIF orientation applied, into JPEG at quality 95 without chroma subsampling, or into PNG
    if the source was lossless or has transparency. Everything that is returned has been decoded once. Raises ValueError.
    """
    with open_image(data, (*_READ, *CONVERTED)) as image:
        kind = image.format or ""
        if kind in STORED and (shorter_side is None or min(image.size) <= shorter_side):
            image.draft(None, (1, 1))
            image.load()
            return data, STORED[kind]
        if shorter_side is not None:
            _draft(image, shorter_side, shorter_side)
        image.load()
        turn = _turn(image)
        profile = image.info.get("icc_profile") if image.mode in ("RGB", "RGBA") else None
        image = _eight_bit(image)
        if shorter_side is not None and min(image.size) > shorter_side:
            scale = shorter_side / min(image.size)
            wanted = (max(shorter_side, round(image.width * scale)), max(shorter_side, round(image.height * scale)))
            image = image.resize(wanted, Image.Resampling.LANCZOS)
        if turn is not None:
            image = image.transpose(turn)
        lossy = kind in ("JPEG", "MPO", "WEBP") and image.mode != "RGBA"
        out = io.BytesIO()
        if lossy:
            image.save(out, "JPEG", quality=95, subsampling="4:4:4", icc_profile=profile)
        else:
            image.save(out, "PNG", icc_profile=profile)
        return out.getvalue(), "jpg" if lossy else "png"


def _decode_ordinary(data: bytes, width: int, height: int) -> Image.Image | None:
    """What `decode` gives, without opening the data as a file, which takes a small JPEG longer than its pixels do.

    None for what is no ordinary JPEG, and for what cannot be decoded, about which Pillow says more when it opens it.
    """
    size = ordinary_size(data)
    if size is None or size[0] * size[1] > MAX_PIXELS:
        return None
    scale = _reduction(size, width, height)
    try:  # the arguments are those that Pillow's JPEG plugin gives its decoder
        return Image.frombytes("RGB", (-(-size[0] // scale), -(-size[1] // scale)), data, "jpeg", "RGB", "", scale, 0)
    except (ValueError, TypeError, OSError):
        return None


def _draft(image: Image.Image, width: int, height: int) -> None:
    """Lets the JPEG decoder leave out detail far below what a part at width x height will show; nothing for other formats."""
    scale = _reduction(image.size, width, height)
    if scale > 1:
        image.draft(None, (image.width // scale, image.height // scale))


def _reduction(size: tuple[int, int], width: int, height: int) -> int:
    """By how much, 1, 2, 4 or 8, a JPEG of some (width, height) is decoded smaller for a part at width x height."""
    scale = 2 * max(width / size[0], height / size[1])
    if scale >= 1:
        return 1
    fits = min(size[0] // round(size[0] * scale), size[1] // round(size[1] * scale))
    return next(reduction for reduction in (8, 4, 2, 1) if reduction <= fits)


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What brings the picture upright according to its EXIF data; nothing if these are absent or damaged."""
    try:
        return _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # damaged EXIF data raise nearly everything too, and the picture is good without them
        return None


def _early_turn(image: Image.Image) -> Image.Transpose | None:
    """`_turn` before the pixels are decoded, as Pillow would do to look for a PNG's EXIF data behind them: those do not count here."""
    return None if image.format == "PNG" and "exif" not in image.info else _turn(image)


def _eight_bit(image: Image.Image) -> Image.Image:
    """The decoded picture in mode L, RGB or RGBA; sixteen bits are scaled to eight."""
    if image.mode in ("L", "RGB", "RGBA") and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):
        values = np.asarray(image).clip(0, 65535).astype(np.uint32)
        return Image.fromarray(((values + 128) // 257).astype(np.uint8))  # the nearest: no half lies between multiples of 257
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers, whose range is unknown; convert it to 8 or 16 bits")
    return image.convert("RGBA" if image.has_transparency_data else "L" if image.mode == "1" else "RGB")


def _opaque(image: Image.Image) -> Image.Image:
    """RGB; what is transparent shows white."""
    if image.mode != "RGBA":
        return image if image.mode == "RGB" else image.convert("RGB")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")
