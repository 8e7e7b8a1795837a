"""`headway.compare` from model to comparison, on a tiny host and toy stages."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import pytest
import torch

import headway
from headway.compare import Comparison
from headway.compare.baselines import PlainWindow
from headway.door import BlockMask, Blocks, Dense, Selector, Window
from headway.door.stages import Driver
from headway.errors import ArgumentError, HeadwayError, HostError
from tests.contracts.test_cache_policy import KeepLast
from tests.look.tiny import TEXT, byte_tokenizer, tiny_llama

HOST = tiny_llama(num_hidden_layers=2)
TOKENIZER = byte_tokenizer()
LONG = " ".join([TEXT] * 4)
#: Quick settings: one sample, two pairs of runs, two tokens decoded.
QUICK = {"tokens": 200, "tasks": ["perplexity"], "count": 1, "repeats": 2, "new_tokens": 2}


def compare(methods, *, text=LONG, host=HOST, **options) -> Comparison:
    return headway.compare(host, TOKENIZER, text, methods=methods, **(QUICK | {"budgets": [0.5]} | options))


class Refuses(Selector):
    def select(self, call):
        raise ArgumentError("refuses: got a call, expected none.")


class Breaks(Selector):
    def select(self, call):
        raise RuntimeError("a bug")


class RefusesLater(Selector):
    """Takes a prompt and refuses what is fed after it, several tokens at once."""

    def select(self, call):
        if 1 < call.queries < call.keys:
            raise ArgumentError("chunks: got a second one, expected the whole prompt.")
        return PlainWindow(window=50).select(call)


class DropsAfterPrompt(Selector):
    """Reads everything in prefill, and the last eight keys in decoding."""

    phases = frozenset({"decode"})

    def select(self, call):
        return PlainWindow(window=8).select(call)


class Loud(Selector):
    """Warns whenever it is attached."""

    def prepare(self, sites):
        logging.getLogger("headway.methods.loud").warning("Loud: take care.")

    def select(self, call):
        return Dense()


@dataclass(frozen=True, kw_only=True)
class Plain(Driver):
    """Hands generate through."""

    def generate(self, model, generate, *args, **kwargs):
        return generate(*args, **kwargs)


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> Comparison:
    return compare(
        ["window", ("keep last", KeepLast(20))],
        budgets=[0.5, 0.25],
        tokens=420,
        tasks=["perplexity", "needle", "agreement"],
    )


def test_dense_is_first_and_every_method_has_a_point_at_every_budget(found):
    assert [p.label for p in found.points] == ["dense", "window at 50 %", "window at 25 %", "keep last"]
    assert found.qualities == [
        ("perplexity", "prefill"),
        ("perplexity", "decode"),
        ("needle", "blind"),
        ("needle", "aware"),
        ("agreement", ""),
    ]
    assert all(point.status == "measured" for point in found.points)


def test_perplexity_is_that_of_the_task_alone(found):
    from headway.hosts import tokenize
    from headway.tasks.perplexity import perplexity

    ids = tokenize(TOKENIZER, LONG, 420)
    assert found.dense.score("perplexity", "prefill").value == pytest.approx(
        perplexity(HOST, ids, chunk=420).perplexity
    )
    with headway.use(HOST, PlainWindow(window=210)):
        alone = perplexity(HOST, ids, chunk=420).perplexity
    assert found.point("window", 0.5).score("perplexity", "prefill").value == pytest.approx(alone)


def test_perplexity_in_decoding_is_that_of_the_last_tokens_given_one_by_one(found):
    from headway.hosts import tokenize
    from headway.tasks.perplexity import perplexity

    ids = tokenize(TOKENIZER, LONG, 420)
    score = found.dense.score("perplexity", "decode")
    assert score.n == 128
    assert score.value == pytest.approx(perplexity(HOST, ids, skip=420 - 128).perplexity, rel=1e-4)


def test_what_a_policy_drops_after_the_prompt_shows_in_decoding_and_not_in_prefill():
    found = compare([("drops", DropsAfterPrompt())])
    drops = found.point("drops")
    same = drops.score("perplexity", "prefill").value / found.dense.score("perplexity", "prefill").value
    other = drops.score("perplexity", "decode").value / found.dense.score("perplexity", "decode").value
    assert same == pytest.approx(1, abs=1e-3)
    assert abs(other - 1) > 0.01


def test_what_a_method_logs_is_a_note_and_said_once(caplog):
    found = compare([("loud", Loud())])
    assert found.point("loud").notes == ["Loud: take care."]
    assert [s for s in found.warnings if "take care" in s] == ["Loud: take care."]
    assert "take care" not in caplog.text


def test_dense_agrees_with_itself_and_loses_nothing(found):
    dense = found.dense
    assert dense.score("agreement").value == 1.0
    assert [loss.value for loss in dense.losses] == [0.0] * len(dense.losses)
    kl = next(s for s in dense.scores if s.name == "KL from dense")
    assert kl.value == pytest.approx(0, abs=1e-6)


def test_densities_are_those_of_the_report_and_fall_with_the_budget(found):
    half, quarter = found.point("window", 0.5).density, found.point("window", 0.25).density
    assert half["prefill"] == pytest.approx(1 - 0.5**2, abs=0.02)
    assert half["decode"] == pytest.approx(0.5, abs=0.02)
    assert quarter["prefill"] == pytest.approx(1 - 0.75**2, abs=0.02)
    assert found.dense.density == {"prefill": 1.0, "decode": 1.0}
    assert set(found.point("window", 0.5).paths) == {"window"}


def test_the_json_has_the_density_of_every_head_by_phase_and_site():
    """In a prompt of n tokens a window of w keys reads w(w + 1)/2 + (n − w)w of its n(n + 1)/2 pairs; decoding stays
    dense."""
    widths = (10, 20, 40, 80)
    assert HOST.config.num_attention_heads == len(widths)

    class Uneven(Selector):
        phases = frozenset({"prefill"})

        def select(self, call):
            near = torch.cat([Window(0, width).to_bool(call.queries, call.keys) for width in widths], 1)
            return Blocks(BlockMask(near, call.queries, call.keys, 1, 1))

    found = compare([("uneven", Uneven())])
    by_head = Comparison.from_json(found.to_json()).point("uneven").density_by_head
    n = 200 - QUICK["new_tokens"]
    expected = [(w * (w + 1) / 2 + (n - w) * w) / (n * (n + 1) / 2) for w in widths]
    assert len(by_head["prefill"]) == len(by_head["decode"]) == HOST.config.num_hidden_layers
    for site, shares in by_head["prefill"].items():
        assert shares == pytest.approx(expected, abs=1e-4), site
        assert by_head["decode"][site] == [1.0] * 4
    assert found.dense.density_by_head == {}
    assert "prefill by head 0.098 to 0.64" in found.to_html()


def test_a_policy_shows_in_the_bytes_and_a_selector_does_not(found):
    layers, heads, dim, tokens = 2, 2, 8, 420
    assert found.dense.cache_bytes == 2 * layers * heads * dim * tokens * 4
    assert found.point("window", 0.25).cache_bytes == found.dense.cache_bytes
    assert found.point("keep last").paths.keys() == {"policy"}


def test_every_pair_of_times_is_kept(found):
    timing = found.point("window", 0.5).timing
    assert (timing.tokens, timing.new_tokens) == (418, 2)
    assert [len(t) for t in (timing.prefill, timing.decode, timing.dense_prefill, timing.dense_decode)] == [2] * 4
    assert min(timing.prefill + timing.decode) > 0


def test_a_comparison_survives_json_and_becomes_a_frame(found):
    back = Comparison.from_json(found.to_json())
    assert back == found or back.to_json() == found.to_json()
    frame = found.to_frame()
    assert list(frame["method"]) == ["dense", "window", "window", "keep last"]
    assert frame.loc[1, "needle, blind, exact match"] == found.points[1].score("needle", "blind").value


def test_json_of_something_else_is_refused():
    for text in ("[]", "{", '{"format": 99}'):
        with pytest.raises(ArgumentError):
            Comparison.from_json(text)


def test_an_unknown_point_names_those_there_are(found):
    with pytest.raises(ArgumentError, match="window at 50 %"):
        found.point("window", 0.1)


def test_the_host_is_left_as_it_was():
    host = tiny_llama(num_hidden_layers=2).train()
    before = host.config._attn_implementation
    compare(["window"], host=host)
    assert host.training
    assert host.config._attn_implementation == before
    assert "generate" not in host.__dict__


def test_a_method_that_refuses_is_a_row_with_its_reason():
    found = compare([("no", Refuses())])
    point = found.point("no")
    assert point.status == "refused"
    assert point.reasons["perplexity, prefill"] == "refuses: got a call, expected none."
    assert any("no refused everything: refuses" in s for s in found.warnings)
    assert math.isnan(point.costs["request"])


def test_a_budget_that_is_refused_is_a_row_and_the_others_are_measured():
    found = compare(["sinks-window"], budgets=[0.5, 0.01])
    assert found.point("sinks-window", 0.5).status == "measured"
    assert found.point("sinks-window", 0.01).status == "refused"
    assert "4 sinks" in found.point("sinks-window", 0.01).reasons["speed"]


def test_a_method_that_breaks_is_a_row_and_is_tried_again(tmp_path, caplog):
    assert (
        compare([("bug", Breaks())], out=tmp_path).point("bug").reasons["perplexity, prefill"] == "RuntimeError: a bug"
    )
    again = compare([("bug", Breaks())], out=tmp_path)
    assert again.run["cells_reused"] == 3
    assert again.run["cells_measured"] == 3


def test_a_method_that_refuses_one_mode_is_measured_in_the_other():
    found = compare([("whole", RefusesLater())], tasks=["perplexity", "needle"], tokens=420).point("whole")
    assert found.states == {"needle, blind": "refused"}
    assert found.score("needle", "aware") is not None
    assert found.status == "partly measured"


def test_a_driver_is_asked_through_generate_and_left_out_where_that_cannot_be():
    found = compare([("driven", Plain())], tasks=["perplexity", "needle"], tokens=420)
    point = found.point("driven")
    assert point.states == {
        "perplexity, prefill": "left out",
        "perplexity, decode": "left out",
        "needle, blind": "left out",
    }
    assert "generate" in point.reasons["perplexity, prefill"]
    assert point.score("needle", "aware").value == found.dense.score("needle", "aware").value
    assert point.timing is not None
    assert found.recommendation.label == "dense"


def test_a_second_run_with_the_same_settings_measures_nothing(tmp_path):
    first = compare(["window"], out=tmp_path)
    second = compare(["window"], out=tmp_path)
    assert (first.run["cells_measured"], first.run["cells_reused"]) == (6, 0)
    assert (second.run["cells_measured"], second.run["cells_reused"]) == (0, 6)
    assert [p.scores for p in second.points] == [p.scores for p in first.points]
    assert [p.timing for p in second.points] == [p.timing for p in first.points]


@pytest.mark.parametrize(
    ("changes", "reused"),
    [
        ({"budgets": [0.5, 0.25]}, 6),
        ({"tasks": ["perplexity", "agreement"]}, 6),
        ({"tokens": 190}, 0),
        ({"text": LONG.replace("door", "gate")}, 0),
        ({"chunk": 64}, 0),
        ({"repeats": 3}, 4),
        ({"seed": 1}, 2),
        ({"host": "other"}, 0),
    ],
)
def test_a_run_with_other_settings_takes_only_what_does_not_depend_on_them(tmp_path, changes, reused):
    compare(["window"], out=tmp_path)
    if changes.get("host"):
        host = tiny_llama(num_hidden_layers=2)
        with torch.no_grad():
            host.lm_head.weight[0, 0] += 1
        changes = {"host": host}
    assert compare(["window"], out=tmp_path, **changes).run["cells_reused"] == reused


def test_a_cell_that_cannot_be_read_is_measured_again(tmp_path, caplog):
    compare(["window"], out=tmp_path)
    for path in (tmp_path / "cells").iterdir():
        path.write_text("{half")
    assert compare(["window"], out=tmp_path).run["cells_measured"] == 6
    assert "measured again" in caplog.text


def test_an_interrupt_keeps_the_finished_cells(tmp_path):
    told = []

    def progress(what, done, total):
        told.append((what, done, total))
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(["window"], out=tmp_path, progress=progress)
    assert told == [
        ("dense: perplexity, prefill", 0, 6),
        ("dense: perplexity, decode", 1, 6),
        ("dense: speed", 2, 6),
    ]
    assert len(list((tmp_path / "cells").iterdir())) == 2
    assert compare(["window"], out=tmp_path).run["cells_reused"] == 2


def test_a_short_text_is_read_as_far_as_it_goes_and_named():
    found = compare(["window"], text=TEXT, tokens=900)
    assert found.run["tokens"] == len(TEXT.encode())
    assert any("fewer than the 900" in s for s in found.warnings)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"text": "short"}, "at least 160"),
        ({"text": "  "}, "empty"),
        ({"text": "a\ud800" * 200}, "half of a character pair"),
        ({"tasks": ["perplexty"]}, "perplexity"),
        ({"tasks": []}, "tasks"),
        ({"budgets": [1.5]}, "budgets"),
        ({"modes": ["blnd"]}, "blind"),
        ({"modes": []}, "modes"),
        ({"save": "money"}, "memory"),
        ({"count": 0}, "count"),
        ({"chunk": 0}, "chunk"),
        ({"chat": True}, "without a chat template"),
        ({"repeats": 1}, "repeats"),
        ({"new_tokens": 150}, "new_tokens"),
        ({"tolerance": -1}, "tolerance"),
        ({"tolerance": float("nan")}, "tolerance"),
        ({"tokens": 5000}, "positions"),
        ({"tokens": 100}, "at least 160"),
        ({"tasks": ["needle"], "tokens": 180}, "expected at least"),
        ({"tasks": ["ruler"]}, "expected at least"),
    ],
)
def test_wrong_arguments_are_refused_in_words_before_anything_is_measured(options, words, tmp_path):
    with pytest.raises(HeadwayError, match=words):
        compare(["window"], out=tmp_path, **options)
    assert not (tmp_path / "cells").exists()


def test_a_model_without_a_cache_is_refused():
    import transformers as tf

    host = tf.BertModel(
        tf.BertConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=259)
    )
    with pytest.raises(HostError, match="causal language model"):
        compare(["window"], host=host)


@pytest.mark.parametrize("task", ["recall", "turns", "needle"])
def test_question_tasks_give_both_modes(task):
    found = compare(["window"], tasks=[task], tokens=700, budgets=[0.5])
    assert found.qualities == [(task, "blind"), (task, "aware")]
    assert all(point.status == "measured" for point in found.points)


def test_multiple_choice_is_scored_in_one_forward(tmp_path):
    from headway.hosts import default_text
    from headway.tasks.choice import make_questions, score_choices

    text = default_text()
    found = compare(["window"], text=text, tasks=["choice"], tokens=400)
    asked = [q for kind in ("ending", "word", "place") for q in make_questions(kind, 4, text=text.text)]
    assert found.qualities == [("choice", "")]
    assert found.dense.score("choice").value == pytest.approx(score_choices(HOST, TOKENIZER, asked).accuracy)
    assert found.dense.score("choice").n == 12


@pytest.mark.real
def test_a_window_without_sinks_breaks_the_real_model_and_one_with_them_loses_less():
    model, tokenizer = headway.load("smollm2")
    found = headway.compare(
        model, tokenizer, methods=["sinks-window", "window"], budgets=[0.1], tokens=200, tasks=["perplexity"],
        repeats=2, new_tokens=2,
    )  # fmt: skip
    dense, sinks, window = (
        point.score("perplexity", "prefill").value
        for point in (found.dense, found.point("sinks-window", 0.1), found.point("window", 0.1))
    )
    assert dense < sinks < window / 2
    assert found.recommendation.label == "dense"
