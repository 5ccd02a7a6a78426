"""How error messages are written (CONTRIBUTING.md): what can be checked without running the code."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = [
    path
    for folder in ("memlong", "backends", "plugins", "examples", "bench")
    for path in (ROOT / folder).rglob("*.py")
]


def tails(text: ast.expr | None) -> Iterator[str]:
    """Yield the literal ends that an expression's text may have."""
    match text:
        case ast.Constant(value=str() as end):
            yield end
        case ast.JoinedStr(values=[*_, last]):
            yield from tails(last)
        case ast.BinOp(op=ast.Add(), right=right):
            yield from tails(right)
        case ast.IfExp(body=body, orelse=orelse):
            yield from tails(body)
            yield from tails(orelse)


def messages(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield the line and the literal end of each message of an exception or warning."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func).rpartition(".")[2]
            if name.endswith(("Error", "Exit", "Parameter", "Warning", "warn")):
                yield from ((argument.lineno, end) for argument in node.args for end in tails(argument))
        elif isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            yield from ((argument.lineno, end) for argument in node.exc.args for end in tails(argument))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_message_ends_with_a_period(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert not [line for line, end in messages(tree) if end.endswith(".")]


def test_a_period_is_found():
    tree = ast.parse(
        'raise ValueError(f"{x}: a, " "b" + ("." if y else ""))\nwarn(f"{x}.")\nraise odd("fine")'
    )
    assert {line for line, end in messages(tree) if end.endswith(".")} == {1, 2}
