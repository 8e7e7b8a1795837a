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
