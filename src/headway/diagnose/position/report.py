"""The page of `headway diagnose position`: scores by place and length, the index beside chance, answers that were
moved, and saliency. Its shell is `headway.pages`."""

from __future__ import annotations

from typing import Any

from headway.diagnose.position.result import Position, Retriever
from headway.pages.plain import rounded
from headway.pages.shell import flat, model_parts, provenance, render_page

SCRIPTS = ("position.js",)


def render(found: Position) -> str:
    """The page as one self-contained HTML file, without any network access."""
    run = {k: v for k, v in found.run.items() if k != "settings"}
    sections = [("places", "Score by place"), ("index", "Sensitivity and chance")]
    if any(one.moved for one in found.retrievers):
        sections.append(("moved", "The same answer moved"))
    if found.saliency:
        sections.append(("saliency", "Where the score listens"))
    queries = found.retrievers[0].overall["queries"]
    return render_page(
        "headway.diagnose.position",
        "position.html.j2",
        styles=(),
        scripts=SCRIPTS,
        data=payload(found),
        verb="diagnose position",
        heading=str(found.model["name"]),
        title=f"{found.model['name']}: position sensitivity",
        subtitle=" · ".join(
            [*model_parts(found.model), f"{queries:,} queries, {found.run.get('documents', 0):,} documents"]
        ),
        provenance=provenance(found.run),
        findings=found.findings,
        warnings=found.warnings,
        sections=sections,
        facts=[
            ("Model", list(flat({k: v for k, v in found.model.items() if v is not None}))),
            ("Run", list(flat(run))),
            ("Settings", list(flat(found.run.get("settings", {})))),
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
