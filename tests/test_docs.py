"""The generated parts of the documentation are what their generators make."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from headway.card import catalogue

ROOT = Path(__file__).parents[1]


def generator():
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_readme_table_is_made_from_the_cards():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert generator().readme(text) == text
    assert all(f"`{slug}`" in text for slug in catalogue())


def test_readme_names_the_coverage_that_was_measured():
    coverage = (ROOT / "docs" / "coverage.md").read_text(encoding="utf-8")
    passing = coverage.split("## Causal language models: ")[1].split(" pass")[0]
    assert passing in (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_link_between_pages_leads_somewhere():
    import re

    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks").glob("*.md")]:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def python_blocks():
    import re

    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            yield page.name, block


def test_every_python_example_is_python_and_names_what_there_is():
    import ast
    import importlib
    import textwrap

    found = 0
    for page, block in python_blocks():
        for node in ast.walk(ast.parse(textwrap.dedent(block), filename=page)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "headway":
                module = importlib.import_module(node.module)
                missing = [name.name for name in node.names if not hasattr(module, name.name)]
                assert not missing, f"{page}: {node.module} has no {missing}"
                found += 1
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "headway":
                assert hasattr(importlib.import_module("headway"), node.attr), f"{page}: headway.{node.attr}"
    assert found > 20
