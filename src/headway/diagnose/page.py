"""What the pages of `headway diagnose` share: one shell, filled from the fields that every diagnosis has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from headway.pages.shell import flat, model_parts, provenance, render_page

Facts = tuple[str, list[Any]]


class Diagnosis(Protocol):
    """A finished diagnosis: facts of model and run (its options under "settings"), and what is said."""

    model: dict[str, Any]
    run: dict[str, Any]
    findings: list[str]
    warnings: list[str]


def diagnosis_page(
    found: Diagnosis,
    verb: str,
    *,
    about: str,
    counts: Sequence[str],
    sections: Sequence[tuple[str, str]],
    data: Mapping[str, Any],
    styled: bool = True,
    facts: Sequence[Facts] | None = None,
    **context: Any,
) -> str:
    """The page of `headway diagnose <verb>` from its templates in `headway.diagnose.<verb>`, as one self-contained HTML
    file without any network access.

    about: what the title says behind the model's name; counts: what the subtitle adds to it; data: what the script
    reads; styled: whether the verb has a style sheet of its own; facts: tables of the last section (default: run and
    settings). `context` goes to the template."""
    name = str(found.model["name"])
    return render_page(
        f"headway.diagnose.{verb}",
        f"{verb}.html.j2",
        styles=(f"{verb}.css",) if styled else (),
        scripts=(f"{verb}.js",),
        data=data,
        verb=f"diagnose {verb}",
        heading=name,
        title=f"{name}: {about}",
        subtitle=" · ".join([*model_parts(found.model), *counts]),
        provenance=provenance(found.run),
        findings=found.findings,
        warnings=found.warnings,
        sections=sections,
        facts=run_and_settings(found) if facts is None else facts,
        **context,
    )


def run_and_settings(found: Diagnosis) -> list[Facts]:
    """The tables of the run and of its settings."""
    run = {name: value for name, value in found.run.items() if name != "settings"}
    return [("Run", list(flat(run))), ("Settings", list(flat(found.run.get("settings", {}))))]
