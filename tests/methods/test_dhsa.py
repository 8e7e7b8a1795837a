"""DHSA's chunks, its choice of keys, and the stage in hosts."""

from __future__ import annotations

import copy
import itertools

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

import headway
from headway.door.call import AttentionCall, Forward
from headway.door.execute import execute
from headway.door.selection import Dense, Keys
from headway.errors import ArgumentError, ConflictError, HeadwayError
from headway.hosts.tiny import tiny_host
from headway.kernels.gathered import gathered_attention
from headway.methods.long_context.dhsa import (
    DHSA,
    BoundaryPredictor,
    Fixed,
    Given,
    Predicted,
    Similarity,
    at_budget,
    choose_for_row,
    choose_tokens,
    chunks_of,
    key_lists,
    normalised,
)
from headway.tasks.fidelity import fidelity

SMALL = {"budget": 48, "block": 16, "local_tokens": 16, "global_tokens": 4, "suffix": 0, "approximates": False}


def tensors(tokens: int, *, heads: int = 4, kv_heads: int = 2, dim: int = 8, batch: int = 1, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, heads, tokens, dim), (batch, kv_heads, tokens, dim), (batch, kv_heads, tokens, dim))
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


def call_of(tokens: int, **options) -> AttentionCall:
    return AttentionCall.from_tensors(*tensors(tokens, **options), causal=True)


def kept(stage: DHSA, call: AttentionCall) -> torch.Tensor:
    """(batch, choosers, rows, keys), pairs in the future included."""
    selection = stage.select(call)
    assert isinstance(selection, Keys)
    return selection.to_bool(call.queries, call.keys)


class TestChunks:
    @settings(max_examples=25, deadline=None)
    @given(st.integers(1, 40), st.integers(0, 10), st.integers(0, 10_000))
    def test_sums_are_those_of_a_loop(self, tokens, pads, seed):
        generator = torch.Generator().manual_seed(seed)
        key = torch.randn(2, 3, tokens, 4, generator=generator).half()
        starts = torch.rand(2, tokens, generator=generator) < 0.3
        real = torch.ones(2, tokens, dtype=torch.bool)
        real[1, : min(pads, tokens)] = False
        chunks = chunks_of(key, real, starts)
        for row in range(2):
            cuts = [0, *[t for t in range(1, tokens) if starts[row, t]], tokens]
            for c, (first, last) in enumerate(itertools.pairwise(cuts)):
                inside = real[row, first:last]
                assert int(chunks.counts[row, c]) == int(inside.sum())
                expected = (key[row, :, first:last].float() * inside[None, :, None]).sum(1)
                torch.testing.assert_close(chunks.sums[row, :, c], expected, atol=1e-5, rtol=1e-5)
                assert bool((chunks.of_tokens(0, tokens)[row, first:last] == c).all())

    def test_a_vector_is_the_mean_times_the_root_of_the_length(self):
        key = torch.randn(1, 2, 12, 4)
        chunks = chunks_of(key, torch.ones(1, 12, dtype=torch.bool), torch.tensor([[1, 0, 0, 1] + [0] * 8]).bool())
        means = torch.stack([key[:, :, :3].mean(2), key[:, :, 3:].mean(2)], 2)
        roots = torch.tensor([3.0, 9.0]).sqrt()[:, None]
        torch.testing.assert_close(chunks.vectors(), means * roots)
        torch.testing.assert_close(chunks.vectors("mean"), means)
        torch.testing.assert_close(chunks.vectors("sum"), means * roots**2)

    def test_noise_scores_alike_at_every_length_under_the_root_only(self):
        generator = torch.Generator().manual_seed(0)
        spread = {}
        for norm in ("sqrt", "mean", "sum"):
            for length in (1, 64):
                sums = torch.randn(1, 1, 4000, length, 16, generator=generator).sum(3)
                vectors = normalised(sums, torch.full((1, 4000), length), norm)
                spread[norm, length] = float((vectors @ torch.ones(16)).std())
        ratios = {norm: spread[norm, 64] / spread[norm, 1] for norm in ("sqrt", "mean", "sum")}
        assert ratios["sqrt"] == pytest.approx(1, abs=0.1)
        assert ratios["mean"] == pytest.approx(1 / 8, rel=0.1)
        assert ratios["sum"] == pytest.approx(8, rel=0.1)

    @settings(max_examples=15, deadline=None)
    @given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(0, 1000))
    def test_pieces_and_generated_tokens_add_up_to_the_whole(self, sizes, seed):
        tokens = sum(sizes) + 3
        generator = torch.Generator().manual_seed(seed)
        key = torch.randn(1, 2, tokens, 4, generator=generator)
        real, starts = torch.ones(1, tokens, dtype=torch.bool), torch.rand(1, tokens, generator=generator) < 0.3
        chunks, at = None, 0
        for size in sizes:
            piece = key[:, :, at : at + size], real[:, at : at + size], starts[:, at : at + size]
            chunks = chunks_of(*piece) if chunks is None else chunks.with_piece(*piece)
            at += size
            starts[:, at - size] = True
        starts[:, at:] = torch.tensor([True, False, False])
        for step in range(at, tokens):
            chunks = chunks.with_token(key[:, :, step : step + 1], real[:, step : step + 1])
        whole = chunks_of(key, real, starts)
        torch.testing.assert_close(chunks.sums, whole.sums, atol=1e-5, rtol=1e-5)
        assert torch.equal(chunks.counts, whole.counts)
        assert torch.equal(chunks.ends, whole.ends)

    @pytest.mark.parametrize("norm", ["sqrt", "mean", "sum"])
    def test_scores_are_those_of_the_vectors(self, norm):
        key, query = torch.randn(2, 2, 30, 4), torch.randn(2, 2, 3, 4)
        starts = torch.rand(2, 30, generator=torch.Generator().manual_seed(0)) < 0.3
        chunks = chunks_of(key, torch.ones(2, 30, dtype=torch.bool), starts).opened()
        expected = query @ chunks.vectors(norm).transpose(-1, -2)
        torch.testing.assert_close(chunks.scores(query, norm), expected, atol=1e-5, rtol=1e-4)

    def test_an_unknown_norm_is_named(self):
        with pytest.raises(ArgumentError, match="norm: got 'root'"):
            normalised(torch.zeros(1, 1, 1, 1), torch.ones(1, 1).long(), "root")


class TestChoice:
    @settings(max_examples=40, deadline=None)
    @given(st.integers(2, 30), st.integers(1, 8), st.integers(0, 12), st.integers(0, 10_000))
    def test_sorting_chunks_equals_sorting_tokens(self, tokens, chunks, extra, seed):
        """Also with equal scores, tokens that may not be read, and forced ones."""
        generator = torch.Generator().manual_seed(seed)
        member = torch.randint(chunks, (2, tokens), generator=generator).sort(-1).values
        scores = torch.randint(4, (2, 3, 5, chunks), generator=generator).float()
        allowed = torch.rand(2, 5, tokens, generator=generator) < 0.8
        forced = torch.rand(2, 5, tokens, generator=generator) < 0.2
        budget = int((forced & allowed).sum(-1).max()) + extra
        fast, slow = (
            choose_tokens(scores, member, allowed, forced, budget, mode=mode) for mode in ("chunks", "reference")
        )
        assert torch.equal(fast, slow)
        assert bool((fast.sum(-1) <= max(budget, 0)).all())
        assert not bool((fast & ~allowed[:, None]).any())
        assert bool((fast | ~(forced & allowed)[:, None]).all())

    @settings(max_examples=60, deadline=None)
    @given(
        st.integers(6, 40), st.integers(1, 8), st.integers(0, 3), st.integers(1, 3), st.integers(0, 5),
        st.integers(0, 10_000),
    )  # fmt: skip
    def test_ranges_for_one_row_equal_sorting_tokens(self, tokens, chunks, early, local, hidden, seed):
        """Also with equal scores, empty chunks, keys hidden in front and chunks behind which nothing is free."""
        generator = torch.Generator().manual_seed(seed)
        ends = torch.randint(-3, tokens + 1, (2, chunks), generator=generator).sort(-1).values
        ends[:, -1] = tokens
        member = torch.searchsorted(ends, torch.arange(tokens).expand(2, -1).contiguous(), right=True)
        first = torch.tensor([min(hidden, tokens - early - local), 0])
        scores = torch.randint(4, (2, 3, chunks), generator=generator).float()
        at = torch.arange(tokens)
        allowed = (at >= first[:, None])[:, None]
        forced = allowed & ((at < first[:, None] + early)[:, None] | (at >= tokens - local))
        budget = min(early + local + seed % 7, tokens - int(first.max()))
        wanted = choose_tokens(scores[:, :, None], member, allowed, forced, budget, mode="reference")
        index = choose_for_row(scores, ends, first, tokens - 1, early=early, local=local, budget=budget)
        assert bool((index.diff(dim=-1) > 0).all())
        got = torch.zeros(2, 3, tokens, dtype=torch.bool).scatter_(2, index, True)
        assert torch.equal(got, wanted[:, :, 0])

    def test_a_row_that_sees_less_than_the_budget_is_refused(self):
        with pytest.raises(ArgumentError, match="budget: got 6 keys for rows that see 5 and always read 2"):
            choose_for_row(torch.zeros(1, 1, 1), torch.tensor([[8]]), torch.tensor([3]), 7, early=1, local=1, budget=6)
        with pytest.raises(ArgumentError, match="budget: got 3"):
            choose_for_row(torch.zeros(1, 1, 1), torch.tensor([[8]]), torch.tensor([0]), 7, early=2, local=2, budget=3)

    def test_of_equal_scores_the_later_key_is_kept(self):
        every, none = torch.ones(1, 1, 6, dtype=torch.bool), torch.zeros(1, 1, 6, dtype=torch.bool)
        member = torch.tensor([[0, 0, 0, 1, 1, 1]])
        assert choose_tokens(torch.tensor([[[[1.0, 0.0]]]]), member, every, none, 4)[0, 0, 0].tolist() == (
            [True, True, True, False, False, True]
        )
        assert choose_tokens(torch.zeros(1, 1, 1, 2), member, every, none, 4)[0, 0, 0].tolist() == (
            [False, False, True, True, True, True]
        )

    def test_more_forced_keys_than_the_budget_are_refused(self):
        every = torch.ones(1, 1, 6, dtype=torch.bool)
        with pytest.raises(ArgumentError, match="budget: got 4 keys where 6 are always kept"):
            choose_tokens(torch.zeros(1, 1, 1, 1), torch.zeros(1, 6).long(), every, every, 4)

    def test_lists_name_every_kept_key_once(self):
        chosen = torch.rand(2, 2, 5, 20, generator=torch.Generator().manual_seed(0)) < 0.3
        index, valid = key_lists(chosen)
        for place in torch.cartesian_prod(*[torch.arange(n) for n in chosen.shape[:3]]).tolist():
            b, h, r = place
            assert index[b, h, r][valid[b, h, r]].tolist() == chosen[b, h, r].nonzero()[:, 0].tolist()

    def test_gathering_skips_fill_without_changing_the_output(self):
        """Lists of very different lengths give what each gives alone."""
        query, key, value = tensors(64)
        chosen = torch.zeros(1, 1, 4, 64, dtype=torch.bool)
        for block, length in enumerate((3, 17, 2, 60)):
            chosen[0, 0, block, :length] = True
            chosen[0, 0, block, 16 * block] = True
        index, valid = key_lists(chosen)
        output, _ = gathered_attention(query, key, value, index, valid, query_block=16, causal=True)
        call = AttentionCall.from_tensors(query, key, value, causal=True)
        expected, _ = call.replace(mask=chosen.repeat_interleave(16, 2)).attend()
        torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-4)


class TestSelection:
    @pytest.mark.parametrize("boundaries", [Similarity(), Fixed(size=7), Given(at=(5, 40, 41, 90))])
    @pytest.mark.parametrize("queries", ["blocks", "chunks"])
    @pytest.mark.parametrize("heads", ["kv", "mean"])
    def test_lists_are_sets_within_the_budget_with_local_and_global_keys(self, boundaries, queries, heads):
        stage = DHSA(boundaries=boundaries, queries=queries, heads=heads, **SMALL)
        call = call_of(150)
        selection = stage.select(call)
        chosen = selection.to_bool(150, 150)
        assert chosen.shape[1] == (2 if heads == "kv" else 1)
        size = 16 if queries == "blocks" else 1
        for row in range(150):
            last = min((row // size + 1) * size, 150) - 1
            own = chosen[0, :, row]
            assert bool(own[:, max(last - 15, 0) : last + 1].all())
            assert bool(own[:, : min(4, last + 1)].all())
            assert not bool(own[:, last + 1 :].any())
            assert own.sum(-1).tolist() == [min(48, last + 1)] * own.shape[0]
        for listed, valid in zip(selection.index.flatten(0, 2), selection.valid.flatten(0, 2), strict=True):
            assert listed[valid].unique().numel() == int(valid.sum())

    @settings(max_examples=40, deadline=None)
    @given(
        st.integers(60, 150),
        st.sampled_from(["sqrt", "mean", "sum"]),
        st.sampled_from(["kv", "mean"]),
        st.sampled_from([0, 21]),
        st.sampled_from([None, 70]),
        st.integers(0, 40),
        st.sampled_from([0, 3, 20]),
        st.integers(0, 1000),
    )
    def test_a_prompts_lists_are_those_of_loops(self, tokens, norm, heads, suffix, window, pads, behind, seed):
        """Chunk vectors, scores, forced keys, budget and ties by the definitions; padding and windows included."""
        rng = torch.Generator().manual_seed(seed)
        cuts = sorted(set(torch.randint(1, tokens, (tokens // 8,), generator=rng).tolist()))
        call = call_of(tokens, seed=seed)
        pads, end = min(pads, tokens - behind - 1), tokens - behind
        padding = ((torch.arange(tokens) >= pads) & (torch.arange(tokens) < end))[None]
        site = call.site.__class__(**(vars(call.site) | {"window": window}))
        call = call.replace(site=site, forward=Forward(padding=padding))
        stage = DHSA(boundaries=Given(at=tuple(cuts)), norm=norm, heads=heads, **(SMALL | {"suffix": suffix}))
        got = kept(stage, call)[0]
        query = call.query[0].view(2, 2, tokens, 8).mean(1)
        key = call.key[0]
        if heads == "mean":
            query, key = query.mean(0, keepdim=True), key.mean(0, keepdim=True)
        starts = [pads, *[pads + cut for cut in cuts if pads + cut < end]]
        if 0 < suffix < end - pads:
            starts = sorted({*[start for start in starts if start < end - suffix], end - suffix})
        chunks = list(itertools.pairwise([*starts, end]))
        scale = {"sqrt": lambda n: n**0.5, "mean": lambda n: n, "sum": lambda _: 1}[norm]
        for first in range(0, tokens, 16):
            last = min(first + 16, end) - 1
            if last < pads or first >= end:
                continue
            oldest = max(pads, 0 if window is None else last - window + 1)
            seen = range(oldest, last + 1)
            forced = {*range(max(last - 15, oldest), last + 1), *list(seen)[:4], *range(first, last + 1)}
            for head in range(key.shape[0]):
                block = query[head, max(first, pads) : last + 1].sum(0)
                score = {}
                for begin, stop in chunks:
                    value = float(block @ key[head, begin:stop].sum(0)) / scale(stop - begin)
                    score |= {j: (value, j) for j in range(begin, stop)}
                free = sorted((j for j in seen if j not in forced), key=lambda j: score[j], reverse=True)
                want = set(seen) if last >= end - suffix else forced | set(free[: 48 - len(forced)])
                for row in range(max(first, pads), last + 1):
                    assert set(got[head, row].nonzero()[:, 0].tolist()) == want | set(range(first, last + 1))

    def test_a_planted_chunk_is_read(self):
        """Eleven keys that only the last block's queries look for, between boundaries that are known."""
        query, key, value = tensors(256, heads=2, kv_heads=2)
        direction = torch.nn.functional.normalize(torch.randn(8, generator=torch.Generator().manual_seed(5)), dim=0)
        key[:, :, 70:81] += 2 * direction
        query[:, :, 240:] = 4 * direction
        call = AttentionCall.from_tensors(query, key, value, causal=True)
        stage = DHSA(boundaries=Given(at=(*range(10, 70, 12), 70, 81, *range(95, 256, 14))), **SMALL)
        assert bool(kept(stage, call)[0, :, -1, 70:81].all())

    def test_fixed_chunks_equal_block_top_k_by_mean_keys(self):
        """Whole blocks of 8: 4 chosen beside the two local ones, as by mean keys and mean queries."""
        call = call_of(128, heads=1, kv_heads=1)
        stage = DHSA(boundaries=Fixed(size=8), **(SMALL | {"budget": 48, "global_tokens": 0}))
        chosen = kept(stage, call)[0, 0, -1].view(16, 8)
        scores = call.key[0, 0].view(16, 8, 8).mean(1) @ call.query[0, 0, -16:].mean(0)
        best = scores[:14].topk(4).indices.tolist()
        assert sorted(chosen.all(1).nonzero()[:, 0].tolist()) == sorted([*best, 14, 15])
        assert int(chosen.sum()) == 48

    @pytest.mark.parametrize("norm", ["mean", "sum"])
    def test_norms_agree_on_equal_chunks_and_differ_on_unequal_ones(self, norm):
        call = call_of(192)
        equal = [kept(DHSA(boundaries=Fixed(size=8), norm=n, **SMALL), call) for n in ("sqrt", norm)]
        assert torch.equal(*equal)
        uneven = Given(at=(2, 4, 40, 44, 90, 93, 150))
        other = [kept(DHSA(boundaries=uneven, norm=n, **SMALL), call) for n in ("sqrt", norm)]
        assert not torch.equal(*other)

    def test_how_many_rows_are_chosen_for_at_a_time_changes_nothing(self, monkeypatch):
        call, stage = call_of(150), DHSA(**SMALL)
        whole = kept(stage, call)
        monkeypatch.setattr("headway.methods.long_context.dhsa.selector.STEP_ELEMENTS", 1)
        assert torch.equal(kept(stage, call_of(150)), whole)

    @pytest.mark.parametrize("budget", [150, 151, 4000, None])
    def test_a_budget_of_all_keys_is_dense(self, budget):
        stage = DHSA(**(SMALL | {"budget": budget}))
        assert isinstance(stage.select(call_of(150)), Dense)

    def test_a_prompt_that_is_all_suffix_is_dense(self):
        assert isinstance(DHSA(**(SMALL | {"suffix": 64})).select(call_of(60)), Dense)

    def test_the_suffix_reads_everything(self):
        call, stage = call_of(160), DHSA(**(SMALL | {"suffix": 20}))
        output = execute(call, [stage], []).output
        dense, _ = call.attend()
        torch.testing.assert_close(output[:, :, -20:], dense[:, :, -20:], atol=1e-5, rtol=1e-4)
        assert not torch.allclose(output[:, :, 60:120], dense[:, :, 60:120], atol=1e-3)

    def test_the_executor_runs_the_lists_and_less_than_everything(self):
        call, stage = call_of(320), DHSA(**SMALL)
        done = execute(call, [stage], [])
        assert done.path == "keys"
        assert done.density < 0.45
        chosen = kept(stage, call_of(320)).repeat_interleave(2, 1)
        expected, _ = call.replace(mask=chosen).attend()
        torch.testing.assert_close(done.output, expected, atol=1e-5, rtol=1e-4)

    def test_a_pooled_query_of_a_block_is_mean_or_maximum_of_real_rows(self):
        call, real = call_of(40), torch.ones(1, 40, dtype=torch.bool)
        real[0, :5] = False
        mean = DHSA(**SMALL)._pooled(call, real, torch.zeros(1, 40).long())
        most = DHSA(query_pool="max", **SMALL)._pooled(call, real, torch.zeros(1, 40).long())
        grouped = call.query.view(1, 2, 2, 40, 8).mean(2)
        torch.testing.assert_close(mean[:, :, 0], grouped[:, :, 5:16].mean(2) * 11**0.5)
        torch.testing.assert_close(mean[:, :, 2], grouped[:, :, 32:].mean(2) * 8**0.5)
        torch.testing.assert_close(most[:, :, 0], grouped[:, :, 5:16].amax(2))
        torch.testing.assert_close(most[:, :, 2], grouped[:, :, 32:].amax(2))

    def test_query_chunks_share_their_scores(self):
        stage = DHSA(boundaries=Given(at=(50, 100)), queries="chunks", **SMALL)
        call = call_of(150)
        member = (torch.arange(150) // 50)[None]
        pooled = stage._pooled(call, torch.ones(1, 150, dtype=torch.bool), member)
        grouped = call.query.view(1, 2, 2, 150, 8).mean(2)
        torch.testing.assert_close(pooled[:, :, 60], grouped[:, :, 50:100].mean(2) * 50**0.5)
        assert torch.equal(pooled[:, :, 50], pooled[:, :, 99])

    def test_known_boundaries_keep_more_mass_than_a_window(self):
        query, key, value = tensors(256, heads=2, kv_heads=2)
        topics = torch.nn.functional.normalize(torch.randn(8, 8, generator=torch.Generator().manual_seed(1)), dim=-1)
        key += 3 * topics.repeat_interleave(32, 0)
        query = 2 * topics[torch.arange(16) % 8].repeat_interleave(16, 0).expand_as(query).clone()
        call = AttentionCall.from_tensors(query, key, value, causal=True)
        rows = torch.arange(128, 256)
        chunks = fidelity(call, DHSA(boundaries=Fixed(size=32), **SMALL).select(call), rows=rows)
        window = fidelity(call, DHSA(**(SMALL | {"local_tokens": 44})).select(call), rows=rows)
        assert chunks.mean_mass() > 1.3 * window.mean_mass()
        assert chunks.density == pytest.approx(window.density, rel=0.02)


class TestSharing:
    def counted(self, monkeypatch):
        calls = []
        plain = Similarity.starts
        monkeypatch.setattr(Similarity, "starts", lambda self, piece: calls.append(1) or plain(self, piece))
        return calls

    @pytest.mark.parametrize(("share", "expected"), [(True, 1), (False, 2)])
    def test_boundaries_of_the_first_layer_serve_all(self, share, expected, monkeypatch):
        calls = self.counted(monkeypatch)
        forward = Forward()
        stage = DHSA(share_boundaries=share, **SMALL)
        for layer in range(2):
            stage.select(call_of(150, seed=layer).replace(forward=forward))
        assert len(calls) == expected

    def test_keys_of_the_first_layer_serve_all_when_asked(self):
        for share in (True, False):
            forward, stage = Forward(), DHSA(share_selection=share, **SMALL)
            first, second = (
                stage.select(AttentionCall.from_tensors(*tensors(150, seed=i), layer=i, causal=True, forward=forward))
                for i in range(2)
            )
            assert (first is second) == share

    def test_keys_are_not_shared_between_layers_that_see_differently_far(self):
        forward, stage, chosen = Forward(), DHSA(share_selection=True, **SMALL), []
        for window in (None, 80, None, 80):
            call = call_of(150).replace(forward=forward)
            site = call.site.__class__(**(vars(call.site) | {"window": window}))
            chosen.append(stage.select(call.replace(site=site)))
        assert chosen[0] is chosen[2]
        assert chosen[1] is chosen[3]
        assert chosen[0] is not chosen[1]


@torch.no_grad()
def steps(model, ids, prompt, cache=None, mask=None):
    """Logits of every token after the prompt, which is read whole."""
    options = {} if mask is None else {"attention_mask": mask[:, :prompt]}
    out = model(input_ids=ids[:, :prompt], past_key_values=cache, use_cache=True, **options)
    found = [out.logits]
    for at in range(prompt, ids.shape[1]):
        options = {} if mask is None else {"attention_mask": mask[:, : at + 1]}
        out = model(input_ids=ids[:, at : at + 1], past_key_values=out.past_key_values, use_cache=True, **options)
        found.append(out.logits)
    return torch.cat(found, 1), out.past_key_values


@pytest.fixture(scope="module")
def host():
    return tiny_host("llama", num_key_value_heads=2, max_position_embeddings=512)[0]


def ids_of(length: int, batch: int = 1, seed: int = 0):
    return torch.randint(8, 100, (batch, length), generator=torch.Generator().manual_seed(seed))


class TestRequests:
    def test_what_is_remembered_is_what_a_fresh_reading_of_the_keys_gives(self, host):
        stage = DHSA(**SMALL)
        with headway.use(host, stage):
            _, cache = steps(host, ids_of(170), 160)
        memory = cache._headway_rows.owned
        assert len(memory) == host.config.num_hidden_layers
        for layer, (_, state) in enumerate(memory.items()):
            key = cache.layers[layer].keys
            torch.testing.assert_close(state["sums"][:, :, -1], key[:, :, 160:].sum(2), atol=1e-4, rtol=1e-4)
            assert int(state["counts"][0, -1]) == 10
            assert state["tokens"] == 170
            torch.testing.assert_close(state["sums"].sum(2), key.sum(2), atol=1e-3, rtol=1e-4)

    def test_a_step_reads_new_keys_only(self, host, monkeypatch):
        """The prompt is summed once; steps add one key."""
        seen = []
        import headway.methods.long_context.dhsa.selector as selector

        plain = selector.chunks_of
        monkeypatch.setattr(selector, "chunks_of", lambda key, *rest: seen.append(key.shape[2]) or plain(key, *rest))
        with headway.use(host, DHSA(**SMALL)):
            steps(host, ids_of(170), 160)
        assert seen == [160] * host.config.num_hidden_layers

    @pytest.mark.parametrize("case", ["plain", "left padding", "a gap", "a window", "a window and padding"])
    def test_a_step_chooses_what_sorting_all_tokens_chooses(self, case, monkeypatch):
        """Ranges of chunks where what is seen is one run of tokens, token by token where padding lies between."""
        import headway.methods.long_context.dhsa.selector as selector

        call = call_of(200, batch=2)
        padding = torch.ones(2, 200, dtype=torch.bool)
        if "padding" in case:
            padding[1, :70] = False
        if case == "a gap":
            padding[1, 90:97] = False
        window = 120 if "window" in case else None
        call = call.replace(site=call.site.__class__(**(vars(call.site) | {"window": window})))
        stage, chosen, ranged = DHSA(**SMALL), [], []
        plain = selector.choose_for_row
        monkeypatch.setattr(selector, "choose_for_row", lambda *a, **o: ranged.append(1) or plain(*a, **o))
        for slow in (False, True):
            forward = Forward(padding=padding)
            whole = call.replace(forward=forward)
            names = ("query", "key", "value")
            stage.select(whole.replace(**{n: getattr(whole, n)[:, :, :199] for n in names}))
            if slow:
                monkeypatch.setattr(DHSA, "_first_seen", lambda *_: None)
            picked = stage.select(whole.replace(query=whole.query[:, :, 199:], causal=False))
            chosen.append(picked.to_bool(1, 200))
        assert torch.equal(*chosen)
        assert len(ranged) == (case != "a gap")

    def test_a_step_reads_fewer_keys(self, host):
        with headway.use(host, DHSA(**SMALL)) as handle:
            _, cache = steps(host, ids_of(160), 160)
            before = {r["site"]: (r["density"], r["calls"]) for r in handle.report()}
            host(input_ids=ids_of(1), past_key_values=cache)
            for row in handle.report():
                density, calls = before[row["site"]]
                assert row["paths"] == {"keys": 2}
                assert row["density"] * 2 - density * calls == pytest.approx(48 / 161, rel=0.05)

    def test_a_reset_cache_is_as_good_as_new(self, host):
        with headway.use(host, DHSA(**SMALL)):
            expected, _ = steps(host, ids_of(150, seed=2), 146)
            _, cache = steps(host, ids_of(170), 160)
            cache.reset()
            got, _ = steps(host, ids_of(150, seed=2), 146, cache)
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)

    def test_rows_of_a_cache_take_their_chunks_along(self, host):
        ids = ids_of(150, batch=2)
        more = ids_of(3, batch=2, seed=4)
        with headway.use(host, DHSA(**SMALL)), torch.no_grad():
            _, straight = steps(host, ids.flip(0), 148)
            _, turned = steps(host, ids, 148)
            turned.reorder_cache(torch.tensor([1, 0]))
            for at in range(3):
                expected, got = (
                    host(input_ids=more[:, at : at + 1], past_key_values=cache).logits for cache in (straight, turned)
                )
                torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)

    def test_a_copied_cache_goes_on_like_its_original(self, host):
        with headway.use(host, DHSA(**SMALL)), torch.no_grad():
            _, cache = steps(host, ids_of(152), 150)
            twin = copy.deepcopy(cache)
            first, second = (host(input_ids=ids_of(1), past_key_values=c).logits for c in (cache, twin))
        assert torch.equal(first, second)
        assert next(iter(twin._headway_rows.owned.values()))["tokens"] == 153

    def test_taking_tokens_back_is_refused(self, host):
        with headway.use(host, DHSA(**SMALL)):
            _, cache = steps(host, ids_of(152), 150)
            with pytest.raises(ArgumentError, match="take back"):
                cache.crop(-2)

    def test_assisted_decoding_is_refused_before_a_draft_is_read(self, host):
        """Drafts would be cut into chunks with the prompt, and cannot be taken back."""
        ids = ids_of(50).repeat(1, 3)
        options = {"max_new_tokens": 4, "do_sample": False}
        for stage in (DHSA(**SMALL), DHSA(decode="dense", **SMALL)):
            with headway.use(host, stage):
                plain = host.generate(ids, **options)
                with pytest.raises(ConflictError, match="assisted decoding beside DHSA"):
                    host.generate(ids, prompt_lookup_num_tokens=3, **options)
                assert host.generate(ids, **options).tolist() == plain.tolist()

    def test_a_request_that_began_without_the_stage_is_read_once_and_goes_on(self, host):
        _, cache = steps(host, ids_of(150), 150)
        with headway.use(host, DHSA(**SMALL)), torch.no_grad():
            got = host(input_ids=ids_of(1), past_key_values=cache)
            assert next(iter(cache._headway_rows.owned.values()))["tokens"] == 151
        assert bool(torch.isfinite(got.logits).all())

    def test_a_prompt_in_pieces_begins_a_chunk_with_each(self, host):
        with headway.use(host, DHSA(**SMALL)), torch.no_grad():
            cache = host(input_ids=ids_of(150)[:, :90], use_cache=True).past_key_values
            host(input_ids=ids_of(150)[:, 90:], past_key_values=cache)
            state = next(iter(cache._headway_rows.owned.values()))
        assert 90 in state["ends"][0].tolist()
        assert state["tokens"] == 150
        assert int(state["counts"].sum()) == 150

    @pytest.mark.parametrize(("pieces", "whole"), [([90, 60], [(70, 90), (130, 150)]), ([150], [(130, 150)])])
    def test_the_last_tokens_of_every_piece_read_everything(self, pieces, whole):
        """One layer: rows of the suffix are those of dense attention, others are not."""
        model = tiny_host("llama", num_hidden_layers=1, num_key_value_heads=2, max_position_embeddings=512)[0]
        ids, cache, found, at = ids_of(150), None, [], 0
        with torch.no_grad():
            native = model(input_ids=ids).logits[0]
            with headway.use(model, DHSA(**(SMALL | {"suffix": 20, "block": 10}))):
                for size in pieces:
                    out = model(input_ids=ids[:, at : at + size], past_key_values=cache, use_cache=True)
                    cache, at = out.past_key_values, at + size
                    found.append(out.logits[0])
        same = (torch.cat(found) - native).abs().amax(1) < 1e-3
        dense = [row for first, last in whole for row in range(first, last)]
        assert bool(same[dense].all())
        assert not bool(same[[row for row in range(60, 150) if row not in dense]].any())

    def test_dense_decoding_reads_everything(self, host):
        prompt, rest = ids_of(150)[:, :149], ids_of(150)[:, 149:]
        with torch.no_grad():
            with headway.use(host, DHSA(**SMALL)):
                cache = host(input_ids=prompt, use_cache=True).past_key_values
            twin = copy.deepcopy(cache)
            native = host(input_ids=rest, past_key_values=twin).logits
            with headway.use(host, DHSA(decode="dense", **SMALL)):
                assert torch.equal(host(input_ids=rest, past_key_values=cache).logits, native)

    def test_rows_with_other_boundaries_do_not_meet_in_a_batch(self, host):
        ids = ids_of(150, batch=2)
        with headway.use(host, DHSA(**SMALL)):
            both, _ = steps(host, ids, 146)
            for row in range(2):
                alone, _ = steps(host, ids[row : row + 1], 146)
                torch.testing.assert_close(both[row], alone[0], atol=1e-4, rtol=1e-4)

    def test_padding_of_whole_blocks_changes_nothing(self, host):
        ids, mask = ids_of(160, batch=2), torch.ones(2, 160).long()
        ids[1, :32], mask[1, :32] = 0, 0
        with headway.use(host, DHSA(**SMALL)):
            both, _ = steps(host, ids, 156, mask=mask)
            alone, _ = steps(host, ids[1:, 32:], 124)
        torch.testing.assert_close(both[1, 32:], alone[0], atol=1e-3, rtol=1e-3)

    @pytest.mark.parametrize("pads", [0, 32])
    def test_a_static_cache_gives_what_a_growing_one_gives(self, host, pads):
        ids, mask = ids_of(150, batch=2), torch.ones(2, 150).long()
        ids[1, :pads], mask[1, :pads] = 0, 0
        options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "attention_mask": mask}
        with headway.use(host, DHSA(**SMALL)):
            growing = host.generate(ids, **options)
            static = host.generate(ids, cache_implementation="static", **options)
        assert static.tolist() == growing.tolist()

    def test_a_short_prompt_gives_way_to_dense_attention_and_the_report_says_so(self, host):
        with headway.use(host, DHSA(**(SMALL | {"approximates": True}))) as handle, torch.no_grad():
            host(input_ids=ids_of(150))
        assert {path for row in handle.report() for path in row["paths"]} == {"native: dense is as fast"}

    @pytest.mark.parametrize("pool", ["mean", "max"])
    def test_values_may_have_another_width_than_keys(self, pool):
        call = call_of(150)
        wide = call.replace(value=torch.randn(1, 2, 150, 5, generator=torch.Generator().manual_seed(1)))
        stage = DHSA(query_pool=pool, **SMALL)
        done = execute(wide, [stage], [])
        expected, lse = wide.replace(mask=kept(stage, call_of(150)).repeat_interleave(2, 1)).attend()
        torch.testing.assert_close(done.output, expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(done.lse, lse, atol=1e-5, rtol=1e-4)

    @pytest.mark.parametrize("pool", ["mean", "max"])
    def test_any_padding_gives_finite_rows(self, host, pool):
        ids, mask = ids_of(150, batch=2), torch.ones(2, 150).long()
        ids[1, :27], mask[1, :27] = 0, 0
        with headway.use(host, DHSA(query_pool=pool, **SMALL)):
            both, _ = steps(host, ids, 148, mask=mask)
            other = ids.masked_fill(mask == 0, 7)
            again, _ = steps(host, other, 148, mask=mask)
        assert bool(torch.isfinite(both[1, 27:]).all())
        torch.testing.assert_close(again[1, 27:], both[1, 27:], atol=1e-4, rtol=1e-4)

    def test_a_window_wider_than_the_budget_is_narrowed_and_a_shorter_one_left_alone(self):
        for window, path in ((96, "keys"), (40, "native")):
            model = tiny_host("mistral", sliding_window=window, max_position_embeddings=512)[0]
            with headway.use(model, DHSA(**SMALL)) as handle:
                steps(model, ids_of(170), 160)
            assert {name for row in handle.report() for name in row["paths"]} == {path}

    def test_a_window_hides_what_is_outside_it(self):
        call = call_of(150)
        call = call.replace(site=call.site.__class__(**(vars(call.site) | {"window": 80})))
        chosen = kept(DHSA(**SMALL), call)
        for row in range(150):
            last = min((row // 16 + 1) * 16, 150) - 1
            own = chosen[0, :, row].any(0).nonzero()[:, 0]
            assert int(own.min()) >= max(last - 79, 0)
            assert bool(chosen[0, :, row, max(last - 79, 0) : max(last - 79, 0) + 4].all())

    def test_a_cache_that_dropped_keys_chooses_what_a_whole_one_does(self):
        """The sums of dropped keys are known; a step on the last 80 keys names the same positions."""
        whole = call_of(200)
        whole = whole.replace(site=whole.site.__class__(**(vars(whole.site) | {"window": 80})))
        stage, chosen = DHSA(**SMALL), []
        for dropped in (0, 120):
            forward = Forward()
            stage.select(
                whole.replace(
                    query=whole.query[:, :, :199], key=whole.key[:, :, :199], value=whole.value[:, :, :199]
                ).replace(forward=forward)
            )
            step = whole.replace(
                query=whole.query[:, :, 199:],
                key=whole.key[:, :, dropped:],
                value=whole.value[:, :, dropped:],
                causal=False,
                first_key=dropped,
                first_query=199,
                forward=forward,
            )
            selection = stage.select(step)
            chosen.append((selection.index + dropped).flatten().tolist())
        assert chosen[0] == chosen[1]
        assert min(chosen[0]) >= 120
        assert len(chosen[0]) == 2 * 48

    @pytest.mark.parametrize("pieces", [[96, 80], [32, 64, 80], [16] * 11])
    def test_pieces_that_end_with_chunks_and_blocks_equal_the_whole(self, host, pieces):
        ids = ids_of(sum(pieces))
        stage = DHSA(boundaries=Fixed(size=8), **SMALL)
        with headway.use(host, stage), torch.no_grad():
            whole = host(input_ids=ids).logits
            cache, at, found = None, 0, []
            for size in pieces:
                out = host(input_ids=ids[:, at : at + size], past_key_values=cache, use_cache=True)
                cache, at = out.past_key_values, at + size
                found.append(out.logits)
        torch.testing.assert_close(torch.cat(found, 1), whole, atol=1e-3, rtol=1e-3)

    def test_a_generated_token_scores_the_chunks_before_it(self):
        """By hand: the prompt's chunks and the growing one, without the token's own key."""
        query, key, value = tensors(120, heads=2, kv_heads=2)
        forward, stage = Forward(), DHSA(boundaries=Fixed(size=10), **SMALL)
        whole = AttentionCall.from_tensors(query, key, value, forward=forward)
        stage.select(whole.replace(query=query[:, :, :100], key=key[:, :, :100], value=value[:, :, :100], causal=True))
        for at in range(100, 120):
            part = {"key": key[:, :, : at + 1], "value": value[:, :, : at + 1]}
            selection = stage.select(whole.replace(query=query[:, :, at : at + 1], **part))
        means = torch.stack([key[:, :, i : i + 10].sum(2) / 10**0.5 for i in range(0, 100, 10)], 2)
        means = torch.cat([means, key[:, :, 100:119].sum(2, keepdim=True) / 19**0.5], 2)
        scores = query[:, :, -1:] @ means.transpose(-1, -2)
        member = torch.tensor([[*[i // 10 for i in range(100)], *[10] * 20]])
        at = torch.arange(120)
        forced = ((at >= 104) | (at < 4))[None, None]
        expected = choose_tokens(scores, member, torch.ones_like(forced), forced, 48, mode="reference")
        assert torch.equal(selection.to_bool(1, 120), expected)

    @pytest.mark.parametrize("name", ["gemma2", "gpt_oss", "qwen3"])
    def test_soft_caps_learned_sinks_and_windows_stay(self, name):
        """With every key chosen where a window allows, lists give what the host gives."""
        model = tiny_host(name, max_position_embeddings=512)[0]
        ids = ids_of(96)
        with torch.no_grad():
            native = model(input_ids=ids).logits
            with headway.use(model, DHSA(**(SMALL | {"budget": 95, "suffix": 95}))) as handle:
                got = model(input_ids=ids).logits
        assert "keys" in {path for row in handle.report() for path in row["paths"]}
        torch.testing.assert_close(got[:, 48:], native[:, 48:], atol=2e-3, rtol=1e-3)


class TestArguments:
    def test_the_defaults_are_those_of_the_released_code_but_for_what_the_text_names(self):
        stage = DHSA()
        assert (stage.budget, stage.block, stage.local_tokens, stage.global_tokens, stage.suffix) == (
            2048, 64, 128, 128, 64,
        )  # fmt: skip
        assert (stage.norm, stage.queries, stage.query_pool) == ("sqrt", "blocks", "mean")
        assert (stage.share_boundaries, stage.share_selection) == (True, False)
        assert (stage.heads, stage.decode, stage.boundaries) == ("kv", "sparse", Similarity())
        cut = Predicted(predictor=BoundaryPredictor(16))
        assert (cut.threshold, cut.apart, cut.chunk_tokens, cut.window) == (1.1, 8, 8, 4)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"budget": 128}, r"budget: 128 is smaller than local \(128\) \+ global \(128\) tokens"),
            ({"decode_budget": 100}, "decode_budget: 100 is smaller"),
            ({"local_tokens": 32}, "local_tokens: got 32, expected at least 64"),
            ({"block": 0}, "block: got 0"),
            ({"suffix": -1}, "suffix: got -1"),
            ({"norm": "root"}, "norm: got 'root', expected one of sqrt, mean, sum"),
            ({"heads": "all"}, "heads: got 'all'"),
            ({"queries": "rows"}, "queries: got 'rows'"),
            ({"decode": "none"}, "decode: got 'none'"),
            ({"query_pool": "max", "queries": "chunks"}, "query_pool: got 'max' with query chunks"),
            ({"boundaries": 32}, "boundaries: got 32, expected a source"),
        ],
    )
    def test_a_bad_option_is_named(self, options, message):
        with pytest.raises(ArgumentError, match=message):
            DHSA(**options)

    def test_an_encoder_is_refused(self):
        with pytest.raises(ArgumentError, match="looks both ways"):
            DHSA(**SMALL).select(call_of(150).replace(causal=False))

    def test_a_position_bias_is_refused(self):
        with pytest.raises(ArgumentError, match="position bias"):
            DHSA(**SMALL).select(call_of(150).replace(bias=torch.zeros(1, 4, 150, 150)))

    def test_keys_dropped_before_the_stage_came_are_refused(self):
        call = call_of(80)
        late = call.replace(query=call.query[:, :, -1:], first_key=40, first_query=119, causal=False)
        with pytest.raises(ConflictError, match="dropped 40 keys"):
            DHSA(**SMALL).select(late)

    def test_a_frozen_cache_length_of_a_static_cache_is_not_a_key(self, host):
        with headway.use(host, DHSA(**SMALL)):
            expected = host.generate(ids_of(150), max_new_tokens=6, min_new_tokens=6, do_sample=False)
            got = host.generate(
                ids_of(150), max_new_tokens=6, min_new_tokens=6, do_sample=False, cache_implementation="static"
            )
        assert got.tolist() == expected.tolist()


class TestBudget:
    @pytest.mark.parametrize("tokens", [320, 1024, 2000])
    @pytest.mark.parametrize("share", [0.1, 0.25, 0.6])
    def test_the_share_is_met_in_prompt_and_step(self, tokens, share):
        (stage,) = at_budget(share, tokens=tokens, model=None)
        call = call_of(tokens, dim=4)
        state = Forward()
        found = fidelity(call, stage.select(call.replace(forward=state)), rows=torch.arange(0, tokens, 7))
        assert found.density == pytest.approx(share, abs=0.02 + 0.1 * share)
        step = call.replace(query=call.query[:, :, -1:], causal=False, forward=Forward())
        assert float(stage.select(step).to_bool(1, tokens).sum(-1).float().mean()) == pytest.approx(
            share * tokens, abs=1
        )

    def test_one_is_dense_at_any_length(self):
        (stage,) = at_budget(1, tokens=100, model=None)
        assert isinstance(stage.select(call_of(700, dim=4)), Dense)

    @pytest.mark.parametrize("share", [0, -1, 1.2, float("nan")])
    def test_a_share_out_of_range_is_refused(self, share):
        with pytest.raises(HeadwayError, match="share: got"):
            at_budget(share, tokens=100, model=None)

    def test_tokens_below_one_are_refused(self):
        with pytest.raises(ArgumentError, match="tokens: got 0"):
            at_budget(0.5, tokens=0, model=None)


@pytest.fixture(scope="module")
def real():
    return headway.load("smollm2")


@pytest.mark.real
class TestRealModel:
    def test_lists_with_everything_in_them_give_the_hosts_own_tokens(self, real):
        """The suffix covers the prompt, so every list is whole and the kernel of lists runs."""
        from headway.hosts import default_text, tokenize

        model, tokenizer = real
        ids = tokenize(tokenizer, default_text(), 260)
        stage = DHSA(budget=250, local_tokens=128, global_tokens=64, suffix=259, approximates=False)
        options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
        native = model.generate(ids, **options)
        with torch.no_grad():
            logits = model(input_ids=ids).logits
            with headway.use(model, stage) as handle:
                got = model(input_ids=ids).logits
                answer = model.generate(ids, **options)
        assert {path for row in handle.report() for path in row["paths"]} == {"keys"}
        torch.testing.assert_close(got, logits, atol=2e-2, rtol=1e-3)
        assert answer.tolist() == native.tolist()

    def test_chunks_keep_more_of_the_attention_than_a_window(self, real):
        from headway.door.stages import Observer
        from headway.hosts import default_text, tokenize

        model, tokenizer = real
        ids = tokenize(tokenizer, default_text(), 400)
        common = {"budget": 96, "block": 32, "global_tokens": 16, "suffix": 0}
        methods = DHSA(local_tokens=32, **common), DHSA(boundaries=Given(at=()), local_tokens=80, **common)
        masses = []

        class Mass(Observer):
            def observe(self, call, output, lse=None):
                rows = torch.arange(200, 400, 9)
                masses.append([fidelity(call, m.select(call), rows=rows).mean_mass() for m in methods])

        with headway.observe(model, Mass(), layers=[2, 14, 26]), torch.no_grad():
            model(input_ids=ids)
        chunks, window = torch.tensor(masses).mean(0).tolist()
        assert chunks > window
