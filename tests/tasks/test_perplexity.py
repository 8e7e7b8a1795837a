from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.errors import ArgumentError
from headway.tasks.perplexity import (
    Perplexity,
    negative_log_likelihood,
    perplexity,
    stream,
    stream_ids,
    text_bytes,
)
from tests.door.hosts import CAUSAL, tokens
from tests.look.tiny import TEXT, byte_tokenizer, tiny_llama
from tests.tasks.recaller import SURE, VOCABULARY, Recaller

HOST = tiny_llama()
TOKENIZER = byte_tokenizer()
IDS = tokens(1, 40)
with torch.no_grad():
    WANTED = -HOST(IDS).logits[0, :-1].log_softmax(-1).gather(1, IDS[0, 1:, None])[:, 0]


@settings(max_examples=15, deadline=None)
@given(chunk=st.integers(1, 45))
def test_every_chunking_gives_the_nll_of_one_forward(chunk):
    found = perplexity(HOST, IDS, chunk=chunk)
    torch.testing.assert_close(found.nll, WANTED, atol=3e-4, rtol=1e-4)
    assert found.positions.tolist() == list(range(1, 40))
    assert math.isclose(found.perplexity, math.exp(float(WANTED.double().mean())), rel_tol=1e-3)


@pytest.mark.parametrize("name", ["mistral sliding", "gemma3 sliding", "gpt-oss learned sinks"])
def test_token_by_token_equals_one_forward_on_hosts_with_windows(name):
    host = CAUSAL[name]()
    whole, single = perplexity(host, IDS, chunk=40), perplexity(host, IDS, chunk=1)
    torch.testing.assert_close(whole.nll, single.nll, atol=5e-4, rtol=1e-3)


def test_a_known_model_has_a_known_nll():
    row = torch.randperm(200, generator=torch.Generator().manual_seed(0))[:30] + 3
    found = perplexity(Recaller(match=2), row.repeat(2)[None], chunk=8)
    unsure = math.log(VOCABULARY)
    sure = math.log(math.exp(SURE) + VOCABULARY - 1) - SURE
    assert torch.allclose(found.nll[:31], torch.tensor(unsure))
    assert torch.allclose(found.nll[31:], torch.tensor(sure))
    assert found.buckets([32, 60])[0].perplexity < 1.001
    assert math.isclose(found.buckets([0, 32])[0].perplexity, VOCABULARY, rel_tol=1e-5)


def test_what_a_cache_forgets_is_not_predicted():
    row = torch.randperm(200, generator=torch.Generator().manual_seed(0))[:30] + 3
    twice = row.repeat(2)[None]
    assert perplexity(Recaller(match=2, keep=40), twice, chunk=1).nll[-1] < 0.01
    assert perplexity(Recaller(match=2, keep=20), twice, chunk=1).nll[-1] > 5


def test_skipped_tokens_are_read_but_not_scored():
    found = perplexity(HOST, IDS, chunk=16, skip=25)
    assert found.positions.tolist() == list(range(25, 40))
    torch.testing.assert_close(found.nll, WANTED[24:], atol=3e-4, rtol=1e-4)


def test_a_passed_cache_is_the_past():
    from headway.tasks.answering import prefill

    running = prefill(HOST, IDS[:, :20])
    found = perplexity(HOST, IDS[:, 20:], chunk=7, cache=running.cache)
    torch.testing.assert_close(found.nll, WANTED[20:], atol=3e-4, rtol=1e-4)


def test_bits_per_byte_of_a_byte_tokenizer_are_bits_per_token():
    ids = TOKENIZER(TEXT[:60], return_tensors="pt")["input_ids"]
    found = perplexity(HOST, ids, tokenizer=TOKENIZER)
    assert found.text_bytes == 59
    assert math.isclose(found.bits_per_byte, found.mean_nll / math.log(2), rel_tol=1e-9)
    assert perplexity(HOST, ids).bits_per_byte is None


def test_bytes_are_counted_as_utf8():
    assert text_bytes(TOKENIZER, torch.tensor(TOKENIZER("aéb")["input_ids"])) == 3


def test_an_endless_stream_is_fed_chunk_by_chunk_and_each_token_is_scored_once():
    host = Recaller(match=2, keep=16)
    steps = list(itertools.islice(stream(host, itertools.cycle([3, 4, 5, 6]), chunk=6), 5))
    assert [step.start for step in steps] == [0, 6, 12, 18, 24]
    assert [step.nll.numel() for step in steps] == [5, 6, 6, 6, 6]
    assert [step.cache_bytes for step in steps[2:]] == [128] * 3
    assert max(host.kept_logits) == 6


def test_a_stream_of_texts_is_their_tokens_in_order():
    assert TOKENIZER.decode(list(stream_ids(TOKENIZER, ["ab", "cd"]))) == "abcd"


def test_buckets_hold_every_position_once():
    found = perplexity(HOST, IDS, chunk=16)
    buckets = found.buckets([0, 8, 16, 40])
    assert [(b.start, b.stop, b.tokens) for b in buckets] == [(0, 8, 7), (8, 16, 8), (16, 40, 24)]
    total = sum(b.tokens * math.log(b.perplexity) for b in buckets)
    assert math.isclose(total / 39, found.mean_nll, rel_tol=1e-9)
    assert [(b.start, b.stop) for b in found.buckets()] == [(0, 64)]


def result(nll: torch.Tensor) -> Perplexity:
    positions = torch.arange(1, nll.numel() + 1)
    return Perplexity(nll=nll, positions=positions, text_bytes=None, seconds=0.0, cache_bytes=0)


def test_the_interval_holds_the_perplexity_and_shrinks_to_it_when_blocks_are_alike():
    nll = torch.rand(640, generator=torch.Generator().manual_seed(0)) * 4
    low, high = result(nll).interval(block=16, resamples=200)
    assert low < result(nll).perplexity < high
    assert result(nll).interval(block=16, resamples=200) == (low, high)
    flat = result(torch.full((256,), 2.0)).interval(block=16, resamples=50)
    assert math.isclose(flat[0], math.exp(2.0))
    assert math.isclose(flat[1], math.exp(2.0))


def test_a_perplexity_beyond_a_float_is_infinite():
    assert result(torch.full((4,), 1000.0)).perplexity == math.inf


def test_nll_is_the_same_however_many_rows_are_taken_at_once():
    logits = torch.randn(130, 50, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(130) % 50
    wanted = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(negative_log_likelihood(logits, targets), wanted)


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        (IDS[:, :1], {}, "ids: got shape"),
        (IDS[0], {}, "ids: got shape"),
        (IDS, {"chunk": 0}, "chunk: got 0"),
        (IDS, {"skip": 40}, "skip: got 40"),
    ],
)
def test_bad_input_is_refused(ids, options, message):
    with pytest.raises(ArgumentError, match=message):
        perplexity(HOST, ids, **options)


def test_too_few_tokens_for_an_interval_and_bad_edges_are_refused():
    with pytest.raises(ArgumentError, match="block: got 64 for 39"):
        perplexity(HOST, IDS).interval()
    with pytest.raises(ArgumentError, match="edges"):
        perplexity(HOST, IDS).buckets([5])
