"""The token-weighted preference loss: DPO at unit weights, exact weights, exact adapters."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from headway.errors import ArgumentError
from headway.hosts.tiny import tiny_host
from headway.methods.diagnosis import diagnose_localize_align as dla
from headway.methods.diagnosis.diagnose_localize_align.preference import constant_reward
from headway.methods.diagnosis.diagnose_localize_align.reference import adapters_off, read_reference
from headway.methods.diagnosis.diagnose_localize_align.training import _Objective, collate

ZERO, ONE = torch.zeros(1, 2), torch.ones(1, 2)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def ratios():
    return random(5, 7).requires_grad_(), random(5, 9, seed=1).requires_grad_()


@pytest.fixture
def model():
    torch.manual_seed(0)
    return tiny_host("llama", max_position_embeddings=64, num_hidden_layers=3)[0].eval()


def pairs(count=6, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def ids(length):
        return torch.randint(5, 60, (length,), generator=generator)

    return [
        dla.PreferencePair(prompt=ids(6 + i % 3), chosen=ids(3 + i % 2), rejected=ids(4), system=(1, 4))
        for i in range(count)
    ]


def stock_dpo(chosen, rejected, beta):
    return -torch.nn.functional.logsigmoid(beta * (chosen.sum(-1) - rejected.sum(-1))).mean()


def test_unit_weights_give_the_loss_and_the_gradient_of_dpo(ratios):
    chosen, rejected = ratios
    ours = dla.preference_loss(chosen, rejected, torch.ones_like(chosen), torch.ones_like(rejected), beta=0.3).loss
    theirs = stock_dpo(chosen, rejected, 0.3)
    assert torch.allclose(ours, theirs, atol=1e-6)
    for a, b in zip(torch.autograd.grad(ours, ratios), torch.autograd.grad(theirs, ratios), strict=True):
        assert torch.allclose(a, b, atol=1e-7)


def test_the_derivative_by_the_margin_is_minus_its_sigmoid():
    margin = torch.tensor([[2.0], [-3.0], [0.5]], requires_grad=True)
    zero, one = torch.zeros(3, 1), torch.ones(3, 1)
    found = dla.preference_loss(margin, zero, one, one, beta=1.0)
    (gradient,) = torch.autograd.grad(found.loss, margin)
    assert torch.allclose(gradient, -torch.sigmoid(-margin) / 3)


def test_without_a_difference_from_the_reference_the_loss_is_ln_2_for_any_weights():
    weights = random(4, 6).abs() * 3
    found = dla.preference_loss(torch.zeros(4, 6), torch.zeros(4, 6), weights, weights.flip(0))
    assert float(found.loss) == pytest.approx(math.log(2), abs=1e-7)


def test_the_order_of_the_batch_does_not_matter(ratios):
    chosen, rejected = (one.detach() for one in ratios)
    up, down = random(5, 7, seed=2).abs(), random(5, 9, seed=3).abs()
    order = torch.tensor([3, 0, 4, 1, 2])
    straight = dla.preference_loss(chosen, rejected, up, down).loss
    mixed = dla.preference_loss(chosen[order], rejected[order], up[order], down[order]).loss
    assert float(straight) == pytest.approx(float(mixed), abs=1e-7)


def test_optimised_and_plain_margins_are_both_told(ratios):
    chosen, rejected = (one.detach() for one in ratios)
    found = dla.preference_loss(chosen, rejected, 2 * torch.ones(5, 7), 2 * torch.ones(5, 9))
    assert torch.allclose(found.margins, 2 * found.plain_margins)
    assert {"margin", "plain_margin", "accuracy"} == set(found.metrics())


def response():
    mask = torch.zeros(3, 8, dtype=torch.bool)
    mask[0, 2:7], mask[1, 3:8], mask[2, 4:5] = True, True, True
    return mask


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_attention_weights_sum_to_the_tokens_and_are_zero_outside(strength):
    weights = dla.attention_weights(random(3, 8).abs(), response(), strength=strength)
    assert torch.allclose(weights.sum(-1), response().sum(-1).float())
    assert bool((weights[~response()] == 0).all())
    assert not weights.requires_grad


def test_attention_weights_follow_the_credit():
    credit = torch.tensor([[0.0, 0.1, 0.2, 0.3]])
    inside = torch.tensor([[False, True, True, True]])
    weights = dla.attention_weights(credit, inside, strength=1.0)
    assert weights[0].tolist() == pytest.approx([0.0, 0.5, 1.0, 1.5])


def test_one_token_cannot_take_everything():
    credit = torch.zeros(1, 20)
    credit[0, 3] = 1.0
    inside = torch.ones(1, 20, dtype=torch.bool)
    weights = dla.attention_weights(credit, inside, strength=0.5, largest=4.0)
    assert float(weights.max() / weights.min()) == pytest.approx(4.0 / 0.5)


def test_no_strength_is_dpo_and_so_is_a_reward_model_equal_to_the_reference():
    uniform = dla.uniform_weights(response())
    assert torch.equal(dla.attention_weights(random(3, 8).abs(), response(), strength=0.0), uniform)
    for side in ("chosen", "rejected"):
        assert torch.equal(dla.reward_weights(torch.zeros(3, 8), response(), side=side), uniform)
        assert torch.equal(dla.reward_weights(random(3, 8), response(), side=side, strength=0.0), uniform)


def test_without_credit_a_response_is_weighed_evenly():
    assert torch.equal(dla.attention_weights(torch.zeros(3, 8), response()), dla.uniform_weights(response()))


def test_reward_weights_have_opposite_signs_on_the_two_sides():
    reward = torch.full((1, 2), 2.0)
    inside = torch.ones(1, 2, dtype=torch.bool)
    up = dla.reward_weights(reward, inside, side="chosen", beta=0.1, strength=0.5)
    assert up[0].tolist() == pytest.approx([1.1, 1.1])
    down = dla.reward_weights(reward, inside, side="rejected", beta=0.1, strength=0.5)
    assert down[0].tolist() == pytest.approx([0.9, 0.9])


def test_negative_reward_weights_are_counted_and_can_be_clipped():
    reward = torch.tensor([[-100.0, 0.0, 0.0, 0.0]])
    inside = torch.ones(1, 4, dtype=torch.bool)
    raw = dla.reward_weights(reward, inside, side="chosen")
    assert dla.negative_share(raw, inside) == 0.25
    clipped = dla.reward_weights(reward, inside, side="chosen", clip=True, rescale=True)
    assert dla.negative_share(clipped, inside) == 0
    assert float(clipped.sum()) == pytest.approx(4.0)


def test_a_constant_reward_scales_all_tokens_alike():
    weights = dla.reward_weights(constant_reward(1.0, response()), response(), side="chosen")
    assert weights[response()].tolist() == pytest.approx([1.05] * 11)


def test_one_weight_for_every_token_is_dpo_at_another_beta():
    chosen, rejected = random(3, 6), random(3, 9)
    for weight in (1.0, 2.5):
        found = dla.preference_loss(
            chosen, rejected, torch.full_like(chosen, weight), torch.full_like(rejected, weight), beta=0.2
        )
        plain = -torch.nn.functional.logsigmoid(0.2 * weight * (chosen.sum(-1) - rejected.sum(-1))).mean()
        assert float(found.loss) == pytest.approx(float(plain), abs=1e-6)
    none = constant_reward(0.0, response())
    for side in ("chosen", "rejected"):
        assert torch.equal(dla.reward_weights(none, response(), side=side), dla.uniform_weights(response()))


def test_token_logps_stand_at_their_token():
    logits = random(2, 5, 11)
    ids = torch.randint(0, 11, (2, 5), generator=torch.Generator().manual_seed(4))
    inside = torch.zeros(2, 5, dtype=torch.bool)
    inside[:, 3:] = True
    found = dla.token_logps(logits, ids, inside)
    assert float(found[1, 4]) == pytest.approx(float(logits[1, 3].log_softmax(-1)[ids[1, 4]]), abs=1e-6)
    assert bool((found[:, :3] == 0).all())


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: dla.preference_loss(ZERO, ZERO, torch.ones(1, 3), ONE), "one weight"),
        (lambda: dla.preference_loss(ZERO, torch.zeros(2, 2), ONE, torch.ones(2, 2)), "one of each"),
        (lambda: dla.preference_loss(ZERO, ZERO, torch.ones(1, 2, requires_grad=True), ONE), "detach"),
        (lambda: dla.preference_loss(ZERO, ZERO, ONE, ONE, beta=0.0), "beta"),
        (lambda: dla.attention_weights(torch.zeros(3, 8), response(), strength=2.0), r"\[0, 1\]"),
        (lambda: dla.attention_weights(-torch.ones(3, 8), response()), "negative"),
        (lambda: dla.reward_weights(torch.zeros(3, 8), response(), side="left"), "side"),
        (lambda: dla.reward_weights(torch.zeros(3, 8), response(), side="chosen", rescale=True), "clip=True"),
        (lambda: dla.token_logps(torch.zeros(1, 2, 3), torch.zeros(1, 2).long(), torch.ones(1, 2).bool()), "token 0"),
        (lambda: dla.AlignSettings(weights="nothing"), "weights"),
        (lambda: dla.AlignSettings(prompt_cap=10, cutoff=10), "prompt_cap"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_refused(call, words):
    with pytest.raises(ArgumentError, match=words):
        call()


def test_only_the_projections_of_the_layers_are_trained(model):
    pytest.importorskip("peft")
    names = [f"model.layers.1.self_attn.{p}" for p in ("q_proj", "k_proj", "v_proj", "o_proj")]
    sizes = {name: model.get_submodule(name).weight.shape for name in names}
    adapted = dla.add_lora(model, "1", rank=4)
    assert adapted.modules == tuple(names)
    assert adapted.trainable == sum(4 * (rows + columns) for rows, columns in sizes.values())
    trained = {name for name, p in adapted.model.named_parameters() if p.requires_grad}
    assert len(trained) == 8
    assert all("layers.1.self_attn" in name for name in trained)


def test_adapters_start_as_the_base_and_off_they_are_the_base_after_training(model):
    pytest.importorskip("peft")
    ids = torch.randint(5, 60, (2, 9), generator=torch.Generator().manual_seed(5))
    before = model(input_ids=ids).logits.detach().clone()
    frozen = {name: p.detach().clone() for name, p in model.named_parameters()}
    adapted = dla.add_lora(model, [0, 2])
    assert torch.equal(adapted.model(input_ids=ids).logits, before)
    settings = dla.AlignSettings(weights="attention", steps=2, accumulate=2, learning_rate=1e-2)
    found = dla.align(adapted.model, pairs(), settings, heads=[(0, 1), (2, 0)])
    assert found.trained.losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert not torch.equal(adapted.model(input_ids=ids).logits, before)
    with adapters_off(adapted.model):
        assert torch.equal(adapted.model(input_ids=ids).logits, before)
    for name, p in adapted.model.get_base_model().named_parameters():
        if "lora" not in name:
            assert torch.equal(p, frozen[name.replace(".base_layer", "")]), name


@pytest.mark.parametrize("mode", ["uniform", "attention", "reward", "constant"])
def test_training_prefers_the_chosen_answers(model, mode):
    torch.manual_seed(1)
    teacher = tiny_host("llama", max_position_embeddings=64)[0].eval() if mode == "reward" else None
    settings = dla.AlignSettings(weights=mode, steps=12, accumulate=2, batch=2, learning_rate=3e-3, warmup=0.0)
    found = dla.align(model, pairs(), settings, heads=[(1, 0)], reward_model=teacher)
    assert found.trained.losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert found.trained.losses[-1] < 0.6
    assert found.trained.column("plain_margin")[-1] > 0
    assert not model.training


def test_credit_is_the_attention_of_focal_heads_to_the_rule(model):
    pair = pairs(1)[0]
    (found,) = read_reference(model, [pair], dla.AlignSettings(strength=1.0), heads=[(1, 2), (2, 1)])
    ids = torch.cat([pair.prompt, pair.chosen])[None]
    model.set_attn_implementation("eager")
    maps = model(input_ids=ids, output_attentions=True).attentions
    rows = slice(pair.prompt.numel() - 1, ids.shape[1] - 1)
    credit = (maps[1][0, 2, rows, 1:4].sum(-1) + maps[2][0, 1, rows, 1:4].sum(-1)) / 2
    expected = dla.attention_weights(credit[None], torch.ones(1, pair.chosen.numel()).bool(), strength=1.0)[0]
    assert torch.allclose(found.weights[0], expected, atol=1e-5)


@pytest.mark.parametrize(("heads", "words"), [([(1, 9)], "heads of layer 1: got 9"), ([(1, -1)], "got -1")])
def test_heads_that_are_not_there_are_named(model, heads, words):
    with pytest.raises(ArgumentError, match=words):
        read_reference(model, pairs(1), dla.AlignSettings(), heads=heads)


def answer_logps(model, prompt, answer):
    with torch.no_grad():
        scores = model(input_ids=torch.cat([prompt, answer])[None]).logits[0, prompt.numel() - 1 : -1].log_softmax(-1)
    return scores.gather(-1, answer[:, None])[:, 0]


def test_rewards_are_what_the_reward_model_adds_to_the_reference(model):
    """w⁺ = 1 + aβ (log π_R − log π_ref) by token of the chosen answer, w⁻ with the other sign."""
    teacher = tiny_host("llama", max_position_embeddings=64, num_hidden_layers=3, seed=3)[0].eval()
    settings = dla.AlignSettings(weights="reward", beta=0.2, strength=0.7)
    pair = pairs(1)[0]
    (found,) = read_reference(model, [pair], settings, reward_model=teacher)
    for weights, answer, sign in zip(found.weights, (pair.chosen, pair.rejected), (1, -1), strict=True):
        reward = answer_logps(teacher, pair.prompt, answer) - answer_logps(model, pair.prompt, answer)
        assert reward.abs().max() > 0.1
        assert torch.allclose(weights, 1 + sign * 0.7 * 0.2 * reward, atol=1e-5)
    (same,) = read_reference(model, [pair], settings, reward_model=model)
    assert all(torch.equal(side, torch.ones_like(side)) for side in same.weights)


def test_a_batch_is_its_pairs_whatever_their_length(model):
    """Loss and gradient of padded pairs are the mean of those of each pair alone."""
    given = pairs(3)
    assert len({p.prompt.numel() + p.chosen.numel() for p in given}) > 1
    policy = tiny_host("llama", max_position_embeddings=64, num_hidden_layers=3, seed=5)[0].eval()
    references = read_reference(model, given, dla.AlignSettings(strength=1.0), heads=[(1, 0)])

    def loss_of(rows):
        policy.zero_grad()
        batch = collate([given[i] for i in rows], [references[i] for i in rows])
        found = _Objective(0.3)(policy, batch)
        found.value.backward()
        return float(found.value.detach()), policy.model.layers[1].self_attn.q_proj.weight.grad.clone()

    alone = [loss_of([i]) for i in range(3)]
    loss, gradient = loss_of([0, 1, 2])
    assert loss != pytest.approx(math.log(2), abs=1e-3)
    assert loss == pytest.approx(sum(one for one, _ in alone) / 3, abs=1e-6)
    assert torch.allclose(gradient, sum(one for _, one in alone) / 3, atol=1e-6)


def test_a_batch_has_weights_on_answers_alone(model):
    given = pairs(3)
    references = read_reference(model, given, dla.AlignSettings(), heads=[(1, 0)])
    batch = collate(given, references)
    assert bool((batch["weights"][~batch["response"]] == 0).all())
    assert batch["weights"].sum(-1).tolist() == pytest.approx(batch["response"].sum(-1).tolist(), abs=1e-4)
    assert batch["response"].sum(-1).tolist() == [p.chosen.numel() for p in given] + [p.rejected.numel() for p in given]


@pytest.mark.parametrize("alpha", [0.5, 16])
def test_lora_scales_by_alpha_over_rank_also_when_alpha_is_no_whole_number(model, alpha):
    pytest.importorskip("peft")
    ids = torch.arange(5, 12)[None]
    plain = model.model.layers[1].self_attn.q_proj.weight.detach().clone()
    adapted = dla.add_lora(model, "1", rank=4, alpha=alpha)
    layer = adapted.model.get_base_model().model.layers[1].self_attn.q_proj
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_(generator=torch.Generator().manual_seed(0))
        states = torch.randn(1, 7, plain.shape[1], generator=torch.Generator().manual_seed(1))
        added = states @ layer.lora_A["default"].weight.T @ layer.lora_B["default"].weight.T
        assert torch.allclose(layer(states) - states @ plain.T, alpha / 4 * added, atol=1e-5)
        assert torch.isfinite(adapted.model(input_ids=ids).logits).all()


@pytest.mark.parametrize("options", [{"alpha": 0.0}, {"alpha": math.nan}, {"dropout": 1.0}, {"dropout": -0.1}])
def test_sizes_of_adapters_that_cannot_be_are_refused(model, options):
    with pytest.raises(ArgumentError, match=next(iter(options))):
        dla.add_lora(model, "1", **options)


def test_useless_pairs_are_dropped_with_a_count_and_a_warning(caplog):
    good = pairs(3)
    same = dla.PreferencePair(prompt=good[0].prompt, chosen=good[0].chosen, rejected=good[0].chosen, system=(0, 2))
    empty = dla.PreferencePair(
        prompt=good[0].prompt, chosen=good[0].chosen, rejected=torch.zeros(0).long(), system=(0, 2)
    )
    found = dla.prepare_pairs([*good, same, empty])
    assert len(found.pairs) == 3
    assert found.dropped == {"chosen and rejected are the same": 1, "an answer has no token": 1}
    assert "2 of 5 preference pairs were dropped" in caplog.text


@pytest.mark.parametrize(("good", "warned"), [(19, False), (18, True)])
def test_useless_pairs_are_warned_about_above_5_percent_alone(caplog, good, warned):
    given = pairs(good)
    same = dla.PreferencePair(prompt=given[0].prompt, chosen=given[0].chosen, rejected=given[0].chosen, system=(0, 2))
    found = dla.prepare_pairs([*given, same])
    assert len(found.pairs) == good
    assert found.dropped == {"chosen and rejected are the same": 1}
    assert (f"1 of {good + 1} preference pairs were dropped" in caplog.text) is warned
    assert bool(caplog.records) is warned


def test_a_prompt_that_leaves_nothing_is_dropped_with_a_count_beside_good_pairs(caplog):
    good = pairs(3)
    long = dla.PreferencePair(prompt=torch.arange(30), chosen=torch.arange(3), rejected=torch.arange(4), system=(2, 25))
    found = dla.prepare_pairs([good[0], long, *good[1:], long], prompt_cap=10, cutoff=16)
    assert found.dropped == {"the rule alone is longer than prompt_cap": 2}
    assert [one.prompt.tolist() for one in found.pairs] == [one.prompt.tolist() for one in good]
    assert "2 of 5 preference pairs were dropped" in caplog.text


def test_a_run_tells_the_share_of_negative_weights_and_what_was_dropped(model):
    torch.manual_seed(1)
    teacher = tiny_host("llama", max_position_embeddings=64)[0].eval()
    with torch.no_grad():
        teacher.get_output_embeddings().weight *= 200
    good = pairs(4)
    same = dla.PreferencePair(prompt=good[0].prompt, chosen=good[0].chosen, rejected=good[0].chosen, system=(0, 2))
    settings = dla.AlignSettings(weights="reward", strength=1.0, beta=0.5, steps=1, accumulate=1, learning_rate=1e-4)
    references = read_reference(model, good, settings, reward_model=teacher)
    weights = torch.cat([side for one in references for side in one.weights])
    assert 0 < int((weights < 0).sum()) < weights.numel()
    found = dla.align(model, [*good, same], settings, reward_model=teacher)
    assert found.negative_share == pytest.approx(float((weights < 0).float().mean()))
    assert found.dropped == {"chosen and rejected are the same": 1}
    clipped = dla.align(model, good, replace(settings, clip_negative=True), reward_model=teacher)
    assert clipped.negative_share == 0
    assert dla.align(model, good, replace(settings, weights="uniform")).negative_share == 0


def test_a_long_prompt_keeps_the_rule_and_its_end():
    pair = dla.PreferencePair(
        prompt=torch.arange(30), chosen=torch.arange(40, 50), rejected=torch.arange(50, 60), system=(2, 5)
    )
    (cut,) = dla.prepare_pairs([pair], prompt_cap=10, cutoff=16).pairs
    assert cut.prompt.tolist() == [0, 1, 2, 3, 4, 25, 26, 27, 28, 29]
    assert cut.chosen.numel() == 6


def test_prompts_that_leave_nothing_are_an_error():
    pair = dla.PreferencePair(prompt=torch.arange(30), chosen=torch.arange(3), rejected=torch.arange(4), system=(2, 25))
    with pytest.raises(ArgumentError, match="rule alone is longer"):
        dla.prepare_pairs([pair], prompt_cap=10, cutoff=16)
    with pytest.raises(ArgumentError, match="span"):
        dla.PreferencePair(prompt=torch.arange(3), chosen=torch.arange(3), rejected=torch.arange(4), system=(2, 25))


def test_best_and_worst_reply_make_a_pair_only_when_they_differ_enough():
    replies = [torch.tensor([i]) for i in range(4)]
    best, worst = dla.choose_pair(replies, [2.0, 4.0, 3.0, 1.5])
    assert (int(best), int(worst)) == (1, 3)
    assert dla.choose_pair(replies, [2.0, 2.2, 2.1, 2.4]) is None
    with pytest.raises(ArgumentError, match="as many"):
        dla.choose_pair(replies, [1.0])


@pytest.mark.parametrize(
    ("text", "layers"), [("1", [1]), ("0-2", [0, 1, 2]), (" 2 , 0-1 ", [0, 1, 2]), ("19-23,24,25", [*range(19, 26)])]
)
def test_layer_specifications_hold_both_ends(text, layers):
    assert dla.parse_layers(text, 30) == layers


@pytest.mark.parametrize("text", ["", "3-1", "7", "0-7", "a", "1,,2", "-1"])
def test_a_wrong_layer_specification_lists_what_is_valid(text):
    with pytest.raises(ArgumentError, match=r"0\.\.2"):
        dla.parse_layers(text, 3)


def test_a_model_without_such_projections_names_those_it_has():
    model = tiny_host("gpt2")[0]
    with pytest.raises(ArgumentError, match=r"c_attn.*c_proj"):
        dla.projection_names(model, [0])
    names = dla.projection_names(model, [0], projections=("c_attn", "c_proj"))
    assert names == ("transformer.h.0.attn.c_attn", "transformer.h.0.attn.c_proj")
    adapted = dla.add_lora(model, [0], projections=("c_attn",), rank=2)
    assert adapted.trainable > 0


def test_missing_sources_of_weights_are_named(model):
    with pytest.raises(ArgumentError, match="focal heads"):
        dla.align(model, pairs(2), dla.AlignSettings(weights="attention"))
    with pytest.raises(ArgumentError, match="reward_model"):
        dla.align(model, pairs(2), dla.AlignSettings(weights="reward"))


def test_layers_that_are_not_there_are_named(model):
    for layers in ([7], [], "5"):
        with pytest.raises(ArgumentError, match="layers"):
            dla.projection_names(model, layers)
