"""Every method with a budget, on every kind of host: dense at share 1, causal, batched, apart, and gone afterwards.

Methods are discovered; a new one is tested by existing.
"""

from __future__ import annotations

import pytest
import torch

import headway
from headway.card import catalogue
from headway.door.stages import CachePolicy, Driver, Selector
from headway.errors import ArgumentError, ConflictError, HeadwayError
from headway.methods.budget import budgeted, stages_at_budget
from tests.contracts import methods as contract
from tests.contracts.methods import SLUGS, TOKENS, host, read, stages, tokens
from tests.contracts.refusals import as_listed, reason

METHOD = pytest.mark.parametrize("slug", SLUGS)
HOST = pytest.mark.parametrize("name", contract.HOSTS)
FAMILY = pytest.mark.parametrize("name", contract.FAMILIES)
GENERATE = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}


def test_methods_are_found_through_their_cards():
    assert SLUGS
    assert set(SLUGS) <= set(catalogue())


@METHOD
@HOST
def test_share_one_is_dense(slug, name):
    model, ids = host(name), tokens(2)
    with torch.no_grad():
        native = model(input_ids=ids).logits
    for chunks in ([TOKENS], contract.decodes(), [100, TOKENS - 102, 1, 1]):
        with as_listed(slug, "share 1", name):
            with headway.use(model, *stages(slug, name, 1.0)):
                got = read(model, ids, chunks)
            contract.close(got, native, f"chunks {chunks}")


@METHOD
@HOST
def test_no_row_depends_on_a_later_token(slug, name):
    model, ids = host(name), tokens()
    changed = ids.clone()
    changed[0, -5:] = (changed[0, -5:] + 7) % 100 + 8
    with as_listed(slug, "share 0.3", name):
        acting = stages(slug, name, 0.3)
        if any(getattr(stage, "looks_ahead", "") for stage in acting):
            observer = contract.Reads()
            with headway.use(model, *acting), headway.observe(model, observer):
                read(model, ids, contract.decodes())
            assert observer.result() == 0
            return
        with headway.use(model, *acting):
            first, second = (read(model, x, [TOKENS - 2, 1, 1]) for x in (ids, changed))
        contract.close(first[:, :-5], second[:, :-5], "before the change", share=1e-5)
        assert not torch.allclose(first[:, -5:], second[:, -5:])


@METHOD
@FAMILY
def test_a_later_chunk_changes_nothing_before_it(slug, name):
    model, ids = host(name), tokens()
    changed = ids.clone()
    changed[0, 200:] = (changed[0, 200:] + 7) % 100 + 8
    chunks = [200, TOKENS - 202, 1, 1]
    with as_listed(slug, "chunks", name):
        with headway.use(model, *stages(slug, name, 0.3)):
            first, second = (read(model, x, chunks) for x in (ids, changed))
        contract.close(first[:, :200], second[:, :200], "before the change", share=1e-5)
        assert not torch.allclose(first[:, 200:], second[:, 200:])


@METHOD
@FAMILY
@pytest.mark.parametrize("pads", contract.PADS, ids=str)
def test_a_padded_batch_equals_its_rows_alone(slug, name, pads):
    """At share 1 whatever the pads; below it also where they end within a block, but for methods that say otherwise.

    In float64: sums over a batch and over a row alone round apart, and a ranking of keys may turn on that."""
    model = contract.exact(name)
    ids, mask = contract.padded(tokens(2), pads)
    chunks = contract.decodes()
    for share in (1.0, 0.3):
        if share < 1 and slug in contract.BLOCKS_BY_COLUMN and any(pad % contract.BLOCK for pad in pads):
            continue
        with as_listed(slug, f"share {share:g}", name), headway.use(model, *stages(slug, name, share)):
            both = read(model, ids, chunks, mask)
            for row, pad in enumerate(pads):
                alone = read(model, ids[row : row + 1, pad:], [chunks[0] - pad, *chunks[1:]])
                contract.close(both[row : row + 1, pad:], alone, f"share {share}, the row behind {pad} pads")


@METHOD
@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("pads", [3, contract.BLOCK, 130])
def test_a_batch_padded_behind_its_prompts_reads_them_as_they_are_alone(slug, name, pads):
    """As texts are scored in batches: nothing stands in front, so blocks are where they are without padding."""
    model, ids = contract.exact(name), tokens(2)
    mask = torch.ones_like(ids)
    mask[1, TOKENS - pads :] = 0
    with as_listed(slug, "share 0.3", name), headway.use(model, *stages(slug, name, 0.3)), torch.no_grad():
        both = model(input_ids=ids * mask, attention_mask=mask, use_cache=True).logits
        whole = model(input_ids=ids[:1], use_cache=True).logits
        short = model(input_ids=ids[1:, : TOKENS - pads], use_cache=True).logits
    contract.close(both[:1], whole, "the row without pads")
    contract.close(both[1:, : TOKENS - pads], short, f"the row before {pads} pads")


@pytest.mark.parametrize("slug", contract.BLOCKS_BY_COLUMN)
@FAMILY
@pytest.mark.parametrize("pads", [(3, 37), (37, 100)], ids=str)
def test_blocks_by_column_depend_on_no_pad_and_no_other_row(slug, name, pads):
    """These methods count blocks from the first column: pads shift them, and neither what stands there nor the other
    row of the batch may matter."""
    model = host(name)
    ids, mask = contract.padded(tokens(2), pads)
    other = torch.where(mask.bool(), ids, 77)
    other[1] = torch.where(mask[1].bool(), ids[1].flip(0), 77)
    chunks = contract.decodes()
    with as_listed(slug, "share 0.3", name), headway.use(model, *stages(slug, name, 0.3)):
        both = read(model, ids, chunks, mask)
        contract.close(both[:1, pads[0] :], read(model, other, chunks, mask)[:1, pads[0] :], "another mate", share=1e-5)
        contract.close(both[1:, pads[1] :], read(model, ids[1:], chunks, mask[1:])[:, pads[1] :], "no mate", share=1e-5)


@METHOD
@FAMILY
def test_requests_do_not_see_each_other(slug, name):
    model = host(name)
    one, two = tokens(seed=1), tokens(seed=2)
    chunks = contract.decodes()
    with as_listed(slug, "share 0.3", name):
        alone = []
        for ids in (one, two):
            with headway.use(model, *stages(slug, name, 0.3)):
                alone.append(read(model, ids, chunks))
        with headway.use(model, *stages(slug, name, 0.3)):
            after = [read(model, ids, chunks) for ids in (one, two)]
            mixed = contract.in_turns(model, (one, two), chunks)
        for turn in (0, 1):
            contract.close(after[turn], alone[turn], "one after the other", share=1e-5)
            contract.close(mixed[turn], alone[turn], "taking turns", share=1e-5)


@METHOD
@FAMILY
def test_leaving_restores_the_model(slug, name):
    model, ids = host(name), tokens()
    before = contract.snapshot(model)
    with torch.no_grad():
        native = model(input_ids=ids).logits
    with as_listed(slug, "share 0.3", name), headway.use(model, *stages(slug, name, 0.3)):
        read(model, ids, contract.decodes())
    contract.same(before, contract.snapshot(model))
    with pytest.raises((RuntimeError, HeadwayError), match=reason(slug, "share 0.3", name) or "on purpose"):
        _leave_by_an_error(model, stages(slug, name, 0.3), ids)
    contract.same(before, contract.snapshot(model))
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, native)


def _leave_by_an_error(model, acting, ids):
    with headway.use(model, *acting):
        read(model, ids, contract.decodes())
        raise RuntimeError("on purpose")


@METHOD
def test_stages_hold_no_state(slug):
    """Stages are frozen, and a run leaves nothing in them."""
    model, ids = host("llama"), tokens()
    acting = stages(slug, "llama", 0.3)
    before = [contract.fields_of(stage) for stage in acting]
    for stage in acting:
        assert stage.__dataclass_params__.frozen, stage.title
    with headway.use(model, *acting):
        read(model, ids, contract.decodes())
    assert [contract.fields_of(stage) for stage in acting] == before


@METHOD
def test_a_smaller_share_reads_or_stores_less(slug):
    """Where a method selects or stores; a driver and an editor save elsewhere."""
    model = host("llama")
    found = {}
    for share in (0.2, 1.0):
        acting = stages(slug, "llama", share)
        if not (contract.acts_on(acting, CachePolicy) or contract.acts_on(acting, Selector)):
            pytest.skip(f"{slug} neither selects nor stores")
        found[share] = contract.saving(model, acting, tokens())
    least = {what: found[0.2][what] for what in found[0.2]}
    assert min(least.values()) <= 0.75, found
    assert any(found[0.2][what] < found[1.0][what] for what in least), found


@METHOD
def test_nothing_is_stored_twice_at_share_one(slug):
    model = host("llama")
    acting = stages(slug, "llama", 1.0)
    if not contract.acts_on(acting, CachePolicy):
        pytest.skip(f"{slug} has no cache of its own")
    assert contract.saving(model, acting, tokens())["stored"] <= 1.05


@METHOD
@pytest.mark.parametrize("share", [0.0, -0.5, 1.5, float("nan")])
def test_a_share_out_of_range_is_refused(slug, share):
    """By the method itself, not only by who calls it."""
    with pytest.raises(ArgumentError, match="share"):
        budgeted()[slug].at_budget(share, tokens=TOKENS, model=host("llama"))


def test_an_unknown_method_names_the_nearest():
    with pytest.raises(ArgumentError, match="Did you mean 'flexprefill'"):
        stages_at_budget("flexprefil", 0.5, tokens=10, model=host("llama"))


@METHOD
def test_two_of_one_method_at_one_site_conflict(slug):
    model = host("llama")
    one, two = (stages(slug, "llama", share) for share in (0.3, 0.6))
    kinds = (Selector, CachePolicy, Driver)
    if not any(contract.acts_on(one, kind) for kind in kinds):
        pytest.skip(f"{slug} only edits; editors stack")
    with pytest.raises(ConflictError, match=r"expected one"):
        headway.use(model, *one, *two).attach()
