"""Rows of JSON: each read, refused with its line, or listed."""

from __future__ import annotations

import pytest

from headway.errors import ArgumentError, HeadwayError
from headway.hosts import read_text
from headway.hosts.rows import Account, check_policy, holds_rows, json_objects, read_objects

LINES = (
    '{"text": "one", "label": "a"}',
    "",
    "{broken",
    '{"text": " "}',
    '{"text": "two", "lable": "b"}',
    '{"text": "three"}',
)


def read(tmp_path, lines, bad_rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return read_objects(
        read_text(path),
        path,
        lambda row, name: (name, row["text"]),
        fields=("text", "label"),
        what="texts",
        bad_rows=bad_rows,
    )


def test_rows_that_cannot_be_used_are_listed_by_line(tmp_path):
    found, left_out = read(tmp_path, LINES, "skip")
    assert found == [("line 1", "one"), ("line 6", "three")]
    assert [row.split(":")[0] for row in left_out] == ["line 3", "line 4", "line 5"]
    assert "Did you mean 'label'" in left_out[2]


def test_the_first_of_them_is_refused_with_file_and_line(tmp_path):
    with pytest.raises(HeadwayError, match=r"rows.jsonl, line 3: got '\{broken'.*--bad-rows skip"):
        read(tmp_path, LINES, "refuse")


def test_a_file_without_a_usable_row_is_refused(tmp_path):
    with pytest.raises(ArgumentError, match="without a usable row"):
        read(tmp_path, ["{}"], "skip")


def test_names_tell_what_a_file_holds():
    assert holds_rows("a.jsonl")
    assert holds_rows("a.ndjson")
    assert not holds_rows("a.txt")


def test_another_policy_is_refused_by_the_name_it_was_given_under():
    check_policy("skip")
    with pytest.raises(ArgumentError, match="--bad-rows: got 'drop'"):
        check_policy("drop", "--bad-rows")


def test_every_line_is_an_object_or_is_told():
    told = []
    lines = [b'\xef\xbb\xbf{"a": 1}', b"", b"\xff", b"[1]", b"{", b"[" * 100_000, b' {"a": 2}\r\n']
    found = list(json_objects(lines, lambda number, why: told.append((number, why))))
    assert found == [(1, {"a": 1}), (7, {"a": 2})]
    assert [number for number, _ in told] == [3, 4, 5, 6]
    assert "byte 0" in told[0][1]
    assert "a JSON list" in told[1][1]


def test_lines_are_read_one_at_a_time():
    def lines():
        yield '{"a": 1}'
        raise AssertionError("read ahead")

    assert next(json_objects(lines(), lambda *_: None)) == (1, {"a": 1})


def test_an_account_refuses_or_lists():
    account = Account("skip")
    account.bad("a:3", "broken.")
    assert account.skipped == ["a:3: broken."]
    with pytest.raises(ArgumentError, match=r"a:3: broken\. Mend it"):
        Account("refuse").bad("a:3", "broken.")
    with pytest.raises(ArgumentError, match="bad_rows"):
        Account("drop")
