"""The sink metric on maps whose α is known, and its collection through the door."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.door.hosts import decoder

from headway.door import AttentionCall, Forward, observe
from headway.errors import ArgumentError, HeadwayError, InterceptionError, NumericError
from headway.methods.sinks.sink_emergence import (
    CARD,
    PARTS,
    SinkObserver,
    alpha_from_received,
    decompose_scores,
    measure_sinks,
    proxy,
    received_mean,
    sink_rate,
    uniform_alpha,
    verdict,
)

TOKENS = 12


def random_weights(*shape: int, tokens: int = TOKENS, seed: int = 0) -> torch.Tensor:
    logits = 3 * torch.randn(*shape, tokens, tokens, generator=torch.Generator().manual_seed(seed))
    future = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    return logits.masked_fill(future, -torch.inf).softmax(-1)


def call_of(
    *, batch: int = 2, heads: int = 4, kv_heads: int = 2, tokens: int = TOKENS, seed: int = 0, **fields: object
) -> AttentionCall:
    generator = torch.Generator().manual_seed(seed)
    query = 2 * torch.randn(batch, heads, tokens, 8, generator=generator)
    key, value = (torch.randn(batch, kv_heads, tokens, 8, generator=generator) for _ in range(2))
    return AttentionCall.from_tensors(query, key, value, **{"causal": True, **fields})


def observed(*calls: AttentionCall, rows: int = 5):
    observer = SinkObserver(rows=rows)
    observer.start()
    for call in calls:
        observer.observe(call, call.attend(empty_rows="zero")[0])
    return observer.result()


def planted_call(tokens: int = 16, layer: int = 0) -> AttentionCall:
    """Every query lies along the first key, which is short, and the first value is drained."""
    query = torch.zeros(1, 1, tokens, 4)
    query[..., 0] = 40.0
    key = torch.zeros(1, 1, tokens, 4)
    key[..., 1] = 2.0
    key[0, 0, 0] = torch.tensor([1.0, 0, 0, 0])
    value = torch.ones(1, 1, tokens, 4)
    value[0, 0, 0] = 0.1
    return AttentionCall.from_tensors(query, key, value, layer=layer, causal=True)


def test_card_names_the_paper() -> None:
    assert (CARD.slug, CARD.arxiv, CARD.year, CARD.family) == ("sink-emergence", "2410.10781", 2024, "sinks")


@pytest.mark.parametrize("tokens", [2, 7, 64])
def test_uniform_attention_gives_harmonic_alpha(tokens: int) -> None:
    harmonic = [sum((Fraction(1, j) for j in range(1, n + 1)), Fraction(0)) for n in range(tokens + 1)]
    expected = [float((harmonic[tokens] - harmonic[k - 1]) / (tokens - k + 1)) for k in range(1, tokens + 1)]
    weights = torch.ones(tokens, tokens).tril() / torch.arange(1, tokens + 1)[:, None]
    torch.testing.assert_close(received_mean(weights), torch.tensor(expected))
    torch.testing.assert_close(uniform_alpha(tokens), torch.tensor(expected))


def test_a_perfect_sink_has_alpha_one_and_rate_one() -> None:
    weights = torch.zeros(3, 4, TOKENS, TOKENS)
    weights[..., 0] = 1.0
    alpha = received_mean(weights)
    assert torch.equal(alpha[..., 0], torch.ones(3, 4))
    assert not alpha[..., 1:].any()
    assert sink_rate([alpha]).overall.tolist() == [1.0, *[0.0] * (TOKENS - 1)]


def test_identity_attention_gives_one_over_the_queries_that_see_the_key() -> None:
    torch.testing.assert_close(received_mean(torch.eye(TOKENS)), torch.arange(TOKENS, 0, -1.0).reciprocal())


def test_bidirectional_alpha_is_the_column_mean() -> None:
    weights = torch.rand(2, TOKENS, TOKENS)
    visible = torch.ones(TOKENS, TOKENS, dtype=torch.bool)
    torch.testing.assert_close(received_mean(weights, visible=visible), weights.mean(-2))


def test_a_sliding_window_divides_by_the_queries_inside_it() -> None:
    window = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril().triu(-2)
    weights = window / window.sum(-1, keepdim=True)
    alpha = received_mean(weights, visible=window)
    torch.testing.assert_close(alpha[2:-2], torch.full((TOKENS - 4,), 1 / 3))
    assert float(alpha[0]) == pytest.approx((1 + 1 / 2 + 1 / 3) / 3)


def test_queries_that_continue_a_cache_are_the_last_rows() -> None:
    weights = random_weights(2)
    later = received_mean(weights[:, 5:])
    torch.testing.assert_close(later[:, 0], weights[:, 5:, 0].mean(-1))
    torch.testing.assert_close(later[:, -1], weights[:, -1, -1])


def test_a_key_that_no_query_sees_has_no_alpha() -> None:
    assert alpha_from_received(torch.tensor([3.0, 0.0]), torch.tensor([4.0, 0.0])).isnan().tolist() == [False, True]


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.integers(2, 20), st.integers(0, 2**31))
def test_received_mass_over_counts_is_the_received_mean(heads: int, tokens: int, seed: int) -> None:
    weights = random_weights(heads, tokens=tokens, seed=seed)
    counts = torch.arange(tokens, 0, -1.0)
    torch.testing.assert_close(alpha_from_received(weights.sum(-2), counts), received_mean(weights))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 5), st.integers(0, 2**31), st.randoms(use_true_random=False))
def test_rate_does_not_depend_on_the_order_of_sequences(count: int, seed: int, random) -> None:
    alpha = received_mean(random_weights(count, 3, seed=seed))
    order = random.sample(range(count), count)
    torch.testing.assert_close(sink_rate([alpha]).overall, sink_rate([alpha[order]]).overall)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.floats(0, 0.9), st.floats(0, 0.09))
def test_rate_never_rises_with_epsilon(seed: int, epsilon: float, more: float) -> None:
    alpha = received_mean(random_weights(4, 3, seed=seed))
    assert bool((sink_rate([alpha], epsilon + more).overall <= sink_rate([alpha], epsilon).overall).all())


def test_rate_is_strict_at_epsilon() -> None:
    alpha = torch.tensor([[[0.5, 0.25]]])
    assert sink_rate([alpha], 0.5).overall.tolist() == [0.0, 0.0]
    assert sink_rate([alpha], 0.25).overall.tolist() == [1.0, 0.0]


def test_rate_by_head_and_layer_is_the_planted_one_and_layers_weigh_the_same() -> None:
    one_of_four = torch.zeros(5, 4, 3)
    one_of_four[:, 2, 1] = 0.9
    both_of_two = torch.zeros(5, 2, 3)
    both_of_two[:4, :, 1] = 0.9
    rates = sink_rate([one_of_four, both_of_two])
    assert rates.by_head[0][:, 1].tolist() == [0, 0, 1, 0]
    torch.testing.assert_close(rates.by_head[1][:, 1], torch.tensor([0.8, 0.8]))
    torch.testing.assert_close(rates.by_layer[:, 1], torch.tensor([0.25, 0.8]))
    torch.testing.assert_close(rates.overall, torch.tensor([0.0, (0.25 + 0.8) / 2, 0.0]))


def test_rate_leaves_out_what_has_no_alpha() -> None:
    alpha = torch.tensor([[[0.9, 0.1]], [[0.9, torch.nan]], [[0.1, torch.nan]]])
    torch.testing.assert_close(sink_rate([alpha]).overall, torch.tensor([2 / 3, 0.0]))


@pytest.mark.parametrize("epsilon", [-0.1, 1.0, 30, float("nan")])
def test_epsilon_outside_zero_to_one_is_refused(epsilon: float) -> None:
    with pytest.raises(ArgumentError, match=r"epsilon: got .*, expected 0 ≤ ε < 1"):
        sink_rate([torch.zeros(1, 1, 2)], epsilon)


def test_weights_of_none_say_which_setting_gives_them() -> None:
    with pytest.raises(ArgumentError, match=r"weights: got None.*attn_implementation='eager'.*measure_sinks"):
        received_mean(None)


def test_half_precision_weights_are_measured_in_float32() -> None:
    weights = torch.full((1, 4096, 4096), 0.001, dtype=torch.bfloat16)
    visible = torch.ones(4096, 4096, dtype=torch.bool)
    alpha = received_mean(weights, visible=visible)
    assert alpha.dtype == torch.float32
    assert float(alpha[0, 0]) == pytest.approx(float(weights[0, 0, 0]), rel=1e-4)


def test_proxy_of_non_negative_scores_is_a_distribution_with_its_raw_mass() -> None:
    scores = torch.tensor([[0.2, 0.0], [0.3, 0.1]])
    weights, mass = proxy(scores)
    torch.testing.assert_close(weights, torch.tensor([[1.0, 0.0], [0.75, 0.25]]))
    torch.testing.assert_close(mass, torch.tensor([0.2, 0.4]))


def test_proxy_of_signed_scores_takes_sizes_and_keeps_the_signed_mass() -> None:
    weights, mass = proxy(torch.tensor([[3.0, -1.0]]), signed=True)
    torch.testing.assert_close(weights, torch.tensor([[0.75, 0.25]]))
    assert mass.tolist() == [2.0]


def test_proxy_of_softmax_weights_changes_nothing() -> None:
    weights = random_weights(2)
    torch.testing.assert_close(proxy(weights)[0], weights)


def test_proxy_hides_a_tiny_mass_that_the_raw_mass_shows() -> None:
    scores = torch.zeros(1, 4)
    scores[0, 0] = 1e-4
    weights, mass = proxy(scores)
    assert float(weights[0, 0]) == pytest.approx(1.0, abs=1e-3)
    assert float(mass) == pytest.approx(1e-4)


def test_proxy_of_an_empty_row_is_zero() -> None:
    assert proxy(torch.zeros(1, 4))[0].tolist() == [[0.0] * 4]


def test_proxy_refuses_negative_scores_unless_signed() -> None:
    with pytest.raises(ArgumentError, match=r"scores: got a negative entry \(-1\).*signed=True"):
        proxy(torch.tensor([[3.0, -1.0]]))


def test_decomposition_multiplies_back_to_the_score() -> None:
    call = call_of(batch=1)
    for position in range(1, TOKENS):
        row = decompose_scores(call.query[:, :, position : position + 1], call.key[:, :, : position + 1])
        product = row.query_norm * row.first_key_norm * row.first_cosine
        torch.testing.assert_close(row.first_product, product)
        expected = (call.query[0, :, position] * call.key[0, :, 0].repeat_interleave(2, 0)).sum(-1)
        torch.testing.assert_close(row.first_product[0], expected)


def test_decomposition_averages_over_the_queries_after_the_first() -> None:
    call = call_of(batch=1, heads=2, kv_heads=2)
    found = decompose_scores(call.query, call.key)
    q, k = call.query[0, 1], call.key[0, 1]
    cosine = torch.nn.functional.cosine_similarity(q[:, None], k[None], dim=-1)
    torch.testing.assert_close(found.first_cosine[0, 1], cosine[1:, 0].mean())
    torch.testing.assert_close(
        found.other_cosine[0, 1], torch.stack([cosine[t, 1 : t + 1].mean() for t in range(1, TOKENS)]).mean()
    )
    torch.testing.assert_close(found.query_norm[0, 1], q[1:].norm(dim=-1).mean())
    torch.testing.assert_close(
        found.other_key_norm[0, 1],
        torch.stack([k[1 : t + 1].norm(dim=-1).mean() for t in range(1, TOKENS)]).mean(),
    )


def test_decomposition_of_bidirectional_attention_leaves_the_first_tokens_own_query_out() -> None:
    call = call_of(batch=1, heads=2, kv_heads=2)
    visible = torch.ones(1, 1, TOKENS, TOKENS, dtype=torch.bool)
    found = decompose_scores(call.query, call.key, visible=visible)
    scores = call.query[0, 1] @ call.key[0, 1].T
    torch.testing.assert_close(found.first_product[0, 1], scores[1:, 0].mean())
    torch.testing.assert_close(found.other_product[0, 1], scores[1:, 1:].mean())


def test_a_planted_sink_shows_its_large_cosine_its_short_key_and_its_drained_value() -> None:
    (site,) = observed(planted_call())
    assert float(site.alpha[0, 0, 0]) > 0.99
    assert site.decomposition.first_cosine.tolist() == [[1.0]]
    assert site.decomposition.other_cosine.tolist() == [[0.0]]
    assert site.key_ratio.tolist() == [[0.5]]
    assert float(site.value_ratio) == pytest.approx(0.1)
    assert float(site.first_share) > 0.99
    assert float(site.key_cosine) < 0.1


@pytest.mark.parametrize("rows", [1, 5, 64])
def test_observer_by_blocks_equals_the_metric_on_the_full_map(rows: int) -> None:
    call = call_of()
    (site,) = observed(call, rows=rows)
    torch.testing.assert_close(site.alpha, received_mean(call.weights()))
    torch.testing.assert_close(site.mass, torch.ones(2, 4))
    torch.testing.assert_close(site.first_share, call.weights()[:, :, 1:, 0].mean(-1))
    expected = decompose_scores(call.query, call.key)
    for name in PARTS:
        torch.testing.assert_close(getattr(site.decomposition, name), getattr(expected, name))


def test_observer_is_corrected_for_sliding_windows() -> None:
    window = torch.ones(1, 1, TOKENS, TOKENS, dtype=torch.bool).tril().triu(-3)
    call = call_of(mask=window)
    (site,) = observed(call)
    torch.testing.assert_close(site.alpha, received_mean(call.weights(), visible=window))
    assert site.seen[0, 0].tolist() == [4.0] * 9 + [3.0, 2.0, 1.0]


def test_observer_takes_plain_column_means_of_bidirectional_attention() -> None:
    call = call_of(causal=False)
    (site,) = observed(call)
    torch.testing.assert_close(site.alpha, call.weights().mean(2))


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(["right", "left"]), st.lists(st.integers(0, 6), min_size=2, max_size=2), st.integers(0, 2**31))
def test_padding_changes_nothing(side: str, padding: list[int], seed: int) -> None:
    width = TOKENS + max(padding)
    bare = call_of(seed=seed)
    query, key, value = (
        torch.randn(*x.shape[:2], width, 8, generator=torch.Generator().manual_seed(1)) * 5
        for x in (bare.query, bare.key, bare.value)
    )
    valid = torch.zeros(2, width, dtype=torch.bool)
    start = [width - TOKENS if side == "left" else 0 for _ in padding]
    start[1] -= min(start[1], padding[1])
    for row, at in enumerate(start):
        valid[row, at : at + TOKENS] = True
        for padded, original in ((query, bare.query), (key, bare.key), (value, bare.value)):
            padded[row, :, at : at + TOKENS] = original[row]
    call = AttentionCall.from_tensors(
        query, key, value, causal=True, mask=valid[:, None, None], forward=Forward(padding=valid)
    )
    (site,), (expected,) = observed(call), observed(bare)
    torch.testing.assert_close(site.alpha[..., :TOKENS], expected.alpha, atol=1e-5, rtol=1e-4)
    assert site.alpha[..., TOKENS:].isnan().all()
    for name in ("first_share", "mass", "key_ratio", "value_ratio", "key_cosine"):
        torch.testing.assert_close(getattr(site, name), getattr(expected, name), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(
        site.decomposition.other_cosine, expected.decomposition.other_cosine, atol=1e-5, rtol=1e-4
    )


def test_sequences_of_unequal_length_are_gathered_with_gaps() -> None:
    (site,) = observed(call_of(tokens=8), call_of(tokens=5, seed=1))
    assert site.alpha.shape == (4, 4, 8)
    assert site.alpha[2:, :, 5:].isnan().all()
    assert not site.alpha[:2].isnan().any()


def test_a_sequence_read_in_pieces_equals_the_whole() -> None:
    whole = call_of()
    pieces = []
    for step, (start, stop) in enumerate([(0, 5), (5, 6), (6, TOKENS)]):
        pieces.append(
            AttentionCall.from_tensors(
                whole.query[:, :, start:stop],
                whole.key[:, :, :stop],
                whole.value[:, :, :stop],
                causal=True,
                forward=Forward(step=step),
            )
        )
    (site,), (expected,) = observed(*pieces), observed(whole)
    torch.testing.assert_close(site.alpha, expected.alpha)
    torch.testing.assert_close(site.first_share, expected.first_share)
    torch.testing.assert_close(site.value_ratio, expected.value_ratio)
    torch.testing.assert_close(site.decomposition.other_product, expected.decomposition.other_product)


def test_a_sliding_cache_adds_to_the_keys_it_still_holds() -> None:
    whole = call_of(mask=torch.ones(1, 1, TOKENS, TOKENS, dtype=torch.bool).tril().triu(-3))
    start = whole.replace(query=whole.query[:, :, :8], key=whole.key[:, :, :8], value=whole.value[:, :, :8])
    start = start.replace(mask=whole.mask[:, :, :8, :8])
    steps = [
        AttentionCall.from_tensors(
            whole.query[:, :, t : t + 1],
            whole.key[:, :, t - 3 : t + 1],
            whole.value[:, :, t - 3 : t + 1],
            first_key=t - 3,
            first_query=t,
            forward=Forward(step=t),
        )
        for t in range(8, TOKENS)
    ]
    (site,), (expected,) = observed(start, *steps), observed(whole)
    torch.testing.assert_close(site.alpha, expected.alpha)
    torch.testing.assert_close(site.first_share, expected.first_share)


def test_a_step_with_other_sequences_than_before_is_refused() -> None:
    with pytest.raises(InterceptionError, match="got 1 sequences in a step that continues 2"):
        observed(call_of(), call_of(batch=1, forward=Forward(step=1)))


def test_learned_sinks_take_mass_out_of_the_rows() -> None:
    call = call_of(sinks=torch.tensor([-torch.inf, 0.0, 20.0, 0.0]))
    (site,) = observed(call)
    torch.testing.assert_close(site.mass[:, 0], torch.ones(2))
    assert bool((site.mass[:, 2] < 0.1).all())
    torch.testing.assert_close(site.mass, call.weights().sum(-1).mean(-1))


def test_start_forgets_the_sequences_before() -> None:
    observer = SinkObserver()
    call = call_of()
    for _ in range(2):
        observer.start()
        observer.observe(call, call.value)
    assert observer.result()[0].alpha.shape[0] == 2


def test_an_observer_without_any_call_says_so() -> None:
    with pytest.raises(ArgumentError, match="observer: got no attention call"):
        SinkObserver().result()


def test_nan_in_the_keys_is_named_with_its_site() -> None:
    call = call_of(layer=3)
    call.key[0, 0, 0, 0] = torch.nan
    with pytest.raises(NumericError, match=r"key at layers\.3: got NaN"):
        observed(call)


def sequences(count: int = 5, tokens: int = 20, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 90, (count, tokens), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def llama():
    return decoder("Llama", attn_implementation="eager")


@torch.no_grad()
def test_measuring_a_model_equals_the_metric_on_its_own_weights(llama) -> None:
    ids = sequences()
    found = measure_sinks(llama, ids, length=20, batch=2, epsilon=0.2)
    attentions = llama(input_ids=ids, output_attentions=True).attentions
    alphas = [received_mean(a) for a in attentions]
    for site, alpha in zip(found.sites, alphas, strict=True):
        torch.testing.assert_close(site.alpha, alpha, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.rates.overall, sink_rate(alphas, 0.2).overall)
    torch.testing.assert_close(found.by_sequence().mean(), found.rates.overall[0])


@torch.no_grad()
def test_hidden_norm_ratio_is_that_of_the_stream_entering_each_layer(llama) -> None:
    ids = sequences()
    found = measure_sinks(llama, ids, length=20, batch=2)
    hidden = llama(input_ids=ids, output_hidden_states=True).hidden_states
    assert found.hidden_ratio.shape == (5, 3)
    for layer in range(3):
        norms = hidden[layer].norm(dim=-1)
        torch.testing.assert_close(found.hidden_ratio[:, layer], norms[:, 0] / norms[:, 1:].mean(1))


def test_measuring_leaves_the_model_as_it_was(llama) -> None:
    ids = sequences()
    before = llama(input_ids=ids).logits
    measure_sinks(llama, ids, length=20)
    assert torch.equal(llama(input_ids=ids).logits, before)


@pytest.mark.parametrize("side", ["right", "left"])
def test_padded_rows_give_the_numbers_of_bare_ones(llama, side: str) -> None:
    ids = sequences(count=3)
    padded = torch.zeros(3, 26, dtype=torch.long)
    mask = torch.zeros(3, 26, dtype=torch.long)
    for row, pad in enumerate((6, 2, 0)):
        start = pad if side == "left" else 0
        padded[row, start : start + 20], mask[row, start : start + 20] = ids[row], 1
    bare = measure_sinks(llama, ids, length=20)
    cut = measure_sinks(llama, padded, length=20, attention_mask=mask)
    whole = measure_sinks(llama, padded, length=None, attention_mask=mask)
    for other in (cut, whole):
        for site, expected in zip(other.sites, bare.sites, strict=True):
            torch.testing.assert_close(site.alpha[..., :20], expected.alpha, atol=1e-4, rtol=1e-3)
            torch.testing.assert_close(site.value_ratio, expected.value_ratio, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(other.hidden_ratio, bare.hidden_ratio, atol=1e-4, rtol=1e-3)


def test_length_takes_the_first_tokens_only(llama) -> None:
    ids = sequences(tokens=30)
    found, expected = measure_sinks(llama, ids, length=12), measure_sinks(llama, ids[:, :12], length=12)
    torch.testing.assert_close(found.rates.overall, expected.rates.overall)
    assert found.length == 12


def test_cached_generation_is_measured_as_one_sequence(llama) -> None:
    ids = sequences(count=1)
    observer = SinkObserver()
    with observe(llama, observer):
        out = llama.generate(ids, max_new_tokens=4, do_sample=False, attention_mask=torch.ones_like(ids))
    read = out[:, :-1]
    expected = measure_sinks(llama, read, length=None)
    for site, other in zip(observer.result(), expected.sites, strict=True):
        torch.testing.assert_close(site.alpha, other.alpha, atol=1e-4, rtol=1e-3)


def test_special_first_tokens_are_counted(llama) -> None:
    ids = sequences(count=4)
    ids[0, 0] = ids[1, 0] = 1
    assert measure_sinks(llama, ids, length=20).first_special == 0.5
    assert measure_sinks(llama, ids, length=20, special_ids=[int(ids[3, 0])]).first_special == 0.25


def test_progress_ends_at_the_number_of_sequences(llama) -> None:
    seen = []
    measure_sinks(llama, sequences(), length=20, batch=2, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(2, 5), (4, 5), (5, 5)]


def test_a_summary_is_plain_numbers(llama) -> None:
    import json

    summary = measure_sinks(llama, sequences(), length=20).summary()
    assert json.loads(json.dumps(summary)) == summary
    assert len(summary["value_norm_ratio"]) == len(summary["layers"]) == 3


def test_a_sequence_shorter_than_the_length_is_refused(llama) -> None:
    with pytest.raises(ArgumentError, match=r"got one of 20 tokens, expected at least length=64.*length=None"):
        measure_sinks(llama, sequences())
    mask = torch.ones(5, 20)
    mask[2, 9:] = 0
    with pytest.raises(ArgumentError, match="got one of 9 tokens, expected at least length=20"):
        measure_sinks(llama, sequences(), length=20, attention_mask=mask)
    assert measure_sinks(llama, sequences(), length=None).length == 20


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sequences": torch.zeros(20, dtype=torch.long)}, r"sequences: got torch.int64 of shape \(20,\)"),
        ({"sequences": torch.zeros(0, 20, dtype=torch.long)}, r"of shape \(0, 20\)"),
        ({"sequences": torch.zeros(2, 20)}, "sequences: got torch.float32"),
        ({"length": 1}, "length: got 1, expected at least 2"),
        ({"epsilon": 1.5}, "epsilon: got 1.5"),
        ({"attention_mask": torch.ones(5, 19)}, r"attention_mask: got shape \(5, 19\), expected \(5, 20\)"),
        ({"attention_mask": torch.tensor([[1, 0] * 10] * 5)}, "one unbroken run"),
        ({"attention_mask": torch.zeros(5, 20)}, "one unbroken run"),
        ({"sequences": torch.zeros(1, 200, dtype=torch.long), "length": None}, "at most the model's 128 positions"),
    ],
)
def test_bad_input_is_named(llama, change: dict, message: str) -> None:
    arguments = {"sequences": sequences(), "length": 20} | change
    with pytest.raises(HeadwayError, match=message):
        measure_sinks(llama, **arguments)


class TestVerdict:
    @pytest.fixture
    def flat(self):
        """A host whose heads spread their attention evenly: its queries are zero."""
        model = decoder("Llama")
        for layer in model.model.layers:
            torch.nn.init.zeros_(layer.self_attn.q_proj.weight)
        return model

    def test_a_model_without_a_sink_is_said_to_have_none(self, flat) -> None:
        found = measure_sinks(flat, sequences(tokens=64))
        torch.testing.assert_close(found.sites[0].alpha[0, 0], uniform_alpha(64))
        assert verdict(found).startswith("No attention sink: the highest sink rate is 0.0%")

    def test_the_last_tokens_attending_to_themselves_are_no_sink(self, flat) -> None:
        found = measure_sinks(flat, sequences(tokens=64))
        site = found.sites[0]
        site.alpha[..., -1] = 1.0
        assert float(found.by_sequence(63).mean()) == pytest.approx(1 / 3)
        assert verdict(found).startswith("No attention sink")

    def test_a_sink_is_named_with_its_position_and_rate(self, flat) -> None:
        found = measure_sinks(flat, sequences(tokens=64), special_ids=[])
        found.sites[1].alpha[..., 7] = 0.8
        assert verdict(found).startswith("Attention sink at position 7 (not the first token): 33.3% of heads")
        found.sites[1].alpha[..., 7] = 0.1
        found.sites[2].alpha[..., 0] = 0.8
        assert verdict(found).startswith("Attention sink at position 0 (an ordinary token): 33.3% of heads")

    def test_a_special_first_token_is_said_to_be_one(self, flat) -> None:
        ids = sequences(tokens=64)
        ids[:, 0] = 1
        found = measure_sinks(flat, ids)
        found.sites[2].alpha[..., 0] = 0.8
        assert "(a special token)" in verdict(found)
