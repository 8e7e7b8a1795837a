"""The DuoAttention recipe at smoke size, its planted model, and that its measurements can fail."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import headway
from headway.evidence import NotRunnableError, load_recipe, prove
from headway.evidence.recipes import _duo_trained as trained
from headway.evidence.recipes import _planted_retrieval as planted
from headway.evidence.recipes import duo_attention as recipe
from headway.evidence.recipes._duo_decode import decode_claims
from headway.evidence.recipes._duo_real import SETTINGS, needles
from headway.evidence.recipes._duo_toy import TOY, toy_run
from headway.evidence.recipes._duo_toy_claims import planted_heads_claim, trained_claims
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


def test_needles_stand_at_every_length_out_of_reach_of_streaming_heads(smoke):
    rows = claim(smoke, "learned-beats-random").details["by length"]
    assert {(row["tokens"], row["heads"]) for row in rows} >= {(360, "full"), (480, "learned"), (480, "random 2")}
    setting = SETTINGS["smoke"]
    for tokens in setting.tokens:
        (sample,) = needles(setting, 5, tokens)
        assert tokens - 130 < sample.prompt_ids.shape[-1] <= tokens
        text = "".join(chr(int(i) - 8) for i in sample.prompt_ids.flatten())
        place = text.index("The secret code of the")
        assert place > setting.serve[0]
        assert len(text) - (place + len(sample.meta["needle"])) > sum(setting.serve)


def test_an_untrained_decoder_says_nothing_about_retrieval(smoke):
    for name in ("trained-accuracy", "trained-against-random", "trained-ablation"):
        assert claim(smoke, name).verdict == "inconclusive"
    assert len(claim(smoke, "trained-ablation").details["gates"]) == trained.LAYERS * trained.HEADS


def test_the_cache_grows_by_r_and_two_rounds_are_too_few_for_its_time(smoke):
    assert claim(smoke, "decode-bytes").measured.value == 0
    assert claim(smoke, "decode-time").verdict == "inconclusive"


@pytest.fixture
def costs():
    """Steps whose time and bytes grow as r says, beside what a step costs at any length."""
    rows = [
        {"share": share, "tokens": t, "stored": 1000 * share * t + 7, "seconds": [0.03 + share * t * 1e-6] * 6}
        for t in (4_000, 8_000, 16_000)
        for share in (0.25, 0.5, 1.0)
    ]
    return {"rows": rows, "threads": 1, "steps": 4}


def test_slopes_are_judged_and_what_a_step_always_costs_is_left_out(costs):
    random = np.random.default_rng(0)
    assert [found.verdict for found in decode_claims(costs, random)] == ["holds", "holds"]
    for row in costs["rows"]:
        if row["share"] == 0.5:
            row["seconds"] = [0.03 + 0.7 * row["tokens"] * 1e-6] * 6
    size, speed = decode_claims(costs, random)
    assert (size.verdict, speed.verdict) == ("holds", "fails")
    assert speed.others["half"].value == pytest.approx(0.7)
    costs["rows"][-2]["stored"] += 1
    assert decode_claims(costs, random)[0].verdict == "fails"


def test_trained_toys_with_wrong_gates_are_caught(smoke, tmp_path):
    from headway.evidence.recipe import Context

    context = Context(size="small", seed=0, out=tmp_path)
    gates = np.linspace(0, 1, 12).reshape(3, 4).tolist()
    toy = {"gates": gates, "effects": gates, "full": 1.0, "learned": 0.99, "inverted": 0.1, "random": 0.5, "none": 0.1,
           "rounds": 1}  # fmt: skip
    assert [found.verdict for found in trained_claims(context, [toy] * 4)] == ["holds"] * 3
    wrong = toy | {"learned": 0.4, "effects": [row[::-1] for row in gates[::-1]]}
    assert [found.verdict for found in trained_claims(context, [wrong] * 4)] == ["fails"] * 3
    for unlearned in ({"full": 0.9}, {"none": 0.4}):
        found = trained_claims(context, [toy | unlearned] * 4)
        assert [one.verdict for one in found] == ["inconclusive"] * 3


@pytest.mark.parametrize(("answers", "rounds"), [((0.99,), 1), ((0.3, 0.98, 1.0), 3), ((0.3,) * 9, trained.ROUNDS)])
def test_a_decoder_that_has_not_learned_gets_another_round(monkeypatch, answers, rounds):
    right, fitted = iter(answers), []
    monkeypatch.setattr(trained, "recalled", lambda *_: next(right))
    monkeypatch.setattr(trained, "fit", lambda model, loss, **options: fitted.append(options["steps"]))
    assert trained.trained(7, torch.Generator().manual_seed(0))[1] == rounds
    assert fitted == [7] * rounds


def test_means_by_thirds_of_the_layers_are_in_their_order():
    assert recipe._thirds([[0.0, 0.2], [0.5, 0.5], [1.0, 0.0], [1.0, 1.0], [0.25, 0.25]]) == "0.30, 0.75, 0.25"


def test_random_heads_answer_between_learned_and_inverted_ones():
    """Three random choices of three heads hit some of the three that retrieve; inverted gates hit none."""
    found = toy_run(0, 20, 8)
    assert found["full"] == found["learned"] == 1
    assert found["inverted"] + 0.1 < found["random"] < found["learned"] - 0.1


def test_lookups_of_the_trained_toy_are_out_of_reach_and_have_one_answer():
    batch = trained.recall_batch(20, torch.Generator().manual_seed(0))
    assert batch.ids.shape == (20, trained.LENGTH)
    for row, rows, answers in zip(batch.ids.tolist(), batch.rows.tolist(), batch.answers.tolist(), strict=True):
        facts = {(t - trained.PAIR) // trained.VALUES: (at, (t - trained.PAIR) % trained.VALUES)
                 for at, t in enumerate(row) if trained.PAIR <= t < trained.ASK}  # fmt: skip
        assert len(facts) == trained.KEYS
        for at, answer in zip(rows, answers, strict=True):
            place, value = facts[row[at] - trained.ASK]
            assert answer == trained.ANSWER + value
            assert at - place > trained.REACH["recent"]
            assert place >= trained.REACH["sinks"] or place == 1


def test_filler_follows_its_rule_where_it_says_so():
    """The same two tokens are always followed by the same one, also across sequences."""
    batch = trained.recall_batch(60, torch.Generator().manual_seed(1))
    after: dict[tuple[int, int], set[int]] = {}
    for row, ruled in zip(batch.ids.tolist(), batch.ruled.tolist(), strict=True):
        for at in range(trained.LENGTH - 1):
            if ruled[at]:
                after.setdefault((row[at - 1], row[at]), set()).add(row[at + 1])
    assert len(after) > 30
    assert all(len(found) == 1 for found in after.values())


def test_effects_are_those_of_heads_that_reach_far():
    """A head whose output projection is cut has none."""
    model, _ = trained.trained(3, torch.Generator().manual_seed(0))
    batch = trained.recall_batch(8, torch.Generator().manual_seed(1))
    dim = trained.WIDTH // trained.HEADS
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight[:, 2 * dim : 3 * dim] = 0
    found = trained.effects(model, batch, torch.Size((trained.LAYERS, trained.HEADS)))
    assert float(found[1, 2]) == 0
    assert int((found > 0).sum()) == trained.LAYERS * trained.HEADS - 1


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
    assert planted_heads_claim([toy] * 5).verdict == "fails"
    toy = {"gates": gates.tolist(), "planted": [(0, 3), (1, 3), (2, 3)]}
    assert planted_heads_claim([toy] * 5).verdict == "holds"


def test_a_byte_too_many_is_caught():
    rows = [{"sparsity": 0.5, "tokens": 10, "stored": 100 + i // 5, "formula": 100, "reduction": 2.0} for i in range(6)]
    assert recipe._bytes_claim(rows[:5] * 2).verdict == "holds"
    assert recipe._bytes_claim(rows).verdict == "fails"


def test_the_paper_setting_needs_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(NotRunnableError, match="no GPU"):
        load_recipe("duo-attention").check_runnable("full")
    load_recipe("duo-attention").check_runnable("small")
