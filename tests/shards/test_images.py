"""Picture files: which are read, how they are cut and shrunk, and that damaged or huge ones are refused."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image

from t2i_experts.shards import transforms
from t2i_experts.shards.images import centre_crop, image_size, prepare, square, upright_size, verify
from t2i_experts.shards.transforms import decode_image

Encode = Callable[..., bytes]


def saved(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def pixels(data: bytes, size: int) -> np.ndarray:
    return np.asarray(square(data, size)).astype(int)


def test_a_square_of_the_right_size_keeps_its_pixels(encode: Encode) -> None:
    data = encode(0, (64, 64))
    tensor = decode_image(data, 64)
    assert tensor.shape == (3, 64, 64) and tensor.dtype == torch.uint8 and tensor.is_contiguous()
    assert (tensor.permute(1, 2, 0).numpy() == np.asarray(Image.open(io.BytesIO(data)))).all()


@pytest.mark.parametrize("size", [(65, 64), (64, 71), (100, 64)])
def test_a_picture_of_the_right_height_is_only_cut(encode: Encode, size: tuple[int, int]) -> None:
    data = encode(1, size)
    whole = np.asarray(Image.open(io.BytesIO(data)))
    left, top = (size[0] - 64) // 2, (size[1] - 64) // 2
    assert (pixels(data, 64) == whole[top : top + 64, left : left + 64]).all()


def test_the_centre_square_of_the_shorter_side(encode: Encode) -> None:
    """Agrees with resizing first and cutting afterwards, away from the cut."""
    data = encode(2, (300, 200))
    reference = Image.open(io.BytesIO(data)).resize((96, 64), Image.Resampling.LANCZOS).crop((16, 0, 80, 64))
    difference = np.abs(pixels(data, 64) - np.asarray(reference).astype(int))
    assert difference[:, 4:-4].max() <= 1
    mirrored = saved(Image.open(io.BytesIO(data)).transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    assert np.abs(pixels(mirrored, 64)[:, ::-1] - pixels(data, 64)).max() <= 1


@pytest.mark.parametrize("size", [(640, 512), (1100, 900)])
def test_large_jpegs_are_decoded_smaller_without_a_visible_difference(encode: Encode, size: tuple[int, int]) -> None:
    jpeg = encode(3, size, "JPEG", quality=95)
    png = saved(Image.open(io.BytesIO(jpeg)))
    assert np.abs(pixels(jpeg, 64) - pixels(png, 64)).mean() < 1
    wide, same = (np.asarray(centre_crop(data, 96, 32)).astype(int) for data in (jpeg, png))
    assert np.abs(wide - same).mean() < 1
    exif = Image.Exif()
    exif[0x0112] = 6
    wide, same = (
        np.asarray(centre_crop(saved(Image.open(io.BytesIO(jpeg)), kind, exif=exif, quality=95), 96, 32)) for kind in ("JPEG", "PNG")
    )
    assert np.abs(wide.astype(int) - same).mean() < 1


def test_upscaling(encode: Encode) -> None:
    assert decode_image(encode(0, (10, 20)), 32).shape == (3, 32, 32)


@pytest.mark.parametrize(("size", "shape", "box"), [
    ((300, 200), (96, 48), (0, 25, 300, 175)), ((300, 200), (48, 96), (100, 0, 200, 200)), ((60, 40), (30, 20), (0, 0, 60, 40)),
    ((40, 44), (40, 30), (0, 7, 40, 37)), ((20, 10), (64, 80), (6, 0, 14, 10)),
])  # fmt: skip
def test_the_largest_centre_part_of_a_shape(encode: Encode, size: tuple[int, int], shape: tuple[int, int], box: tuple[int, ...]) -> None:
    data = encode(6, size)
    expected = Image.open(io.BytesIO(data)).resize(shape, Image.Resampling.LANCZOS, box=box)
    assert (np.asarray(centre_crop(data, *shape)) == np.asarray(expected)).all()
    tensor = decode_image(data, *shape)
    assert tensor.shape == (3, shape[1], shape[0]) and tensor.is_contiguous()
    assert np.abs(tensor.permute(1, 2, 0).numpy() - np.asarray(expected).astype(int)).max() <= 2  # Pillow rounds between the axes, too


def test_a_picture_that_is_much_too_large(encode: Encode) -> None:
    """Is resized by Pillow alone; shapes that are a little, or in one direction, too large go the other way."""
    for size, shape in (((300, 290), (16, 16)), ((129, 128), (16, 16)), ((128, 128), (16, 16)), ((200, 30), (40, 2))):
        data = encode(5, size)
        found = decode_image(data, *shape).permute(1, 2, 0).numpy().astype(int)
        assert np.abs(found - np.asarray(centre_crop(data, *shape))).max() <= 2
    assert (decode_image(encode(5, (300, 290)), 16).permute(1, 2, 0).numpy() == pixels(encode(5, (300, 290)), 16)).all()


def test_a_huge_picture_is_resized_without_a_copy(encode: Encode, monkeypatch: pytest.MonkeyPatch) -> None:
    """By Pillow, where it lies; also one of which a part has the size wanted."""
    arrays, as_array = [], np.asarray
    monkeypatch.setattr(transforms, "_MOST_PIXELS", 5000)
    for size in ((90, 81), (400, 32)):
        data = encode(4, size)
        expected = pixels(data, 32)
        with monkeypatch.context() as patch:
            patch.setattr(np, "asarray", lambda image: arrays.append(image.size) or as_array(image))
            found = decode_image(data, 32)
        assert (found.permute(1, 2, 0).numpy() == expected).all()
    assert arrays == [(32, 32)] * 2


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_shape_is_cut_from_the_upright_picture(encode: Encode, orientation: int, kind: str) -> None:
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(4, (96, 64), kind, exif=exif.tobytes(), **({"quality": 100} if kind != "PNG" else {}))
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    assert upright_size(data) == upright.size
    width, height = (80, 64) if upright.width == 96 else (64, 80)
    left, top = (upright.width - width) // 2, (upright.height - height) // 2
    assert (np.asarray(centre_crop(data, width, height)) == np.asarray(upright.crop((left, top, left + width, top + height)))).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_exif_orientation_is_applied(encode: Encode, orientation: int, kind: str) -> None:
    """As a viewer shows it: against Pillow's own transposition of the whole picture."""
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 100} if kind != "PNG" else {}
    data = encode(4, (96, 64), kind, exif=exif.tobytes(), **options)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    left, top = (upright.width - 64) // 2, (upright.height - 64) // 2
    assert (pixels(data, 64) == np.asarray(upright.convert("RGB").crop((left, top, left + 64, top + 64)))).all()
    shrunk, _ = prepare(data, 32)
    assert image_size(shrunk) == ((48, 32) if orientation < 5 else (32, 48))


def test_damaged_exif_is_no_reason_to_refuse_a_picture(encode: Encode) -> None:
    assert square(encode(0, (32, 32), "JPEG", exif=b"Exif\0\0nonsense"), 32).size == (32, 32)


def test_transparency_is_laid_on_white() -> None:
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    image.paste((0, 0, 255, 255), (0, 0, 4, 8))
    image.putpixel((7, 7), (0, 0, 0, 128))
    for data in (saved(image), saved(image, "WEBP", lossless=True, exact=True)):
        found = pixels(data, 8)
        assert (found[:, :4] == (0, 0, 255)).all() and (found[0, 4:] == 255).all()
        assert np.abs(found[7, 7] - 127).max() <= 1
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([10, 20, 30])
    assert (pixels(saved(palette), 8) == (10, 20, 30)).all()
    assert (pixels(saved(palette, transparency=0), 8) == 255).all()
    grey = Image.new("LA", (8, 8), (50, 255))
    assert (pixels(saved(grey), 8) == 50).all()


def test_other_modes() -> None:
    sixteen = Image.fromarray((np.arange(64, dtype=np.uint16).reshape(8, 8) * 1040).astype(np.uint16))
    assert np.abs(pixels(saved(sixteen), 8)[..., 0] - np.asarray(sixteen) / 257).max() <= 0.51
    assert (pixels(saved(Image.new("1", (8, 8), 1)), 8) == 255).all()
    assert (pixels(saved(Image.new("L", (8, 8), 77)), 8) == 77).all()
    assert np.abs(pixels(saved(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"), 8) - (255, 0, 0)).max() < 8


def test_a_jpeg_with_further_pictures_behind_it(encode: Encode) -> None:
    first, second = (Image.open(io.BytesIO(encode(i, (32, 32)))) for i in (0, 1))
    data = saved(first, "MPO", save_all=True, append_images=[second])
    assert square(data, 32).size == (32, 32) and prepare(data) == (data, "jpg")


def huge_png(width: int, height: int) -> bytes:
    """A few bytes that claim to be a large picture."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("read", [verify, prepare, image_size, upright_size, lambda data: square(data, 64)])
def test_what_is_refused(encode: Encode, read: Callable[[bytes], object]) -> None:
    """Bombs, other formats, and nothing at all: always a ValueError, never Pillow's own kinds of error."""
    for data in (huge_png(12_000, 12_000), huge_png(60_000, 60_000), b"", b"GIF89a", b"<svg/>", b"\x89PNG\r\n\x1a\n"):
        with pytest.raises(ValueError):
            read(data)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("read", [verify, prepare, lambda data: square(data, 64)])
def test_truncated_pictures_are_refused(encode: Encode, kind: str, read: Callable[[bytes], object]) -> None:
    data = encode(5, (200, 200), kind)
    with pytest.raises(ValueError):
        read(data[: len(data) * 2 // 3])


def test_prepare_keeps_stored_formats_byte_for_byte(encode: Encode) -> None:
    for kind, extension in (("PNG", "png"), ("JPEG", "jpg"), ("WEBP", "webp")):
        data = encode(6, (40, 30), kind)
        assert prepare(data) == (data, extension) == prepare(data, 30) == prepare(data, 100)


@pytest.mark.parametrize("kind", ["BMP", "GIF", "TIFF"])
def test_prepare_turns_the_other_formats_into_png_without_loss(encode: Encode, kind: str) -> None:
    data = encode(7, (40, 30), kind)
    converted, extension = prepare(data)
    assert extension == "png"
    assert (np.asarray(Image.open(io.BytesIO(converted))) == np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))).all()


def test_prepare_shrinks_to_the_shorter_side(encode: Encode) -> None:
    for kind, mode, extension in (
        ("JPEG", "RGB", "jpg"),
        ("WEBP", "RGB", "jpg"),
        ("PNG", "RGB", "png"),
        ("WEBP", "RGBA", "png"),
        ("BMP", "RGB", "png"),
    ):
        image = Image.open(io.BytesIO(encode(8, (333, 100)))).convert(mode)
        if mode == "RGBA":
            image.putpixel((0, 0), (0, 0, 0, 0))
        shrunk, found = prepare(saved(image, kind), 50)
        assert found == extension and image_size(shrunk) == (166, 50)
        assert np.abs(pixels(shrunk, 50) - pixels(saved(image), 50)).mean() < 3


def test_floating_point_pictures_are_refused_with_a_reason() -> None:
    data = saved(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF")
    with pytest.raises(ValueError, match="floating-point"):
        prepare(data)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("side", [None, 16])
def test_an_animation_shows_its_first_frame(kind: str, side: int | None) -> None:
    frames = [Image.new("RGB", (40, 30), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    stored, _ = prepare(saved(frames[0], kind, save_all=True, append_images=frames[1:]), side)
    assert np.abs(pixels(stored, 16) - (255, 0, 0)).max() <= 3


@pytest.mark.parametrize("side", [None, 16])
def test_other_colour_models_become_right(encode: Encode, side: int | None) -> None:
    """CMYK, sixteen bits, transparency and TIFF's own orientation, through `prepare` and `square`, against the plain picture."""
    plain = Image.open(io.BytesIO(encode(9, (60, 40)))).convert("RGB")
    grey = np.asarray(plain.convert("L"))
    exif = Image.Exif()
    exif[0x0112] = 6
    half = plain.convert("RGBA")
    half.putalpha(128)
    white = Image.blend(plain, Image.new("RGB", plain.size, "white"), 127 / 255)
    for data, expected in (
        (saved(plain.convert("CMYK"), "TIFF"), plain),
        (saved(plain.convert("CMYK"), "JPEG", quality=100), plain),
        (saved(Image.fromarray(grey.astype(np.uint16) * 257)), Image.fromarray(grey)),
        (saved(Image.fromarray(grey.astype(np.uint16) * 257), "TIFF"), Image.fromarray(grey)),
        (saved(plain.convert("LA")), Image.fromarray(grey)),
        (saved(half), white),
        (saved(half, "TIFF"), white),
        (saved(plain, "TIFF", exif=exif), plain.transpose(Image.Transpose.ROTATE_270)),
    ):
        stored, _ = prepare(data, side)
        assert np.abs(pixels(stored, 16) - pixels(saved(expected), 16)).mean() < 2
