"""Every method with a budget, on every kind of host: dense at share 1, causal, batched, apart, and gone afterwards.

Methods are discovered; a new one is tested by existing.
"""

from __future__ import annotations

import itertools

import pytest
import torch

import headway
from headway.card import catalogue
from headway.door.stages import CachePolicy, Driver, Selector
from headway.errors import ArgumentError, ConflictError, HeadwayError, InterceptionError
from headway.methods.budget import budgeted, stages_at_budget
from tests.contracts import methods as contract
from tests.contracts.methods import PADS, SLUGS, TOKENS, host, read, stages, tokens

METHOD = pytest.mark.parametrize("slug", SLUGS)
HOST = pytest.mark.parametrize("name", contract.HOSTS)
KINDS = pytest.mark.parametrize("name", ["llama", "multi-query", "gemma3"])
GENERATE = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}


class Heard:
    """A streamer that keeps what it is given."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.ended = False

    def put(self, value) -> None:
        self.ids += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


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
        with contract.unless_refused(name), headway.use(model, *stages(slug, name, 1.0)):
            got = read(model, ids, chunks)
        contract.close(got, native, f"chunks {chunks}")


@METHOD
@HOST
def test_no_row_depends_on_a_later_token(slug, name):
    model, ids = host(name), tokens()
    changed = ids.clone()
    changed[0, -5:] = (changed[0, -5:] + 7) % 100 + 8
    with contract.unless_refused(name):
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
@KINDS
def test_a_later_chunk_changes_nothing_before_it(slug, name):
    """Or a prompt in chunks is refused."""
    model, ids = host(name), tokens()
    changed = ids.clone()
    changed[0, 200:] = (changed[0, 200:] + 7) % 100 + 8
    chunks = [200, TOKENS - 202, 1, 1]
    with headway.use(model, *stages(slug, name, 0.3)):
        first, second = (contract.outcome(lambda x=x: read(model, x, chunks)) for x in (ids, changed))
    if isinstance(first, HeadwayError):
        assert "one forward" in str(first)
        return
    contract.close(first[:, :200], second[:, :200], "before the change", share=1e-5)


@METHOD
@KINDS
@pytest.mark.parametrize("share", [1.0, 0.3])
def test_a_padded_batch_equals_its_rows_alone(slug, name, share):
    model = host(name)
    ids, mask = tokens(2), torch.ones(2, TOKENS, dtype=torch.long)
    ids[1, :PADS], mask[1, :PADS] = 0, 0
    chunks = contract.decodes()
    with headway.use(model, *stages(slug, name, share)):
        both = read(model, ids, chunks, mask)
        whole = read(model, ids[:1], chunks)
        short = read(model, ids[1:, PADS:], [chunks[0] - PADS, *chunks[1:]])
    contract.close(both[:1], whole, "the row without pads")
    contract.close(both[1:, PADS:], short, f"the row behind {PADS} pads")


@METHOD
@KINDS
def test_requests_do_not_see_each_other(slug, name):
    model = host(name)
    one, two = tokens(seed=1), tokens(seed=2)
    chunks = contract.decodes()
    alone = []
    for ids in (one, two):
        with headway.use(model, *stages(slug, name, 0.3)):
            alone.append(read(model, ids, chunks))
    with headway.use(model, *stages(slug, name, 0.3)):
        after = [read(model, ids, chunks) for ids in (one, two)]
        caches, mixed, start = [None, None], [[], []], 0
        for chunk in chunks:
            for turn, ids in enumerate((one, two)):
                with torch.no_grad():
                    out = model(input_ids=ids[:, start : start + chunk], past_key_values=caches[turn], use_cache=True)
                caches[turn] = out.past_key_values
                mixed[turn].append(out.logits)
            start += chunk
    for turn in (0, 1):
        contract.close(after[turn], alone[turn], "one after the other", share=1e-5)
        contract.close(torch.cat(mixed[turn], 1), alone[turn], "taking turns", share=1e-5)


@METHOD
@KINDS
def test_leaving_restores_the_model(slug, name):
    model, ids = host(name), tokens()
    before = contract.snapshot(model)
    with torch.no_grad():
        native = model(input_ids=ids).logits
    with headway.use(model, *stages(slug, name, 0.3)):
        read(model, ids, contract.decodes())
    contract.same(before, contract.snapshot(model))
    with pytest.raises(RuntimeError, match="on purpose"):
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
@KINDS
def test_generate_with_a_streamer_and_beams(slug, name):
    """Each works, or is refused in clear words; at share 1 greedy generation is the host's own."""
    model, ids = host(name), tokens(length=80)
    native = model.generate(ids, **GENERATE)
    heard = Heard()
    with headway.use(model, *stages(slug, name, 1.0, 80)):
        got = model.generate(ids, streamer=heard, **GENERATE)
    assert got.tolist() == native.tolist()
    assert heard.ended
    assert heard.ids[-4:] == got[0, -4:].tolist()
    with headway.use(model, *stages(slug, name, 0.5, 80)):
        greedy = model.generate(ids, **GENERATE)
        beams = contract.outcome(lambda: model.generate(ids, num_beams=2, **GENERATE))
    assert torch.equal(greedy[:, :80], ids)
    assert greedy.shape == (1, 84)
    assert "beam" in str(beams) if isinstance(beams, HeadwayError) else torch.equal(beams[:, :80], ids)


@METHOD
def test_beams_at_share_one_are_the_hosts_own(slug):
    model, ids = host("llama"), tokens(2, length=80)
    options = GENERATE | {"num_beams": 3}
    native = model.generate(ids, **options)
    with headway.use(model, *stages(slug, "llama", 1.0, 80)):
        got = contract.outcome(lambda: model.generate(ids, **options))
    assert "beam" in str(got) if isinstance(got, HeadwayError) else got.tolist() == native.tolist()


@METHOD
@pytest.mark.parametrize("how", ["wrapped", "in place", "forward"])
def test_a_compiled_model_is_refused(slug, how):
    model = contract.fresh("llama")
    acting = stages_at_budget(slug, 0.5, tokens=TOKENS, model=model)
    compiled = contract.compiled(model, how)
    with pytest.raises(InterceptionError, match="compiled"):
        headway.use(compiled, *acting).attach()


@METHOD
@pytest.mark.parametrize("share", [0.0, -0.5, 1.5, float("nan")])
def test_a_share_out_of_range_is_refused(slug, share):
    """By the method itself, not only by who calls it."""
    with pytest.raises(ArgumentError, match="share"):
        budgeted()[slug].at_budget(share, tokens=TOKENS, model=host("llama"))


def test_an_unknown_method_names_the_nearest():
    with pytest.raises(ArgumentError, match="Did you mean 'flexprefill'"):
        stages_at_budget("flexprefil", 0.5, tokens=10, model=host("llama"))


@pytest.mark.parametrize(("first", "second"), list(itertools.combinations(SLUGS, 2)))
def test_two_methods_work_together_or_name_each_other(first, second):
    model, ids = host("llama"), tokens()
    one, two = (stages(slug, "llama", 0.5) for slug in (first, second))
    before = contract.snapshot(model)

    def together():
        with headway.use(model, *one, *two):
            logits = read(model, ids, contract.decodes())
            model.generate(ids[:, :80], **GENERATE)
        return logits

    logits = contract.outcome(together)
    if isinstance(logits, HeadwayError):
        assert isinstance(logits, ConflictError), logits
        for found in (one, two):
            assert any(stage.title in str(logits) for stage in found), logits
    else:
        assert bool(torch.isfinite(logits).all())
    contract.same(before, contract.snapshot(model))


@METHOD
def test_two_of_one_method_at_one_site_conflict(slug):
    model = host("llama")
    one, two = (stages(slug, "llama", share) for share in (0.3, 0.6))
    kinds = (Selector, CachePolicy, Driver)
    if not any(contract.acts_on(one, kind) for kind in kinds):
        pytest.skip(f"{slug} only edits; editors stack")
    with pytest.raises(ConflictError, match=r"expected one"):
        headway.use(model, *one, *two).attach()
