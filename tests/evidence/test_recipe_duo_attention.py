"""The DuoAttention recipe at smoke size, its planted model, and that its measurements can fail."""

from __future__ import annotations

import pytest
import torch

import headway
from headway.evidence import NotRunnableError, load_recipe, prove
from headway.evidence.recipes import _planted_retrieval as planted
from headway.evidence.recipes import duo_attention as recipe
from headway.evidence.recipes._duo_toy import TOY
from headway.evidence.recipes.duo_attention import CRITERIA
from headway.methods.long_context.duo_attention import DuoAttention


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    return prove("duo-attention", size="smoke", seed=3, out=tmp_path_factory.mktemp("runs"), show_progress=False)


def claim(run, name):
    return next(found for found in run.claims if found.id == name)


def test_every_planned_claim_is_measured(smoke):
    assert [found.id for found in smoke.claims] == list(CRITERIA)
    assert smoke.planned


def test_bytes_are_those_of_the_formula(smoke):
    found = claim(smoke, "bytes")
    assert found.verdict == "holds"
    assert {row["sparsity"] for row in found.details["rows"]} == {0.0, 0.5, 1.0}


def test_a_random_host_says_nothing_about_needles(smoke):
    assert claim(smoke, "learned-near-full").verdict == "inconclusive"
    assert claim(smoke, "learned-beats-random").measured.n == 2


def test_two_seeds_are_too_few_for_planted_heads(smoke):
    assert claim(smoke, "planted-heads").measured.n == 6
    assert claim(smoke, "planted-heads").verdict == "inconclusive"


def test_gates_are_kept_beside_the_run(smoke):
    assert (smoke.folder / "gates.json").exists()
    assert (smoke.folder / "plots" / "gates.html").exists()
    assert not (smoke.folder / "gates.partial.json").exists()


@pytest.mark.parametrize("seed", [0, 5])
def test_the_planted_heads_are_what_answers_need(seed):
    model = planted.planted_model(seed)
    samples = [planted.lookup(i) for i in range(3)]
    gates = torch.zeros(planted.LAYERS, planted.KV_HEADS)
    for place in planted.planted_heads(seed):
        gates[place] = 1
    found = {}
    for name, chosen in (("planted", gates), ("others", 1 - gates)):
        with headway.use(model, DuoAttention(gates=chosen, threshold=0.5, **TOY)):
            found[name] = planted.lookup_accuracy(model, samples)
    assert planted.lookup_accuracy(model, samples) == found["planted"] == 1.0
    assert found["others"] < 0.4


def test_facts_are_out_of_reach_of_streaming_heads():
    sample = planted.lookup(1)
    places = (sample.ids[0] >= planted.Layout.fact).nonzero()[:, 0]
    assert places.numel() == planted.KEYS
    assert int(places.min()) >= TOY["sinks"]
    assert int(sample.rows[0]) - int(places.max()) > TOY["recent"]


def test_gates_at_other_heads_are_caught():
    gates = torch.zeros(planted.LAYERS, planted.KV_HEADS)
    gates[:, 3] = 1.0
    toy = {"gates": gates.tolist(), "planted": [(0, 0), (1, 1), (2, 2)]}
    assert recipe._planted_heads([toy] * 5).verdict == "fails"
    toy = {"gates": gates.tolist(), "planted": [(0, 3), (1, 3), (2, 3)]}
    assert recipe._planted_heads([toy] * 5).verdict == "holds"


def test_a_byte_too_many_is_caught():
    rows = [{"sparsity": 0.5, "tokens": 10, "stored": 100 + i // 5, "formula": 100, "reduction": 2.0} for i in range(6)]
    assert recipe._bytes_claim(rows[:5] * 2).verdict == "holds"
    assert recipe._bytes_claim(rows).verdict == "fails"


def test_the_paper_setting_needs_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(NotRunnableError, match="no GPU"):
        load_recipe("duo-attention").check_runnable("full")
    load_recipe("duo-attention").check_runnable("small")
