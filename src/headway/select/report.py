"""The page of `headway select`: what was kept of every domain, what the scores go with, records at both ends, and how
other heads compare. Its shell is `headway.pages`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from headway.pages.plain import rounded
from headway.pages.shell import flat, model_parts, provenance, render_page
from headway.select.conclusions import percent, signed
from headway.select.result import CorpusSelection, DomainResult

SCRIPTS = ("select.js",)
STYLES = ("select.css",)
#: Domains that the table lists.
LISTED = 200
ENDS = {"high": "Highest", "low": "Lowest"}


def render(found: CorpusSelection) -> str:
    """The page as one self-contained HTML file, without any network access."""
    sections = [("domains", "Domains"), ("sample", "What the score goes with"), ("examples", "Records")]
    if found.head_scores:
        sections.append(("heads", "Retrieval heads"))
    if found.controls:
        sections.append(("controls", "Other heads"))
    size = f"{found.records:,} records, {found.corpus['megabytes']:,} MB in {found.corpus['files']:,} files"
    return render_page(
        "headway.select",
        "select.html.j2",
        styles=STYLES,
        scripts=SCRIPTS,
        data=payload(found),
        verb="select",
        heading=", ".join(found.corpus["given"]),
        title="Selection of a corpus by attention influence",
        subtitle=" · ".join([size, str(found.model["name"]), *model_parts(found.model)]),
        provenance=provenance(found.run),
        findings=found.findings,
        warnings=found.warnings,
        sections=sections,
        facts=[
            ("Run", list(flat(found.run))),
            ("Corpus", list(flat({**found.corpus, "left out": _left_out(found), "files written": found.files}))),
        ],
        domains=[_row(domain) for domain in found.domains[:LISTED]],
        unlisted=max(len(found.domains) - LISTED, 0),
        examples=_examples(found),
        controls=[_control(each) for each in found.controls],
        masked=", ".join(f"{layer}.{head}" for layer, head in found.heads),
    )


def payload(found: CorpusSelection) -> dict[str, Any]:
    """What the scripts read: a row per sampled record, correlations, and the scores of the heads."""
    return rounded(
        {
            "domains": [domain.name for domain in found.domains],
            "sample": found.sample,
            "correlations": found.correlations,
            "head_scores": found.head_scores,
            "heads": found.heads,
        }
    )


def _left_out(found: CorpusSelection) -> dict[str, Any]:
    return {k: v for k, v in found.left_out.items() if isinstance(v, int)}


def _row(domain: DomainResult) -> dict[str, Any]:
    return {
        "name": domain.name,
        "cells": [
            f"{domain.selected:,} of {domain.ranked:,}",
            percent(domain.selected_tokens / domain.tokens) if domain.tokens else "–",
            signed(domain.threshold),
            _both(domain, "influence", signed),
            _both(domain, "length", lambda value: f"{value:,.0f}"),
            _both(domain, "base_loss", lambda value: f"{value:.2f}"),
            _both(domain, "repetition", percent),
        ],
    }


def _both(domain: DomainResult, name: str, words: Any) -> str:
    """A mean of the kept records, and of all."""
    kept, everything = getattr(domain, f"selected_{name}"), getattr(domain, name)
    return f"{words(kept)} / {words(everything)}" if kept == kept else f"– / {words(everything)}"


def _examples(found: CorpusSelection) -> list[dict[str, Any]]:
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for example in found.examples:
        groups.setdefault((example.domain, example.end), []).append(
            {**asdict(example), "influence": signed(example.influence), "repetition": percent(example.repetition)}
        )
    return [{"domain": domain, "end": ENDS[end], "records": each} for (domain, end), each in groups.items()]


def _control(control: dict[str, Any]) -> dict[str, str]:
    value = control["correlation"]
    return {
        "heads": ", ".join(f"{layer}.{head}" for layer, head in control["heads"]),
        "records": f"{control['records']:,}",
        "chosen": signed(control["chosen"]),
        "control": signed(control["control"]),
        "correlation": "–" if value is None or value != value else f"{value:.2f}".replace("-", "−"),
    }
