"""Normalisers: their values by definition, their limits, and what all of them share."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.errors import ArgumentError
from headway.kernels.normalizers import (
    AffineScaled,
    Clipped,
    Elastic,
    KeySlot,
    KeyValueSlot,
    LearnedDenominator,
    Operation,
    SoftmaxPlusOne,
    ValueBias,
    explicit_attention,
    make_normalizer,
    normalizers,
)
from headway.kernels.normalizers.operation import visible_mean
from headway.kernels.normalizers.similarity import recurrent_kernel_attention
from headway.kernels.normalizers.softmax_family import clipped_weights, softmax_weights
from headway.kernels.normalizers.unnormalised import elu_weights, sigmoid_weights, softpick_weights
from headway.kernels.weighing import Weighing

SHAPE = {"width": 12, "heads": 4, "kv_heads": 2, "head_dim": 6}
NAMES = sorted(normalizers())
#: Every name, and options that are another rule.
VARIANTS = [(name, {}) for name in NAMES] + [
    ("sigmoid", {"scaling": "sum"}),
    ("sigmoid", {"scaling": "count"}),
    ("sigmoid", {"scaling": "log_count"}),
    ("elu", {"normalise": True}),
    ("kernel_elu", {"normalise": True}),
    ("kernel_identity", {"normalise": True}),
    ("kernel_mlp", {"normalise": True}),
    ("elastic", {"form": "temperature"}),
    ("key_slot", {"shared": True}),
    ("key_value_slot", {"fixed_value": 3.0}),
    ("affine", {"count": "length", "length": 9}),
    ("affine", {"activation": "sigmoid", "mean": "layer"}),
    ("affine", {"shift": False}),
]
ids = [f"{name}{options or ''}" for name, options in VARIANTS]


def build(name, dtype=torch.float64, seed=0, **options):
    torch.manual_seed(seed)
    normalizer = make_normalizer(name, **{**SHAPE, **options}).to(dtype).eval()
    with torch.no_grad():
        for parameter in normalizer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    if isinstance(normalizer, AffineScaled):
        normalizer.average.fill_(0.4)
    return normalizer


def tensors(tokens=7, dtype=torch.float64, seed=1, batch=2):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    heads, kv, dim = SHAPE["heads"], SHAPE["kv_heads"], SHAPE["head_dim"]
    x = draw(batch, tokens, SHAPE["width"])
    return x, draw(batch, heads, tokens, dim), draw(batch, kv, tokens, dim), draw(batch, kv, tokens, dim)


def operation(query, key, value, **changes):
    changes.setdefault("causal", "visible" not in changes)
    return Operation(query=query, key=key, value=value, scale=query.shape[-1] ** -0.5, **changes)


def weights_of(normalizer, x, call):
    """All rows at once."""
    rows = torch.arange(call.query.shape[2]) + call.offset
    weigh = normalizer.bind(x, offset=call.offset)
    return weigh(call.logits(), call.seen(), positions=rows, query=call.query, key=call.key)


class TestAll:
    @pytest.mark.parametrize(("name", "options"), VARIANTS, ids=ids)
    def test_the_fast_form_is_the_explicit_one(self, name, options):
        normalizer = build(name, **options)
        x, query, key, value = tensors()
        seen = torch.rand(2, 1, 7, 7, generator=torch.Generator().manual_seed(0)) < 0.6
        for call in (
            operation(query, key, value),
            operation(query, key, value, causal=False),
            operation(query, key, value, window=3),
            operation(query, key, value, visible=seen | torch.eye(7, dtype=torch.bool)),
            operation(query, key, value, bias=0.1 * torch.randn(1, 4, 7, 7, dtype=torch.float64)),
        ):
            weighing = normalizer.bind(x, offset=call.offset)
            exact, mass = explicit_attention(call, weighing, block=0)
            fast, fast_mass = normalizer.attend(call, weighing)
            torch.testing.assert_close(fast, exact, rtol=1e-9, atol=1e-10)
            if normalizer.needs_mass:
                torch.testing.assert_close(fast_mass, mass, rtol=1e-9, atol=1e-10)
            torch.testing.assert_close(explicit_attention(call, weighing, block=3)[0], exact, rtol=1e-9, atol=1e-10)

    @pytest.mark.parametrize(("name", "options"), VARIANTS, ids=ids)
    def test_hidden_keys_weigh_exactly_nothing_whatever_they_hold(self, name, options):
        normalizer = build(name, **options)
        x, query, key, value = tensors()
        call = operation(query, key, value)
        weights = weights_of(normalizer, x, call)
        assert not bool(weights[..., torch.ones(7, 7).triu(1).bool()].any())
        logits = call.logits().masked_fill(~call.seen(), torch.nan)
        poisoned = normalizer.bind(x)(logits, call.seen(), positions=torch.arange(7), query=query, key=key)
        assert torch.equal(poisoned, weights)

    @pytest.mark.parametrize(("name", "options"), VARIANTS, ids=ids)
    def test_permuting_keys_permutes_weights(self, name, options):
        normalizer = build(name, **options)
        x, query, key, value = tensors()
        seen = torch.rand(2, 1, 7, 7, generator=torch.Generator().manual_seed(3)) < 0.7
        order = torch.tensor([4, 2, 6, 0, 1, 5, 3])
        plain = weights_of(normalizer, x, operation(query, key, value, visible=seen))
        moved = operation(query, key[:, :, order], value[:, :, order], visible=seen[..., order])
        torch.testing.assert_close(weights_of(normalizer, x, moved), plain[..., order])

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize(("name", "options"), VARIANTS, ids=ids)
    def test_huge_logits_give_finite_weights_and_gradients(self, name, options, dtype):
        normalizer = build(name, dtype=dtype, **options)
        x, query, key, _ = tensors(tokens=4, dtype=dtype)
        logits = torch.tensor([1e4, -1e4, 0.0, 9e3], dtype=dtype).expand(2, 4, 4, 4).clone().requires_grad_()
        seen = torch.ones(4, 4, dtype=torch.bool).tril()[None, None]
        weights = normalizer.bind(x)(logits, seen, positions=torch.arange(4), query=query, key=key)
        assert bool(torch.isfinite(weights).all())
        if weights.requires_grad and normalizer.reads_logits:
            assert bool(torch.isfinite(torch.autograd.grad(weights.float().sum(), logits)[0]).all())
        very_low = torch.full_like(logits, -1e4)
        assert bool(
            torch.isfinite(normalizer.bind(x)(very_low, seen, positions=torch.arange(4), query=query, key=key)).all()
        )

    @pytest.mark.parametrize(("name", "options"), VARIANTS, ids=ids)
    def test_gradcheck(self, name, options):
        normalizer = build(name, **options)
        x, query, key, value = (t.requires_grad_() for t in tensors(tokens=4, batch=1))

        def run(x, query, key, value, *_):
            call = operation(query, key, value)
            weighing = normalizer.bind(x)
            explicit, mass = explicit_attention(call, weighing)
            output, fast_mass = normalizer.attend(call, weighing)
            return normalizer.finish(explicit, mass), normalizer.finish(output, fast_mass)

        assert torch.autograd.gradcheck(
            run, (x, query, key, value, *normalizer.parameters()), fast_mode=True, atol=1e-5
        )

    @pytest.mark.parametrize(("name", "options"), VARIANTS, ids=ids)
    def test_a_row_that_sees_nothing_gives_zeros(self, name, options):
        normalizer = build(name, **options)
        x, query, key, value = tensors()
        seen = torch.ones(1, 1, 7, 7, dtype=torch.bool)
        seen[:, :, 2] = False
        weights = weights_of(normalizer, x, operation(query, key, value, visible=seen))
        assert not bool(weights[:, :, 2].any())
        assert bool(torch.isfinite(weights).all())

    @pytest.mark.parametrize(("name", "options"), VARIANTS, ids=ids)
    def test_rows_that_are_said_to_sum_to_one_do(self, name, options):
        normalizer = build(name, **options)
        x, query, key, value = tensors()
        weights = weights_of(normalizer, x, operation(query, key, value))
        sums_to_one = bool(torch.isclose(weights.sum(-1), torch.ones_like(weights.sum(-1))).all())
        assert sums_to_one == normalizer.whole
        assert normalizer.signed or bool((weights >= 0).all())

    @pytest.mark.parametrize("name", NAMES)
    def test_what_is_bound_is_a_weighing(self, name):
        weighing = build(name).bind(tensors()[0])
        assert isinstance(weighing, Weighing)
        assert weighing.name == name


class TestSoftmaxAndColumns:
    def test_one_more_column_four_ways(self):
        """learned b = 0 ≡ softmax+1 ≡ a key slot of zeros ≡ explicit softmax over a column of zero logit."""
        x, query, key, value = tensors()
        call = operation(query, key, value)
        column = torch.cat([torch.zeros(2, 4, 7, 1), call.logits().masked_fill(~call.seen(), -torch.inf)], -1)
        expected = column.softmax(-1)[..., 1:]
        slot = KeySlot(**SHAPE).double()
        with torch.no_grad():
            slot.key.zero_()
        for normalizer in (SoftmaxPlusOne(**SHAPE), LearnedDenominator(**SHAPE).double(), slot):
            torch.testing.assert_close(weights_of(normalizer, x, call), expected)

    def test_a_learned_denominator_adds_its_exponential(self):
        x, query, key, value = tensors()
        call = operation(query, key, value, causal=False)
        normalizer = LearnedDenominator(**SHAPE).double()
        with torch.no_grad():
            normalizer.logit.copy_(torch.tensor([-2.0, 0.0, 1.0, 3.0]))
        size = call.logits().exp()
        expected = size / (size.sum(-1, keepdim=True) + normalizer.logit.exp().view(1, 4, 1, 1))
        torch.testing.assert_close(weights_of(normalizer, x, call), expected)

    def test_a_far_slot_is_softmax(self):
        x, query, key, value = tensors()
        query = query.abs()
        normalizer = KeySlot(**SHAPE).double()
        with torch.no_grad():
            normalizer.key.fill_(-200.0)
        call = operation(query, key, value)
        torch.testing.assert_close(weights_of(normalizer, x, call), softmax_weights(call.logits(), call.seen()))

    def test_a_slot_is_seen_by_every_query_also_the_first(self):
        x, query, key, value = tensors()
        call = operation(query, key, value)
        for name in ("key_slot", "key_value_slot", "learned_denominator", "softmax_plus_one"):
            assert bool((weights_of(build(name), x, call).sum(-1) < 1 - 1e-6).all()), name

    def test_a_key_value_slot_is_one_more_key_and_value(self):
        _, query, key, value = tensors()
        normalizer = build("key_value_slot")
        call = operation(query, key, value)
        output = normalizer.finish(*normalizer.attend(call, normalizer))
        keys = torch.cat([normalizer.key[None, :, None].expand(2, -1, -1, -1), key], 2)
        values = torch.cat([normalizer.value[None, :, None].expand(2, -1, -1, -1), value], 2)
        seen = torch.cat([torch.ones(1, 1, 7, 1, dtype=torch.bool), call.seen()], -1)
        expected, _ = explicit_attention(operation(query, keys, values, visible=seen))
        torch.testing.assert_close(output, expected)
        assert output.shape == query.shape

    def test_a_fixed_slot_value_is_m_in_the_first_channel(self):
        normalizer = KeyValueSlot(fixed_value=5.0, **SHAPE)
        assert normalizer.slot_value(torch.zeros(1))[:, 0].tolist() == [[5.0, 0, 0, 0, 0, 0]] * 4
        assert [name for name, _ in normalizer.named_parameters()] == ["key"]

    def test_a_value_bias_adds_exactly_its_value(self):
        _, query, key, value = tensors()
        normalizer = ValueBias(**SHAPE).double()
        call = operation(query, key, value)
        plain = make_normalizer("softmax", **SHAPE).attend(call, None)[0]
        biased = normalizer.finish(*normalizer.attend(call, normalizer))
        assert torch.equal(biased, plain + normalizer.value[:, None])

    def test_clipped_at_its_limits_is_softmax(self):
        _, query, key, value = tensors()
        call = operation(query, key, value)
        clipped = clipped_weights(call.logits(), call.seen(), gamma=0.0, stretch=1.0)
        torch.testing.assert_close(clipped, softmax_weights(call.logits(), call.seen()))

    def test_clipping_makes_exact_zeros_and_ones(self):
        logits = torch.tensor([[[[9.0, 0.0, 0.0, -1.0]]]])
        seen = torch.ones(1, 1, 1, 4, dtype=torch.bool)
        assert clipped_weights(logits, seen, gamma=-0.03, stretch=1.03)[0, 0, 0].tolist() == [1.0, 0.0, 0.0, 0.0]

    def test_clipped_gamma_is_minus_alpha_over_length(self):
        assert Clipped(alpha=12, length=512, **SHAPE).gamma == -12 / 512
        assert Clipped(gamma=-0.1, **SHAPE).gamma == -0.1

    def test_elastic_offset_is_taken_off_per_visible_key(self):
        x, query, key, value = tensors()
        call = operation(query, key, value)
        normalizer = Elastic(**SHAPE).double()
        count = torch.arange(1, 8).view(1, 1, 7, 1)
        expected = (softmax_weights(call.logits(), call.seen()) - 1 / count).relu() * call.seen()
        torch.testing.assert_close(weights_of(normalizer, x, call), expected)

    def test_elastic_by_temperature_flattens(self):
        x, query, key, value = tensors()
        call = operation(query, key, value)
        normalizer = Elastic(form="temperature", temperature=2.0, **SHAPE)
        scaled = call.logits() / 2
        torch.testing.assert_close(weights_of(normalizer, x, call), softmax_weights(scaled, call.seen()))


class TestUnnormalised:
    def test_softpick_by_definition(self):
        logits = torch.tensor([[[[1.0, -0.5, 2.0, 0.0]]]], dtype=torch.float64)
        seen = torch.ones(1, 1, 1, 4, dtype=torch.bool)
        term = logits.exp() - 1
        expected = term.relu() / (term.abs().sum() + 1e-8)
        torch.testing.assert_close(softpick_weights(logits, seen), expected)

    @settings(max_examples=40, deadline=None)
    @given(st.lists(st.floats(-30, 30), min_size=1, max_size=8))
    def test_softpick_is_zero_where_the_logit_is_not_positive_and_never_sums_above_one(self, row):
        logits = torch.tensor(row, dtype=torch.float64).view(1, 1, 1, -1)
        weights = softpick_weights(logits, torch.ones_like(logits, dtype=torch.bool))
        assert not bool(weights[logits <= 0].any())
        assert float(weights.sum()) <= 1 + 1e-12

    def test_softpick_of_zeros_is_zero_with_a_finite_gradient(self):
        logits = torch.zeros(1, 1, 3, 5, requires_grad=True)
        weights = softpick_weights(logits, torch.ones(1, 1, 3, 5, dtype=torch.bool))
        assert not bool(weights.any())
        assert bool(torch.isfinite(torch.autograd.grad(weights.sum(), logits)[0]).all())

    def test_softpick_ignores_hidden_keys_in_its_denominator(self):
        logits = torch.tensor([[[[1.0, 3.0]]]])
        seen = torch.tensor([[[[True, False]]]])
        torch.testing.assert_close(softpick_weights(logits, seen)[0, 0, 0], torch.tensor([1.0, 0.0]))

    def test_sigmoid_does_not_see_a_key_of_minus_infinity(self):
        logits = torch.randn(1, 2, 3, 5)
        seen = torch.ones(1, 1, 3, 6, dtype=torch.bool)
        more = torch.cat([logits, torch.full((1, 2, 3, 1), -torch.inf)], -1)
        torch.testing.assert_close(sigmoid_weights(more, seen)[..., :5], sigmoid_weights(logits, seen[..., :5]))
        assert not bool(sigmoid_weights(more, seen)[..., 5].any())

    def test_sigmoid_scalings_by_definition(self):
        logits = torch.randn(1, 2, 3, 5, dtype=torch.float64)
        seen = torch.ones(1, 1, 3, 5, dtype=torch.bool)
        plain = logits.sigmoid()
        expected = {
            "none": plain,
            "sum": plain / plain.sum(-1, keepdim=True),
            "count": plain / 5,
            "log_count": (logits - torch.tensor(5.0).double().log()).sigmoid(),
        }
        for scaling, weights in expected.items():
            torch.testing.assert_close(sigmoid_weights(logits, seen, scaling=scaling), weights)

    def test_long_plain_sigmoid_rows_warn_once(self, caplog, monkeypatch):
        monkeypatch.setattr("headway.kernels.normalizers.explicit.LONG", 4)
        normalizer = build("sigmoid")
        x, query, key, value = tensors()
        for _ in range(2):
            weights_of(normalizer, x, operation(query, key, value))
        assert [r.getMessage()[:28] for r in caplog.records] == ["Sigmoid weights over 7 keys:"]

    def test_elu_is_never_negative(self):
        logits = torch.linspace(-50, 50, 101).view(1, 1, 1, -1)
        seen = torch.ones_like(logits, dtype=torch.bool)
        assert bool((elu_weights(logits, seen) >= 0).all())
        torch.testing.assert_close(elu_weights(logits, seen), torch.nn.functional.elu(logits) + 1, atol=1e-7, rtol=1e-6)

    def test_normalised_rows_far_below_zero_still_sum_to_one(self):
        logits = torch.full((1, 1, 1, 4), -1e4)
        seen = torch.ones(1, 1, 1, 4, dtype=torch.bool)
        for weights in (elu_weights(logits, seen, normalise=True), sigmoid_weights(logits, seen, scaling="sum")):
            torch.testing.assert_close(weights.sum(-1), torch.ones(1, 1, 1))


class TestKernels:
    def test_the_identity_kernel_is_linear_attention(self):
        _, query, key, value = tensors(batch=1)
        normalizer = build("kernel_identity")
        keys, values = (t.repeat_interleave(2, 1) for t in (key, value))
        expected = (query @ keys.transpose(-1, -2)).tril() / 6**0.5 @ values
        torch.testing.assert_close(normalizer.attend(operation(query, key, value), normalizer)[0], expected)

    @pytest.mark.parametrize("normalise", [False, True])
    @pytest.mark.parametrize("kernel", ["identity", "elu", "mlp"])
    def test_recurrent_is_parallel(self, kernel, normalise):
        _, query, key, value = tensors()
        normalizer = build(f"kernel_{kernel}", normalise=normalise)
        parallel, _ = normalizer.attend(operation(query, key, value), normalizer)
        maps = normalizer.maps()
        recurrent = recurrent_kernel_attention(query, key, value, kernel=kernel, normalise=normalise, maps=maps)
        torch.testing.assert_close(recurrent, parallel)

    def test_a_signed_row_is_not_divided_by_less_than_one(self):
        _, query, key, value = tensors()
        small = build("kernel_identity", normalise=True)
        call = operation(1e-3 * query, key, value)
        raw = build("kernel_identity").attend(call, None)[0]
        torch.testing.assert_close(small.attend(call, small)[0], explicit_attention(call, build("kernel_identity"))[0])
        assert raw.shape == query.shape


class TestMean:
    @settings(max_examples=25, deadline=None)
    @given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 10**6))
    def test_running_means_are_those_of_the_mask(self, tokens, window, seed):
        _, query, key, value = tensors(tokens=tokens, seed=seed)
        fast = visible_mean(operation(query, key, value, window=window if window < tokens else None))
        rows = torch.arange(tokens)
        seen = (rows <= rows[:, None]) & (rows[:, None] - rows < window if window < tokens else True)
        torch.testing.assert_close(fast, visible_mean(operation(query, key, value, visible=seen[None, None])))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("window", [None, 40])
    def test_half_precision_sums_in_float32(self, dtype, window):
        """A sum of a thousand ones is no number of bfloat16 beyond 256."""
        value = torch.ones(1, 1, 1000, 3, dtype=dtype)
        found = visible_mean(operation(value, value, value, window=window))
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, torch.ones_like(found))


class TestRegistry:
    def test_two_normalisers_are_an_error(self):
        for both in (["softpick", "affine"], "softpick+affine"):
            with pytest.raises(ArgumentError, match=r"got 2 .softpick, affine., expected one"):
                make_normalizer(both, **SHAPE)

    def test_an_unknown_name_lists_the_valid_ones(self):
        with pytest.raises(ArgumentError, match=r"softpickk.*expected one of affine, clipped.*Did you mean 'softpick'"):
            make_normalizer("softpickk", **SHAPE)

    def test_an_unknown_option_is_named(self):
        with pytest.raises(ArgumentError, match=r"normalizer_options.*taper"):
            make_normalizer("softpick", taper=2, **SHAPE)

    @pytest.mark.parametrize(
        ("name", "options", "match"),
        [
            ("clipped", {"gamma": 0.1}, "gamma"),
            ("clipped", {"stretch": 0.9}, "stretch"),
            ("clipped", {"length": 0}, "length"),
            ("elastic", {"temperature": 0.5}, "temperature"),
            ("elastic", {"form": "rubber"}, "form"),
            ("sigmoid", {"scaling": "mean"}, "scaling"),
        ],
    )
    def test_bad_options_are_named(self, name, options, match):
        with pytest.raises(ArgumentError, match=match):
            make_normalizer(name, **options, **SHAPE)

    @pytest.mark.parametrize("name", ["softmax", "learned_denominator", "value_bias", "elastic", "affine"])
    def test_those_with_a_softmax_limit_start_there(self, name):
        normalizer = build(name)
        normalizer.start_at_softmax()
        x, query, key, value = tensors()
        call = operation(query, key, value)
        weighing = normalizer.bind(x)
        expected, _ = explicit_attention(call)
        output = normalizer.finish(*normalizer.attend(call, weighing))
        torch.testing.assert_close(output, expected, rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("name", ["softmax_plus_one", "key_slot", "clipped", "softpick", "sigmoid", "kernel_mlp"])
    def test_those_without_one_say_so(self, name):
        with pytest.raises(ArgumentError, match=f"got '{name}', which is softmax for no value"):
            build(name).start_at_softmax()

    def test_loading_weights_of_another_normaliser_warns(self, caplog):
        build("learned_denominator").load_state_dict({}, strict=False)
        assert "hold nothing for the normaliser 'learned_denominator'" in caplog.text
