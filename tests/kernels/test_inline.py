"""Attention through features: linear forms against explicit weights, and what the two rules promise."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode

from headway.errors import ArgumentError
from headway.kernels.feature_rules import FEATURES, INLINE, LINEAR, NON_NEGATIVE, Rule, feature_map, feature_weights
from headway.kernels.inline import causal_feature_attention, empty_sums, feature_attention, inline_attention
from headway.kernels.weighing import Weighing

RULES = [
    *(Rule(feature=name) for name in FEATURES),
    *(Rule(normaliser="divisive", feature=name) for name in NON_NEGATIVE),
]
DOUBLE = {"rtol": 1e-9, "atol": 1e-9}


def draw(seed=0, batch=2, heads=3, tokens=23, dim=5, value_dim=4, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    sizes = (dim, dim, value_dim)
    return [torch.randn(batch, heads, tokens, size, dtype=dtype, generator=generator) for size in sizes]


def named(rule):
    return rule.name


@pytest.mark.parametrize("rule", RULES, ids=named)
def test_the_linear_form_is_the_explicit_one(rule):
    query, key, value = draw()
    torch.testing.assert_close(
        feature_attention(query, key, value, rule=rule),
        feature_attention(query, key, value, rule=rule, mode="reference"),
        **DOUBLE,
    )


def test_the_weights_are_those_of_the_equation():
    query, key, _ = draw(batch=1, heads=1, tokens=7)
    products = (query @ key.transpose(-1, -2)) / 5**0.5
    written = products / 7 - products.sum(-1, keepdim=True) / 49 + 1 / 7
    torch.testing.assert_close(feature_weights(query, key), written, **DOUBLE)


def test_a_scale_of_the_number_of_keys_is_the_equation_of_the_paper():
    query, key, _ = draw()
    products = query @ key.transpose(-1, -2)
    written = products - products.mean(-1, keepdim=True) + 1 / 23
    torch.testing.assert_close(feature_weights(query, key, rule=Rule(scale=23.0)), written, **DOUBLE)


def test_the_scale_is_that_of_the_products():
    query, key, value = draw()
    torch.testing.assert_close(
        inline_attention(query, key, value, scale=3.0), inline_attention(3.0 * query, key, value, scale=1.0), **DOUBLE
    )


@pytest.mark.parametrize("rule", RULES, ids=named)
def test_rows_sum_to_one(rule):
    query, key, _ = draw()
    assert torch.allclose(feature_weights(query, key, rule=rule).sum(-1), torch.ones(1, dtype=torch.float64))


def test_subtractive_weights_may_be_negative():
    query, key, _ = draw()
    assert float(feature_weights(10 * query, key).min()) < -0.1


@pytest.mark.parametrize("rule", RULES, ids=named)
def test_a_query_without_features_averages(rule):
    query, key, value = draw()
    if rule.feature in ("exp", "elu_plus_one"):
        key = key[:, :, :1].expand_as(key)
    nothing = torch.zeros_like(query)
    mean = value.mean(2, keepdim=True).expand_as(value)
    torch.testing.assert_close(feature_attention(nothing, key, value, rule=rule), mean, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rule", RULES, ids=named)
def test_keys_that_are_all_the_same_average(rule):
    query, key, value = draw()
    mean = value.mean(2, keepdim=True).expand_as(value)
    output = feature_attention(query, key[:, :, :1].expand_as(key), value, rule=rule)
    torch.testing.assert_close(output, mean, **DOUBLE)


@pytest.mark.parametrize("rule", RULES, ids=named)
def test_a_constant_value_stays(rule):
    query, key, value = draw()
    constant = value[:, :, :1].expand_as(value)
    torch.testing.assert_close(feature_attention(query, key, constant, rule=rule), constant, **DOUBLE)


@pytest.mark.parametrize("rule", RULES, ids=named)
def test_a_single_token_gives_its_value(rule):
    query, key, value = draw(tokens=1)
    torch.testing.assert_close(feature_attention(query, key, value, rule=rule), value, **DOUBLE)


def test_order_does_not_matter():
    query, key, value = draw()
    order = torch.randperm(23, generator=torch.Generator().manual_seed(1))
    moved = feature_attention(*(x[:, :, order] for x in (query, key, value)))
    torch.testing.assert_close(moved, feature_attention(query, key, value)[:, :, order], **DOUBLE)


@pytest.mark.parametrize("factor", [-2.0, 0.5, 3.0])
def test_rows_are_affine_in_the_query(factor):
    query, key, _ = draw()
    centred = feature_weights(query, key) - 1 / 23
    torch.testing.assert_close(feature_weights(factor * query, key) - 1 / 23, factor * centred, **DOUBLE)


def test_queries_on_one_ray_get_one_row_by_division_and_two_by_subtraction():
    query, key, _ = draw()

    def change(rule):
        rows = [feature_weights(q, key, rule=rule) for q in (query, 2 * query)]
        return float((rows[0] - rows[1]).abs().amax())

    assert change(Rule(normaliser="divisive", feature="relu", epsilon=1e-12)) < 1e-10
    assert change(Rule(feature="relu")) > 0.1
    assert change(INLINE) > 0.1


def test_queries_can_attend_over_other_keys():
    query = draw(seed=1, tokens=4)[0]
    _, key, value = draw()
    torch.testing.assert_close(feature_attention(query, key, value), feature_weights(query, key) @ value, **DOUBLE)


@pytest.mark.parametrize("rule", [INLINE, LINEAR], ids=named)
@pytest.mark.parametrize("mode", ["block", "reference"])
def test_masked_keys_have_no_influence(rule, mode):
    query, key, value = draw()
    mask = torch.rand(2, 23, generator=torch.Generator().manual_seed(2)) > 0.4
    poisoned = [torch.where(mask[:, None, :, None], x, torch.nan) for x in (key, value)]
    output = feature_attention(query, *poisoned, rule=rule, mask=mask, mode=mode)
    for row in range(2):
        alone = [x[row : row + 1][:, :, mask[row]] for x in (key, value)]
        expected = feature_attention(query[row : row + 1], *alone, rule=rule)
        torch.testing.assert_close(output[row : row + 1], expected, **DOUBLE)


@pytest.mark.parametrize("rule", [INLINE, LINEAR], ids=named)
def test_nothing_to_read_gives_zero(rule):
    query, key, value = draw(batch=1)
    mask = torch.zeros(1, 23, dtype=torch.bool)
    assert torch.equal(feature_attention(query, key, value, rule=rule, mask=mask), torch.zeros_like(value))


@pytest.mark.parametrize("rule", RULES, ids=named)
@pytest.mark.parametrize("mode", ["block", "step", "reference"])
def test_causal_forms_are_explicit_causal_weights(rule, mode):
    query, key, value = draw()
    visible = torch.ones(23, 23, dtype=torch.bool).tril()[None, None]
    explicit = feature_weights(query, key, rule=rule, visible=visible) @ value
    output, _ = causal_feature_attention(query, key, value, rule=rule, mode=mode, block=4)
    torch.testing.assert_close(output, explicit, **DOUBLE)


def test_the_causal_form_is_that_of_running_sums():
    query, key, value = draw(batch=1, heads=1)
    counts = torch.arange(1, 24, dtype=torch.float64)[:, None]
    q, k, v = (x[0, 0] for x in (query, key, value))
    matrices = (k[:, :, None] * v[:, None, :]).cumsum(0)
    keys, values = k.cumsum(0), v.cumsum(0)
    scale = 5**-0.5
    read = torch.einsum("nd,nde->ne", q, matrices)
    written = scale / counts * read - scale / counts**2 * (q * keys).sum(-1, keepdim=True) * values + values / counts
    torch.testing.assert_close(inline_attention(query, key, value, causal=True)[0, 0], written, **DOUBLE)


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(1, 30),
    cut=st.integers(0, 30),
    block=st.integers(1, 9),
    seed=st.integers(0, 10_000),
    masked=st.booleans(),
    packed=st.booleans(),
    divisive=st.booleans(),
    mode=st.sampled_from(["block", "reference", "step"]),
)
def test_any_split_with_carried_sums_is_one_call(tokens, cut, block, seed, masked, packed, divisive, mode):
    query, key, value = draw(seed=seed, tokens=tokens)
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(2, tokens, generator=generator) > 0.3 if masked else None
    resets = torch.rand(2, tokens, generator=generator) > 0.8 if packed else None
    rule, cut = (LINEAR if divisive else INLINE), min(cut, tokens)
    whole, end = causal_feature_attention(query, key, value, rule=rule, mask=mask, resets=resets, mode="step")
    sums, outputs = None, []
    for part in (slice(0, cut), slice(cut, tokens)):
        output, sums = causal_feature_attention(
            *(x[:, :, part] for x in (query, key, value)),
            rule=rule,
            mask=None if mask is None else mask[:, part],
            resets=None if resets is None else resets[:, part],
            sums=sums,
            block=block,
            mode=mode,
        )
        outputs.append(output)
    torch.testing.assert_close(torch.cat(outputs, 2), whole, **DOUBLE)
    torch.testing.assert_close(sums, end, **DOUBLE)


@pytest.mark.parametrize("mode", ["block", "reference", "step"])
def test_packed_documents_are_separate_ones(mode):
    query, key, value = draw(batch=1)
    resets = torch.zeros(1, 23, dtype=torch.bool)
    resets[0, [0, 6, 7, 15]] = True
    packed, sums = causal_feature_attention(query, key, value, resets=resets, block=4, mode=mode)
    parts = [slice(0, 6), slice(6, 7), slice(7, 15), slice(15, 23)]
    alone = [causal_feature_attention(*(x[:, :, part] for x in (query, key, value))) for part in parts]
    torch.testing.assert_close(packed, torch.cat([output for output, _ in alone], 2), **DOUBLE)
    torch.testing.assert_close(sums, alone[-1][1], **DOUBLE)


@pytest.mark.parametrize("mode", ["block", "reference", "step"])
def test_a_masked_token_leaves_the_sums_alone_and_gives_zero(mode):
    query, key, value = draw(batch=1)
    mask = torch.ones(1, 23, dtype=torch.bool)
    mask[0, [0, 1, 9, 22]] = False
    poisoned = [torch.where(mask[:, None, :, None], x, torch.nan) for x in (query, key, value)]
    resets = ~mask
    output, sums = causal_feature_attention(*poisoned, mask=mask, resets=resets, block=4, mode=mode)
    kept, alone = causal_feature_attention(*(x[:, :, mask[0]] for x in (query, key, value)))
    torch.testing.assert_close(output[:, :, mask[0]], kept, **DOUBLE)
    torch.testing.assert_close(sums, alone, **DOUBLE)
    assert torch.equal(output[:, :, ~mask[0]], torch.zeros_like(output[:, :, ~mask[0]]))


def test_no_row_reads_the_future():
    query, key, value = draw()
    changed = [x.clone() for x in (query, key, value)]
    for x in changed:
        x[:, :, 12:] += 1
    before, after = (causal_feature_attention(*x, block=4)[0] for x in ((query, key, value), changed))
    torch.testing.assert_close(before[:, :, :12], after[:, :, :12], **DOUBLE)


@pytest.mark.parametrize("mode", ["block", "reference", "step"])
@pytest.mark.parametrize("rule", [INLINE, Rule(normaliser="divisive", feature="exp")], ids=named)
def test_gradients_are_those_of_finite_differences(mode, rule):
    query, key, value = (x.requires_grad_() for x in draw(batch=1, heads=1, tokens=5, dim=2, value_dim=2))
    sums = torch.randn(1, 1, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).abs()
    sums[..., -1, -1] = 4.0
    sums.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda q, k, v, s: causal_feature_attention(q, k, v, rule=rule, sums=s, block=2, mode=mode),
        (query, key, value, sums),
    )


def test_the_sums_keep_their_size_and_the_given_ones_are_not_changed():
    query, key, value = draw()
    start = empty_sums(2, 3, 5, 4, dtype=torch.float64)
    _, after = causal_feature_attention(query, key, value, sums=start)
    assert after.shape == start.shape
    assert not start.any()
    torch.testing.assert_close(after[..., -1, -1], torch.full((2, 3), 23.0, dtype=torch.float64))
    torch.testing.assert_close(after[..., -1, :-1], value.sum(2), **DOUBLE)
    torch.testing.assert_close(after[..., :-1, -1], key.sum(2), **DOUBLE)


@pytest.mark.parametrize("mode", ["block", "step", "reference"])
def test_an_empty_piece_is_no_step(mode):
    query, key, value = draw(tokens=0)
    start = torch.rand(2, 3, 6, 5, dtype=torch.float64)
    output, after = causal_feature_attention(query, key, value, sums=start, mode=mode)
    assert output.shape == (2, 3, 0, 4)
    assert torch.equal(after, start)


class _Largest(TorchFunctionMode):
    """The largest tensor that any operation returns."""

    def __init__(self):
        self.elements = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.elements = max(self.elements, result.numel())
        return result


@pytest.mark.parametrize("causal", [False, True])
def test_no_square_of_the_tokens_is_ever_made(causal):
    query, key, value = draw(batch=1, heads=1, tokens=2048, dim=8, value_dim=8, dtype=torch.float32)
    with _Largest() as seen:
        inline_attention(query, key, value, causal=causal)
    assert 0 < seen.elements <= 2048 * 64


@pytest.mark.parametrize("rule", RULES, ids=named)
@pytest.mark.parametrize("causal", [False, True])
def test_gradients_stay_finite_where_all_features_are_zero(rule, causal):
    query, key, value = (x.float().requires_grad_() for x in draw())
    function = causal_feature_attention if causal else feature_attention
    output = function(-100 * query.abs(), key, value, rule=rule)
    output = output[0] if causal else output
    output.square().sum().backward()
    for x in (output, query.grad, key.grad, value.grad):
        assert torch.isfinite(x).all()


def test_the_exponential_map_does_not_overflow():
    query, key, value = (1e4 * x.float() for x in draw())
    rule = Rule(feature="exp")
    assert torch.isfinite(feature_attention(query, key, value, rule=rule)).all()
    assert torch.isfinite(causal_feature_attention(query, key, value, rule=rule)[0]).all()
    assert float(feature_map(torch.tensor(1e4), "exp")) == pytest.approx(2.718281828**20, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("causal", [False, True])
def test_half_precision_sums_in_float32(dtype, causal):
    query, key, value = (x.to(dtype) for x in draw(batch=1, heads=1, tokens=4096, dim=8, value_dim=8))
    low = inline_attention(query, 8 * key, 8 * value, causal=causal)
    exact = inline_attention(*(x.double() for x in (query, 8 * key, 8 * value)), causal=causal)
    assert low.dtype == dtype
    torch.testing.assert_close(low.double(), exact, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("mode", ["block", "reference"])
@pytest.mark.parametrize("causal", [False, True])
def test_autocast_does_not_narrow_the_sums(causal, mode):
    query, key, value = (x.float() for x in draw())
    plain = inline_attention(query, key, value, causal=causal, mode=mode)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = inline_attention(query, key, value, causal=causal, mode=mode)
        weights = feature_weights(query, key)
    assert torch.equal(plain, cast)
    assert torch.equal(weights, feature_weights(query, key))


def test_a_rule_is_a_weighing():
    query, key, _ = draw()
    for rule in RULES:
        assert isinstance(rule, Weighing)
        visible = torch.rand(1, 1, 23, 23, generator=torch.Generator().manual_seed(4)) > 0.3
        logits = (query @ key.transpose(-1, -2) * rule.scale_for(5)).masked_fill(~visible, torch.nan)
        weights = rule(logits, visible, positions=torch.arange(23), query=query, key=key)
        torch.testing.assert_close(weights, feature_weights(query, key, rule=rule, visible=visible), **DOUBLE)
        assert not weights[~visible.expand_as(weights)].any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Rule(feature="softmax"), "feature: got 'softmax'"),
        (lambda: Rule(normaliser="division"), "Did you mean 'divisive'"),
        (lambda: Rule(normaliser="divisive", feature="identity"), "cross zero"),
        (lambda: Rule(normaliser="divisive", feature="relu", epsilon=0.0), "epsilon: got 0"),
        (lambda: Rule(scale=-1.0), "scale: got -1"),
        (lambda: feature_map(torch.ones(1), "gelu"), "feature: got 'gelu'"),
    ],
)
def test_rules_that_cannot_be_are_refused(make, message):
    with pytest.raises(ArgumentError, match=message):
        make()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.zeros(2, 3, 23, 6)}, "query: got shape"),
        ({"query": torch.zeros(3, 23, 5)}, "query: got shape"),
        ({"value": torch.zeros(2, 3, 22, 4)}, "value: got shape"),
        ({"mask": torch.ones(2, 23)}, "mask: got torch.float32"),
        ({"mask": torch.ones(2, 22, dtype=torch.bool)}, "mask: got shape"),
        ({"resets": torch.ones(1, 23, dtype=torch.bool)}, "resets: got shape"),
        ({"sums": torch.zeros(2, 3, 5, 4)}, "sums: got shape"),
        ({"mode": "fast"}, "mode: got 'fast'"),
        ({"block": 0}, "block: got 0"),
        ({"query": torch.zeros(2, 3, 4, 5)}, "got 23 tokens for 4 queries"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change, message):
    query, key, value = draw(dtype=torch.float32)
    with pytest.raises(ArgumentError, match=message):
        causal_feature_attention(**{"query": query, "key": key, "value": value, **change})


def test_a_step_needs_the_causal_form():
    with pytest.raises(ArgumentError, match="mode: got 'step'"):
        feature_attention(*draw(), mode="step")
