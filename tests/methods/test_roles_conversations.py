"""Conversation logs: every format read to its turns, every malformed line named."""

from __future__ import annotations

import json

import pytest

from headway.errors import ArgumentError
from headway.methods.diagnosis.diagnose_localize_align import Rules, read_conversations

PLAIN = {"id": "q1", "question": "2 + 2?", "turns": [{"role": "mathematician", "reply": "4"}]}


def read(*rows, **options):
    return read_conversations([row if isinstance(row, str) else json.dumps(row) for row in rows], **options)


def said(found):
    return [(turn.role, turn.question, turn.reply) for turn in found.turns]


@pytest.mark.parametrize(
    ("form", "row", "turns"),
    [
        ("turns", {"question": "q", "turns": [
            {"role": "a", "reply": "x"}, {"role": "b", "reply": "y", "question": "r"},
        ]},
         [("a", "q", "x"), ("b", "r", "y")]),
        ("messages", {"messages": [
            {"role": "system", "content": "s"}, {"role": "user", "content": "q"}, {"role": "assistant", "content": "x"},
            {"role": "user", "content": "r"},
            {"role": "assistant", "content": [{"type": "text", "text": "y"}], "name": "b"},
        ]}, [("assistant", "q", "x"), ("b", "r", "y")]),
        ("sharegpt", {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "x"}]},
         [("assistant", "q", "x")]),
        ("langchain", {"messages": [{"type": "human", "content": "q"}, {"type": "ai", "content": "x", "name": "a"}]},
         [("a", "q", "x")]),
        ("langchain", {"messages": [
            {"type": "human", "data": {"content": "q"}}, {"type": "ai", "data": {"content": "x", "name": None}},
        ]}, [("assistant", "q", "x")]),
        ("autogen", {"question": "q", "chat_history": [
            {"name": "user", "content": "q"}, {"name": "coder", "role": "user", "content": "x"},
            {"role": "assistant", "content": "y"},
        ]}, [("coder", "q", "x"), ("assistant", "q", "y")]),
        ("autogen", {"messages": [
            {"source": "user", "type": "TextMessage", "content": "q"},
            {"source": "coder", "type": "TextMessage", "content": "x"},
        ]}, [("coder", "q", "x")]),
        ("dylan", {"question": "q", "replies": [{"role": "a", "reply": "x"}]}, [("a", "q", "x")]),
        ("macnet", {"question": "q", "nodes": [
            {"system_message": "You code.", "actor_prompt": "Now code.", "actor_response": "x"},
        ]}, [("You code.\nNow code.", "q", "x")]),
        ("consistency", {"question": "q", "responses": [{"content": "round 0"}, {"content": "x"}]},
         [("assistant", "q", "x")]),
        ("crewai", {"tasks_output": [{"agent": "a", "raw": "x", "description": "q"}]}, [("a", "q", "x")]),
    ],
)  # fmt: skip
def test_formats_are_told_apart_and_read(form, row, turns):
    assert said(read(row)) == turns
    assert said(read(row, form=form)) == turns


def test_a_turn_knows_where_it_came_from():
    found = read("", {**PLAIN, "condition": "conflict", "rules": {"answers": "4"}}, {**PLAIN, "id": 7})
    first, second = found.turns
    assert (first.conversation, first.index, first.condition, first.line) == ("q1", 0, "conflict", 2)
    assert first.rules == Rules(answers=("4",))
    assert second.conversation == "7"
    assert read({"turns": PLAIN["turns"]}).turns[0].conversation == "line 1"


def test_turns_without_role_or_reply_are_counted():
    row = {"turns": [{"role": "a", "reply": "x"}, {"role": "", "reply": "y"}, {"role": "b", "reply": "  "}]}
    found = read(row)
    assert len(found.turns) == 1
    assert found.empty == 2
    called = {
        "messages": [{"role": "assistant", "content": None, "tool_calls": []}, {"role": "assistant", "content": "x"}]
    }
    assert read(called).empty == 1
    without = {"messages": [{"role": "assistant", "tool_calls": []}, {"role": "assistant", "content": "x"}]}
    assert read(without).empty == 1


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("{", "Expecting"),
        ("[1]", "JSON object"),
        ("[" * 20_000, "recursion"),
        ({"x": 1}, "no known form"),
        ({"turns": "x"}, "expected a list"),
        ({"turns": ["x"]}, r"turns\[0\]"),
        ({"turns": [{"role": "a"}]}, "lacks the field 'reply'"),
        ({"turns": [{"role": "a", "reply": 3}]}, "expected text"),
        ({**PLAIN, "rules": {"answer": ["4"]}}, "'answer'"),
        ({**PLAIN, "rules": [1]}, "dictionary"),
        ({**PLAIN, "rules": {"answers": 4}}, "list of texts"),
        ({**PLAIN, "rules": {"forbidden": ["guess", " "]}}, "empty text"),
        ({**PLAIN, "rules": {"constraints": "!"}}, "empty text"),
        ({**PLAIN, "rules": {"constraints": ["!("]}}, "regular expression"),
        (PLAIN, "used in line 1"),
    ],
)
def test_a_malformed_line_is_refused_by_its_number_or_skipped_and_told(row, words):
    with pytest.raises(ArgumentError, match="line 2: ") as error:
        read(PLAIN, row)
    found = read(PLAIN, row, bad_rows="skip")
    assert len(found.turns) == 1
    assert [bad.line for bad in found.bad] == [2]
    assert found.bad[0].reason in str(error.value)
    with pytest.raises(ArgumentError, match=f"(?i){words}"):
        read(PLAIN, row)


def test_many_bad_lines_are_counted_and_some_shown():
    with pytest.raises(ArgumentError, match=r"8 malformed rows .*line 5.* and 3 more"):
        read(*["{"] * 8)


def test_one_id_may_stand_under_two_conditions():
    found = read({**PLAIN, "condition": "neutral"}, {**PLAIN, "condition": "conflict"})
    assert [turn.condition for turn in found.turns] == ["neutral", "conflict"]


def test_a_log_without_turns_is_an_error(tmp_path):
    with pytest.raises(ArgumentError, match="no turn"):
        read("")
    with pytest.raises(ArgumentError, match="no turn"):
        read("{", bad_rows="skip")
    with pytest.raises(ArgumentError, match="cannot be read"):
        read_conversations(tmp_path / "none.jsonl")
    (tmp_path / "other.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ArgumentError, match="UTF-8"):
        read_conversations(tmp_path / "other.jsonl")


def test_files_with_a_mark_and_odd_separators_are_read(tmp_path):
    path = tmp_path / "log.jsonl"
    row = {"turns": [{"role": "a", "reply": "one\u2028two"}]}
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(row, ensure_ascii=False).encode() + b"\r\n")
    assert read_conversations(path).turns[0].reply == "one\u2028two"


def test_unknown_choices_name_what_there_is():
    with pytest.raises(ArgumentError, match="autogen"):
        read(PLAIN, form="autogn")
    with pytest.raises(ArgumentError, match="skip"):
        read(PLAIN, bad_rows="drop")


def test_fields_that_are_null_were_not_given():
    row = {**PLAIN, "id": None, "condition": None, "rules": None, "question": None}
    found = read(row, row)
    assert [(turn.conversation, turn.condition, turn.question) for turn in found.turns] == [
        ("line 1", "", ""),
        ("line 2", "", ""),
    ]
    assert found.turns[0].rules == Rules()
