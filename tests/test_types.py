"""Conditionings keep their rows apart: what is joined, dropped, sliced or repeated is what was put in, and nothing else."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from t2i_experts.types import Conditioning, Embedding


def embedding(batch: int, length: int, *, width: int = 4, pooled: int | None = 3, seed: int = 0) -> Embedding:
    """Random features; row i has its first 1 + i % length tokens real, and zeros after them."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(length)[None] <= torch.arange(batch)[:, None] % length
    tokens = torch.randn(batch, length, width, generator=generator).masked_fill(~mask[..., None], 0)
    return Embedding(tokens, mask, None if pooled is None else torch.randn(batch, pooled, generator=generator))


def conditioning(batch: int, length: int = 3, seed: int = 0) -> Conditioning:
    return Conditioning({"t5": embedding(batch, length, pooled=None, seed=seed), "clip": embedding(batch, 2, seed=seed + 1)})


def tensors(c: Conditioning) -> list[Tensor]:
    found: list[Tensor] = []
    c.map(lambda tensor: found.append(tensor) or tensor)  # type: ignore[func-returns-value]
    return found


@pytest.mark.parametrize("pooled_width", [0, 5])
def test_a_null_row_is_one_valid_zero_token(pooled_width: int) -> None:
    null = Embedding.null(2, 3, 4, pooled_width)
    assert null.mask.tolist() == [[True, False, False]] * 2
    assert null.tokens.shape == (2, 3, 4)
    assert not null.tokens.any()
    if pooled_width:
        assert null.pooled is not None
        assert torch.equal(null.pooled, torch.zeros(2, 5))
    else:
        assert null.pooled is None, "an encoder without a pooled vector has none for null rows either"


def test_null_rows_of_any_length_join_to_the_same() -> None:
    parts = [Conditioning({"t5": Embedding.null(1, length, 4, 3)}) for length in (1, 6)]
    first, second = (Conditioning.cat(parts).rows(i, i + 1) for i in (0, 1))
    assert all(torch.equal(*pair) for pair in zip(tensors(first), tensors(second), strict=True))


def test_cat_pads_the_shorter_with_masked_zeros_and_its_rows_are_the_parts() -> None:
    parts = [conditioning(2, 3), conditioning(1, 1, seed=5), conditioning(3, 4, seed=9)]
    joined = Conditioning.cat(parts)
    assert joined.batch == 6
    t5 = joined.embeddings["t5"]
    assert t5.tokens.shape == (6, 4, 4)
    assert t5.mask.dtype == torch.bool
    assert t5.pooled is None
    assert not t5.tokens[~t5.mask].any()
    start = 0
    for part in parts:
        rows, own = joined.rows(start, start + part.batch).embeddings, part.embeddings
        length = own["t5"].mask.shape[1]
        assert torch.equal(rows["t5"].tokens[:, :length], own["t5"].tokens)
        assert torch.equal(rows["t5"].mask[:, :length], own["t5"].mask)
        assert not rows["t5"].mask[:, length:].any()
        for field in ("tokens", "mask", "pooled"):
            assert torch.equal(getattr(rows["clip"], field), getattr(own["clip"], field))
        start += part.batch


def test_cat_goes_by_name_and_not_by_order() -> None:
    first, second = conditioning(1), conditioning(1, seed=7)
    turned = Conditioning(dict(reversed(second.embeddings.items())))
    joined = Conditioning.cat([first, turned])
    assert list(joined.embeddings) == ["t5", "clip"]
    assert torch.equal(joined.embeddings["t5"].tokens[1:], second.embeddings["t5"].tokens)


def test_cat_refuses_parts_that_do_not_fit() -> None:
    c = conditioning(1)
    with pytest.raises(ValueError, match="different encoders"):
        Conditioning.cat([c, Conditioning({"t5": c.embeddings["t5"]})])
    with pytest.raises(ValueError, match="join first, then prepare"):
        Conditioning.cat([c, Conditioning(c.embeddings, {"context": torch.ones(1, 1)})])
    with pytest.raises(ValueError, match="only some have a pooled vector of 'clip'"):
        Conditioning.cat([c, Conditioning({**c.embeddings, "clip": embedding(1, 2, pooled=None)})])


def test_rows_and_expand_are_views_of_everything() -> None:
    c = Conditioning(conditioning(3).embeddings, {"context": torch.randn(3, 5)})
    middle = c.rows(1, 2)
    many = middle.expand(4)
    assert (middle.batch, many.batch) == (1, 4)
    for whole, one, repeated in zip(tensors(c), tensors(middle), tensors(many), strict=True):
        assert torch.equal(one, whole[1:2])
        assert torch.equal(repeated, whole[1:2].repeat(4, *[1] * (whole.ndim - 1)))
        storages = {tensor.untyped_storage().data_ptr() for tensor in (whole, one, repeated)}
        assert len(storages) == 1, "copied"


def test_only_one_row_can_be_expanded() -> None:
    with pytest.raises(RuntimeError, match="expand"):
        conditioning(2).expand(4)


def test_what_was_asked_for_before_is_the_same_object() -> None:
    c = conditioning(3)
    assert c.rows(0, 2) is c.rows(0, 2) is not c.rows(0, 3)
    made = [c.once("a", lambda: conditioning(1)) for _ in range(2)]
    assert made[0] is made[1] is not c.once("b", lambda: conditioning(1))
    assert c.rows(0, 2).once("a", lambda: conditioning(1)) is not made[0]
    assert replace(c).rows(0, 2) is not c.rows(0, 2), "another conditioning, which knows nothing of it"
    assert replace(c, each_for_itself=True).rows(0, 1).expand(2).each_for_itself and not c.rows(0, 1).each_for_itself
