"""Level tables, sink score, matrix entropy and the lifetime law, on values that can be worked out."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.errors import ArgumentError
from headway.kernels.reductions import reduce_attention
from headway.methods.sinks.secondary_sinks import (
    LevelTable,
    SinkMap,
    chunk_entropies,
    group_profile,
    lifetime_law,
    matrix_entropy,
    norm_for_lifetime,
    simulate_lifetimes,
    sink_score,
    token_groups,
)
from headway.methods.sinks.secondary_sinks.detection import Primary, map_sinks

LAYERS, TOKENS = 30, 12


def planted_map(spans: dict[int, tuple[int, int]], *, candidates: tuple[int, ...] = (0, 1)) -> SinkMap:
    """A map in which each position is flagged at layers [first, last)."""
    cosines = torch.zeros(LAYERS, TOKENS)
    for position, (first, last) in spans.items():
        cosines[first:last, position] = -0.95
    primary = Primary(position=0, start=1, end=29, jump=9.0, typical=1.0)
    return map_sinks(cosines, primary, "planted", layers=LAYERS, tokens=TOKENS, candidates=candidates)


SPANS = {2: (3, 13), 4: (3, 13), 5: (2, 26), 7: (8, 10), 9: (10, 16)}


def test_level_counts_add_up_to_the_labelled_tokens():
    sinks = planted_map(SPANS)
    for labels in (("secondary",), ("bos_sink",), ("secondary", "bos_sink", "noise")):
        assert LevelTable.of(sinks, labels).total == len(sinks.positions(*labels))
    assert LevelTable.of(sinks).counts == {(3, 10): 2, (10, 6): 1}
    assert LevelTable.of(sinks).starts() == {3: 2, 10: 1}


def test_merged_tables_count_every_text_once():
    one, two = LevelTable.of(planted_map(SPANS)), LevelTable.of(planted_map({3: (10, 16)}))
    merged = LevelTable.merge(one, two, one)
    assert merged.counts == {(3, 10): 4, (10, 6): 3}
    assert (merged.texts, merged.tokens, merged.total) == (3, 3 * TOKENS, 7)
    assert merged.common(1) == [((3, 10), 4)]


def test_plain_text_and_chat_text_are_not_merged():
    with pytest.raises(ArgumentError, match="on text made in one way"):
        LevelTable.merge(LevelTable.of(planted_map({})), LevelTable.of(planted_map({}, candidates=(0, 1, 2))))
    with pytest.raises(ArgumentError, match="at least one level table"):
        LevelTable.merge()


def test_the_heat_map_is_the_logarithm_of_one_plus_the_count():
    heat = LevelTable.of(planted_map(SPANS)).heat()
    assert heat.shape == (LAYERS, LAYERS + 1)
    assert heat[3, 10].item() == pytest.approx(math.log(3))
    assert heat.expm1().sum().item() == pytest.approx(3)


def test_a_level_table_survives_json():
    table = LevelTable.of(planted_map(SPANS))
    assert LevelTable.from_json(table.to_json()) == table
    with pytest.raises(ArgumentError):
        LevelTable.from_json('{"format": 1, "layers": 3}')
    with pytest.raises(ArgumentError, match="labels: got 'main'"):
        LevelTable.of(planted_map(SPANS), ("main",))


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.integers(4, 24))
def test_received_attention_adds_up_to_the_number_of_queries(seed: int, tokens: int):
    generator = torch.Generator().manual_seed(seed)
    query, key = (torch.randn(1, 2, tokens, 8, generator=generator) for _ in range(2))
    found = reduce_attention(query, key, ("received", "visible"), causal=True)
    received = found["received"] / found["visible"]
    assert torch.allclose((received * found["visible"]).sum(-1), torch.full((1, 2), float(tokens)), atol=1e-4)


def test_uniform_causal_attention_scores_as_the_harmonic_numbers_say():
    weights = torch.ones(TOKENS, TOKENS).tril() / torch.arange(1, TOKENS + 1)[:, None]
    received = weights.sum(0) / torch.arange(TOKENS, 0, -1)
    score = sink_score([received] * LAYERS, planted_map({2: (3, 13)}))
    harmonic = sum(1 / i for i in range(1, TOKENS + 1))
    assert score["primary"].tolist() == pytest.approx([harmonic / TOKENS] * LAYERS)
    assert score["secondary"].tolist() == pytest.approx([(harmonic - 1.5) / (TOKENS - 2)] * LAYERS)


def test_the_score_separates_groups_and_averages_heads():
    sinks = planted_map(SPANS)
    received = torch.zeros(LAYERS, 2, TOKENS)
    received[:, 0, 0], received[:, 1, 0] = 0.8, 0.4
    received[:, :, 5] = 0.3
    received[:, :, 2], received[:, :, 9] = 0.2, 0.4
    score = sink_score(list(received), sinks)
    assert score["primary"].tolist() == pytest.approx([0.6] * LAYERS)
    assert score["bos_sink"].tolist() == pytest.approx([0.3] * LAYERS)
    assert score["secondary"].tolist() == pytest.approx([0.2] * LAYERS)
    assert score["rest"].tolist() == [0.0] * LAYERS
    assert score["secondary_alive"][[4, 11, 13, 14]].tolist() == pytest.approx([0.1, 0.2, 0.2, 0.4])
    assert score["secondary_alive"][[0, 3, 17]].isnan().all()


def test_layers_without_full_attention_have_no_score():
    received = [torch.ones(TOKENS) if layer % 2 else None for layer in range(LAYERS)]
    score = sink_score(received, planted_map(SPANS))["secondary"]
    assert score[::2].isnan().all()
    assert score[1::2].tolist() == [1.0] * 15


@pytest.mark.parametrize(
    ("received", "message"),
    [([torch.ones(TOKENS)], "got 1 layers"), ([torch.ones(TOKENS + 1)] * LAYERS, r"received\[0\]: got shape \(13,\)")],
)
def test_received_attention_of_another_shape_is_refused(received: list, message: str):
    with pytest.raises(ArgumentError, match=message):
        sink_score(received, planted_map(SPANS))


def test_groups_share_no_token_and_leave_none_out():
    groups = token_groups(planted_map(SPANS))
    assert groups["primary"] == [0]
    assert groups["bos_sink"] == [5]
    assert groups["secondary"] == [2, 4, 9]
    assert sorted(t for members in groups.values() for t in members) == list(range(TOKENS))


def test_a_norm_profile_is_the_mean_of_each_group():
    values = torch.arange(TOKENS).float().expand(LAYERS, -1)
    profile = group_profile(values, planted_map(SPANS))
    assert profile["secondary"].tolist() == [5.0] * LAYERS
    assert profile["primary"].tolist() == [0.0] * LAYERS
    assert group_profile(values, planted_map({}))["secondary"].isnan().all()
    with pytest.raises(ArgumentError, match="13 tokens, expected the 12"):
        group_profile(torch.ones(LAYERS, 13), planted_map({}))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 12), st.integers(1, 12), st.sampled_from([0.5, 1.0, 2.0, 5.0]))
def test_matrix_entropy_lies_between_zero_and_the_log_of_the_rank(seed: int, rows: int, width: int, alpha: float):
    data = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    entropy = matrix_entropy(data, alpha)
    assert -1e-9 <= entropy <= math.log(min(rows, width)) + 1e-9


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_matrix_entropy_of_orthonormal_rows_is_the_log_of_their_number(alpha: float):
    rows = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(0)))[0][:7]
    assert matrix_entropy(3 * rows, alpha) == pytest.approx(math.log(7), abs=1e-5)


@pytest.mark.parametrize("alpha", [0.9, 1.0, 2.0])
def test_matrix_entropy_of_identical_rows_is_zero(alpha: float):
    assert matrix_entropy(torch.randn(5).expand(9, -1), alpha) == pytest.approx(0, abs=1e-6)


def test_renyi_entropy_tends_to_shannons_as_its_order_tends_to_one():
    rows = torch.randn(9, 5, generator=torch.Generator().manual_seed(3))
    shannon = matrix_entropy(rows)
    gaps = [abs(matrix_entropy(rows, 1 + step) - shannon) for step in (0.1, 0.01, 0.001)]
    assert gaps[0] > gaps[1] > gaps[2]
    assert gaps[2] < 1e-3
    assert matrix_entropy(rows, 0.99) > shannon > matrix_entropy(rows, 1.01)


def test_chunks_are_full_and_a_prefix_grows():
    hidden = torch.randn(250, 40, generator=torch.Generator().manual_seed(1))
    assert chunk_entropies(hidden) == [matrix_entropy(hidden[:100]), matrix_entropy(hidden[100:200])]
    prefix = chunk_entropies(hidden, mode="prefix")
    assert prefix == pytest.approx([matrix_entropy(hidden[:100]), matrix_entropy(hidden[:200])], abs=1e-6)
    assert chunk_entropies(hidden[:30], mode="prefix") == pytest.approx([matrix_entropy(hidden[:30])], abs=1e-6)


def test_entropy_of_nothing_is_not_a_number_and_bad_orders_are_refused():
    assert math.isnan(matrix_entropy(torch.zeros(3, 4)))
    with pytest.raises(ArgumentError, match="alpha: got 0"):
        matrix_entropy(torch.ones(3, 4), 0)
    with pytest.raises(ArgumentError, match="at least one row"):
        matrix_entropy(torch.ones(0, 4))
    with pytest.raises(ArgumentError, match="mode: got 'chunk'"):
        chunk_entropies(torch.ones(3, 4), mode="chunk")


@pytest.mark.parametrize(("norm", "law"), [(20, 23.5), (40, 93.8), (80, 375.3)])
def test_the_lifetime_law_agrees_with_simulation(norm: float, law: float):
    assert lifetime_law(norm, 2.0) == pytest.approx(law, abs=0.1)
    lived = simulate_lifetimes(norm, 2.0, width=256, runs=256, generator=torch.Generator().manual_seed(0))
    assert lived.mean().item() - 0.5 == pytest.approx(law, rel=0.02)


@settings(max_examples=20, deadline=None)
@given(st.floats(0.1, 50), st.floats(0.1, 5), st.floats(0, 10))
def test_the_law_can_be_inverted(lifetime: float, write: float, before: float):
    norm = norm_for_lifetime(lifetime, write, before=before)
    assert lifetime_law(norm, write, before=before) == pytest.approx(lifetime, rel=1e-6)


def test_a_norm_too_small_for_what_the_stream_holds_gives_no_life():
    assert lifetime_law(10, 1, before=5) == 0
    with pytest.raises(ArgumentError, match="write_norm: got 0"):
        lifetime_law(10, 0)
