"""Pictures come as people see them, whatever the file; and each comes once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from t2i_experts.evaluation.pictures import Picture, Unreadable, find_pictures, open_pictures, set_hash


def test_pictures_are_upright_opaque_and_whole(tmp_path: Path) -> None:
    pixels = np.arange(3 * 40 * 20, dtype=np.uint32).reshape(40, 20, 3).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "0.png")
    Image.fromarray(pixels).save(tmp_path / "1.bmp")
    turned = Image.fromarray(pixels)
    exif = turned.getexif()
    exif[0x0112] = 6  # its top is at the right
    turned.save(tmp_path / "2.webp", lossless=True, exif=exif)
    Image.fromarray(np.dstack([pixels, np.full((40, 20), 255, np.uint8)])).save(tmp_path / "3.png")
    Image.new("RGBA", (20, 40), (9, 9, 9, 0)).save(tmp_path / "4.tiff")
    Image.new("L", (20, 40), 77).save(tmp_path / "5.jpg")
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / ".hidden.png").write_text("no picture")
    pictures = open_pictures(tmp_path, "A")
    assert (pictures.kind, pictures.count) == ("folder", 6)
    found = [picture.pixels.permute(1, 2, 0).numpy() for picture in pictures.read(3) if isinstance(picture, Picture)]
    assert len(found) == 6
    for i in (0, 1, 3):
        np.testing.assert_array_equal(found[i], pixels)
    np.testing.assert_array_equal(found[2], np.rot90(pixels, -1))
    assert (found[4] == 255).all() and (found[5] == 77).all() and found[4].shape == found[5].shape == (40, 20, 3)


def test_a_hash_knows_no_order_and_reading_goes_on_after_what_is_broken(tmp_path: Path) -> None:
    for i in range(30):
        Image.new("RGB", (4, 4), (i, 0, 0)).save(tmp_path / f"{i:02}.png")
    (tmp_path / "07.png").write_bytes(b"\x89PNG")
    read = list(open_pictures(tmp_path, "A").read(2))
    assert [i for i, picture in enumerate(read) if isinstance(picture, Unreadable)] == [7]
    digests = [picture.digest for picture in read if isinstance(picture, Picture)]
    assert len(set(digests)) == 29 and set_hash(digests) == set_hash(digests[::-1]) != set_hash(digests[1:])
    with pytest.raises(ValueError, match=r"B='.*' is not there"):
        open_pictures(tmp_path / "nowhere", "B")


def test_captions_without_their_picture_are_listed(tmp_path: Path) -> None:
    for i in range(20):
        Image.new("RGB", (4, 4), (i, 0, 0)).save(tmp_path / f"{i:02}.v2.png")
    (tmp_path / "README.txt").write_text("where they are from")
    assert open_pictures(tmp_path, "A").count == 20
    (tmp_path / "README.txt").unlink()
    for i in range(20):
        (tmp_path / f"{i:02}.v2.txt").write_text("a red square")
    assert open_pictures(tmp_path, "A").count == 20
    (tmp_path / "03.v2.png").unlink()
    with pytest.raises(ValueError, match=r"1 of the 20 captions under .* have no picture: 03\.v2\.txt;"):
        open_pictures(tmp_path, "A")
    for i in range(4, 16):
        (tmp_path / f"{i:02}.v2.png").unlink()
    with pytest.raises(ValueError, match=r"13 of the 20 captions .*12\.v2\.txt and 3 more;"):
        open_pictures(tmp_path, "A")


def test_tars_beside_pictures_are_no_set(tmp_path: Path) -> None:
    (tmp_path / "0.tar").touch()
    Image.new("RGB", (4, 4)).save(tmp_path / "0.png")
    for opened in (open_pictures, find_pictures):  # that of distances, and that of all others
        with pytest.raises(ValueError, match=r"^A=.* holds tars and, beside them, pictures such as 0\.png"):
            opened(tmp_path, "A")


def test_nothing_is_left_out_in_silence(tmp_path: Path) -> None:
    for name in ("a/0.png", "a/deeper/1.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert open_pictures(tmp_path / "link", "A").count == 2
    with pytest.raises(ValueError, match=r"link is a link to a folder, which is not followed"):
        open_pictures(tmp_path, "A")
    (tmp_path / "a/2.HEIC").touch()
    with pytest.raises(ValueError, match=r"1 pictures under .* in formats that are not read: 2\.HEIC;"):
        open_pictures(tmp_path / "a", "A")
