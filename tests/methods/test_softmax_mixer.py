"""The softmax mixer with each of its options: three forms, states, padding, documents, and what it refuses."""

from __future__ import annotations

import logging

import pytest
import torch
from tests.contracts.normalised_mixers import TIGHT, Forms, fresh, inputs

from headway.errors import ArgumentError
from headway.kernels.normalizers import AffineScaled
from headway.kernels.position_bias import relative_buckets, sinusoids
from headway.methods.layers.softmax import SoftmaxAttention

AFFINE = {"normalizer": "affine"}
OPTIONS = {
    "plain": {},
    "multi-head": {"kv_heads": 4},
    "multi-query, wide heads": {"kv_heads": 1, "head_dim": 6},
    "no positions": {"position": "none"},
    "alibi": {"position": "alibi"},
    "relative": {"position": "relative"},
    "learned": {"position": "learned"},
    "sinusoidal": {"position": "sinusoidal"},
    "window": {"window": 4},
    "window of one": {"window": 1},
    "window, alibi": {"window": 5, "position": "alibi"},
    "query-key norm, biases": {"qk_norm": True, "bias": True},
    "plus one": {"normalizer": "softmax_plus_one"},
    "learned denominator": {"normalizer": "learned_denominator", "window": 5},
    "key slot": {"normalizer": "key_slot"},
    "key-value slot": {"normalizer": "key_value_slot", "position": "alibi"},
    "value bias": {"normalizer": "value_bias"},
    "clipped": {"normalizer": "clipped", "normalizer_options": {"gamma": -0.02}},
    "softpick": {"normalizer": "softpick", "window": 5},
    "sigmoid": {"normalizer": "sigmoid", "normalizer_options": {"scaling": "count"}},
    "elu": {"normalizer": "elu", "normalizer_options": {"normalise": True}},
    "kernel elu": {"normalizer": "kernel_elu", "normalizer_options": {"normalise": True}},
    "kernel identity": {"normalizer": "kernel_identity"},
    "kernel mlp": {"normalizer": "kernel_mlp"},
    "elastic": {"normalizer": "elastic"},
    "affine": AFFINE,
    "affine, window": {**AFFINE, "window": 4},
    "affine, length": {**AFFINE, "normalizer_options": {"count": "length", "length": 32}},
    "affine, sigmoid, gated": {**AFFINE, "normalizer_options": {"activation": "sigmoid"}, "gate": "element"},
    "gates": {"gate": ["head", "value"]},
    "conditional": {"gate": "conditional"},
    "context": {"gate": "context"},
}


def build(options, seed=0, **further) -> SoftmaxAttention:
    torch.manual_seed(seed)
    mixer = SoftmaxAttention.example(**options, **further).double().eval()
    assert isinstance(mixer, SoftmaxAttention)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    if isinstance(mixer.normalizer, AffineScaled):
        mixer.normalizer.average.fill_(0.4)
    return mixer


@pytest.fixture(params=list(OPTIONS.values()), ids=list(OPTIONS))
def mixer(request):
    return build(request.param)


class TestContract(Forms):
    def test_tokens_are_taken_back_or_refused(self, mixer):
        x = inputs(9)
        mask = torch.ones(2, 9, dtype=torch.bool)
        mask[0, :2] = False
        _, state = mixer(x, mask=mask, state=fresh(mixer))
        if mixer.window is not None:
            with pytest.raises(ArgumentError, match="softmax"):
                mixer.crop(state, 3)
            return
        _, short = mixer(x[:, :6], mask=mask[:, :6], state=fresh(mixer))
        after = inputs(4, seed=2)
        cropped = mixer.crop(state, 3)
        torch.testing.assert_close(mixer(after, state=cropped)[0], mixer(after, state=short)[0], **TIGHT)


@pytest.mark.parametrize("name", OPTIONS)
def test_read_both_ways_padding_and_other_documents_do_not_count(name):
    """Every normaliser and gate also in an encoder."""
    mixer, x = build(OPTIONS[name], causal=False), inputs(9)
    mask = torch.tensor([[0, 1, 1, 0, 1, 1, 1, 0, 1], [1] * 9], dtype=torch.bool)
    padded = mixer(torch.where(mask[..., None], x, torch.nan), mask=mask)[0]
    resets = torch.zeros(2, 9, dtype=torch.bool)
    resets[:, 4] = True
    packed = mixer(x, resets=resets)[0]
    for row in range(2):
        alone = mixer(x[row : row + 1, mask[row]], mode="reference")[0]
        torch.testing.assert_close(padded[row : row + 1, mask[row]], alone, **TIGHT)
    for part in (slice(0, 4), slice(4, 9)):
        torch.testing.assert_close(packed[:, part], mixer(x[:, part], mode="reference")[0], **TIGHT)


class TestPositions:
    def test_a_window_sees_the_token_and_those_before_it(self):
        mixer = build({"window": 3})
        x = inputs(9)
        other = x.clone()
        other[:, 2] += 1.0
        changed = (mixer(x)[0] != mixer(other)[0]).any(-1).any(0)
        assert changed.tolist() == [False, False, True, True, True, False, False, False, False]

    def test_the_state_of_a_window_does_not_grow(self):
        mixer = build({"window": 4})
        _, state = mixer(inputs(30), state=fresh(mixer))
        assert state.tensors["key"].shape[2] == 3
        for _ in range(5):
            _, state = mixer(inputs(1), state=state)
        assert state.tensors["key"].shape[2] == 3
        mask = torch.tensor([[True, False, True], [True, True, True]])
        _, padded = mixer(inputs(3), mask=mask, state=state)
        assert padded.tensors["key"].shape[2] <= 4

    def test_a_window_as_long_as_the_text_is_none(self):
        x = inputs(6)
        torch.testing.assert_close(build({"window": 6})(x)[0], build({})(x)[0], **TIGHT)

    def test_without_positions_order_matters_by_the_mask_alone(self):
        mixer, x = build({"position": "none"}), inputs(5)
        turned = torch.cat([x[:, :4].flip(1), x[:, 4:]], 1)
        torch.testing.assert_close(mixer(turned)[0][:, 4], mixer(x)[0][:, 4], **TIGHT)
        assert not torch.allclose(build({})(turned)[0][:, 4], build({})(x)[0][:, 4])

    @pytest.mark.parametrize("position", ["rope", "alibi", "relative"])
    def test_relative_positions_count_real_tokens_of_the_document(self, position):
        mixer, x = build({"position": position}), inputs(7)
        mask = torch.tensor([[True, True, False, False, True, True, True]] * 2)
        y = mixer(x, mask=mask)[0]
        torch.testing.assert_close(y[:, mask[0]], mixer(x[:, mask[0]])[0], **TIGHT)

    def test_a_prefix_sees_itself_and_the_rest_is_causal(self):
        mixer, x = build({"prefix": 4}), inputs(8)
        changed = []
        for token in (2, 6):
            other = x.clone()
            other[:, token] += 1.0
            changed.append((mixer(x)[0] != mixer(other)[0]).any(-1).any(0).tolist())
        assert changed == [[True] * 8, [False] * 6 + [True] * 2]

    def test_a_prefix_belongs_to_its_document(self):
        mixer, x = build({"prefix": 3}), inputs(9)
        resets = torch.zeros(2, 9, dtype=torch.bool)
        resets[:, 4] = True
        y = mixer(x, resets=resets)[0]
        torch.testing.assert_close(y[:, :4], mixer(x[:, :4])[0], **TIGHT)
        torch.testing.assert_close(y[:, 4:], mixer(x[:, 4:])[0], **TIGHT)
        mask = torch.tensor([[False, True, False, True, True, True, True, True, True]] * 2)
        padded = mixer(x, mask=mask)[0]
        torch.testing.assert_close(padded[:, mask[0]], mixer(x[:, mask[0]], mode="reference")[0], **TIGHT)

    def test_a_prefix_may_be_read_first_and_never_in_pieces(self):
        mixer, x = build({"prefix": 3}), inputs(9)
        first, state = mixer(x[:, :4], state=fresh(mixer))
        rest, _ = mixer(x[:, 4:], state=state)
        torch.testing.assert_close(torch.cat([first, rest], 1), mixer(x)[0], **TIGHT)
        _, state = mixer(x[:, :2], state=fresh(mixer))
        with pytest.raises(ArgumentError, match="cut inside its prefix of 3"):
            mixer(x[:, 2:], state=state)
        with pytest.raises(ArgumentError, match="'step' with prefix=3"):
            mixer(x, mode="step")

    def test_read_both_ways_every_token_sees_every_other(self):
        mixer, x = build({}, causal=False), inputs(6)
        other = x.clone()
        other[:, 5] += 1.0
        assert bool((mixer(x)[0] != mixer(other)[0]).any(-1).all())
        mask = torch.tensor([[True, False, True, True, True, False]] * 2)
        padded = mixer(torch.where(mask[..., None], x, torch.nan), mask=mask)[0]
        torch.testing.assert_close(padded[:, mask[0]], mixer(x[:, mask[0]], mode="reference")[0], **TIGHT)
        resets = torch.zeros(2, 6, dtype=torch.bool)
        resets[:, 2] = True
        torch.testing.assert_close(mixer(x, resets=resets)[0][:, 2:], mixer(x[:, 2:])[0], **TIGHT)
        with pytest.raises(ArgumentError, match="causal=False"):
            mixer.init_state(1)

    def test_a_window_both_ways_reaches_as_far_back_as_ahead(self):
        mixer, x = build({"window": 2}, causal=False), inputs(7)
        other = x.clone()
        other[:, 3] += 1.0
        assert (mixer(x)[0] != mixer(other)[0]).any(-1).any(0).tolist() == [
            False,
            False,
            True,
            True,
            True,
            False,
            False,
        ]

    def test_buckets_are_exact_first_and_wider_later(self):
        found = relative_buckets(torch.tensor([0, 1, 7, 8, 15, 16, 127, 128, 5000]), buckets=16, farthest=128)
        assert found.tolist()[:3] == [0, 1, 7]
        assert found.tolist() == sorted(found.tolist())
        assert found[-2:].tolist() == [15, 15]
        both = relative_buckets(torch.tensor([-3, 3, 0]), buckets=16, causal=False)
        assert both.tolist() == [11, 3, 0]

    def test_sinusoids_by_definition(self):
        found = sinusoids(torch.tensor([[0, 3]]), 4)
        assert found[0, 0].tolist() == [0, 0, 1, 1]
        angles = torch.tensor([3.0, 0.03])
        torch.testing.assert_close(found[0, 1], torch.cat([angles.sin(), angles.cos()]))


class TestLoading:
    def test_softmax_weights_start_a_layer_at_softmax(self, caplog):
        source, x = build({}), inputs(7)
        for options in (
            {"normalizer": "learned_denominator"},
            {"normalizer": "affine"},
            {"normalizer": "elastic"},
            {"gate": "conditional"},
            {"gate": ["head", "value"], "gate_options": {"head": {"bias": 0.0}, "value": {"bias": 0.0}}},
        ):
            mixer = build(options, seed=3)
            with caplog.at_level(logging.WARNING):
                mixer.load_softmax(source.state_dict())
            assert "Train it before you judge it" in caplog.messages[-1]
            torch.testing.assert_close(mixer(x)[0], source(x)[0], rtol=1e-4, atol=1e-4)

    def test_a_normaliser_without_that_limit_must_be_started_fresh(self, caplog):
        mixer, source = build({"normalizer": "softpick"}), build({}, seed=5)
        with pytest.raises(ArgumentError, match=r"softpick.*start='fresh'"):
            mixer.load_softmax(source.state_dict())
        with caplog.at_level(logging.WARNING):
            mixer.load_softmax(source.state_dict(), start="fresh")
        assert torch.equal(mixer.query.weight, source.query.weight)
        assert "was never trained like that" in caplog.text

    def test_softmax_into_softmax_needs_no_warning(self, caplog):
        build({}).load_softmax(build({}, seed=5).state_dict())
        assert not caplog.records

    def test_other_names_are_refused(self):
        with pytest.raises(ArgumentError, match=r"weights: got other names than expected: query\.weight"):
            build({}).load_softmax({k: v for k, v in build({}).state_dict().items() if k != "query.weight"})
        with pytest.raises(ArgumentError, match="start"):
            build({}).load_softmax({}, start="warm")


class TestArguments:
    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"kv_heads": 3}, "kv_heads"),
            ({"position": "rotary"}, "position"),
            ({"window": 0}, "window"),
            ({"prefix": -1}, "prefix"),
            ({"prefix": 2, "causal": False}, "prefix"),
            ({"head_dim": 5}, "dim: got 5"),
            ({"normalizer": ["softpick", "affine"]}, "got 2"),
            ({"normalizer": "softmax2"}, "normalizer"),
            ({"gate": "door"}, "gate"),
            ({"gate": ["head", "head"]}, "each gate once"),
            ({"gate": ["head", "value"], "gate_options": {"bias": 1.0}}, "gate_options"),
            ({"position": "alibi", "normalizer": "kernel_elu"}, "no logits to add"),
        ],
    )
    def test_bad_options_are_named(self, options, match):
        with pytest.raises(ArgumentError, match=match):
            SoftmaxAttention.example(**options)

    def test_a_text_longer_than_the_learned_table_is_refused(self):
        with pytest.raises(ArgumentError, match="got position 5, expected less than 4"):
            build({"position": "learned", "max_positions": 4})(inputs(6))

    def test_a_counted_length_needs_its_number_in_decoding(self):
        mixer = build({"normalizer": "affine", "normalizer_options": {"count": "length"}})
        assert bool(torch.isfinite(mixer(inputs(5))[0]).all())
        with pytest.raises(ArgumentError, match="length: got None"):
            mixer(inputs(5), state=fresh(mixer))


class TestModels:
    @pytest.mark.parametrize("name", ["plain", "window", "learned denominator", "key-value slot", "softpick", "affine"])
    def test_a_language_model_generates_from_its_states_and_survives_a_file(self, name, tmp_path):
        from headway.models import HeadwayConfig, HeadwayForCausalLM

        torch.manual_seed(0)
        options = {"kv_heads": 2, **OPTIONS[name]}
        config = HeadwayConfig(vocab_size=31, width=16, layers=2, heads=4, mixer="softmax", mixer_options=options)
        model = HeadwayForCausalLM(config)
        ids = torch.randint(1, 31, (2, 9), generator=torch.Generator().manual_seed(1))
        model.train()(input_ids=ids)
        model.eval()
        cached = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
        again = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0, use_cache=False)
        assert torch.equal(cached, again)
        model.save_pretrained(tmp_path)
        loaded = HeadwayForCausalLM.from_pretrained(tmp_path).eval()
        with torch.no_grad():
            assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
