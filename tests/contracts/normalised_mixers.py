"""What every mixer with a normaliser owes beside the contract of mixers: all its forms, for each of its options."""

from __future__ import annotations

import itertools

import pytest
import torch

import headway
from headway.door import Observer

TIGHT = {"rtol": 1e-8, "atol": 1e-9}


def inputs(tokens, batch=2, seed=1):
    return torch.randn(batch, tokens, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def fresh(mixer, batch=2):
    return mixer.init_state(batch, dtype=torch.float64)


class Host(torch.nn.Module):
    """A model of one mixer on vectors."""

    def __init__(self, mixer):
        super().__init__()
        self.mixer = mixer

    def forward(self, x):
        return self.mixer(x)[0]


class Reader(Observer):
    """Keeps Σ_j w_ij v_j of the weights that the door tells, and the output that the module had."""

    reads_weights = True

    def observe(self, call, output, lse=None):
        values = call.value.repeat_interleave(call.groups, 1).double()
        self.found = call.weights().double() @ values, output.double()


class Forms:
    """Tests of the fixture `mixer`, a causal one in float64: a mixer that takes normalisers inherits them."""

    @pytest.mark.parametrize("tokens", [1, 13])
    def test_reference_is_block_is_step_with_gradients(self, mixer, tokens):
        found = []
        for mode in ("reference", "block", "step"):
            x = inputs(tokens).requires_grad_()
            y = mixer(x, mode=mode)[0]
            grads = torch.autograd.grad(y.pow(2).sum(), [x, *mixer.parameters()], allow_unused=True)
            found.append([y, *(torch.zeros(1) if g is None else g for g in grads)])
        for other in found[1:]:
            for first, second in zip(found[0], other, strict=True):
                torch.testing.assert_close(second, first, **TIGHT)

    @pytest.mark.parametrize("cuts", [(5,), (1, 2, 9)])
    def test_any_split_is_one_call(self, mixer, cuts):
        x = inputs(12)
        state, parts = fresh(mixer), []
        for start, stop in itertools.pairwise((0, *cuts, 12)):
            part, state = mixer(x[:, start:stop], state=state)
            parts.append(part)
        torch.testing.assert_close(torch.cat(parts, 1), mixer(x, mode="reference", state=fresh(mixer))[0], **TIGHT)

    @pytest.mark.parametrize("mode", ["block", "step"])
    def test_padded_and_packed_is_separate(self, mixer, mode):
        mask = torch.tensor([[0, 1, 1, 0, 1, 1, 0, 0, 1, 1, 1, 0]] * 2, dtype=torch.bool)
        mask[1] = True
        resets = torch.zeros(2, 12, dtype=torch.bool)
        resets[:, [1, 5]] = True
        x = inputs(12)
        poisoned = torch.where(mask[..., None], x, torch.nan)
        y, _ = mixer(poisoned, mask=mask, resets=resets, mode=mode, state=fresh(mixer))
        assert not bool(y[~mask].any())
        for row, (start, stop) in itertools.product(range(2), ((1, 5), (5, 12))):
            real = mask[row, start:stop]
            alone = mixer(x[row : row + 1, start:stop][:, real], mode="reference", state=fresh(mixer, 1))[0]
            torch.testing.assert_close(y[row : row + 1, start:stop][:, real], alone, **TIGHT)

    def test_gradients_do_not_see_padding(self, mixer):
        mask = torch.tensor([[0, 0, 1, 1, 0, 1, 1]] * 2, dtype=torch.bool)
        x = torch.where(mask[..., None], inputs(7), torch.nan).requires_grad_()
        leaves = [x, *mixer.parameters()]
        found = torch.autograd.grad(mixer(x, mask=mask)[0].pow(2).sum(), leaves, allow_unused=True)
        assert all(bool(torch.isfinite(g).all()) for g in found if g is not None)
        assert not bool(found[0][~mask].any())

    def test_a_state_goes_on_behind_padding_and_documents(self, mixer):
        x, after = inputs(12), inputs(5, seed=3)
        mask = torch.tensor([[0, 0, 1, 1, 0, 1, 1, 1, 1, 1, 1, 0], [1] * 12], dtype=torch.bool)
        resets = torch.zeros(2, 12, dtype=torch.bool)
        resets[:, 6] = True
        _, state = mixer(x, mask=mask, resets=resets, state=fresh(mixer))
        y, _ = mixer(after, state=state)
        for row in range(2):
            rest = torch.cat([x[row, 6:][mask[row, 6:]], after[row]])[None]
            alone = mixer(rest, state=fresh(mixer, 1))[0]
            torch.testing.assert_close(y[row : row + 1], alone[:, -5:], **TIGHT)

    def test_nothing_looks_ahead(self, mixer):
        x = inputs(9)
        other = x.clone()
        other[:, 5] += 1.0
        before, after = (mixer(t, state=fresh(mixer))[0] for t in (x, other))
        torch.testing.assert_close(after[:, :5], before[:, :5], rtol=0, atol=1e-12)
        assert not torch.equal(after[:, 5], before[:, 5])

    def test_bfloat16_is_near_float32(self, mixer):
        mixer.float()
        x = inputs(19).float()
        exact = mixer(x, state=mixer.init_state(2, dtype=torch.float32))[0]
        mixer.to(torch.bfloat16)
        rough = mixer(x.bfloat16(), state=mixer.init_state(2, dtype=torch.bfloat16))[0]
        assert rough.dtype == torch.bfloat16
        assert float(((rough.float() - exact).norm() / exact.norm()).detach()) < 3e-2

    def test_an_observer_meets_the_weights_that_make_the_output(self, mixer):
        x, reader = inputs(6), Reader()
        plain = mixer(x)[0]
        with headway.observe(Host(mixer).eval(), reader, example={"x": x}) as handle:
            observed = handle.model(x)
        assert torch.equal(observed, plain)
        torch.testing.assert_close(*reader.found, rtol=1e-4, atol=1e-5)
