"""Several questions on one context, in every way of going on from its cache."""

from __future__ import annotations

import numpy as np
import pytest

from headway.errors import ArgumentError, HostError
from headway.tasks.turns import MODES, SharedContext, answer_turns, shared_context, shared_contexts
from tests.contracts.test_cache_policy import KeepLast
from tests.look.tiny import TEXT, byte_tokenizer, tiny_llama
from tests.tasks.recaller import Recaller

TOKENIZER = byte_tokenizer()
HOST = tiny_llama()


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
    with pytest.raises(HostError, match="crop"):
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


def test_facts_stand_at_even_depths_and_questions_come_in_another_order():
    found = shared_context(TOKENIZER, 1500, np.random.default_rng(1), questions=6)
    context = found.questions[0].context
    places = {s.meta["depth"]: context.index(s.references[0]) / len(context) for s in found.questions}
    for depth, place in places.items():
        assert abs(place - depth / 100) < 0.12
    asked = [s.meta["depth"] for s in found.questions]
    assert asked != sorted(asked)


def test_a_haystack_of_a_text_holds_its_sentences():
    found = shared(900, questions=2, text=TEXT)
    assert "asks what it does" in found.questions[0].context
    assert "The river runs slow" not in found.questions[0].context


def test_equal_seeds_give_equal_contexts_and_two_seeds_have_nothing_in_common():
    def contexts(seed):
        return [c.questions[0].context for c in shared_contexts(TOKENIZER, 500, count=3, questions=2, seed=seed)]

    assert contexts(0) == contexts(0)
    assert not set(contexts(0)) & set(contexts(1))
    assert len(set(contexts(0))) == 3


def test_a_conversation_is_one_text_of_context_questions_and_answers():
    """The host sees every token once, in order: also the last token of an answer that filled its budget."""
    found = shared(450, questions=3)
    fed = []
    handle = HOST.register_forward_pre_hook(
        lambda module, args, kwargs: fed.extend(kwargs["input_ids"][0].tolist()), with_kwargs=True
    )
    try:
        answers = answer_turns(HOST, TOKENIZER, found, mode="conversation")
    finally:
        handle.remove()
    wanted = found.questions[0].context_ids[0].tolist()
    for sample, said in zip(found.questions, answers, strict=True):
        wanted += sample.question_ids[0].tolist()
        whole = TOKENIZER.decode(said.ids, skip_special_tokens=True) == said.text
        wanted += said.ids.tolist() if whole else said.ids[:-1].tolist()
    assert fed == wanted
    assert any(said.new_tokens == sample.max_new_tokens for sample, said in zip(found.questions, answers, strict=True))


def test_a_conversation_answers_as_the_model_does_without_a_cache():
    import torch

    found = shared(450, questions=3)
    answers = answer_turns(HOST, TOKENIZER, found, mode="conversation")
    text = found.questions[0].context_ids
    for sample, said in zip(found.questions, answers, strict=True):
        text = torch.cat([text, sample.question_ids], 1)
        with torch.no_grad():
            assert int(HOST(text).logits[0, -1].argmax()) == int(said.ids[0])
        whole = TOKENIZER.decode(said.ids, skip_special_tokens=True) == said.text
        text = torch.cat([text, (said.ids if whole else said.ids[:-1])[None]], 1)


def test_a_policy_that_forgets_cannot_be_cropped_and_answers_alike_copied_and_rerun():
    import headway

    found = shared(450, questions=3)
    with headway.use(HOST, KeepLast(40)):
        wanted = [a.ids.tolist() for a in answer_turns(HOST, TOKENIZER, found, mode="rerun")]
        assert [a.ids.tolist() for a in answer_turns(HOST, TOKENIZER, found, mode="copy")] == wanted
        with pytest.raises(HostError, match="mode='copy' or mode='rerun'"):
            answer_turns(HOST, TOKENIZER, found, mode="crop")


def test_a_cache_that_cannot_be_copied_is_refused_with_a_way_out():
    class Uncopied(Recaller):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.past_key_values.lock = __import__("threading").Lock()
            return out

    with pytest.raises(HostError, match="mode='rerun'"):
        answer_turns(Uncopied(), TOKENIZER, shared(questions=2), mode="copy")


def test_times_of_a_turn_are_its_own():
    answers = answer_turns(HOST, TOKENIZER, shared(450, questions=3), mode="copy")
    assert len({a.prefill_seconds for a in answers}) == 1
    assert all(0 < a.question_seconds < 60 for a in answers)
    rerun = answer_turns(HOST, TOKENIZER, shared(450, questions=3), mode="rerun")
    assert len({a.prefill_seconds for a in rerun}) == 3


def test_too_few_tokens_or_contexts_are_refused_with_what_is_needed():
    with pytest.raises(ArgumentError, match=r"tokens: got 100 for turns, expected at least \d+"):
        shared(100)
    with pytest.raises(ArgumentError, match="count: got 0"):
        list(shared_contexts(TOKENIZER, 500, count=0))
