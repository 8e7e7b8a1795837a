"""Affine-scaled weights: both readings of N, the running mean, and what its layer refuses."""

from __future__ import annotations

import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from headway.errors import ArgumentError
from headway.kernels.normalizers import AffineScaled, Operation, explicit_attention, make_normalizer
from headway.kernels.normalizers.affine import (
    AffineWeighing,
    affine_attention,
    affine_weights,
    saturation,
    scale_of,
    updated_average,
)
from headway.kernels.normalizers.operation import visible_mean

SHAPE = {"width": 12, "heads": 4, "kv_heads": 2, "head_dim": 6}


def operation(tokens=9, seed=0, dtype=torch.float64, **changes):
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(2, h, tokens, 6, generator=generator, dtype=torch.float64) for h in (4, 2, 2))
    changes.setdefault("causal", "visible" not in changes)
    return Operation(query=query.to(dtype), key=key.to(dtype), value=value.to(dtype), scale=0.4, **changes)


def scales(tokens=9, seed=1):
    return torch.rand(2, 4, tokens, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layer(**options) -> AffineScaled:
    torch.manual_seed(0)
    found = make_normalizer("affine", **{**SHAPE, **options})
    assert isinstance(found, AffineScaled)
    return found


def weights(call, alpha, average, length=None):
    weigh = AffineWeighing(alpha, average, length=length)
    rows = torch.arange(call.query.shape[2])
    return weigh(call.logits(), call.seen(), positions=rows, query=call.query, key=call.key)


class TestWeights:
    def test_scale_and_mean_one_is_softmax(self):
        call, ones = operation(), torch.ones(2, 4, 9).double()
        softmax, _ = explicit_attention(call)
        for length in (None, 20):
            torch.testing.assert_close(affine_attention(call, ones, torch.ones(4), length=length), softmax)

    def test_scale_equal_to_the_mean_is_that_much_softmax(self):
        call, alpha = operation(), torch.full((2, 4, 9), 0.3).double()
        softmax, _ = explicit_attention(call)
        torch.testing.assert_close(
            affine_attention(call, alpha, torch.full((4,), 0.3)), 0.3 * softmax, atol=1e-7, rtol=0
        )

    def test_scale_zero_is_the_mean_of_visible_values(self):
        call, average = operation(), torch.tensor([0.2, 0.4, 0.6, 0.8]).double()
        expected = average.view(1, 4, 1, 1) * visible_mean(call).repeat_interleave(2, 1)
        torch.testing.assert_close(affine_attention(call, torch.zeros(2, 4, 9).double(), average), expected)

    @settings(max_examples=30, deadline=None)
    @given(st.integers(1, 12), st.integers(0, 10**6))
    def test_rows_sum_to_the_mean_when_visible_keys_are_counted(self, tokens, seed):
        call = operation(tokens, seed)
        average = torch.rand(4, generator=torch.Generator().manual_seed(seed)).double()
        sums = weights(call, scales(tokens, seed), average).sum(-1)
        torch.testing.assert_close(sums, average[None, :, None].expand_as(sums))

    @settings(max_examples=30, deadline=None)
    @given(st.integers(1, 12), st.integers(0, 10**6))
    def test_rows_sum_by_the_formula_when_a_length_is_fixed(self, tokens, seed):
        call, alpha = operation(tokens, seed), scales(tokens, seed)
        average = torch.rand(4, generator=torch.Generator().manual_seed(seed)).double()
        seen = torch.arange(1, tokens + 1) / 16.0
        expected = alpha + (average[None, :, None] - alpha) * seen
        torch.testing.assert_close(weights(call, alpha, average, length=16).sum(-1), expected)

    def test_weights_may_be_negative(self):
        probabilities = torch.tensor([[[[0.1, 0.9]]]])
        found = affine_weights(
            probabilities, torch.ones(1, 1, 1, 2, dtype=torch.bool), torch.tensor([[[0.8]]]), torch.tensor([0.4])
        )
        torch.testing.assert_close(found[0, 0, 0], torch.tensor([-0.12, 0.52]))

    def test_the_shift_does_not_reopen_the_mask(self):
        call = operation()
        assert not bool(weights(call, scales(), torch.full((4,), 0.9))[..., torch.ones(9, 9).triu(1).bool()].any())

    @pytest.mark.parametrize("length", [None, 12])
    @pytest.mark.parametrize("kind", ["causal", "both ways", "mask", "window"])
    def test_explicit_is_fused(self, kind, length):
        seen = torch.rand(2, 1, 9, 9, generator=torch.Generator().manual_seed(2)) < 0.5
        seen[0, 0, 4] = False
        changes = {"causal": {}, "both ways": {"causal": False}, "mask": {"visible": seen}, "window": {"window": 4}}
        call = operation(**changes[kind])
        average = torch.tensor([0.1, 0.5, 0.7, 1.0]).double()
        exact, _ = explicit_attention(call, AffineWeighing(scales(), average, length=length))
        torch.testing.assert_close(affine_attention(call, scales(), average, length=length), exact)

    def test_a_row_that_sees_nothing_gives_zeros(self):
        call = operation(visible=torch.zeros(1, 1, 9, 9, dtype=torch.bool))
        for length in (None, 12):
            assert not bool(affine_attention(call, scales(), torch.ones(4), length=length).any())

    def test_a_changed_token_leaves_earlier_outputs(self):
        call, other = operation(), operation()
        other.key[:, :, 5] += 1
        other.value[:, :, 5] += 1
        before, after = (affine_attention(c, scales(), torch.ones(4) / 2) for c in (call, other))
        assert torch.equal(before[:, :, :5], after[:, :, :5])
        assert not torch.equal(before[:, :, 5], after[:, :, 5])

    def test_gradient_reaches_the_scale_through_both_terms(self):
        """d out / d α = softmax attention − mean of values."""
        call, alpha = operation(), scales().requires_grad_()
        output = affine_attention(call, alpha, torch.full((4,), 0.4))
        softmax, _ = explicit_attention(call)
        expected = (softmax - visible_mean(call).repeat_interleave(2, 1)).sum(-1)
        torch.testing.assert_close(torch.autograd.grad(output.sum(), alpha)[0], expected)

    def test_scales_of_other_heads_are_refused(self):
        with pytest.raises(ArgumentError, match=r"alpha: got shape \(2, 3, 9\), expected \(batch, 4, 9\)"):
            affine_attention(operation(), scales()[:, :3], torch.ones(4))
        with pytest.raises(ArgumentError, match="average: got shape"):
            affine_attention(operation(), scales(), torch.ones(3))


class TestScale:
    def test_linear_clipping(self):
        z = torch.tensor([0.0, 5.0, -5.0, 7.0, -9.0, 1.0])
        torch.testing.assert_close(scale_of(z), torch.tensor([0.5, 1.0, 0.0, 1.0, 0.0, 0.6]))

    def test_its_gradient_is_a_tenth_inside_and_none_outside(self):
        z = torch.tensor([-6.0, -4.9, 0.0, 4.9, 6.0], requires_grad=True)
        gradient = torch.autograd.grad(scale_of(z).sum(), z)[0]
        torch.testing.assert_close(gradient, torch.tensor([0.0, 0.1, 0.1, 0.1, 0.0]))

    def test_the_sigmoid_is_the_other_choice(self):
        z = torch.tensor([-3.0, 0.0, 2.0])
        assert torch.equal(scale_of(z, "sigmoid"), z.sigmoid())
        with pytest.raises(ArgumentError, match="activation"):
            scale_of(z, "tanh")

    def test_parameters_are_one_row_of_the_width_per_head(self):
        assert sum(p.numel() for p in layer().parameters()) == 12 * 4

    def test_a_fresh_layer_scales_by_about_a_half(self):
        x = torch.randn(2, 50, 12, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(layer().alpha(x), torch.full((2, 4, 50), 0.5), atol=0.06, rtol=0)
        assert torch.equal(layer(start="zeros").alpha(x), torch.full((2, 4, 50), 0.5))


class TestRunningMean:
    def test_after_n_steps_of_a_constant_it_is_c_times_one_minus_rho_to_the_n(self):
        average = torch.zeros(4)
        for _ in range(7):
            average = updated_average(average, torch.full((2, 4, 5), 0.6), decay=0.8)
        torch.testing.assert_close(average, torch.full((4,), 0.6 * (1 - 0.8**7)))

    def test_it_moves_in_training_and_is_frozen_in_evaluation(self):
        found, x = layer(), torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(0))
        found.bind(x)
        torch.testing.assert_close(found.average, 0.1 * found.alpha(x).mean((0, 2)))
        kept = found.average.clone()
        found.eval().bind(x)
        assert torch.equal(found.average, kept)

    def test_padding_does_not_count(self):
        found, x = layer(), torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(0))
        mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
        found.bind(torch.where(mask[..., None], x, 0.0), mask)
        alpha = found.alpha(x).transpose(1, 2)[mask]
        torch.testing.assert_close(found.average, 0.1 * alpha.mean(0))

    def test_a_batch_of_padding_leaves_it(self):
        average = torch.full((4,), 0.3)
        assert torch.equal(updated_average(average, torch.rand(1, 4, 3), torch.zeros(1, 3, dtype=torch.bool)), average)

    def test_one_mean_for_the_layer(self):
        found, x = layer(mean="layer"), torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(0))
        found.bind(x)
        torch.testing.assert_close(found.average, 0.1 * found.alpha(x).mean()[None])

    def test_no_gradient_flows_through_it(self):
        found, x = layer(), torch.randn(2, 9, 12, generator=torch.Generator().manual_seed(0))
        weighing = found.bind(x)
        assert isinstance(weighing, AffineWeighing)
        assert not weighing.average.requires_grad
        assert weighing.alpha.requires_grad

    def test_two_forwards_before_a_backward_are_fine(self):
        found, x = layer(), torch.randn(2, 9, 12, generator=torch.Generator().manual_seed(0))
        call = operation(dtype=torch.float32)
        loss = sum(found.attend(call, found.bind(x))[0].sum() for _ in range(2))
        loss.backward()
        assert bool(torch.isfinite(found.map.weight.grad).all())

    def test_it_is_not_moved_again_when_checkpointing_repeats_a_forward(self):
        found, call = layer(), operation(dtype=torch.float32)
        x = torch.randn(2, 9, 12, generator=torch.Generator().manual_seed(0), requires_grad=True)
        plain = layer()
        plain.bind(x)
        for reentrant in (False, True):
            found.average.zero_()
            y = checkpoint(lambda x: found.attend(call, found.bind(x))[0], x, use_reentrant=reentrant)
            y.sum().backward()
            assert torch.equal(found.average, plain.average)

    def test_it_is_taken_over_all_ranks(self, monkeypatch):
        """Another rank saw twice as many tokens, all with a scale of 0.2."""
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(
            torch.distributed, "all_reduce", lambda both: both.add_(torch.tensor([0.2 * 20.0] * 4 + [20.0]))
        )
        average = updated_average(torch.zeros(4), torch.full((2, 4, 5), 0.8), decay=0.0)
        torch.testing.assert_close(average, torch.full((4,), (0.8 + 2 * 0.2) / 3))

    def test_it_may_be_left_to_the_caller(self):
        found = layer(update="never")
        x = torch.randn(2, 5, 12)
        found.bind(x)
        assert not bool(found.average.any())
        found.observe(found.alpha(x))
        assert bool(found.average.all())

    def test_a_cast_leaves_it_in_float32(self):
        found = layer()
        found.average.fill_(0.123456789)
        kept = found.average.clone()
        found.to(torch.bfloat16)
        assert found.map.weight.dtype == torch.bfloat16
        assert found.average.dtype == torch.float32
        assert torch.equal(found.average, kept)

    def test_it_is_stored_with_the_weights(self):
        found, other = layer(), layer()
        found.average.fill_(0.77)
        other.load_state_dict(found.state_dict())
        assert torch.equal(other.average, found.average)

    @pytest.mark.parametrize("strict", [True, False])
    def test_weights_without_it_are_refused(self, strict):
        state = {name: t for name, t in layer().state_dict().items() if name != "average"}
        with pytest.raises(ArgumentError, match="got no average"):
            layer().load_state_dict(state, strict=strict)

    def test_saturated_scales_draw_one_warning(self, caplog, monkeypatch):
        monkeypatch.setattr("headway.kernels.normalizers.affine_module.LOOK_EVERY", 1)
        found = layer()
        with torch.no_grad():
            found.map.weight.fill_(100.0)
        assert saturation(found.alpha(torch.ones(1, 3, 12))) == 1.0
        with caplog.at_level(logging.WARNING):
            for _ in range(3):
                found.bind(torch.ones(1, 3, 12))
        assert [r.getMessage()[:35] for r in caplog.records] == ["100 % of the scales α are 0 or 1: l"]


class TestOptions:
    def test_the_identity_start_is_softmax_and_can_learn(self):
        found, call = layer(start="identity"), operation(dtype=torch.float32)
        x = torch.randn(2, 9, 12, generator=torch.Generator().manual_seed(0))
        output, _ = found.eval().attend(call, found.bind(x))
        torch.testing.assert_close(output, explicit_attention(call)[0], atol=1e-6, rtol=0)
        output.square().sum().backward()
        assert bool(found.map.weight.grad.any())

    def test_it_stays_identity_through_a_file(self):
        found, other = layer(), layer()
        found.start_at_softmax()
        other.load_state_dict(found.state_dict())
        x = torch.randn(2, 3, 12)
        assert torch.equal(other.alpha(x), torch.ones(2, 4, 3))

    def test_without_shift_weights_are_scaled_alone(self):
        found, call = layer(shift=False).eval(), operation(dtype=torch.float32)
        x = torch.randn(2, 9, 12)
        output, _ = found.attend(call, found.bind(x))
        torch.testing.assert_close(output, found.alpha(x)[..., None] * explicit_attention(call)[0])

    def test_a_start_of_the_mean_may_be_given(self):
        assert layer(average_start=0.5).average.tolist() == [0.5] * 4

    @pytest.mark.parametrize("decay", [-0.1, 1.1])
    def test_a_decay_outside_zero_and_one_is_refused(self, decay):
        with pytest.raises(ArgumentError, match="decay"):
            layer(decay=decay)

    @pytest.mark.parametrize(
        "options",
        [
            {"count": "keys"},
            {"activation": "tanh"},
            {"mean": "model"},
            {"start": "ones"},
            {"update": "step"},
            {"length": 0},
        ],
    )
    def test_unknown_options_are_named(self, options):
        with pytest.raises(ArgumentError, match=next(iter(options))):
            layer(**options)

    def test_a_sigmoid_cannot_start_at_softmax(self):
        with pytest.raises(ArgumentError, match="never reaches 1"):
            layer(activation="sigmoid", start="identity")
        with pytest.raises(ArgumentError, match="never reaches 1"):
            layer(activation="sigmoid").start_at_softmax()

    def test_a_piece_of_a_sequence_needs_a_fixed_length(self):
        found, x = layer(count="length"), torch.randn(2, 5, 12)
        assert found.bind(x, length=5).length == 5
        with pytest.raises(ArgumentError, match="length: got None with count='length'"):
            found.bind(x)

    def test_the_module_itself_is_no_weighing_of_a_call(self):
        with pytest.raises(ArgumentError, match="what `bind"):
            layer()(torch.zeros(1, 4, 1, 1), torch.ones(1, 1, 1, 1, dtype=torch.bool))
