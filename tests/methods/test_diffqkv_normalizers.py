"""DiffQKV with another normaliser than softmax: the softmax mixer with heads repeated, and every form the same."""

from __future__ import annotations

import pytest
import torch
from tests.contracts.normalised_mixers import TIGHT, Forms, fresh, inputs

from headway.errors import ArgumentError, ConflictError
from headway.kernels.normalizers import AffineScaled
from headway.methods.layers.diffqkv import DiffQKV
from headway.methods.layers.softmax import SoftmaxAttention

WIDTH, HEADS, BASE = 16, 4, 10_000.0
NORMALIZERS = {
    "plus one": {"normalizer": "softmax_plus_one"},
    "learned denominator": {"normalizer": "learned_denominator"},
    "key slot": {"normalizer": "key_slot"},
    "key-value slot": {"normalizer": "key_value_slot"},
    "value bias": {"normalizer": "value_bias"},
    "clipped": {"normalizer": "clipped", "normalizer_options": {"gamma": -0.02}},
    "softpick": {"normalizer": "softpick"},
    "sigmoid": {"normalizer": "sigmoid", "normalizer_options": {"scaling": "count"}},
    "kernel mlp": {"normalizer": "kernel_mlp"},
    "elastic": {"normalizer": "elastic"},
    "affine": {"normalizer": "affine"},
}


def build(options, key_heads=1, value_heads=2, seed=0, **further) -> DiffQKV:
    torch.manual_seed(seed)
    further = {"aug_dim": 0, "rope_base": BASE} | further
    mixer = DiffQKV(WIDTH, heads=HEADS, key_heads=key_heads, value_heads=value_heads, **further, **options)
    mixer = mixer.double().eval()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    if isinstance(mixer.normalizer, AffineScaled):
        mixer.normalizer.average.fill_(0.4)
    return mixer


def as_softmax_mixer(mixer: DiffQKV, options) -> SoftmaxAttention:
    """The softmax mixer with the weights of `mixer`, its key and value heads repeated to one count."""
    heads = max(mixer.layout.key_heads, mixer.layout.value_heads)
    other = SoftmaxAttention(WIDTH, heads=HEADS, kv_heads=heads, rope_base=BASE, **options).double().eval()
    repeated = {}
    for name, linear, own in (
        ("key.weight", mixer.k_proj, mixer.layout.key_heads),
        ("value.weight", mixer.v_proj, mixer.layout.value_heads),
    ):
        repeated[name] = linear.weight.unflatten(0, (own, -1)).repeat_interleave(heads // own, 0).flatten(0, 1)
    rest = {"query.weight": mixer.q_proj.weight, "output.weight": mixer.o_proj.weight}
    assert mixer.normalizer is not None
    inner = {f"normalizer.{name}": tensor for name, tensor in mixer.normalizer.state_dict().items()}
    other.load_state_dict(repeated | rest | inner)
    return other


@pytest.fixture(params=list(NORMALIZERS.values()), ids=list(NORMALIZERS))
def options(request):
    return request.param


@pytest.fixture
def mixer(options):
    return build(options)


class TestContract(Forms):
    pass


@pytest.mark.parametrize(("key_heads", "value_heads"), [(1, 2), (2, 2), (4, 1)])
def test_it_is_the_softmax_mixer_with_heads_repeated(options, key_heads, value_heads):
    mixer = build(options, key_heads, value_heads)
    other = as_softmax_mixer(mixer, options)
    for mode in ("reference", "block", "step"):
        torch.testing.assert_close(mixer(inputs(11), mode=mode)[0], other(inputs(11))[0], **TIGHT)


def test_the_state_repeats_no_head(options):
    mixer = build(options)
    _, state = mixer(inputs(12), state=fresh(mixer))
    assert sum(t.numel() for t in state.tensors.values()) == 2 * 12 * mixer.layout.cache_elements


def test_gradients_reach_every_parameter_of_the_normaliser(options):
    mixer = build(options)
    assert mixer.normalizer is not None
    mixer(inputs(9))[0].pow(2).sum().backward()
    for name, parameter in mixer.normalizer.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.any()), name


class TestRefusals:
    def test_selected_values(self):
        with pytest.raises(ConflictError, match="selective_values=3"):
            build({"normalizer": "softpick"}, selective_values=3)

    def test_values_of_another_size_than_keys(self):
        with pytest.raises(ArgumentError, match="value_dim: got 2 with keys of size 4"):
            build({"normalizer": "softpick"}, value_dim=2)

    def test_an_unknown_name(self):
        with pytest.raises(ArgumentError, match="normalizer: got 'softmaxx'"):
            build({"normalizer": "softmaxx"})

    def test_two(self):
        with pytest.raises(ArgumentError, match="expected one"):
            build({"normalizer": "softpick+sigmoid"})


def test_softmax_keeps_its_own_forms():
    assert build({"normalizer": "softmax"}).normalizer is None
