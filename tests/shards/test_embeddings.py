"""The member that holds embeddings: what is packed comes back, and anything else is refused before it costs memory."""

from __future__ import annotations

import io
import zipfile

import numpy as np
import pytest
import torch

from t2i_experts.shards.embeddings import pack_features, unpack_features
from t2i_experts.shards.format import EncoderRecord
from t2i_experts.types import FeatureBatch, TextFeatures

RECORD = EncoderRecord("T5", "t5", "m", "float32", "f" * 64, max_tokens=8, width=4, pooled_width=3)


def features(*lengths: int, width: int = 4, pooled: int = 3) -> list[TextFeatures]:
    torch.manual_seed(0)
    return [TextFeatures(torch.randn(n, width).bfloat16(), torch.randn(pooled).bfloat16() if pooled else None) for n in lengths]


def npz(compression: int = zipfile.ZIP_STORED, **arrays: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        for name, data in arrays.items():
            archive.writestr(f"{name}.npy", data)
    return out.getvalue()


def npy(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


@pytest.mark.parametrize("lengths", [(8,), (0,), (3, 0, 8, 1), (0, 0)])
@pytest.mark.parametrize("pooled", [3, 0])
def test_every_bit_comes_back(lengths: tuple[int, ...], pooled: int) -> None:
    given = features(*lengths, pooled=pooled)
    given[0].tokens[:1] = torch.tensor([float("inf"), -0.0, 1e-40, 3e38])
    record = EncoderRecord("T5", "t5", "m", "float32", "f", 8, 4, pooled)
    data = pack_features(given)
    assert data == pack_features(given)
    for one, other in zip(given, unpack_features(data, record, len(lengths)), strict=True):
        assert torch.equal(one.tokens.view(torch.int16), other.tokens.view(torch.int16))
        assert (one.pooled is None and other.pooled is None) or torch.equal(one.pooled, other.pooled)  # type: ignore[arg-type]


def test_numpy_alone_can_read_it() -> None:
    given = features(2, 5)
    arrays = np.load(io.BytesIO(pack_features(given)))
    assert arrays["tokens"].dtype == np.uint16 and arrays["tokens"].shape == (7, 4) and arrays["lengths"].tolist() == [2, 5]
    values = (arrays["tokens"].astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_array_equal(values[2:], given[1].tokens.float().numpy())


def claiming(*shape: int) -> bytes:
    """An array whose header claims this shape, and that holds nothing."""
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, {"descr": "<u2", "fortran_order": False, "shape": shape})
    return out.getvalue()


GOOD = {"lengths": npy(np.array([2, 5], "<i4")), "tokens": npy(np.zeros((7, 4), "<u2")), "pooled": npy(np.zeros((2, 3), "<u2"))}


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"", "cannot be read"),
        (b"PK\3\4 and no more", "cannot be read"),
        (pack_features(features(2, 5))[:-30], "cannot be read"),
        (npz(zipfile.ZIP_DEFLATED, **GOOD), "compressed"),
        (npz(**{**GOOD, "tokens": claiming(7, 4)}), "cannot be read"),
        (npz(**{**GOOD, "tokens": claiming(2**45, 4)}), "cannot be read"),
        (npz(**{**GOOD, "tokens": npy(np.array([[object()]], dtype=object))}), "cannot be read"),
        (npz(lengths=GOOD["lengths"], pooled=GOOD["pooled"]), "tokens"),
        (pack_features(features(2, 5, 1)), "3,.* captions where the sample has 2"),
        (pack_features(features(2, 9)), "max_tokens=8"),
        (npz(**{**GOOD, "lengths": npy(np.array([-1, 8], "<i4"))}), "lengths of -1"),
        (npz(**{**GOOD, "lengths": npy(np.array([2, 4], "<i4"))}), r"expected uint16 \(6, 4\)"),
        (npz(**{**GOOD, "tokens": npy(np.zeros((7, 4), "<f2"))}), "float16"),
        (pack_features(features(2, 5, width=5)), r"expected uint16 \(7, 4\)"),
        (pack_features(features(2, 5, pooled=0)), r"expected uint16 \(2, 3\)"),
    ],
)
def test_anything_else_is_refused(data: bytes, complaint: str) -> None:
    assert len(unpack_features(npz(**GOOD), RECORD, 2)) == 2
    with pytest.raises(ValueError, match=rf"t5\.npz.*{complaint}"):
        unpack_features(data, RECORD, 2)


def test_rows_of_a_batch_are_those_captions() -> None:
    given = features(3, 0, 2, 4)
    rows = torch.tensor([3, 0])
    chosen, expected = FeatureBatch.of(given).rows(rows), FeatureBatch.of([given[3], given[0]])
    assert torch.equal(chosen.tokens, expected.tokens) and torch.equal(chosen.lengths, expected.lengths)
    assert torch.equal(chosen.pooled, expected.pooled)  # type: ignore[arg-type]
    assert FeatureBatch.of(given).blank.tolist() == [False, True, False, False]
