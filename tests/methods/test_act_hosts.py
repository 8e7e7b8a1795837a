"""ACT in every kind of host: the causal scope in any split, padding, reports, released settings, refusals."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.contracts import cache_policy as contract
from tests.door.hosts import CAUSAL, decoder

import headway
from headway.errors import ArgumentError, InterceptionError
from headway.methods.sinks.act import (
    ACT,
    BETA,
    HeadSet,
    candidate_heads,
    find_sinks,
    redistribute,
    search_heads,
    split_items,
)
from headway.methods.sinks.act.heads import SETTINGS

EVERY = [(layer, head) for layer in range(3) for head in range(4)]
LOW = {"tau": 0.05, "least_rows": 3}
HOSTS = [name for name in CAUSAL if name != "llama eager"]


def causal(**options) -> ACT:
    return ACT(heads=EVERY, **{"scope": "causal"} | LOW | options)


def test_released_settings_and_ours():
    act = ACT(heads=())
    assert (act.beta, act.threshold, act.tau, act.alpha) == (0.4, "absolute", 0.1, 5.0)
    assert (act.scope, act.initial, act.least_rows) == ("prompt", "first_token", 8)
    assert BETA == 0.4
    assert sorted(candidate_heads(decoder("Llama", num_hidden_layers=6)))[0] == (2, 0)
    assert split_items(10) == split_items(10, share=0.5, seed=42)


@pytest.mark.parametrize("name", HOSTS)
def test_causal_scope_in_prefill_equals_decoding_on_every_kind_of_host(name):
    """Also where a sliding cache has dropped the first keys, whose sums run on."""
    model, ids = CAUSAL[name](), contract.tokens(2, 24)
    with headway.use(model, causal()):
        whole = contract.run_in_chunks(model, ids, [24])
        for chunks in ([1] * 24, [10, 5, 1, 1, 7]):
            torch.testing.assert_close(contract.run_in_chunks(model, ids, chunks), whole, atol=2e-4, rtol=0)
    with torch.no_grad():
        assert not torch.allclose(whole, model(input_ids=ids).logits, atol=1e-3)


@pytest.mark.parametrize("name", HOSTS)
@pytest.mark.parametrize("scope", ["prompt", "causal"])
def test_padding_does_not_matter_in_prefill_and_decoding(name, scope):
    contract.check_padding(CAUSAL[name](), lambda: causal(scope=scope), atol=5e-4)


@settings(max_examples=10, deadline=None)
@given(cuts=st.sets(st.integers(1, 19), max_size=5), initial=st.sampled_from(["first_token", "first_flagged", "none"]))
def test_any_split_of_a_text_is_the_same_in_the_causal_scope(cuts, initial):
    model, ids = _MODEL.setdefault("llama", CAUSAL["llama"]()), contract.tokens(2, 20)
    edges = [0, *sorted(cuts), 20]
    with headway.use(model, causal(initial=initial, protect=(2,))):
        whole = contract.run_in_chunks(model, ids, [20])
        got = contract.run_in_chunks(model, ids, [b - a for a, b in itertools.pairwise(edges)])
    torch.testing.assert_close(got, whole, atol=1e-4, rtol=0)


_MODEL: dict = {}


def test_rows_that_sum_to_less_than_one_keep_their_sum():
    """Beside a learned sink logit, which takes the rest."""
    weights = torch.rand(1, 2, 6, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights = 0.7 * weights / weights.sum(-1, keepdim=True)
    sinks = torch.zeros(1, 2, 1, 9, dtype=torch.bool)
    sinks[..., [2, 5]] = True
    changed = redistribute(weights, sinks, beta=0.25)
    torch.testing.assert_close(changed.sum(-1), weights.sum(-1), atol=1e-12, rtol=0)
    torch.testing.assert_close(changed[..., [2, 5]], 0.25 * weights[..., [2, 5]])
    torch.testing.assert_close(changed[..., 3] / changed[..., 7], weights[..., 3] / weights[..., 7])


def test_a_new_key_joins_the_sinks_once_enough_rows_have_seen_it():
    """Prompt scope: a generated key is scaled down from the step on at which its running mean says so, never before."""
    model, ids = CAUSAL["llama"](), contract.tokens(1, 44)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    class Watch(ACT):
        def edit_weights(self, call, weights, rows):
            changed = super().edit_weights(call, weights, rows)
            seen.append((weights[0, 0].clone(), changed[0, 0].clone()))
            return changed

    with headway.use(model, Watch(heads=[(0, 1)], tau=0.03, least_rows=4, beta=0.5)), torch.no_grad():
        contract.run_in_chunks(model, ids, [20] + [1] * 24)
    mass, count = torch.zeros(44), torch.zeros(44)
    mass[:20], count[:20] = seen[0][0].sum(0), torch.arange(20, 0, -1)
    fixed = find_sinks(mass[:20], count[:20], tau=0.03, least_rows=4, allowed=torch.arange(20) != 0)
    joined = 0
    for step, (before, after) in enumerate(seen[1:]):
        keys = 21 + step
        mass[:keys] += before[0]
        count[:keys] += 1
        want = find_sinks(mass[:keys], count[:keys], tau=0.03, least_rows=4, allowed=torch.arange(keys) != 0)
        want[:20] = fixed
        joined += int(want[20:].sum())
        torch.testing.assert_close(after, redistribute(before, want[None], beta=0.5), atol=1e-5, rtol=0)
    assert joined > 0
    assert bool(fixed.any())


def test_the_report_tells_which_sites_computed_explicit_weights():
    model, ids = CAUSAL["llama"](), contract.tokens(1, 20)
    with headway.use(model, ACT(heads=[(1, 2)], **LOW)) as handle, torch.no_grad():
        model(input_ids=ids)
    assert [(row["layer"], row["paths"]) for row in handle.report()] == [(1, {"edited": 1})]


def test_attention_that_never_asks_the_registry_is_refused():
    """Falcon computes its own: the door never sees its weights, and a scope that was forced would calibrate nothing."""
    import transformers as tf

    falcon = tf.FalconForCausalLM(
        tf.FalconConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=90)
    ).eval()
    with pytest.raises(InterceptionError, match="hard-coded attention"):
        headway.use(falcon, ACT(heads=[(0, 1)])).attach()
    ids = contract.tokens(1, 12)
    forced = headway.use(falcon, ACT(heads=[(0, 1)]), selftest=False)
    with torch.no_grad(), forced, pytest.raises(InterceptionError, match="no attention passed the door"):
        falcon(input_ids=ids)


def test_an_attention_function_put_in_inside_a_scope_is_refused():
    """A forward past the door would be the uncalibrated one, and look like a result."""
    model, ids = CAUSAL["llama"](), contract.tokens(1, 20)
    with headway.use(model, ACT(heads=EVERY, **LOW)), torch.no_grad():
        calibrated = model(input_ids=ids).logits
        model.config._attn_implementation_internal = "sdpa"
        with pytest.raises(InterceptionError, match="no attention passed the door"):
            model(input_ids=ids)
    with torch.no_grad():
        assert not torch.allclose(model(input_ids=ids).logits, calibrated, atol=1e-3)


def test_an_attention_function_of_ones_own_that_weighs_otherwise_is_refused():
    from transformers.modeling_utils import AttentionInterface

    def halved(module, query, key, value, attention_mask, **options):
        output, weights = AttentionInterface._global_mapping["sdpa"](
            module, query, key, value, attention_mask, **options
        )
        return output / 2, weights

    AttentionInterface.register("halved", halved)
    try:
        with pytest.raises(InterceptionError, match="does not reproduce"):
            headway.use(decoder("Llama", attn_implementation="halved"), ACT(heads=EVERY)).attach()
    finally:
        AttentionInterface._global_mapping.pop("halved")


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        ([(3, 0)], "layer: got 3, expected a number from 0 to 2"),
        ([(0, 4)], r"heads: got 4 at .*, expected query heads 0\.\.3"),
    ],
)
def test_a_layer_or_head_that_is_not_there_is_told_the_ends_of_the_range(heads, message):
    with pytest.raises(ArgumentError, match=message):
        headway.use(CAUSAL["llama"](), ACT(heads=heads)).attach()


def test_layers_with_a_gap_are_listed():
    with pytest.raises(ArgumentError, match="layer: got 1, expected one of 0, 2"):
        headway.use(CAUSAL["llama"](), ACT(heads=[(1, 0)]), layers=[0, 2]).attach()


@pytest.mark.parametrize("scope", ["prompt", "causal"])
def test_a_host_in_double_precision_is_what_it_is_in_single(scope):
    """With some heads of a layer named, the others run the fused kernel, whose log-sum-exp is single."""
    ids, act = contract.tokens(2, 24), ACT(heads=[(0, 1), (2, 0), (2, 3)], scope=scope, **LOW)
    found = []
    for model in (CAUSAL["llama"](), CAUSAL["llama"]().double()):
        with headway.use(model, act):
            found.append(contract.run_in_chunks(model, ids, [20, 1, 1, 1, 1]))
    assert found[1].dtype == torch.float64
    torch.testing.assert_close(found[0].double(), found[1], atol=1e-4, rtol=0)


@pytest.mark.parametrize("heads", [(5, 3), 5, [(1,)], [(1, 2, 3)], [None]], ids=repr)
def test_heads_that_are_no_pairs_are_named(heads):
    with pytest.raises(ArgumentError, match=r"heads: got .* among them, expected \(layer, head\) pairs"):
        ACT(heads=heads)


@pytest.mark.parametrize("name", ["protect", "candidates"])
def test_places_that_are_no_positions_are_named(name):
    """A position counted from the end would be a column of padding."""
    for places, message in (
        (3, "got 3, expected positions counted from a row's first token"),
        ("04", "got '04', expected positions"),
        ((4, -1), "got -1, expected a whole number of at least 0"),
        ((0.5,), "got 0.5, expected a whole number"),
    ):
        with pytest.raises(ArgumentError, match=f"{name}: {message}"):
            ACT(heads=[(0, 1)], **{name: places})
    assert getattr(ACT(heads=[(0, 1)], **{name: range(2)}), name) == (0, 1)


def test_assisted_decoding_is_refused_and_a_static_cache_works():
    model = CAUSAL["llama"]()
    contract.check_refuses_assisted_decoding(model, lambda: causal())
    contract.check_static_cache(model, lambda: causal())
    contract.check_static_cache(model, lambda: causal(scope="prompt"))


def test_a_set_keeps_every_setting_that_its_heads_were_searched_at(tmp_path):
    model = CAUSAL["llama"]()
    changed = {
        "beta": 0.2, "threshold": "relative", "tau": 0.15, "alpha": 3.0, "least_rows": 5, "scope": "causal",
        "initial": "none",
    }  # fmt: skip
    assert set(changed) == set(SETTINGS)
    back = HeadSet.load(HeadSet.of(model, ACT(heads=[(0, 1)], **changed)).save(tmp_path / "set.json"))
    stage = back.stage(model, beta=0.3)
    assert {name: getattr(stage, name) for name in SETTINGS} == changed | {"beta": 0.3}


def test_a_search_calibrates_one_head_at_a_time():
    tried = []

    def score(stage):
        tried.append(() if stage is None else stage.heads)
        return {"a": torch.zeros(3).numpy()}

    search_heads(score, [(2, 1), (0, 3)])
    assert tried == [(), ((2, 1),), ((0, 3),)]
