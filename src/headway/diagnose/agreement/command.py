"""What `headway diagnose agreement` does: get texts, explain, write the page and the sheet, print the headline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from rich.console import Console

from headway.diagnose.agreement.analysing import Options, diagnose_agreement
from headway.diagnose.agreement.classifying import Ready, make_ready
from headway.diagnose.agreement.findings import findings
from headway.diagnose.agreement.result import Agreement
from headway.diagnose.agreement.sheets import PAGE, chosen_methods, read_people, write_sheet
from headway.diagnose.agreement.texts import read_rows
from headway.errors import ArgumentError, unknown
from headway.hosts import load
from headway.hosts.facts import model_facts
from headway.hosts.rows import check_policy
from headway.methods.diagnosis.song_of_disagreement import METHODS, Settings
from headway.methods.diagnosis.song_of_disagreement.classifier import READOUTS
from headway.pages.console import check_folder, deliver, going_on, progress_bar
from headway.pages.plain import plain


def run(
    model: str,
    *,
    texts: Path | None = None,
    count: int = 12,
    tokens: int = 128,
    methods: str | None = None,
    measure: str = "kendall",
    baseline: str = "pad",
    target: str = "predicted",
    sign: str = "abs",
    special: str = "exclude",
    words: str = "tokens",
    readout: str = "mean",
    masks: int = 300,
    steps: int = 50,
    allow_unsupported: bool = False,
    sheet: int = 10,
    sheet_methods: str | None = None,
    answers: Sequence[Path] = (),
    bad_rows: str = "refuse",
    dtype: str = "float32",
    seed: int = 0,
    out: Path = Path("agreement-out"),
    as_json: bool = False,
    trust_remote_code: bool = False,
) -> None:
    """The command. Arguments are checked before the model is loaded, and answers are read before anything is measured.
    Finished texts are kept in `out` as they come; the page, its numbers and the sheet are written last."""
    check_policy(bad_rows, "--bad-rows")
    if readout not in READOUTS:
        raise unknown("--readout", readout, READOUTS)
    if sheet < 0 or tokens < 1 or count < 1:
        raise ArgumentError(f"--sheet, --tokens, --count: got {sheet}, {tokens}, {count}, expected ≥ 0, ≥ 1 and ≥ 1.")
    settings = Settings(
        baseline=baseline, steps=steps, masks=masks, sign=cast(Any, sign), allow_unsupported=allow_unsupported,
        target=int(target) if target.isdecimal() else target,
    )  # fmt: skip
    options = Options(
        methods=_listed(methods), settings=settings, measure=measure, special=cast(Any, special),
        words=cast(Any, words), seed=seed,
    )  # fmt: skip
    for name in _listed(sheet_methods) or ():
        if name not in METHODS:
            raise unknown("--sheet-methods", name, METHODS)
    check_folder(out)
    people, complaints = read_people(answers, out, bad_rows=bad_rows) if answers else (None, [])
    rows, left_out = read_rows(texts, bad_rows=bad_rows) if texts is not None else (None, [])
    console = Console(stderr=True)
    with going_on(out / "parts", "texts"), progress_bar(console) as tell:
        tell(f"loading {model}", 0, 1)
        host, tokenizer = load(model, dtype=dtype, trust_remote_code=trust_remote_code, classes=True)
        tell("reading texts", 0, 1)
        ready = make_ready(host, tokenizer, rows, count=count, tokens=tokens, readout=cast(Any, readout), seed=seed)
        found = diagnose_agreement(
            ready.classifier, ready.examples, options=options, names=ready.names, name_of=ready.name_of, out=out,
            model=_model_facts(host, model, ready), progress=tell,
        )  # fmt: skip
    for what, rows_left in (("rows", left_out), ("answers", complaints)):
        if rows_left:
            found.run[f"{what} left out"] = rows_left
            found.warnings.insert(0, f"{len(rows_left)} {what} could not be used and were left out: {rows_left[0]}")
    if people is not None:
        found.people = plain(people)
        found.findings = findings(found)
    files = _sheet(found, ready, _listed(sheet_methods), sheet, seed, out) if sheet and not answers else []
    places = []
    if files:
        places.append(
            f"For people: {files[0]} to fill in, {out / PAGE} to read beside it; keep {files[-1]} to yourself."
        )
    deliver(found, out, "agreement", as_json=as_json, places=places)


def _sheet(
    found: Agreement, ready: Ready, named: tuple[str, ...] | None, texts: int, seed: int, out: Path
) -> list[Path]:
    methods = chosen_methods(found, named)
    files, why_not = write_sheet(found, ready.examples, methods, texts=texts, seed=seed, out=out)
    if why_not:
        found.warnings.append(why_not)
    return files


def _listed(names: str | None) -> tuple[str, ...] | None:
    return None if names is None else tuple(name.strip() for name in names.split(",") if name.strip())


def _model_facts(host: Any, name: str, ready: Ready) -> dict[str, Any]:
    return model_facts(host, name) | {
        "kind": ready.kind,
        "classes": list(ready.classes),
        "accuracy": ready.accuracy,
        "held_out": ready.held_out,
    }
