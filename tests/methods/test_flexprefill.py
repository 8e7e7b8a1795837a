"""FlexPrefill: selection, its invariants, and the model under it."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.contracts import cache_policy as contract
from tests.door.hosts import CAUSAL, decoder

import headway
from headway.door import AttentionCall
from headway.door.call import Forward
from headway.errors import ArgumentError
from headway.kernels.pooling import block_means, block_similarity, block_sums, cover, ranks, root_jensen_shannon
from headway.kernels.rope import rope_frequencies, rotate
from headway.methods.long_context.flexprefill import CARD, FlexPrefill, _by_offset, _probe, _probe_rows


def flex(**options) -> FlexPrefill:
    return FlexPrefill(**{"block": 4, "min_budget": 4, "approximates": False, **options})


def make_call(length=64, heads=4, kv_heads=2, dim=8, batch=1, seed=0, scale=2.0, **fields) -> AttentionCall:
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, heads, length, dim, generator=generator) * scale
    key, value = (torch.randn(batch, kv_heads, length, dim, generator=generator) for _ in range(2))
    return AttentionCall.from_tensors(query, key, value, causal=True, **fields)


def planted(kind: str, length: int = 1024, dim: int = 32, seed: int = 0) -> AttentionCall:
    """A head that is local by RoPE, reads a few columns, or reads its own topic's blocks; or none of it."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(2, length, dim, generator=generator)
    query, key = noise[0], noise[1]
    if kind == "local":
        base = torch.randn(dim, generator=generator)
        positions = torch.arange(length)
        query, key = (rotate((base + 0.1 * x)[None, None] * 3, positions, rope_frequencies(dim))[0, 0] for x in noise)
    elif kind == "vertical":
        direction = torch.nn.functional.normalize(torch.randn(dim, generator=generator), dim=0)
        query = query + 8 * direction
        key = key.clone()
        key[torch.randperm(length, generator=generator)[:6]] += 8 * direction
    elif kind == "topic":
        centres = torch.randn(8, dim, generator=generator) * 3
        topic = torch.arange(length) // 32 % 8
        query, key = centres[topic] + 0.3 * query, centres[topic] + 0.3 * key
    tensors = (query[None, None], key[None, None], noise[1][None, None])
    return AttentionCall.from_tensors(*tensors, causal=True)


def kept_mass(call: AttentionCall, blocks) -> torch.Tensor:
    return (call.weights() * blocks.to_bool()).sum(-1)


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
    for options in ({}, {"selection": "row"}, {"stop": "union"}):
        method = flex(block=block, tau=tau, min_budget=2 * block, **options)
        found = method.blocks_of(call)
        mask = found.mask
        assert mask.is_causal()
        assert bool(mask.blocks[..., 0].all())
        assert bool(mask.blocks.diagonal(dim1=2, dim2=3).all())
        count = mask.blocks.shape[2]
        want = torch.arange(1, count + 1).clamp(max=min(2, count))
        assert bool((mask.blocks.sum(-1) >= want).all())


@given(seed=st.integers(0, 200), tau=st.sampled_from([0.0, 1.0]), stop=st.sampled_from(["separate", "union"]))
@settings(max_examples=25, deadline=None)
def test_more_gamma_never_reads_less(seed, tau, stop):
    call = make_call(seed=seed)
    sizes = [
        flex(gamma=g, tau=tau, stop=stop, selection="row").blocks_of(call).mask.blocks.sum(-1).sum(-1)
        for g in (0.3, 0.6, 0.9, 0.99)
    ]
    assert all(bool((more >= less).all()) for less, more in itertools.pairwise(sizes))


def test_probe_marginals_sum_to_one_and_the_chosen_columns_cover_gamma():
    call = make_call(70, scale=3.0)
    rows = _probe_rows(call, 4, None)
    weights = _probe(call, rows, None)
    torch.testing.assert_close(weights, call.weights(rows[0]))
    vertical, slash = weights.mean(2), _by_offset(weights, rows)
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


@pytest.mark.parametrize(("kind", "low", "high"), [("topic", 0.0, 0.2), ("vertical", 0.3, 0.84), ("local", 0.25, 0.84)])
def test_planted_heads_get_their_pattern(kind, low, high):
    found = flex(block=32, gamma=0.9).blocks_of(planted(kind))
    assert low <= float(found.divergence) <= high
    assert bool(found.query_aware) == (float(found.divergence) < 0.1)


def test_a_local_head_is_cheap_and_keeps_its_mass_and_an_isotropic_one_is_not():
    local = flex(block=32, gamma=0.9).blocks_of(planted("local"))
    assert local.density < 0.3
    assert float(kept_mass(planted("local"), local.mask).mean()) > 0.95
    even = flex(block=32, gamma=0.9).blocks_of(planted("none"))
    assert even.density > 2.5 * local.density


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
    most = flex(block=32, gamma=0.999, tau=0.0, min_budget=None, max_budget=128).blocks_of(call).mask.blocks
    assert int(most.sum(-1).max()) <= 2 * 4
    least = flex(block=32, gamma=0.01, tau=0.0, min_budget=128).blocks_of(call).mask.blocks
    assert bool((least.sum(-1)[0, 0] >= torch.arange(1, 33).clamp(max=4)).all())


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


def test_a_prompt_in_pieces_is_refused_or_dense():
    model = decoder("Llama")
    ids = contract.tokens(1, 40)
    with headway.use(model, flex()), pytest.raises(ArgumentError, match=r"got 20 queries on 40 keys.*whole\s+prompt"):
        contract.run_in_chunks(model, ids, [20, 20])
    with headway.use(model, flex(chunks="dense")):
        contract.run_in_chunks(model, ids, [20, 20])


def test_sliding_layers_are_left_alone():
    model = CAUSAL["mistral sliding"]()
    with headway.use(model, flex()) as handle, torch.no_grad():
        model(input_ids=contract.tokens(1, 40))
    assert {p for row in handle.report() for p in row["paths"]} == {"native"}


def test_zero_probabilities_and_huge_logits_give_no_nan():
    call = make_call(64, scale=200.0)
    found = flex(tau=0.1).blocks_of(call)
    assert bool(torch.isfinite(found.divergence).all())
    half = call.replace(query=call.query.half(), key=call.key.half(), value=call.value.half())
    assert bool(torch.isfinite(flex().blocks_of(half).divergence).all())


def test_bad_numbers_are_refused():
    bad = [
        ({"gamma": 0}, "gamma"), ({"gamma": 1.1}, "gamma"), ({"tau": -1}, "tau"), ({"block": 48}, "power of two"),
        ({"min_budget": 0}, "min_budget"), ({"min_budget": 64, "max_budget": 32}, "64 and 32"),
        ({"selection": "best"}, "selection"), ({"stop": "never"}, "stop"), ({"chunks": "guess"}, "chunks"), ({"count": "bytes"}, "count"),
    ]  # fmt: skip
    for options, match in bad:
        with pytest.raises(ArgumentError, match=match):
            FlexPrefill(**options)


def test_pooling():
    x = torch.tensor([0.5, 0.2, 0.3])
    assert int(cover(x, 0.79)) == 2
    assert int(cover(x, 0.81)) == 3
    assert int(cover(x, 2.0)) == 3
    assert ranks(torch.tensor([1.0, 3.0, 1.0])).tolist() == [1, 0, 2]
    assert block_sums(torch.arange(5.0), 2).tolist() == [1.0, 5.0, 4.0]
    real = torch.tensor([[False, True, True]])
    means = block_means(torch.tensor([[[[9.0], [2.0], [4.0]]]]), 2, real)
    assert means.flatten().tolist() == [2.0, 4.0]
    assert float(root_jensen_shannon(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]))) == pytest.approx(
        math.sqrt(math.log(2))
    )
    assert float(root_jensen_shannon(x, x)) == 0
    alike = torch.ones(1, 1, 4, 3)
    assert block_similarity(alike, 4).item() == pytest.approx(1.0)
    opposite = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])[None, None]
    assert block_similarity(opposite, 2).item() == pytest.approx(0.0)
    with pytest.raises(ArgumentError, match="block"):
        block_sums(x, 0)
