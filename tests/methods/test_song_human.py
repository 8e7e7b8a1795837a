"""The comparison sheet: blinded, safe to open, read back with complaints, and right about planted judges."""

from __future__ import annotations

import csv
import io
import json
import math

import numpy as np
import pytest
from tests.methods.song_hosts import example

from headway.errors import ArgumentError, HostError
from headway.methods.diagnosis.song_of_disagreement import (
    Answer,
    Sheet,
    judge,
    krippendorff_alpha,
    make_sheet,
    read_answers,
)
from headway.methods.diagnosis.song_of_disagreement.human import COLUMNS, words_of

METHODS = ("good", "poor", "odd")


def made(count: int = 12, **options) -> Sheet:
    random = np.random.default_rng(0)
    texts = [example(12, seed=seed) for seed in range(count)]
    scores = {name: [random.random(12) for _ in texts] for name in METHODS}
    return make_sheet(texts, scores, predicted=["yes"] * count, **options)


def answers(sheet: Sheet, choose, person: str = "ann") -> list[Answer]:
    return [
        Answer(item=item.id, person=person, answer=choose(item), line=number)
        for number, item in enumerate(sheet.items, 2)
    ]


def liking(*order: str):
    """Answers of a person who prefers methods in an order."""

    def choose(item) -> str:
        return "A" if order.index(item.method_a) < order.index(item.method_b) else "B"

    return choose


def test_all_pairs_are_asked_in_both_places():
    sheet = made(repeats=0.0)
    pairs = [frozenset((item.method_a, item.method_b)) for item in sheet.items]
    assert len(sheet.items) == 12 * 3
    assert {p: pairs.count(p) for p in pairs} == {frozenset(p): 12 for p in (METHODS[:2], METHODS[1:], METHODS[::2])}
    first = sum(item.method_a < item.method_b for item in sheet.items)
    assert 8 < first < 28


def test_nothing_that_is_filled_in_names_a_method():
    sheet = made()
    for text in (sheet.csv(), sheet.html()):
        assert not any(name in text for name in METHODS)
    assert all(name in sheet.key() for name in METHODS)


def test_special_tokens_are_never_marked():
    for item in made().items:
        assert len(item.words) == 10
        assert len(item.a) == len(item.b) == 4
        assert max(*item.a, *item.b) < 10


def test_repeats_have_their_sides_exchanged():
    sheet = made(repeats=0.25)
    items = {item.id: item for item in sheet.items}
    again = [item for item in sheet.items if item.repeat_of]
    assert len(again) == 9
    for item in again:
        first = items[item.repeat_of]
        assert (item.a, item.b, item.method_a) == (first.b, first.a, first.method_b)


def test_the_same_seed_makes_the_same_sheet_and_its_key_brings_it_back():
    sheet = made(seed=3)
    assert made(seed=3) == sheet
    assert made(seed=4) != sheet
    assert Sheet.from_key(sheet.key()) == sheet


@pytest.mark.parametrize("text", ["{", "[]", "{}", json.dumps({"question": "?", "items": [{"id": "x"}]})])
def test_a_key_that_is_none_is_refused(text):
    with pytest.raises(ArgumentError, match=r"Sheet\.key"):
        Sheet.from_key(text)


def test_sub_words_are_one_word():
    given = example(5)
    object.__setattr__(given, "tokens", ("[CLS]", "film", "##s", "good", "[SEP]"))
    object.__setattr__(given, "words", np.array([-1, 0, 0, 1, -1]))
    assert words_of(given) == (("films", "good"), [-1, 0, 0, 1, -1])


def test_cells_are_never_formulas_and_marks_never_markup():
    given = example(6)
    object.__setattr__(given, "tokens", ("[CLS]", "=1+1", "<img src=x>", "b", "c", "[SEP]"))
    scores = {"one": [np.array([0, 9, 1, 0, 0, 0.0])], "other": [np.array([0, 0, 9, 1, 0, 0.0])]}
    sheet = make_sheet([given], scores, predicted=["@SUM"], top=1, repeats=0.0)
    (row,) = csv.DictReader(io.StringIO(sheet.csv()))
    assert row["text"].startswith("'=")
    assert row["predicted"] == "'@SUM"
    assert {row["A"], row["B"]} == {"'=1+1", "<img src=x>"}
    assert "<img" not in sheet.html()
    assert "<mark>&lt;img src=x&gt;</mark>" in sheet.html()


def test_a_sheet_needs_something_to_choose():
    texts = [example(6)]
    same = {name: [np.arange(6.0)] for name in ("a", "b")}
    with pytest.raises(ArgumentError, match="nothing to ask"):
        make_sheet(texts, same, predicted=["x"])
    with pytest.raises(ArgumentError, match="at least two"):
        make_sheet(texts, {"a": same["a"]}, predicted=["x"])
    with pytest.raises(ArgumentError, match="expected 1"):
        make_sheet(texts, {"a": [], "b": []}, predicted=["x"])
    with pytest.raises(ArgumentError, match="share"):
        make_sheet(texts, same, predicted=["x"], repeats=2.0)


def test_a_person_with_a_taste_is_read_from_the_file(tmp_path):
    sheet = made(repeats=0.2)
    chosen = {a.item: a.answer for a in answers(sheet, liking("good", "poor", "odd"))}
    rows = list(csv.DictReader(io.StringIO(sheet.csv())))
    path = tmp_path / "ann.csv"
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows({**row, "answer": chosen[row["item"]].lower()} for row in rows)
    found, complaints = read_answers(path, sheet)
    assert complaints == []
    result = judge(sheet, found)
    assert result.people == ("ann",)
    assert result.preferred["good"].value == 1.0
    assert result.preferred["odd"].value == 0.0
    assert result.pairs["good", "odd"].value == 1.0
    assert result.pairs["odd", "poor"].value == 0.0
    assert result.consistency is not None
    assert result.consistency.value == 1.0
    assert result.left is not None
    assert result.left.low < 0.5 < result.left.high


def test_a_person_who_takes_the_left_one_is_found_out():
    sheet = made(repeats=0.3)
    result = judge(sheet, answers(sheet, lambda item: "A"))
    assert result.left is not None
    assert result.left.value == 1.0
    assert result.consistency is not None
    assert result.consistency.value == 0.0


def test_people_who_agree_and_people_who_do_not():
    sheet = made(count=30, texts=30)
    taste = liking("good", "poor", "odd")
    alike = judge(sheet, [*answers(sheet, taste), *answers(sheet, taste, "bob")])
    assert alike.alpha == 1.0
    random = np.random.default_rng(0)
    coins = [answers(sheet, lambda item: "AB"[random.integers(2)], who) for who in ("ann", "bob")]
    assert abs(judge(sheet, coins[0] + coins[1]).alpha) < 0.35


def test_ties_decide_nothing():
    sheet = made(repeats=0.0)
    result = judge(sheet, answers(sheet, lambda item: "tie"))
    assert result.ties == len(sheet.items)
    assert result.preferred == {}
    assert result.left is None
    assert result.consistency is None
    with pytest.raises(ArgumentError, match="answers: got none"):
        judge(sheet, [])


def test_krippendorffs_alpha_by_hand():
    """Four units of two: aa, ab, bb, bb. D_o = 2/8, D_e = (64 − 9 − 25) / 56."""
    assert krippendorff_alpha(["aa", "ab", "bb", "bb", "a"]) == pytest.approx(1 - (2 / 8) / (30 / 56))
    assert math.isnan(krippendorff_alpha(["a", "b"]))
    assert math.isnan(krippendorff_alpha(["aa", "aa"]))


@pytest.mark.parametrize(
    ("line", "words"), [("q999,,,,,A,ann", "unknown item"), ("q001,,,,,C,ann", "expected A, B or tie"),
                        ("q002,,,,,B,ann", "answered q002 before")],
)  # fmt: skip
def test_a_row_that_cannot_be_used_is_named_by_its_line(tmp_path, line, words):
    path = tmp_path / "filled.csv"
    path.write_text(f"{','.join(COLUMNS)}\nq002,,,,,A,ann\nq003,,,,,,ann\n{line}\n", encoding="utf-8")
    with pytest.raises(ArgumentError, match="line 4") as error:
        read_answers(path, made())
    assert words in str(error.value)
    found, complaints = read_answers(path, made(), bad_rows="skip")
    assert [a.item for a in found] == ["q002"]
    assert len(complaints) == 1


def test_a_file_that_is_no_sheet_is_refused(tmp_path):
    path = tmp_path / "other.csv"
    path.write_text("a,b\n1,2\n", encoding="utf-8")
    with pytest.raises(ArgumentError, match="Keep the first line"):
        read_answers(path, made())
    with pytest.raises(HostError, match="cannot be read"):
        read_answers(tmp_path / "none.csv", made())
    with pytest.raises(ArgumentError, match="bad_rows"):
        read_answers(path, made(), bad_rows="drop")


def test_who_answered_is_the_file_where_the_column_is_empty(tmp_path):
    path = tmp_path / "eve.csv"
    path.write_text(f"{','.join(COLUMNS)}\nq002,,,,,tie,\n", encoding="utf-8")
    assert read_answers(path, made())[0][0].person == "eve"
    assert read_answers(path, made(), person="zoe")[0][0].person == "zoe"


def test_answers_of_another_sheet_or_given_twice_are_refused():
    sheet = made()
    given = answers(sheet, liking(*METHODS))
    with pytest.raises(ArgumentError, match="'q999'"):
        judge(sheet, [*given, Answer(item="q999", person="ann", answer="A", line=2)])
    with pytest.raises(ArgumentError, match="got 2 of ann"):
        judge(sheet, [*given, given[0]])
