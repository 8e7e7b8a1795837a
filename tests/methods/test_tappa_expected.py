"""Expected Attention beside TAPPA: the formula against draws of queries, and a planted key that only it keeps."""

from __future__ import annotations

import pytest
import torch
from tests.contracts import cache_policy as contract
from tests.door.hosts import CAUSAL, decoder

import headway
from headway.errors import ArgumentError, HostError
from headway.kernels.rope import rope_frequencies, rotate
from headway.methods.long_context.tappa import ExpectedAttention, TappaEviction, expected_scores, mean_rotation


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("rotated", [8, 4])
def test_the_mean_rotation_is_the_mean_of_rotated_vectors(layout, rotated):
    frequencies, x = rope_frequencies(rotated, 50.0), normal(1, 1, 8)
    places = torch.arange(20, 29)
    each = torch.stack([rotate(x, place[None], frequencies, layout)[0, 0] for place in places])
    torch.testing.assert_close(mean_rotation(places, frequencies, 8, layout) @ x[0, 0], each.mean(0))


def test_scores_are_the_mean_weights_of_queries_drawn_from_the_same_distribution():
    """Two hundred thousand Gaussian queries give each key, before normalisation, what the formula says."""
    queries, keys, values = 0.7 * normal(1, 1, 400, 4), normal(1, 1, 6, 4, seed=1), normal(1, 1, 6, 4, seed=2)
    mean = queries[0, 0].mean(0)
    factor = torch.linalg.cholesky(torch.cov(queries[0, 0].T, correction=0))
    drawn = mean + normal(200_000, 4, seed=3) @ factor.T
    weights = (drawn @ keys[0, 0].T / 2).exp().mean(0)
    want = (weights / weights.sum() + 0.1) * values[0, 0].norm(dim=-1)
    got = expected_scores(
        queries, keys, values, torch.eye(4), scale=0.5, epsilon=0.1,
        counted=torch.ones(1, 400, dtype=torch.bool), visible=torch.ones(1, 1, 6, dtype=torch.bool),
    )  # fmt: skip
    torch.testing.assert_close(got[0, 0], want, rtol=0.01, atol=0)


def test_queries_that_do_not_count_and_keys_that_are_not_seen_change_nothing():
    queries, keys = normal(1, 4, 9, 4), normal(1, 2, 7, 4, seed=1)
    counted, visible = torch.ones(1, 9, dtype=torch.bool), torch.ones(1, 2, 7, dtype=torch.bool)
    counted[:, :2], visible[:, :, 3] = False, False
    options = {"scale": 0.5, "counted": counted, "visible": visible}
    first = expected_scores(queries, keys, keys, torch.eye(4), **options)
    queries[:, :, :2], keys[:, :, 3] = 1e3, 0.5
    second = expected_scores(queries, keys, keys, torch.eye(4), **options)
    torch.testing.assert_close(first, second)
    assert bool((first[:, :, 3] == 0).all())
    keys[:, :, 4] *= 2
    assert not torch.allclose(second, expected_scores(queries, keys, keys, torch.eye(4), **options))


def test_a_key_that_most_queries_ask_for_stays_though_the_last_ones_do_not():
    """The judges of TAPPA are the last queries alone."""
    model = decoder("Llama", num_hidden_layers=1, num_key_value_heads=1)
    ids = contract.tokens(1, 60)
    with torch.no_grad():
        model.model.rotary_emb.inv_freq.zero_()
        layer = model.model.layers[0].self_attn
        layer.q_proj.weight.zero_(), layer.k_proj.weight.zero_()
        normed = model.model.layers[0].input_layernorm(model.model.embed_tokens.weight)
        wanted, asking, other = normed[ids[0, 20]], normed[80], normed[85]
        for head in range(layer.q_proj.weight.shape[0] // 8):
            layer.q_proj.weight[8 * head] = asking / asking.norm()
            layer.q_proj.weight[8 * head + 1] = other / other.norm()
        layer.k_proj.weight[0] = 3 * wanted / wanted.norm()
    ids[0, 21:-8], ids[0, -8:] = 80, 85
    kept = {}
    for policy in (ExpectedAttention(budget=12, window=4), TappaEviction(budget=12, window=4, preference="uniform")):
        with headway.use(model, policy), torch.no_grad():
            cache = model(input_ids=ids, use_cache=True).past_key_values
        places = cache.layers[0].parts[0].positions[0, 0].tolist()
        kept[policy.title] = places
        assert len(places) == 12
        assert {56, 57, 58, 59} <= set(places)
    assert 20 in kept["ExpectedAttention"]
    assert {0, 1, 2, 3} <= set(kept["ExpectedAttention"])
    assert 20 not in kept["TappaEviction"]


@pytest.mark.parametrize(
    "check",
    [contract.check_causality, contract.check_requests_apart, contract.check_batch, contract.check_padding,
     contract.check_reorder_and_reset, contract.check_generate, contract.check_refuses_crop],
)  # fmt: skip
def test_it_meets_the_contract(check):
    check(CAUSAL["llama"](), lambda: ExpectedAttention(budget=8, window=3, sinks=2))


def test_it_holds_what_tappa_holds():
    model, ids = decoder("Llama"), contract.tokens(1, 60)
    held = []
    for policy in (ExpectedAttention(budget=20, window=4), TappaEviction(budget=20, window=4)):
        with headway.use(model, policy), torch.no_grad():
            held.append(model(input_ids=ids, use_cache=True).past_key_values.stored_bytes())
    assert held[0] == held[1]


@pytest.mark.parametrize("level", ["layer", "head"])
def test_the_window_stays_where_the_budget_has_no_room_for_all_sinks(level):
    """One key beside the window: the first token, never one of the last in place of another sink."""
    with headway.use(decoder("Llama"), ExpectedAttention(budget=7, window=6, level=level, slack=0)) as handle:
        cache = handle.model(input_ids=contract.tokens(1, 30), use_cache=True).past_key_values
    held = [places for layer in cache.layers for store in layer.parts for places in store.positions[0].tolist()]
    assert held == [[0, *range(24, 30)]] * 6


def test_bad_options_and_hosts_without_rotary_positions_are_refused():
    for name, value in {"future": 0, "sinks": -1, "epsilon": -0.1}.items():
        with pytest.raises(ArgumentError, match=f"{name}: got {value}"):
            ExpectedAttention(**{name: value})
    with pytest.raises(ArgumentError, match="before RoPE"):
        ExpectedAttention(stage="post_rope")
    model = CAUSAL["gpt2"]()
    with headway.use(model, ExpectedAttention(budget=8, window=3)), pytest.raises(HostError, match="rotary"):
        model(input_ids=contract.tokens(1, 20), use_cache=True)
