"""`--where "similarity > 0.28 and aesthetic > 5"`: which records to keep, by their metadata fields.

The expression has Python's grammar and is parsed by `ast`, but never run: only comparisons (< <= > >= == !=, in, not in), and, or, not,
parentheses, numbers, strings, True, False, lists of these, and fields by name are known. Text that looks like a number, as all cells of
a CSV file are, is that number, unless it is compared with a string of the expression.
"""

from __future__ import annotations

import ast
import difflib
import operator
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn

ALLOWED = "fields by name, numbers, strings, < <= > >= == !=, in, not in, and, or, not, and parentheses"

_WHOLE = re.compile(r"[+-]?[0-9]+")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_ORDER: Mapping[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}


class Incomparable(Exception):
    """A record's field cannot be compared as the expression wants; the message says which and why."""


class Where:
    """A parsed filter. fields: the names that it compares, in the order in which they first stand in it."""

    def __init__(self, text: str) -> None:
        """Raises ValueError that points at the place for anything but such an expression."""
        self.text = " ".join(text.replace("\0", " ").splitlines()).strip()
        try:
            with warnings.catch_warnings():  # about a literal that is compared with `is`, for which there is an error of ours
                warnings.simplefilter("ignore")
                self._root = ast.parse(self.text, mode="eval").body
                self._check_condition(self._root)
        except SyntaxError as error:
            start = max(0, min((error.offset or 1) - 1, len(self.text)))
            self._refuse(f"{error.msg}; allowed: {ALLOWED}", start, start + 1)
        except (RecursionError, MemoryError):
            raise ValueError("--where is nested too deeply") from None
        names = [node for node in ast.walk(self._root) if isinstance(node, ast.Name)]
        self._names = sorted(names, key=lambda name: (name.lineno, name.col_offset))
        self.fields = tuple(dict.fromkeys(name.id for name in self._names))

    def lacking(self, metadata: Mapping[str, Any]) -> str | None:
        """The first of the expression's fields that a record does not have, or has as null or as blank text; None if it has all."""
        return next((field for field in self.fields if _absent(metadata.get(field))), None)

    def __call__(self, metadata: Mapping[str, Any]) -> bool:
        """Whether to keep a record that lacks none of the fields. Raises `Incomparable`."""
        return self._holds(self._root, metadata)

    def check_fields(self, known: Iterable[str]) -> None:
        """Raises ValueError that points at the first field that is not among those that the records have, and lists these."""
        names = sorted(set(known))
        for name in self._names:
            if name.id not in names:
                near = difflib.get_close_matches(name.id, names, n=1)
                hint = f"did you mean {near[0]!r}? " if near else ""
                fields = ", ".join(names) or "none; a folder's pictures have fields where IMAGE.json lies beside them"
                self._refuse_node(f"no record has the field {name.id!r}; {hint}the fields are: {fields}", name)

    def _check_condition(self, node: ast.expr) -> None:
        """Something that is true or false: a comparison, or and, or, not of such."""
        match node:
            case ast.BoolOp(values=values):
                for value in values:
                    self._check_condition(value)
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                self._check_condition(operand)
            case ast.Compare(left=left, ops=ops, comparators=comparators):
                operands = [left, *comparators]
                for i, op in enumerate(ops):
                    if isinstance(op, (ast.Is, ast.IsNot)):
                        self._refuse_node("write == or != where this has `is`", node)
                    self._check_value(operands[i])
                    self._check_value(operands[i + 1], several=isinstance(op, (ast.In, ast.NotIn)))
            case ast.Name(id=name):
                self._refuse_node(f"the field {name!r} alone is no condition; compare it, as in `{name} > 5` or `{name} == True`", node)
            case _:
                self._refuse_node(f"this is no condition; allowed: {ALLOWED}", node)

    def _check_value(self, node: ast.expr, *, several: bool = False) -> None:
        """A field, a number, a string, True or False; or, with `several`, a list of them but for fields."""
        if isinstance(node, ast.Name):
            return
        if isinstance(node, (ast.Tuple, ast.List, ast.Set)):
            if not several or not node.elts:
                self._refuse_node("a list stands behind `in` only, and is not empty", node)
            for element in node.elts:
                if isinstance(element, ast.Name) or not _is_literal(element):
                    self._refuse_node("a list holds numbers and strings; write strings in quotes", element)
        elif not _is_literal(node):
            self._refuse_node(f"this is neither a field, a number nor a string; allowed: {ALLOWED}", node)
        elif several and not isinstance(_literal(node), str):
            self._refuse_node("behind `in` stands a list, as in `license in ('cc0', 'cc-by')`, a string or a field", node)

    def _holds(self, node: ast.expr, metadata: Mapping[str, Any]) -> bool:
        # Every part is evaluated, so that it does not depend on the order of the parts which records are incomparable.
        match node:
            case ast.BoolOp(op=op, values=values):
                parts = [self._holds(value, metadata) for value in values]
                return all(parts) if isinstance(op, ast.And) else any(parts)
            case ast.UnaryOp(operand=operand):
                return not self._holds(operand, metadata)
            case ast.Compare(left=left, ops=ops, comparators=comparators):
                operands = [left, *comparators]
                parts = [_compare(op, operands[i], operands[i + 1], metadata) for i, op in enumerate(ops)]
                return all(parts)
        raise AssertionError(f"{type(node).__name__} passed the check")

    def _refuse_node(self, message: str, node: ast.expr) -> NoReturn:
        line = self.text.encode()  # `ast` counts bytes
        start, end = (len(line[:column].decode()) for column in (node.col_offset, node.end_col_offset or node.col_offset + 1))
        self._refuse(message, start, end)

    def _refuse(self, message: str, start: int, end: int) -> NoReturn:
        raise ValueError(f"--where: {message}\n  {self.text}\n  {' ' * start}{'^' * max(1, end - start)}")


def _is_literal(node: ast.expr) -> bool:
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
        return isinstance(node.operand, ast.Constant) and type(node.operand.value) in (int, float)
    return isinstance(node, ast.Constant) and type(node.value) in (int, float, str, bool)


def _literal(node: ast.expr) -> Any:
    return ast.literal_eval(node)


def _absent(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _compare(op: ast.cmpop, left: ast.expr, right: ast.expr, metadata: Mapping[str, Any]) -> bool:
    a, b = (metadata[node.id] if isinstance(node, ast.Name) else _literal(node) for node in (left, right))
    texts = not (isinstance(left, ast.Name) and isinstance(right, ast.Name))  # two texts stay texts if one is the expression's own
    match op:
        case ast.Eq():
            return _equal(a, b, texts)
        case ast.NotEq():
            return not _equal(a, b, texts)
        case ast.In() | ast.NotIn():
            if isinstance(b, str):
                if not isinstance(a, str):
                    raise Incomparable(f"{_named(left)} is no text that could stand in {_named(right)}")
                found = a in b
            elif isinstance(b, (list, tuple, set)):
                found = any(_equal(a, element, True) for element in b)
            else:
                raise Incomparable(f"{_named(right)} is neither a list nor text")
            return found == isinstance(op, ast.In)
    a, b = _alike(a, b, texts)
    if not (isinstance(a, str) and isinstance(b, str)) and not all(isinstance(value, (int, float)) for value in (a, b)):
        raise Incomparable(f"{_named(left)} cannot be compared with {_named(right)}")
    return _ORDER[type(op)](a, b)


def _equal(a: Any, b: Any, texts: bool) -> bool:
    a, b = _alike(a, b, texts)
    return bool(a == b)


def _alike(a: Any, b: Any, texts: bool) -> tuple[Any, Any]:
    """The two values, with text that looks like a number as that number, unless both are texts and `texts` says that they stay so."""
    if isinstance(a, str) and isinstance(b, str):
        numbers = (None, None) if texts else (_number(a), _number(b))
        return (a, b) if None in numbers else numbers
    return tuple(value if not isinstance(value, str) or (n := _number(value)) is None else n for value in (a, b))  # type: ignore[return-value]


def _number(text: str) -> int | float | None:
    text = text.strip()
    if _WHOLE.fullmatch(text) and len(text) < 4000:  # Python refuses to read more digits
        return int(text)
    return float(text) if _NUMBER.fullmatch(text) else None


def _named(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else ast.unparse(node)
