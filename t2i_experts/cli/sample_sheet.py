"""A contact sheet of training samples: each picture as training crops it, with its number and caption below."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from t2i_experts.charts import draw_captioned
from t2i_experts.shards.images import square

_SIDE = 192
_COLUMNS = 6


def draw_sheet(samples: Sequence[tuple[bytes | None, str]]) -> Image.Image:
    """The sheet of (picture file, text) pairs. A picture that is None or cannot be read is a grey square, and the text says why.

    Raises ValueError if there is no sample.
    """
    if not samples:
        raise ValueError("a contact sheet needs at least one sample")
    return draw_captioned([_picture(data, text) for data, text in samples], _COLUMNS, _SIDE)


def _picture(data: bytes | None, text: str) -> tuple[Image.Image, str]:
    """The centre square, and the text with what is wrong."""
    if data is not None:
        try:
            return square(data, _SIDE), text
        except ValueError as error:
            text = f"{text}: {error}"
    return Image.new("RGB", (_SIDE, _SIDE), "grey"), text
