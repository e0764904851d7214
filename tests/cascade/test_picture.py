"""Pictures keep their pixels and their story."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from t2i_experts.cascade.picture import contact_sheet, read_image, read_metadata, save_png, split_sheet, to_pil, to_uint8


def test_rounding() -> None:
    values = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0])
    assert to_uint8(values).tolist() == [0, 0, 128, 255, 255]
    exact = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(exact.float() / 127.5 - 1), exact)


def test_png_round_trip(tmp_path: Path) -> None:
    image = torch.randint(0, 256, (3, 5, 7), dtype=torch.uint8)
    facts = {"prompt": "ein rotes Äpfelchen 🍎 猫", "seed": 3}
    save_png(to_pil(image), tmp_path / "new" / "a.png", facts)
    assert read_metadata(tmp_path / "new" / "a.png") == facts
    assert torch.equal(to_uint8(read_image(tmp_path / "new" / "a.png"))[0], image)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.png"]


def test_transparency_is_white(tmp_path: Path) -> None:
    Image.new("RGBA", (2, 2), (0, 0, 0, 0)).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png").min() == 1


def test_unreadable_picture(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("not a picture")
    for name in ("a.png", "missing.png"):
        with pytest.raises(ValueError, match="cannot read"):
            read_image(tmp_path / name)


def test_contact_sheet_has_a_cell_for_each() -> None:
    cells = [Image.new("RGB", (4, 4), (i, 0, 0)) for i in range(5)]
    sheet = contact_sheet(cells, columns=3, gap=1)
    assert sheet.size == (14, 9)
    assert [sheet.getpixel((i % 3 * 5, i // 3 * 5)) for i in range(5)] == [(i, 0, 0) for i in range(5)]


def test_a_sheet_is_split_into_the_pictures_that_it_was_made_of(tmp_path: Path) -> None:
    cells = [to_pil(torch.randint(0, 256, (3, 5, 7), dtype=torch.uint8)) for _ in range(5)]
    save_png(contact_sheet(cells, columns=3), tmp_path / "sheet.png")
    assert [cell.tobytes() for cell in split_sheet(tmp_path / "sheet.png", 5, 3)] == [cell.tobytes() for cell in cells]
