"""The survey's rules on the embedded real model."""

from __future__ import annotations

import pytest
import torch

import headway
from headway.hosts import default_text, load, tokenize
from headway.methods.sinks.sink_survey import A2SF, H2O, KeyDiff, find_register_neurons, norm_ratio, run_with_register
from headway.methods.sinks.sink_survey.interpretation import YES, implicit_bias
from headway.tasks.perplexity import perplexity

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def host():
    model, tokenizer = load("smollm2")
    return model, tokenize(tokenizer, default_text(), 512)


def test_a_register_takes_the_massive_state_off_the_first_token(host):
    model, ids = host
    text = ids[:, :48]
    neurons = find_register_neurons(model, {"input_ids": text}, [0], count=4)
    with torch.no_grad():
        before = model(input_ids=text, output_hidden_states=True).hidden_states
        after = run_with_register(model, text, neurons, output_hidden_states=True).hidden_states
    largest = [max(float(norm_ratio(h)) for h in states[:-1]) for states in (before, after)]
    assert largest[0] > 50
    assert largest[1] < 0.2 * largest[0]


def test_what_the_sink_adds_is_a_constant_and_what_another_token_adds_is_not(host):
    model, ids = host
    texts = ids[0, : 4 * 32].view(4, 32)
    sink = implicit_bias(model, texts)
    heads = [(row["layer"], row["head"]) for row in sink.details["heads"]]
    assert sink.verdict == YES
    assert implicit_bias(model, texts, sinks=(7,), heads=heads).value < 0.5


def test_heavy_hitters_hold_the_sink_without_being_told(host):
    model, ids = host
    with headway.use(model, H2O(budget=64, recent=32, sinks=0)), torch.no_grad():
        past = model(input_ids=ids[:, :256], use_cache=True).past_key_values
    held = torch.stack([(places == 0).any(-1).float().mean() for places in past.held()])
    assert max(places.shape[-1] for places in past.held()) == 64
    assert float(held.mean()) > 0.5


def test_small_caches_stay_near_dense(host):
    model, ids = host
    text = ids[:, :320]
    dense = perplexity(model, text, chunk=40, skip=160).perplexity
    for policy in (H2O(budget=96, recent=48), A2SF(budget=96), KeyDiff(budget=96)):
        with headway.use(model, policy):
            got = perplexity(model, text, chunk=40, skip=160)
        assert got.perplexity < 1.5 * dense, policy.title
        assert got.cache_bytes < 0.5 * 320 * 30 * 2 * 3 * 64 * 4
