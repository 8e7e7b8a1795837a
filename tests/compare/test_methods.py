"""Which methods are compared: names, stages, pairs and budgets, and how wrong ones are refused."""

from __future__ import annotations

import pytest
import torch

from headway.compare import Method
from headway.compare.baselines import SINKS, PlainWindow, RandomBlocks
from headway.compare.methods import candidates, check_budgets, label, resolve
from headway.door import AttentionCall, Dense, Keys, Window
from headway.errors import ArgumentError
from tests.look.tiny import tiny_llama

HOST = tiny_llama(num_hidden_layers=2)


def call(queries: int, keys: int, layer: int = 0) -> AttentionCall:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 4, queries, 8, generator=generator)
    key = torch.randn(1, 2, keys, 8, generator=generator)
    return AttentionCall.from_tensors(query, key, key, layer=layer, causal=True)


def at_budget(share, *, tokens, model):
    if share < 0.2:
        raise ArgumentError(f"share: got {share}, expected at least 0.2.")
    return (PlainWindow(window=int(share * tokens)),)


def test_dense_comes_first_then_each_method_at_each_budget_in_the_order_given():
    found = candidates(["window", ("mine", at_budget)], [0.5, 0.25], tokens=100, model=HOST)
    assert [c.label for c in found] == ["dense", "window at 50 %", "window at 25 %", "mine at 50 %", "mine at 25 %"]
    assert found[0].stages == ()
    assert found[3].stages == (PlainWindow(window=50),)


def test_stages_pairs_and_methods_are_taken_as_they_are():
    stage = PlainWindow(window=7)
    names = [(m.name, m.stages) for m in resolve([stage, ("two", (stage, stage)), Method(name="own", stages=(stage,))])]
    assert names == [("PlainWindow", (stage,)), ("two", (stage, stage)), ("own", (stage,))]
    assert [c.budget for c in candidates([stage], [0.5, 0.25], tokens=100, model=HOST)] == [None, None]


def test_a_budget_that_a_method_refuses_is_a_candidate_with_the_reason():
    found = candidates([("mine", at_budget)], [0.1], tokens=100, model=HOST)[1]
    assert found.stages == ()
    assert "at least 0.2" in found.refusal


def test_every_method_of_the_catalogue_with_a_form_at_a_budget_is_found_by_its_slug():
    from headway.card import homes

    usable = [slug for slug, module in homes().items() if hasattr(module, "at_budget")]
    assert usable
    assert [method.name for method in resolve(usable)] == usable


@pytest.mark.parametrize(
    ("methods", "words"),
    [
        (["sinks-windw"], "sinks-window"),
        (["sink-survey"], "no form at a budget"),
        (["dense"], "every comparison holds"),
        ([], "at least one"),
        ("window", "list"),
        (["window", "window"], "more than once"),
        ([3], "expected a slug"),
        ([("name", "nothing")], "expected a slug"),
        ([("name", ())], "expected a slug"),
    ],
)
def test_wrong_methods_are_refused_in_words(methods, words):
    with pytest.raises(ArgumentError, match=words):
        resolve(methods)


@pytest.mark.parametrize("budgets", [[], [0], [1.01], [-0.5], [float("nan")], ["0.5"], [True], [0.5, 0.5]])
def test_budgets_outside_the_unit_interval_are_refused(budgets):
    with pytest.raises(ArgumentError, match="budgets"):
        check_budgets(budgets)


def test_labels_give_the_budget_in_per_cent():
    assert label("a", 0.125) == "a at 12.5 %"
    assert label("a", None) == "a"


@pytest.mark.parametrize("name", ["window", "sinks-window", "random-blocks"])
def test_a_baseline_with_the_whole_budget_is_dense(name):
    assert candidates([name], [1.0], tokens=400, model=HOST)[1].stages == ()


@pytest.mark.parametrize("name", ["window", "sinks-window", "random-blocks"])
@pytest.mark.parametrize("share", [0.5, 0.25])
def test_the_last_rows_of_a_baseline_read_its_share_of_the_keys(name, share):
    tokens = 800
    (stage,) = candidates([name], [share], tokens=tokens, model=HOST)[1].stages
    selection = stage.select(call(tokens, tokens))
    mask = selection.to_bool(tokens, tokens)
    seen = (mask & torch.ones(tokens, tokens, dtype=torch.bool).tril())[..., -200:, :].double().mean()
    assert abs(float(seen) - share) < 0.05


def test_sinks_and_a_window_count_the_sinks_into_the_budget():
    (stage,) = candidates(["sinks-window"], [0.25], tokens=400, model=HOST)[1].stages
    assert stage == PlainWindow(window=100 - SINKS, sinks=SINKS)
    assert stage.select(call(300, 300)) == Window(SINKS, 96)
    assert stage.select(call(100, 100)) == Dense()
    assert "more than the 4 sinks" in candidates(["sinks-window"], [0.01], tokens=200, model=HOST)[1].refusal


def test_random_blocks_keep_their_own_block_and_read_as_many_in_every_row():
    stage = RandomBlocks(keep=3, block=8)
    mask = stage.select(call(96, 96)).mask.blocks[0]
    assert mask.shape == (4, 12, 12)
    assert bool(mask.diagonal(dim1=1, dim2=2).all())
    assert mask.sum(-1)[:, 2:].unique().tolist() == [3]
    assert not bool(mask.triu(1).any())
    assert not torch.equal(mask[0], mask[1])
    assert not torch.equal(mask, stage.select(call(96, 96, layer=1)).mask.blocks[0])


@pytest.mark.parametrize("queries", [1, 3, 8, 20])
def test_random_blocks_of_a_row_do_not_depend_on_how_it_is_fed(queries):
    stage = RandomBlocks(keep=3, block=8)
    whole = stage.select(call(90, 90)).to_bool(90, 90) & torch.ones(90, 90, dtype=torch.bool).tril()
    part = stage.select(call(queries, 90))
    assert isinstance(part, Keys)
    seen = part.to_bool(queries, 90)
    assert torch.equal(seen, whole[:, :, -queries:])


@pytest.mark.parametrize("options", [{"keep": 0}, {"keep": 1, "block": 0}])
def test_random_blocks_of_no_size_are_refused(options):
    with pytest.raises(ArgumentError, match="keep, block"):
        RandomBlocks(**options)


def test_equal_stages_have_one_fingerprint_and_others_another():
    import dataclasses

    from headway.compare.methods import Candidate
    from headway.door import Selector
    from tests.contracts.test_cache_policy import KeepLast

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Gated(Selector):
        gates: torch.Tensor

    def fingerprint(stage):
        return Candidate(method="a", summary="", budget=None, stages=(stage,)).fingerprint()

    assert fingerprint(PlainWindow(window=5)) == fingerprint(PlainWindow(window=5))
    assert fingerprint(PlainWindow(window=5)) != fingerprint(PlainWindow(window=6))
    assert fingerprint(KeepLast(3)) == fingerprint(KeepLast(3))
    assert fingerprint(KeepLast(3)) != fingerprint(KeepLast(4))
    many = torch.zeros(5000)
    other = many.clone()
    other[2500] = 1
    assert fingerprint(Gated(gates=many)) == fingerprint(Gated(gates=many.clone()))
    assert fingerprint(Gated(gates=many)) != fingerprint(Gated(gates=other))


def test_a_stage_that_holds_what_has_no_words_is_never_taken_for_another():
    import dataclasses

    from headway.compare.methods import Candidate
    from headway.door import Selector

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Called(Selector):
        rule: object

    stage = Called(rule=lambda: 1)
    candidate = Candidate(method="a", summary="", budget=None, stages=(stage,))
    assert candidate.fingerprint() != candidate.fingerprint()
