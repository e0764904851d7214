"""A contact sheet of training samples: each picture as training crops it, with its number and caption below."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from t2i_experts.cascade.picture import contact_sheet
from t2i_experts.shards.images import square

_SIDE = 192
_LINES = 4
_FONT_SIZE = 12
_LINE_HEIGHT = 15
_COLUMNS = 6


def draw_sheet(samples: Sequence[tuple[bytes | None, str]]) -> Image.Image:
    """The sheet of (picture file, text) pairs. A picture that is None or cannot be read is a grey square, and the text says why.

    The font is Pillow's own, which has Latin letters; others are boxes. Raises ValueError if there is no sample.
    """
    if not samples:
        raise ValueError("a contact sheet needs at least one sample")
    return contact_sheet([_cell(data, text) for data, text in samples], columns=min(_COLUMNS, len(samples)), gap=8)


def _cell(data: bytes | None, text: str) -> Image.Image:
    """(_SIDE wide) the centre square and at most _LINES lines of text below."""
    cell = Image.new("RGB", (_SIDE, _SIDE + _LINES * _LINE_HEIGHT + 4), "white")
    picture = Image.new("RGB", (_SIDE, _SIDE), "grey")
    if data is not None:
        try:
            picture = square(data, _SIDE)
        except ValueError as error:
            text = f"{text}: {error}"
    cell.paste(picture, (0, 0))
    font, draw = ImageFont.load_default(_FONT_SIZE), ImageDraw.Draw(cell)
    letters = int(_SIDE / draw.textlength("n", font))
    lines = textwrap.wrap(text, letters, max_lines=_LINES, placeholder=" ...")
    for i, line in enumerate(lines):
        draw.text((0, _SIDE + 4 + i * _LINE_HEIGHT), line, fill="black", font=font)
    return cell
