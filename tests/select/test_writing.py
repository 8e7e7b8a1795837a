"""What is written: every selected record with its own fields, whole or not at all."""

from __future__ import annotations

import json
import math
from datetime import date

import pytest

from headway.errors import ArgumentError
from headway.select.records import Record
from headway.select.shards import ScoredRecord
from headway.select.writing import SCORES, rows_to, score_row, selected_row

SCORE = ScoredRecord("r1", "a.jsonl", 3, "law", 80, 2.0, 2.5, 0.25, 0.1, ("tiny-loss",))


def written(path, rows):
    with rows_to(path, None) as writer:
        for row in rows:
            writer.write(row)
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_numbers_without_a_value_become_null(tmp_path):
    (found,) = written(tmp_path / "a.jsonl", [{"a": math.nan, "b": [1.0, {"c": -math.inf}], "d": 2.5}])
    assert found == {"a": None, "b": [1.0, {"c": None}], "d": 2.5}


def test_what_json_has_no_form_for_becomes_text(tmp_path):
    (found,) = written(tmp_path / "a.jsonl", [{"bytes": b"\x00\x01", "day": date(2025, 5, 12)}])
    assert found == {"bytes": "AAE=", "day": "2025-05-12"}


def test_half_a_character_pair_in_another_field_stays_what_it_was(tmp_path):
    row = {"text": "good", "note": "\ud800"}
    assert written(tmp_path / "a.jsonl", [row]) == [row]


def test_a_run_that_fails_leaves_the_earlier_file(tmp_path):
    path = tmp_path / "a.jsonl"
    written(path, [{"a": 1}])
    with pytest.raises(TypeError):
        written(path, [{"a": 2}, {1j: "no name"}])
    assert path.read_text() == '{"a": 1}\n'
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]


def test_a_selected_row_keeps_its_fields_and_gains_its_scores():
    record = Record("r1", "words", "law", 3, 0, {"text": "words", "year": 1999})
    found = selected_row(record, SCORE, parquet_in=False, parquet_out=False)
    assert found["year"] == 1999
    assert found[SCORES]["influence"] == 0.25
    as_table = selected_row(record, SCORE, parquet_in=False, parquet_out=True)
    assert json.loads(as_table["row"]) == record.row
    assert as_table["influence"] == 0.25


def test_a_row_of_scores_says_where_the_record_stands():
    found = score_row(SCORE, True)
    assert (found["file"], found["line"], found["flags"], found["selected"]) == ("a.jsonl", 3, "tiny-loss", True)


def test_parquet_columns_that_do_not_go_together_are_refused():
    pyarrow = pytest.importorskip("pyarrow")
    from headway.select.parquet import common_schema

    schemas = [
        pyarrow.schema([("text", pyarrow.string()), ("n", kind)]) for kind in (pyarrow.int64(), pyarrow.string())
    ]
    with pytest.raises(ArgumentError, match="--write jsonl"):
        common_schema(schemas, [])
