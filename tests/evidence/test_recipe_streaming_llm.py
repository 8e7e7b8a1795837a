"""The StreamingLLM recipe at smoke size, and that its measurements can fail."""

from __future__ import annotations

import pytest
import torch

from headway.evidence import Context, NotRunnableError, load_recipe, prove
from headway.evidence.recipes import streaming_llm as recipe
from headway.evidence.recipes._long_text import perplexity_ratio
from headway.methods.sinks.streaming_llm.store import StreamingLayer


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    return prove("streaming-llm", size="smoke", seed=3, out=tmp_path_factory.mktemp("runs"), show_progress=False)


def claim(run, name):
    return next(found for found in run.claims if found.id == name)


def context(tmp_path) -> Context:
    return Context(size="smoke", seed=0, out=tmp_path)


def test_every_planned_claim_is_measured(smoke):
    assert [found.id for found in smoke.claims] == list(recipe.CRITERIA)
    assert smoke.planned


def test_bytes_are_flat_and_rotations_do_not_grow_with_the_window(smoke):
    assert claim(smoke, "flat-memory").measured.value == 1
    assert claim(smoke, "rotation-work").measured.value == 1
    assert set(claim(smoke, "rotation-work").details["keys rotated per step and head, by window"].values()) == {4.0}


def test_every_number_of_sinks_has_a_perplexity(smoke):
    table = claim(smoke, "sinks-rescue-window").details["perplexity by sinks"]
    assert set(table) == {"dense", "newlines", *map(str, recipe.SINKS)}
    assert all(value > 1 for value in table.values())
    assert 0 < claim(smoke, "sinks-rescue-window").details["mean attention on the first token"] < 1


def test_a_few_tokens_of_a_random_model_prove_nothing_about_trained_ones(smoke):
    assert claim(smoke, "matches-recomputation").verdict == "inconclusive"
    assert claim(smoke, "matches-recomputation").measured.n == recipe.SMOKE.places
    assert claim(smoke, "one-sink-token").verdict == "inconclusive"


def test_the_steps_are_drawn(smoke):
    assert (smoke.folder / "plots" / "step-time.html").exists()


def test_recomputation_and_stream_score_the_same_tokens(tmp_path):
    """With a cache as long as the text both are dense attention."""
    settings = recipe.Settings(**{**vars(recipe.SMOKE), "capacity": 60, "tokens": 61, "skip": 60, "places": 1})
    host = recipe._Host(settings)
    again = recipe._recomputation(host)
    text = recipe._perplexities(context(tmp_path), host)
    assert again["places"] == [60]
    assert again["nll"][0] == pytest.approx(text["4"][0], abs=1e-4)
    assert again["nll"][0] == pytest.approx(text["dense"][0], abs=1e-4)


def test_a_cache_that_leaks_is_caught(tmp_path, monkeypatch):
    monkeypatch.setattr(StreamingLayer, "evict", lambda self, keep=None: None)
    found = recipe._long_stream(context(tmp_path), recipe._Host(recipe.SMOKE))
    assert max(found["bytes"]) > 2 * min(found["bytes"])


def test_a_layer_that_turns_its_window_is_caught(monkeypatch):
    honest = StreamingLayer.with_sinks

    def wasteful(self, shift):
        self.turned += self.window_length
        return honest(self, shift)

    monkeypatch.setattr(StreamingLayer, "with_sinks", wasteful)
    found = recipe._rotations(recipe._Host(recipe.SMOKE))
    assert found["24"] > 2 * found["6"]


def test_the_planted_head_is_judged_beyond_its_window_only(tmp_path):
    errors = recipe._planted(context(tmp_path), 3)
    assert set(errors) == {"full", "window", "sink"}
    assert all(len(by_seed) == 3 for by_seed in errors.values())


def test_a_ratio_of_perplexities_is_exact_where_every_token_loses_alike(tmp_path):
    nll = torch.linspace(1, 3, 256)
    ratio = perplexity_ratio(context(tmp_path), "x", (nll + 0.1).tolist(), nll.tolist())
    assert ratio.value == pytest.approx(1.1051709, rel=1e-5)
    assert ratio.low == pytest.approx(ratio.high)
    assert ratio.n == 4


def test_the_paper_setting_needs_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(NotRunnableError, match="no GPU"):
        load_recipe("streaming-llm").check_runnable("full")
    load_recipe("streaming-llm").check_runnable("small")
