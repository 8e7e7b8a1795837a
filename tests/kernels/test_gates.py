"""Gates: what each multiplies, that an open one is none, and that a closed one silences its head alone."""

from __future__ import annotations

import pytest
import torch

from headway.errors import ArgumentError
from headway.kernels.normalizers import GATES, make_gate, split_query_gate

SHAPE = {"width": 12, "heads": 4, "kv_heads": 2, "head_dim": 6}


def build(name, **options):
    torch.manual_seed(0)
    return make_gate(name, **SHAPE, **options).double()


def given(gate, seed=0):
    generator = torch.Generator().manual_seed(seed)
    heads = 2 if gate.place == "value" else 4
    x, gated = (torch.randn(s, generator=generator).double() for s in ((2, 5, 12), (2, heads, 5, 6)))
    return x, gated


OPENABLE = [
    ("head", {"bias": 0.0}),
    ("element", {"bias": 0.0}),
    ("value", {"bias": 0.0}),
    ("conditional", {}),
    ("context", {}),
]


@pytest.mark.parametrize(("name", "options"), OPENABLE)
def test_an_open_gate_is_none(name, options):
    gate = build(name, **options)
    gate.open()
    x, gated = given(gate)
    torch.testing.assert_close(gate(x, gated), gated, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["head", "element", "value"])
def test_a_gate_without_a_bias_cannot_be_opened(name):
    with pytest.raises(ArgumentError, match=f"got '{name}' without a bias"):
        build(name).open()


@pytest.mark.parametrize("name", sorted(GATES))
def test_gradients_are_right(name):
    gate = build(name)
    x, gated = (t.requires_grad_() for t in given(gate))
    assert torch.autograd.gradcheck(lambda x, g, *_: gate(x, g), (x, gated, *gate.parameters()), fast_mode=True)


@pytest.mark.parametrize("name", sorted(GATES))
def test_each_token_is_gated_by_itself(name):
    gate = build(name)
    x, gated = given(gate)
    whole = gate(x, gated)
    torch.testing.assert_close(gate(x[:, 2:3], gated[:, :, 2:3]), whole[:, :, 2:3])


def test_a_head_gate_has_one_factor_and_an_element_gate_one_per_channel():
    x, gated = given(build("head"))
    factors = build("head")(x, gated) / gated
    torch.testing.assert_close(factors, factors[..., :1].expand_as(factors))
    torch.testing.assert_close(factors[..., 0], build("head").map(x).sigmoid().transpose(1, 2))
    assert build("element").map.weight.shape == (24, 12)
    factors = build("element")(x, gated) / gated
    torch.testing.assert_close(factors.transpose(1, 2).flatten(2), build("element").map(x).sigmoid())


def test_a_conditional_gate_starts_at_a_quarter_and_reads_its_own_slice():
    gate = build("conditional")
    with torch.no_grad():
        gate.last.zero_()
    x, gated = given(gate)
    torch.testing.assert_close(gate(x, gated), 0.25 * gated)
    gate = build("conditional", hidden=3)
    other = x.clone()
    other[..., 3:6] += 1.0
    changed = (gate(x, gated) != gate(other, gated)).any(-1).any(-1).any(0)
    assert changed.tolist() == [False, True, False, False]


def test_a_value_gate_reads_the_value_alone():
    gate = build("value")
    x, gated = given(gate)
    assert torch.equal(gate(x, gated), gate(torch.zeros_like(x), gated))
    expected = gated * (gated @ gate.map).sigmoid()
    torch.testing.assert_close(gate(x, gated), expected)


def test_a_context_scale_is_one_at_zero_and_below_two():
    gate = build("context")
    x, gated = given(gate)
    torch.testing.assert_close(gate(torch.zeros_like(x), gated), gated)
    assert float((gate(100 * x, gated) / gated).detach().max()) <= 2


def test_unknown_gates_and_options_are_named():
    with pytest.raises(ArgumentError, match=r"gate: got 'heads'.*Did you mean 'head'"):
        make_gate("heads", **SHAPE)
    with pytest.raises(ArgumentError, match="gate_options"):
        make_gate("head", hidden=3, **SHAPE)
    with pytest.raises(ArgumentError, match="start: got 1"):
        make_gate("conditional", start=1.0, **SHAPE)
    with pytest.raises(ArgumentError, match="width: got 13"):
        make_gate("conditional", **{**SHAPE, "width": 13})


@pytest.mark.parametrize(("name", "channels"), [("head", 1), ("element", 3)])
def test_a_gate_in_the_query_matrix_is_taken_apart_by_groups_of_heads(name, channels):
    """Four heads of 3 in two groups: rows are labelled by the head and channel they are for."""
    queries = torch.tensor([[head, channel, 0] for head in range(4) for channel in range(3)])
    gates = torch.tensor([[head, channel, 1] for head in range(4) for channel in range(channels)])
    per_group = [
        torch.cat([queries[6 * g : 6 * g + 6], gates[2 * channels * g : 2 * channels * (g + 1)]]) for g in (0, 1)
    ]
    found = split_query_gate(torch.cat(per_group), name, heads=4, kv_heads=2, head_dim=3)
    assert torch.equal(found[0], queries)
    assert torch.equal(found[1], gates)
    bias, _ = split_query_gate(torch.cat(per_group)[:, 0], name, heads=4, kv_heads=2, head_dim=3)
    assert torch.equal(bias, queries[:, 0])


def test_a_query_matrix_without_a_gate_is_refused():
    with pytest.raises(ArgumentError, match="joint: got 12 rows, expected 16"):
        split_query_gate(torch.zeros(12, 5), "head", heads=4, kv_heads=2, head_dim=3)
    with pytest.raises(ArgumentError, match="gate"):
        split_query_gate(torch.zeros(12, 5), "value", heads=4, kv_heads=2, head_dim=3)
