"""Affine-scaled attention as a method: its options, what is read of a model, and that a share is not a raw weight."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import headway
from headway.card import catalogue
from headway.door import AttentionCall
from headway.door.mixer import registered_mixer
from headway.errors import ArgumentError, InterceptionError
from headway.kernels.normalizers import Operation, make_normalizer
from headway.kernels.normalizers.affine import AffineWeighing
from headway.methods.layers.softmax import SoftmaxAttention
from headway.methods.sinks.affine_scaled import (
    FirstTokenReading,
    gradient_steadiness,
    measure_scales,
    mixer_options,
    scaled_layers,
    watching_scales,
)


class Host(nn.Module):
    """Two layers of attention on vectors."""

    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            SoftmaxAttention(16, heads=4, kv_heads=2, layer=layer, layers=2, **options) for layer in range(2)
        )

    def forward(self, x, mask=None):
        for layer in self.layers:
            x = x + layer(x, mask=mask)[0]
        return x


def inputs(tokens=9, batch=2):
    return torch.randn(batch, tokens, 16, generator=torch.Generator().manual_seed(1))


def reading_of(call: AttentionCall):
    observer = FirstTokenReading()
    observer.start()
    observer.observe(call, torch.zeros(1))
    return observer.result()[0]


def planted(weights, **fields):
    """A call whose weights are what is given: (batch, heads, rows, keys)."""

    class Given:
        name, whole = "given", False

        def __call__(self, logits, visible, *, positions, query, key):
            return torch.where(visible, weights[:, :, positions], 0.0)

    batch, heads, tokens, _ = weights.shape
    zeros = torch.zeros(batch, heads, tokens, 4)
    fields.setdefault("causal", True)
    return AttentionCall.from_tensors(zeros, zeros, zeros, weighing=Given(), **fields)


def test_it_is_in_the_catalogue():
    assert catalogue()["affine-scaled-attention"].arxiv == "2602.23057"


def test_options_build_a_layer_of_the_softmax_mixer():
    layer = registered_mixer("softmax")(16, heads=4, **mixer_options(gated=True, activation="sigmoid"))
    assert layer.normalizer.name == "affine"
    assert layer.normalizer.activation == "sigmoid"
    assert list(layer.gates) == ["element"]


def test_the_form_of_the_paper_counts_one_length():
    assert mixer_options("paper", length=64)["normalizer_options"] == {"count": "length", "length": 64}
    with pytest.raises(ArgumentError, match="length: got None for form='paper'"):
        mixer_options("paper")
    with pytest.raises(ArgumentError, match="form"):
        mixer_options("papers")


def test_parameters_are_those_of_the_reported_overheads():
    """0.4, 1.0 and 2.1 million at the widths, heads and layers of the three students."""
    for width, heads, layers, millions in ((1024, 16, 24, 0.4), (2048, 32, 16, 1.0), (3072, 24, 28, 2.1)):
        normalizer = make_normalizer("affine", width=width, heads=heads, kv_heads=heads, head_dim=width // heads)
        count = layers * sum(p.numel() for p in normalizer.parameters())
        assert round(count / 1e6, 1) == millions


def test_a_model_without_affine_layers_is_named():
    with pytest.raises(ArgumentError, match="Host without affine-scaled attention"):
        scaled_layers(Host())


def test_scales_of_a_model_by_layer():
    host = Host(**mixer_options())
    with torch.no_grad():
        host.layers[1].normalizer.map.weight.mul_(1000)
    host.train()
    found = measure_scales(host, x=inputs())
    assert host.training
    assert len(found.std) == 2
    assert found.std[1] > 0.2 > 0.05 > found.std[0]
    assert found.saturated[0] == 0.0 < found.saturated[1]
    assert found.average == ((0.0,) * 4,) * 2
    with watching_scales(host) as watched:
        host.eval()(inputs())
    expected = host.layers[0].normalizer.alpha(inputs())
    torch.testing.assert_close(watched["layers.0.normalizer"][0], expected)


def test_the_raw_weight_falls_with_the_scale_and_the_share_stays():
    weights = torch.zeros(1, 2, 6, 6)
    weights[..., 0], weights[..., 1] = 0.8, 0.2
    weights[:, 1] *= 0.25
    found = reading_of(planted(weights))
    torch.testing.assert_close(found.raw, torch.tensor([0.8, 0.2]))
    torch.testing.assert_close(found.share, torch.tensor([0.8, 0.8]))
    torch.testing.assert_close(found.mass, torch.tensor([1.0, 0.25]))


def test_negative_weights_count_by_size_in_the_share():
    weights = torch.zeros(1, 1, 5, 5)
    weights[..., 0], weights[..., 1] = -0.3, 0.1
    found = reading_of(planted(weights))
    torch.testing.assert_close(found.raw, torch.tensor([-0.3]))
    torch.testing.assert_close(found.share, torch.tensor([0.75]))
    torch.testing.assert_close(found.mass, torch.tensor([-0.2]))
    counts = torch.tensor([1 / n for n in range(2, 6)])
    torch.testing.assert_close(found.negative, counts.mean()[None])


def test_the_first_row_says_nothing_and_padding_is_left_out():
    weights = torch.zeros(1, 1, 6, 6)
    weights[0, 0, :, 2] = 0.5
    weights[0, 0, 2] = torch.tensor([9.0, 9, 9, 9, 9, 9])
    mask = torch.ones(1, 1, 6, 6, dtype=torch.bool)
    mask[..., :2], mask[:, :, :2] = False, False
    found = reading_of(planted(weights, mask=mask))
    torch.testing.assert_close(found.raw, torch.tensor([0.5]))


def test_even_attention_gives_the_first_token_its_even_share():
    count = torch.arange(1, 7).view(1, 1, 6, 1)
    found = reading_of(planted(torch.ones(1, 1, 6, 6) / count))
    torch.testing.assert_close(found.raw, (1 / torch.arange(2.0, 7)).mean()[None])
    torch.testing.assert_close(found.entropy, torch.arange(2.0, 7).log().mean()[None])


def test_a_model_is_read_through_the_door():
    host, x = Host(**mixer_options()).eval(), inputs()
    for layer in host.layers:
        layer.normalizer.average.fill_(0.6)
    reading = FirstTokenReading()
    with headway.observe(host, reading, example={"x": x}), torch.no_grad():
        host(x)
    sites = reading.result()
    assert [site.site.layer for site in sites] == [0, 1]
    for site in sites:
        torch.testing.assert_close(site.mass, torch.full((4,), 0.6))
        assert bool((site.share > 0).all())


def test_rows_against_a_cache_are_refused():
    query, key = torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 5, 4)
    with pytest.raises(InterceptionError, match="2 rows over 5 keys, expected whole sequences"):
        reading_of(AttentionCall.from_tensors(query, key, key, causal=True))


def test_a_scale_and_a_mean_of_one_are_what_the_door_calls_softmax():
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, 7, 4, generator=generator) for _ in range(3))
    weighing = AffineWeighing(torch.ones(1, 2, 7), torch.ones(2))
    plain = AttentionCall.from_tensors(query, key, value, causal=True)
    torch.testing.assert_close(plain.replace(weighing=weighing).weights(), plain.weights())
    assert Operation(query=query, key=key, value=value, scale=0.5, causal=True).seen().shape == (1, 1, 7, 7)


def test_steady_gradients_and_spikes():
    steady = gradient_steadiness([1.0, 1.1, 0.9, 1.0, 1.05])
    assert steady.variation == pytest.approx(0.0734, abs=1e-4)
    assert steady.spikes == {6.0: 0, 9.0: 0}
    # Median 1.0 and a median absolute deviation of 0.1: the bounds are 1.6 and 1.9.
    spiky = gradient_steadiness([0.9, 1.1, 0.9, 1.1, 1.0, 1.0, 0.9, 1.1, 1.7, 5.0, 0.5])
    assert spiky.spikes == {6.0: 2, 9.0: 1}
    with pytest.raises(ArgumentError, match="norms: got 1 numbers"):
        gradient_steadiness([1.0])
