from __future__ import annotations

import pytest
import torch

from headway.errors import ArgumentError, HostError
from headway.hosts.tiny import architectures, other_architectures, tiny_host
from headway.hosts.tiny_fields import EXCEPTIONS, UNBUILDABLE

CAUSAL = ("llama", "gpt2", "gemma2", "gpt_oss", "bert", "whisper", "mamba")


def logits(architecture: str, **overrides: object) -> torch.Tensor:
    model, inputs = tiny_host(architecture, **overrides)
    return output(model, inputs)


def output(model: torch.nn.Module, inputs: dict[str, object]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs)[0]


def relative_change(before: torch.Tensor, after: torch.Tensor) -> float:
    return float((after - before).abs().max() / before.abs().max())


@pytest.mark.parametrize("architecture", CAUSAL)
def test_a_tiny_host_is_finite_and_repeats_bit_for_bit(architecture: str) -> None:
    model, inputs = tiny_host(architecture)
    first, second = output(model, inputs), output(model, inputs)
    assert bool(torch.isfinite(first).all())
    assert torch.equal(first, second)
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert sum(p.numel() for p in model.parameters()) < 1_000_000


@pytest.mark.parametrize("architecture", CAUSAL)
def test_no_row_reads_the_future(architecture: str) -> None:
    model, inputs = tiny_host(architecture)
    before = output(model, inputs)
    changed = inputs["input_ids"].clone()
    changed[:, -1] = changed[:, -1] - 1
    after = output(model, inputs | {"input_ids": changed})
    assert torch.allclose(before[:, :-1], after[:, :-1], atol=1e-5)
    assert relative_change(before[:, -1], after[:, -1]) > 1e-2


def test_an_encoder_reads_the_future() -> None:
    model, inputs = tiny_host("BertModel")
    before = output(model, inputs)
    changed = inputs["input_ids"].clone()
    changed[:, -1] = changed[:, -1] - 1
    after = output(model, inputs | {"input_ids": changed})
    assert relative_change(before[:, :-1], after[:, :-1]) > 1e-2


def test_the_seed_decides_the_weights_and_the_example() -> None:
    assert torch.equal(logits("llama", seed=3), logits("llama", seed=3))
    assert not torch.equal(logits("llama", seed=3), logits("llama", seed=4))


def test_the_global_random_state_is_left_alone() -> None:
    before = torch.get_rng_state()
    tiny_host("gpt2")
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("architecture", CAUSAL)
def test_no_parameter_is_constant(architecture: str) -> None:
    model, _ = tiny_host(architecture)
    constant = [name for name, p in model.named_parameters() if p.numel() > 1 and float(p.detach().std()) == 0.0]
    assert constant == []


@pytest.mark.parametrize("architecture", ["gemma2", "gpt_oss"])
def test_the_window_is_shorter_than_the_example(architecture: str) -> None:
    assert relative_change(logits(architecture), logits(architecture, sliding_window=64)) > 1e-2


def test_the_soft_cap_bites() -> None:
    assert relative_change(logits("gemma2"), logits("gemma2", attn_logit_softcapping=None)) > 1e-2


def test_learned_sinks_are_not_zero() -> None:
    model, inputs = tiny_host("gpt_oss")
    before = output(model, inputs)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.sinks.zero_()
    assert relative_change(before, output(model, inputs)) > 1e-2


def test_a_wrong_scale_shows() -> None:
    model, inputs = tiny_host("llama")
    before = output(model, inputs)
    for layer in model.model.layers:
        layer.self_attn.scaling *= 1.1
    assert relative_change(before, output(model, inputs)) > 1e-3


def test_one_layer_of_each_kind_is_kept() -> None:
    model, _ = tiny_host("gpt_oss")
    assert model.config.layer_types == ["sliding_attention", "full_attention"]


def test_more_layers_repeat_the_kinds() -> None:
    model, _ = tiny_host("gpt_oss", num_hidden_layers=4)
    assert model.config.layer_types == ["sliding_attention", "full_attention"] * 2


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_an_override_reaches_a_field_under_its_common_name(architecture: str) -> None:
    model, _ = tiny_host(architecture, num_hidden_layers=3)
    assert model.config.num_hidden_layers == 3


def test_grouped_heads_stay_grouped_and_equal_heads_stay_equal() -> None:
    assert tiny_host("gpt_oss")[0].config.num_key_value_heads == 2
    assert tiny_host("llama")[0].config.num_key_value_heads == 4


def test_the_implementation_can_be_chosen() -> None:
    model, _ = tiny_host("llama", attn_implementation="eager")
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("architecture", ["WhisperModel", "T5Model"])
def test_an_encoder_decoder_reads_its_encoder(architecture: str) -> None:
    model, inputs = tiny_host(architecture)
    before = output(model, inputs)
    name = "input_features" if "input_features" in inputs else "input_ids"
    after = output(model, inputs | {name: inputs[name].flip(0)})
    assert relative_change(before, after) > 1e-2


@pytest.mark.parametrize("architecture", ["ViTModel", "CLIPModel"])
def test_a_picture_changes_what_a_vision_host_says(architecture: str) -> None:
    model, inputs = tiny_host(architecture)
    after = output(model, inputs | {"pixel_values": inputs["pixel_values"].flip(-1)})
    assert relative_change(output(model, inputs), after) > 1e-2


def test_every_table_names_an_architecture_that_is_listed() -> None:
    assert set(EXCEPTIONS) | set(UNBUILDABLE) <= set(architectures())
    assert not set(architectures()) & set(other_architectures())


def test_an_unknown_architecture_names_the_nearest() -> None:
    with pytest.raises(ArgumentError, match="Did you mean 'llama'"):
        tiny_host("lama")


def test_an_architecture_that_cannot_be_built_says_why() -> None:
    with pytest.raises(HostError, match="kv_sharing_modes"):
        tiny_host("gemma4_assistant")


def test_an_override_that_the_config_refuses_is_reported() -> None:
    with pytest.raises(HostError, match="hidden size"):
        tiny_host("llama", hidden_size=63)
