"""The PowerAttention recipe at smoke size, its toy task, and that its measurements can fail."""

from __future__ import annotations

import pytest
import torch

from headway.door import AttentionCall
from headway.errors import ArgumentError
from headway.evidence import Context, NotRunnableError, load_recipe, prove
from headway.evidence.recipes import _power_length as length
from headway.evidence.recipes import _power_reach as reaching
from headway.evidence.recipes import _power_times as timing
from headway.evidence.recipes import _power_toys as recipe
from headway.evidence.recipes._power_reach import Pattern, tiny_lm
from headway.evidence.recipes._power_toys import TOY, passkeys
from headway.evidence.recipes.power_attention import CRITERIA
from headway.methods.long_context.power_attention import key_blocks, pattern_mask, power_mask, reached


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    return prove("power-attention", size="smoke", seed=3, out=tmp_path_factory.mktemp("runs"), show_progress=False)


def claim(run, name):
    return next(found for found in run.claims if found.id == name)


def context(tmp_path, size="smoke") -> Context:
    return Context(size=size, seed=0, out=tmp_path)


def test_every_planned_claim_is_measured(smoke):
    assert [found.id for found in smoke.claims] == list(CRITERIA)
    assert smoke.planned


def test_exact_claims_hold_at_any_size(smoke):
    assert claim(smoke, "hops").verdict == "holds"
    assert claim(smoke, "popcount").measured.value == 0
    assert claim(smoke, "reach").verdict == "holds"
    assert claim(smoke, "cost").verdict == "holds"
    assert claim(smoke, "cost").baseline.value == pytest.approx(4, abs=0.1)


def test_a_model_that_was_hardly_trained_says_nothing(smoke):
    for name in (
        "recall",
        "static-patterns",
        "recall-follows-graph",
        "recall-at-length",
        "fine-tuning",
        "text",
        "untrained-perplexity",
        "untrained-needle",
    ):
        assert claim(smoke, name).verdict == "inconclusive"


def test_the_probe_is_drawn(smoke):
    assert (smoke.folder / "plots" / "probe.html").exists()
    layers = claim(smoke, "probe").details["by layer"]
    assert {len(values) for values in layers.values()} == {recipe.LAYERS + 1}


def test_a_gradient_through_another_mask_is_caught(tmp_path, monkeypatch):
    monkeypatch.setattr(reaching, "reached", lambda mask, layers: reached(mask, layers + 1))
    assert reaching.measure_gradients(context(tmp_path))["wrong"] > 0
    assert reaching.measure_long_reach(context(tmp_path))["wrong"] > 0


def test_a_mask_without_its_powers_is_caught(tmp_path, monkeypatch):
    monkeypatch.setattr(reaching, "power_mask", lambda n, **o: pattern_mask("window", n, degree=6))
    found = reaching.measure_hops(context(tmp_path))
    assert found["wrong distances"] > 0
    monkeypatch.undo()
    found = {**reaching.measure_hops(context(tmp_path)), "hops": {"64": [6, 7]}}
    assert reaching.hops_claim(found, CRITERIA["hops"]).measured.value == 1


def test_gradients_reach_all_blocks_with_as_many_layers_as_the_graph_asks_for_and_no_fewer(smoke):
    found = claim(smoke, "long-reach")
    assert found.measured.value == 0
    assert found.others["power"].value == 1
    assert found.others["less"].value < 1


def test_paths_of_the_toys_graphs():
    """The mask leads everywhere; dilated windows miss odd distances, segments what lies behind their border."""
    power, dilated, segments, window = (recipe.graph_reach(n) for n in ("power", "dilated", "segments", "window"))
    below = torch.ones(recipe.TOKENS, recipe.TOKENS, dtype=torch.bool).tril()
    assert torch.equal(power, below)
    distance = torch.arange(recipe.TOKENS)[:, None] - torch.arange(recipe.TOKENS)
    behind_sink = torch.arange(recipe.TOKENS) > 0
    assert not (dilated & (distance % 2 == 1) & behind_sink).any()
    assert bool((dilated == below)[(distance % 2 == 0) & (distance >= 0)].all())
    assert torch.equal(window[:, 1:], (below & (distance <= recipe.WINDOW_REACH))[:, 1:])
    assert not torch.equal(segments, below)


def test_far_pass_keys_are_out_of_a_windows_reach_and_within_the_masks():
    reach_of = {
        "window": reached(pattern_mask("window", recipe.TOKENS, degree=recipe.DEGREE), recipe.LAYERS)[-1],
        "power": reached(power_mask(recipe.TOKENS), recipe.LAYERS)[-1],
    }
    far = recipe.TOKENS - 1 - torch.arange(1, recipe.TOKENS) > recipe.WINDOW_REACH
    assert not reach_of["window"][1:][far].any()
    assert bool(reach_of["power"].all())
    assert int(far.sum()) > 10
    degrees = [int(m[-1].sum()) for m in (power_mask(48), pattern_mask("window", 48, degree=recipe.DEGREE))]
    assert degrees[0] == degrees[1]


def test_pass_keys_stand_where_their_labels_begin():
    batch = passkeys(torch.Generator().manual_seed(0), 50)
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        at = int((labels == -100).sum()) - 1
        assert 1 <= at < recipe.TOKENS - 1
        assert int(ids[at]) < recipe.VALUES
        assert bool((labels[at + 1 :] == ids[at]).all())
        assert int((ids < recipe.VALUES).sum()) == 1


def test_accuracy_counts_positions_by_their_distance():
    """A model that names value 0 everywhere is right on every text whose pass-key is 0 and wrong on others."""

    class Zero(torch.nn.Module):
        def forward(self, input_ids, use_cache):
            logits = torch.zeros(*input_ids.shape, recipe.VALUES)
            logits[..., 0] = 1
            return type("Output", (), {"logits": logits})

    test = passkeys(torch.Generator().manual_seed(1), 400)
    share = float((test["labels"][:, -1] == 0).double().mean())
    found = recipe.accuracy(Zero(), None, test)
    assert set(found) == {"near", "between", "far"}
    assert found["near"] == pytest.approx(share, abs=0.05)
    whole = recipe.accuracy(Zero(), None, test, recipe.graph_reach("power"))
    assert whole["unreachable"] is None
    assert whole["reachable"] == pytest.approx(share, abs=0.05)


def test_a_pattern_reads_what_its_mask_says_and_only_whole_texts():
    query = torch.randn(1, 2, 12, 8, generator=torch.Generator().manual_seed(0))
    call = AttentionCall.from_tensors(query, query, query, causal=True)
    chosen = Pattern(pattern="dilated", degree=3, block=2).select(call).mask
    assert torch.equal(chosen.blocks[0, 0], pattern_mask("dilated", 6, degree=3))
    with pytest.raises(ArgumentError, match="got 2 on 12 keys"):
        Pattern(pattern="window", degree=3).select(call.replace(query=query[:, :, :2]))


def test_tiny_models_depend_on_their_seed_alone():
    first, again, other = (tiny_lm(seed, vocabulary=9, tokens=8, layers=1) for seed in (1, 1, 2))
    pairs = [(first, again, True), (first, other, False)]
    for a, b, same in pairs:
        assert torch.equal(a.lm_head.weight, b.lm_head.weight) == same
    assert TOY.trained


def test_the_paper_setting_needs_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(NotRunnableError, match="no GPU"):
        load_recipe("power-attention").check_runnable("full")
    load_recipe("power-attention").check_runnable("small")


def test_pairs_of_the_timed_mask_are_those_of_the_key_lists(smoke):
    pairs = claim(smoke, "time-growth").details["pairs"]
    assert pairs == [sum(len(key_blocks(row)) for row in range(blocks)) for blocks in (8, 16)]
    assert claim(smoke, "time-growth").verdict == "inconclusive"


@pytest.mark.parametrize(
    ("power", "dense", "verdict"), [(2.2, 4.0, "holds"), (4.0, 4.0, "fails"), (2.2, 2.0, "fails"), (1.1, 4.0, "fails")]
)
def test_time_is_judged_by_how_much_more_is_read(tmp_path, power, dense, verdict):
    found = {
        "lengths": [1000, 2000], "block": 100, "pairs": [50, 110], "threads": 1,
        "power": [[10.0] * 6, [10.0 * power] * 6], "dense": [[20.0] * 6, [20.0 * dense] * 6],
    }  # fmt: skip
    judged = timing.times_claim(context(tmp_path), found, CRITERIA["time-growth"])
    assert judged.verdict == verdict
    assert judged.others["speed_up"].value == pytest.approx(2 * dense / power)


def test_at_length_a_window_leads_nowhere_and_the_mask_to_most_of_the_text():
    """But to the first token, the sink, which every row sees."""
    far = torch.arange(length.TOKENS)[:, None] - torch.arange(length.TOKENS) > length.WINDOW_REACH
    led = {name: float(length.long_reach(name)[far].double().mean()) for name in ("power", "window")}
    assert length.WINDOW_REACH < length.TOKENS // 10
    assert led["window"] < 0.01
    assert 0.6 < led["power"] < 0.7


def test_far_recall_is_told_apart_by_paths():
    """A model that always says value 3: right exactly in the texts whose pass-key it is."""

    class Says(torch.nn.Module):
        def forward(self, input_ids, use_cache):
            logits = torch.zeros(*input_ids.shape, 8)
            logits[..., 3] = 1
            return type("Output", (), {"logits": logits})()

    tokens, at = length.WINDOW_REACH + 20, torch.tensor([2, 9])
    value = torch.tensor([3, 5])
    labels = value[:, None].expand(-1, tokens).masked_fill(torch.arange(tokens) <= at[:, None], -100)
    test = {"input_ids": torch.zeros(2, tokens, dtype=torch.long), "labels": labels}
    known = torch.zeros(tokens, tokens, dtype=torch.bool)
    known[-4:, 2] = True
    known[-2:, 9] = True
    found = length.far_recall(Says(), None, test, known)
    # Far rows: 17 behind token 2, of which 4 are led to; 10 behind token 9, of which 2 are.
    assert found == pytest.approx({"all": 17 / 27, "reachable": 4 / 6, "unreachable": 13 / 21})


@pytest.mark.parametrize(
    ("changed", "verdict"),
    [({}, "holds"), ({"power": {"all": 0.6, "reachable": 0.5, "unreachable": 0.1}}, "fails"),
     ({"window": {"all": 0.5}}, "fails"), ({"dense": {"all": 0.5}}, "inconclusive")],
)  # fmt: skip
def test_recall_at_length_is_judged_by_path_and_window(tmp_path, changed, verdict):
    toy = {
        "dense": {"all": 1.0}, "power": {"all": 0.7, "reachable": 0.99, "unreachable": 0.12}, "window": {"all": 0.13},
    } | changed  # fmt: skip
    assert length.length_claim(context(tmp_path), [toy] * 3, CRITERIA["recall-at-length"]).verdict == verdict
