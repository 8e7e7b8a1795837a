"""Every kind of selection through the door: the sparse kernels against one boolean mask, on several hosts."""

from __future__ import annotations

import pytest
import torch

import headway
from headway.door import AttentionCall, BlockMask, Blocks, Dense, Keys, Selector, Window
from headway.door.execute import execute, selection_density
from headway.errors import ArgumentError, EmptyRowError
from headway.kernels import block_sparse
from tests.contracts.cache_policy import padded_left, tokens
from tests.door.hosts import CAUSAL


class Pick(Selector):
    """Selects whatever a function of the call says."""

    def __init__(self, choose, *, approximates=False):
        self.choose, self.approximates = choose, approximates

    def select(self, call):
        return self.choose(call)


def blocks_of(call: AttentionCall, seed: int = 0, heads: int | None = None) -> Blocks:
    heads = call.heads if heads is None else heads
    shape = (1, heads, -(-call.queries // 4), -(-call.keys // 4))
    chosen = torch.rand(shape, generator=torch.Generator().manual_seed(seed + call.site.layer)) > 0.5
    return Blocks(BlockMask(chosen, call.queries, call.keys, 4, 4).with_diagonal().with_sinks(1))


def keys_of(call: AttentionCall, seed: int = 0, heads: int | None = None) -> Keys:
    """Four random keys and the own block, for each block of four rows."""
    heads = call.heads if heads is None else heads
    lists = -(-call.queries // 4)
    generator = torch.Generator().manual_seed(seed)
    far = torch.randint(0, call.keys, (1, heads, lists, 4), generator=generator)
    own = (torch.arange(lists)[:, None] * 4 + torch.arange(4) + call.offset).clamp(max=call.keys - 1)
    return Keys(torch.cat([far, own.expand(1, heads, -1, -1)], -1), None, query_block=4)


KINDS = {
    "window": lambda call: Window(2, 5),
    "blocks": blocks_of,
    "blocks for all heads": lambda call: blocks_of(call, heads=1),
    "blocks per key head": lambda call: blocks_of(call, heads=call.key.shape[1]),
    "keys": keys_of,
    "keys per key head": lambda call: keys_of(call, heads=call.key.shape[1]),
    "keys, one list": lambda call: Keys(torch.arange(call.keys).view(1, 1, 1, -1)),
}


@pytest.mark.parametrize("host", ["llama", "mistral sliding", "gemma2 soft cap", "gpt-oss learned sinks", "gpt2"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pads", [None, [0, 5]])
@torch.no_grad()
def test_sparse_kernels_equal_the_mask(host, kind, pads):
    model = CAUSAL[host]()
    ids, mask = tokens(2, 19), None
    if pads:
        ids, mask = padded_left(ids, pads)
    inputs = {"input_ids": ids} if mask is None else {"input_ids": ids, "attention_mask": mask}
    with headway.use(model, Pick(KINDS[kind])) as fast:
        got = model(**inputs).logits
    with headway.use(model, Pick(KINDS[kind])) as slow, headway.capture(model, what=("entropy",)):
        want = model(**inputs).logits
    rows = torch.ones_like(ids).bool() if mask is None else mask.bool()
    torch.testing.assert_close(got[rows], want[rows], atol=2e-4, rtol=0)
    assert {path for row in slow.report() for path in row["paths"]} == {"masked"}
    assert {path for row in fast.report() for path in row["paths"]} == {kind.split(",")[0].split(" ")[0]}


def _call(queries=12, keys=12, heads=2) -> AttentionCall:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, heads, queries, 8, generator=generator)
    key, value = (torch.randn(1, heads, keys, 8, generator=generator) for _ in range(2))
    return AttentionCall.from_tensors(query, key, value, causal=True)


@pytest.mark.parametrize("kind", ["window", "blocks", "keys"])
def test_density_counts_selected_over_visible_pairs(kind):
    call = _call()
    selection = KINDS[kind](call)
    seen = call.visible()
    chosen = selection.to_bool(12, 12)
    want = float((seen & chosen).double().sum() / seen.expand_as(chosen & seen).double().sum())
    assert selection_density(selection, call) == pytest.approx(want, abs=0.06 if kind == "keys" else 1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("path", ["sparse", "masked"])
@torch.no_grad()
def test_the_report_has_the_density_of_every_query_head(kind, path):
    """Keys listed per block of rows are counted by the middle row of the block, hence their tolerance."""
    model = CAUSAL["llama"]()
    chosen = {}

    def choose(call):
        picked = KINDS[kind](call)
        seen, mask = call.visible(), picked.to_bool(call.queries, call.keys)
        mask = mask.repeat_interleave(call.heads // mask.shape[1], 1) if mask.shape[1] > 1 else mask
        read = (mask & seen).expand(1, call.heads, -1, -1).double()
        chosen[call.site.name] = (read.sum((0, 2, 3)) / seen.double().sum()).tolist()
        return picked

    with headway.use(model, Pick(choose), selftest=False) as handle:
        if path == "masked":
            with headway.capture(model, what=("entropy",)):
                model(tokens(1, 19))
        else:
            model(tokens(1, 19))
    for row in handle.report():
        assert row["density_by_head"] == pytest.approx(chosen[row["site"]], abs=0.08 if "keys" in kind else 1e-9)
        assert sum(row["density_by_head"]) / len(row["density_by_head"]) == pytest.approx(row["density"])
    if kind in ("blocks", "keys"):
        assert all(len(set(row["density_by_head"])) > 1 for row in handle.report())


def test_a_selection_that_empties_a_row_is_refused():
    call = _call()
    future = Keys(torch.tensor([11]).view(1, 1, 1, 1))
    with pytest.raises(EmptyRowError, match="query 0 has no visible key left"):
        execute(call, [Pick(lambda c: future)], [])
    nothing = Blocks(BlockMask(torch.zeros(1, 1, 3, 3, dtype=torch.bool), 12, 12, 4, 4))
    with pytest.raises(EmptyRowError, match="query 0"):
        execute(call, [Pick(lambda c: nothing)], [])


def test_bad_lists_are_named():
    call = _call()
    with pytest.raises(ArgumentError, match=r"values from 12 to 12, expected 0..11"):
        execute(call, [Pick(lambda c: Keys(torch.tensor([12]).view(1, 1, 1, 1)))], [])
    with pytest.raises(ArgumentError, match="got 2 lists for 12 rows in blocks of 4"):
        execute(call, [Pick(lambda c: Keys(torch.zeros(1, 1, 2, 1, dtype=torch.long), query_block=4))], [])
    other = Blocks(BlockMask.full(8, 8, 4, 4))
    with pytest.raises(ArgumentError, match="block mask: got one for 8 queries"):
        execute(call, [Pick(lambda c: other)], [])


def test_an_approximating_selector_gives_way_to_dense_where_dense_is_as_fast(monkeypatch):
    model = CAUSAL["llama"]()
    ids = tokens(1, 16)
    with torch.no_grad():
        native = model(input_ids=ids).logits
        with headway.use(model, Pick(KINDS["window"], approximates=True)) as handle:
            assert torch.equal(model(input_ids=ids).logits, native)
        assert {p for row in handle.report() for p in row["paths"]} == {"native: dense is as fast"}
        monkeypatch.setattr(block_sparse, "CROSSOVER_KEYS", 8)
        with headway.use(model, Pick(KINDS["window"], approximates=True)) as handle:
            assert not torch.equal(model(input_ids=ids).logits, native)
        assert {p for row in handle.report() for p in row["paths"]} == {"window"}
    assert block_sparse.dense_is_faster(4096, 0.9)
    assert not block_sparse.dense_is_faster(4096, 0.3)


def test_dense_from_one_of_two_selectors_leaves_the_other():
    call = _call()
    done = execute(call, [Pick(lambda c: Dense()), Pick(KINDS["window"])], [])
    assert not isinstance(done, str)
    assert done.path == "window"
