"""The page of `headway diagnose agreement`: texts with the tokens that each method marks, the table of agreement, and
whether methods are right. Its shell is `headway.diagnose.page`."""

from __future__ import annotations

from typing import Any

import numpy as np

from headway.diagnose.agreement.result import Agreement
from headway.diagnose.page import diagnosis_page
from headway.pages.plain import rounded
from headway.pages.shell import flat


def render(found: Agreement) -> str:
    """The page as one self-contained HTML file, without any network access."""
    run = {k: v for k, v in found.run.items() if k != "settings"}
    settings = dict(found.run.get("settings", {}))
    settings = {**settings.pop("settings", {}), **settings}
    sections = [("texts", "Texts"), ("agreement", "Agreement"), ("right", "Who is right"), ("controls", "Controls")]
    if found.people:
        sections.append(("people", "People"))
    count = len(found.texts)
    told = {k: v for k, v in found.model.items() if k in ("kind", "accuracy", "held_out")}
    return diagnosis_page(
        found,
        "agreement",
        about="agreement of explanations",
        counts=[f"{count} text{'s' if count > 1 else ''}, {len(found.methods)} methods"],
        sections=sections,
        data=payload(found),
        facts=[("Run", [*flat(run), *flat(told)]), ("Settings", list(flat(settings)))],
        texts=[{"name": t["name"], "text": " ".join(t["tokens"])} for t in found.texts],
    )


def payload(found: Agreement) -> dict[str, Any]:
    """What the scripts read. Scores are shares of the largest of their text among the tokens that are ranked."""
    names = [m["name"] for m in found.methods]
    place = {name: i for i, name in enumerate(names)}
    table: dict[str, list[list[float | None]]] = {
        kind: [[None] * len(names) for _ in names] for kind in ("tau", "top", "corrected")
    }
    for pair in found.pairs:
        i, j = place[pair["first"]], place[pair["second"]]
        for kind in table:
            value = pair[kind] if kind == "corrected" else (pair[kind] or {}).get("value")
            table[kind][i][j] = table[kind][j][i] = value
    for m in found.methods:
        if m["ceiling"] is not None:
            table["tau"][place[m["name"]]][place[m["name"]]] = m["ceiling"]["value"]
    special = found.run["settings"]["special"]
    return rounded(
        {
            "methods": found.methods,
            "table": table,
            "measure": found.run["settings"]["measure"],
            "controls": found.controls,
            "people": found.people,
            "texts": [_text(t, include_special=special == "include") for t in found.texts],
        }
    )


def _text(text: dict[str, Any], *, include_special: bool) -> dict[str, Any]:
    out = np.zeros(len(text["tokens"]), bool) if include_special else np.array(text["special"], bool)
    shares = {}
    for name, scores in text["scores"].items():
        values = np.array(scores, float)
        most = np.abs(values[~out]).max() if (~out).any() else 0.0
        shares[name] = np.where(out, 0.0, values / most if most > 0 else 0.0)
    joined = [i > 0 and text["words"][i] >= 0 and text["words"][i] == text["words"][i - 1] for i in range(len(out))]
    return {
        "name": text["name"],
        "tokens": [str(token).removeprefix("##").lstrip("Ġ▁") or str(token) for token in text["tokens"]],
        "joined": joined,
        "out": out,
        "predicted": text["predicted"],
        "output": text["output"],
        "label": text["label"],
        "rationale": text["rationale"],
        "scores": shares,
    }
