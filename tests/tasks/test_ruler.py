from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from headway.errors import ArgumentError
from headway.hosts import default_text
from headway.tasks.answering import answer
from headway.tasks.ruler import DEPTHS, RULER, ruler_sample, ruler_samples
from headway.tasks.ruler.questions import definitions
from headway.tasks.ruler.tracing import zeta_counts
from headway.tasks.words import FILLER, prose
from tests.look.tiny import byte_tokenizer
from tests.tasks.recaller import Recaller
from tests.tasks.ruler_solver import asked, solve

TOKENIZER = byte_tokenizer()
DOCUMENTATION = default_text().text
#: A short essay, and definitions enough for the questions.
TEXT = DOCUMENTATION[:20_000]
BUDGETS = {
    **{name: 128 for name in RULER if name.startswith("niah")},
    "vt": 30,
    "cwe": 120,
    "fwe": 50,
    "qa_1": 32,
    "qa_2": 32,
}


def one(task: str, tokens: int = 3000, seed: int = 0, **options):
    random = np.random.default_rng(seed)
    return ruler_sample(task, TOKENIZER, tokens, random, text=TEXT, documentation=DOCUMENTATION, **options)


def test_there_are_thirteen_tasks_with_the_budgets_of_the_paper():
    assert {name: task.max_new_tokens for name, task in RULER.items()} == BUDGETS
    assert {name for name, task in RULER.items() if task.match == "any"} == {"qa_1", "qa_2"}


@pytest.mark.parametrize("task", list(RULER))
def test_a_sample_fills_its_tokens_and_says_what_it_wants(task):
    sample = one(task)
    used = sample.prompt_tokens + sample.max_new_tokens
    assert 0.98 * 3000 <= used <= 3000
    assert sample.max_new_tokens == BUDGETS[task]
    assert sample.task == task
    assert sample.match == RULER[task].match
    for reference in sample.references:
        assert reference in sample.context
        assert reference not in sample.question + sample.prefix


@pytest.mark.parametrize("task", list(RULER))
def test_a_seed_names_a_sample(task):
    assert one(task, seed=4).context == one(task, seed=4).context
    assert one(task, seed=4).references != one(task, seed=5).references


@pytest.mark.parametrize(
    ("task", "references", "pattern"),
    [
        ("niah_single_1", 1, r"\d{7}"),
        ("niah_single_2", 1, r"\d{7}"),
        ("niah_single_3", 1, r"[0-9a-f-]{36}"),
        ("niah_multikey_1", 1, r"\d{7}"),
        ("niah_multikey_2", 1, r"\d{7}"),
        ("niah_multikey_3", 1, r"[0-9a-f-]{36}"),
        ("niah_multivalue", 4, r"\d{7}"),
        ("niah_multiquery", 4, r"\d{7}"),
    ],
)
def test_needles_have_their_number_and_type_and_stand_once(task, references, pattern):
    sample = one(task)
    assert len(set(sample.references)) == references
    assert all(re.fullmatch(pattern, r) and sample.context.count(r) == 1 for r in sample.references)
    planted = len(re.findall(r"The secret \w+ of \S+ is ", sample.context))
    expected = {"niah_multikey_1": 4, "niah_multivalue": 4, "niah_multiquery": 4}.get(task, 1)
    assert planted > 20 if task in ("niah_multikey_2", "niah_multikey_3") else planted == expected


@pytest.mark.parametrize(
    ("task", "haystack"),
    [
        ("niah_single_1", "filler"),
        ("niah_single_2", "essay"),
        ("niah_single_3", "essay"),
        ("niah_multikey_1", "essay"),
        ("niah_multikey_2", "needles"),
        ("niah_multikey_3", "needles"),
        ("niah_multivalue", "essay"),
        ("niah_multiquery", "essay"),
        ("vt", "filler"),
    ],
)
def test_a_haystack_is_repeated_filler_an_essay_or_made_of_needles(task, haystack):
    """Of each kind, all but what was planted and the words that fill the last tokens."""
    hay = one(task).context.rsplit("\n\n", 1)[1]
    planted = r"The secret \w+ of \S+ is [\w-]+\.|VAR [A-Z]+ = [\w ]+\."
    rest = re.sub(planted, "", hay)
    counts = {
        "filler": sum(hay.count(sentence) for sentence in FILLER),
        "essay": sum(sentence in hay for sentence in prose(TEXT)),
        "needles": len(re.findall(planted, hay)) if len(rest.split()) < 50 else 0,
    }
    assert counts[haystack] > 10
    assert max(counts[kind] for kind in counts if kind != haystack) <= (8 if haystack == "needles" else 0)
    if haystack == "filler":
        assert not re.sub("|".join(re.escape(sentence) for sentence in FILLER), "", rest).split()[20:]


def test_a_single_needle_stands_where_it_was_asked_to():
    assert one("niah_single_1", depth=0).context.split("\n\n")[1].startswith("The secret number")
    assert re.search(r"is \d{7}\.$", one("niah_single_1", depth=100).context)
    assert len(DEPTHS) == 40
    assert DEPTHS[0] == 0
    assert DEPTHS[-1] == 100
    assert one("niah_single_1").meta["depths"][0] in DEPTHS


@pytest.mark.parametrize("task", ["niah_single_1", "niah_single_2", "niah_single_3"])
def test_a_needle_stands_at_its_depth_of_the_tokens(task):
    """Within a sentence of the haystack."""
    for depth in (10, 50, 90):
        sample = one(task, 6000, depth=depth)
        at = sample.context.index("The secret") / len(sample.context)
        assert at == pytest.approx(depth / 100, abs=0.07)


@pytest.mark.parametrize("task", list(RULER))
def test_the_prompt_alone_says_the_answer_and_its_score_is_one(task):
    for seed in range(3):
        sample = one(task, seed=seed)
        context, question, prefix = asked(TOKENIZER.decode(sample.prompt_ids[0], clean_up_tokenization_spaces=False))
        assert prefix == sample.prefix.strip()
        found = solve(context, question)
        assert sorted(found) == sorted(sample.references)
        assert sample.score(" " + ", ".join(found)) == 1.0


@pytest.mark.parametrize("task", list(RULER))
def test_a_wrong_answer_scores_less_and_half_of_one_its_share(task):
    sample, other = one(task, seed=0), one(task, seed=1)
    assert sample.score(sample.question + sample.prefix) == 0.0
    assert sample.score(" ".join(set(other.references) - set(sample.references))) < 1.0
    assert sample.score("") == 0.0
    part = sample.references[: len(sample.references) // 2]
    assert sample.score(" ".join(part)) == pytest.approx(len(part) / len(sample.references))
    assert sample.score(sample.references[0].upper()) == pytest.approx(1 / len(sample.references))


@pytest.mark.parametrize("task", list(RULER))
def test_both_modes_read_the_same_tokens_and_differ_in_the_first_forward_only(task):
    sample = one(task)
    fed = {}
    for aware in (False, True):
        host = Recaller(end=2)
        seen: list[list[int]] = []
        host.register_forward_pre_hook(
            lambda module, args, kwargs, seen=seen: seen.append(kwargs["input_ids"][0].tolist()), with_kwargs=True
        )
        answer(host, TOKENIZER, replace(sample, max_new_tokens=1), question_aware=aware)
        fed[aware] = seen
    context, question = sample.context_ids[0].tolist(), sample.question_ids[0].tolist()
    assert fed[False] == [context, question]
    assert fed[True] == [context + question]


def test_a_model_that_recalls_finds_a_single_needle():
    sample = one("niah_single_1", 900)
    assert answer(Recaller(), TOKENIZER, sample, question_aware=False).score == 1.0


def test_variables_form_one_chain_in_order():
    sample = one("vt")
    text = sample.context[sample.context.rindex("The 5 variables") :]
    pairs = re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?(\w+)\.", text)
    assert [a for a, _ in pairs] == list(sample.references)
    assert [b for _, b in pairs] == [sample.meta["value"], *sample.references[:-1]]


def test_common_words_are_the_ten_most_common_by_a_factor_of_ten():
    for tokens, often, seldom in ((3000, 10, 1), (6000, 30, 3)):
        sample = one("cwe", tokens)
        counts = Counter(re.findall(r"\d+\. (\S+)", sample.context.split("\n\n")[1]))
        assert {w for w, c in counts.items() if c == often} == set(sample.references)
        assert len(sample.references) == 10
        assert set(counts.values()) == {often, seldom}


def test_long_lists_use_word_pairs_and_still_fill_their_tokens():
    sample = one("cwe", 40_000)
    assert "-" in sample.references[0]
    assert sample.prompt_tokens + sample.max_new_tokens > 39_500


def test_frequent_words_follow_the_zeta_law_and_the_wanted_ones_are_ahead_of_the_rest():
    sample = one("fwe")
    counts = Counter(sample.context.split("\n\n")[1].split()).most_common()
    assert counts[0][0] == "..."
    assert [word for word, _ in counts[1:4]] == list(sample.references)
    assert counts[3][1] > counts[4][1]
    assert zeta_counts(1000)[:4] == [608, 152, 68, 38]


def test_definitions_do_not_hold_their_own_name():
    found = definitions(DOCUMENTATION)
    assert len(found) > 40
    assert len({d.short for d in found}) == len(found)
    assert all(d.short.strip("_").lower() not in d.description.lower() for d in found)


def test_one_hop_has_one_document_with_the_answer():
    sample = one("qa_1")
    documents = re.split(r"Document \d+: ", sample.context)[1:]
    assert len(documents) == sample.meta["documents"]
    quoted = sample.question.strip().removeprefix("Which function is described like this? ")
    gold = [document for document in documents if quoted in document]
    assert len(gold) == 1
    assert sample.references[0] in gold[0]


def test_two_hops_need_both_documents():
    sample = one("qa_2")
    documents = re.split(r"Document \d+: ", sample.context)[1:]
    quoted = sample.question.strip().removeprefix("On which shelf is the function that is described like this? ")
    first = [document for document in documents if quoted in document]
    second = [document for document in documents if sample.references[0] in document]
    assert len(first) == len(second) == 1
    assert first != second
    assert sample.meta["name"] in first[0]
    assert sample.meta["name"] in second[0]


def test_samples_come_task_by_task_each_with_a_seed_of_its_own():
    made = list(ruler_samples(TOKENIZER, 2000, text=TEXT, tasks=["niah_single_1", "fwe"], count=2, seed=1))
    assert [s.task for s in made] == ["niah_single_1"] * 2 + ["fwe"] * 2
    assert made[0].references != made[1].references
    alone = list(ruler_samples(TOKENIZER, 2000, text=TEXT, tasks=["fwe"], seed=1))
    assert alone[0].context == made[2].context


def test_bad_orders_are_refused():
    with pytest.raises(ArgumentError, match="task: got 'niah'"):
        one("niah")
    with pytest.raises(ArgumentError, match="tasks: got 'qa'"):
        list(ruler_samples(TOKENIZER, 2000, text=TEXT, tasks=["qa"]))
    with pytest.raises(ArgumentError, match=r"tokens: got 200 for niah_single_1, expected at least \d+"):
        one("niah_single_1", 200)
    with pytest.raises(ArgumentError, match="depth: got -1"):
        one("niah_single_1", depth=-1)
    with pytest.raises(ArgumentError, match="documentation: got a text with 0 function descriptions"):
        ruler_sample("qa_1", TOKENIZER, 2000, np.random.default_rng(0), text="One sentence that stands alone here.")
