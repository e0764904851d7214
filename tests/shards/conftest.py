"""Pictures and shard folders, made in tmp_path."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from t2i_experts.shards.writer import ShardWriter

Encode = Callable[..., bytes]
MakeShards = Callable[..., Path]
WriteTar = Callable[..., Path]


@pytest.fixture
def encode() -> Encode:
    """encode(seed, size=(w, h), kind="PNG", mode="RGB", **options of Pillow's save) -> bytes of a random smooth picture."""

    def make(seed: int, size: tuple[int, int] = (16, 16), kind: str = "PNG", mode: str = "RGB", **options: object) -> bytes:
        coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).convert(mode)
        out = io.BytesIO()
        image.save(out, kind, **options)
        return out.getvalue()

    return make


@pytest.fixture
def make_shards(encode: Encode) -> MakeShards:
    """make_shards(folder, samples, per_shard=5): sample i has 1 + i % 3 captions "i/0", "i/1", ... and the metadata {"i": i}."""

    def make(folder: Path, samples: int, per_shard: int = 5, first: int = 0) -> Path:
        with ShardWriter(folder, samples_per_shard=per_shard) as writer:
            for i in range(first, first + samples):
                writer.write(f"{i:05d}", encode(i), "png", [f"{i}/{j}" for j in range(1 + i % 3)], {"i": i})
        return folder

    return make


@pytest.fixture
def write_tar() -> WriteTar:
    """write_tar(path, members, format=PAX) -> the path of a tar with these (name, bytes), as they come: a sequence, or a dict."""

    def write(path: Path, members: Sequence[tuple[str, bytes]] | Mapping[str, bytes], format: int = tarfile.PAX_FORMAT) -> Path:
        with tarfile.open(path, "w", format=format) as tar:
            for name, data in members.items() if isinstance(members, Mapping) else members:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        return path

    return write
