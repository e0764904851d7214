"""What stands before the pixels of a JPEG (ITU-T T.81, annex B), as far as it is needed to decode an ordinary one at once."""

from __future__ import annotations

import struct

_START = b"\xff\xd8"
_FRAMES = (0xFFC0, 0xFFC1, 0xFFC2)  # baseline, extended, progressive; Huffman-coded
_SCAN = 0xFFDA
_EXIF = 0xFFE1
_PASSED_OVER = {0xFFC4, 0xFFDB, 0xFFDD, 0xFFFE, *range(0xFFE0, 0xFFF0)} - {_EXIF}  # tables, restarts, comments, applications' own
_SEGMENT = struct.Struct(">HH")
_FRAME = struct.Struct(">BHHB")


def ordinary_size(data: bytes) -> tuple[int, int] | None:
    """(width, height) of a JPEG in three components of eight bits without EXIF or XMP data, so that it stands upright.

    None for every other file, also if anything is unusual before its pixels: that is for a decoder to judge. So a decoder that follows
    the standard reads the same size.
    """
    size = None
    at = len(_START)
    if not data.startswith(_START):
        return None
    try:
        while True:
            marker, length = _SEGMENT.unpack_from(data, at)
            if marker == _SCAN:
                return size
            if length < 2:
                return None
            if marker in _FRAMES and size is None:
                bits, height, width, components = _FRAME.unpack_from(data, at + _SEGMENT.size)
                if bits != 8 or components != 3 or not width or not height:
                    return None
                size = (width, height)
            elif marker not in _PASSED_OVER:
                return None
            at += 2 + length
    except struct.error:  # it ends here
        return None
