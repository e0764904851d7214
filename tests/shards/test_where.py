"""`--where`: what an expression keeps, and that nothing but such an expression is taken, with an error that points at the place."""

from __future__ import annotations

from typing import Any

import pytest

from t2i_experts.shards.where import Incomparable, Where

RECORD: dict[str, Any] = {
    "similarity": 0.31,
    "aesthetic": "5.5",  # as a CSV has it
    "width": 640,
    "height": "480",
    "license": "cc-by",
    "tags": ["cat", "7"],
    "nsfw": False,
    "code": "007",
    "猫": 1,
}


@pytest.mark.parametrize(
    ("expression", "kept"),
    [
        ("similarity > 0.28 and aesthetic > 5", True),
        ("similarity > 0.28 and aesthetic > 5.5", False),
        ("similarity > 0.4 or aesthetic >= 5.5", True),
        ("not (similarity > 0.4 or aesthetic > 9) and width == 640", True),
        ("not similarity > 0.28", False),
        ("0.3 < similarity <= 0.31", True),
        ("0.3 < similarity < 0.31", False),
        ("height < width", True),  # text and number
        ("aesthetic < height", True),  # two texts of the record: "5.5" < "480" as texts would be false
        ("height == 480 and height == 4.8e2 and height == '480' and height != '480.0'", True),
        ("code == 7 and code == '007' and code != '7'", True),
        ("similarity > -1 and similarity > -0.5", True),
        ("license in ('cc0', 'cc-by')", True),
        ("license not in ['cc0', 'cc-by']", False),
        ("height in (480, 512)", True),
        ("'cat' in tags and 7 in tags and 'dog' not in tags", True),
        ("'by' in license and license < 'cd'", True),
        ("license == 5", False),
        ("license != 5", True),
        ("nsfw == False", True),
        ("猫 == 1 and not 猫 > 1", True),
        ("  width > 600 \n and height > 400  ", True),
    ],
)
def test_what_is_kept(expression: str, kept: bool) -> None:
    where = Where(expression)
    assert where.lacking(RECORD) is None
    assert where(RECORD) is kept


def test_fields_and_what_lacks_one() -> None:
    where = Where("b > 1 and (a > 1 or b in (3, 4)) and c == 'x'")
    assert where.fields == ("b", "a", "c")
    assert where.lacking({"a": 0, "b": False, "c": "x"}) is None
    assert where.lacking({"a": 1, "b": 1}) == "c"
    assert where.lacking({"a": None, "b": 1, "c": "x"}) == "a"
    assert where.lacking({"a": 1, "b": " ", "c": "x"}) == "b"


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("license > 5", "license cannot be compared with 5"),
        ("5 > license", "5 cannot be compared with license"),
        ("tags > 5", "tags cannot be compared"),
        ("width > 'big'", "width cannot be compared with 'big'"),
        ("width > 5 or license > 5", "license cannot"),  # whatever the order of the parts
        ("5 in license", "5 is no text"),
        ("'a' in width", "width is neither"),
    ],
)
def test_incomparable_values_are_no_answer(expression: str, message: str) -> None:
    with pytest.raises(Incomparable, match=message):
        Where(expression)(RECORD)


@pytest.mark.parametrize(
    ("expression", "message", "pointed"),
    [
        ("similarity > 0.28 and aesthetic", "alone is no condition", "aesthetic"),
        ("similarity = 5", "invalid syntax; .* ==", "="),
        ("a > 1 && b > 2", "invalid syntax", "&"),
        ("", "invalid syntax", None),
        ("a > ", "invalid syntax", None),
        ("__import__('os').system('true') == 0", "neither a field", "__import__('os').system('true')"),
        ("a > 1 and print(1)", "no condition", "print(1)"),
        ("a.b > 1", "neither a field", "a.b"),
        ("a[0] > 1", "neither a field", "a[0]"),
        ("größe + 1 > 1", "neither a field", "größe + 1"),
        ("猫 > 1 and -b > 1", "neither a field", "-b"),
        ("(lambda: 1) == 1", "neither a field", "lambda: 1"),
        ("a == [x for x in y]", "neither a field", "[x for x in y]"),
        ("a == None", "neither a field", "None"),
        ("a is 1", "where this has `is`", "a is 1"),
        ("a in (b, 1)", "write strings in quotes", "b"),
        ("a in ()", "not empty", "()"),
        ("a == (1, 2)", "behind `in` only", "(1, 2)"),
        ("a in 5", "behind `in` stands", "5"),
        ("a > 1j", "neither a field", "1j"),
        ("a > b'x'", "neither a field", "b'x'"),
        ("True", "no condition", "True"),
        ("a > 1 if b > 1 else c > 1", "no condition", "a > 1 if b > 1 else c > 1"),
        ("(a := 5) > 1", "neither a field", "a := 5"),
        ("f'{a}' == 'x'", "neither a field", "f'{a}'"),
    ],
)
def test_anything_else_is_refused_at_its_place(expression: str, message: str, pointed: str | None) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        Where(expression)
    first, text, marks = str(caught.value).split("\n")
    assert first.startswith("--where: ") and text == f"  {expression.strip()}"
    if pointed is not None:
        assert text[marks.index("^") : marks.rindex("^") + 1] == pointed


def test_a_deep_expression_is_an_error_of_ours() -> None:
    for deep in ("(" * 5000 + "a > 1" + ")" * 5000, "not " * 50_000 + "a > 1"):
        with pytest.raises(ValueError, match="--where"):
            Where(deep)


def test_an_unknown_field_is_pointed_at_and_the_known_ones_listed() -> None:
    where = Where("similarity > 0.28 and aestetic > 5")
    where.check_fields(["aestetic", "similarity"])
    with pytest.raises(ValueError) as caught:
        where.check_fields(["width", "similarity", "aesthetic"])
    first, text, marks = str(caught.value).split("\n")
    assert "'aestetic'; did you mean 'aesthetic'? the fields are: aesthetic, similarity, width" in first
    assert text[marks.index("^") : marks.rindex("^") + 1] == "aestetic"
    with pytest.raises(ValueError, match=r"the fields are: none; .*IMAGE\.json"):
        where.check_fields([])
