"""Traces: exact splitting, token ranges by offsets, prefixes by position, and labels of sentences."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headway.errors import ArgumentError
from headway.evidence.recipes._anchors_toy import Words
from headway.methods.diagnosis.thought_anchors import (
    CATEGORIES,
    Label,
    by_category,
    label_prompt,
    model_labels,
    parse_labels,
    read_trace,
    rule_labels,
)
from headway.methods.diagnosis.thought_anchors import sentences as module

THOUGHT = "First, add two and two.\nWait. That is four. Let me check that again! Wait. It is four indeed"


class Letters:
    """A tokenizer of pieces of three letters, with offsets."""

    is_fast = True

    def __call__(self, text, **options):
        cuts = list(range(0, len(text), 3))
        offsets = [(a, min(a + 3, len(text))) for a in cuts]
        lead = [(0, 0)] if options.get("add_special_tokens", True) else []
        return {"input_ids": list(range(len(lead) + len(cuts))), "offset_mapping": lead + offsets}


def trace(text=THOUGHT, prompt="What is two and two? ", **options):
    return read_trace(text, Letters(), prompt=prompt, **options)


def test_sentences_join_to_the_reasoning_exactly():
    found = trace(f"<think>{THOUGHT}</think> Four.")
    assert "".join(found.sentences) == THOUGHT


def test_an_unterminated_last_sentence_is_kept():
    assert trace().sentences[-1].endswith("four indeed")


@given(st.text(alphabet="ab .?!\n", min_size=1, max_size=120).filter(lambda t: t.strip()))
def test_any_text_is_covered_once_and_in_order(text):
    found = trace(text)
    assert "".join(found.sentences) == text
    for spans in (found.characters, found.tokens):
        assert all(a < b for a, b in spans)
        assert all(first[1] <= second[0] for first, second in pairwise(spans))


def test_a_token_belongs_to_the_sentence_of_its_last_letter():
    found = trace()
    for (start, stop), (first, after) in zip(found.characters, found.tokens, strict=True):
        ends = [min(3 * i, len(found.text)) for i in range(first, after)]
        assert all(start < end <= stop for end in ends)


def test_special_tokens_belong_to_no_sentence():
    assert trace(prompt="").tokens[0][0] == 1


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("<think>a b</think>c", "a b"), ("<think>a b", "a b"), ("a b</think>c", "a b"), ("a b", "a b")],
)
def test_the_reasoning_stands_between_the_marks(text, wanted):
    start, stop = module.reasoning_range(text)
    assert text[start:stop] == wanted


def test_a_prefix_is_cut_where_the_sentence_stands():
    """Removing the text of a sentence would remove every earlier sentence with the same words."""
    text = "Wait, that is odd. Add one to it now.\n\nWait, that is odd. So it is seven."
    found = trace(text)
    assert found.sentences[0].strip() == found.sentences[2].strip()
    assert "Wait, that is odd. Add one to it now." in found.prefix(2).text
    assert found.text.startswith(found.prefix(2).text)
    assert len(found.prefix(2).ids) == found.tokens[2][0]
    assert found.prefix(len(found)).ids == found.ids[: found.tokens[-1][1]]
    with pytest.raises(ArgumentError, match="0 to 4"):
        found.prefix(5)


def test_ids_and_text_of_a_prefix_are_the_same_words():
    words = Words()
    found = read_trace("given:k0=3 . mode-is-m1 . then-k0-gives m1v3 . ", words, prompt="start ")
    for i in range(len(found) + 1):
        assert words.decode(found.prefix(i).ids) == found.prefix(i).text


def test_given_sentences_are_found_in_their_order():
    text = "Wait. No. Wait. Yes."
    found = trace(text, sentences=["Wait.", "Wait.", "Yes."])
    assert [found.text.find("Wait."), found.text.rfind("Wait.")] == [s for s, _ in found.characters[:2]]


def test_a_sentence_with_other_spaces_is_an_error_that_shows_the_nearest():
    with pytest.raises(ArgumentError, match="white space differs") as error:
        trace("Now we add one. Then we stop.", sentences=["Now we\u00a0add one."])
    assert "'Now we add one.'" in str(error.value)
    with pytest.raises(ArgumentError, match="nearest is 'Then we stop"):
        trace("Now we add one. Then we stop.", sentences=["Then we stopp now."])


@pytest.mark.parametrize("ranges", [[(5, 3)], [(0, 4), (3, 8)], [(0, 4000)], [(0, 4, 5)]])
def test_ranges_must_run_forward_and_apart(ranges):
    with pytest.raises(ArgumentError, match="ranges in order"):
        trace(sentences=ranges)


def test_a_text_without_words_is_refused():
    with pytest.raises(ArgumentError, match="at least one sentence"):
        trace("  \n ")


def test_pieces_that_do_not_join_to_the_text_are_refused():
    class Loses(Words):
        def decode(self, ids, **options):
            return "x"

    with pytest.raises(ArgumentError, match="fast tokenizer"):
        read_trace("given:k0=3 . ", Loses())


def test_other_tokens_or_borders_have_another_fingerprint():
    first, second = trace(), trace(sentences=[(21, 40), (40, 60)])
    assert first.fingerprint() == trace().fingerprint() != second.fingerprint()


def test_a_trace_survives_its_exchange_format():
    found = trace(name="one", answer="4")
    data = json.loads(json.dumps(found.to_dict()))
    again = read_trace(data["text"], Letters(), sentences=data["sentences"], name=data["name"], answer=data["answer"])
    assert again == found


def test_rules_read_cue_words():
    labels = rule_labels(
        ["Let me try a table.", "Wait, that is wrong.", "3 + 4 = 7", "So the answer is \\boxed{7}.", "Blue sky."]
    )
    assert [label.category for label in labels] == [
        "plan_generation", "uncertainty_management", "active_computation", "final_answer_emission", "unknown",
    ]  # fmt: skip


def test_a_model_is_asked_with_all_categories_and_its_reply_is_read():
    seen = []

    def ask(question):
        seen.append(question)
        second = '{"categories": ["fact_retrieval", "unknown"], "depends_on": [0]}'
        return f'Sure: {{"0": {{"categories": ["problem_setup"]}}, "1": {second}}}'

    assert model_labels(["One.", "Two."], ask) == [
        Label(("problem_setup",)),
        Label(("fact_retrieval", "unknown"), (0,)),
    ]
    assert all(name in seen[0] for name in CATEGORIES)
    assert "[1] Two." in label_prompt(["One.", "Two."])


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        ("no", "JSON"),
        ('{"0": {"categories": ["problem_setup"]}}', "sentence 1 of 2"),
        ('{"0": {"categories": ["setup"]}, "1": {"categories": ["unknown"]}}', "'setup'"),
        ('{"0": {"categories": ["unknown"], "depends_on": [0]}, "1": {"categories": ["unknown"]}}', "earlier"),
    ],
)
def test_a_reply_that_cannot_be_is_refused(reply, words):
    with pytest.raises(ArgumentError, match=words):
        parse_labels(reply, 2)


def test_scores_are_averaged_by_category():
    labels = [Label(("unknown",)), Label(("problem_setup",)), Label(("unknown",)), Label(("unknown",))]
    found = by_category(labels, [1.0, 5.0, 3.0, float("nan")])
    assert (found["unknown"].value, found["unknown"].n, found["problem_setup"].value) == (2.0, 2, 5.0)


@pytest.mark.parametrize(
    "given", ["Wait.", 7, [], [3, 4], [["a", "b"]], ["Wait.", 5], [[0.5, 5]], [[0, True]], [[21, 40], "Wait."]]
)
def test_sentences_that_are_neither_strings_nor_ranges_are_refused(given):
    """As they may stand in a line of a file, where anything may."""
    with pytest.raises(ArgumentError, match=r"sentences: got .*expected a list of strings"):
        trace(sentences=given)
