"""The evidence pages: EVIDENCE.md and one self-contained HTML page, made from the recorded runs alone.

Every number on them comes out of `evidence/<slug>.json`; the same files always give the same bytes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from headway.errors import ArgumentError
from headway.evidence.claims import Claim
from headway.evidence.criteria import Verdict
from headway.evidence.run import Run
from headway.files import write_atomically
from headway.statistics import Measurement

TITLE = "Evidence"
INTRODUCTION = (
    "What the papers claim, measured again here. A verdict is computed from the numbers by a criterion that was "
    "written before the run: the claim holds, fails, or stays inconclusive. Intervals are 95 %. Made by "
    "`headway evidence` from the files in `evidence/`; no number is typed in by hand."
)
NOTHING = "Nothing is recorded yet. `headway prove SLUG --record` records a run."


def read_runs(folder: str | Path) -> list[Run]:
    """The recorded runs in a folder by slug, every claim judged again and every digest checked."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ArgumentError(
            f"folder: got {str(folder)!r}, which is no folder; expected one with records of `headway prove`."
        )
    runs = []
    for path in sorted(folder.glob("*.json")):
        run = Run.from_json(path.read_text(encoding="utf-8"), name=path.name)
        if run.slug != path.stem:
            raise ArgumentError(
                f"{path.name}: got the record of {run.slug!r}, expected {run.slug}.json. Rename the file."
            )
        runs.append(run)
    return runs


def render_markdown(folder: str | Path) -> str:
    """EVIDENCE.md: a table of verdict counts per paper, then a table of claims for each paper."""
    runs = read_runs(folder)
    lines = [f"# {TITLE}", "", INTRODUCTION, ""]
    if not runs:
        return "\n".join([*lines, NOTHING, ""])
    lines += ["| paper | holds | fails | inconclusive | size | date |", "|---|--:|--:|--:|---|---|"]
    for run in runs:
        counts = " | ".join(str(run.counts[verdict]) for verdict in Verdict)
        lines.append(f"| [{_md(run.title)}](#{run.slug}) | {counts} | {run.size} | {_md(run.started[:10])} |")
    total = " | ".join(f"**{sum(run.counts[verdict] for run in runs)}**" for verdict in Verdict)
    lines += [f"| **all** | {total} | | |", ""]
    for run in runs:
        lines += _paper(run)
    return "\n".join(lines).rstrip() + "\n"


def render_html(folder: str | Path) -> str:
    """The same as one HTML page: no script, no network, readable in light and dark."""
    loader = PackageLoader("headway.evidence", "templates")
    pages = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    runs = read_runs(folder)
    introduction = INTRODUCTION.replace("`", "")
    return pages.get_template("evidence.html").render(
        title=TITLE,
        introduction=introduction,
        nothing=NOTHING.replace("`", ""),
        verdicts=list(Verdict),
        totals={verdict: sum(run.counts[verdict] for run in runs) for verdict in Verdict},
        runs=[{"run": run, "setting": _setting(run), "claims": [_row(claim) for claim in run.claims]} for run in runs],
    )


def write_evidence(root: str | Path) -> tuple[Path, Path]:
    """Writes `EVIDENCE.md` and `docs/evidence.html` under `root` from the records in `root/evidence`."""
    root = Path(root)
    text, page = render_markdown(root / "evidence"), render_html(root / "evidence")
    return write_atomically(root / "EVIDENCE.md", text), write_atomically(root / "docs" / "evidence.html", page)


def _paper(run: Run) -> list[str]:
    rows = [_row(claim) for claim in run.claims]
    lines = [f'<a id="{run.slug}"></a>', "", f"## {_md(run.title)}", "", f"`{run.command}` · {_md(_setting(run))}", ""]
    lines += ["| statement | paper | measured | criterion | verdict |", "|---|---|---|---|---|"]
    for row in rows:
        cells = (row["statement"], row["paper"], row["measured"], row["criterion"])
        lines.append(f"| {' | '.join(_md(cell) for cell in cells)} | **{row['verdict']}** |")
    lines.append("")
    for row in rows:
        notes = f" {_md(row['notes'])}" if row["notes"] else ""
        lines.append(f"- `{row['id']}` **{row['verdict']}**: {_md(row['reason'])}.{notes}")
    return [*lines, ""]


def _row(claim: Claim) -> dict[str, Any]:
    paper = claim.paper
    source = ", ".join(part for part in (paper.conditions, paper.where) if part)
    compared = [("baseline", claim.baseline)] if claim.baseline else []
    others = [(name.replace("_", " "), quantity) for name, quantity in claim.others.items()]
    return {
        "id": claim.id,
        "statement": claim.statement,
        "paper": f"{paper.value} ({source})" if source else paper.value,
        "measured": "; ".join(
            [_measured(claim.measured)] + [f"{name} {_measured(q)}" for name, q in compared + others]
        ),
        "criterion": claim.criterion.text,
        "verdict": str(claim.verdict),
        "reason": claim.reason,
        "notes": claim.notes.strip(),
    }


def _measured(quantity: Measurement) -> str:
    sample = [f"n = {quantity.n:,}"] if quantity.n > 1 else []
    sample += [f"{len(quantity.seeds)} seeds"] if len(quantity.seeds) > 1 else []
    return f"{quantity} ({', '.join(sample)})" if sample else str(quantity)


def _setting(run: Run) -> str:
    """Where the run was measured, in one line."""
    where = run.environment
    commit = (where.get("commit") or "unknown commit")[:10] + (" with local changes" if where.get("dirty") else "")
    parts: Sequence[str] = (
        run.started[:10],
        commit,
        f"torch {where.get('torch')}",
        f"transformers {where.get('transformers')}",
        f"{where.get('device')}, threads {where.get('threads')}",
        f"{run.seconds:,.0f} s",
    )
    return " · ".join(parts)


def _md(text: str) -> str:
    """Text as Markdown shows it literally, in one line: every character that could mean something is escaped."""
    return re.sub(r"([\\`*_\[\]<>|&~$#])", r"\\\1", " ".join(text.split()))
