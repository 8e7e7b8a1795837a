"""Every test that is written is one that runs."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


def decorators_of_classes(source: str) -> list[tuple[str, str]]:
    """(class, decorator) of the test classes of a file, but for marks of pytest, which leave a class a class."""
    return [
        (node.name, ast.unparse(decorator))
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ClassDef) and node.name.startswith("Test")
        for decorator in node.decorator_list
        if not ast.unparse(decorator).startswith("pytest.mark.")
    ]


@pytest.mark.parametrize("path", sorted(TESTS.rglob("test_*.py")), ids=lambda path: str(path.relative_to(TESTS)))
def test_no_class_of_tests_is_made_something_else(path):
    """`@torch.no_grad()` turns a class into a function, and pytest passes over it without a word."""
    assert decorators_of_classes(path.read_text(encoding="utf-8")) == []


def test_a_class_that_is_made_something_else_is_found():
    source = "@torch.no_grad()\nclass TestIt:\n    pass\n\n@pytest.mark.slow\nclass TestOther:\n    pass\n"
    assert decorators_of_classes(source) == [("TestIt", "torch.no_grad()")]
