"""Configs of the tiny encoders, and prompts that break things."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from t2i_experts.config import EncoderConfig

NASTY = [
    "",
    " ",
    "\t\n",
    "a red apple",
    "  A   Red\n\tAPPLE  ",
    "fish &amp; chips &lt;3 &amp;lt;b&amp;gt; &#233; &eacute;",
    "a < b &lt; c &amp; d",
    "“curly” ‘quotes’ and ﬁne ﬂuff",
    "İstanbul ΟΔΟΣ Straße",
    "cafe\u0301 na\u0308ive",
    "âœ” No problems, schÃ¶n",
    "日本語の猫 and 猫",
    "한국어 ㄱㅏ",
    "👩‍👩‍👧 family 🏳️‍🌈 👍🏽",
    "ｆｕｌｌ ｗｉｄｔｈ ㍿ ½",
    "</s> <extra_id_0> <pad> <unk>",
    "before <end_of_text> after <start_of_text> <END_OF_TEXT>",
    "\u200bzero\u200bwidth\ufeff",
    "nul\x00 bell\x07 \x1b[31mred\x1b[0m",
    "half \ud83d surrogate",
    "line\r\nbreak\u2028other",
    "don't we'll I'm it's 1234 !!!???",
    "مرحبا بالعالم שלום",
    "▁ underscore▁",
    "&" * 40 + ";" * 40,
    "word " * 600 + "&amp; “end”",
]


@pytest.fixture(scope="session")
def configs(t5_folder: Path, clip_folder: Path) -> dict[str, EncoderConfig]:
    return {
        "t5": EncoderConfig("t5", str(t5_folder), width=16, max_tokens=32),
        "clip_text": EncoderConfig("clip_text", str(clip_folder), width=16, pooled_width=12, max_tokens=24),
        "clip_image": EncoderConfig("clip_image", str(clip_folder), width=12, pooled_width=12, max_tokens=1),
    }


@pytest.fixture(params=NASTY, ids=range(len(NASTY)))
def nasty(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def nasty_prompts() -> list[str]:
    return list(NASTY)


class NoSync(TorchDispatchMode):
    """Refuses what would make the CPU wait for a GPU: values read back, sizes that depend on values, tensors made from Python's numbers."""

    forbidden = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "lift_fresh")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket.__name__ not in self.forbidden, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.fixture
def no_sync() -> AbstractContextManager[Any]:
    return NoSync()
