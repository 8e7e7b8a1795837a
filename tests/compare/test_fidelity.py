"""Output error and kept mass as a task of `compare`: known shares of even weights, from the host to the page."""

from __future__ import annotations

import pytest
import torch

import headway
from headway.compare.baselines import PlainWindow
from headway.door.stages import Driver
from headway.methods.sinks.streaming_llm import StreamingLLM
from tests.look.tiny import TEXT, byte_tokenizer, tiny_llama

LONG = " ".join([TEXT] * 4)
TOKENS, STEPS, WINDOW = 200, 16, 40


class Plain(Driver):
    def generate(self, model, generate, *args, **kwargs):
        return generate(*args, **kwargs)


@pytest.fixture(scope="module")
def found():
    """A host whose queries are zero: a row gives every key that it reads the same weight."""
    host = tiny_llama(num_hidden_layers=2)
    with torch.no_grad():
        for layer in host.model.layers:
            layer.self_attn.q_proj.weight.zero_()
    methods = [
        ("window", PlainWindow(window=WINDOW)),
        ("moved", StreamingLLM(sinks=2, window=WINDOW)),
        ("driven", Plain()),
    ]
    return headway.compare(
        host, byte_tokenizer(), LONG, methods=methods, tasks=["fidelity"], tokens=TOKENS, repeats=2, new_tokens=2
    )


def beside(point, mode: str):
    return next((s for s in point.scores if s.name == "kept mass" and s.mode == mode), None)


def test_dense_has_no_error_and_keeps_all_mass(found):
    for mode in ("prefill", "decode"):
        assert found.dense.score("fidelity", mode).value == 0.0
        assert beside(found.dense, mode).value == pytest.approx(1.0, abs=1e-5)


def test_a_window_keeps_its_share_of_even_weights(found):
    """64 rows of the prompt, evenly; each of the steps behind it."""
    prompt = TOKENS - STEPS
    rows = torch.linspace(0, prompt - 1, 64).round()
    prefill = (WINDOW / (rows + 1)).clamp(max=1).mean()
    decode = (WINDOW / (torch.arange(prompt, TOKENS) + 1)).mean()
    point = found.point("window")
    assert beside(point, "prefill").value == pytest.approx(float(prefill), rel=1e-5)
    assert beside(point, "decode").value == pytest.approx(float(decode), rel=1e-5)
    for mode in ("prefill", "decode"):
        score = point.score("fidelity", mode)
        assert (score.name, score.n, len(score.parts)) == ("output error", 2, 2)
        assert score.value == pytest.approx(sum(score.parts) / 2)
        assert score.value > 0.05


def test_a_method_that_moves_keys_has_an_error_and_no_mass(found):
    assert found.point("moved").score("fidelity", "decode").value > 0.05
    assert beside(found.point("moved"), "decode") is None


def test_a_driver_is_left_out_and_the_error_is_the_loss_where_nothing_else_was_asked(found):
    assert found.point("driven").states == {"fidelity, prefill": "left out", "fidelity, decode": "left out"}
    assert found.judged == [("fidelity", "prefill"), ("fidelity", "decode")]
    worst = found.point("window").worst
    assert worst.value == max(found.point("window").score("fidelity", m).value for m in ("prefill", "decode"))
    assert "moves the output of attention by" in found.recommendation.sentence or found.recommendation.label != "dense"
    assert "kept mass" in found.to_html()
