"""From a cleaned text back to the characters that the user typed.

CLIP's cleaning (ftfy, HTML entities twice, white space, lower case) changes lengths, and whoever paints with words names characters
of the prompt. Each step of the cleaning is followed character by character where it works on small pieces of text independently;
where it does not (mojibake repaired over a whole line), difflib aligns the words, then the characters of the words that differ.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Sequence
from difflib import SequenceMatcher

from t2i_experts.types import Span

_WORDS = re.compile(r"\s*\S+|\s+")
_CHARACTERS = re.compile(r"&#?\w{1,32};?|\r\n|.", re.DOTALL)  # an HTML entity is one piece
_DIFF_LIMIT = 250_000  # product of lengths up to which difflib compares characters: its worst case is quadratic and worse


def cleaned_spans(prompt: str, cleaned: str) -> list[Span]:
    """For each character of `cleaned`, the range of characters of `prompt` that it stands for.

    cleaned: open_clip's cleaning (`clean="lower"`) of `prompt`; any other text is aligned too, with difflib alone.
    Ranges never go backwards. A character that was expanded, and each character that it became, share one range.
    """
    import ftfy

    text, spans = prompt, [(i, i + 1) for i in range(len(prompt))]
    for step in (ftfy.fix_text, html.unescape, html.unescape):
        text, spans = _follow(step, text, spans)
    text, spans = _single_spaces(text, spans)
    spans = [span for character, span in zip(text, spans, strict=True) for _ in character.lower()]
    if text.lower() == cleaned:
        return spans
    return _aligned(prompt, cleaned)


def covering(spans: Sequence[Span]) -> Span:
    """The range from the first start to the last end of ordered spans, of which there must be one."""
    return spans[0][0], spans[-1][1]


def trimmed(prompt: str, span: Span) -> Span:
    """The span without the white space at its ends; (end, end) if nothing else is in it."""
    start, end = span
    while start < end and prompt[start].isspace():
        start += 1
    while start < end and prompt[end - 1].isspace():
        end -= 1
    return start, end


def _follow(step: Callable[[str], str], text: str, spans: list[Span]) -> tuple[str, list[Span]]:
    """One step of the cleaning, and the spans of the characters of its result."""
    result = step(text)
    if result == text:
        return text, spans
    words = _WORDS.findall(text)
    changed = [step(word) for word in words]
    local = _by_words(step, words, changed) if "".join(changed) == result else _aligned(text, result)
    return result, [_composed(spans, span) for span in local]


def _composed(spans: Sequence[Span], span: Span) -> Span:
    """The range of the prompt behind a range of characters whose own spans are given."""
    start, end = span
    if start < end:
        return covering(spans[start:end])
    at = spans[start][0] if start < len(spans) else (spans[-1][1] if spans else 0)
    return at, at


def _by_words(step: Callable[[str], str], words: Sequence[str], changed: Sequence[str]) -> list[Span]:
    """Spans when the step works on each word by itself: character by character in the words it changed, if that gives the same."""
    spans: list[Span] = []
    start = 0
    for before, after in zip(words, changed, strict=True):
        local: list[Span] = []
        if before == after:
            local = [(i, i + 1) for i in range(len(before))]
        else:
            pieces = list(_CHARACTERS.finditer(before))
            became = [step(piece.group()) for piece in pieces]
            if "".join(became) == after:
                for piece, characters in zip(pieces, became, strict=True):
                    local += [piece.span()] * len(characters)
            else:
                local = _diff(before, after)
        spans += [(start + a, start + b) for a, b in local]
        start += len(before)
    return spans


def _single_spaces(text: str, spans: list[Span]) -> tuple[str, list[Span]]:
    """`" ".join(text.split())`, where a space stands for all the white space that it replaces."""
    characters: list[str] = []
    kept: list[Span] = []
    previous_end = 0
    for word in re.finditer(r"\S+", text):
        if characters:
            characters.append(" ")
            kept.append(covering(spans[previous_end : word.start()]))
        characters += word.group()
        kept += spans[word.start() : word.end()]
        previous_end = word.end()
    return "".join(characters), kept


def _aligned(source: str, target: str) -> list[Span]:
    """Spans in `source` for the characters of `target`: words that both have, then characters inside the stretches that differ."""
    a, b = _WORDS.findall(source), _WORDS.findall(target)
    starts = [0]
    for word in a:
        starts.append(starts[-1] + len(word))
    spans: list[Span] = []
    for tag, i, j, k, m in SequenceMatcher(None, a, b).get_opcodes():
        before, after = source[starts[i] : starts[j]], "".join(b[k:m])
        if tag == "equal":
            local = [(n, n + 1) for n in range(len(before))]
        else:
            local = _diff(before, after)
        spans += [(starts[i] + start, starts[i] + end) for start, end in local]
    return spans


def _diff(before: str, after: str) -> list[Span]:
    """Spans in `before` for the characters of `after`, by difflib; a stretch that was replaced belongs to all its replacement."""
    if len(before) * len(after) > _DIFF_LIMIT:
        return [(0, len(before))] * len(after)
    spans: list[Span] = []
    for tag, i, j, k, m in SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
        spans += [(i + n, i + n + 1) for n in range(j - i)] if tag == "equal" else [(i, j)] * (m - k)
    return spans
