"""What the survey's tools refuse, by name: arguments, hosts and calls that they cannot serve."""

from __future__ import annotations

import logging
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tests.door.hosts import CAUSAL, tokens
from torch import nn

import headway
from headway.errors import ArgumentError, HostError
from headway.methods.sinks.sink_emergence import sink_rate
from headway.methods.sinks.sink_survey import (
    HeadBroadcast,
    IntactKV,
    OrthoRank,
    PrefixTokens,
    SinkMask,
    find_register_neurons,
    key_difference,
    norm_mask,
    prefix_search,
    register_behind,
    run_with_register,
)
from headway.methods.sinks.sink_survey.interpretation import rotary_decay, rotary_decay_of_model
from headway.methods.sinks.sink_survey.packed import PackedTokens
from headway.methods.sinks.sink_survey.registers import down_projections, moved_to


class Narrow(nn.Module):
    """Blocks without an MLP that is wider than the stream, and without a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def get_input_embeddings(self) -> nn.Module:
        return self.embed


class Flattened(nn.Module):
    """A module called `embeddings` that gives no tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.Flatten()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks[0](self.embeddings(x))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HeadBroadcast(sources={0: 1}, heads={1: [0]}), "heads: got layer 1, which has no source"),
        (lambda: IntactKV(sinks=-1), "sinks, group: got -1, 64"),
        (lambda: IntactKV(group=0), "sinks, group: got 4, 0"),
        (lambda: SinkMask(window=0), "sinks, window, block, keep: got 4, 0"),
        (lambda: key_difference(torch.ones(1, 3, 2), anchor="median"), "anchor: got 'median'"),
        (lambda: PackedTokens(bits=3, per="token"), "bits: got 3, expected 4 or 8"),
        (lambda: PackedTokens(bits=4, per="row"), "per: got 'row'"),
        (lambda: PackedTokens(bits=4, per="token").unpack(torch.zeros(1, 0), torch.float32), "packed: got no tokens"),
        (lambda: PrefixTokens(0, CAUSAL["llama"]()), "count: got 0"),
        (lambda: prefix_search([], lambda prefix: 0.0), "candidates, longest: got 0, 4"),
        (lambda: rotary_decay(torch.ones(4), distances=(3,)), r"distances: got \[3\]"),
        (lambda: sink_rate([]), "alpha: got no layer"),
        (lambda: find_register_neurons(CAUSAL["llama"](), {"input_ids": tokens(1, 6)}, [6]), r"tokens: got \[6\]"),
        (
            lambda: run_with_register(CAUSAL["llama"](), tokens(1, 3), [], attention_mask=torch.tensor([[1, 1, 0]])),
            "attention_mask: got padding behind tokens",
        ),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ArgumentError, match=message):
        make()


@pytest.mark.parametrize("neuron", [(9, 0), (0, 4096), (0, -1)])
def test_a_neuron_that_is_not_there_is_named(neuron):
    words = rf"neurons: got \({neuron[0]}, {neuron[1]}\)"
    with pytest.raises(ArgumentError, match=words), moved_to(CAUSAL["llama"](), [neuron], 0):
        pass


def test_hosts_without_the_parts_that_a_rule_needs_are_refused():
    with pytest.raises(HostError, match="block 0 without a map from a wider MLP"):
        down_projections(Narrow())
    with pytest.raises(HostError, match="blocks without a norm over 4"), norm_mask(Narrow(), [1]):
        pass
    with pytest.raises(HostError, match="without rotary positions"):
        rotary_decay_of_model(CAUSAL["gpt2"]())
    model = Flattened()
    with register_behind(model, []), pytest.raises(HostError, match="no \\(batch, tokens, width\\)"):
        model(torch.ones(2, 2, 2))


def test_a_mask_tells_a_host_with_learned_sinks_once_that_it_needs_none(caplog):
    model = CAUSAL["gpt-oss learned sinks"]()
    with headway.use(model, SinkMask(sinks=2, window=3)), caplog.at_level(logging.WARNING), torch.no_grad():
        for _ in range(2):
            model(input_ids=tokens(1, 8))
    assert sum("SinkMask: the host has learned sinks" in record.message for record in caplog.records) == 1
    caplog.clear()
    for host, sinks in ((CAUSAL["gpt-oss learned sinks"](), 0), (CAUSAL["llama"](), 2)):
        with headway.use(host, SinkMask(sinks=sinks, window=3)), torch.no_grad():
            host(input_ids=tokens(1, 8))
    assert not caplog.records


def test_orthorank_without_hidden_states_says_what_to_use():
    policy = OrthoRank(budget=4, recent=1, sinks=1)
    call = SimpleNamespace(hidden=None, site=SimpleNamespace(name="layer 0"), queries=3)
    with pytest.raises(HostError, match=r"layer 0: got no hidden state of 3 tokens.*KeyDiff"):
        policy.rank(call, None, call, torch.ones(1, 1, 3, dtype=torch.bool))


def test_a_quantised_cache_tells_a_host_with_learned_sinks_once_that_first_tokens_need_no_care(caplog):
    model = CAUSAL["gpt-oss learned sinks"]()
    with headway.use(model, IntactKV(bits=8, sinks=2, group=4)), caplog.at_level(logging.WARNING), torch.no_grad():
        past = model(input_ids=tokens(1, 8), use_cache=True).past_key_values
        model(input_ids=tokens(1, 1), past_key_values=past, use_cache=True)
    assert sum("learned sinks" in record.message for record in caplog.records) == 1
    caplog.clear()
    with headway.use(model, replace(IntactKV(bits=8, group=4), sinks=0)), torch.no_grad():
        model(input_ids=tokens(1, 8), use_cache=True)
    assert not any("learned sinks" in record.message for record in caplog.records)
