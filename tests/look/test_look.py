"""`headway.look` from model to report, on a tiny host and on the embedded one."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import transformers as tf

import headway
from headway.errors import ArgumentError, HeadwayError, InterceptionError, NumericError
from headway.look import Look
from headway.look.command import parse_heads, parse_layers
from tests.door.hosts import DECODER, sharpen, tokens
from tests.look.tiny import TEXT, byte_tokenizer, tiny_llama


@pytest.fixture(scope="module")
def found() -> Look:
    return headway.look(tiny_llama(), byte_tokenizer(), TEXT, tokens=200)


def test_every_metric_covers_every_head(found):
    for metric in found.heads:
        assert np.asarray(metric.values).shape == (4, 4), metric.name
    names = {metric.name for metric in found.heads}
    assert {"sink_rate", "value_drain", "key_cosine", "query_similarity", "previous_token", "induction"} <= names
    assert "retrieval" not in names, "a random model does not copy, so it has no retrieval score"
    assert any("does not solve the copy task" in w for w in found.warnings)
    assert {m.family for m in found.heads} == {"sinks", "patterns", "roles"}
    measured = [m for m in found.heads if m.name != "dominant_period"]
    assert all(np.isfinite(m.array()).any() for m in measured)


def test_received_mass_is_what_the_capture_says(found):
    model, tokenizer = tiny_llama(), byte_tokenizer()
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"][:, :200]
    with torch.no_grad(), headway.capture(model, what=("weights",)) as captured:
        model(ids)
    for layer in range(4):
        weights = captured.result()[layer]["weights"][0]
        expected = weights.sum(1) / torch.arange(200, 0, -1)
        torch.testing.assert_close(torch.tensor(found.received[layer]), expected.mean(0), rtol=1e-3, atol=1e-5)


def test_json_round_trip_keeps_every_number(found):
    again = Look.from_json(found.to_json())
    assert again.to_json() == found.to_json()
    assert again.metric("entropy").array() == pytest.approx(found.metric("entropy").array(), nan_ok=True)
    assert json.loads(found.to_json())["format"] == 1


def test_frame_has_a_row_per_head(found):
    frame = found.to_frame()
    assert len(frame) == 16
    row = frame[(frame.layer == 2) & (frame["head"] == 3)].iloc[0]
    assert row["entropy"] == pytest.approx(found.metric("entropy").values[2][3])


def test_report_is_one_page_without_network(found, tmp_path):
    page = found.to_html(tmp_path / "look.html")
    assert (tmp_path / "look.html").read_text(encoding="utf-8") == page
    assert 'src="http' not in page
    assert 'href="http' not in page


def test_a_model_without_a_sink_says_so():
    model = tiny_llama()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.zero_()
    found = headway.look(model, byte_tokenizer(), TEXT, tokens=200)
    assert "No attention sink" in found.findings[0]
    assert "o primary sink" in " ".join(found.findings)


def test_sampled_rows_carry_intervals_that_hold_most_exact_values(found):
    sampled = headway.look(tiny_llama(), byte_tokenizer(), TEXT, tokens=200, rows=60)
    assert sampled.run["rows"] == 60
    exact, metric = found.metric("entropy").array(), sampled.metric("entropy")
    low, high = np.asarray(metric.low), np.asarray(metric.high)
    assert ((low <= exact) & (exact <= high)).mean() >= 0.75
    assert any("query rows were read" in w for w in sampled.warnings)


def test_a_long_look_draws_maps_and_traces_sinks_in_its_first_tokens_and_says_so(monkeypatch):
    from headway.look import gather

    monkeypatch.setattr(gather, "MAP_TOKENS", 96)
    monkeypatch.setattr(gather, "TRACED_TOKENS", 64)
    found = headway.look(tiny_llama(), byte_tokenizer(), TEXT, tokens=200, rows=60)
    assert {(m.rows, m.columns) for m in found.maps} == {(96, 96)}
    assert len(found.tokens) == 200
    assert any("maps show the first 96 tokens" in w for w in found.warnings)
    assert any("origin in the first 64 tokens" in w for w in found.warnings)


def test_layers_restrict_what_is_read():
    found = headway.look(tiny_llama(), byte_tokenizer(), TEXT, tokens=100, layers=[1, 2])
    entropy = found.metric("entropy").array()
    assert np.isfinite(entropy[1:3]).all()
    assert np.isnan(entropy[[0, 3]]).all()


def test_chosen_heads_are_the_ones_drawn():
    found = headway.look(tiny_llama(), byte_tokenizer(), TEXT, tokens=100, heads=[(3, 1), (0, 2)])
    assert [(m.layer, m.head) for m in found.maps] == [(3, 1), (0, 2)]


def test_a_look_leaves_the_model_as_it_was():
    model = tiny_llama()
    plain = model(tokens(1)).logits
    headway.look(model, byte_tokenizer(), TEXT, tokens=64)
    assert torch.equal(model(tokens(1)).logits, plain)
    assert type(model.config._attn_implementation) is str
    hooks = [h for m in model.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    assert [h for h in hooks if h.__module__.startswith("headway")] == [], "transformers keeps its own"


def test_the_same_seed_gives_the_same_look():
    one, two = (headway.look(tiny_llama(), byte_tokenizer(), TEXT, tokens=100, seed=3) for _ in range(2))
    for first, second in zip(one.heads, two.heads, strict=True):
        np.testing.assert_array_equal(first.array(), second.array())


def test_an_encoder_is_looked_at_without_the_tasks_of_a_decoder():
    config = tf.BertConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=259
    )
    found = headway.look(sharpen(tf.BertModel(config)), byte_tokenizer(), TEXT, tokens=100)
    assert np.isfinite(found.metric("entropy").array()).all()
    assert not any(m.name == "retrieval" for m in found.heads)
    assert any("oles were not measured" in w for w in found.warnings)


@pytest.mark.parametrize("family", ["Gemma2", "GptOss", "Mistral"])
def test_hosts_with_windows_soft_caps_and_learned_sinks_are_looked_at(family):
    extra = {"num_local_experts": 2, "num_experts_per_tok": 1} if family == "GptOss" else {}
    fields = DECODER | {"vocab_size": 259, "max_position_embeddings": 1024, "sliding_window": 32} | extra
    model = sharpen(getattr(tf, f"{family}ForCausalLM")(getattr(tf, f"{family}Config")(**fields)))
    found = headway.look(model, byte_tokenizer(), TEXT, tokens=120)
    assert np.isfinite(found.metric("streaming").array()).all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"text": "   "}, "empty"),
        ({"text": "ab"}, "at least 8"),
        ({"tokens": 0}, "at least 1"),
        ({"tokens": 3}, "at least 8"),
        ({"tokens": 5000}, "1,024 positions"),
        ({"layers": [9]}, "a number from 0 to 3"),
        ({"heads": [(1, 7)]}, r"0\.\.3"),
        ({"heads": [(8, 0)]}, "layer"),
        ({"rows": 1}, "at least 2"),
    ],
)
def test_bad_input_names_what_came_and_what_was_expected(options, words):
    given = {"text": TEXT, "tokens": 64} | options
    with pytest.raises(ArgumentError, match=words):
        headway.look(tiny_llama(), byte_tokenizer(), **given)


def test_more_tokens_than_positions_is_an_option():
    found = headway.look(tiny_llama(max_position_embeddings=64), byte_tokenizer(), TEXT, tokens=100, allow_longer=True)
    assert any("64 positions" in w for w in found.warnings)


def test_a_host_that_cannot_be_intercepted_says_why():
    model = tf.BloomForCausalLM(tf.BloomConfig(hidden_size=32, n_layer=1, n_head=4, vocab_size=259))
    with pytest.raises(InterceptionError, match="hard-coded"):
        headway.look(model, byte_tokenizer(), TEXT, tokens=64)


def test_weights_that_are_not_numbers_are_refused():
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises((NumericError, HeadwayError), match=r"NaN|not finite"):
        headway.look(model, byte_tokenizer(), TEXT, tokens=64)


def test_a_tokenizer_with_and_without_a_bos_token_both_work():
    for bos in (False, True):
        found = headway.look(tiny_llama(), byte_tokenizer(bos), TEXT, tokens=64)
        assert found.sinks["first_special"] in (0.0, 1.0)


def test_unknown_metric_lists_the_valid_ones(found):
    with pytest.raises(ArgumentError, match="entropy"):
        found.metric("entrpy")


def test_a_report_that_is_no_report_is_refused():
    with pytest.raises(ArgumentError, match="JSON"):
        Look.from_json("{")
    with pytest.raises(ArgumentError, match="format"):
        Look.from_json("{}")


def test_layers_and_heads_are_parsed():
    assert parse_layers("0, 4-6,5") == [0, 4, 5, 6]
    assert parse_heads("3.7, 12.0") == [(3, 7), (12, 0)]
    for bad in ("", "a", "3-1", "1,,2", "-1"):
        with pytest.raises(ArgumentError, match="--layers"):
            parse_layers(bad)
    for bad in ("", "3", "3.x", "1.2.3"):
        with pytest.raises(ArgumentError, match="--heads"):
            parse_heads(bad)


@pytest.mark.real
def test_the_embedded_model_has_its_known_sink_and_copying_heads():
    model, tokenizer = headway.load("smollm2")
    found = headway.look(model, tokenizer, tokens=256)
    assert found.sinks["strongest_position"] == 0
    assert found.sinks["strongest_rate"] > 0.5
    assert np.nanmax(found.metric("retrieval").array()) > 0.6
    assert np.nanmax(found.metric("induction").array()) > 0.6
    assert found.secondary["primary"]["position"] == 0
    assert len(found.to_html()) < 8_000_000
