"""`KEY.NAME.npz`: what one text encoder says of all captions of a sample, at their true lengths, bfloat16 stored as uint16.

Three arrays, without compression: `lengths` (captions,) int32, `tokens` (sum of lengths, width) uint16, caption after caption, and
`pooled` (captions, pooled_width) uint16. A length of 0 is a caption that says nothing; without a pooled vector, pooled_width is 0.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from t2i_experts.shards.format import EncoderRecord
from t2i_experts.types import TextFeatures


def pack_features(features: Sequence[TextFeatures]) -> bytes:
    """The member that holds the features of all captions of a sample, in their order. The same features give the same bytes."""
    tokens = torch.cat([f.tokens for f in features])
    pooled = [f.pooled for f in features if f.pooled is not None]
    out = io.BytesIO()
    np.savez(
        out,
        lengths=np.array([len(f.tokens) for f in features], dtype="<i4"),
        tokens=_bits(tokens),
        pooled=_bits(torch.stack(pooled)) if pooled else np.zeros((len(features), 0), dtype="<u2"),
    )
    return out.getvalue()


def unpack_features(data: bytes, record: EncoderRecord, captions: int) -> list[TextFeatures]:
    """The features of the captions of a sample that has so many. Raises ValueError for anything but what `pack_features` makes."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            if any(info.compress_type != zipfile.ZIP_STORED or info.file_size > len(data) for info in archive.infolist()):
                raise ValueError("it is compressed")
            lengths, tokens, pooled = (_array(archive.read(f"{name}.npy")) for name in ("lengths", "tokens", "pooled"))
    except MemoryError:
        raise
    except Exception as error:  # zipfile and the array format raise nearly everything on damaged data: BadZipFile, KeyError, ...
        raise ValueError(f"its {record.member} cannot be read: {str(error) or type(error).__name__}") from error
    if lengths.shape != (captions,) or lengths.dtype != np.dtype("<i4"):
        raise ValueError(f"its {record.member} has embeddings of {lengths.shape} captions where the sample has {captions}")
    if ((lengths < 0) | (lengths > record.max_tokens)).any():
        raise ValueError(f"its {record.member} has lengths of {lengths.min()} to {lengths.max()} tokens; max_tokens={record.max_tokens}")
    for name, array, shape in (
        ("tokens", tokens, (int(lengths.sum(dtype=np.int64)), record.width)),
        ("pooled", pooled, (captions, record.pooled_width)),
    ):
        if array.shape != shape or array.dtype != np.dtype("<u2"):
            raise ValueError(f"its {record.member} has {name} of {array.dtype} {array.shape}; expected uint16 {shape}")
    rows = zip(np.split(tokens, np.cumsum(lengths)[:-1]), pooled, strict=True)
    return [TextFeatures(_values(row), _values(vector) if record.pooled_width else None) for row, vector in rows]


def common_records(folders: Mapping[str, Sequence[EncoderRecord]], names: Sequence[str]) -> tuple[EncoderRecord, ...]:
    """The records of the encoders of these names, out of what each folder's manifest says.

    Raises ValueError for a folder that lacks one of them, and for two folders that have them of different encoders.
    """
    common: dict[str, tuple[str, EncoderRecord]] = {}
    for folder, records in folders.items():
        known = {record.name: record for record in records}
        lacking = [name for name in names if name not in known]
        if lacking:
            raise ValueError(
                f"{folder} holds no embeddings of the encoders {', '.join(lacking)} (it has: {', '.join(known) or 'none'}): make shards "
                f"that do with `t2i-experts shards embed {folder} --config CONFIG --out FOLDER`, or train with data.embeddings=online"
            )
        for name in names:
            first, record = common.setdefault(name, (folder, known[name]))
            if record != known[name]:
                raise ValueError(f"{folder} and {first} hold embeddings of different encoders: {_differences(name, known[name], record)}")
    return tuple(common[name][1] for name in names) if common else ()


def refuse_other_encoders(where: str, stored: Sequence[EncoderRecord], wanted: Sequence[EncoderRecord], remedy: str) -> None:
    """Raises ValueError that names both if the embeddings that `where` holds are not of the encoders `wanted`, in this order."""
    names, wanted_names = ([record.name for record in records] for records in (stored, wanted))
    if names != wanted_names:
        raise ValueError(f"{where} holds embeddings of {', '.join(names) or 'none'}, and not of {', '.join(wanted_names)}; {remedy}")
    for old, new in zip(stored, wanted, strict=True):
        if old != new:
            raise ValueError(f"{where} holds embeddings of another encoder: {_differences(old.name, old, new)}; {remedy}")


def _differences(name: str, first: EncoderRecord, second: EncoderRecord) -> str:
    pairs = ((key, value, getattr(second, key)) for key, value in dataclasses.asdict(first).items())
    return "; ".join(f"{name}.{key} is {a!r} there and {b!r} here" for key, a, b in pairs if a != b)


def _array(data: bytes) -> NDArray[Any]:
    """An array in numpy's format, as a view of `data`. numpy's own reader would first make room for whatever size the header claims."""
    start = 10 + int.from_bytes(data[8:10], "little")
    shape, dtype = _header(data[:start])
    return np.frombuffer(data, dtype, offset=start).reshape(shape)


@functools.lru_cache(maxsize=4096)
def _header(data: bytes) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and type of an array, from the bytes before its values; parsing them takes longer than all else, and few are different."""
    file = io.BytesIO(data)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("an array of another version of numpy's format than 1.0")
    shape, by_columns, dtype = np.lib.format.read_array_header_1_0(file)
    if by_columns and len(shape) > 1:
        raise ValueError("an array in the order of columns")
    return shape, dtype


def _bits(values: Tensor) -> NDArray[np.uint16]:
    return values.contiguous().view(torch.int16).numpy().view("<u2")


def _values(bits: NDArray[np.uint16]) -> Tensor:
    return torch.from_numpy(bits.astype(np.uint16).view(np.int16)).view(torch.bfloat16)
