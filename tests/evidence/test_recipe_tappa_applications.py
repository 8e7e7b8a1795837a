"""The applications in the TAPPA recipe: what is measured, and that it can come out otherwise."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from headway.evidence import Context
from headway.evidence.recipes import _tappa_applications as applications
from headway.evidence.recipes import _tappa_budgets as budgets
from headway.evidence.recipes import tappa
from headway.methods.long_context.duo_attention import Gates
from tests.door.hosts import decoder


def context(tmp_path, seed: int = 0) -> Context:
    return Context(size="smoke", seed=seed, out=tmp_path)


def test_the_recipe_of_the_paper_carries_them():
    assert list(tappa.CRITERIA)[-len(applications.CRITERIA) :] == list(applications.CRITERIA)


def test_every_budget_holds_as_many_bytes(tmp_path):
    ready = budgets._ready(context(tmp_path), 2, 56)
    found = budgets._continuation(lambda: ready, 0, 48, 16, 4)
    swept = {"alpha_0.25", "alpha_4"}
    assert set(found["loss"]) == {"dense", "heads", *swept, *budgets.BUDGETS, *budgets.OTHERS}
    # Budgets are shared out among layers: what one has more another has less.
    assert {name: sum(keys) for name, keys in found["keys"].items()} == {"similarity": 64, "inverted": 64}
    assert len(set(found["keys"]["similarity"])) > 1
    assert {name: ratio for name, ratio in found["bytes"].items() if ratio != 1} == {
        "duo_attention": found["bytes"]["duo_attention"]
    }
    assert 0.9 < found["bytes"]["duo_attention"] <= 1
    assert len(set(found["loss"].values())) > 2


@pytest.mark.parametrize(("prompt", "budget"), [(512, 96), (384, 128), (8192, 512), (64, 63)])
def test_duo_attention_fills_its_budget_and_no_more(prompt, budget):
    model = decoder("Llama", num_hidden_layers=5, num_key_value_heads=4)
    gates = Gates.of(model, torch.rand(5, 4, generator=torch.Generator().manual_seed(0)), how="drawn")
    policy = budgets.duo_at_bytes(gates, prompt, budget)
    whole = int(policy.retrieval().sum())
    held = whole * prompt + (20 - whole) * (policy.sinks + policy.recent)
    assert 0.97 * 20 * budget < held <= 20 * budget
    assert policy.retrieval().flatten()[gates.values.flatten().argsort(descending=True)[:whole]].all()


def test_passages_are_from_all_over_a_text():
    found = budgets.spread(torch.arange(103)[None], 4, 10)
    assert found[:, 0].tolist() == [0, 25, 50, 75]
    assert found.shape == (4, 10)


def part(**losses):
    keys = {"similarity": [3.0, 5.0], "inverted": [5.0, 3.0]}
    return {"loss": losses, "bytes": {"similarity": 1.0}, "keys": keys, "prompt": 8, "budget": 4, "window": 2,
            "tokens": 3}  # fmt: skip


@pytest.mark.parametrize(
    ("gaps", "verdict"),
    [
        ((-0.1, -0.2, -0.1, -0.3, -0.2, -0.1), "holds"),
        ((0.1, 0.2, 0.1, 0.3, 0.2, 0.1), "fails"),
        ((0.1, -0.1, 0.1, -0.1, 0.1, 0.0), "inconclusive"),
        ((-0.1, -0.2), "inconclusive"),
    ],
)
def test_a_budget_fails_only_where_the_interval_says_so(tmp_path, gaps, verdict):
    names = ("dense", "heads", "alpha_0.25", "alpha_4", *budgets.BUDGETS, *budgets.OTHERS)
    parts = [part(**dict.fromkeys(names, 2.0) | {"similarity": 2.0 + gap}) for gap in gaps]
    found = {c.id: c for c in (*budgets._budget_claims(context(tmp_path), parts),
                               *budgets._other_claims(context(tmp_path), parts))}  # fmt: skip
    judged = (
        "budget-against-uniform",
        "inverted-budget-is-worst",
        "against-expected-attention",
        "against-duo-attention",
    )
    assert {name: str(found[name].verdict) for name in judged} == dict.fromkeys(judged, verdict)


def test_a_passage_is_kept_when_a_run_stops(tmp_path, monkeypatch):
    first = budgets.claims(context(tmp_path))
    for name in ("_continuation", "host"):
        monkeypatch.setattr(budgets, name, lambda *a: pytest.fail("measured twice"))
    again = budgets.claims(context(tmp_path))
    assert [c.to_dict() for c in again] == [c.to_dict() for c in first]


def test_claims_come_in_order_and_small_runs_prove_nothing(tmp_path):
    claims = applications.claims(context(tmp_path))
    assert [claim.id for claim in claims] == list(applications.CRITERIA)
    verdicts = {claim.id: claim.verdict for claim in claims}
    assert verdicts["published-order"] == verdicts["memory-is-saved"] == "holds"
    assert all(verdicts[name] == "inconclusive" for name in list(applications.CRITERIA)[2:])
    assert "n = 2, at least 5" in next(c.reason for c in claims if c.id == "budget-against-uniform")


def test_a_wrong_order_is_caught(monkeypatch):
    monkeypatch.setattr(applications, "prune_order", lambda *a, **k: list(range(32)))
    assert applications._order_claim().verdict == "fails"


def test_pruned_models_are_judged_on_text_that_was_not_measured_on(tmp_path, monkeypatch):
    measured, judged = [], []
    honest, loss = applications.measure_layers, applications._loss
    monkeypatch.setattr(
        applications, "measure_layers", lambda model, chunks: measured.extend(chunks) or honest(model, chunks)
    )
    monkeypatch.setattr(
        applications, "_loss", lambda model, texts, layers, **k: judged.append(texts) or loss(model, texts, layers, **k)
    )
    found = applications._pruning(context(tmp_path))
    assert len(measured) == 2
    assert all(torch.equal(texts, judged[0]) for texts in judged)
    assert judged[0].shape == (3, 24)
    assert not any(torch.equal(chunk[0, :8], text[:8]) for chunk in measured for text in judged[0])
    assert all(sorted(order) == [0, 1, 2, 3] for order in found["orders"].values())
    assert all(np.isfinite(values).all() for by in found["loss"].values() for values in by.values())


@pytest.mark.parametrize(("odd", "verdict"), [(2.5, "holds"), (1.0, "inconclusive")])
def test_one_lucky_draw_of_layers_is_told_from_a_rule(tmp_path, odd, verdict):
    """The loss under each of three draws, the same on all passages: the interval over draws knows the odd one."""
    losses = {"similarity": 2.1, "influence": 2.0, "random_0": 2.5, "random_1": 2.6, "random_2": odd}
    found = {
        "dense": [1.5] * 6,
        "loss": {name: {"3": [loss] * 6} for name, loss in losses.items()},
        "by beta": {"0.1": {"3": [1.9] * 6}},
        "attention only": {"3": 1.0},
        "orders": {"random_0": [1, 2, 3, 0], "random_1": [2, 0, 1, 3], "random_2": [0, 3, 2, 1], "influence": [0]},
        "influence": [0.9, 0.1, 0.2],
        "similarity": [0.7, 0.8, 0.75],
    }
    pruning, drawn = applications._pruning_claims(context(tmp_path), found)
    assert (pruning.verdict, drawn.verdict) == ("fails", verdict)
    assert pruning.others["beta_0.1"].value == pytest.approx(-0.1)
    assert drawn.measured.value == pytest.approx((0.5 + 0.6 + odd - 2) / 3)
    assert "median influence is 0.125 of its own range" in pruning.notes
    assert "first layer are number 2, 3." in drawn.notes


def test_the_loss_without_layers_is_that_of_a_model_without_them():
    model = decoder("Llama", num_hidden_layers=3)
    texts = torch.randint(3, 80, (2, 12), generator=torch.Generator().manual_seed(0))
    found = applications._loss(model, texts, [1])
    del model.model.layers[1]
    with torch.no_grad():
        logits = model(input_ids=texts, use_cache=False).logits[:, :-1]
    want = torch.nn.functional.cross_entropy(logits.transpose(1, 2), texts[:, 1:], reduction="none").mean(1)
    assert found == pytest.approx(want.tolist(), rel=1e-5)
