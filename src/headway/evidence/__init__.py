"""Evidence: recipes measure a paper's claims, shared code judges them, pages are made from the stored runs alone.

from headway.evidence import Claim, Measurement, PaperValue, Recipe, at_least, prove
"""

from __future__ import annotations

from headway.evidence.claims import Claim, EditedRecordError, PaperValue
from headway.evidence.criteria import (
    Criterion,
    Measurement,
    Verdict,
    all_of,
    any_of,
    at_least,
    at_most,
    between,
    equals,
    interval_excludes,
    rank_correlation_at_least,
    ratio_at_least,
    ratio_at_most,
)
from headway.evidence.recipe import SIZES, Context, NotRunnableError, Recipe, load_recipe
from headway.evidence.render import render_html, render_markdown, write_evidence
from headway.evidence.run import Run, prove, record_run

__all__ = [
    "SIZES",
    "Claim",
    "Context",
    "Criterion",
    "EditedRecordError",
    "Measurement",
    "NotRunnableError",
    "PaperValue",
    "Recipe",
    "Run",
    "Verdict",
    "all_of",
    "any_of",
    "at_least",
    "at_most",
    "between",
    "equals",
    "interval_excludes",
    "load_recipe",
    "prove",
    "rank_correlation_at_least",
    "ratio_at_least",
    "ratio_at_most",
    "record_run",
    "render_html",
    "render_markdown",
    "write_evidence",
]
