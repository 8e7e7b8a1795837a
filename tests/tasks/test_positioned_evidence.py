"""Documents whose answers stand at known places."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.errors import ArgumentError
from headway.tasks.positioned_evidence import (
    SYNONYMS,
    TEMPLATES,
    PositionedCorpus,
    Question,
    english_facts,
    join_marked,
    moved,
    prose_corpus,
    topic_corpus,
)

SENTENCES = [f"Sentence number {i} tells about matter {i % 7} of the day." for i in range(60)]


def evidence(corpus, question):
    return corpus.documents[question.document][question.start : question.stop]


def test_a_topic_question_shares_only_the_name_with_its_answer():
    corpus = topic_corpus(40, np.random.default_rng(0), sizes=(30, 90), facts=2, decoys=1)
    assert len(corpus.documents) == 40
    assert len(corpus.questions) == 80
    names = [question.text.split()[1] for question in corpus.questions]
    assert len(set(names)) == 80
    for question, name in zip(corpus.questions, names, strict=True):
        answer = evidence(corpus, question).split()
        assert answer[0] == name
        assert set(question.text.split()) & set(answer) == {name}
        assert SYNONYMS[answer[2]] == question.text.split()[0]
        assert sum(name in text for text in corpus.documents.values()) == 1


def test_sizes_are_kept_and_positions_spread():
    corpus = topic_corpus(300, np.random.default_rng(1), sizes=(50, 200))
    lengths = [len(text.split()) for text in corpus.documents.values()]
    assert min(lengths) >= 50
    assert max(lengths) <= 200 + 12 + 10
    places = [(q.start + q.stop) / 2 / len(corpus.documents[q.document]) for q in corpus.questions]
    assert np.histogram(places, bins=5, range=(0, 1))[0].min() > 35


def test_answers_may_be_kept_in_a_part_of_the_document():
    corpus = topic_corpus(60, np.random.default_rng(2), sizes=(100, 200), where=(0.0, 0.2), decoys=3)
    places = [(q.start + q.stop) / 2 / len(corpus.documents[q.document]) for q in corpus.questions]
    assert max(places) < 0.3


def test_several_facts_stand_one_in_each_stretch():
    corpus = prose_corpus(SENTENCES, 30, np.random.default_rng(3), sizes=(200, 300), facts=4)
    for name in corpus.documents:
        own = [q for q in corpus.questions if q.document == name]
        starts = [q.start / len(corpus.documents[name]) for q in own]
        assert starts == sorted(starts)
        assert all(b - a < 0.6 for a, b in pairwise(starts))


def test_prose_documents_are_filler_in_its_order_with_facts_between():
    corpus = prose_corpus(SENTENCES, 20, np.random.default_rng(4), sizes=(80, 120), facts=2, source="here")
    endings = tuple(statement.split("}")[-1] for statement, _ in TEMPLATES)
    for name, text in corpus.documents.items():
        for question in (q for q in corpus.questions if q.document == name):
            assert evidence(corpus, question).endswith(endings)
            text = text.replace(evidence(corpus, question), "")
        numbers = [
            int(word) for word, before in zip(text.split()[2:], text.split()[1:], strict=False) if before == "number"
        ]
        assert all((b - a) % len(SENTENCES) == 1 for a, b in pairwise(numbers))
    assert "here" in corpus.about


def test_sizes_may_be_counted_by_a_tokenizer():
    corpus = prose_corpus(SENTENCES, 10, np.random.default_rng(5), sizes=(400, 400), facts=1, count=len)
    assert all(400 <= len(text) <= 500 for text in corpus.documents.values())


def test_facts_are_about_different_things():
    facts = english_facts(500, np.random.default_rng(6))
    assert len({fact.question for fact in facts}) == 500
    with pytest.raises(ArgumentError, match="fewer documents"):
        english_facts(10**6, np.random.default_rng(0))


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 12), st.integers(0, 30))
def test_moving_a_statement_changes_nothing_but_its_place(positions, more):
    sentences = SENTENCES[: positions - 1 + more]
    found = moved(sentences, "Here it is.", positions)
    assert len(found) == positions
    assert len({len(text) for text, _ in found}) == 1
    assert len({text for text, _ in found}) == positions
    assert all(text[start:stop] == "Here it is." for text, (start, stop) in found)
    assert len({tuple(sorted(text.split())) for text, _ in found}) == 1
    starts = [start for _, (start, _) in found]
    assert starts == sorted(starts)
    assert starts[0] == 0
    assert found[-1][1][1] == len(found[-1][0])


def test_joined_sentences_know_where_they_are():
    text, spans = join_marked(["ab", "c", "def"], [2, 0])
    assert text == "ab c def"
    assert [text[a:b] for a, b in spans] == ["def", "ab"]


def test_a_generator_names_a_corpus():
    made = [topic_corpus(5, np.random.default_rng(seed), sizes=(20, 40)) for seed in (1, 1, 2)]
    assert made[0] == made[1]
    assert made[0].documents != made[2].documents


def test_what_cannot_be_made_is_refused():
    random = np.random.default_rng(0)
    for call, words in (
        (lambda: topic_corpus(0, random), "documents"),
        (lambda: topic_corpus(2, random, facts=-1), "facts"),
        (lambda: topic_corpus(2, random, sizes=(9, 3)), "sizes"),
        (lambda: topic_corpus(2, random, where=(0.5, 0.5)), "where"),
        (lambda: prose_corpus([], 2, random), "sentences"),
        (lambda: moved(SENTENCES, "x", 1), "positions"),
        (lambda: moved(SENTENCES[:3], "x", 10), "9 or more"),
        (lambda: PositionedCorpus(documents={"d": "abc"}, questions=(
            Question(id="q", text="x", document="d", start=2, stop=9),)), "'q' points at"),
    ):  # fmt: skip
        with pytest.raises(ArgumentError, match=words):
            call()
