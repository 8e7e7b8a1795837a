"""Checkpoints turned to DiffQKV: heads are means, hosts stay themselves, and what cannot work says so."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import DynamicCache, StaticCache

import headway
from headway.errors import ArgumentError, HostError
from headway.hosts.tiny import tiny_host
from headway.methods.layers.diffqkv import (
    CoveredMass,
    SelectedWeights,
    SelectiveValues,
    convert,
    load_converted,
    pool_heads,
    static_cache,
)
from headway.methods.layers.diffqkv.convert import IMPLEMENTATION, attention_modules, layout_of

FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]
GREEDY = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}


def host(family="llama", **changes):
    return tiny_host(family, **({"num_attention_heads": 4, "num_key_value_heads": 4} | changes))


def test_a_pooled_head_is_the_mean_of_its_group():
    weight = torch.arange(12.0).view(6, 2)
    assert pool_heads(weight, 1, 2).tolist() == [[2, 3], [8, 9]]
    assert pool_heads(weight, 3, 1).tolist() == [[3, 4], [5, 6], [7, 8]]
    assert torch.equal(pool_heads(weight, 3, 2), weight)
    assert pool_heads(torch.tensor([1.0, 3.0]), 1, 1).tolist() == [2]


@pytest.mark.parametrize("family", FAMILIES)
def test_keeping_every_head_changes_nothing(family):
    model, inputs = host(family)
    with torch.no_grad():
        got, truth = convert(model)(**inputs).logits, model(**inputs).logits
    torch.testing.assert_close(got, truth, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_pooling_heads_that_are_alike_changes_nothing(family):
    """The planted truth: where the heads of a group are equal, their mean is each of them."""
    model, inputs = host(family)
    with torch.no_grad():
        for module in attention_modules(model):
            for projection in (module.k_proj, module.v_proj):
                alike = pool_heads(projection.weight, module.head_dim, 2)
                projection.weight.copy_(alike.unflatten(0, (2, 1, -1)).expand(2, 2, -1, -1).flatten(0, 2))
                if projection.bias is not None:
                    bias = pool_heads(projection.bias, module.head_dim, 2)
                    projection.bias.copy_(bias.unflatten(0, (2, 1, -1)).expand(2, 2, -1).flatten())
        converted = convert(model, key_heads=2, value_heads=2)
        torch.testing.assert_close(converted(**inputs).logits, model(**inputs).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_cache_has_its_own_head_counts_and_decoding_is_prefill(family):
    model, inputs = host(family)
    converted, ids = convert(model, key_heads=1, value_heads=2), inputs["input_ids"]
    with torch.no_grad():
        whole = converted(input_ids=ids).logits
        start = converted(input_ids=ids[:, :9], use_cache=True)
        rest = [
            converted(input_ids=ids[:, i : i + 1], past_key_values=start.past_key_values).logits for i in range(9, 13)
        ]
    torch.testing.assert_close(torch.cat(rest, 1), whole[:, 9:13], atol=1e-4, rtol=1e-4)
    layer = start.past_key_values.layers[0]
    assert (layer.keys.shape[1], layer.values.shape[1]) == (1, 2)
    assert layer.keys.numel() * 2 == layer.values.numel()
    assert model.config._attn_implementation != IMPLEMENTATION


def test_left_padding_equals_none():
    model, inputs = host()
    converted, ids = convert(model, key_heads=2), inputs["input_ids"][:1]
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], 1)
    mask = torch.tensor([[0] * 3 + [1] * ids.shape[1]])
    with torch.no_grad():
        got = converted(input_ids=padded, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
        torch.testing.assert_close(got[:, 3:], converted(input_ids=ids).logits, atol=1e-4, rtol=1e-4)


def test_generate_beams_and_assisted_generation():
    model, inputs = host()
    converted, ids = convert(model, key_heads=1), inputs["input_ids"][:1]
    greedy = converted.generate(ids, **GREEDY)
    assert torch.equal(greedy, converted.generate(ids, use_cache=False, **GREEDY))
    assert torch.equal(greedy, converted.generate(ids, prompt_lookup_num_tokens=2, **GREEDY))
    assert converted.generate(ids, num_beams=2, **GREEDY).shape == greedy.shape


def test_weights_come_in_query_heads():
    model, inputs = host()
    found = convert(model, key_heads=1, value_heads=2)(**inputs, output_attentions=True).attentions
    tokens = inputs["input_ids"].shape[1]
    assert [tuple(x.shape) for x in found] == [(2, 4, tokens, tokens)] * len(found)
    assert torch.allclose(found[0].sum(-1), torch.ones(2, 4, tokens), atol=1e-5)


def test_an_augmented_query_starts_as_what_was_there():
    model, inputs = host()
    with torch.no_grad():
        got = convert(model, key_heads=2, aug_dim=24)(**inputs).logits
        truth = convert(model, key_heads=2)(**inputs).logits
    assert torch.equal(got, truth)


def test_named_layers_alone_are_converted():
    model, _ = host()
    counts = [layout_of(module).key_heads for module in attention_modules(convert(model, key_heads=1, layers=[1]))]
    assert counts == [4, 1, *counts[2:]]
    assert set(counts[2:]) <= {4}
    with pytest.raises(ArgumentError, match="layers: got 9"):
        convert(model, key_heads=1, layers=[9])


def test_it_is_saved_and_read_back(tmp_path):
    model, inputs = host()
    converted = convert(model, key_heads=1, value_heads=2, aug_dim=8, layers=[0])
    for parameter in converted.parameters():
        parameter.data += 0.01
    converted.save_pretrained(tmp_path)
    again = load_converted(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, converted(**inputs).logits)
    model.save_pretrained(tmp_path / "plain")
    with pytest.raises(HostError, match="holds no converted model"):
        load_converted(tmp_path / "plain")
    with pytest.raises(HostError, match=r"no config\.json"):
        load_converted(tmp_path / "nothing")


def test_the_door_stands_open_to_converted_models():
    model, inputs = host()
    converted = convert(model, key_heads=1, value_heads=2)
    with torch.no_grad():
        native = converted(**inputs).logits
        with headway.use(converted, SelectedWeights(top=1000)) as handle:
            edited = converted(**inputs).logits
    torch.testing.assert_close(edited, native, atol=1e-4, rtol=1e-4)
    assert [row["paths"] for row in handle.report()] == [{"edited": 1}] * len(handle.report())


class TestMerging:
    @pytest.mark.parametrize("family", ["llama", "qwen2"])
    def test_keys_that_are_turns_of_one_another_merge_without_loss(self, family):
        """Planted: every key head is one shared head whose rotated pairs are turned and stretched, biases as well."""
        model, inputs = host(family)
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for module in attention_modules(model):
                for held in (module.k_proj.weight, module.k_proj.bias):
                    if held is not None:
                        held.copy_(_turned(held, module.head_dim, generator.manual_seed(5)))
            truth = model(**inputs).logits
            merged = convert(model, key_heads=1, calibration=inputs["input_ids"])(**inputs).logits
            pooled = convert(model, key_heads=1)(**inputs).logits
        torch.testing.assert_close(merged, truth, atol=2e-3, rtol=2e-3)
        assert float((pooled - truth).norm()) > 20 * float((merged - truth).norm())

    @pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
    def test_values_that_are_mixtures_of_one_head_merge_without_loss(self, family):
        model, inputs = host(family)
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for module in attention_modules(model):
                dim = module.head_dim
                mixing = torch.randn(4, dim, dim, generator=generator) / dim**0.5
                for held in (module.v_proj.weight, module.v_proj.bias):
                    if held is not None:
                        held.copy_((mixing @ held[:dim].reshape(dim, -1)).flatten(0, 1).reshape(held.shape))
            truth = model(**inputs).logits
            merged = convert(model, value_heads=1, calibration=inputs["input_ids"])(**inputs).logits
            pooled = convert(model, value_heads=1)(**inputs).logits
        torch.testing.assert_close(merged, truth, atol=2e-3, rtol=2e-3)
        assert float((pooled - truth).norm()) > 20 * float((merged - truth).norm())

    def test_it_is_closer_than_a_mean_where_nothing_was_planted(self):
        model, inputs = host(num_attention_heads=8, num_key_value_heads=4)
        with torch.no_grad():
            truth = model(**inputs).logits
            for kind in ({"key_heads": 2}, {"value_heads": 2}):
                merged = convert(model, **kind, calibration=inputs["input_ids"])(**inputs).logits
                assert float((merged - truth).norm()) < float((convert(model, **kind)(**inputs).logits - truth).norm())

    def test_merged_models_are_saved_and_the_original_stays(self, tmp_path):
        model, inputs = host()
        before = {name: x.clone() for name, x in model.state_dict().items()}
        merged = convert(model, key_heads=1, value_heads=2, calibration=inputs["input_ids"])
        merged.save_pretrained(tmp_path)
        with torch.no_grad():
            assert torch.equal(load_converted(tmp_path)(**inputs).logits, merged(**inputs).logits)
        assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())

    def test_hosts_whose_queries_cannot_be_turned(self):
        model, inputs = host("qwen3")
        with pytest.raises(HostError, match="norms on its queries or keys"):
            convert(model, key_heads=1, calibration=inputs["input_ids"])
        model, inputs = host("glm")
        with pytest.raises(HostError, match="expected whole heads in halves"):
            convert(model, key_heads=1, calibration=inputs["input_ids"])

    def test_a_calibration_that_is_no_text(self):
        with pytest.raises(ArgumentError, match=r"calibration: got torch\.float32 of shape \(2, 3\)"):
            convert(host()[0], key_heads=1, calibration=torch.zeros(2, 3))


def _turned(held, dim, generator):
    """The first head of a weight or bias, and turns of it as the others."""
    first = held[:dim].reshape(dim, -1)
    pairs = torch.complex(first[: dim // 2], first[dim // 2 :])
    factors = torch.randn(4, dim // 2, 1, dtype=pairs.dtype, generator=generator)
    turned = factors * pairs
    return torch.cat([turned.real, turned.imag], 1).reshape(held.shape)


class TestStaticCache:
    def test_one_for_unequal_heads_decodes_as_the_dynamic_one(self):
        model, inputs = host()
        converted, ids = convert(model, key_heads=1), inputs["input_ids"]
        caches = [DynamicCache(config=converted.config), static_cache(converted, 40)]
        logits = []
        with torch.no_grad():
            for cache in caches:
                parts = [
                    converted(input_ids=ids[:, start:stop], past_key_values=cache).logits
                    for start, stop in ((0, 9), (9, 10), (10, 13))
                ]
                logits.append(torch.cat(parts, 1))
        torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)
        assert caches[1].layers[0].keys.shape[1:3] == (1, 40)
        assert caches[1].layers[0].values.shape[1:3] == (4, 40)

    def test_that_of_transformers_is_refused_with_what_works(self):
        model, inputs = host()
        converted, ids = convert(model, key_heads=1), inputs["input_ids"]
        with pytest.raises(ArgumentError, match=r"StaticLayer.*Use DynamicCache, or static_cache"):
            converted(input_ids=ids, past_key_values=StaticCache(config=converted.config, max_cache_len=40))
        with pytest.raises(ArgumentError, match="static_cache"):
            converted.generate(ids[:1], cache_implementation="static", **GREEDY)

    def test_no_room_is_refused(self):
        with pytest.raises(ArgumentError, match="tokens: got 0"):
            static_cache(host()[0], 0)


class TestRefusals:
    def test_counts_that_do_not_divide_name_all_three(self):
        with pytest.raises(ArgumentError, match="4 query, 3 key and 4 value heads"):
            convert(host()[0], key_heads=3)

    def test_more_heads_than_there_are(self):
        with pytest.raises(ArgumentError, match=r"heads: got 4 for a weight .* expected a divisor of 2"):
            convert(host(num_key_value_heads=2)[0], key_heads=4)

    def test_hosts_of_another_make(self):
        for model in (tiny_host("gpt2")[0], nn.Linear(2, 2)):
            with pytest.raises(HostError, match="q_proj, k_proj, v_proj and o_proj"):
                convert(model, key_heads=1)

    def test_soft_caps(self):
        model, inputs = host("gemma2")
        with pytest.raises(ArgumentError, match="softcap at Gemma2Attention"):
            convert(model, key_heads=1)(**inputs)

    @pytest.mark.parametrize("name", ["sdpa", "eager"])
    def test_attention_functions_for_equal_heads(self, name):
        model, inputs = host()
        converted = convert(model, key_heads=1)
        converted.set_attn_implementation(name)
        with pytest.raises(ArgumentError, match=f"got '{name}', .* with 1 and 4. Supported is 'headway_diffqkv'"):
            converted(**inputs)

    def test_dropout(self):
        model, inputs = host(attention_dropout=0.1)
        with pytest.raises(ArgumentError, match=r"dropout: got 0\.1"):
            convert(model, key_heads=1).train()(**inputs)


class TestSelectedValuesOnHosts:
    def test_the_selector_reads_what_the_editor_keeps(self):
        """In a decoding step both give softmax over the six keys of largest weight."""
        model, inputs = host(num_key_value_heads=2)
        ids = inputs["input_ids"]
        found = []
        for stage in (SelectiveValues(top=6), SelectedWeights(top=6)):
            with torch.no_grad():
                cache = model(input_ids=ids[:, :-1], use_cache=True).past_key_values
                with headway.use(model, stage):
                    found.append(model(input_ids=ids[:, -1:], past_key_values=cache).logits)
        torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)

    def test_without_renormalising_rows_keep_the_mass_they_covered(self):
        weights = torch.tensor([[[[0.5, 0.2, 0.3]]]])
        kept = SelectedWeights(top=2, renormalize=False).edit_weights(None, weights, torch.arange(1))
        assert kept.tolist() == [[[[0.5, 0.0, pytest.approx(0.3)]]]]

    def test_covered_mass_is_whole_for_rows_that_see_one_key_more(self):
        model, inputs = host()
        watch = CoveredMass(tops=(1, 5, 100))
        with headway.observe(model, watch), torch.no_grad():
            out = model(**inputs, output_attentions=False)
        found = watch.result()
        assert out.logits.shape[1] == 24
        assert 0 < found[1]["mean"] < found[5]["mean"] < 1
        assert found[100]["rows"] == 0


@pytest.mark.real
def test_a_real_model_is_converted_and_generates():
    from headway.hosts import default_text, load, tokenize
    from headway.tasks.perplexity import perplexity

    model, tokenizer = load("smollm2")
    ids = tokenize(tokenizer, default_text(), 96)
    converted = convert(model, key_heads=1, layers=[4])
    kept, pooled = (perplexity(x, ids).mean_nll for x in (model, converted))
    assert kept < pooled < kept + 3
    answer = converted.generate(ids[:, :20], max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert answer.shape == (1, 23)
