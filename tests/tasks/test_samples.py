from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.errors import ArgumentError
from headway.tasks.samples import Sample, first_word, largest_fit, make_sample
from headway.tasks.words import ADJECTIVES, NOUNS, coded_words, draw, essay, pick, prose, spread, word_pairs
from tests.look.tiny import byte_tokenizer

TEMPLATE = (
    "{% for m in messages %}<u>{{ m['content'] | trim }}</u>{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)


def sample(**changes) -> Sample:
    fields = {
        "task": "t",
        "context_ids": torch.ones(1, 3, dtype=torch.long),
        "question_ids": torch.ones(1, 2, dtype=torch.long),
        "references": ("alpha", "beta"),
        "max_new_tokens": 5,
    }
    return Sample(**(fields | changes))


def test_all_is_the_share_of_references_found_whatever_their_case():
    assert sample().score("It is ALPHA.") == 0.5
    assert sample().score("alpha and Beta") == 1.0
    assert sample().score("") == 0.0


def test_any_is_one_when_one_reference_is_found():
    assert sample(match="any").score("beta it is") == 1.0
    assert sample(match="any").score("gamma") == 0.0


@pytest.mark.parametrize(
    ("text", "reference", "score"),
    [
        (' "12345".', "12345", 1.0),
        (" indeed 12345.", "12345", 1.0),
        (" 123456", "12345", 0.0),
        (" 99999 or 12345", "12345", 0.0),
        ("red-fox, I think", "red-fox", 1.0),
        ("Red-Fox", "red-fox", 1.0),
        ("a red-fox", "red-fox", 0.0),
        ("", "12345", 0.0),
    ],
)
def test_exact_wants_the_first_word_to_be_the_reference(text, reference, score):
    assert sample(match="exact", references=(reference,)).score(text) == score


def test_only_inclusion_settles_a_score():
    assert sample().settled("alpha beta")
    assert not sample().settled("alpha")
    assert not sample(match="exact", references=("12",)).settled("12")


def test_the_first_word_skips_marks_and_keeps_inner_hyphens():
    assert first_word(' "a-b", c') == "a-b"
    assert first_word("--") == ""
    assert first_word("no one 4 5", digit=True) == "4"


def test_text_and_tokens_of_a_sample_agree_and_the_prompt_is_context_then_question():
    tokenizer = byte_tokenizer(bos=False)
    made = make_sample(
        tokenizer, task="t", context="Ab", question=" c?", prefix=" d", references=("x",), max_new_tokens=1
    )
    assert tokenizer.decode(made.prompt_ids[0]) == "Ab c? d"
    assert made.prompt_tokens == 7
    assert made.context_ids.shape == (1, 2)


def test_a_beginning_of_sequence_token_stands_before_the_context_only():
    tokenizer = byte_tokenizer(bos=True)
    from tokenizers import processors

    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    made = make_sample(tokenizer, task="t", context="Ab", question="c", references=("x",), max_new_tokens=1)
    assert made.context_ids[0, 0] == 1
    assert made.context_ids.shape == (1, 3)
    assert made.question_ids.shape == (1, 1)
    assert not {1, 2} & set(made.question_ids[0].tolist())


def test_chat_puts_context_and_question_into_one_user_message_and_the_prefix_behind_it():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    made = make_sample(
        tokenizer, task="t", context=" Ab", question=" c? ", prefix="d", references=("x",), max_new_tokens=1, chat=True
    )
    assert tokenizer.decode(made.context_ids[0]) == "<u> Ab"
    assert tokenizer.decode(made.question_ids[0]) == " c? </u><a>d"
    assert made.meta["chat"] is True


def test_chat_without_a_template_is_refused():
    with pytest.raises(ArgumentError, match="without a chat template"):
        make_sample(
            byte_tokenizer(), task="t", context="a", question="b", references=("x",), max_new_tokens=1, chat=True
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"match": "rouge"}, "match: got 'rouge'"),
        ({"references": ()}, "references"),
        ({"references": ("",)}, "references"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"context_ids": torch.ones(3, dtype=torch.long)}, "context_ids: got shape"),
        ({"question_ids": torch.ones(1, 0, dtype=torch.long)}, "question_ids: got shape"),
    ],
)
def test_a_sample_that_cannot_be_asked_is_refused(changes, message):
    with pytest.raises(ArgumentError, match=message):
        sample(**changes)


@settings(max_examples=40, deadline=None)
@given(tokens=st.integers(20, 400), unit=st.integers(1, 9), least=st.integers(1, 3))
def test_the_largest_fit_is_the_largest(tokens, unit, least):
    def build(n: int) -> Sample:
        return sample(context_ids=torch.ones(1, 3 + unit * n, dtype=torch.long), meta={"n": n})

    fixed = 3 + 2 + 5
    if fixed + unit * least > tokens:
        with pytest.raises(ArgumentError, match=f"expected at least {fixed + unit * least}"):
            largest_fit(build, tokens, least=least)
        return
    assert largest_fit(build, tokens, least=least).meta["n"] == (tokens - fixed) // unit


def test_filler_that_runs_out_ends_the_search():
    made = largest_fit(lambda n: sample(context_ids=torch.ones(1, min(n, 7), dtype=torch.long)), 1000)
    assert made.context_ids.shape[1] == 7


def test_needles_stand_at_their_depths_in_their_order():
    assert spread(["a", "b", "c", "d"], ["X", "Y"], [0, 100]) == ["X", "a", "b", "c", "d", "Y"]
    assert spread(["a", "b", "c", "d"], ["X"], [50]) == ["a", "b", "X", "c", "d"]
    assert spread([], ["X", "Y"], [30, 20]) == ["X", "Y"]


def test_a_depth_outside_the_text_and_a_needle_without_a_depth_are_refused():
    with pytest.raises(ArgumentError, match="depth: got 101"):
        spread(["a"], ["X"], [101])
    with pytest.raises(ArgumentError, match="depths: got 0 for 1"):
        spread(["a"], ["X"], [])


def test_drawn_values_are_different_and_a_seed_names_them():
    for kind in ("word", "number", "uuid"):
        first = draw(kind, np.random.default_rng(3), 50)
        assert first == draw(kind, np.random.default_rng(3), 50)
        assert len(set(first)) == 50
    assert draw("uuid", np.random.default_rng(0), 1) == draw("uuid", np.random.default_rng(0), 5)[:1]
    assert all(len(number) == 4 for number in draw("number", np.random.default_rng(0), 30, digits=4))
    assert len(set(coded_words(np.random.default_rng(0), 90, 3))) == 90


def test_more_words_than_there_are_is_refused():
    random = np.random.default_rng(0)
    with pytest.raises(ArgumentError, match="count: got 10 of kind 'number', expected at most 9"):
        draw("number", random, 10, digits=1)
    with pytest.raises(ArgumentError, match="kind: got 'date'"):
        draw("date", random, 1)
    with pytest.raises(ArgumentError, match="count: got 3 of 2 items"):
        pick(random, ["a", "b"], 3)
    with pytest.raises(ArgumentError, match="words of 1 letters"):
        coded_words(random, 14, 1)


def test_the_word_lists_hold_no_word_twice():
    assert len(set(NOUNS)) == len(NOUNS)
    assert len(set(ADJECTIVES)) == len(ADJECTIVES)
    assert not set(NOUNS) & set(ADJECTIVES)
    assert len(set(word_pairs())) == len(NOUNS) * len(ADJECTIVES)


def test_prose_leaves_headings_code_and_grammar_out():
    prose_part = "The first sentence stands here. The second one follows it."
    text = f"Heading\n\n{prose_part}\n\n   code(here) does not count here.\n\nx ::= y and something after."
    assert prose(text) == ["The first sentence stands here.", "The second one follows it."]
    assert essay(prose(text), 3, 1) == [prose(text)[1], prose(text)[0], prose(text)[1]]


def test_a_text_without_sentences_is_refused():
    with pytest.raises(ArgumentError, match="without a sentence"):
        prose("x = 1")
