"""The comparison sheet of a diagnosis in its folder: made, kept from being overwritten, and read back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from headway.diagnose.agreement.result import Agreement
from headway.errors import ArgumentError, HeadwayError, unknown
from headway.files import write_atomically
from headway.methods.diagnosis.song_of_disagreement import (
    METHODS,
    Answer,
    Example,
    Sheet,
    judge,
    make_sheet,
    read_answers,
)

CSV, PAGE, KEY = "sheet.csv", "sheet.html", "sheet-key.json"
#: The method of each kind that people compare unless others are named, the first that was measured.
KINDS = (
    ("attention_rollout", "attention_last", "attention_values"),
    ("integrated_gradients", "grad_shap", "input_x_gradient"),
    ("lime", "ablation"),
)


def chosen_methods(found: Agreement, named: Sequence[str] | None) -> list[str]:
    """The methods of a sheet. Raises ArgumentError for one that was not measured."""
    known = [m["name"] for m in found.methods]
    if named is not None:
        for name in named:
            if name not in known:
                raise unknown("--sheet-methods", name, known)
        return list(named)
    picked = [next((name for name in kind if name in known), None) for kind in KINDS]
    some = [name for name in picked if name is not None]
    return some if len(some) > 1 else known[:3]


def write_sheet(
    found: Agreement, examples: Sequence[Example], methods: Sequence[str], *, texts: int, seed: int, out: Path
) -> tuple[list[Path], str]:
    """(files, why none were written). A sheet that is there and differs is left as it is: it may be filled in."""
    scores = {name: [np.array(t["scores"][name], float) for t in found.texts] for name in methods}
    try:
        made = make_sheet(examples, scores, predicted=[t["predicted"] for t in found.texts], texts=texts, seed=seed)
    except ArgumentError as error:
        return [], f"No comparison sheet was made. {error}"
    files = {CSV: made.csv(), PAGE: made.html(), KEY: made.key()}
    there = out / CSV
    if there.exists() and there.read_text(encoding="utf-8", errors="replace") != files[CSV]:
        return [], f"{there} is there and differs (perhaps it is filled in), so no new sheet was written."
    return [write_atomically(out / name, content) for name, content in files.items()], ""


def read_people(paths: Sequence[Path], out: Path, *, bad_rows: str) -> tuple[dict[str, Any], list[str]]:
    """(what people said as plain data, complaints) by the key in `out`. Raises HeadwayError without a key."""
    key = out / KEY
    if not key.is_file():
        raise HeadwayError(
            f"--answers: there is no {key}, which says what A and B were. Name the folder of the sheet with --out."
        )
    sheet = Sheet.from_key(key.read_text(encoding="utf-8"))
    answers: list[Answer] = []
    complaints: list[str] = []
    seen: dict[tuple[str, str], str] = {}
    for path in paths:
        some, wrong = read_answers(path, sheet, bad_rows="skip" if bad_rows == "skip" else "refuse")
        complaints += wrong
        for one in some:
            first = seen.get((one.person, one.item))
            if first is None:
                seen[one.person, one.item] = path.name
                answers.append(one)
                continue
            again = f"{path.name} line {one.line}: {one.person} answered {one.item} in {first} before"
            if bad_rows != "skip":
                raise ArgumentError(
                    f"{again}. Give each file once; two people need names of their own in the column 'person'."
                )
            complaints.append(again)
    found = judge(sheet, answers)
    return {
        "people": list(found.people),
        "answers": found.answers,
        "ties": found.ties,
        "preferred": {name: m.to_dict() for name, m in found.preferred.items()},
        "pairs": [{"first": a, "second": b, "won": m.to_dict()} for (a, b), m in found.pairs.items()],
        "alpha": found.alpha,
        "consistency": None if found.consistency is None else found.consistency.to_dict(),
        "left": None if found.left is None else found.left.to_dict(),
        "words": {name: METHODS[name].words for name in found.preferred if name in METHODS},
    }, complaints
