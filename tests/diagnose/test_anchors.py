"""`headway diagnose anchors`: traces from files, resumable parts, findings true of planted traces, and the page."""

from __future__ import annotations

import json

import numpy as np
import pytest
from transformers import T5Config, T5ForConditionalGeneration

from headway.diagnose.anchors import Anchors, Options, TraceAnchors, diagnose_anchors, read_traces
from headway.diagnose.anchors import analysing as module
from headway.diagnose.anchors.columns import Columns
from headway.errors import ArgumentError, HeadwayError, HostError
from headway.evidence.recipes._anchors_scripted import GUESSES, script, scripted
from headway.evidence.recipes._anchors_toy import Words, decoder, draw_ids, planted
from headway.hosts.tiny import tiny_host
from headway.methods.diagnosis.thought_anchors import exact_encoder, pattern_answer, read_trace
from tests.methods.song_hosts import bert


@pytest.fixture(scope="module")
def host():
    return decoder(0).eval()


@pytest.fixture(scope="module")
def traces():
    ids = draw_ids(2, np.random.default_rng(0))
    return [planted(row.tolist(), name=f"trace {i}").trace for i, row in enumerate(ids)]


@pytest.fixture(scope="module")
def found(host, traces):
    return diagnose_anchors(host, Words(), traces, options=Options(top=3, orders=4))


def made() -> Anchors:
    """A finished diagnosis with every part."""
    random = np.random.default_rng(0)
    trace = script(coin="heads", guess=GUESSES[0])
    count = len(trace)
    matrix = np.where(np.tri(count, k=-1, dtype=bool), random.normal(size=(count, count)), np.nan)
    divergence = {"value": 1.2, "low": 0.8, "high": 1.5, "n": 50, "seeds": [], "unit": "nats"}
    effect = {"divergence": divergence, "p_value": 0.001, "accuracy": None}
    one = TraceAnchors(
        name="<b>trace</b> one",
        prompt="How many?\n",
        sentences=[*trace.sentences[:-1], "So <img src=x onerror=alert(1)> the answer is seven. "],
        ranges=[list(s) for s in trace.characters],
        categories=["problem_setup"] * count,
        tokens=[b - a for a, b in trace.tokens],
        matrix=matrix.tolist(),
        effect=[*np.nanmean(matrix[1:, :-1], axis=0).tolist(), float("nan")],
        edges=[[0, 2, 1.5], [2, 5, 2.0], [1, 3, 0.4]],
        forwards=3.4,
        receiver=[0.1, 0.3, 0.2, float("nan"), float("nan"), float("nan")],
        receiver_null=[[0.05, 0.2, 0.6]] * 3 + [[float("nan")] * 3] * 3,
        importance=[
            {"sentence": 2, "resampling": effect, "counterfactual": effect, "different": 0.5, "overdetermined": 0.9}
        ],
    )
    other = TraceAnchors(**{**vars(one), "name": "two", "importance": []})
    rho = {"value": 0.4, "low": -0.1, "high": 0.8, "n": 10, "seeds": [], "unit": ""}
    return Anchors(
        model={"name": "made", "layers": 3, "heads": 4, "dtype": "torch.float32", "parameters": 1000},
        run={"date": "2026-01-01", "settings": {"proximity": 2}},
        traces=[one, other],
        kurtosis=random.uniform(-1, 8, (3, 4)).tolist(),
        receivers=[[2, 1, 7.5], [1, 0, 5.0]],
        reliability=rho,
        agreement=[{"first": "effect", "second": "receiver", "rho": rho}],
        categories={"problem_setup": rho},
        findings=["Sentence 2 matters most."],
        warnings=["Few traces."],
    )


def test_every_part_is_there_and_within_cost(found, traces):
    assert [t.name for t in found.traces] == ["trace 0", "trace 1"]
    for one, trace in zip(found.traces, traces, strict=True):
        assert one.sentences == trace.sentences
        assert one.forwards <= len(trace) + 2
        assert np.shape(one.matrix) == (len(trace), len(trace))
        assert len(one.receiver) == len(one.receiver_null) == len(trace)
    assert np.shape(found.kurtosis) == (3, 4)
    assert len(found.receivers) == 3
    assert all(layer > 0 for layer, _, _ in found.receivers)
    assert found.reliability is not None
    assert found.ablation is not None
    assert [(p["first"], p["second"]) for p in found.agreement] == [("effect", "receiver")]


def test_findings_are_sentences_with_numbers(found):
    assert any("matters most" in f for f in found.findings)
    assert any("strongest receiver head" in f for f in found.findings)
    assert any("same place" in f for f in found.findings)
    assert any("No answers were resampled" in w for w in found.warnings)


def test_a_result_survives_its_json(found):
    again = Anchors.from_json(found.to_json())
    assert again.to_json() == found.to_json()
    np.testing.assert_array_equal(again.traces[0].matrix, found.traces[0].matrix)


def test_rollouts_find_the_sentence_that_decides(host):
    trace = script(coin="heads", guess=GUESSES[0])
    options = Options(rollouts=60, proximity=3, orders=0, top=2, extract=pattern_answer(r"answer is (\w+)"))
    found = diagnose_anchors(host, Words(), [trace], options=options, sampler=scripted, encoder=exact_encoder)
    told = next(f for f in found.findings if "answers change most" in f)
    assert "sentence 2" in told
    assert "coin" in told
    assert "1 of 6 sentences" in told
    assert {p["second"] for p in found.agreement} == {"receiver", "importance"}


def test_a_short_trace_has_no_receiver_scores_and_says_so(host):
    trace = read_trace("given:k0=3 . mode-is-m1 . then-k0-gives m1v3 . ", Words(), prompt="start ")
    found = diagnose_anchors(host, Words(), [trace])
    assert found.kurtosis == []
    assert any("Too short" in w for w in found.warnings)
    assert "Receiver heads" not in found.to_html().split("<main")[0]


def test_an_interrupted_diagnosis_goes_on(host, traces, tmp_path, monkeypatch, found):
    def stop(what, done, total):
        if "hiding" in what and "2 of 2" in what and done == 3:
            raise KeyboardInterrupt

    options = Options(top=3, orders=4)
    with pytest.raises(KeyboardInterrupt):
        diagnose_anchors(host, Words(), traces, options=options, out=tmp_path, progress=stop)
    kept = list((tmp_path / "parts").rglob("effects-*.safetensors"))
    assert len(kept) == len(traces[0]) + 3
    again = diagnose_anchors(host, Words(), traces, options=options, out=tmp_path)
    assert again.traces[0].forwards == 0
    np.testing.assert_allclose(again.traces[1].matrix, found.traces[1].matrix, atol=1e-3)


def test_effects_under_other_settings_are_kept_apart(tmp_path):
    one, other = Columns(tmp_path, "a", 1), Columns(tmp_path, "a", 2)
    one[3] = np.array([1.0, np.nan])
    assert other.get(3) is None
    assert one.get(2) is None
    np.testing.assert_array_equal(Columns(tmp_path, "a", 1).get(3), [1.0, np.nan])


def test_parts_of_another_model_are_not_taken(host, traces, tmp_path):
    options = Options(top=3, orders=0)
    diagnose_anchors(host, Words(), traces[:1], options=options, out=tmp_path)
    other = diagnose_anchors(decoder(1).eval(), Words(), traces[:1], options=options, out=tmp_path)
    assert other.traces[0].forwards > 1


def test_traces_are_read_from_lines(tmp_path):
    path = tmp_path / "some.jsonl"
    rows = [
        {"prompt": "start ", "text": "given:k0=3 . mode-is-m1 . ", "answer": 4},
        {"text": "given:k0=3 . mode-is-m1 . ", "sentences": ["given:k0=3 .", "mode-is-m1 ."], "name": "two"},
    ]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n", encoding="utf-8")
    found, left_out = read_traces(path, Words())
    assert [t.name for t in found] == ["line 1", "two"]
    assert [len(t) for t in found] == [2, 2]
    assert found[0].answer == "4"
    assert left_out == []


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("{", "no JSON"),
        ("[1]", "'text'"),
        ('{"prompt": "x"}', "'text'"),
        ('{"text": "given:k0=3 . ", "extra": 1}', "extra"),
        ('{"text": "given:k0=3 . ", "sentences": ["mode-is-m1 ."]}', "not in the text"),
        ('{"text": "given:k0=3 . ", "sentences": [3, 4]}', "expected a list of strings"),
        ('{"text": "given:k0=3 . ", "sentences": "given"}', "expected a list of strings"),
        ('{"text": "given:k0=3 . ", "prompt": 5}', "expected text"),
    ],
)
def test_a_row_that_cannot_be_used_is_refused_or_skipped_by_its_line(tmp_path, row, words, caplog):
    path = tmp_path / "some.jsonl"
    good = json.dumps({"text": "given:k0=3 . mode-is-m1 . "})
    path.write_text(f"{good}\n{row}\n{good}\n", encoding="utf-8")
    with pytest.raises(HeadwayError, match="line 2") as error:
        read_traces(path, Words())
    assert words in str(error.value)
    found, left_out = read_traces(path, Words(), bad_rows="skip")
    assert len(found) == 2
    assert left_out[0].startswith("line 2")
    assert "line 2" in caplog.text


def test_a_text_file_is_one_trace(tmp_path):
    path = tmp_path / "thought.txt"
    path.write_text("given:k0=3 . mode-is-m1 . ", encoding="utf-8")
    assert [t.name for t in read_traces(path, Words())[0]] == ["thought.txt"]


def test_what_cannot_be_measured_is_refused(host, traces, tmp_path, monkeypatch):
    with pytest.raises(ArgumentError, match="at least one"):
        diagnose_anchors(host, Words(), [])
    with pytest.raises(ArgumentError, match="orders"):
        Options(orders=-1)
    monkeypatch.setattr(module, "positions_of", lambda model: 10)
    with pytest.raises(ArgumentError, match="10 positions"):
        diagnose_anchors(host, Words(), traces)
    empty = tmp_path / "none.jsonl"
    empty.write_text("{\n", encoding="utf-8")
    with pytest.raises(ArgumentError, match="without a usable row"):
        read_traces(empty, Words(), bad_rows="skip")
    with pytest.raises(ArgumentError, match="bad_rows"):
        read_traces(empty, Words(), bad_rows="drop")


def test_the_page_holds_the_text_as_text():
    page = made().to_html()
    assert "<img src=x" not in page
    assert "&lt;b&gt;" in page or "\\u003cb\\u003e" in page
    assert "Sentence" in page


def test_heads_of_a_host_that_mixes_in_other_ways_too_are_named_by_their_layer(traces):
    kinds = ["conv", "conv", "full_attention", "full_attention"]
    size = decoder(0).config.vocab_size
    host = tiny_host("lfm2", num_hidden_layers=4, layer_types=kinds, vocab_size=size, max_position_embeddings=512)[0]
    found = diagnose_anchors(host, Words(), traces[:1], options=Options(top=3, orders=2))
    assert found.layers == [2, 3]
    assert len(found.receivers) == 3
    assert {int(layer) for layer, _, _ in found.receivers} <= {2, 3}
    for layer, head, peak in found.receivers:
        assert found.kurtosis[found.layers.index(layer)][head] == pytest.approx(peak)
    assert found.ablation is not None
    assert '"layers":[2,3]' in found.to_html().replace(" ", "")


def test_models_that_do_not_continue_text_are_refused(traces):
    small = T5Config(vocab_size=40, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    for host, tokenizer, words in (
        (bert().bert, Words(), "BertModel.*causal"),
        (T5ForConditionalGeneration(small), Words(), "T5ForConditionalGeneration.*causal"),
        (decoder(0), object(), "a model of text"),
    ):
        with pytest.raises(HostError, match=words):
            diagnose_anchors(host, tokenizer, traces)


def test_samplers_by_other_names_share_no_rollouts(host, tmp_path):
    def others(prefix, seeds):
        return ["The coin shows tails. The answer is nine."] * len(seeds)

    trace = script(coin="heads", guess=GUESSES[0])
    options = Options(rollouts=4, proximity=3, orders=0, top=2, extract=pattern_answer(r"answer is (\w+)"))
    for sampler in (scripted, others):
        diagnose_anchors(host, Words(), [trace], options=options, sampler=sampler, encoder=exact_encoder, out=tmp_path)
    assert len(list((tmp_path / "parts").glob("rollouts-*.jsonl"))) == 2
