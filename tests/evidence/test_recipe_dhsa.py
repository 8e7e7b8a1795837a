"""The DHSA recipe at smoke size, and that its measurements can fail."""

from __future__ import annotations

import pytest
import torch

from headway.door.call import AttentionCall
from headway.evidence import Context, NotRunnableError, load_recipe, prove
from headway.evidence.recipes import _dhsa_planted as planted
from headway.evidence.recipes import _dhsa_text as text
from headway.evidence.recipes import dhsa as recipe
from headway.methods.long_context.dhsa import DHSA, Fixed


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    return prove("dhsa", size="smoke", seed=2, out=tmp_path_factory.mktemp("runs"), show_progress=False)


def claim(run, name):
    return next(found for found in run.claims if found.id == name)


def test_every_planned_claim_is_measured(smoke):
    assert [found.id for found in smoke.claims] == list(recipe.CRITERIA)
    assert smoke.planned


def test_all_selections_read_as_many_keys(smoke):
    """Equal density, or the comparison says nothing."""
    densities = claim(smoke, "kept-mass").details["density"]
    assert set(densities) >= {"predicted", "fixed", "window", "random", "oracle"}
    first = densities["predicted"]
    for name, values in densities.items():
        assert values == pytest.approx(first, abs=0.01), name


def test_few_texts_prove_nothing(smoke):
    for name in ("predictor", "document-joins", "kept-mass", "predicted-boundaries", "root-on-text", "needle"):
        assert claim(smoke, name).verdict == "inconclusive"


def test_the_root_evens_out_noise(smoke):
    assert claim(smoke, "noise").verdict == "holds"


def test_the_mean_and_the_sum_swapped_are_caught(tmp_path, monkeypatch):
    plain = planted.normalised
    swapped = {"mean": "sum", "sum": "mean", "sqrt": "sqrt"}
    monkeypatch.setattr(planted, "normalised", lambda sums, counts, norm: plain(sums, counts, swapped[norm]))
    found = planted.noise(Context(size="smoke", seed=0, out=tmp_path))
    assert recipe._noise_claim(found).verdict == "fails"


def test_true_boundaries_bring_back_whole_segments(smoke):
    recall = claim(smoke, "segments").details["recall"]
    assert recall["true 128"] > recall["fixed 128"]
    assert recall["true 128"] > 0.9


def test_the_last_keys_and_random_keys_bring_back_their_share_of_segments(smoke):
    """A window of 128 of 512 keys holds a quarter of the segments, as do keys drawn at random."""
    recall = claim(smoke, "segments").details["recall"]
    for budget in planted.BUDGETS:
        assert recall[f"random keys {budget}"] == pytest.approx(budget / 512, abs=0.03)
        assert recall[f"window {budget}"] < budget / 512 + 0.35
        assert recall[f"true {budget}"] > recall[f"window {budget}"] + 0.2


def test_weak_targets_stand_out_alike_at_all_lengths():
    """The sum of a target's keys along its topic is z spreads on average, whatever the length."""
    for length in planted.LENGTHS:
        generator, found = torch.Generator().manual_seed(length), []
        for _ in range(300):
            key, _, topic, inside = planted.weak_target(generator, length, 2.5 / length**0.5)
            found.append(float((key[inside] @ topic[0]).sum()) / length**0.5)
        assert sum(found) / 300 == pytest.approx(2.5, abs=0.25)
        assert torch.tensor(found).std() == pytest.approx(1, abs=0.2)


def test_targets_that_are_always_found_say_nothing(tmp_path):
    """The gate: with a recall near one under both forms no difference can show."""
    context = Context(size="small", seed=0, out=tmp_path)
    wide = torch.linspace(-0.05, 0.05, 20).tolist()
    found = {f"sqrt {n}": [0.6 + x for x in wide] for n in planted.LENGTHS}
    found |= {f"mean {n}": [(0.7 if n == planted.SHORT else 0.5) + x for x in wide] for n in planted.LENGTHS}
    assert recipe._targets_claim(context, found).verdict == "holds"
    found |= {f"{norm} {planted.LONG}": [0.99] * 20 for norm in ("sqrt", "mean")}
    assert recipe._targets_claim(context, found).verdict == "inconclusive"


def test_joins_are_learnt_from_joined_texts_of_other_documents(tmp_path, monkeypatch):
    """What the predictor is trained on holds pieces of the training texts alone, many in each."""
    trained = []
    plain = text.trained_on
    monkeypatch.setattr(
        text, "trained_on", lambda context, model, ids: trained.append(ids) or plain(context, model, ids)
    )
    context = Context(size="smoke", seed=0, out=tmp_path)
    found = text.join_f1(context)
    model, tokenizer = text.host_of(context)
    train, judge = text.texts_of(context, tokenizer, model)
    pairs = {tuple(pair) for ids in train for pair in ids[0].unfold(0, 3, 1).tolist()}
    for ids in trained[0]:
        inside = [tuple(pair) in pairs for pair in ids[0].unfold(0, 3, 1).tolist()]
        assert sum(inside) / len(inside) > 0.8
    assert len(found["predicted"]) == len(found["labels"]["f1"]) == len(judge)


def test_planted_keys_point_to_their_topics(tmp_path):
    key, starts, topics = planted.planted(torch.Generator().manual_seed(0), 600)
    assert key.shape == (600, 64)
    ends = [*starts[1:].tolist(), 600]
    for first, last, topic in zip(starts.tolist(), ends, topics, strict=True):
        assert float((key[first:last] @ topic).mean()) == pytest.approx(planted.SIGNAL, abs=5 / (last - first) ** 0.5)


def test_agreement_within_the_slack_counts_once():
    true = torch.tensor([10, 50])
    assert planted.near_f1(torch.tensor([11, 48]), true) == 1
    assert planted.near_f1(torch.tensor([13, 50]), true) == pytest.approx(0.5)
    assert planted.near_f1(torch.tensor([30]), true) == 0


def test_random_keys_are_random_and_as_many():
    generator = torch.Generator().manual_seed(0)
    like = DHSA(boundaries=Fixed(size=1), budget=40, block=8, local_tokens=8, global_tokens=2, suffix=0)
    call = AttentionCall.from_tensors(*(torch.randn(1, 2, 160, 8, generator=generator) for _ in range(3)), causal=True)
    method = text.RandomKeys(like=like, generator=generator)
    first, second = (method.select(call.replace(forward=type(call.forward)())).to_bool(160, 160) for _ in range(2))
    assert not torch.equal(first, second)
    assert first[0, 0, -1].sum() == second[0, 0, -1].sum() == 40
    assert bool(first[0, 0, -1, -8:].all())


def test_the_same_seed_measures_the_same(smoke, tmp_path):
    again = prove("dhsa", size="smoke", seed=2, out=tmp_path, show_progress=False)
    assert [str(c.measured) for c in again.claims] == [str(c.measured) for c in smoke.claims]


def test_the_paper_setting_needs_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(NotRunnableError, match="no GPU"):
        load_recipe("dhsa").check_runnable("full")


def test_joined_documents_meet_where_they_are_said_to():
    sources = [torch.full((1, 200), 1), torch.full((1, 200), 2)]
    ids, joins = text._joined(sources, 400, torch.Generator().manual_seed(0))
    assert ids.shape == (1, 400)
    changes = (ids[0, 1:] != ids[0, :-1]).nonzero()[:, 0] + 1
    assert set(changes.tolist()) <= set(joins.tolist())
    assert bool((joins.diff() >= text.DOCUMENT[0]).all())
