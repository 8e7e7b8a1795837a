"""Attribution methods: exact on what is linear, complete where they promise it, blind to padding, without traces."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tests.methods.song_hosts import (
    VOCABULARY,
    Plain,
    classifier,
    decoder,
    example,
    linear,
    reader_of_the_last,
    rectified,
    smooth,
)
from torch import nn

from headway.errors import ArgumentError, NumericError
from headway.methods.diagnosis.song_of_disagreement import (
    METHODS,
    AttentiveLSTM,
    Example,
    HostClassifier,
    NextToken,
    RecurrentClassifier,
    Settings,
    baseline_sensitivity,
    check_operations,
    explain,
    prepare,
    relative_errors,
    usable_methods,
)
from headway.methods.diagnosis.song_of_disagreement.attributions import (
    apply_sign,
    integrated_gradients,
    kept_gradients,
    ridge_weights,
)
from headway.methods.diagnosis.song_of_disagreement.classifier import readout_of

ADDING_UP = ("input_x_gradient", "integrated_gradients", "grad_shap", "deep_lift", "deep_shap")
SIGNED = Settings(sign="signed", masks=300, steps=20)


@pytest.fixture(scope="module")
def bert():
    return classifier()


@pytest.fixture(scope="module")
def lstm():
    torch.manual_seed(0)
    return RecurrentClassifier(AttentiveLSTM(VOCABULARY, width=8, hidden=8).eval(), mask_id=3)


def exact(plain: Plain, given: Example, target: int) -> np.ndarray:
    """(e_t − e_0) · w: what every token adds to a linear output."""
    table = plain.embedding.weight
    return ((table[given.ids] - table[plain.pad_id]) @ plain.network.weight[target]).detach().double().numpy()


def test_on_a_linear_model_all_methods_agree_exactly():
    plain, given = linear(), example()
    found = explain(plain, given, [*ADDING_UP, "ablation"], SIGNED)
    wanted = exact(plain, given, found["ablation"].target)
    for name in (*ADDING_UP[:4], "ablation"):
        np.testing.assert_allclose(found[name].signed, wanted, atol=1e-5, err_msg=name)
        if found[name].error is not None:
            assert abs(found[name].error) < 1e-5


def test_lime_reaches_the_weights_of_a_linear_model():
    plain, given = linear(), example()
    wanted = exact(plain, given, prepare(plain, given, SIGNED).target)
    apart = [
        np.abs(explain(plain, given, ["lime"], Settings(sign="signed", masks=masks, ridge=1.0))["lime"].signed - wanted)
        .max()
        for masks in (30, 300, 3000)
    ]  # fmt: skip
    assert apart[0] > apart[1] > apart[2]
    assert apart[2] < 0.02 * np.abs(wanted).max()
    free = explain(plain, given, ["lime"], Settings(sign="signed", masks=50, ridge=0.0))["lime"].signed
    np.testing.assert_allclose(free, wanted, atol=1e-4)


def test_lime_without_a_penalty_needs_masks():
    with pytest.raises(ArgumentError, match="more masks than tokens"):
        explain(linear(), example(), ["lime"], Settings(masks=4, ridge=0.0))


def test_ridge_weights_solve_the_weighted_problem():
    random = np.random.default_rng(0)
    z, y, w = random.random((40, 3)), random.random(40), random.random(40)
    found = ridge_weights(*(torch.from_numpy(x) for x in (z, y, w)), 0.7).numpy()
    ones = np.c_[np.ones(40), z]
    direct = np.linalg.solve(ones.T @ (w[:, None] * ones) + 0.7 * np.diag([0, 1, 1, 1]), ones.T @ (w * y))
    np.testing.assert_allclose(found, direct[1:], atol=1e-10)


@pytest.mark.parametrize("make", [smooth, classifier])
def test_integrated_gradients_add_up_better_with_steps(make):
    model, given = make(), example()
    errors = [
        abs(explain(model, given, ["integrated_gradients"], Settings(steps=steps))["integrated_gradients"].error)
        for steps in (2, 10, 50)
    ]
    assert errors[0] > errors[1] >= errors[2] - 1e-6
    assert errors[2] < 1e-4


def test_integrated_gradients_do_not_depend_on_the_budget():
    given, model = example(), smooth()
    one, other = (
        explain(model, given, ["integrated_gradients", "ablation", "lime", "grad_shap"], Settings(budget=b, masks=40))
        for b in (9, 4096)
    )
    for name, found in one.items():
        np.testing.assert_allclose(found.scores, other[name].scores, atol=1e-6, err_msg=name)


def test_no_forward_holds_more_than_the_budget(bert, monkeypatch):
    seen = []
    plain = bert.outputs

    def outputs(embeddings, mask):
        seen.append(embeddings.shape[:2].numel())
        return plain(embeddings, mask)

    monkeypatch.setattr(bert, "outputs", outputs)
    names = ["integrated_gradients", "lime", "grad_shap", "ablation"]
    explain(bert, example(10), names, Settings(budget=40, masks=30, steps=11, samples=9))
    assert max(seen) == 40


def test_deep_lift_adds_up_where_its_rules_cover_everything():
    given = example()
    for plain in (rectified(), smooth()):
        assert check_operations(prepare(plain, given, SIGNED)).sound
        found = explain(plain, given, ["deep_lift", "input_x_gradient", "deep_shap"], SIGNED)
        assert abs(found["deep_lift"].error) < 1e-5
        assert abs(found["input_x_gradient"].error) > 1e-3
        assert abs(found["deep_shap"].error) < 1e-5
        assert found["deep_lift"].note == ""


def test_deep_lift_on_a_transformer_is_refused_by_name(bert):
    with pytest.raises(ArgumentError, match="deep_lift") as error:
        explain(bert, example(), ["deep_lift"])
    for name in ("gelu", "native_layer_norm", "scaled_dot_product"):
        assert name in str(error.value)


def test_deep_lift_on_what_it_does_not_cover_says_what_that_costs(bert):
    found = explain(bert, example(), ["deep_lift", "integrated_gradients"], Settings(allow_unsupported=True))
    assert "gelu" in found["deep_lift"].note
    assert abs(found["deep_lift"].error) > 10 * abs(found["integrated_gradients"].error)


def test_an_activation_that_runs_twice_is_refused():
    torch.manual_seed(0)
    shared = nn.ReLU()
    plain = Plain(nn.Sequential(nn.Linear(6, 6), shared, nn.Linear(6, 2), shared))
    with pytest.raises(ArgumentError, match="runs 2 times"):
        explain(plain, example(), ["deep_lift"], Settings(allow_unsupported=True))


def test_a_network_that_reads_two_texts_has_an_activation_for_each():
    torch.manual_seed(0)
    model = RecurrentClassifier(AttentiveLSTM(VOCABULARY, width=8, hidden=8, split=5).eval())
    assert check_operations(prepare(model, example(10), Settings())).repeated == {}
    found = explain(model, example(10), ["deep_lift", "attention_last"], Settings(allow_unsupported=True))
    assert found["attention_last"].scores.sum() == pytest.approx(2)


class Functional(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.linear, self.function = nn.Linear(6, 2), function

    def forward(self, x):
        return self.function(self.linear(x))


@pytest.mark.parametrize(
    ("function", "name"),
    [(torch.relu, "relu"), (lambda x: x.softmax(-1), "softmax"), (lambda x: x * x, "mul of two activations")],
)
def test_functional_activations_and_products_are_refused(function, name):
    with pytest.raises(ArgumentError, match=name):
        explain(Plain(Functional(function)), example(), ["deep_lift"])


def test_a_recurrent_network_is_refused_by_deep_lift_alone(lstm):
    good, refused = usable_methods(lstm, example(), ["attention_last", "integrated_gradients", "deep_lift", "lime"])
    assert good == ["attention_last", "integrated_gradients", "lime"]
    assert "lstm" in refused["deep_lift"].lower()


@pytest.mark.parametrize("kind", ["bert", "lstm"])
def test_padding_has_no_score_and_changes_none(kind, request):
    model = request.getfixturevalue(kind)
    given = example(8)
    names = [name for name, method in METHODS.items() if kind == "bert" or not method.needs_host]
    settings = Settings(allow_unsupported=True, masks=60, steps=8)
    one, padded = explain(model, given, names, settings), explain(model, given.padded(0, 3), names, settings)
    for name in names:
        assert (padded[name].scores[8:] == 0).all(), name
        np.testing.assert_allclose(padded[name].scores[:8], one[name].scores, atol=2e-5, err_msg=name)


def hooks_of(module: nn.Module) -> list:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [list(getattr(inner, kind)) for inner in module.modules() for kind in kinds]


@pytest.mark.parametrize("kind", ["bert", "lstm"])
def test_explaining_leaves_no_trace(kind, request):
    model = request.getfixturevalue(kind)
    if model.host is not None:
        # transformers puts its own hooks for hidden states on a model for good, the first time they are asked for.
        model.hidden(model.embed(example().ids[None]), torch.ones(1, 9, dtype=torch.bool))
    before = {k: v.clone() for k, v in model.module.state_dict().items()}
    hooks = hooks_of(model.module)
    names = [n for n in METHODS if kind == "bert" or n in ("attention_last", "lime", "deep_lift", "grad_shap")]
    found = explain(model, example(), names, Settings(allow_unsupported=True, masks=20, steps=4))
    assert all((one.scores >= 0).all() for one in found.values())
    assert all(torch.equal(v, before[k]) for k, v in model.module.state_dict().items())
    assert hooks_of(model.module) == hooks
    for parameter in model.module.parameters():
        assert parameter.requires_grad
        assert parameter.grad is None


def test_parameters_come_back_as_they_were():
    model = classifier()
    model.host.classifier.bias.requires_grad_(False)
    with kept_gradients(model):
        assert not any(p.requires_grad for p in model.module.parameters())
    assert not model.host.classifier.bias.requires_grad
    assert model.host.classifier.weight.requires_grad


def test_seeds_decide_random_methods_and_no_others(bert):
    names = ["lime", "grad_shap", "integrated_gradients", "attention_rollout"]
    settings = Settings(masks=40, steps=4)
    one, same, other = (explain(bert, example(), names, settings, seed=seed) for seed in (1, 1, 2))
    state = torch.get_rng_state()
    alone = explain(bert, example(), ["grad_shap"], settings, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    np.testing.assert_array_equal(alone["grad_shap"].scores, one["grad_shap"].scores)
    for name in names:
        np.testing.assert_array_equal(one[name].scores, same[name].scores)
        assert METHODS[name].random == (not np.array_equal(one[name].scores, other[name].scores))


def test_the_sign_is_one_choice_for_all():
    signed = np.array([-2.0, 1.0])
    assert apply_sign(signed, "abs").tolist() == [2, 1]
    assert apply_sign(signed, "positive").tolist() == [0, 1]
    assert apply_sign(signed, "signed").tolist() == [-2, 1]
    with pytest.raises(ArgumentError, match="sign"):
        apply_sign(signed, "negative")


def test_baselines_can_be_compared(caplog):
    model = smooth()
    found = baseline_sensitivity(model, example(), integrated_gradients, baselines=("pad", "mask", "mean", "zero"))
    assert len({tuple(e.signed.round(6)) for e in found.values()}) == 4
    with torch.no_grad():
        model.embedding.weight[0] = 0
    with caplog.at_level(logging.WARNING):
        found = baseline_sensitivity(model, example(), integrated_gradients, baselines=("pad", "zero"))
    assert "pad token is zero" in caplog.text
    np.testing.assert_array_equal(found["pad"].signed, found["zero"].signed)


def test_a_baseline_outside_the_vocabulary_is_refused():
    model = smooth()
    model.pad_id = VOCABULARY
    with pytest.raises(ArgumentError, match="outside its vocabulary"):
        prepare(model, example(), Settings())
    model.mask_id = None
    with pytest.raises(ArgumentError, match="mask token is None"):
        prepare(model, example(), Settings(baseline="mask"))


def test_the_explained_class_is_the_predicted_the_gold_or_a_number():
    model, given = smooth(), example(label=1)
    outputs = model.predict([given])[0]
    assert prepare(model, given, Settings()).target == outputs.argmax()
    assert prepare(model, given, Settings(target="gold")).target == 1
    assert prepare(model, given, Settings(target=0)).value == pytest.approx(outputs[0])
    with pytest.raises(ArgumentError, match="without a label"):
        prepare(model, example(), Settings(target="gold"))
    with pytest.raises(ArgumentError, match="class in"):
        prepare(model, given, Settings(target=2))


def test_a_decoder_explains_its_next_token():
    model = NextToken(decoder(), choices=[4, 7, 9])
    found = explain(model, example(7), ["integrated_gradients", "attention_last", "attention_rollout", "lime"])
    assert found["lime"].value == pytest.approx(model.predict([example(7)])[0].max(), abs=1e-5)
    assert found["lime"].value < 0
    assert found["attention_last"].scores.sum() == pytest.approx(1)
    assert abs(found["integrated_gradients"].error) < 1e-2


def test_completeness_is_reported_relative_to_what_there_is_to_explain():
    found = explain(smooth(), example(), ["integrated_gradients", "lime"], Settings(masks=20))
    errors = relative_errors(list(found.values()))
    assert errors.shape == (1,)
    one = found["integrated_gradients"]
    assert errors[0] == pytest.approx(abs(one.error) / max(abs(one.value - one.baseline_value), 0.01))


class Broken(Plain):
    def outputs(self, embeddings, mask):
        return super().outputs(embeddings, mask) * float("nan")


def test_bad_settings_and_models_are_refused():
    for options in (
        {"baseline": "noise"}, {"references": ()}, {"references": ("x",)}, {"sign": "both"}, {"steps": 0},
        {"masks": True}, {"ridge": -1.0}, {"budget": 0}, {"target": "glod"},
    ):  # fmt: skip
        with pytest.raises(ArgumentError, match=next(iter(options))):
            Settings(**options)
    with pytest.raises(NumericError, match="NaN"):
        prepare(Broken(nn.Linear(6, 2)), example(), Settings())
    with pytest.raises(ArgumentError, match="Did you mean 'lime'"):
        explain(smooth(), example(), ["limes"])
    with pytest.raises(ArgumentError, match="each once"):
        explain(smooth(), example(), ["lime", "lime"])
    wrong = example()
    wrong.ids[2] = VOCABULARY
    with pytest.raises(ArgumentError, match="token ids in"):
        prepare(smooth(), wrong, Settings())


@pytest.mark.parametrize("pad", [0, None])
def test_a_decoder_with_classes_is_read_at_its_last_token_whatever_the_padding(pad):
    model, given = HostClassifier(reader_of_the_last(pad), readout="last"), example(8)
    direct = model.host(input_ids=given.ids[None]).logits.softmax(-1)[0].detach()
    assert prepare(model, given, Settings(baseline="zero")).value == pytest.approx(float(direct.max()), abs=1e-5)
    names = ["attention_last", "attention_rollout", "integrated_gradients", "lime", "ablation", "value_zeroing"]
    settings = Settings(baseline="zero", masks=30, steps=8)
    one, padded = explain(model, given, names, settings), explain(model, given.padded(0, 3), names, settings)
    for name in names:
        assert (padded[name].scores[8:] == 0).all(), name
        np.testing.assert_allclose(padded[name].scores[:8], one[name].scores, atol=2e-5, err_msg=name)


def test_what_a_host_reads_is_seen_in_its_gradient():
    ids = example(7).ids[None]
    assert readout_of(classifier().host, ids) == "first"
    assert readout_of(reader_of_the_last(), ids) == "last"
    pooled = reader_of_the_last()
    pooled.forward = lambda inputs_embeds, attention_mask: SimpleNamespace(
        logits=pooled.score(pooled.model(inputs_embeds=inputs_embeds).last_hidden_state.mean(1))
    )
    assert readout_of(pooled, ids) == "mean"
    assert not pooled.model._forward_hooks


@pytest.mark.parametrize("kind", ["bert", "lstm"])
def test_a_model_that_is_being_trained_is_explained_without_dropout(kind, request):
    """The BERT here drops a fifth of its states in training."""
    model = request.getfixturevalue(kind)
    names = [
        n for n, m in METHODS.items() if n not in ("deep_lift", "deep_shap") and (kind == "bert" or not m.needs_host)
    ]
    settings = Settings(masks=20, steps=3)
    still, outputs = explain(model, example(), names, settings), model.predict([example()])
    model.module.train()
    try:
        found = explain(model, example(), names, settings)
        np.testing.assert_array_equal(model.predict([example()]), outputs)
        assert model.module.training
    finally:
        model.module.eval()
    for name in names:
        np.testing.assert_allclose(found[name].signed, still[name].signed, atol=1e-6, err_msg=name)


def test_values_of_shared_heads_weigh_every_query_head():
    """Two query heads share each key-value head of the decoder."""
    host = decoder()
    model, given = NextToken(host), example(7)
    eager = decoder()
    eager.set_attn_implementation("eager")
    values = []
    last = host.model.layers[-1].self_attn.v_proj.register_forward_hook(lambda m, a, out: values.append(out.detach()))
    with torch.no_grad():
        weights = eager(input_ids=given.ids[None], output_attentions=True).attentions[-1][0].double()
        host(input_ids=given.ids[None])
    last.remove()
    length = values[0][0].double().view(7, 2, -1).norm(dim=-1).T.repeat_interleave(2, 0)
    wanted = (weights * length[:, None]).square().sum(0).sqrt()[-1]
    found = explain(model, given, ["attention_values"])["attention_values"].scores
    np.testing.assert_allclose(found, wanted / wanted.sum(), atol=1e-5)


def test_recurrent_layers_go_backward_without_cudnn_and_others_with_it(bert, lstm):
    """In evaluation mode cuDNN keeps nothing that a backward pass of an LSTM needs."""
    before = torch.backends.cudnn.enabled
    with kept_gradients(lstm):
        assert not torch.backends.cudnn.enabled
    with kept_gradients(bert):
        assert torch.backends.cudnn.enabled == before
    assert torch.backends.cudnn.enabled == before
