"""What a method loses at each layer on recorded tensors: known losses, and agreement with a single recorded call."""

from __future__ import annotations

import pytest
import torch

import headway
from headway.compare.baselines import PlainWindow, RandomBlocks
from headway.door import Editor, Observer
from headway.errors import ArgumentError, HostError
from headway.methods.sinks.streaming_llm import StreamingLLM
from headway.tasks.fidelity import fidelity
from headway.tasks.undisturbed import losses, record_dense, rows_of
from tests.contracts.test_cache_policy import KeepLast
from tests.door.hosts import decoder
from tests.look.tiny import tiny_llama

HOST = tiny_llama(num_hidden_layers=3)
IDS = torch.randint(3, 259, (1, 120), generator=torch.Generator().manual_seed(0))
STEPS, PROMPT = 6, 114


@pytest.fixture(scope="module")
def record():
    return record_dense(HOST, IDS, steps=STEPS, rows=40)


class Calls(Observer):
    def start(self) -> None:
        self.calls = []

    def observe(self, call, output, lse=None) -> None:
        self.calls.append(call)

    def result(self):
        return self.calls


class Scaled(Editor):
    """Multiplies the output."""

    def __init__(self, by: float) -> None:
        self.by = by

    def edit_output(self, call, output, lse):
        return output * self.by


class TurnedQuery(Editor):
    def edit_call(self, call):
        return call.replace(query=call.query.flip(-1))


def lost(record, *stages, host=HOST, **options):
    with headway.use(host, *stages, **options):
        return losses(host, record)


def recorded_calls() -> list:
    with headway.use(HOST, watch := Calls()), torch.no_grad():
        past = HOST(input_ids=IDS[:, :PROMPT], use_cache=True).past_key_values
        for token in IDS[0, PROMPT:]:
            past = HOST(input_ids=token.view(1, 1), past_key_values=past, use_cache=True).past_key_values
    return watch.result()


def test_nothing_attached_loses_nothing(record):
    for phase in losses(HOST, record).values():
        assert phase.output_error.tolist() == [0.0] * 3
        torch.testing.assert_close(phase.kept_mass, torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize(
    "stage", [PlainWindow(window=20), PlainWindow(window=16, sinks=2), RandomBlocks(keep=3, block=8)]
)
def test_a_selector_loses_what_its_selection_loses_on_the_recorded_calls(record, stage):
    found, calls = lost(record, stage), recorded_calls()
    for layer in range(3):
        prompt, *steps = (call for call in calls if call.site.layer == layer)
        whole = fidelity(prompt, stage.select(prompt))
        assert float(found["prefill"].output_error[layer]) == pytest.approx(whole.output_error, rel=1e-4)
        some = fidelity(prompt, stage.select(prompt), rows=rows_of(PROMPT, 40))
        assert float(found["prefill"].kept_mass[layer]) == pytest.approx(some.mean_mass(), abs=1e-5)
        each = [fidelity(call, stage.select(call)) for call in steps]
        error = sum(float(f.squared_error.sum()) for f in each) / sum(float(f.squared_norm.sum()) for f in each)
        assert float(found["decode"].output_error[layer]) == pytest.approx(error**0.5, rel=1e-4)
        mass = sum(f.mean_mass() for f in each) / len(each)
        assert float(found["decode"].kept_mass[layer]) == pytest.approx(mass, abs=1e-5)


def even_host() -> torch.nn.Module:
    """Queries of zero: every visible key has the same weight."""
    host = tiny_llama(num_hidden_layers=2)
    with torch.no_grad():
        for layer in host.model.layers:
            layer.self_attn.q_proj.weight.zero_()
    return host


def test_with_even_weights_a_window_keeps_its_share_of_the_keys():
    """Row i sees i + 1 keys and reads 20 of them at most."""
    host = even_host()
    record = record_dense(host, IDS, steps=STEPS, rows=1000)
    found = lost(record, PlainWindow(window=20), host=host)
    prefill = torch.tensor([min(20 / (i + 1), 1) for i in range(PROMPT)]).mean()
    decode = torch.tensor([20 / (i + 1) for i in range(PROMPT, 120)]).mean()
    assert found["prefill"].kept_mass.tolist() == pytest.approx([float(prefill)] * 2, rel=1e-5)
    assert found["decode"].kept_mass.tolist() == pytest.approx([float(decode)] * 2, rel=1e-5)


def test_with_even_weights_a_policy_keeps_its_share_in_the_heads_that_it_shortens():
    """KV head 0 keeps everything, the other one its last 20 keys."""
    host = even_host()
    record = record_dense(host, IDS, steps=STEPS)
    found = lost(record, KeepLast(20), host=host)["decode"].kept_mass
    rows = torch.tensor([20 / (i + 1) for i in range(PROMPT, 120)])
    assert found.tolist() == pytest.approx([float((1 + rows).mean() / 2)] * 2, rel=1e-5)


def test_an_editor_that_takes_a_tenth_of_the_output_has_that_error_and_keeps_all_mass(record):
    for phase in lost(record, Scaled(0.9)).values():
        assert phase.output_error.tolist() == pytest.approx([0.1] * 3, rel=1e-5)
        torch.testing.assert_close(phase.kept_mass, torch.ones(3, dtype=torch.float64))


def test_what_one_layer_loses_does_not_reach_the_next(record):
    for phase in lost(record, Scaled(0.0), layers=[0]).values():
        assert phase.output_error.tolist() == [1.0, 0.0, 0.0]


def test_keys_that_were_moved_have_an_error_and_no_mass_and_unmoved_ones_have_both(record):
    """In the text's positions, sinks and a window that holds the step's own token are what a plain selection reads."""
    options = {"sinks": 2, "window": 16}
    moved = lost(record, StreamingLLM(**options))
    assert all(bool(phase.kept_mass.isnan().all()) for phase in moved.values())
    assert all(float(phase.output_error.min()) > 0.01 for phase in moved.values())
    still = lost(record, StreamingLLM(**options, positions="text", evict="before"))
    plain = lost(record, PlainWindow(**options))
    torch.testing.assert_close(still["decode"].kept_mass, plain["decode"].kept_mass, atol=1e-5, rtol=0)
    torch.testing.assert_close(still["decode"].output_error, plain["decode"].output_error, atol=1e-5, rtol=0)
    assert bool(lost(record, TurnedQuery())["prefill"].kept_mass.isnan().all())


def test_a_learned_sink_is_not_counted_as_a_key():
    """Even weights and a sink logit beside them: the window's share of the keys is what it is without one."""
    host = decoder("GptOss", num_local_experts=2, num_experts_per_tok=1, vocab_size=259, max_position_embeddings=256)
    with torch.no_grad():
        for layer in host.model.layers:
            layer.self_attn.q_proj.weight.zero_()
            layer.self_attn.q_proj.bias.zero_()
            layer.self_attn.sinks.fill_(2.0)
    record = record_dense(host, IDS, steps=STEPS)
    full = [n for n, kind in enumerate(host.config.layer_types) if kind == "full_attention"]
    found = lost(record, PlainWindow(window=20), host=host)["decode"].kept_mass
    wanted = sum(20 / (i + 1) for i in range(PROMPT, 120)) / STEPS
    assert [float(found[n]) for n in full] == pytest.approx([wanted] * len(full), rel=1e-4)


def test_the_host_is_as_it_was(record):
    with torch.no_grad():
        before = HOST(input_ids=IDS).logits
        lost(record, PlainWindow(window=20))
        assert torch.equal(HOST(input_ids=IDS).logits, before)


def test_what_cannot_be_compared_is_refused(record):
    with pytest.raises(ArgumentError, match="steps: got 120 of 120 tokens"):
        record_dense(HOST, IDS, steps=120)
    with pytest.raises(ArgumentError, match="rows: got 0"):
        record_dense(HOST, IDS, rows=0)
    with pytest.raises(HostError, match="not recorded"):
        losses(tiny_llama(num_hidden_layers=4), record)
