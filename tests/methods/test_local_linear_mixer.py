"""The mixer `local_linear` beyond the contract of all mixers, its weights at the door, and the editor for hosts."""

from __future__ import annotations

import pytest
import torch

import headway
from headway.door import use
from headway.door.stages import Observer
from headway.errors import ArgumentError
from headway.hosts.tiny import tiny_host
from headway.kernels.conjugate_gradient import ConvergenceError, ConvergenceWarning
from headway.kernels.local_linear import reference_weights
from headway.methods.layers.local_linear import CARD, LocalLinear, LocalLinearMixer
from headway.models import HeadwayConfig, HeadwayForCausalLM


def mixer(seed: int = 0, **changes) -> LocalLinearMixer:
    torch.manual_seed(seed)
    return LocalLinearMixer(**{"width": 16, "heads": 4, "kv_heads": 2, **changes}).double()


def tokens(count: int = 13, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, count, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def language_model(**options) -> HeadwayForCausalLM:
    torch.manual_seed(0)
    config = HeadwayConfig(
        vocab_size=40, width=16, layers=2, heads=2, mixer="local_linear", mixer_options=options, positions=64
    )
    return HeadwayForCausalLM(config).eval()


class _Weights(Observer):
    def start(self):
        self.seen = []

    def observe(self, call, output, lse=None):
        weights = call.weights()
        self.seen.append((weights, call.value, output))

    def result(self):
        return self.seen


class TestMixer:
    def test_every_head_learns_its_ridge(self):
        layer = mixer(ridge=0.3)
        torch.testing.assert_close(layer.ridge, torch.full((4, 1), 0.3, dtype=torch.float64), rtol=1e-6, atol=0)
        layer(tokens())[0].sum().backward()
        assert layer.raw_ridge.grad is not None
        assert bool((layer.raw_ridge.grad != 0).all())

    def test_every_head_learns_its_bandwidth(self):
        layer = mixer()
        layer(tokens())[0].square().sum().backward()
        assert bool((layer.log_gain.grad != 0).all())
        assert not mixer(learn_scale=False).log_gain.requires_grad

    def test_a_narrow_head_reads_one_key(self):
        """Queries that are keys, with a narrow bandwidth, get the value of their key."""
        layer = mixer(position="none", kv_heads=4)
        layer.load_state_dict({**layer.state_dict(), "key.weight": layer.query.weight})
        with torch.no_grad():
            layer.log_gain.fill_(12.0)
        x = tokens()
        torch.testing.assert_close(layer(x)[0], layer.output(layer.value(x)))

    def test_a_ridge_stays_positive_whatever_is_learned(self):
        layer = mixer()
        with torch.no_grad():
            layer.raw_ridge.fill_(-1e4)
        assert bool((layer.ridge >= 1e-4).all())
        assert bool(layer(tokens())[0].isfinite().all())

    def test_a_ridge_can_be_fixed(self):
        assert not mixer(learn_ridge=False).raw_ridge.requires_grad

    @pytest.mark.parametrize(
        "options", [{"qk_norm": "rms"}, {"qk_norm": "none"}, {"position": "none"}, {"causal": False}]
    )
    def test_options_keep_block_and_reference_together(self, options):
        layer = mixer(**options)
        torch.testing.assert_close(layer(tokens())[0], layer(tokens(), mode="reference")[0], rtol=1e-7, atol=1e-8)

    @pytest.mark.parametrize("options", [{}, {"position": "none"}, {"variant": "parallax"}, {"solver": "cg"}])
    def test_steps_are_blocks(self, options):
        layer = mixer(**options)
        torch.testing.assert_close(layer(tokens(), mode="step")[0], layer(tokens())[0], rtol=1e-7, atol=1e-8)

    def test_the_scale_of_an_input_does_not_matter_to_unit_queries_and_keys(self):
        layer = mixer()
        torch.testing.assert_close(layer(100 * tokens())[0], 100 * layer(tokens())[0], rtol=1e-7, atol=1e-8)

    def test_parallax_starts_as_softmax(self):
        layer = mixer(variant="parallax")
        soft = mixer(ridge=1e9)
        soft.load_state_dict(layer.state_dict(), strict=False)
        torch.testing.assert_close(layer(tokens())[0], soft(tokens())[0], rtol=1e-6, atol=1e-7)

    def test_the_probe_of_parallax_learns(self):
        layer = mixer(variant="parallax")
        layer(tokens())[0].square().sum().backward()
        assert float(layer.probe.weight.grad.abs().max()) > 0

    def test_parallax_is_its_published_formula(self):
        """o = o_softmax (1 + p·(kρ)) − Σ p (kρ) v with ρ = W_R x."""
        layer = mixer(variant="parallax", position="none", kv_heads=4, width=16)
        torch.nn.init.normal_(layer.probe.weight)
        x = tokens(7, 1)
        q, k, v, probe = (
            f(x).unflatten(-1, (4, 4)).transpose(1, 2) for f in (layer.query, layer.key, layer.value, layer.probe)
        )
        q, k = (torch.nn.functional.normalize(t, dim=-1) for t in (q, k))
        hidden = torch.ones(7, 7, dtype=torch.bool).triu(1)
        p = (2 * q @ k.transpose(-1, -2)).masked_fill(hidden, -torch.inf).softmax(-1)
        reach = probe @ k.transpose(-1, -2)
        o = (p @ v) * (1 + (p * reach).sum(-1, keepdim=True)) - (p * reach) @ v
        torch.testing.assert_close(layer(x)[0], layer.output(o.transpose(1, 2).flatten(2)))

    def test_an_unconverged_layer_warns_or_raises(self):
        few = {"solver": "cg", "max_iterations": 1, "ridge": 1e-3}
        with pytest.warns(ConvergenceWarning):
            mixer(**few)(tokens())
        with pytest.raises(ConvergenceError):
            mixer(strict=True, **few)(tokens())

    @pytest.mark.parametrize(
        ("name", "options"),
        [
            ("qk_norm", {"qk_norm": "l1"}),
            ("position", {"position": "alibi"}),
            ("variant", {"variant": "mesa"}),
            ("solver", {"solver": "lu"}),
            ("kv_heads", {"kv_heads": 3}),
            ("ridge", {"ridge": 0.0}),
            ("dim", {"width": 12}),
        ],
    )
    def test_unusable_options_are_named(self, name, options):
        with pytest.raises(ArgumentError, match=name):
            mixer(**options)

    def test_a_layer_that_reads_both_ways_has_no_state(self):
        with pytest.raises(ArgumentError, match="causal=False"):
            mixer(causal=False).init_state(1)


class TestDoor:
    @pytest.mark.parametrize("options", [{}, {"variant": "parallax"}])
    @pytest.mark.parametrize("padded", [False, True])
    def test_observers_see_the_weights_that_make_the_output(self, options, padded):
        model = language_model(**options)
        for block in model.modules():
            if isinstance(block, LocalLinearMixer):
                torch.nn.init.normal_(block.log_gain, std=0.5)
                if options:
                    torch.nn.init.normal_(block.probe.weight)
        ids = torch.randint(0, 40, (2, 11), generator=torch.Generator().manual_seed(2))
        mask = torch.ones_like(ids)
        if padded:
            mask[0, :3] = 0
        plain = model(input_ids=ids, attention_mask=mask).logits
        look = _Weights()
        with headway.observe(model, look), torch.no_grad():
            seen = model(input_ids=ids, attention_mask=mask).logits
        torch.testing.assert_close(seen, plain, rtol=0, atol=0)
        assert len(look.seen) == 2
        for weights, value, output in look.seen:
            real = mask.bool()[:, None, :, None]
            made = torch.where(real, weights @ value, 0.0)
            torch.testing.assert_close(made, torch.where(real, output, 0.0), rtol=1e-4, atol=1e-5)
            sums = torch.where(real[..., 0], weights.sum(-1), 1.0)
            torch.testing.assert_close(sums, torch.ones_like(sums), rtol=1e-4, atol=1e-4)

    def test_generation_with_a_cache_is_generation_without(self):
        model = language_model()
        ids = torch.randint(0, 40, (2, 6), generator=torch.Generator().manual_seed(2))
        mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
        options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
        with torch.no_grad():
            kept = model.generate(ids, **options)
            slow = model.generate(ids, use_cache=False, **options)
        assert torch.equal(kept, slow)


class TestEditor:
    def test_a_large_ridge_leaves_a_host_as_it_is(self):
        model, _ = tiny_host("llama", max_position_embeddings=64)
        ids = torch.randint(8, 100, (1, 20), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            plain = model(input_ids=ids).logits
            with use(model, LocalLinear(ridge=1e8)):
                edited = model(input_ids=ids).logits
        torch.testing.assert_close(edited, plain, rtol=1e-4, atol=1e-5)

    def test_a_host_gets_the_weights_of_the_written_form(self):
        editor, call = LocalLinear(ridge=0.4), None
        q, k, v = (torch.randn(1, h, 9, 4, generator=torch.Generator().manual_seed(h)) for h in (4, 2, 2))
        call = headway.door.AttentionCall.from_tensors(q, k, v, causal=True)
        rows = torch.arange(9)
        made = editor.edit_weights(call, call.weights(rows), rows)
        visible = torch.ones(9, 9, dtype=torch.bool).tril()[None, None]
        expected = reference_weights(q, k, ridge=torch.full((1, 4, 9), 0.4), scale=0.5, visible=visible)
        torch.testing.assert_close(made, expected, rtol=1e-3, atol=1e-4)

    def test_a_host_with_learned_sinks_is_refused(self):
        q = torch.randn(1, 2, 5, 4)
        call = headway.door.AttentionCall.from_tensors(q, q, q, causal=True, sinks=torch.zeros(2))
        with pytest.raises(headway.errors.InterceptionError, match="learned sinks"):
            LocalLinear().edit_weights(call, call.weights(), torch.arange(5))

    def test_a_ridge_that_is_not_positive_is_refused(self):
        with pytest.raises(ArgumentError, match="ridge"):
            LocalLinear(ridge=0.0)


def test_the_card_is_in_the_catalogue():
    assert headway.card.catalogue()["local-linear-attention"] is CARD
