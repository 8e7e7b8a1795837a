"""The page of `headway lab sinks`: the table, sink against loss, every column by arm, and the course of training. Its
shell is `headway.pages`."""

from __future__ import annotations

import math
from typing import Any

from headway.lab.arms import Arm
from headway.lab.result import SinkLab
from headway.lab.table import Cell, Column, columns, rows
from headway.pages.plain import rounded
from headway.pages.shell import flat, provenance, render_page

SCRIPTS = ("lab.js",)
STYLES = ("lab.css",)
MISSING = "–"


def render(lab: SinkLab) -> str:
    """The page as one self-contained HTML file, without any network access."""
    count = f"{len(lab.seeds)} seed{'s' if len(lab.seeds) > 1 else ''}"
    return render_page(
        "headway.lab",
        "lab.html.j2",
        styles=STYLES,
        scripts=SCRIPTS,
        data=payload(lab),
        verb="lab",
        heading=lab.name,
        title=f"{lab.name}: attention sinks by arm",
        subtitle=" · ".join(part for part in (lab.about, f"{len(lab.arms)} arms, {count}") if part),
        provenance=provenance(lab.run),
        findings=lab.findings,
        warnings=lab.warnings,
        sections=[("table", "All arms"), ("against", "Sink and loss"), ("bars", "By arm"), ("course", "Training")],
        facts=[
            ("Run", list(flat({k: v for k, v in lab.run.items() if k != "settings_of_all_arms"}))),
            ("Settings of all arms", list(flat(lab.run.get("settings_of_all_arms", {})))),
        ],
        headings=[("Arm", "")] + [(c.words, c.note) for c in columns(lab)],
        rows=[_row(lab, arm, cells) for arm, cells in rows(lab)],
    )


def payload(lab: SinkLab) -> dict[str, Any]:
    """What the scripts read: arms with their cells, and the course of each run."""
    shown = columns(lab)
    table = rows(lab)
    return rounded(
        {
            "columns": [{"name": c.name, "words": c.words, "note": c.note, "unit": c.unit} for c in shown],
            "arms": [
                {
                    "name": arm,
                    "settings": words_of(own_settings(lab, arm)),
                    "cells": {name: [c.value, c.low, c.high] for name, c in cells.items()},
                    "runs": {c.name: lab.values(arm, c.name) for c in shown},
                    "course": [r.course for r in lab.of(arm)],
                }
                for arm, cells in table
            ],
            "baseline": lab.baseline,
        }
    )


def own_settings(lab: SinkLab, arm: str) -> dict[str, Any]:
    """What tells an arm from the baseline; of the baseline itself, what is no default and not shared by all arms."""
    own, base = lab.arms[arm], lab.arms[lab.baseline]
    if arm != lab.baseline:
        plain = Arm().settings()
        return {name: own.get(name, plain[name]) for name in {**own, **base} if own.get(name) != base.get(name)}
    others = [settings for name, settings in lab.arms.items() if name != arm]
    return {name: value for name, value in own.items() if any(o.get(name) != value for o in others) or not others}


def words_of(settings: dict[str, Any]) -> str:
    """Settings in a line, an inner mapping in brackets."""

    def one(value: Any) -> str:
        return f"({words_of(value)})" if isinstance(value, dict) else str(value)

    return ", ".join(f"{name.replace('_', ' ')} {one(value)}" for name, value in settings.items() if value != {})


def number(value: float, unit: str = "") -> str:
    """A number of the table as text."""
    if not math.isfinite(value):
        return MISSING
    if unit == "%":
        return f"{100 * value:.1f} %".replace("-", "−")
    if unit == "n":
        return f"{value:,.0f}"
    size = abs(value)
    digits = 0 if size >= 100 else 1 if size >= 10 else 3
    text = f"{value:,.{digits}f}" if size >= 1e-3 or value == 0 else f"{value:.1e}"
    return text.replace("-", "−") + (" ×" if unit == "×" else "")


def _row(lab: SinkLab, arm: str, cells: dict[str, Cell]) -> dict[str, Any]:
    failed = [f"seed {r.seed}: {r.failure}" for r in lab.results if r.arm == arm and r.failure]
    return {
        "arm": arm,
        "group": lab.groups.get(arm, ""),
        "settings": words_of(own_settings(lab, arm)),
        "baseline": arm == lab.baseline,
        "cells": [(number(cells[c.name].value, c.unit), _interval(cells[c.name], c)) for c in columns(lab)],
        "failed": "; ".join(failed),
    }


def _interval(found: Cell, column: Column) -> str:
    if not math.isfinite(found.low) or found.low == found.high:
        return ""
    unit = "%" if column.unit == "%" else ""
    return f"{number(found.low, unit)} to {number(found.high, unit)}"
