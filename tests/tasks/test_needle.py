from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from headway.errors import ArgumentError
from headway.tasks.answering import answer
from headway.tasks.needle import needle_grid, needle_sample, planted_score, value_ids
from headway.tasks.recall import recall_of_length, recall_sample, recall_samples
from headway.tasks.turns import MODES, SharedContext, answer_turns, shared_context, shared_contexts
from tests.look.tiny import TEXT, byte_tokenizer, tiny_llama
from tests.tasks.recaller import VOCABULARY, Recaller

TOKENIZER = byte_tokenizer()
HOST = tiny_llama()


def needle(depth: float, tokens: int = 400, seed: int = 0, **options):
    return needle_sample(TOKENIZER, tokens, depth, np.random.default_rng(seed), **options)


@pytest.mark.parametrize("text", [None, TEXT])
@pytest.mark.parametrize("depth", [0, 50, 100])
def test_the_needle_stands_once_at_its_depth_and_the_prompt_fills_the_tokens(text, depth):
    sample = needle(depth, text=text)
    hay = sample.context.split("\n\n", 1)[1]
    assert hay.count(sample.meta["needle"]) == 1
    assert sample.context.count(sample.references[0]) == 1
    assert sample.references[0] not in sample.question + sample.prefix
    place = hay.index(sample.meta["needle"]) / (len(hay) - len(sample.meta["needle"]))
    assert abs(place - depth / 100) < 0.25
    assert depth == 50 or place == depth / 100
    assert 320 < sample.prompt_tokens + sample.max_new_tokens <= 400


def test_a_needle_is_found_by_a_model_that_recalls_and_not_beyond_its_window():
    samples = list(needle_grid(TOKENIZER, [400, 600], depths=[0, 50, 100], seed=3))
    assert [answer(Recaller(), TOKENIZER, s, question_aware=False).score for s in samples] == [1.0] * 6
    near = [answer(Recaller(keep=150), TOKENIZER, s, question_aware=False).score for s in samples]
    assert near == [0.0, 0.0, 1.0] * 2


def test_a_larger_grid_holds_the_samples_of_the_smaller_one():
    small = list(needle_grid(TOKENIZER, [400], depths=[10], seed=1))
    large = list(needle_grid(TOKENIZER, [400, 500], depths=[0, 10], repeats=2, seed=1))
    assert len(large) == 8
    assert small[0].context in [s.context for s in large]
    assert len({s.references for s in large}) == 8


def test_the_planted_score_of_a_known_model_is_known():
    sample = needle(50)
    found = planted_score(Recaller(), TOKENIZER, sample, question_aware=True)
    assert found.rank_one_rate == 1.0
    assert found.nll.numel() == 8
    assert found.mean_nll < 1e-4
    lost = planted_score(Recaller(keep=40), TOKENIZER, sample, question_aware=False)
    assert lost.rank_one_rate == 0.0
    assert math.isclose(float(lost.nll[0]), math.log(VOCABULARY), rel_tol=1e-5)


@pytest.mark.parametrize("aware", [True, False])
def test_the_planted_score_equals_that_of_one_forward(aware):
    sample = needle(50)
    value = torch.tensor([value_ids(TOKENIZER, sample)])
    with torch.no_grad():
        logits = HOST(torch.cat([sample.prompt_ids, value], 1)).logits[0, sample.prompt_tokens - 1 : -1]
    wanted = torch.nn.functional.cross_entropy(logits, value[0], reduction="none")
    found = planted_score(HOST, TOKENIZER, sample, question_aware=aware, prefill_chunk=64)
    torch.testing.assert_close(found.nll, wanted, atol=1e-3, rtol=1e-3)
    assert found.rank_one.tolist() == (logits.argmax(-1) == value[0]).tolist()


def test_a_value_is_joined_to_its_prefix_by_a_space_where_one_belongs():
    assert TOKENIZER.decode(value_ids(TOKENIZER, needle(0)))[0] == " "
    quoted = recall_sample(TOKENIZER, 5, np.random.default_rng(0))
    assert TOKENIZER.decode(value_ids(TOKENIZER, quoted)) == quoted.references[0]


def test_bad_needles_are_refused():
    with pytest.raises(ArgumentError, match="depth: got 120"):
        needle(120)
    with pytest.raises(ArgumentError, match=r"tokens: got 50 for needle, expected at least \d+"):
        needle(0, tokens=50)
    with pytest.raises(ArgumentError, match="lengths, depths, repeats"):
        list(needle_grid(TOKENIZER, []))


@pytest.mark.parametrize("kind", ["number", "word", "uuid"])
def test_the_asked_pair_stands_in_the_object_once_and_demonstrations_are_of_other_keys(kind):
    sample = recall_sample(TOKENIZER, 12, np.random.default_rng(1), kind=kind, position=7)
    lines = sample.context.split("{")[1].split("}")[0].split(",\n ")
    key, value = (part.strip('"') for part in lines[7].split(": "))
    assert len(lines) == 12
    assert value == sample.references[0]
    assert sample.context.count(value) == 1
    assert f'"{key}"' in sample.question
    assert sample.context.count(f'"{key}"') == 1
    assert sample.context.count("What is the value of") == 2


def test_an_object_of_a_length_fills_it():
    for sample in recall_samples(TOKENIZER, 500, count=4, seed=2):
        assert 400 < sample.prompt_tokens + sample.max_new_tokens <= 500
        assert sample.meta["pairs"] > 8


def test_depths_of_recall_run_from_end_to_end():
    pairs = [sample.meta["position"] / sample.meta["pairs"] for sample in recall_samples(TOKENIZER, 600, count=5)]
    assert pairs == sorted(pairs)
    assert pairs[0] < 0.2 < 0.7 < pairs[-1]
    last = recall_of_length(TOKENIZER, 500, 0, depth=100).meta
    assert last["position"] == last["pairs"] - 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pairs": 0}, "pairs: got 0"),
        ({"pairs": 5, "position": 5}, "position: got 5"),
        ({"pairs": 5, "kind": "date"}, "kind: got 'date'"),
        ({"pairs": 2, "demonstrations": 2}, "demonstrations: got 2"),
    ],
)
def test_objects_that_cannot_be_asked_about_are_refused(options, message):
    with pytest.raises(ArgumentError, match=message):
        recall_sample(TOKENIZER, random=np.random.default_rng(0), **options)


def shared(tokens: int = 500, **options) -> SharedContext:
    return shared_context(TOKENIZER, tokens, np.random.default_rng(0), **options)


def test_questions_share_one_context_that_holds_every_fact():
    found = shared(questions=3)
    assert len(found.questions) == 3
    assert len({s.context for s in found.questions}) == 1
    assert len({s.references for s in found.questions}) == 3
    for sample in found.questions:
        assert sample.context.count(sample.references[0]) == 1
        assert sample.prompt_tokens + sample.max_new_tokens <= 500


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_answers_every_question_of_a_model_that_recalls(mode):
    answers = answer_turns(Recaller(), TOKENIZER, shared(questions=3), mode=mode)
    assert [a.score for a in answers] == [1.0] * 3
    assert all(a.question_aware == (mode == "aware") for a in answers)


def test_copy_crop_and_rerun_give_the_same_answers_on_a_real_host():
    found = shared(450, questions=3)
    wanted = [a.ids.tolist() for a in answer_turns(HOST, TOKENIZER, found, mode="rerun")]
    for mode in ("copy", "crop"):
        assert [a.ids.tolist() for a in answer_turns(HOST, TOKENIZER, found, mode=mode)] == wanted
        chunked = answer_turns(HOST, TOKENIZER, found, mode=mode, prefill_chunk=100)
        assert [a.ids.tolist() for a in chunked] == wanted


def test_the_context_is_prefilled_once_and_a_conversation_keeps_what_was_said():
    found = shared(questions=3)
    context = found.questions[0].context_ids.shape[1]
    for mode, times in (("copy", 1), ("crop", 1), ("conversation", 1), ("rerun", 3)):
        host = Recaller()
        answers = answer_turns(host, TOKENIZER, found, mode=mode)
        assert host.lengths.count(context) == times
        grew = answers[2].cache_bytes > answers[0].cache_bytes + 8 * found.questions[1].question_ids.shape[1]
        assert grew == (mode == "conversation")


def test_a_cache_that_cannot_be_cropped_is_refused_with_a_way_out():
    from tests.door.hosts import decoder

    host = decoder("Mistral", sliding_window=6, vocab_size=259, max_position_embeddings=1024)
    with pytest.raises(Exception, match="crop"):
        answer_turns(host, TOKENIZER, shared(450, questions=2), mode="crop")
    assert len(answer_turns(host, TOKENIZER, shared(450, questions=2), mode="copy")) == 2


def test_bad_turns_are_refused():
    with pytest.raises(ArgumentError, match="mode: got 'swap'"):
        answer_turns(HOST, TOKENIZER, shared(), mode="swap")
    with pytest.raises(ArgumentError, match="questions: got 0"):
        shared(questions=0)
    with pytest.raises(ArgumentError, match="questions: got none"):
        SharedContext(questions=())
    with pytest.raises(ArgumentError, match="different contexts"):
        SharedContext(questions=(shared().questions[0], shared(600).questions[0]))
    assert len(list(shared_contexts(TOKENIZER, 500, count=2, questions=2))) == 2
