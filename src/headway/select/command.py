"""What `headway select` does: check, score, choose, write, print the headline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from headway.errors import ArgumentError
from headway.methods.diagnosis.attention_influence.detection import HeadScores
from headway.pages.console import check_folder, deliver, progress_bar
from headway.select.recipe import Detection, Head
from headway.select.records import Reading
from headway.select.selecting import select


def run(
    corpus: Sequence[str],
    model: str = "smollm2",
    *,
    text_field: str = "text",
    domain_field: str | None = None,
    id_field: str | None = None,
    split: str = "file",
    heads: str | None = None,
    probes: int = 16,
    probe_tokens: int = 512,
    threshold: float | None = None,
    seed: int = 0,
    out: Path = Path("select-out"),
    as_json: bool = False,
    **options: Any,
) -> None:
    """The command; `options` are those of `select`. Scores are kept in `out` as they come; the files of scores and of
    selected records, the page and its numbers are written last, each whole or not at all."""
    if heads is not None and threshold is not None:
        raise ArgumentError("--heads, --threshold: got both, expected one of them. Given heads need no threshold.")
    reading = Reading(text_field=text_field, domain_field=domain_field, id_field=id_field, split=split)
    detection = Detection(samples=probes, tokens=probe_tokens, threshold=threshold, seed=seed)
    given = None if heads is None else parse_heads(heads)
    check_folder(out)
    with progress_bar(Console(stderr=True)) as tell:
        found = select(
            corpus,
            model,
            out=out,
            reading=reading,
            heads=given,
            detection=detection,
            seed=seed,
            progress=tell,
            **options,
        )
    places = [f"Selected: {found.files['selected']}, scores: {found.files['scores']}"]
    deliver(found, out, "select", as_json=as_json, places=places)


def parse_heads(text: str) -> list[Head] | HeadScores:
    """Heads from text such as "18.6,20.1", or the scores in a file that `HeadScores.to_json` wrote."""
    path = Path(text)
    if path.suffix == ".json":
        if not path.is_file():
            raise ArgumentError(f"--heads: there is no file {text}; expected head scores, or heads such as 18.6,20.1.")
        return HeadScores.from_json(path.read_text(encoding="utf-8"))
    found = []
    for part in text.split(","):
        layer, dot, head = part.strip().partition(".")
        if not (dot and layer.isdecimal() and head.isdecimal()):
            raise ArgumentError(f"--heads: got {text!r}, expected layer.head with commas between, such as 18.6,20.1.")
        found.append((int(layer), int(head)))
    return found
