"""The Thought Anchors recipe at smoke size, and its toy."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

import headway
from headway.evidence import NotRunnableError, load_recipe, prove
from headway.evidence.recipes import _anchors_choice as choice
from headway.evidence.recipes import _anchors_measures as measures
from headway.evidence.recipes import _anchors_scripted as scripted
from headway.evidence.recipes import _anchors_toy as toy
from headway.evidence.recipes import thought_anchors as recipe
from headway.evidence.recipes._peak_bytes import PeakBytes
from headway.kernels import reductions
from headway.methods.diagnosis.thought_anchors import Prefix, edge_auroc, edge_marks, nearness, suppression_matrix


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    return prove("thought-anchors", size="smoke", seed=1, out=tmp_path_factory.mktemp("runs"), show_progress=False)


def claim(run, name):
    return next(found for found in run.claims if found.id == name)


def test_every_planned_claim_is_measured(smoke):
    assert [found.id for found in smoke.claims] == list(recipe.CRITERIA)
    assert smoke.planned


def test_what_is_exact_holds_at_any_size(smoke):
    prefix = claim(smoke, "shared-prefix").others
    assert prefix["apart"].value < 1e-4
    assert prefix["forwards_above_bar"].value == 0
    assert claim(smoke, "streamed-means").measured.value < 1e-5
    assert claim(smoke, "hiding-sees-through-idle-attention").others["moved"].value < 1e-4


def test_an_untrained_toy_says_nothing(smoke):
    for name in ("hiding-finds-the-graph", "mode-broadcasts", "branch-ranks-first", "kurtosis-is-reliable"):
        assert claim(smoke, name).verdict == "inconclusive"


def test_block_means_hold_less_where_maps_are_larger_than_blocks(monkeypatch):
    model = toy.decoder(0).eval()
    ids = torch.cat([toy.draw_ids(1, np.random.default_rng(i)) for i in range(3)], 1)
    whole = measures.block_means(model, ids, 7)
    monkeypatch.setattr(reductions, "BLOCK_ELEMENTS", 20_000)
    found = measures.block_means(model, ids, 7)
    maps = toy.LAYERS * toy.HEADS * ids.shape[1] ** 2 * 4
    assert found["apart"] < 1e-5
    assert found["whole"] > maps, "whole maps of all layers are held at once"
    assert found["streamed"] < 0.5 * found["whole"]
    assert found["streamed"] < whole["streamed"]


def test_weights_do_not_count_as_held():
    weights = torch.ones(1000)
    with PeakBytes([weights]) as peak:
        made = weights.view(10, 100) * 2
    assert peak.highest == made.numel() * 4
    with PeakBytes() as peak:
        made = weights.view(10, 100) * 2
    assert peak.highest == 2 * made.numel() * 4


def test_a_trace_names_its_edges_and_its_distractors():
    ids = toy.draw_ids(30, np.random.default_rng(0))
    assert ids.shape == (30, toy.LENGTH)
    for row in ids.tolist():
        made = toy.planted(row)
        said = [s.split(" ")[0] for s in made.trace.sentences]
        mode = int(said[made.mode].removeprefix("mode-is-m"))
        assert "".join(made.trace.sentences) == made.trace.text.removeprefix("start ").removesuffix("end ")
        assert len(made.edges) == 2 * toy.DERIVATIONS
        for derived in made.derivations:
            fact = next(s for s, t in made.edges if t == derived and s != made.mode)
            key, _, value = said[fact].removeprefix("given:").partition("=")
            assert said[derived] == f"then-{key}-gives"
            answer = made.trace.sentences[derived].split(" ")[1]
            assert answer == f"m{mode}v{value}"
            assert sum(s == said[derived] for s in said) == 1
        assert not {i for i, _ in made.edges} & {
            i for i, span in enumerate(made.trace.tokens) if span[0] in made.distractors
        }


def test_the_mode_can_stand_behind_the_setup():
    for row in toy.draw_ids(10, np.random.default_rng(0), mode_last=True).tolist():
        made = toy.planted(row)
        assert made.mode == made.derivations[0] - 1


def test_void_statements_never_say_the_value():
    for row in toy.draw_ids(50, np.random.default_rng(3)).tolist():
        words = toy.Words().decode(row).split(" ")
        facts = {w.removeprefix("given:") for w in words if w.startswith("given")}
        assert not facts & {w.removeprefix("not-true:") for w in words}


def test_idle_heads_change_nothing_and_stay_so_in_training():
    model = toy.train(3, 0)
    made = toy.planted(toy.draw_ids(1, np.random.default_rng(0))[0].tolist())
    weights = []

    class Read(headway.door.Observer):
        def observe(self, call, output, lse=None):
            weights.append(call.weights()[0, toy.IDLE, -1, list(made.distractors)].sum())

    with torch.no_grad():
        plain = model(input_ids=made.trace.input_ids, use_cache=False).logits
        with headway.use(model, toy.IdleLooks(columns=made.distractors), Read()):
            stared = model(input_ids=made.trace.input_ids, use_cache=False).logits
    assert torch.allclose(plain, stared, atol=1e-5)
    assert min(weights) > 0.9


def test_nearness_alone_does_not_find_the_graph():
    found = []
    for row in toy.draw_ids(40, np.random.default_rng(1)).tolist():
        made = toy.planted(row)
        found.append(edge_auroc(nearness(len(made.trace)), edge_marks(len(made.trace), made.edges)))
    assert 0.3 < np.mean(found) < 0.5


def test_the_scripted_reasoner_goes_on_where_its_prefix_ends():
    trace = scripted.script(coin="tails", guess="twelve")
    for i in range(len(trace) + 1):
        prefix = trace.prefix(i)
        (text,) = scripted.scripted(prefix, [1])
        if i > 2:
            assert prefix.text + text == trace.text
    assert scripted.scripted(Prefix((), trace.prefix(2).text + scripted.NOW), [0]) == ["So the answer is twelve. "]


def test_hiding_costs_half_a_forward_for_sentences_of_one_length():
    model = toy.decoder(0).eval()
    ids = toy.draw_ids(1, np.random.default_rng(0))[:, :40]
    found = suppression_matrix(model, ids, [(a, a + 4) for a in range(0, 40, 4)])
    assert found.forwards == pytest.approx(1 + 4.5)


def test_the_paper_setting_needs_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(NotRunnableError, match="no GPU"):
        load_recipe("thought-anchors").check_runnable("full")


def chooser(follows):
    """Picks freely; works the rest out, or says any answer."""

    def sample(prefix, seeds):
        said = prefix.text.removeprefix(choice.prompt())
        texts = []
        for seed in seeds:
            random = np.random.default_rng(seed)
            picked = re.search(choice.PICK, said)
            number = int(picked[1]) if picked else int(random.integers(1, 10))
            line = choice.sentences(number) if follows else choice.sentences(int(random.integers(1, 10)))
            line[0] = choice.sentences(number)[0]
            done = sum(mark in said for mark in ("number", "more than", "answer"))
            texts.append("".join(line[done:]))
        return texts

    return sample


@pytest.mark.parametrize("follows", [True, False])
def test_a_free_choice_is_told_from_what_follows(follows):
    class Context:
        def generator(self, name):
            return np.random.default_rng(0)

    found = choice.choices(None, chooser(follows), 20)
    made = choice.choice_claim(Context(), found)
    assert np.mean(found["free"]) > 0.7
    if follows:
        assert made.verdict == "holds"
        assert all(row[1] == row[2] == 0 for row in found["importance"]), "what follows changes nothing"
    else:
        assert made.verdict == "inconclusive", "answers that do not follow from the choice say nothing"
