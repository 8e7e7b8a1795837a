"""A corpus is streamed: what a run holds in memory does not grow with it."""

from __future__ import annotations

import json
import tracemalloc

import pytest

from headway.progress import silent
from headway.select import choosing
from headway.select.finishing import finish
from headway.select.records import Reading, find_sources
from headway.select.selecting import open_ledger, score_all
from headway.select.shards import make_plan
from tests.select.standins import StandInRecipe, text

#: Two sizes of corpus, and the characters of a record.
FEW, MANY, CHARACTERS = 600, 3000, 2000


def corpus(folder, records):
    """Records of one size, in files of 500."""
    folder.mkdir(parents=True)
    for start in range(0, records, 500):
        rows = [
            {"text": f"{text(n)} {n:09d}".ljust(CHARACTERS, "x"), "kind": "ab"[n % 2]}
            for n in range(start, start + 500)
        ]
        (folder / f"{start:06d}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def peak(folder, out, dedup):
    """The most bytes that a whole run holds: walking, scoring, choosing, writing."""
    tracemalloc.start()
    try:
        plan = make_plan(find_sources([folder])[0], Reading(domain_field="kind"), out / "state", dedup=dedup)
        recipe = StandInRecipe()
        with open_ledger(plan, recipe, out) as ledger:
            score_all(plan, ledger, recipe)
            choice = choosing.choose(ledger, ledger.path.parent, share=0.2)
            finish(plan, ledger, choice, out, write="jsonl", repetition_weight=0.0, tell=silent)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("dedup", ["none", "exact"])
def test_a_longer_corpus_takes_no_more_memory(tmp_path, monkeypatch, dedup):
    # A buffer of a fixed size, larger than these corpora, would hide what grows.
    monkeypatch.setattr(choosing, "CHUNK", 100)
    peak(corpus(tmp_path / "first", 300), tmp_path / "out first", dedup)
    few, many = (
        peak(corpus(tmp_path / str(records), records), tmp_path / f"out {records}", dedup) for records in (FEW, MANY)
    )
    assert len((tmp_path / f"out {MANY}" / "scores.jsonl").read_bytes().splitlines()) == MANY
    assert many - few < 0.1 * (MANY - FEW) * CHARACTERS, f"{few:,} bytes at {FEW:,} records, {many:,} at {MANY:,}"
    assert many < 0.5 * MANY * CHARACTERS
