"""The headers of JPEGs: the size of ordinary ones, and that everything else is left to a decoder."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, ImageCms, UnidentifiedImageError

from t2i_experts.shards import images
from t2i_experts.shards.jpeg import ordinary_size
from t2i_experts.shards.transforms import decode_image

Encode = Callable[..., bytes]

ORDINARY: dict[str, dict[str, object]] = {
    "plain": {},
    "progressive": {"progressive": True},
    "optimised": {"optimize": True, "quality": 95},
    "full chroma": {"subsampling": "4:4:4"},
    "half chroma": {"subsampling": "4:2:2"},
    "not subsampled RGB": {"keep_rgb": True},
    "with restarts": {"restart_marker_rows": 1},
    "with a comment": {"comment": b"\xff\xc0 is no frame here"},
    "with a profile": {"icc_profile": ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()},
}


def segment(marker: int, body: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body


@pytest.mark.parametrize("kind", ORDINARY)
def test_ordinary_jpegs_give_the_pixels_that_an_opened_file_gives(encode: Encode, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """At the size itself, cut, and at each reduction; the file is not even opened."""
    jpegs = [encode(1, size, "JPEG", **ORDINARY[kind]) for size in ((40, 32), (171, 128), (333, 270), (515, 700))]
    assert [ordinary_size(jpeg) for jpeg in jpegs] == [(40, 32), (171, 128), (333, 270), (515, 700)]
    with monkeypatch.context() as patch:
        patch.setattr(images, "ordinary_size", lambda data: None)
        opened = [decode_image(jpeg, 32) for jpeg in jpegs]
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("opened"))
    assert all((decode_image(jpeg, 32) == other).all() for jpeg, other in zip(jpegs, opened, strict=True))


def test_what_is_not_ordinary(encode: Encode) -> None:
    jpeg = encode(0, (40, 30), "JPEG")
    exif = Image.Exif()
    exif[0x0112] = 6
    frame = jpeg.index(b"\xff\xc0")
    for other in (
        encode(0, (40, 30), "JPEG", exif=exif.tobytes()),
        encode(0, (40, 30), "JPEG", xmp=b'<x:xmpmeta tiff:Orientation="6"/>'),
        encode(0, (40, 30), "JPEG", mode="L"),
        encode(0, (40, 30), "JPEG", mode="CMYK"),
        encode(0, (40, 30), "PNG"),
        b"",
        b"\xff",
        b"\xff\xd8",
        jpeg[: frame + 8],
        b"\0" + jpeg,
        jpeg[:2] + b"\xff" + jpeg[2:],  # padded markers are allowed by the standard, and rare
        jpeg[:2] + b"\0" + jpeg[2:],
        jpeg[:2] + segment(0xE5, b"")[:-1] + b"\1" + jpeg[2:],  # a segment that claims to be shorter than its own length
        jpeg[:frame] + jpeg[frame : frame + 19] + jpeg[frame:],  # two frames
        jpeg[:frame] + b"\xff\xc9" + jpeg[frame + 2 :],  # arithmetic coding
        jpeg[: frame + 4] + b"\x0c" + jpeg[frame + 5 :],  # twelve bits
        jpeg[: frame + 5] + b"\0\0" + jpeg[frame + 7 :],  # no height
    ):
        assert ordinary_size(other) is None
    assert ordinary_size(jpeg) == (40, 30)


def test_no_size_is_read_where_a_decoder_reads_another(encode: Encode) -> None:
    """A decoder that wrote more than the memory that was made for the size would write beyond it."""
    jpeg = encode(0, (24, 16), "JPEG")
    hidden = segment(0xE0, b"\xff\xd8" + b"\xff\xc0\0\x11\x08\0\x04\0\x04\x03" + bytes(9))
    for data in (jpeg[:2] + hidden + jpeg[2:], jpeg[:2] + segment(0xFE, hidden) + jpeg[2:]):
        assert ordinary_size(data) == (24, 16) == Image.open(io.BytesIO(data)).size
        assert (decode_image(data, 16) == decode_image(jpeg, 16)).all()
    rng = np.random.default_rng(0)
    end = jpeg.index(b"\xff\xda")
    for _ in range(3000):
        broken = bytearray(jpeg)
        broken[rng.integers(end)] = rng.integers(256)
        size = ordinary_size(bytes(broken))
        if size is None:
            continue
        try:
            assert size == Image.open(io.BytesIO(broken)).size
        except UnidentifiedImageError:
            with pytest.raises(ValueError):
                decode_image(bytes(broken), 16)


@pytest.mark.parametrize("cut", [10, 200, 600, -300])
def test_what_an_ordinary_jpeg_lacks_is_told_as_of_every_file(encode: Encode, monkeypatch: pytest.MonkeyPatch, cut: int) -> None:
    jpeg = encode(2, (128, 96), "JPEG", quality=95)[:cut]
    with pytest.raises(ValueError) as told:
        decode_image(jpeg, 64)
    monkeypatch.setattr(images, "ordinary_size", lambda data: None)
    with pytest.raises(ValueError) as as_file:
        decode_image(jpeg, 64)
    assert str(told.value) == str(as_file.value)


def test_another_decoder_in_pillow_is_no_reason_to_refuse_pictures(encode: Encode, monkeypatch: pytest.MonkeyPatch) -> None:
    jpeg = encode(3, (70, 64), "JPEG")
    expected = decode_image(jpeg, 64)
    real = Image.frombytes
    monkeypatch.setattr(Image, "frombytes", lambda *arguments: real(*arguments, "one more"))
    assert (decode_image(jpeg, 64) == expected).all()


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_an_ordinary_jpeg_that_is_too_large_is_refused(encode: Encode) -> None:
    jpeg = bytearray(encode(0, (16, 16), "JPEG"))
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", 12_000, 12_000)
    assert ordinary_size(bytes(jpeg)) == (12_000, 12_000)
    with pytest.raises(ValueError, match="12000x12000 pixels"):
        decode_image(bytes(jpeg), 16)
