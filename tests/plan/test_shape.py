"""Sizes taken from a config are those of the model that the config builds."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import DynamicCache

from headway.errors import ArgumentError, HostError
from headway.hosts.tiny import tiny_host
from headway.plan import config_from_sizes, config_of, shape_names, shape_of

#: Parameters in billions, as their makers publish them.
PUBLISHED = {
    "llama-3.1-8b": 8.03,
    "llama-3.1-70b": 70.55,
    "llama-3.1-405b": 405.85,
    "mistral-7b": 7.25,
    "mixtral-8x7b": 46.70,
    "qwen2.5-7b": 7.62,
    "qwen3-32b": 32.76,
    "gemma-3-27b": 27.01,
    "smollm2": 0.1345,
}


def test_every_built_in_shape_is_checked():
    assert set(shape_names()) == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_built_in_shapes_have_the_published_parameters(name):
    assert shape_of(config_of(name), name).parameters / 1e9 == pytest.approx(PUBLISHED[name], rel=2e-3)


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3_text", "phi", "gpt2", "olmo", "mixtral", "opt"])
def test_parameters_are_counted_as_they_are(architecture):
    model, _ = tiny_host(architecture)
    shape = shape_of(model.config)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert all(layer.heads == model.config.num_attention_heads for layer in shape.layers)


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "gemma3n_text", "gemma4_text", "gpt_oss"])
def test_layers_store_what_the_hosts_cache_stores(architecture):
    """Heads, dimensions, windows, and layers that borrow the keys of others."""
    model, _ = tiny_host(architecture)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=torch.full((1, 9), 9), past_key_values=cache, use_cache=True)
    for layer, held in zip(shape_of(model.config).layers, cache.layers, strict=True):
        if layer.borrows:
            assert type(held).__name__ == "DummyLayer"
            continue
        assert held.keys.shape[1:] == (layer.kv_heads, layer.kept(9), layer.key_dim)
        assert held.values.shape[-1] == layer.value_dim


def test_a_token_multiplies_the_weights_of_its_experts_only():
    shape = shape_of(config_of("mixtral-8x7b"))
    experts = 32 * 8 * 3 * 4096 * 14336
    assert shape.expert_weights == experts
    assert shape.active_weights == shape.dense_weights + experts / 4
    assert shape.weights_read(1) == pytest.approx(shape.active_weights + shape.output_weights)
    assert shape.weights_read(1000) == pytest.approx(shape.dense_weights + experts + shape.output_weights)


def test_tied_output_weights_count_once_and_are_multiplied():
    shape = shape_of(config_of("smollm2"))
    assert shape.output_weights == 49_152 * 576
    untied = shape.dense_weights + 2 * shape.output_weights
    assert shape.parameters < untied


def test_sizes_build_a_llama_like_model():
    config = config_from_sizes(layers=80, hidden=8192, heads=64, kv_heads=8, intermediate=28_672, vocabulary=128_256)
    mine, theirs = shape_of(config), shape_of(config_of("llama-3.1-70b"))
    assert (mine.parameters, mine.layers) == (theirs.parameters, theirs.layers)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"layers": 4, "hidden": 64, "heads": None}, "--heads"),
        ({"layers": 4, "hidden": 64, "heads": 4, "kv_heads": 3}, "divisor"),
        ({"layers": 4, "hidden": 65, "heads": 4}, "multiple"),
        ({"layers": 0, "hidden": 64, "heads": 4}, "at least 1"),
    ],
)
def test_sizes_that_fit_nothing_are_refused(sizes, words):
    with pytest.raises(ArgumentError, match=words):
        config_from_sizes(**sizes)


def test_a_folder_needs_a_config_and_no_weights(tmp_path):
    model, _ = tiny_host("llama")
    model.config.save_pretrained(tmp_path)
    assert shape_of(config_of(str(tmp_path))).layers == shape_of(model.config).layers
    assert shape_of(config_of(str(tmp_path / "config.json"))).hidden == 64


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ("{", "not JSON"),
        ("[]", "model_type None"),
        (json.dumps({"model_type": "lama"}), "'lama'"),
    ],
)
def test_a_config_that_cannot_be_used_is_named(tmp_path, values, words):
    path = tmp_path / "config.json"
    path.write_text(values, encoding="utf-8")
    with pytest.raises(HostError, match=words):
        config_of(str(path))


def test_an_unknown_name_gets_the_nearest_and_a_missing_folder_its_name(tmp_path):
    with pytest.raises(ArgumentError, match=r"Did you mean 'llama-3\.1-70b'"):
        config_of("llama-3.1-70")
    with pytest.raises(HostError, match="no such folder"):
        config_of(str(tmp_path / "nothing"))
    with pytest.raises(HostError, match=r"without config\.json"):
        config_of(str(tmp_path))


def test_a_config_of_no_language_model_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}), encoding="utf-8")
    with pytest.raises(HostError, match="builds no causal language model"):
        shape_of(config_of(str(tmp_path)))


@pytest.mark.parametrize(("architecture", "words"), [("mamba", "keeps a state"), ("deepseek_v3", "latent")])
def test_models_that_keep_something_else_are_refused(architecture, words):
    model, _ = tiny_host(architecture)
    with pytest.raises(HostError, match=words):
        shape_of(model.config)


@pytest.mark.real
def test_the_built_in_smollm2_is_the_embedded_one():
    import headway

    model, _ = headway.load("smollm2")
    mine, theirs = shape_of(config_of("smollm2"), "x"), shape_of(model.config, "x")
    assert mine == theirs
