"""DiffQKV as a layer: its limits are multi-head and grouped attention, its state holds what it says."""

from __future__ import annotations

import math

import pytest
import torch

import headway
from headway.door.mixer import registered_mixers
from headway.door.stages import Observer
from headway.errors import ArgumentError, ConflictError
from headway.kernels.rope import rope_frequencies, rotate
from headway.methods.layers.diffqkv import (
    AugmentedQuery,
    DiffQKV,
    HeadLayout,
    break_even_tokens,
    sigma_fields,
)
from headway.methods.layers.diffqkv.key_size import AbsorbedKey

WIDTH, HEADS = 32, 8


def layer(dtype=torch.float64, seed=0, **options):
    torch.manual_seed(seed)
    options = {"heads": HEADS, "key_heads": 2, "value_heads": 4, "aug_dim": 0} | options
    return DiffQKV(WIDTH, **options).to(dtype).eval()


def inputs(tokens=17, batch=2, seed=1):
    return torch.randn(batch, tokens, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(got, truth, atol=1e-12):
    torch.testing.assert_close(got, truth, atol=atol, rtol=0)


def textbook(mixer, x):
    """Multi-head attention in its plainest form with the weights of a mixer, key and value heads repeated."""
    layout = mixer.layout
    split = lambda y, heads: y.unflatten(2, (heads, -1)).transpose(1, 2)  # noqa: E731
    query = split(mixer.q_proj(x), layout.query_heads)
    key = split(mixer.k_proj(x), layout.key_heads)
    value = split(mixer.v_proj(x), layout.value_heads)
    at = torch.arange(x.shape[1])
    frequencies = rope_frequencies(layout.key_dim, mixer.rope_base)
    query, key = rotate(query, at, frequencies), rotate(key, at, frequencies)
    key, value = (y.repeat_interleave(layout.query_heads // y.shape[1], 1) for y in (key, value))
    mixed = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    return mixer.o_proj(mixed.transpose(1, 2).flatten(2))


@pytest.mark.parametrize(("keys", "values"), [(8, 8), (2, 2), (2, 4), (4, 1), (1, 8)])
def test_it_is_attention_with_heads_repeated(keys, values):
    """n_k = n_v = n_q is multi-head, n_k = n_v grouped-query attention; more key than value heads are legal."""
    mixer = layer(key_heads=keys, value_heads=values)
    close(mixer(inputs())[0], textbook(mixer, inputs()), atol=1e-13)


def test_the_mixer_is_registered():
    assert registered_mixers()["diffqkv"] is DiffQKV
    assert DiffQKV.can_crop
    assert not DiffQKV.constant_state


def test_the_state_holds_heads_of_each_kind_and_not_one_number_more():
    mixer = layer(dtype=torch.float32)
    state = mixer.init_state(3)
    for part in (5, 1, 1):
        _, state = mixer(inputs(part, 3).float(), state=state)
    assert state.tensors["key"].shape == (3, 2, 7, 4)
    assert state.tensors["value"].shape == (3, 4, 7, 4)
    assert set(state.tensors) == {"key", "value"}
    assert sum(t.numel() * t.element_size() for t in state.tensors.values()) == 3 * mixer.layout.cache_bytes(7)


def test_prefill_and_decoding_agree_for_every_option():
    for options in (
        {},
        {"aug_dim": 12},
        {"aug_dim": 12, "aug_residual": True},
        {"key_dim": 2, "key_expand": "absorbed"},
        {"key_dim": 2, "key_expand": "absorbed", "share_absorbed": True},
        {"key_dim": 2, "key_expand": "mlp"},
        {"value_dim": 6},
        {"head_dim": 6},
        {"rope_base": None},
        {"selective_values": 3},
        {"selective_values": 3, "renormalize": False},
        {"bias": True},
    ):
        mixer = layer(**options)
        whole = mixer(inputs())[0]
        close(mixer(inputs(), mode="step")[0], whole, atol=1e-11)
        close(mixer(inputs(), mode="reference")[0], whole, atol=1e-11)


@pytest.mark.parametrize("options", [{}, {"key_dim": 2, "key_expand": "mlp"}, {"key_dim": 2, "key_expand": "absorbed"}])
def test_padding_and_packing_change_nothing_for_real_tokens(options):
    mixer = layer(**options)
    x = inputs(12)
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[0, :3], mask[1, 5:7] = False, False
    poisoned = x.masked_fill(~mask[..., None], torch.nan)
    got = mixer(poisoned, mask=mask)[0]
    assert not got[~mask].any()
    for row in (0, 1):
        close(got[row][mask[row]], mixer(x[row : row + 1, mask[row]])[0][0], atol=1e-11)
    resets = torch.zeros(2, 12, dtype=torch.bool)
    resets[:, 7] = True
    packed = mixer(x, resets=resets)[0]
    close(packed, torch.cat([mixer(x[:, :7])[0], mixer(x[:, 7:])[0]], 1), atol=1e-11)
    state = mixer.init_state(2)
    parts = []
    for start, stop in ((0, 4), (4, 9), (9, 12)):
        y, state = mixer(x[:, start:stop], resets=resets[:, start:stop], mask=mask[:, start:stop], state=state)
        parts.append(y)
    close(torch.cat(parts, 1), mixer(x, resets=resets, mask=mask)[0], atol=1e-11)


def test_crop_takes_tokens_back():
    mixer = layer()
    x = inputs(9)
    _, longer = mixer(x, state=mixer.init_state(2))
    _, shorter = mixer(x[:, :6], state=mixer.init_state(2))
    cropped = mixer.crop(longer, 3)
    close(cropped.tensors["key"], shorter.tensors["key"])
    close(mixer(x[:, 6:], state=cropped)[0], mixer(x[:, 6:], state=shorter)[0])


class TestQuery:
    def test_it_is_the_gated_formula(self):
        torch.manual_seed(0)
        query = AugmentedQuery(6, 9)
        x = torch.randn(2, 3, 6)
        gate, up, down = query.gate.weight, query.up.weight, query.down.weight
        hidden = x @ gate.T
        truth = (hidden * torch.sigmoid(hidden) * (x @ up.T)) @ down.T
        torch.testing.assert_close(query(x), truth)

    def test_with_a_residual_it_starts_as_the_identity(self):
        query = AugmentedQuery(6, 9, residual=True)
        query.start_as_identity()
        x = torch.randn(2, 3, 6)
        assert torch.equal(query(x), x)
        with pytest.raises(ArgumentError, match="aug_residual"):
            AugmentedQuery(6, 9).start_as_identity()

    def test_the_default_width_is_one_and_a_half_of_the_model(self):
        assert DiffQKV(WIDTH, heads=HEADS).augment.gate.weight.shape == (48, WIDTH)
        assert DiffQKV(WIDTH, heads=HEADS, aug_dim=0).augment is None

    def test_it_adds_nothing_to_the_state(self):
        sizes = []
        for hidden in (0, 64):
            _, state = layer(aug_dim=hidden)(inputs(), state=layer().init_state(2))
            sizes.append(state.bytes)
        assert sizes[0] == sizes[1]


class TestSmallKeys:
    def test_without_rotation_the_absorbed_query_is_the_expanded_key(self):
        torch.manual_seed(0)
        absorbed = AbsorbedKey(8, 2, 6, 3).double()
        query, key = torch.randn(1, 8, 5, 6).double(), torch.randn(1, 2, 7, 3).double()
        spread = absorbed.expand(key).repeat_interleave(4, 1)
        close(absorbed(query) @ key.repeat_interleave(4, 1).transpose(2, 3), query @ spread.transpose(2, 3))

    @pytest.mark.parametrize("expand", ["absorbed", "mlp"])
    def test_scores_depend_on_relative_positions_alone(self, expand):
        mixer = layer(key_dim=2, key_expand=expand)
        at = torch.arange(6)
        query = torch.randn(1, 8, 6, mixer.product_dim, dtype=torch.float64)
        key = torch.randn(1, 8, 6, mixer.product_dim, dtype=torch.float64)
        scores = [mixer._turn(query, at[None] + s) @ mixer._turn(key, at[None] + s).transpose(2, 3) for s in (0, 977)]
        close(*scores, atol=1e-9)

    def test_the_stored_key_is_small_whatever_the_form(self):
        for expand in ("absorbed", "mlp"):
            mixer = layer(key_dim=2, key_expand=expand)
            _, state = mixer(inputs(5), state=mixer.init_state(2))
            assert state.tensors["key"].shape == (2, 2, 5, 2)

    def test_the_literal_form_stores_keys_before_rotation(self):
        mixer = layer(key_dim=2, key_expand="mlp")
        x = inputs(5)
        _, state = mixer(x, state=mixer.init_state(2))
        close(state.tensors["key"], mixer.k_proj(x).unflatten(2, (2, 2)).transpose(1, 2))

    def test_scales_are_those_of_the_product_space(self):
        assert layer().scale == 4**-0.5
        assert layer(key_dim=2, key_expand="absorbed").scale == 2**-0.5
        assert layer(key_dim=2, key_expand="mlp").scale == 4**-0.5

    def test_another_size_without_a_projection_is_refused(self):
        with pytest.raises(ArgumentError, match="key_dim: got 2 for queries of size 4"):
            layer(key_dim=2)
        with pytest.raises(ArgumentError, match="key_expand: got 'linear'"):
            layer(key_dim=2, key_expand="linear")


class TestSelectedValues:
    def test_enough_values_are_dense(self):
        close(layer(selective_values=17)(inputs())[0], layer()(inputs())[0])

    def test_few_values_are_not(self):
        assert not torch.allclose(layer(selective_values=2)(inputs())[0], layer()(inputs())[0], atol=1e-3)

    def test_padding_is_never_selected(self):
        mixer = layer(selective_values=5)
        x = inputs(9)
        mask = torch.ones(2, 9, dtype=torch.bool)
        mask[:, :6] = False
        got = mixer(x.masked_fill(~mask[..., None], torch.inf), mask=mask)[0]
        close(got[:, 6:], layer()(x[:, 6:])[0])

    def test_training_under_it_needs_a_word(self):
        mixer = layer(selective_values=3).train()
        with pytest.raises(ConflictError, match="selective_values: got 3 while training"):
            mixer(inputs())
        with torch.no_grad():
            mixer(inputs())
        layer(selective_values=3, selective_training=True).train()(inputs())[0].sum().backward()

    def test_observers_see_the_weights_that_were_used(self):
        mixer = layer(dtype=torch.float32, selective_values=3)
        seen = _observed(mixer, inputs().float())
        assert int((seen > 0).sum(-1).max()) == 3
        torch.testing.assert_close(seen.sum(-1), torch.ones_like(seen.sum(-1)))


class _Weights(Observer):
    def start(self):
        self.weights = None

    def observe(self, call, output, lse=None):
        self.weights = call.weights()

    def result(self):
        return self.weights


def _observed(mixer, x):
    from headway.models import HeadwayConfig, HeadwayForCausalLM

    options = {
        "key_heads": mixer.layout.key_heads,
        "value_heads": mixer.layout.value_heads,
        "aug_dim": 0,
        "selective_values": mixer.selective_values,
    }
    config = HeadwayConfig(vocab_size=50, width=WIDTH, layers=1, heads=HEADS, mixer="diffqkv", mixer_options=options)
    model = HeadwayForCausalLM(config).eval()
    watch = _Weights()
    with headway.observe(model, watch), torch.no_grad():
        model(input_ids=torch.arange(17)[None])
    return watch.result()


def test_weights_have_a_row_per_query_head_and_a_column_per_key():
    seen = _observed(layer(dtype=torch.float32), None)
    assert seen.shape == (1, HEADS, 17, 17)
    torch.testing.assert_close(seen.sum(-1), torch.ones(1, HEADS, 17))
    assert not seen.triu(1).any()


def test_a_model_of_it_generates_the_same_with_and_without_its_cache():
    from headway.models import HeadwayConfig, HeadwayForCausalLM

    torch.manual_seed(0)
    small = {"vocab_size": 60, "width": 32, "layers": 2, "heads": 8, "mlp_width": 48}
    config = HeadwayConfig(
        **sigma_fields("sigma-1.5b", **small, mixer_options={"key_heads": 1, "value_heads": 4, "aug_dim": 48})
    )
    model = HeadwayForCausalLM(config).eval()
    ids = torch.arange(10)[None]
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(ids, **options)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **options))
    assert model.generate(ids, num_beams=3, **options).shape == (1, 16)


class TestLayout:
    def test_sigma_stores_five_eighths_of_its_baseline_to_the_byte(self):
        baseline = HeadLayout.grouped(32, 16, 64)
        sigma = HeadLayout(query_heads=32, key_heads=4, value_heads=16, query_dim=64, key_dim=64, value_dim=64)
        assert baseline.cache_bytes(1000, torch.bfloat16, layers=26) == 26 * 1000 * 2 * 16 * 64 * 2
        assert (
            sigma.cache_bytes(1000, torch.bfloat16, layers=26) * 8
            == baseline.cache_bytes(1000, torch.bfloat16, layers=26) * 5
        )
        assert sigma.cache_ratio(baseline) == 0.625

    def test_the_augmentation_is_paid_back_by_long_contexts(self):
        baseline = HeadLayout.grouped(32, 16, 64)
        sigma = HeadLayout(query_heads=32, key_heads=4, value_heads=16, query_dim=64, key_dim=64, value_dim=64)
        assert break_even_tokens(sigma, baseline, 2048, aug_dim=0) == 0
        point = break_even_tokens(sigma, baseline, 2048, aug_dim=3072)
        assert point == (3 * 2048 * 3072 - 2048 * 768) / 768
        assert break_even_tokens(sigma, baseline, 2048, aug_dim=3072, batch=4) == point / 4
        assert break_even_tokens(baseline, sigma, 2048) == math.inf

    def test_products_of_a_step_grow_by_scores_and_values_alone(self):
        sigma = HeadLayout(query_heads=32, key_heads=4, value_heads=16, query_dim=64, key_dim=64, value_dim=64)
        products = [sigma.decode_products(t, 2048, aug_dim=3072) for t in (0, 1000)]
        assert products[1] - products[0] == 32 * 1000 * 128
        assert products[0] - sigma.decode_products(0, 2048) == 3 * 2048 * 3072

    def test_bad_numbers_are_named(self):
        with pytest.raises(ArgumentError, match="32 query, 5 key and 16 value heads"):
            DiffQKV(64, heads=32, key_heads=5, value_heads=16)
        with pytest.raises(ArgumentError, match="sizes of at least 1"):
            layer(value_dim=0)
        with pytest.raises(ArgumentError, match="top: got 0"):
            layer(selective_values=0)
        with pytest.raises(ArgumentError, match="batch: got 0"):
            break_even_tokens(HeadLayout.grouped(4, 2, 8), HeadLayout.grouped(4, 4, 8), 32, batch=0)
        with pytest.raises(ArgumentError, match="aug_dim: got -3"):
            layer(aug_dim=-3)


def test_a_checkpoint_with_other_head_counts_is_sent_to_the_converter():
    given = layer(key_heads=4).state_dict()
    with pytest.raises(ArgumentError, match=r"k_proj.weight: got shape \(16, 32\), expected \(8, 32\).*convert"):
        layer().load_state_dict(given)


def test_reading_both_ways_looks_ahead_inside_a_document_only():
    mixer = layer(causal=False)
    x, changed = inputs(8), inputs(8)
    changed[:, -1] += 1
    resets = torch.zeros(2, 8, dtype=torch.bool)
    resets[:, 4] = True
    moved = (mixer(x, resets=resets)[0] - mixer(changed, resets=resets)[0]).abs().amax((0, 2)) > 0
    assert moved.tolist() == [False] * 4 + [True] * 4
    close(mixer(x)[0], mixer(x, mode="reference")[0])


def test_presets_are_the_published_sizes():
    fields = sigma_fields("sigma-10b")
    assert (fields["width"], fields["layers"], fields["mlp_width"]) == (4096, 32, 14_336)
    assert fields["mixer_options"]["aug_dim"] * 2 == 3 * fields["width"]
    assert sigma_fields("sigma-1.5b", mixer_options={"aug_dim": 0})["mixer_options"] == {
        "key_heads": 4,
        "value_heads": 16,
        "aug_dim": 0,
        "rope_base": 50_000.0,
    }
    assert sigma_fields("sigma-1.5b")["mixer_options"]["aug_dim"] == 3072
    with pytest.raises(ArgumentError, match=r"Did you mean 'sigma-10b'"):
        sigma_fields("sigma-10")
