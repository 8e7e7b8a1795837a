"""The StreamingLLM recipe at smoke size, and that its measurements can fail."""

from __future__ import annotations

import pytest
import torch

from headway.evidence import Context, NotRunnableError, load_recipe, prove
from headway.evidence.recipes import _streaming_bytes as toys
from headway.evidence.recipes import _streaming_cost as cost
from headway.evidence.recipes import _streaming_text as reading
from headway.evidence.recipes import streaming_llm as recipe
from headway.evidence.recipes._long_text import perplexity_ratio
from headway.evidence.recipes._streaming_host import SINKS, Host, Settings
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
    table = claim(smoke, "four-sinks-suffice").details["perplexity by sinks"]
    assert set(table) == {"dense", "newlines", *map(str, SINKS)}
    assert all(value > 1 for value in table.values())
    assert 0 < claim(smoke, "sinks-rescue-window-512").details["mean attention on the first token"] < 1


def test_a_few_tokens_of_a_random_model_prove_nothing_about_trained_ones(smoke):
    settings = recipe.SMOKE
    runs = settings.documents * (settings.document - settings.skip) // settings.run
    assert claim(smoke, "matches-recomputation").verdict == "inconclusive"
    assert claim(smoke, "matches-recomputation").measured.n == runs
    assert claim(smoke, "matches-recomputation").details["tokens scored"] == runs * settings.run
    for name in toys.BYTE_CRITERIA:
        assert claim(smoke, name).verdict == "inconclusive"


def test_every_size_of_the_cache_has_its_time_and_perplexity(smoke):
    found = claim(smoke, "cost-by-cache")
    assert set(found.details) == {str(capacity) for capacity in recipe.SMOKE.capacities}
    assert {f"times_at_{capacity}" for capacity in recipe.SMOKE.capacities} < set(found.others)


def test_what_is_scored_beyond_the_positions_is_named(smoke):
    details = claim(smoke, "sinks-rescue-window").details
    assert (details["from"], details["scored"]) == (recipe.SMOKE.beyond, recipe.SMOKE.beyond_scored)
    assert set(details["perplexity"]) == {"dense", "alone", "sinks"}


def test_the_steps_are_drawn(smoke):
    assert (smoke.folder / "plots" / "step-time.html").exists()


def changed(**options) -> Settings:
    return Settings(**{**vars(recipe.SMOKE), **options})


def test_recomputation_and_stream_score_the_same_tokens():
    """While the cache is not full a stream is dense attention, and so is a window that begins with the first token."""
    settings = changed(capacity=41, skip=40, document=49, documents=1, tokens=80, run=3)
    host = Host(settings)
    again = reading.recomputation(host, 0)
    assert [len(row) for row in again["stream"]] == [3, 3, 3]
    assert again["afresh"][0] == pytest.approx(again["stream"][0], abs=1e-4)
    assert again["afresh"][2] != pytest.approx(again["stream"][2], abs=1e-3)


def test_the_documents_are_different_stretches_of_the_text():
    host = Host(changed(documents=3))
    _, ids, _ = host.get_long()
    starts = [next(i for i in range(ids.shape[1]) if torch.equal(ids[:, i : i + 9], part[:, :9]))
              for part in host.documents()]  # fmt: skip
    assert starts == [0, 144, 288]
    assert all(part.shape[1] == recipe.SMOKE.document for part in host.documents())


def test_a_window_and_dense_attention_are_scored_at_the_same_far_tokens():
    """With a cache that holds everything, sinks and none are dense attention."""
    host = Host(changed(long_capacity=200, beyond=100, beyond_scored=40))
    dense, alone, sinks = (reading.beyond(host, arm) for arm in ("dense", "alone", "sinks"))
    assert len(dense) == 40
    assert alone == pytest.approx(dense, abs=1e-3)
    assert sinks == pytest.approx(dense, abs=1e-3)


def test_a_byte_model_learns_and_is_read_in_every_way():
    """A few steps tell it how often each byte comes; counted pairs know more."""
    setting = toys.Bytes(layers=2, width=32, length=16, steps=60, held_out=400, every=8)
    found = toys.trained(toys.WITH, setting, 0)
    assert len(found["dense"]) == 400 + 1 - setting.skip
    assert len(found["bigrams"]) == len(found["afresh, cache 16"]) == len(found["places"])
    again = [found["1 sinks, cache 16"][place - setting.skip] for place in found["places"]]
    assert float(torch.tensor(again).mean()) < 3.6
    assert float(torch.tensor(found["bigrams"]).mean()) < 3
    assert toys.trained(toys.WITH, setting, 0) == found


def test_a_planted_gain_of_recomputation_is_seen_in_the_byte_claims(tmp_path):
    """A stream that loses 0.1 nats to windows read afresh fails; one that loses nothing holds."""
    setting = toys.Bytes(layers=1, width=32, length=8, steps=1, held_out=2064, every=1)
    flat = torch.linspace(1, 2, 2048).tolist()
    arm = {"places": list(range(17, 2065)), "sink share": 0.3, "bigrams": [x + 1 for x in flat], "dense": flat}
    for capacity in setting.capacities:
        arm |= {f"{sinks} sinks, cache {capacity}": flat for sinks in (0, 1, 4)} | {f"afresh, cache {capacity}": flat}
    worse = arm | {"1 sinks, cache 8": [x + 0.1 for x in flat], "0 sinks, cache 8": [x + 0.3 for x in flat]}
    verdicts = {}
    for name, found in (("same", arm), ("worse", worse)):
        claims = toys.byte_claims(context(tmp_path), setting, {toys.WITH: found, toys.WITHOUT: arm})
        verdicts[name] = {c.id: str(c.verdict) for c in claims}
    assert verdicts["same"]["bytes-match-recomputation"] == "holds"
    assert verdicts["worse"]["bytes-match-recomputation"] == "fails"
    assert verdicts["same"]["bytes-window-alone"] == "fails"
    assert verdicts["worse"]["bytes-window-alone"] == "holds"
    assert verdicts["worse"]["bytes-dense-beyond"] == "fails"
    silent = arm | {"sink share": 0.02}
    claims = toys.byte_claims(context(tmp_path), setting, {toys.WITH: silent, toys.WITHOUT: arm})
    assert {c.id: str(c.verdict) for c in claims}["bytes-window-alone"] == "inconclusive"


def test_a_cache_that_leaks_is_caught(tmp_path, monkeypatch):
    monkeypatch.setattr(StreamingLayer, "evict", lambda self, keep=None: None)
    found = cost.long_stream(context(tmp_path), Host(recipe.SMOKE))
    assert max(found["bytes"]) > 2 * min(found["bytes"])


def test_a_layer_that_turns_its_window_is_caught(monkeypatch):
    honest = StreamingLayer.with_sinks

    def wasteful(self, shift):
        self.turned += self.window_length
        return honest(self, shift)

    monkeypatch.setattr(StreamingLayer, "with_sinks", wasteful)
    found = cost.rotations(Host(recipe.SMOKE))
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
