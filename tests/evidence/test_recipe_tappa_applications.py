"""The applications in the TAPPA recipe: what is measured, and that it can come out otherwise."""

from __future__ import annotations

import numpy as np
import torch

from headway.evidence import Context
from headway.evidence.recipes import _tappa_applications as applications
from headway.evidence.recipes import tappa


def context(tmp_path, seed: int = 0) -> Context:
    return Context(size="smoke", seed=seed, out=tmp_path)


def test_the_recipe_of_the_paper_carries_them():
    assert list(tappa.CRITERIA)[-len(applications.CRITERIA) :] == list(applications.CRITERIA)


def test_every_budget_holds_as_many_bytes(tmp_path):
    found = applications._budgets(context(tmp_path))
    assert all(ratio == 1 for values in found["bytes"].values() for ratio in values)
    assert set(found["loss"]) == {"dense", "heads", *applications.BUDGETS}
    losses = [tuple(values) for values in found["loss"].values()]
    assert len(set(losses)) > 2


def test_claims_come_in_order_and_small_runs_prove_nothing(tmp_path):
    claims = applications.claims(context(tmp_path))
    assert [claim.id for claim in claims] == list(applications.CRITERIA)
    verdicts = {claim.id: claim.verdict for claim in claims}
    assert verdicts["published-order"] == verdicts["memory-is-saved"] == "holds"
    assert all(verdicts[name] == "inconclusive" for name in list(applications.CRITERIA)[2:])


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
        applications, "_loss", lambda model, ids, layers, **k: judged.append(ids) or loss(model, ids, layers, **k)
    )
    found = applications._pruning(context(tmp_path))
    assert len(measured) == 2
    assert all(torch.equal(ids, judged[0]) for ids in judged)
    assert not any(torch.equal(chunk[0, :8], judged[0][0, :8]) for chunk in measured)
    assert all(sorted(order) == [0, 1, 2, 3] for order in found["orders"].values())
    assert all(np.isfinite(values).all() for by in found["loss"].values() for values in by.values())
