"""The causal matrix: where effects can be, that a shared prefix changes nothing, and what truncation gets wrong."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import headway
from headway.door import Observer
from headway.errors import ArgumentError
from headway.hosts.tiny import tiny_host
from headway.methods.diagnosis.thought_anchors import row_normalised, sentence_effects, suppression_matrix
from headway.methods.diagnosis.thought_anchors import suppression as module

SPANS = [(3, 9), (9, 14), (14, 20), (22, 30)]


@pytest.fixture(scope="module")
def host():
    return tiny_host("llama", num_hidden_layers=3)[0]


@pytest.fixture(scope="module")
def ids():
    return torch.randint(8, 60, (1, 32), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def found(host, ids):
    return suppression_matrix(host, ids, SPANS)


def test_a_shared_prefix_gives_what_whole_forwards_give(host, ids, found):
    whole = suppression_matrix(host, ids, SPANS, reuse_prefix=False)
    assert found.reused
    assert not whole.reused
    np.testing.assert_allclose(found.tokens, whole.tokens, atol=1e-5)
    np.testing.assert_allclose(found.raw, whole.raw, atol=1e-3)


def test_the_prefix_is_walked_anew_where_a_cache_forgets(ids):
    host = tiny_host("mistral", num_hidden_layers=2, sliding_window=8)[0]
    shared, whole = (suppression_matrix(host, ids, SPANS, reuse_prefix=r) for r in (True, False))
    np.testing.assert_allclose(shared.tokens, whole.tokens, atol=1e-5)
    assert shared.forwards <= len(SPANS) + 2


@pytest.mark.parametrize(("architecture", "reused"), [("lfm2", True), ("falcon_h1", True), ("jamba", False)])
def test_states_that_are_lost_on_the_way_are_noticed(ids, architecture, reused, caplog):
    """Jamba's state space layers start anew when several tokens go on from a cache."""
    host = tiny_host(architecture)[0]
    shared, whole = (suppression_matrix(host, ids, SPANS, reuse_prefix=r) for r in (True, False))
    assert shared.reused == reused
    np.testing.assert_allclose(shared.tokens, whole.tokens, atol=1e-4)
    assert shared.forwards <= len(SPANS) + 2
    assert ("unlike it reads a text at once" in caplog.text) == (not reused)


def test_n_sentences_cost_at_most_n_plus_two_forwards(found):
    assert found.forwards <= len(SPANS) + 2
    assert found.forwards == pytest.approx(1 + sum(32 - stop for _, stop in SPANS) / 32)


def test_only_tokens_predicted_from_behind_the_sentence_have_an_effect(found):
    for j, (_, stop) in enumerate(SPANS):
        assert np.isnan(found.tokens[j, : stop + 1]).all()
        assert np.isfinite(found.tokens[j, stop + 1 :]).all()
        assert (found.tokens[j, stop + 1 :] > 1e-6).all()


def test_a_token_is_predicted_one_row_before_it_and_the_last_one_counts(host, ids, found):
    blocks = (((9, 32), (3, 9)),)
    with torch.no_grad():
        plain = host(input_ids=ids, use_cache=False).logits[0]
        with headway.use(host, headway.door.SuppressBlocks(blocks=blocks)):
            hidden = host(input_ids=ids, use_cache=False).logits[0]
    p, q = (torch.log_softmax(x / 0.6, -1) for x in (plain, hidden))
    wanted = (p.exp() * (p - q)).sum(-1)
    np.testing.assert_allclose(found.tokens[0, 10:], wanted[9:31], atol=1e-5)


def test_the_first_token_behind_a_sentence_is_left_out_of_the_mean():
    tokens = np.full((2, 6), np.nan)
    tokens[0, 4:] = 1.0
    raw = sentence_effects(tokens, [(1, 3), (3, 6)])
    assert raw[1, 0] == pytest.approx(math.log(1 + 1e-9))
    assert np.isnan(raw[[0, 0, 1], [0, 1, 1]]).all()


def test_hiding_nothing_has_no_effect(host, ids):
    found = suppression_matrix(host, ids, [(5, 5), (9, 14), (14, 20)])
    assert np.nanmax(found.tokens[0]) < 1e-9
    np.testing.assert_allclose(found.raw[1:, 0], math.log(1e-9), atol=0.7)


def test_a_sentence_at_the_very_start_keeps_causality(host, ids):
    """Blocking the sentence's own rows as well would leave them without a key; no row reads the future here."""
    changed = ids.clone()
    changed[0, 20:] = 7
    spans = [(0, 9), (9, 14), (14, 20)]
    first, second = suppression_matrix(host, ids, spans), suppression_matrix(host, changed, spans)
    np.testing.assert_allclose(first.tokens[:, :20], second.tokens[:, :20], atol=1e-6)


def test_rows_of_the_normalised_matrix_have_mean_zero(found):
    for i in range(1, len(SPANS)):
        assert np.nanmean(found.normalised[i]) == pytest.approx(0, abs=1e-12)
    assert np.isnan(found.normalised[0]).all()
    assert np.isnan(row_normalised(np.full((2, 2), np.nan))).all()


def test_hiding_from_one_layer_changes_later_layers_only(host, ids):
    outputs = {}

    class Read(Observer):
        def observe(self, call, output, lse=None):
            outputs.setdefault(call.site.layer, []).append(output.clone())

    heads = [(1, h) for h in range(host.config.num_attention_heads)]
    blocks = (((9, 32), (3, 9)),)
    with torch.no_grad():
        with headway.use(host, Read()):
            host(input_ids=ids, use_cache=False)
        with headway.use(host, headway.door.SuppressBlocks(blocks=blocks, heads=heads), Read()):
            host(input_ids=ids, use_cache=False)
    assert torch.allclose(*outputs[0], atol=1e-6)
    assert not torch.allclose(*outputs[1], atol=1e-4)
    assert not torch.allclose(*outputs[2], atol=1e-4)
    some = suppression_matrix(host, ids, SPANS, heads=heads)
    assert np.nanmax(some.tokens) > 1e-6


def test_what_is_not_kept_is_one_event_and_never_explodes(host, ids, found):
    """Truncated support with a missing entry at −1e9 gives divergences near 1e9."""
    few = suppression_matrix(host, ids, SPANS, baseline="top_p")
    known = np.isfinite(found.tokens)
    assert (few.tokens[known] <= found.tokens[known] + 1e-5).all()
    assert np.corrcoef(few.tokens[known], found.tokens[known])[0, 1] > 0.9


def test_peaked_distributions_that_part_stay_finite():
    far = torch.full((2, 50), -200.0)
    far[0, 3], far[1, 7] = 200.0, 200.0
    assert torch.isfinite(module.divergence(far[:1], far[1:])).all()


def test_an_interrupted_run_goes_on(host, ids, found):
    store = {}

    def stop(done, total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        suppression_matrix(host, ids, SPANS, store=store, progress=stop)
    assert sorted(store) == [0, 1]
    again = suppression_matrix(host, ids, SPANS, store=store)
    np.testing.assert_allclose(again.tokens, found.tokens, atol=1e-6)
    assert again.forwards < found.forwards
    assert suppression_matrix(host, ids, SPANS, store=store).forwards == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"ids": torch.zeros(2, 32, dtype=torch.long)}, "one trace at a time"),
        ({"spans": []}, "spans: got none"),
        ({"spans": [(9, 14), (3, 9)]}, "in order"),
        ({"spans": [(9, 40)]}, "32"),
        ({"temperature": 0.0}, "above 0"),
        ({"baseline": "some"}, "baseline"),
    ],
)
def test_arguments_that_cannot_be_are_refused(host, ids, change, words):
    given = {"ids": ids, "spans": SPANS} | change
    with pytest.raises(ArgumentError, match=words):
        suppression_matrix(host, given.pop("ids"), given.pop("spans"), **given)


def test_logits_too_large_to_keep_are_refused_before_any_work(host, ids, monkeypatch):
    monkeypatch.setattr(module, "BASELINE_BYTES", 100)
    with pytest.raises(ArgumentError, match="top_p"):
        suppression_matrix(host, ids, SPANS)
