"""Lightning attention and TNL: the layer against its formula and a released port, positions, the door, and the model.

What holds for every mixer (forms, splits, padding, documents, gradients) is in tests/contracts/test_mixers.py."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional

import headway
from headway.door import Observer
from headway.errors import ArgumentError
from headway.kernels.norms import RMSNorm, SimpleRMSNorm, rms_norm
from headway.kernels.slopes import head_slopes
from headway.methods.layers.lightning import CARD, LRPE, Lightning, tnl_fields
from headway.models import HeadwayConfig, HeadwayForCausalLM
from headway.train import train


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def layer(**options) -> Lightning:
    torch.manual_seed(0)
    return Lightning(**{"width": 12, "heads": 3, "layers": 4, "block": 4, **options}).double()


def model(**changes) -> HeadwayForCausalLM:
    torch.manual_seed(0)
    fields = {"vocab_size": 61, "layers": 3, "heads": 2, **tnl_fields(width=16), **changes}
    return HeadwayForCausalLM(HeadwayConfig(**fields)).eval()


class TestLayer:
    def test_a_tnl_layer_is_its_formula(self):
        mixer, x = layer(layer=2), draw(2, 9, 12)
        q, k, v, u = (mixer.project(x) @ torch.eye(48, dtype=x.dtype)).split(12, -1)
        heads = [t.view(2, 9, 3, 4) for t in (functional.silu(q), functional.silu(k), v)]
        distance = torch.arange(9)[:, None] - torch.arange(9)
        decay = torch.exp(-head_slopes(3, layer=2, layers=4).double()[:, None, None] * distance).tril()
        products = torch.einsum("bthd,bshd->bhts", heads[0], heads[1])
        mixed = torch.einsum("bhts,bshe->bthe", products * decay, heads[2]).flatten(2)
        torch.testing.assert_close(mixer(x)[0], mixer.output(rms_norm(mixed) * u), rtol=1e-9, atol=1e-9)

    def test_the_minimax_preset_is_the_layer_of_that_model(self):
        """Its port in transformers has the same slopes but for 1e-5 in the divisor of the temperature."""
        from transformers import MiniMaxConfig
        from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

        config = MiniMaxConfig(
            hidden_size=16, num_attention_heads=4, num_hidden_layers=3, block_size=8, head_dim=4, num_key_value_heads=4
        )
        theirs = MiniMaxLightningAttention(config, layer_idx=1).double()
        ours = Lightning(16, heads=4, layer=1, layers=3, preset="minimax").double()
        by_head = theirs.qkv_proj.weight.view(4, 3, 4, 16).transpose(0, 1).reshape(48, 16)
        with torch.no_grad():
            ours.project.weight.copy_(torch.cat([by_head, theirs.output_gate.weight]))
            ours.output.weight.copy_(theirs.out_proj.weight)
        x = draw(2, 21, 16)
        expected = theirs(x, (x, x), None)[0]
        torch.testing.assert_close(ours(x)[0], expected, rtol=1e-4, atol=1e-6)

    def test_both_slope_families_are_there_and_differ(self):
        x = draw(1, 9, 12)
        found = [layer(layer=1, decay=decay)(x)[0] for decay in ("alibi", "linear", "none")]
        assert not torch.allclose(found[0], found[1])
        assert not torch.allclose(found[0], found[2])

    def test_the_last_layer_decays_almost_not_and_no_layer_grows(self):
        slopes = [Lightning(12, heads=3, layer=i, layers=4).slopes for i in range(4)]
        assert all(bool((s > 0).all()) for s in slopes)
        torch.testing.assert_close(slopes[3] / slopes[0], torch.full((3,), 1e-5), rtol=1e-3, atol=0)

    def test_slopes_keep_their_precision_in_a_half_precision_model(self):
        assert torch.equal(layer(layer=1).bfloat16().slopes, layer(layer=1).slopes)

    @pytest.mark.parametrize(
        ("options", "norm", "inner"),
        [
            ({"preset": "tnl"}, SimpleRMSNorm, 4),
            ({"preset": "minimax"}, RMSNorm, 4),
            ({"gate": "none"}, SimpleRMSNorm, 3),
        ],
    )
    def test_presets_choose_norm_and_gate(self, options, norm, inner):
        mixer = layer(**options)
        assert isinstance(mixer.norm, norm)
        assert mixer.project.out_features == inner * 12

    def test_a_low_rank_gate_has_two_thin_matrices(self):
        mixer = layer(preset="minimax", gate_rank=2)
        assert [m.weight.shape for m in mixer.low_rank] == [(2, 12), (12, 2)]
        assert mixer(draw(1, 5, 12))[0].shape == (1, 5, 12)

    def test_sizes_of_heads_are_free(self):
        mixer, x = layer(head_dim=5, value_dim=7, layer=1), draw(2, 9, 12)
        torch.testing.assert_close(mixer(x)[0], mixer(x, mode="reference")[0])
        assert mixer.init_state(2).tensors["kv"].shape == (2, 3, 5, 7)

    def test_the_output_is_normed_before_half_precision_can_overflow(self):
        mixer = layer(layer=3, decay="none").half()
        with torch.no_grad():
            mixer.project.weight.abs_()
        y = mixer(torch.full((1, 3000, 12), 30.0, dtype=torch.float16))[0]
        assert bool(torch.isfinite(y).all())

    def test_a_layer_survives_its_state_dict(self):
        first, second = layer(), Lightning(12, heads=3, layers=4, block=4).double()
        second.load_state_dict(copy.deepcopy(first.state_dict()))
        x = draw(1, 9, 12)
        assert torch.equal(first(x)[0], second(x)[0])

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"preset": "tnll"}, "Did you mean 'tnl'"),
            ({"decay": "geometric"}, "family: got"),
            ({"temperature": "hot"}, "temperature: got"),
            ({"lrpe": "last"}, "lrpe: got"),
            ({"activation": "relu"}, "activation: got"),
            ({"gate": "tanh"}, "gate: got"),
            ({"norm": "batch"}, "norm: got"),
            ({"head_dim": 0}, "head_dim: got 0"),
            ({"block": 0}, "block: got 0"),
            ({"gate": "none", "gate_rank": 2}, "gate_rank: got 2"),
            ({"heads": 5}, "width, heads"),
        ],
    )
    def test_bad_options_are_named(self, options, message):
        with pytest.raises(ArgumentError, match=message):
            layer(**options)

    def test_its_state_cannot_be_cropped_and_says_so(self):
        mixer = layer()
        with pytest.raises(ArgumentError, match="lightning"):
            mixer.crop(mixer.init_state(1), 1)


class TestPositions:
    def test_products_depend_on_the_distance_alone(self):
        turn = LRPE(2, 3).double()
        q, k = draw(1, 2, 1, 3), draw(1, 2, 1, 3, seed=1)
        products = [
            (turn(q, torch.tensor([[t]])) * turn(k, torch.tensor([[s]]))).sum(-1)
            for t, s in ((9, 4), (105, 100), (4, 9), (5, 0))
        ]
        for other in products[1:]:
            torch.testing.assert_close(other, products[0])
        expected = (q * k)[:, :, 0] * torch.cos(5 * turn.theta)
        torch.testing.assert_close(products[0][..., 0], expected.sum(-1))

    def test_angles_start_from_all_channels_of_all_heads(self):
        expected = 10000.0 ** (-2 * torch.arange(6.0) / 6)
        torch.testing.assert_close(LRPE(2, 3).theta.flatten(), expected)

    def test_angles_stay_wide_in_a_half_precision_model(self):
        turn = LRPE(2, 3)
        exact = turn.theta.clone()
        assert torch.equal(turn.bfloat16().theta, exact)
        assert turn.double().theta.dtype == torch.float64

    @pytest.mark.parametrize(("places", "layers"), [("first", [0]), ("all", [0, 1, 2]), ("none", [])])
    def test_they_are_in_the_layers_asked_for(self, places, layers):
        mixers = [Lightning(12, heads=3, layer=i, layers=3, lrpe=places) for i in range(3)]
        assert [i for i, mixer in enumerate(mixers) if mixer.lrpe is not None] == layers
        assert [m.init_state(1).tensors["kv"].shape[2] for m in mixers] == [8 if i in layers else 4 for i in range(3)]

    def test_they_are_learned(self):
        mixer = layer()
        mixer(draw(1, 9, 12))[0].sum().backward()
        assert bool(mixer.lrpe.theta.grad.abs().sum() > 0)


class Seen(Observer):
    """Weights of every call, and whether they give its output."""

    def start(self) -> None:
        self.calls: list[tuple[torch.Tensor, float]] = []

    def observe(self, call, output, lse=None) -> None:
        weights = call.weights()
        error = float((weights @ call.value - output).abs().max())
        self.calls.append((weights.clone(), error))

    def result(self):
        return self.calls


class TestDoor:
    @pytest.mark.parametrize("padded", [False, True])
    @torch.no_grad()
    def test_an_observer_meets_signed_weights_that_give_the_output(self, padded):
        host = model(mixer_options={"preset": "tnl"})
        ids = torch.randint(61, (2, 12), generator=torch.Generator().manual_seed(0))
        mask = torch.ones_like(ids)
        if padded:
            mask[0, :3], mask[0, 6] = 0, 0
        before = host(input_ids=ids, attention_mask=mask).logits
        seen = Seen()
        with headway.observe(host, seen):
            during = host(input_ids=ids, attention_mask=mask).logits
        assert torch.equal(before, during)
        calls = seen.result()
        assert len(calls) == 3
        for weights, error in calls:
            assert error < 1e-5
            assert not bool(weights.triu(1).any())
            if padded:
                assert not bool(weights[0, :, :, 6].any() or weights[0, :, 6].any())
        assert bool((calls[0][0] < 0).any())

    @torch.no_grad()
    def test_tokens_behind_a_filled_state_are_not_weighed_and_that_is_reported(self):
        host, seen = model(mixer=["lightning", "softmax", "lightning"], mixer_options={}), Seen()
        cache = host(input_ids=torch.arange(8)[None], use_cache=True).past_key_values
        with headway.observe(host, seen) as handle:
            host(input_ids=torch.zeros(1, 1, dtype=torch.long), past_key_values=cache, use_cache=True)
        assert [weights.shape[-1] for weights, _ in seen.result()] == [9], "the softmax layer alone"
        past = {row["layer"] for row in handle.report() if any("past the door" in path for path in row["paths"])}
        assert past == {0, 2}


class TestModel:
    def test_tnl_is_what_the_released_model_is_made_of(self):
        host = model()
        assert isinstance(host.norm, SimpleRMSNorm)
        assert [block.mixer.lrpe is not None for block in host.layers] == [True, False, False]
        assert host.lm_head.weight is not host.embed_tokens.weight
        assert host.config.embed_scale
        assert host.config.mlp == "sglu"
        assert host.config.mlp_width == 32
        assert not any("norm" in name for name, _ in host.named_parameters())

    @pytest.mark.parametrize("preset", ["tnl", "minimax"])
    def test_it_generates_the_same_with_and_without_its_cache(self, preset):
        host = model(mixer_options={"preset": preset})
        ids = torch.randint(1, 61, (2, 9), generator=torch.Generator().manual_seed(3))
        mask = torch.ones_like(ids)
        mask[1, :4] = 0
        options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "attention_mask": mask}
        cached = host.generate(ids, use_cache=True, **options)
        assert torch.equal(cached, host.generate(ids, use_cache=False, **options))
        alone = host.generate(ids[1:, 4:], max_new_tokens=8, do_sample=False, pad_token_id=0)
        assert torch.equal(cached[1:, 9:], alone[:, 5:])

    @torch.no_grad()
    def test_its_cache_is_as_large_behind_ten_thousand_tokens_as_behind_a_hundred(self):
        host, sizes = model(), []
        for tokens in (100, 10_000):
            cache = host(input_ids=torch.zeros(1, tokens, dtype=torch.long), use_cache=True).past_key_values
            sizes.append(cache.bytes)
        assert sizes[0] == sizes[1]

    @torch.no_grad()
    def test_it_goes_on_with_many_tokens_at_once(self):
        """A released port falls back to a loop over tokens once it has a cache; here the block form takes a state."""
        host = model()
        ids = torch.randint(61, (1, 40), generator=torch.Generator().manual_seed(1))
        cache = host(input_ids=ids[:, :17], use_cache=True).past_key_values
        rest = host(input_ids=ids[:, 17:], past_key_values=cache, use_cache=True).logits
        torch.testing.assert_close(rest, host(input_ids=ids).logits[:, 17:], rtol=1e-4, atol=1e-4)

    def test_it_survives_saving(self, tmp_path):
        host = model()
        host.save_pretrained(tmp_path)
        again = HeadwayForCausalLM.from_pretrained(tmp_path).eval()
        ids = torch.arange(12)[None]
        assert torch.equal(host(input_ids=ids).logits, again(input_ids=ids).logits)

    def test_it_learns_to_repeat_a_period(self):
        host = model()
        text = (torch.arange(33) % 3)[None].expand(4, -1) + 1
        trained = train(host, [text] * 100, steps=100, learning_rate=1e-2)
        assert trained.losses[0] > 3
        assert trained.loss < 0.2

    def test_changes_reach_the_mixer(self):
        config = HeadwayConfig(vocab_size=8, layers=1, heads=2, **tnl_fields(width=16, decay="none", gate="none"))
        mixer = HeadwayForCausalLM(config).layers[0].mixer
        assert mixer.gate is None
        assert not bool(mixer.slopes.any())


def test_the_card_says_which_paper():
    assert (CARD.slug, CARD.arxiv, CARD.family) == ("lightning-attention", "2405.17381", "layers")
