"""Where DHSA cuts: gaps by score, sources of boundaries, and labels from dense attention."""

from __future__ import annotations

import itertools

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

import headway
from headway.door.call import AttentionCall, Forward
from headway.errors import ArgumentError, HostError
from headway.hosts.tiny import tiny_host
from headway.methods.long_context.dhsa import (
    DHSA,
    BoundaryPredictor,
    Fixed,
    Given,
    Oracle,
    Piece,
    Predicted,
    Separators,
    Similarity,
    attention_ratio,
    boundary_targets,
    select_gaps,
    separator_ids,
    window_similarity,
)

INF = float("inf")


def piece_of(key: torch.Tensor, *, pads: int = 0, suffix: int = 0, call: AttentionCall | None = None) -> Piece:
    real = torch.ones(key.shape[0], key.shape[2], dtype=torch.bool)
    real[0, :pads] = False
    call = call or AttentionCall.from_tensors(key, key, key, causal=True)
    return Piece(key, real, call, suffix)


def keys(tokens: int = 120, *, batch: int = 1, heads: int = 2, dim: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, heads, tokens, dim, generator=torch.Generator().manual_seed(seed))


def topics(lengths: list[int], *, noise: float = 0.3, seed: int = 0) -> torch.Tensor:
    """Keys that point to another direction in every segment."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(len(lengths), 2, 1, 8, generator=generator)
    key = torch.cat([c.expand(-1, n, -1) for c, n in zip(centres, lengths, strict=True)], 1)[None]
    return key + noise * torch.randn(key.shape, generator=generator)


class TestGaps:
    @settings(max_examples=60, deadline=None)
    @given(
        st.integers(1, 150),
        st.integers(0, 10),
        st.integers(1, 20),
        st.sampled_from([-INF, 0.0, 1.0]),
        st.one_of(st.none(), st.integers(1, 149)),
        st.integers(0, 10_000),
    )
    def test_boundaries_increase_and_keep_apart(self, tokens, apart, most, threshold, forced, seed):
        scores = np.random.default_rng(seed).normal(size=tokens)
        found = select_gaps(scores, threshold=threshold, apart=apart, most=most, forced=forced)
        assert found == sorted(set(found))
        assert len(found) <= max(most, 1)
        inside = forced is not None and forced < tokens
        assert not inside or found[-1] == forced
        assert all(b - a > apart for a, b in itertools.pairwise(found))
        for place in found:
            if not (inside and place == forced):
                assert apart < place < tokens - apart
                assert scores[place - 1] > threshold

    def test_no_threshold_and_no_limit_saturates(self):
        """Every stretch is too short for another boundary."""
        scores = np.random.default_rng(0).normal(size=300)
        ends = [0, *select_gaps(scores, threshold=-INF), 300]
        assert max(b - a for a, b in itertools.pairwise(ends)) < 2 * 9

    def test_an_infinite_threshold_leaves_the_forced_one(self):
        scores = np.zeros(100)
        assert select_gaps(scores, threshold=INF, forced=36) == [36]
        assert select_gaps(scores, threshold=INF) == []

    def test_no_candidates_at_all(self):
        assert select_gaps(np.zeros(3), threshold=-INF) == []

    def test_the_best_of_near_gaps_is_taken(self):
        scores = np.zeros(60)
        scores[[20, 24, 40]] = 2.0, 3.0, 2.5
        assert select_gaps(scores, threshold=1.1) == [25, 41]
        assert select_gaps(scores, threshold=1.1, most=1) == [25]

    def test_nan_is_refused(self):
        with pytest.raises(ArgumentError, match="scores: got NaN"):
            select_gaps(np.array([0.0, np.nan]), threshold=0)


class TestSources:
    def test_fixed_chunks_count_from_the_first_real_token(self):
        found = Fixed(size=10).starts(piece_of(keys(33, batch=2), pads=4))
        assert found[0].nonzero()[:, 0].tolist() == [4, 14, 24]
        assert found[1].nonzero()[:, 0].tolist() == [0, 10, 20, 30]

    def test_given_places_count_from_the_first_real_token(self):
        found = Given(at=(6, 20)).starts(piece_of(keys(33, batch=2), pads=4))
        assert found[0].nonzero()[:, 0].tolist() == [4, 10, 24]
        assert found[1].nonzero()[:, 0].tolist() == [0, 6, 20]

    @pytest.mark.parametrize("source", [Fixed(size=10), Similarity(), Given(at=(7, 115)), Oracle()])
    def test_the_suffix_is_a_chunk_of_its_own(self, source):
        found = source.starts(piece_of(keys(120), suffix=17))[0].nonzero()[:, 0].tolist()
        assert found[-1] == 103
        assert found[0] == 0

    def test_similarity_finds_planted_topics(self):
        lengths = [30, 17, 41, 25, 22]
        key = topics(lengths)
        found = Similarity(chunk_tokens=33).starts(piece_of(key))[0].nonzero()[:, 0].tolist()
        assert found == [0, 30, 47, 88, 113]

    def test_padding_moves_boundaries_along(self):
        key = topics([30, 17, 41, 25, 22])
        padded = torch.cat([torch.randn(1, 2, 9, 8), key], 2)
        for source in (Similarity(), Predicted(predictor=BoundaryPredictor(16, heads=4), threshold=-INF)):
            alone = source.starts(piece_of(key))[0]
            assert torch.equal(source.starts(piece_of(padded, pads=9))[0, 9:], alone)

    def test_similarity_is_the_cosine_of_window_means(self):
        x = keys(40)[0].transpose(0, 1).flatten(1)[None]
        found = window_similarity(x, 4)[0]
        for gap in range(3, 36):
            left, right = x[0, gap - 3 : gap + 1].mean(0), x[0, gap + 1 : gap + 5].mean(0)
            assert float(found[gap]) == pytest.approx(float(torch.cosine_similarity(left, right, dim=0)), abs=1e-5)
        assert found[:3].tolist() == [1.0] * 3
        assert found[36:].tolist() == [1.0] * 4
        assert window_similarity(x[:, :7], 4).tolist() == [[1.0] * 7]

    def test_separators_end_chunks(self):
        forward = Forward(inputs={"input_ids": torch.tensor([[5, 9, 5, 5, 9, 9, 5, 5]])})
        call = AttentionCall.from_tensors(*[keys(8)] * 3, causal=True, forward=forward)
        found = Separators(ids=(9,)).starts(piece_of(keys(8), call=call))
        assert found[0].nonzero()[:, 0].tolist() == [0, 2, 6]

    def test_separators_without_tokens_are_refused(self):
        with pytest.raises(HostError, match="without input_ids by keyword"):
            Separators(ids=(9,)).starts(piece_of(keys(8)))

    def test_separators_of_a_request_that_began_elsewhere_are_refused_by_what_is_missing(self):
        """A step outside whose scope the prompt was read: its tokens were never seen."""
        forward = Forward(inputs={"input_ids": torch.tensor([[5]])})
        call = AttentionCall.from_tensors(*[keys(8)] * 3, causal=True, forward=forward)
        with pytest.raises(HostError, match=r"input_ids of shape \(1, 1\) where 8 tokens are to be cut"):
            Separators(ids=(9,)).starts(piece_of(keys(8), call=call))

    def test_separator_tokens_are_those_that_end_with_a_mark(self):
        class Letters:
            words = ("a", ".", "b.", "c. ", ".d", "\n")

            def __len__(self):
                return len(self.words)

            def decode(self, ids):
                return self.words[ids[0]]

        assert separator_ids(Letters()) == (1, 2, 3, 5)
        with pytest.raises(ArgumentError, match="none of which"):
            separator_ids(Letters(), marks=("!",))

    def test_a_predictor_of_another_width_names_both(self):
        model = tiny_host("llama", num_key_value_heads=2)[0]
        width = 2 * model.config.head_dim
        stage = DHSA(boundaries=Predicted(predictor=BoundaryPredictor(2 * width, heads=4)))
        with pytest.raises(HostError, match=rf"keys of {width} numbers.*made for {2 * width}"):
            headway.use(model, stage).attach()

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: Fixed(size=0), "size: got 0"),
            (lambda: Similarity(apart=-1), "apart: got -1"),
            (lambda: Oracle(chunk_tokens=0), "chunk_tokens: got 0"),
        ],
    )
    def test_bad_options_are_named(self, make, message):
        with pytest.raises(ArgumentError, match=message):
            make()


class TestLabels:
    @settings(max_examples=15, deadline=None)
    @given(st.integers(8, 60), st.integers(1, 5), st.sampled_from([1, 2]), st.integers(0, 1000))
    def test_reading_row_by_row_equals_the_full_map(self, tokens, window, kv_heads, seed):
        generator = torch.Generator().manual_seed(seed)
        query = 2 * torch.randn(2, 4, tokens, 8, generator=generator)
        key = torch.randn(2, kv_heads, tokens, 8, generator=generator)
        call = AttentionCall.from_tensors(query, key, key, causal=True)
        fast = attention_ratio(call, window=window, block=7)
        slow = attention_ratio(call, window=window, mode="reference")
        torch.testing.assert_close(fast, slow, atol=0, rtol=1e-3)
        assert bool((fast >= 1).all())

    def test_swapping_the_sides_leaves_the_ratio(self):
        """Rows that read past and following keys in exchanged roles: the ratio at the gap between is the same."""
        tokens, gap, window = 40, 19, 4
        query, key = torch.randn(1, 1, tokens, 8), torch.randn(1, 1, tokens, 8)
        query[:, :, gap + window :] *= 2
        other = key.clone()
        left, right = slice(gap - window + 1, gap + 1), slice(gap + 1, gap + window + 1)
        other[:, :, left], other[:, :, right] = key[:, :, right], key[:, :, left]
        ratios = []
        for k in (key, other):
            call = AttentionCall.from_tensors(query, k, k, causal=True)
            ratios.append(float(attention_ratio(call)[0, gap]))
        # Only rows from gap + w on count, and they see both sides whole.
        assert ratios[0] == pytest.approx(ratios[1], rel=1e-4)

    def test_a_planted_change_is_the_largest_ratio(self):
        tokens = 64
        key = torch.zeros(1, 1, tokens, 8)
        key[:, :, 32:, 0] = 3.0
        query = torch.ones(1, 1, tokens, 8)
        ratio = attention_ratio(AttentionCall.from_tensors(query, key, key, causal=True, scale=1.0))
        assert int(ratio[0].argmax()) == 31
        targets, counts = boundary_targets(ratio)
        assert bool(targets[0, 31])
        assert not bool(targets[0, 40:].any())
        assert counts[0].nonzero()[:, 0].tolist() == list(range(7, 56))

    def test_a_ratio_of_two_is_a_boundary_as_in_the_released_labels(self):
        """σ(α (ln ρ − ln β)) ≥ ½ with α = β = 2, which is ρ ≥ 2."""
        ratio = torch.tensor([1.0, 1.999, 2.0, 2.5, 9.0])
        targets, _ = boundary_targets(ratio[None])
        assert targets[0].tolist() == [False, False, True, True, True]
        assert torch.equal(targets[0], torch.sigmoid(2 * (ratio.log() - torch.tensor(2.0).log())) >= 0.5)

    def test_padded_rows_are_left_out(self):
        query, key = (torch.randn(1, 2, 40, 8, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
        padded = [torch.cat([torch.randn(1, 2, 6, 8), x], 2) for x in (query, key)]
        mask = torch.ones(1, 1, 46, 46, dtype=torch.bool)
        mask[..., :6] = False
        call = AttentionCall.from_tensors(
            *padded, padded[1], causal=True, mask=mask, forward=Forward(padding=mask[:, 0, 0])
        )
        alone = attention_ratio(AttentionCall.from_tensors(query, key, key, causal=True))
        torch.testing.assert_close(attention_ratio(call)[0, 9:], alone[0, 3:], rtol=1e-3, atol=0)

    def test_short_prompts_have_no_boundary(self):
        assert attention_ratio(AttentionCall.from_tensors(*[keys(7)] * 3, causal=True)).tolist() == [[1.0] * 7]

    def test_pieces_of_a_prompt_are_refused(self):
        call = AttentionCall.from_tensors(keys(40)[:, :, -5:], keys(40), keys(40), causal=True)
        with pytest.raises(ArgumentError, match="in one forward"):
            attention_ratio(call)

    @pytest.mark.parametrize(
        ("options", "message"), [({"mode": "fast"}, "mode: got"), ({"window": 0}, "window: got 0")]
    )
    def test_bad_arguments_are_named(self, options, message):
        with pytest.raises(ArgumentError, match=message):
            attention_ratio(AttentionCall.from_tensors(*[keys(40)] * 3, causal=True), **options)
