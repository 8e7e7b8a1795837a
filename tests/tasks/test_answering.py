from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from transformers import DynamicCache

import headway
from headway.door.stages import Driver
from headway.errors import ArgumentError, HostError
from headway.tasks.answering import answer, cache_bytes, copy_cache, ending_ids, feed, fork, prefill
from headway.tasks.samples import make_sample
from tests.contracts.test_cache_policy import KeepLast
from tests.door.hosts import CAUSAL, tokens
from tests.look.tiny import byte_tokenizer, tiny_llama
from tests.tasks.recaller import Recaller

TOKENIZER = byte_tokenizer()
HOST = tiny_llama()


def ask(context="The secret code is 7412. And so it goes on.", **changes):
    fields = {
        "task": "t",
        "context": context,
        "question": "\nWhat is it?",
        "prefix": "\nThe secret code is",
        "references": ("7412",),
        "max_new_tokens": 12,
        "match": "exact",
        "stop": (".",),
    }
    return make_sample(TOKENIZER, **(fields | changes))


@pytest.mark.parametrize("aware", [True, False])
@pytest.mark.parametrize("chunk", [None, 7])
def test_a_planted_value_is_answered_in_every_mode(aware, chunk):
    found = answer(Recaller(), TOKENIZER, ask(), question_aware=aware, prefill_chunk=chunk)
    assert (found.text, found.score, found.question_aware) == (" 7412", 1.0, aware)


def test_blind_feeds_the_context_alone_first_and_aware_both_together():
    sample = ask()
    context, question = sample.context_ids.shape[1], sample.question_ids.shape[1]
    blind, aware = Recaller(), Recaller()
    answer(blind, TOKENIZER, sample, question_aware=False)
    answer(aware, TOKENIZER, sample, question_aware=True)
    assert blind.lengths[:2] == [context, question]
    assert set(blind.lengths[2:]) == {1}
    assert aware.lengths[:1] == [context + question]
    assert set(aware.lengths[1:]) == {1}


def test_chunks_cover_the_prompt_and_keep_one_row_of_logits():
    host, sample = Recaller(), ask()
    answer(host, TOKENIZER, sample, question_aware=True, prefill_chunk=16)
    prompt = [n for n in host.lengths if n > 1]
    assert sum(host.lengths[: -(-sample.prompt_tokens // 16)]) == sample.prompt_tokens
    assert set(prompt[:-1]) == {16}
    assert set(host.kept_logits) == {1}


def test_a_cache_that_forgets_the_value_cannot_answer():
    far = "The secret code is 7412. " + "And so it goes on. " * 5
    assert answer(Recaller(), TOKENIZER, ask(far), question_aware=False).score == 1.0
    assert answer(Recaller(keep=60), TOKENIZER, ask(far), question_aware=False).score == 0.0


def test_decoding_ends_at_a_stop_string_at_the_end_of_sequence_and_at_the_budget():
    assert answer(Recaller(), TOKENIZER, ask(stop=()), question_aware=True).new_tokens == 12
    end = TOKENIZER("2")["input_ids"][0]
    ended = answer(Recaller(end=end), TOKENIZER, ask(), question_aware=True)
    assert ended.text == " 741"
    assert end not in ended.ids


def test_decoding_ends_when_the_score_is_settled_unless_the_full_length_is_wanted():
    sample = ask(match="all", stop=())
    assert answer(Recaller(), TOKENIZER, sample, question_aware=True).text == " 7412"
    assert answer(Recaller(), TOKENIZER, sample, question_aware=True, full_length=True).text == " 7412. And s"


def test_times_and_bytes_come_back_with_the_answer():
    sample = ask()
    blind = answer(Recaller(), TOKENIZER, sample, question_aware=False)
    assert blind.prefill_seconds > 0
    assert blind.question_seconds > 0
    assert blind.decode_seconds > 0
    # The last token of an answer is never fed.
    assert blind.cache_bytes == 8 * (sample.prompt_tokens + blind.new_tokens - 1)
    one = answer(Recaller(), TOKENIZER, ask(max_new_tokens=1), question_aware=True)
    assert math.isnan(one.decode_seconds)
    assert one.question_seconds == 0


def test_greedy_answers_equal_those_of_generate_on_a_real_host():
    sample = ask(match="all", references=("no such thing",), stop=(), max_new_tokens=8)
    ours = answer(HOST, TOKENIZER, sample, question_aware=True)
    theirs = answer(HOST, TOKENIZER, sample, question_aware=True, through="generate")
    assert ours.ids.tolist() == theirs.ids.tolist()
    assert theirs.cache_bytes is None
    assert math.isnan(theirs.decode_seconds)


@pytest.mark.parametrize("name", ["llama", "mistral sliding", "gemma3 sliding", "gpt2"])
def test_blind_aware_and_chunked_give_dense_attention_the_same_logits(name):
    host, ids = CAUSAL[name](), tokens(1, 24)
    with torch.no_grad():
        wanted = host(ids).logits[0, -1]
    for first, chunk in ((24, None), (24, 5), (17, None), (17, 4)):
        running = prefill(host, ids[:, :first], chunk=chunk)
        if first < 24:
            feed(host, running, ids[:, first:], chunk=chunk)
        torch.testing.assert_close(running.logits[-1], wanted, atol=2e-4, rtol=1e-4)
        assert running.tokens == 24


def test_cache_bytes_are_those_of_keys_and_values_to_the_byte():
    running = prefill(HOST, tokens(1, 20))
    layers, kv_heads, dim = 4, 2, 8
    assert running.cache_bytes == layers * 2 * kv_heads * 20 * dim * 4


def test_a_storage_that_is_shared_counts_once_and_a_view_counts_as_its_buffer():
    cache = DynamicCache()
    buffer = torch.zeros(1, 2, 10, 4)
    cache.update(buffer[:, :, :3], buffer[:, :, 3:6], 0)
    cache.layers[0].keys, cache.layers[0].values = buffer[:, :, :3], buffer[:, :, 3:6]
    assert cache_bytes(cache) == 2 * 10 * 4 * 4


def test_a_fork_goes_on_without_the_request_it_came_from():
    running = prefill(HOST, tokens(1, 12))
    other = fork(running, HOST)
    feed(HOST, other, tokens(1, 5, seed=1))
    assert (running.cache.get_seq_length(), other.cache.get_seq_length()) == (12, 17)
    feed(HOST, running, tokens(1, 5, seed=1))
    torch.testing.assert_close(running.logits, other.logits)


def test_a_copied_cache_shares_the_model_and_the_policy():
    cache = prefill(HOST, tokens(1, 6)).cache
    cache.policy, cache.host = object(), HOST
    copied = copy_cache(cache, HOST)
    assert copied.policy is cache.policy
    assert copied.host is HOST
    assert copied.layers[0].keys.data_ptr() != cache.layers[0].keys.data_ptr()


def test_an_attached_policy_brings_its_own_cache_and_copies_of_it_go_on_alike():
    with headway.use(HOST, KeepLast(9)):
        running = prefill(HOST, tokens(1, 30), chunk=8)
        assert type(running.cache).__name__ == "PolicyCache"
        assert running.cache_bytes == running.cache.stored_bytes()
        other = fork(running, HOST)
        for one in (running, other):
            feed(HOST, one, tokens(1, 4, seed=1))
        torch.testing.assert_close(running.logits, other.logits)
    again = prefill(HOST, tokens(1, 30))
    feed(HOST, again, tokens(1, 4, seed=1))
    assert (again.logits - running.logits).abs().max() > 0.01


def test_an_attached_driver_answers_through_generate():
    class Silent(Driver):
        def generate(self, model, generate, *args, **kwargs):
            return generate(*args, **(kwargs | {"max_new_tokens": 2}))

    sample = ask(match="all", references=("no such thing",), stop=())
    with headway.use(HOST, Silent()):
        assert answer(HOST, TOKENIZER, sample, question_aware=True, through="generate").new_tokens == 2
        assert answer(HOST, TOKENIZER, sample, question_aware=True).new_tokens > 2


def test_an_output_of_generate_without_the_prompt_is_refused():
    class Bare(Driver):
        def generate(self, model, generate, *args, **kwargs):
            return generate(*args, **kwargs)[:, 5:]

    with headway.use(HOST, Bare()), pytest.raises(HostError, match="do not begin with the prompt"):
        answer(HOST, TOKENIZER, ask(), question_aware=True, through="generate")


def test_a_model_without_a_cache_is_refused():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = HOST

        def forward(self, input_ids, **_):
            output = self.inner(input_ids)
            output.past_key_values = None
            return output

    with pytest.raises(HostError, match="returned no cache"):
        answer(Bare(), TOKENIZER, ask(), question_aware=True)


@pytest.mark.parametrize("options", [{"question_aware": False}, {"question_aware": True, "prefill_chunk": 4}])
def test_generate_takes_the_whole_prompt_only(options):
    with pytest.raises(ArgumentError, match="through: got 'generate'"):
        answer(HOST, TOKENIZER, ask(), through="generate", **options)


def test_bad_chunks_and_ways_are_refused():
    for chunk in (0, -1, 2.0, True):
        with pytest.raises(ArgumentError, match="chunk: got"):
            answer(HOST, TOKENIZER, ask(), question_aware=True, prefill_chunk=chunk)
    with pytest.raises(ArgumentError, match="through: got 'magic'"):
        answer(HOST, TOKENIZER, ask(), question_aware=True, through="magic")
    with pytest.raises(ArgumentError, match="ids: got shape"):
        prefill(HOST, torch.ones(2, 4, dtype=torch.long))


def test_every_end_of_sequence_counts():
    host = tiny_llama(eos_token_id=[2, 5])
    assert {2, 5} <= ending_ids(host, TOKENIZER)
