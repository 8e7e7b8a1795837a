"""The page of `headway diagnose anchors`: the sentences with their scores, the graph between them, the causal matrix,
and the heads. Its shell is `headway.diagnose.page`."""

from __future__ import annotations

from typing import Any

from headway.diagnose.anchors.findings import METHODS, scores
from headway.diagnose.anchors.result import Anchors, TraceAnchors
from headway.diagnose.page import diagnosis_page
from headway.pages.plain import rounded

TITLES = {"effect": "Effect when hidden", "receiver": "Receiver score", "importance": "Effect on the answer"}


def render(found: Anchors) -> str:
    """The page as one self-contained HTML file, without any network access."""
    count = len(found.traces)
    sentences = sum(len(t.sentences) for t in found.traces)
    sections = [("trace", "Sentences"), ("graph", "Graph"), ("matrix", "Causal matrix")]
    if found.kurtosis:
        sections.append(("heads", "Receiver heads"))
    if found.agreement:
        sections.append(("methods", "Methods compared"))
    return diagnosis_page(
        found,
        "anchors",
        about="thought anchors",
        counts=[f"{count} trace{'s' if count > 1 else ''}, {sentences} sentences"],
        sections=sections,
        data=payload(found),
        traces=[{"name": t.name, "prompt": t.prompt, "sentences": t.sentences} for t in found.traces],
    )


def payload(found: Anchors) -> dict[str, Any]:
    """What the scripts read."""
    return rounded(
        {
            "titles": TITLES,
            "methods": METHODS,
            "traces": [_trace(t) for t in found.traces],
            "kurtosis": found.kurtosis,
            "layers": found.layers or list(range(len(found.kurtosis))),
            "receivers": [[int(layer), int(head), peak] for layer, head, peak in found.receivers],
            "agreement": found.agreement,
            "categories": [[name.replace("_", " "), m] for name, m in found.categories.items()],
        }
    )


def _trace(trace: TraceAnchors) -> dict[str, Any]:
    return {
        "name": trace.name,
        "prompt": trace.prompt,
        "sentences": trace.sentences,
        "categories": [c.replace("_", " ") for c in trace.categories],
        "tokens": trace.tokens,
        "matrix": trace.matrix,
        "edges": trace.edges,
        "scores": scores(trace),
        "null": trace.receiver_null,
        "importance": {str(one["sentence"]): one for one in trace.importance},
    }
