"""Adapters of trained hosts: they start at the host, do what their formula says, and learn."""

from __future__ import annotations

import pytest
import torch
from tests.contracts import cache_policy as contract
from tests.door.hosts import CAUSAL, tokens
from torch import nn

import headway
from headway.door.call import AttentionCall
from headway.errors import ArgumentError, ConflictError, HostError
from headway.kernels.normalizers.affine import affine_weights
from headway.methods.sinks.sink_survey import H2O, SinkAdapter
from headway.models import HeadwayConfig, HeadwayForCausalLM

KINDS = {
    "bias": {"normalizer": "learned_denominator"},
    "affine": {"normalizer": "affine"},
    "context": {"gate": "context"},
    "head": {"gate": "head"},
    "element": {"gate": "element"},
    "conditional": {"gate": "conditional"},
    "value": {"gate": "value"},
    "bias and gates": {"normalizer": "learned_denominator", "gate": ["value", "context"]},
    "affine and gate": {"normalizer": "affine", "gate": "head", "gate_options": {"bias": 4.0}},
}


def moved(model: nn.Module, name: str) -> SinkAdapter:
    """An adapter that changes something, in evaluation mode."""
    torch.manual_seed(0)
    adapter = SinkAdapter(model, **KINDS[name], opened=False).eval()
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        for normalizer in adapter.normalizers:
            if KINDS[name].get("normalizer") == "affine":
                normalizer.average.fill_(0.7)
    return adapter


def logits(model: nn.Module, adapter: SinkAdapter, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad(), headway.use(model, adapter.stage()):
        return model(input_ids=ids).logits


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("host", ["llama", "gpt2", "mistral sliding"])
def test_it_starts_at_the_host_and_moves_away_from_it(name, host):
    model, ids = CAUSAL[host](), tokens(2, 14)
    with torch.no_grad():
        native = model(input_ids=ids).logits
    at_host = SinkAdapter(model, **{**KINDS[name], "gate_options": None}).eval()
    torch.testing.assert_close(logits(model, at_host, ids), native, atol=1e-3, rtol=0)
    assert not torch.allclose(logits(model, moved(model, name), ids), native, atol=1e-2)


@pytest.mark.parametrize("name", KINDS)
def test_a_padded_batch_equals_its_rows_alone_and_decoding_equals_prefill(name):
    model = CAUSAL["llama"]()
    ids, mask = contract.padded_left(tokens(2, 16), [0, 5])
    with headway.use(model, moved(model, name).stage()):
        for chunks in ([16], [12, 1, 1, 1, 1], [11, 5]):
            both = contract.run_in_chunks(model, ids, chunks, mask)
            torch.testing.assert_close(both[:1], contract.run_in_chunks(model, ids[:1], [16]), atol=1e-4, rtol=0)
            short = contract.run_in_chunks(model, ids[1:, 5:], [11])
            torch.testing.assert_close(both[1:, 5:], short, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", KINDS)
def test_no_row_depends_on_a_later_token(name):
    model, ids = CAUSAL["llama"](), tokens(1, 12)
    other = ids.clone()
    other[:, 8:] = 40
    adapter = moved(model, name)
    first, second = logits(model, adapter, ids), logits(model, adapter, other)
    torch.testing.assert_close(first[:, :8], second[:, :8], atol=1e-5, rtol=0)
    assert not torch.allclose(first[:, 8:], second[:, 8:], atol=1e-3)


def call_of(model: nn.Module, layer: int = 1, **changes) -> AttentionCall:
    generator = torch.Generator().manual_seed(0)
    config = model.config
    sizes = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    query, key, value = (torch.randn(2, h, 9, config.head_dim, generator=generator) for h in sizes)
    hidden = torch.randn(2, 9, config.hidden_size, generator=generator)
    return AttentionCall.from_tensors(query, key, value, layer=layer, causal=True, hidden=hidden, **changes)


def test_a_denominator_takes_its_share_of_every_row():
    model = CAUSAL["llama"]()
    adapter = moved(model, "bias")
    call = adapter.stage().edit_call(call_of(model))
    size = call_of(model).logits().exp()
    b = adapter.normalizers[1].logit.exp().view(1, -1, 1, 1)
    torch.testing.assert_close(call.weights(), size / (size.sum(-1, keepdim=True) + b))


def test_affine_scales_make_the_output_of_their_weights():
    model = CAUSAL["llama"]()
    adapter, call = moved(model, "affine"), call_of(model)
    values = call.value.repeat_interleave(call.groups, 1)
    found = adapter.stage().edit_output(call, call.weights() @ values, None)
    normalizer = adapter.normalizers[1]
    made = affine_weights(call.weights(), call.visible(), normalizer.alpha(call.hidden), normalizer.average)
    torch.testing.assert_close(found, made @ values, rtol=1e-4, atol=1e-5)


def test_gates_multiply_the_output_of_their_layer_and_read_its_input():
    model = CAUSAL["llama"]()
    adapter, call = moved(model, "element"), call_of(model)
    output = torch.ones_like(call.query)
    factors = adapter.gates["element"][1].map(call.hidden).sigmoid().unflatten(-1, (call.heads, -1)).transpose(1, 2)
    torch.testing.assert_close(adapter.stage().edit_output(call, output, None), factors)


def test_it_learns_while_the_host_stays_as_it_is():
    """A few steps on one text make it more likely, and what was learned comes back from its state."""
    model, ids = CAUSAL["llama"]().requires_grad_(False), tokens(2, 20)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapter = SinkAdapter(model, normalizer="affine", gate="context").train()
    optimizer, losses = torch.optim.Adam(adapter.parameters(), lr=0.02), []
    with headway.use(model, adapter.stage()):
        for _ in range(12):
            loss = model(input_ids=ids, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            assert all(p.grad is not None and bool(p.grad.any()) for p in adapter.parameters())
            optimizer.step()
            losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.01
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(float((n.average - 1).abs().max()) > 0 for n in adapter.normalizers)
    again = SinkAdapter(model, normalizer="affine", gate="context").eval()
    again.load_state_dict(adapter.state_dict())
    torch.testing.assert_close(logits(model, again, ids), logits(model, adapter.eval(), ids), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "normalizer, gate: got neither"),
        ({"normalizer": "softpick"}, "normalizer: got 'softpick', expected one of learned_denominator, affine"),
        ({"gate": "door"}, "gate: got 'door'"),
        ({"gate": ["head", "context"], "gate_options": {"bias": 1.0}}, "gate_options: got 'bias'"),
        ({"normalizer": "affine", "normalizer_options": {"taper": 1}}, "normalizer_options"),
    ],
)
def test_what_cannot_be_adapted_is_named(options, message):
    with pytest.raises(ArgumentError, match=message):
        SinkAdapter(CAUSAL["llama"](), **options)


def test_hosts_and_policies_that_it_cannot_serve_are_named():
    model, ids = CAUSAL["gpt-oss learned sinks"](), tokens(1, 8)
    with pytest.raises(HostError, match="host with learned sinks"):
        logits(model, SinkAdapter(model, normalizer="learned_denominator"), ids)
    model = CAUSAL["llama"]()
    affine = SinkAdapter(model, normalizer="affine").eval().stage()
    policy = H2O(budget=6, recent=2, sinks=1)
    with pytest.raises(ConflictError, match="got H2O and AdapterStage"), headway.use(model, policy, affine):
        model(input_ids=ids, use_cache=True)
    with pytest.raises(HostError, match="no hidden state of 9 tokens"):
        SinkAdapter(model, gate="head").stage().edit_output(
            call_of(model).replace(hidden=None), torch.zeros_like(call_of(model).query), None
        )
    own = HeadwayForCausalLM(HeadwayConfig(vocab_size=9, width=8, layers=1, heads=2))
    with pytest.raises(HostError, match="model of mixers"):
        SinkAdapter(own, gate="head")
