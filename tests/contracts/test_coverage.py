"""The coverage bar: every causal language model of the installed transformers passes the door or says why not."""

from __future__ import annotations

import pytest
import torch

from headway.door.call import AttentionCall
from headway.door.coverage import Coverage, DoorKernel, attention_report, cover
from headway.errors import HostError
from headway.hosts.tiny import architectures, other_architectures, tiny_host

#: How many architectures have to pass, out of those that transformers lists.
BAR = 120
#: Left padding of the first row in the padded sweep.
PADDED = 4
#: Hosts whose own forward refuses an attention mask of (batch, tokens).
NO_PADDING = {"xlnet"}


def sweep(*, padded: bool) -> tuple[dict[str, Coverage], dict[str, str]]:
    covered, unbuilt = {}, {}
    for architecture in architectures():
        try:
            model, inputs = tiny_host(architecture)
        except HostError as error:
            unbuilt[architecture] = str(error)
            continue
        if padded:
            if architecture in NO_PADDING or inputs["input_ids"].shape[0] != 2:
                continue
            mask = torch.ones(inputs["input_ids"].shape, dtype=torch.long)
            mask[0, :PADDED] = 0
            inputs = inputs | {"attention_mask": mask}
        covered[architecture] = cover(model, inputs, architecture=architecture)
    return covered, unbuilt


@pytest.fixture(scope="module")
def unpadded() -> tuple[dict[str, Coverage], dict[str, str]]:
    return sweep(padded=False)


def test_enough_architectures_pass(unpadded: tuple[dict[str, Coverage], dict[str, str]]) -> None:
    covered, _ = unpadded
    passing = [c.architecture for c in covered.values() if c.outcome == "passes"]
    assert len(passing) >= BAR


def test_every_architecture_is_accounted_for(unpadded: tuple[dict[str, Coverage], dict[str, str]]) -> None:
    covered, unbuilt = unpadded
    assert set(covered) | set(unbuilt) == set(architectures())


def test_none_passes_silently(unpadded: tuple[dict[str, Coverage], dict[str, str]]) -> None:
    covered, _ = unpadded
    assert {c.architecture: c.reason for c in covered.values() if c.outcome == "differs"} == {}
    assert [c.architecture for c in covered.values() if c.outcome == "passes" and c.sites == 0] == []


def test_every_refusal_names_its_reason(unpadded: tuple[dict[str, Coverage], dict[str, str]]) -> None:
    covered, unbuilt = unpadded
    known = ("hard-coded attention", "no self-attention", "does not reproduce")
    refused = {c.architecture: c.reason for c in covered.values() if c.outcome == "refused"}
    assert {a: r for a, r in refused.items() if not any(k in r for k in known)} == {}
    assert [a for a, reason in unbuilt.items() if a not in reason] == []


def test_padding_changes_nothing_of_it(unpadded: tuple[dict[str, Coverage], dict[str, str]]) -> None:
    covered, _ = unpadded
    padded, _ = sweep(padded=True)
    assert {a: c.reason for a, c in padded.items() if c.outcome != covered[a].outcome} == {}


@pytest.mark.parametrize("architecture", other_architectures())
def test_encoders_vision_and_encoder_decoders_pass_or_are_refused(architecture: str) -> None:
    model, inputs = tiny_host(architecture)
    coverage = cover(model, inputs)
    pooling = "MultiheadAttention at" in coverage.reason
    assert coverage.outcome == "passes" or (coverage.outcome == "refused" and pooling)


def test_a_wrong_kernel_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def halved(self: DoorKernel, call: AttentionCall, weights: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return weights / 2

    monkeypatch.setattr(DoorKernel, "edit_weights", halved)
    coverage = cover(*tiny_host("llama"))
    assert coverage.outcome == "differs"
    assert coverage.difference > 1e-2


def test_a_site_left_to_the_host_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DoorKernel, "edits", frozenset())
    coverage = cover(*tiny_host("llama"))
    assert coverage.outcome == "differs"
    assert "model.layers.0.self_attn" in coverage.reason


@pytest.mark.parametrize(
    ("architecture", "kinds"),
    [
        ("llama", {"LlamaAttention": "registry"}),
        ("bloom", {"BloomAttention": "hard-coded attention"}),
        ("mamba", {"MambaMixer": "state-space mixer"}),
        ("qwen3_next", {"Qwen3NextGatedDeltaNet": "linear attention", "Qwen3NextAttention": "registry"}),
    ],
)
def test_the_report_tells_how_a_host_mixes_tokens(architecture: str, kinds: dict[str, str]) -> None:
    model, _ = tiny_host(architecture)
    report = attention_report(model)
    assert {m.module_class: m.kind for m in report} == kinds
    assert all(m.module_class in m.reason and m.first in m.reason for m in report)


def test_padded_rows_do_not_count() -> None:
    model, inputs = tiny_host("gemma2", attn_implementation="eager")
    mask = torch.ones(inputs["input_ids"].shape, dtype=torch.long)
    mask[0, :PADDED] = 0
    assert cover(model, inputs | {"attention_mask": mask}).outcome == "passes"
