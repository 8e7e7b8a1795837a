"""The page of `headway diagnose position`: scores by place and length, the index beside chance, answers that were
moved, and saliency. Its shell is `headway.diagnose.page`."""

from __future__ import annotations

from typing import Any

from headway.diagnose.page import diagnosis_page, run_and_settings
from headway.diagnose.position.result import Position, Retriever
from headway.pages.plain import rounded
from headway.pages.shell import flat


def render(found: Position) -> str:
    """The page as one self-contained HTML file, without any network access."""
    sections = [("places", "Score by place"), ("index", "Sensitivity and chance")]
    if any(one.moved for one in found.retrievers):
        sections.append(("moved", "The same answer moved"))
    if found.saliency:
        sections.append(("saliency", "Where the score listens"))
    queries = found.retrievers[0].overall["queries"]
    return diagnosis_page(
        found,
        "position",
        about="position sensitivity",
        counts=[
            f"{queries:,} queries, {found.run.get('documents', 0):,} documents",
            f"lengths in tokens of {found.run.get('tokens counted by') or 'an unnamed tokenizer'}",
        ],
        sections=sections,
        data=payload(found),
        styled=False,
        facts=[
            ("Model", list(flat({k: v for k, v in found.model.items() if v is not None}))),
            *run_and_settings(found),
        ],
    )


def payload(found: Position) -> dict[str, Any]:
    """What the script reads."""
    return rounded(
        {
            "retrievers": [_retriever(one) for one in found.retrievers],
            "saliency": found.saliency,
            "bins": len(found.retrievers[0].overall["means"]),
        }
    )


def _retriever(one: Retriever) -> dict[str, Any]:
    groups = [("all lengths", one.overall), *((name, bucket) for name, bucket in one.buckets.items() if bucket)]
    return {
        "name": one.name,
        "groups": [
            {"name": name, "reading": one.reading.get(name), **{k: v for k, v in group.items() if k != "trend"}}
            for name, group in groups
        ],
        "moved": one.moved,
    }
