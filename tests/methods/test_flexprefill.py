"""FlexPrefill: selection, its invariants, and the model under it."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.contracts import cache_policy as contract
from tests.door.hosts import CAUSAL, OTHERS, decoder

import headway
from headway.door import AttentionCall, BlockMask
from headway.door.call import Forward
from headway.door.execute import Executed, execute
from headway.errors import ArgumentError, ConflictError
from headway.kernels.pooling import (
    block_means,
    block_sums,
    mass_before,
    mass_before_rank,
    offset_blocks,
    ranks,
    root_jensen_shannon,
    self_similarity,
)
from headway.kernels.rope import rope_frequencies, rotate
from headway.methods.long_context.flexprefill import CARD, FlexPrefill, at_budget, select_blocks
from headway.methods.long_context.flexprefill.probe import mean_by_offset, pooled_map, probe_rows, probe_weights


def flex(**options) -> FlexPrefill:
    return FlexPrefill(**{"block": 4, "min_budget": 4, "approximates": False, **options})


def make_call(length=64, heads=4, kv_heads=2, dim=8, batch=1, seed=0, scale=2.0, **fields) -> AttentionCall:
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, heads, length, dim, generator=generator) * scale
    key, value = (torch.randn(batch, kv_heads, length, dim, generator=generator) for _ in range(2))
    return AttentionCall.from_tensors(query, key, value, causal=True, **fields)


def planted(kind: str, length: int = 1024, dim: int = 32, seed: int = 0, topics: int = 8) -> AttentionCall:
    """A head that is local by RoPE, reads a few columns, or reads its own topic's blocks; or none of it. What a "noisy
    local" head adds to its position is averaged away in block means, so that pooling misses it."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(2, length, dim, generator=generator)
    query, key = noise[0], noise[1]
    if kind.endswith("local"):
        spread = 0.7 if kind == "noisy local" else 0.1
        base = torch.randn(dim, generator=generator)
        positions = torch.arange(length)
        query, key = (
            rotate((base + spread * x)[None, None] * 3, positions, rope_frequencies(dim))[0, 0] for x in noise
        )
    elif kind == "vertical":
        direction = torch.nn.functional.normalize(torch.randn(dim, generator=generator), dim=0)
        query = query + 8 * direction
        key = key.clone()
        key[torch.randperm(length, generator=generator)[:6]] += 8 * direction
    elif kind == "topic":
        centres = torch.randn(topics, dim, generator=generator) * 3
        topic = torch.arange(length) // 32 % topics
        query, key = centres[topic] + 0.3 * query, centres[topic] + 0.3 * key
    tensors = (query[None, None], key[None, None], noise[1][None, None])
    return AttentionCall.from_tensors(*tensors, causal=True)


def kept_mass(call: AttentionCall, blocks) -> torch.Tensor:
    return (call.weights() * blocks.to_bool()).sum(-1)


def cover(mass: torch.Tensor, share: float) -> int:
    """How many of the largest entries it takes to reach a share, by counting."""
    running = mass.sort(descending=True).values.cumsum(-1)
    return min(int((running < share).sum()) + 1, mass.numel())


def test_card_names_the_paper():
    assert (CARD.slug, CARD.arxiv) == ("flexprefill", "2502.20766")


@given(
    seed=st.integers(0, 500),
    length=st.integers(9, 70),
    block=st.sampled_from([4, 8]),
    tau=st.sampled_from([0.0, 0.3, 1.0]),
)
@settings(max_examples=40, deadline=None)
def test_selection_is_causal_with_sink_diagonal_and_least_blocks(seed, length, block, tau):
    call = make_call(length, seed=seed)
    for options in ({}, {"selection": "row"}, {"stop": "union"}, {"count": "tokens"}, {"density": 0.4}):
        method = flex(block=block, tau=tau, min_budget=2 * block, **options)
        found = method.blocks_of(call)
        mask = found.mask
        assert mask.is_causal()
        assert bool(mask.blocks[..., 0].all())
        assert bool(mask.blocks.diagonal(dim1=2, dim2=3).all())
        count = mask.blocks.shape[2]
        want = torch.arange(1, count + 1).clamp(max=min(2, count))
        assert bool((mask.blocks.sum(-1) >= want).all())


@given(
    seed=st.integers(0, 200),
    tau=st.sampled_from([0.0, 1.0]),
    stop=st.sampled_from(["separate", "union"]),
    count=st.sampled_from(["blocks", "tokens"]),
    selection=st.sampled_from(["global", "row"]),
)
@settings(max_examples=40, deadline=None)
def test_what_less_gamma_reads_is_part_of_what_more_reads(seed, tau, stop, count, selection):
    call = make_call(seed=seed)
    options = {"tau": tau, "stop": stop, "count": count, "selection": selection, "min_budget": None}
    masks = [flex(gamma=g, **options).blocks_of(call).mask.blocks for g in (0.3, 0.6, 0.9, 0.99)]
    assert all(not bool((less & ~more).any()) for less, more in itertools.pairwise(masks))


@given(seed=st.integers(0, 200), gamma=st.floats(0.2, 0.99), count=st.sampled_from(["blocks", "tokens"]))
@settings(max_examples=40, deadline=None)
def test_blocks_are_those_of_the_rule_written_out(seed, gamma, count):
    """Columns and diagonals by sorting and counting, head by head, beside the levels of the library."""
    call = make_call(61, seed=seed)
    method = flex(gamma=gamma, tau=0.0, count=count, min_budget=None)
    rows = probe_rows(call, 4, None)
    weights = probe_weights(call, rows, None)
    vertical, slash = weights.mean(2), mean_by_offset(weights, rows)
    got = method.blocks_of(call).mask.blocks
    for head in range(4):
        by_column = block_sums(vertical[0, head], 4)
        by_distance = (offset_blocks if count == "blocks" else block_sums)(slash[0, head], 4)
        wide, deep = (
            cover(block, gamma) if count == "blocks" else cover(token, gamma) // 4 + 1
            for block, token in ((by_column, vertical[0, head]), (by_distance, slash[0, head]))
        )
        columns = {0, *by_column.argsort(descending=True)[:wide].tolist()}
        distances = {0, *by_distance.argsort(descending=True)[:deep].tolist()}
        want = torch.tensor([[k <= r and (k in columns or r - k in distances) for k in range(16)] for r in range(16)])
        assert torch.equal(got[0, head], want)


@given(
    seed=st.integers(0, 200),
    gamma=st.floats(0.2, 0.99),
    selection=st.sampled_from(["global", "row"]),
    most=st.sampled_from([None, 24]),
)
@settings(max_examples=40, deadline=None)
def test_query_aware_blocks_are_those_of_the_rule_written_out(seed, gamma, selection, most):
    """The fewest entries of the pooled map that cover γ of its mass, or of each row's, beside sink and diagonal."""
    call = make_call(61, seed=seed)
    method = flex(gamma=gamma, tau=1.0, selection=selection, min_budget=None, max_budget=most)
    pooled, got = pooled_map(call, 4), method.blocks_of(call).mask.blocks
    room = 16 if most is None else most // 4
    for head in range(4):
        rows = pooled[0, head]
        if selection == "row":
            taken = [set(row.argsort(descending=True)[: cover(row, gamma)].tolist()) for row in rows]
        else:
            flat = rows.flatten()
            best = flat.argsort(descending=True)[: cover(flat / flat.sum(), gamma)].tolist()
            taken = [{place % 16 for place in best if place // 16 == row} for row in range(16)]
        largest = [set(row.argsort(descending=True)[:room].tolist()) for row in rows]
        want = torch.tensor(
            [[k <= r and (k in (0, r) or k in taken[r] & largest[r]) for k in range(16)] for r in range(16)]
        )
        assert torch.equal(got[0, head], want)


@given(seed=st.integers(0, 200), gamma=st.floats(0.2, 0.99))
@settings(max_examples=40, deadline=None)
def test_the_union_is_grown_by_the_largest_until_it_covers_gamma_of_the_last_row(seed, gamma):
    """Columns and diagonals in one order; what both hold of the last row of blocks counts once."""
    call = make_call(61, seed=seed)
    weights = probe_weights(call, probe_rows(call, 4, None), None)
    slash = mean_by_offset(weights, probe_rows(call, 4, None))
    got = flex(gamma=gamma, tau=0.0, stop="union", min_budget=None).blocks_of(call).mask.blocks
    for head in range(4):
        by_column = block_sums(weights.mean(2)[0, head], 4).tolist()
        by_distance = offset_blocks(slash[0, head], 4).tolist()
        parts = [(mass, "column", k) for k, mass in enumerate(by_column)]
        parts += [(mass, "distance", d) for d, mass in enumerate(by_distance)]
        parts.sort(key=lambda part: (part[2] == 0, part[0]), reverse=True)
        columns, distances, covered = set(), set(), set()
        for _, kind, number in parts:
            if sum(by_column[k] for k in covered) >= gamma:
                break
            (columns if kind == "column" else distances).add(number)
            covered.add(number if kind == "column" else 15 - number)
        columns, distances = columns | {0}, distances | {0}
        want = torch.tensor([[k <= r and (k in columns or r - k in distances) for k in range(16)] for r in range(16)])
        assert torch.equal(got[0, head], want)
        assert sum(by_column[k] for k in range(16) if got[0, head, -1, k]) >= gamma - 1e-6


def test_probe_marginals_sum_to_one_and_the_chosen_columns_cover_gamma():
    call = make_call(70, scale=3.0)
    rows = probe_rows(call, 4, None)
    weights = probe_weights(call, rows, None)
    torch.testing.assert_close(weights, call.weights(rows[0]))
    vertical, slash = weights.mean(2), mean_by_offset(weights, rows)
    torch.testing.assert_close(vertical.sum(-1), torch.ones(1, 4))
    torch.testing.assert_close(slash.sum(-1), torch.ones(1, 4))
    by_hand = torch.stack(
        [weights[0, :, i].flip(-1)[:, 69 - int(r) :].nan_to_num().sum(-1) for i, r in enumerate(rows[0])]
    )
    torch.testing.assert_close(by_hand, torch.ones_like(by_hand))
    assert slash[0, 1, 3] == pytest.approx(
        float(torch.stack([weights[0, 1, i, int(r) - 3] for i, r in enumerate(rows[0])]).mean())
    )
    found = flex(gamma=0.8, tau=0.0).blocks_of(call)
    last = found.mask.blocks[:, :, -1]
    covered = (block_sums(vertical, 4) * last).sum(-1)
    assert bool((covered >= 0.8 - 1e-6).all())


def test_tau_decides_between_the_patterns():
    call = make_call()
    assert not flex(tau=0.0).blocks_of(call).query_aware.any()
    found = flex(tau=0.84).blocks_of(call)
    assert bool(found.query_aware.all())
    assert bool((found.divergence <= math.sqrt(math.log(2)) + 1e-6).all())


def divergence_by_hand(call: AttentionCall, block: int) -> float:
    """D of a call of one head in float64, by the definitions."""
    query, key = call.query[0, 0].double(), call.key[0, 0].double()
    logits = query[-block:] @ key.T * call.scale
    logits += torch.full_like(logits, -torch.inf).triu(key.shape[0] - block + 1)
    true = logits.softmax(-1).mean(0).view(-1, block).sum(-1)
    pooled = (query[-block:].mean(0) @ key.view(-1, block, key.shape[1]).mean(1).T * call.scale).softmax(-1)
    middle = (true + pooled) / 2
    parts = [(x[x > 0] * (x[x > 0] / middle[x > 0]).log()).sum() for x in (true, pooled)]
    return float((sum(parts) / 2).sqrt())


@pytest.mark.parametrize(("kind", "aware"), [("topic", True), ("vertical", False), ("noisy local", False)])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_planted_heads_get_their_pattern(kind, aware, seed):
    """Four topics: with eight, every second block of a topic is far enough to stand on the threshold."""
    found = flex(block=32, gamma=0.9).blocks_of(planted(kind, seed=seed, topics=4))
    assert bool(found.query_aware) == aware
    assert (float(found.divergence) < 0.1) == aware


@pytest.mark.parametrize("kind", ["local", "noisy local", "vertical", "topic", "none"])
def test_the_divergence_is_the_one_of_the_definition(kind):
    call = planted(kind)
    assert float(flex(block=32).blocks_of(call).divergence) == pytest.approx(divergence_by_hand(call, 32), abs=2e-3)


def test_pooling_may_be_trusted_for_a_clean_local_head_and_both_patterns_read_the_same():
    call = planted("local")
    aware, slash = (flex(block=32, tau=tau).blocks_of(call) for tau in (0.1, 0.0))
    assert bool(aware.query_aware)
    assert not bool(slash.query_aware)
    assert aware.density == pytest.approx(slash.density, rel=0.05)


def test_a_diagonal_that_falls_on_two_block_distances_is_read_on_both():
    """One fixed offset of 40 in blocks of 32: 24 of 32 rows find their key one block back, the others two."""
    offset, length = 40, 512
    codes = torch.nn.functional.normalize(torch.randn(length, 64, generator=torch.Generator().manual_seed(0)), dim=-1)
    query = 30 * codes.roll(offset, 0)
    call = AttentionCall.from_tensors(query[None, None], codes[None, None] * 8, codes[None, None], causal=True)
    kept = {
        count: float(kept_mass(call, flex(block=32, tau=0.0, count=count).blocks_of(call).mask)[..., 64:].mean())
        for count in ("blocks", "tokens")
    }
    assert kept["blocks"] > 0.99
    assert kept["tokens"] < 0.85


def test_a_local_head_is_cheap_and_keeps_its_mass_and_an_isotropic_one_is_not():
    local = flex(block=32, gamma=0.9).blocks_of(planted("local"))
    assert local.density < 0.3
    assert float(kept_mass(planted("local"), local.mask).mean()) > 0.95
    even = flex(block=32, gamma=0.9).blocks_of(planted("none"))
    assert even.density > 5 * local.density


def test_a_quota_by_row_feeds_late_rows_and_a_global_one_starves_them():
    call = planted("none")
    options = {"block": 32, "gamma": 0.9, "tau": 1.0, "min_budget": 32}
    last = {
        s: float(kept_mass(call, flex(selection=s, **options).blocks_of(call).mask)[..., -32:].mean())
        for s in ("global", "row")
    }
    assert last["row"] > 0.8
    assert last["global"] < last["row"] - 0.3


def test_stopping_at_the_union_reads_less_for_a_vertical_head():
    call = planted("vertical")
    separate, union = (flex(block=32, tau=0.0, stop=s).blocks_of(call) for s in ("separate", "union"))
    assert union.density < separate.density
    assert float(kept_mass(call, union.mask)[..., -32:].mean()) >= 0.85


def test_budgets_are_counted_in_blocks_of_their_own_size():
    call = planted("none")
    most = flex(block=32, gamma=0.999, tau=0.0, min_budget=None, max_budget=100).blocks_of(call).mask.blocks
    assert int(most.sum(-1).max()) <= 2 * 4
    for selection in ("global", "row"):
        options = {"tau": 1.0, "min_budget": None, "max_budget": 100, "selection": selection}
        aware = flex(block=32, gamma=0.999, **options).blocks_of(call).mask.blocks
        assert int(aware.sum(-1).max()) <= 4 + 2
    least = flex(block=32, gamma=0.01, tau=0.0, min_budget=128).blocks_of(call).mask.blocks
    assert bool((least.sum(-1)[0, 0] >= torch.arange(1, 33).clamp(max=4)).all())


@given(seed=st.integers(0, 200), density=st.floats(0.3, 0.95), tau=st.sampled_from([0.0, 0.2, 1.0]))
@settings(max_examples=30, deadline=None)
def test_an_asked_for_density_is_met_and_not_exceeded(seed, density, tau):
    call = make_call(128, heads=6, kv_heads=3, seed=seed)
    found = flex(density=density, tau=tau, min_budget=None).blocks_of(call)
    assert found.density <= density + 1e-6
    assert found.density > density - 0.12
    assert float(found.head_density().mean()) == pytest.approx(found.density, abs=1e-6)
    same = flex(gamma=min(float(found.gamma[0]), 0.9999), tau=tau, min_budget=None).blocks_of(call)
    if float(found.gamma[0]) < 1:
        assert torch.equal(same.mask.blocks, found.mask.blocks)


def test_a_density_gives_more_blocks_to_heads_that_need_more():
    calls = [planted("local"), planted("none")]
    both = calls[0].replace(
        query=torch.cat([c.query for c in calls], 1),
        key=torch.cat([c.key for c in calls], 1),
        value=torch.cat([c.value for c in calls], 1),
    )
    local, even = flex(block=32, density=0.4, min_budget=None).blocks_of(both).head_density()[0].tolist()
    assert even > 3 * local


@pytest.mark.parametrize("tokens", [512, 1500, 8192])
@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_a_budget_is_the_share_that_is_read(tokens, share):
    (method,) = at_budget(share, tokens=tokens, model=torch.nn.Identity())
    assert tokens >= 32 * method.block or method.block == 16
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 2, min(tokens, 1500), 16, generator=generator) for _ in range(2))
    call = AttentionCall.from_tensors(query, key, key, causal=True)
    if share == 1:
        assert isinstance(method.select(call), headway.door.Dense)
    else:
        assert method.select(call).mask.density() == pytest.approx(share, abs=0.08 if tokens < 8192 else 0.12)


def test_a_budget_in_a_model_is_the_density_of_the_report():
    model = decoder("Llama")
    ids = contract.tokens(1, 120)
    with headway.use(model, *at_budget(0.5, tokens=120, model=model)) as handle, torch.no_grad():
        model(input_ids=ids)
    assert {p for row in handle.report() for p in row["paths"]} == {"blocks"}
    assert all(row["density"] <= 0.5 + 1e-6 for row in handle.report())
    for share, tokens in ((0, 100), (1.2, 100), (0.5, 0)):
        with pytest.raises(ArgumentError, match=r"share|tokens"):
            at_budget(share, tokens=tokens, model=model)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2 soft cap", "gpt-oss learned sinks", "gpt2"])
def test_gamma_one_short_prompts_and_decoding_are_the_hosts_own_bits(name):
    model = CAUSAL[name]()
    ids = contract.tokens(1, 20)
    with torch.no_grad():
        native = contract.run_in_chunks(model, ids, [18, 1, 1])
        for method in (flex(gamma=1.0), FlexPrefill()):
            with headway.use(model, method) as handle:
                assert torch.equal(contract.run_in_chunks(model, ids, [18, 1, 1]), native)
            assert {p for row in handle.report() for p in row["paths"]} == {"native"}


def test_the_report_tells_density_and_path_and_a_record_the_patterns():
    model = decoder("Llama")
    record = []
    with headway.use(model, flex(record=record, gamma=0.5)) as handle, torch.no_grad():
        model(input_ids=contract.tokens(1, 64))
    assert [found.layer for found in record] == [0, 1, 2]
    for found, row in zip(record, handle.report(), strict=True):
        assert row["paths"] == {"blocks": 1}
        assert row["density"] == pytest.approx(found.density)
        assert row["density"] < 1


def test_short_prompts_are_dense_where_that_is_as_fast_and_the_report_says_so():
    model = decoder("Llama")
    with headway.use(model, flex(gamma=0.5, approximates=True)) as handle, torch.no_grad():
        model(input_ids=contract.tokens(1, 64))
    assert {p for row in handle.report() for p in row["paths"]} == {"native: dense is as fast"}


def test_no_row_uses_a_later_key_and_heads_may_share_keys():
    call = make_call(50)
    mask = flex(gamma=0.5).blocks_of(call).mask
    repeated = call.replace(key=call.key.repeat_interleave(2, 1), value=call.value.repeat_interleave(2, 1))
    assert torch.equal(flex(gamma=0.5).blocks_of(repeated).mask.blocks, mask.blocks)
    order = torch.tensor([2, 0, 3, 1])
    turned = repeated.replace(
        query=repeated.query[:, order], key=repeated.key[:, order], value=repeated.value[:, order]
    )
    assert torch.equal(flex(gamma=0.5).blocks_of(turned).mask.blocks, mask.blocks[:, order])
    shared, alone, permuted = (execute(c, [flex(gamma=0.5)], []).output for c in (call, repeated, turned))
    torch.testing.assert_close(shared, alone)
    torch.testing.assert_close(permuted, alone[:, order])


def test_a_batch_is_its_rows_and_padding_moves_the_sink():
    call = make_call(40, batch=2)
    both = flex(gamma=0.6).blocks_of(call)
    for row in (0, 1):
        one = call.replace(
            query=call.query[row : row + 1], key=call.key[row : row + 1], value=call.value[row : row + 1]
        )
        assert torch.equal(flex(gamma=0.6).blocks_of(one).mask.blocks[0], both.mask.blocks[row])
    padding = torch.ones(2, 40, dtype=torch.bool)
    padding[1, :9] = False
    padded = call.replace(forward=Forward(padding=padding))
    found = flex(gamma=0.6).blocks_of(padded).mask.blocks
    assert torch.equal(found[0], both.mask.blocks[0])
    assert bool(found[1, :, 2:, 2].all())


def test_a_ragged_prompt_is_the_same_as_one_padded_behind_its_end():
    call = make_call(50)
    more = torch.full((1, 1, 6, 1), 9.0)
    tail = [torch.cat([x, more.expand(1, x.shape[1], 6, 8)], 2) for x in (call.query, call.key, call.value)]
    padding = torch.arange(56)[None] < 50
    longer = AttentionCall.from_tensors(*tail, causal=True, forward=Forward(padding=padding))
    more = ({"tau": 1.0, "selection": "row"}, {"stop": "union", "tau": 0.0}, {"tau": 1.0, "trust": 0.05, "gamma": 0.4})
    for options in ({"tau": 0.0}, {"tau": 1.0}, *more):
        ragged, padded = (flex(block=8, min_budget=None, **options).blocks_of(c).mask.blocks for c in (call, longer))
        assert torch.equal(ragged, padded)


@pytest.mark.parametrize("blocks", [1, 3])
def test_whole_blocks_of_padding_behind_a_prompt_choose_nothing(blocks):
    """Their rows see the keys of the prompt, and in a ranking over all rows would take the places of others."""
    call = make_call(56)
    rest = torch.full((1, 1, 8 * blocks, 1), 9.0)
    tail = [torch.cat([x, rest.expand(1, x.shape[1], -1, 8)], 2) for x in (call.query, call.key, call.value)]
    padding = torch.arange(56 + 8 * blocks)[None] < 56
    longer = AttentionCall.from_tensors(*tail, causal=True, forward=Forward(padding=padding))
    assert not pooled_map(longer, 8)[:, :, 7:].any()
    for options in ({"tau": 1.0, "gamma": 0.5}, {"tau": 1.0, "density": 0.5}, {"tau": 0.0, "gamma": 0.5}):
        alone, padded = (flex(block=8, min_budget=None, **options).blocks_of(c).mask.blocks for c in (call, longer))
        assert torch.equal(padded[:, :, :7, :7], alone)


def test_a_batch_with_padding_gives_each_prompt_its_own_blocks():
    """Pads of whole blocks shift the grid of a prompt and change nothing else."""
    call = make_call(39)
    front = [torch.cat([torch.full_like(x[:, :, :8], 9.0), x], 2) for x in (call.query, call.key, call.value)]
    padding = torch.arange(47)[None] >= 8
    longer = AttentionCall.from_tensors(*front, causal=True, forward=Forward(padding=padding))
    more = ({"density": 0.4, "tau": 0.0}, {"density": 0.4, "tau": 1.0}, {"stop": "union"}, {"count": "tokens"})
    guarded = {"tau": 1.0, "trust": 0.05, "gamma": 0.4}
    for options in ({"tau": 0.0}, {"tau": 1.0}, {"tau": 1.0, "selection": "row"}, guarded, *more):
        alone, padded = (flex(min_budget=None, **options).blocks_of(c).mask.blocks for c in (call, longer))
        assert torch.equal(padded[:, :, 2:, 2:], alone)
        assert not padded[:, :, 2:, :2].any()


def test_the_probe_obeys_the_hosts_mask():
    """Two texts packed into one row: the second does not see the first, and nothing of the first is chosen."""
    call = make_call(64)
    own = (torch.arange(64) >= 32)[:, None] == (torch.arange(64) >= 32)
    packed = call.replace(mask=(own & torch.ones(64, 64, dtype=torch.bool).tril())[None, None])
    weights = probe_weights(packed, probe_rows(packed, 4, None), None)
    assert float(weights[..., :32].abs().max()) == 0
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 4, 4))


def test_soft_capped_logits_are_capped_in_the_probe():
    call = make_call(64, scale=20.0, softcap=3.0)
    weights = probe_weights(call, probe_rows(call, 4, None), None)
    torch.testing.assert_close(weights, call.weights(torch.arange(60, 64)))
    query, key = (block_means(x, 4) for x in (call.query, call.key))
    logits = query @ key.repeat_interleave(2, 1).transpose(-1, -2) * call.scale
    logits = 3.0 * torch.tanh(logits / 3.0)
    logits += torch.full_like(logits, -torch.inf).triu(1)
    torch.testing.assert_close(pooled_map(call, 4), logits.softmax(-1))


def test_values_may_have_another_width_than_keys_and_the_log_sum_exp_is_that_of_what_was_read():
    call = make_call(64)
    wide = call.replace(value=torch.randn(1, 2, 64, 5, generator=torch.Generator().manual_seed(1)))
    method = flex(gamma=0.5)
    done = execute(wide, [method], [])
    assert isinstance(done, Executed)
    assert done.path == "blocks"
    chosen = method.blocks_of(wide).mask.to_bool()
    output, lse = wide.replace(mask=chosen).attend()
    torch.testing.assert_close(done.output, output, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(done.lse, lse, atol=1e-5, rtol=1e-4)


def test_blocks_can_be_chosen_without_a_host():
    call = make_call(64)
    found = select_blocks(call.query, call.key, block=4, gamma=0.5, min_budget=4)
    assert torch.equal(found.mask.blocks, flex(gamma=0.5).blocks_of(call).mask.blocks)
    assert isinstance(found.mask, BlockMask)
    with pytest.raises(ArgumentError, match="64 and 60 tokens"):
        select_blocks(call.query, call.key[:, :, :60])


@given(seed=st.integers(0, 100), row=st.integers(20, 38))
@settings(max_examples=15, deadline=None)
def test_for_fixed_blocks_a_later_token_changes_no_earlier_output(seed, row):
    call = make_call(40, seed=seed)
    mask = flex(gamma=0.5).blocks_of(call).mask
    other = call.replace(
        **{n: torch.cat([x[:, :, :row], x[:, :, row:] + 1], 2) for n in ("key", "value") for x in [getattr(call, n)]}
    )
    first, second = (
        execute(c, [_Fixed(mask)], []).output[:, :, :row] for c in (call, other)
    )  # fmt: skip
    torch.testing.assert_close(first, second)


class _Fixed(headway.door.Selector):
    def __init__(self, mask):
        self.mask = mask

    def select(self, call):
        return headway.door.Blocks(self.mask)


@pytest.mark.parametrize("name", list(CAUSAL))
def test_generation_and_beams_work_with_a_sparse_prefill(name):
    model = CAUSAL[name]()
    ids = contract.tokens(1, 24)
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    with headway.use(model, flex(gamma=0.5)) as handle:
        out = model.generate(ids, **options)
        assert model.generate(ids, num_beams=2, **options).shape == (1, 27)
    with headway.use(model, flex(gamma=0.5)), torch.no_grad():
        first = model(input_ids=ids).logits[0, -1].argmax()
    assert int(out[0, 24]) == int(first) or int(first) == 2
    if "sliding" not in name:
        assert "blocks" in {p for row in handle.report() for p in row["paths"]}


@pytest.mark.parametrize("chunks", ["raise", "dense"])
def test_assisted_decoding_is_refused_however_it_is_asked_for(chunks):
    """Drafts come with the prompt in one forward and move the probe: the text would not be that of greedy decoding."""
    model = decoder("Llama")
    ids = contract.tokens(1, 8).repeat(1, 3)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    config = copy.deepcopy(model.generation_config)
    config.prompt_lookup_num_tokens = 3
    with headway.use(model, flex(gamma=0.5, chunks=chunks)):
        plain = model.generate(ids, **options)
        for how in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": model}, {"generation_config": config}):
            with pytest.raises(ConflictError, match=r"assisted decoding beside FlexPrefill.*without assisted decoding"):
                model.generate(ids, **how, **options)
        assert model.generate(ids, **options).tolist() == plain.tolist()
    assert "generate" not in vars(model)
    native = model.generate(ids, **options).tolist()
    assert model.generate(ids, prompt_lookup_num_tokens=3, **options).tolist() == native


def test_drafts_would_change_what_a_prompt_reads():
    """Why they are refused: the same prompt with three tokens behind it reads other blocks."""
    call = make_call(64)
    shorter = call.replace(**{n: getattr(call, n)[:, :, :60] for n in ("query", "key", "value")})
    whole, prompt = (flex(gamma=0.5).blocks_of(c).mask.blocks for c in (call, shorter))
    assert not torch.equal(whole[:, :, :15, :15], prompt)


def test_an_encoder_is_left_alone_and_a_position_bias_is_refused():
    model, inputs = OTHERS["bert"]()
    with headway.use(model, flex()) as handle, torch.no_grad():
        model(**inputs)
    assert {p for row in handle.report() for p in row["paths"]} == {"native"}
    call = make_call(64, bias=torch.zeros(1, 4, 64, 64))
    with pytest.raises(ArgumentError, match="position bias"):
        flex().select(call)


def test_left_padded_prompts_run_and_read_no_padding():
    model = decoder("Llama")
    ids, mask = contract.padded_left(contract.tokens(2, 48), [0, 11])
    with headway.use(model, flex(gamma=0.99)), torch.no_grad():
        got = model(input_ids=ids, attention_mask=mask).logits
    other = ids.clone()
    other[1, :11] = 7
    with headway.use(model, flex(gamma=0.99)), torch.no_grad():
        again = model(input_ids=other, attention_mask=mask).logits
    torch.testing.assert_close(got[mask.bool()], again[mask.bool()])


@pytest.mark.parametrize("pads", [[0, 0], [0, 7]])
def test_a_static_cache_gives_what_a_growing_one_gives(pads):
    """Its empty slots are no keys, and padding is known though the host gets a mask of pairs."""
    model = decoder("Llama")
    ids, mask = contract.padded_left(contract.tokens(2, 40), pads)
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "attention_mask": mask}
    with headway.use(model, flex(gamma=0.5)) as handle:
        growing = model.generate(ids, **options)
        static = model.generate(ids, cache_implementation="static", **options)
    assert static.tolist() == growing.tolist()
    assert all(row["paths"]["blocks"] == 2 for row in handle.report())


def test_a_prompt_in_pieces_is_refused_or_dense():
    model = decoder("Llama")
    ids = contract.tokens(1, 40)
    with headway.use(model, flex()), pytest.raises(ArgumentError, match=r"got 20 queries on 40 keys.*whole\s+prompt"):
        contract.run_in_chunks(model, ids, [20, 20])
    with headway.use(model, flex(chunks="dense")) as handle:
        got = contract.run_in_chunks(model, ids, [20, 20])
    assert [row["paths"] for row in handle.report()] == [{"blocks": 1, "native": 1}] * 3
    with torch.no_grad(), headway.use(model, flex(chunks="dense")):
        cache = model(input_ids=ids[:, :20], use_cache=True).past_key_values
    with torch.no_grad():
        rest = model(input_ids=ids[:, 20:], past_key_values=cache).logits
    assert torch.equal(got[:, 20:], rest)


def test_sliding_layers_are_left_alone():
    """Also when the prompt comes in pieces, or a draft is checked in one: they need no choice."""
    model = CAUSAL["mistral sliding"]()
    ids = contract.tokens(1, 40)
    with torch.no_grad():
        native = model(input_ids=ids).logits
    with headway.use(model, flex()) as handle, torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, native)
        pieces = contract.run_in_chunks(model, ids, [20, 16, 4])
    torch.testing.assert_close(pieces, native, atol=2e-4, rtol=0)
    assert {p for row in handle.report() for p in row["paths"]} == {"native"}


def test_zero_probabilities_give_no_nan():
    call = make_call(64, scale=200.0)
    assert bool((probe_weights(call, probe_rows(call, 4, None), None) == 0).any())
    assert bool(torch.isfinite(flex(tau=0.1).blocks_of(call).divergence).all())


@pytest.mark.parametrize("tau", [0.0, 1.0])
def test_logits_beyond_half_precision_choose_the_blocks_of_full_precision(tau):
    call = make_call(64, scale=9000.0)
    half = call.replace(query=call.query.half(), key=call.key.half(), value=call.value.half())
    assert bool(torch.isinf(half.query @ half.key.repeat_interleave(2, 1).transpose(-1, -2)).any())
    full = half.replace(query=half.query.float(), key=half.key.float(), value=half.value.float())
    found, wanted = (flex(tau=tau, gamma=0.7).blocks_of(c) for c in (half, full))
    assert bool(torch.isfinite(found.divergence).all())
    assert torch.equal(found.mask.blocks, wanted.mask.blocks)


def test_a_sequence_of_nothing_but_padding_changes_no_other():
    call = make_call(40, batch=2)
    padding = torch.ones(2, 40, dtype=torch.bool)
    padding[1] = False
    found = flex(gamma=0.6).blocks_of(call.replace(forward=Forward(padding=padding)))
    assert torch.equal(found.mask.blocks[0], flex(gamma=0.6).blocks_of(call).mask.blocks[0])
    assert bool(torch.isfinite(found.divergence).all())
    assert bool(found.mask.blocks[1].diagonal(dim1=1, dim2=2).all())


def test_the_defaults_are_those_of_the_released_code():
    method = FlexPrefill()
    assert (method.gamma, method.tau, method.min_budget, method.max_budget, method.block) == (0.9, 0.1, 1024, None, 128)
    assert (method.selection, method.stop) == ("global", "separate")
    assert flex(min_budget=None).min_blocks == 1
    with pytest.raises(TypeError, match="positional"):
        FlexPrefill(0.9)


@pytest.mark.parametrize(("options", "cutoff"), [({"min_budget": 10}, 12), ({"min_budget": None}, 8)])
def test_prompts_are_dense_up_to_two_blocks_or_the_least_budget_and_sparse_beyond(options, cutoff):
    method = flex(gamma=0.5, **options)
    assert method.dense_up_to == cutoff
    assert isinstance(method.select(make_call(cutoff)), headway.door.Dense)
    assert isinstance(method.select(make_call(cutoff + 1)), headway.door.Blocks)


def test_a_block_longer_than_the_prompt_is_one_block():
    call = make_call(10)
    assert isinstance(flex(block=16).select(call), headway.door.Dense)
    assert select_blocks(call.query, call.key, block=16).mask.blocks.tolist() == [[[[True]]] * 4]


def test_what_early_rows_read_depends_on_later_tokens_through_the_probe_and_the_stage_says_so():
    call = make_call(64)
    other = call.replace(query=torch.cat([call.query[:, :, :60], -call.query[:, :, 60:]], 2))
    one, two = (flex(gamma=0.5).blocks_of(c).mask.blocks for c in (call, other))
    assert not torch.equal(one[:, :, :15], two[:, :, :15])
    assert "last block" in FlexPrefill.looks_ahead


def test_bad_numbers_are_refused():
    bad = [
        ({"gamma": 0}, "gamma"), ({"gamma": 1.1}, "gamma"), ({"tau": -1}, "tau"), ({"block": 48}, "power of two"),
        ({"min_budget": 0}, "min_budget"), ({"min_budget": 64, "max_budget": 32}, "64 and 32"),
        ({"selection": "best"}, "selection"), ({"stop": "never"}, "stop"), ({"chunks": "guess"}, "chunks"),
        ({"count": "bytes"}, "count"), ({"density": 0}, "density"), ({"tau": math.nan}, "tau"),
    ]  # fmt: skip
    for options, match in bad:
        with pytest.raises(ArgumentError, match=match):
            FlexPrefill(**options)


def test_pooling():
    x = torch.tensor([0.5, 0.2, 0.3])
    torch.testing.assert_close(mass_before(x), torch.tensor([0.0, 0.8, 0.5]))
    torch.testing.assert_close(mass_before_rank(x), torch.tensor([0.0, 0.5, 0.8]))
    # Offsets 0, 1, 3, 4 in blocks of 2: odd ones lie half in their own block and half in the next.
    torch.testing.assert_close(
        offset_blocks(torch.tensor([1.0, 2.0, 0.0, 4.0, 8.0]), 2), torch.tensor([2.0, 3.0, 10.0])
    )
    assert ranks(torch.tensor([1.0, 3.0, 1.0])).tolist() == [1, 0, 2]
    assert block_sums(torch.arange(5.0), 2).tolist() == [1.0, 5.0, 4.0]
    real = torch.tensor([[False, True, True]])
    means = block_means(torch.tensor([[[[9.0], [2.0], [4.0]]]]), 2, real)
    assert means.flatten().tolist() == [2.0, 4.0]
    assert float(root_jensen_shannon(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]))) == pytest.approx(
        math.sqrt(math.log(2))
    )
    assert float(root_jensen_shannon(x, x)) == 0
    with pytest.raises(ArgumentError, match="block"):
        block_sums(x, 0)


def test_self_similarity_is_the_mean_cosine_of_pairs():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 22, 5, generator=generator)
    x[0, 0, 4] = 0
    real = torch.ones(2, 22, dtype=torch.bool)
    real[1, :9] = False
    got = self_similarity(x, 8, real)
    for row, head, place in itertools.product(range(2), range(3), range(3)):
        tokens = [x[row, head, i] for i in range(8 * place, min(8 * place + 8, 22)) if real[row, i]]
        cosines = [float(torch.cosine_similarity(a, b, dim=0)) for a, b in itertools.combinations(tokens, 2)]
        want = sum(cosines) / len(cosines) if cosines else 1.0
        assert float(got[row, head, place]) == pytest.approx(want, abs=1e-5)
    assert got[1, :, 0].tolist() == [1.0] * 3


def test_self_similarity_is_one_for_equal_directions_and_lowest_for_opposite_ones():
    same = torch.randn(1, 1, 1, 6) * torch.arange(1.0, 9.0)[None, None, :, None]
    assert float(self_similarity(same, 8)) == pytest.approx(1)
    opposite = same * torch.tensor([1.0, -1.0]).repeat(4)[None, None, :, None]
    assert float(self_similarity(opposite, 8)) == pytest.approx(-1 / 7)
    assert self_similarity(same[:, :, :5], 4).flatten().tolist() == pytest.approx([1, 1])
    with pytest.raises(ArgumentError, match="block"):
        self_similarity(same, 0)


def hidden_needle() -> tuple[AttentionCall, int]:
    """A query-aware head (runs of topics) with one key in block 5 that the queries of blocks 20 to 23 want, among keys
    that point the other way, so that their mean says nothing of it. The probe, the last block, does not want it."""
    call = planted("topic", topics=4)
    query, key = call.query.clone(), call.key.clone()
    wanted = torch.nn.functional.normalize(query[0, 0, 640:768].mean(0), dim=0)
    query[0, 0, 640:768] += 6 * wanted
    key[0, 0, 160:192] = -0.5 * wanted + 0.1 * key[0, 0, 160:192]
    key[0, 0, 170] = 20 * wanted
    return AttentionCall.from_tensors(query, key, call.value, causal=True), 5


def test_a_block_that_is_unlike_itself_is_read_whole_if_asked():
    call, needle = hidden_needle()
    assert float(self_similarity(call.key, 32)[0, 0, needle]) < 0.95
    plain, guarded = (flex(block=32, gamma=0.5, tau=1.0, trust=trust).blocks_of(call) for trust in (None, 0.95))
    unlike = self_similarity(call.key, 32)[0, 0] < 0.95
    assert int(unlike.sum()) < 10
    assert bool(guarded.mask.blocks[0, 0][needle:, needle].all())
    assert not bool(plain.mask.blocks[0, 0][needle:, needle].all())
    assert not bool((plain.mask.blocks & ~guarded.mask.blocks).any())
    assert guarded.mask.is_causal()


def test_trust_bounds_no_block_or_every_block_and_vertical_slash_heads_take_none():
    call = make_call(seed=3)
    options = {"gamma": 0.3, "min_budget": None}
    for tau in (0.0, 1.0):
        plain, least, most = (flex(tau=tau, trust=trust, **options).blocks_of(call).mask for trust in (None, -1.0, 1.0))
        assert torch.equal(plain.blocks, least.blocks)
        assert most.density() == (1.0 if tau else plain.density())
    for trust in (1.5, -2, math.nan, "much"):
        with pytest.raises(ArgumentError, match="trust: got"):
            FlexPrefill(trust=trust)


@pytest.mark.real
def test_a_real_model_says_nearly_the_same_after_a_sparse_prefill():
    from headway.hosts import default_text, tokenize

    model, tokenizer = headway.load("smollm2")
    ids = tokenize(tokenizer, default_text(), 512)
    with torch.no_grad():
        native = model(ids).logits.log_softmax(-1)
        with headway.use(model, flex(gamma=0.95, block=32, min_budget=64)) as handle:
            got = model(ids).logits.log_softmax(-1)
    assert {p for row in handle.report() for p in row["paths"]} == {"blocks"}
    assert sum(row["density"] for row in handle.report()) / 30 < 0.95
    assert float((native.exp() * (native - got)).sum(-1).mean()) < 0.1
    assert float((native.argmax(-1) == got.argmax(-1)).double().mean()) > 0.9
