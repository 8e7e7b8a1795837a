"""What reports say of a model."""

from __future__ import annotations

import torch

from headway.hosts.facts import model_facts, versions
from tests.look.tiny import tiny_llama


def test_a_model_is_told_by_its_sizes():
    model = tiny_llama(num_hidden_layers=2).to(torch.bfloat16)
    found = model_facts(model, "mine")
    config = model.config
    assert found["name"] == "mine"
    assert (found["layers"], found["heads"], found["kv_heads"]) == (2, config.num_attention_heads,
                                                                     config.num_key_value_heads)  # fmt: skip
    assert found["dtype"] == "bfloat16"
    assert found["parameters"] == sum(p.numel() for p in model.parameters())


def test_a_module_without_a_configuration_has_none():
    found = model_facts(torch.nn.Linear(2, 3))
    assert found["name"] == found["class"] == "Linear"
    assert found["layers"] is found["heads"] is found["kv_heads"] is None


def test_versions_name_the_libraries():
    assert set(versions()) == {"headway", "torch", "transformers"}
