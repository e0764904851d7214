"""What is computed on, and in, when the user does not say."""

from __future__ import annotations

import pytest
import torch

from t2i_experts.cascade.device import default_dtype


@pytest.mark.parametrize(
    ("device", "capabilities", "dtype"),
    [
        ("cuda", {}, torch.bfloat16),
        ("mps", {}, torch.float32),
        ("cpu", {"avx512_bf16": True}, torch.bfloat16),
        ("cpu", {"avx512_f": True, "avx512_bf16": False, "amx_bf16": True}, torch.bfloat16),
        ("cpu", {"avx512_f": True, "avx512_bf16": False, "amx_bf16": False}, torch.float32),
        ("cpu", {}, torch.float32),
    ],
)
def test_bfloat16_where_it_is_multiplied_in(
    device: str, capabilities: dict[str, bool], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert default_dtype(torch.device(device)) == dtype
