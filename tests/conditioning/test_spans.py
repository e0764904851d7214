from __future__ import annotations

import time
from itertools import pairwise

from open_clip.tokenizer import get_clean_fn

from t2i_experts.conditioning.spans import cleaned_spans, trimmed

clean = get_clean_fn("lower")


def test_each_cleaned_character_comes_from_text_that_cleans_to_it(nasty: str) -> None:
    cleaned = clean(nasty)
    spans = cleaned_spans(nasty, cleaned)
    assert len(spans) == len(cleaned)
    for character, (start, end) in zip(cleaned, spans, strict=True):
        assert 0 <= start < end <= len(nasty)
        if character == " ":
            assert clean(nasty[start:end]) == ""
        else:
            assert character in clean(nasty[start:end]).replace("σ", "ς") + clean(nasty[start:end])
    assert all(a[0] <= b[0] and a[1] <= b[1] for a, b in pairwise(spans))


def test_characters_are_followed_one_by_one_and_not_by_the_word() -> None:
    def behind(prompt: str, word: str) -> str:
        cleaned = clean(prompt)
        spans = cleaned_spans(prompt, cleaned)
        at = cleaned.index(word)
        return prompt[spans[at][0] : spans[at + len(word) - 1][1]]

    assert behind("Fish &amp; “Chips”", "chips") == "Chips"
    assert behind("Fish &amp; “Chips”", "&") == "&amp;"
    assert behind("&amp;lt;b&amp;gt; red", "<") == "&amp;lt;"
    assert behind("ﬁne wine", "fi") == "ﬁ"
    assert behind("ﬁne wine", "ne") == "ne"
    assert behind("one   TWO\n three", "two") == "TWO"
    assert behind("cafe\u0301 noir", "café") == "cafe\u0301"
    assert behind("İstanbul", "stan") == "stan"
    assert behind("âœ” schÃ¶n red apple", "red apple") == "red apple"
    assert behind("âœ” schÃ¶n red apple", "schön") == "schÃ¶n"


def test_text_that_was_cleaned_otherwise_is_aligned() -> None:
    prompt = "A Red cube, blue Apple!"
    spans = cleaned_spans(prompt, "a red cube blue apple")
    assert [prompt[start:end] for start, end in spans[6:15]] == list("cube blue")


def test_a_very_long_prompt_takes_little_time() -> None:
    prompt = "“the café” &amp; a \u2028 Ã¶ ﬁne red apple < 3 " * 250
    started = time.perf_counter()
    assert len(cleaned_spans(prompt, clean(prompt))) == len(clean(prompt))
    assert time.perf_counter() - started < 5


def test_trimmed_spans_hold_no_white_space_at_their_ends() -> None:
    assert trimmed("a  b ", (1, 5)) == (3, 4)
    assert trimmed("a   b", (1, 4)) == (4, 4)
    assert trimmed("ab", (1, 1)) == (1, 1)
