"""`headway diagnose anchors` on the command line: numbers alone, the page, rollouts, questions, refusals, going on."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from headway.cli import app
from headway.diagnose.anchors import Anchors, analysing
from headway.diagnose.anchors import command as module
from headway.errors import HeadwayError
from headway.evidence.recipes._anchors_toy import FINAL, Words, decoder
from headway.methods.diagnosis.thought_anchors import LocalSampler, exact_encoder
from tests.methods.song_hosts import bert

ROW = {
    "name": "<b>three</b>",
    "prompt": "start ",
    "text": "given:k0=3 . mode-is-m1 . then-k0-gives m1v3 . ",
    "answer": "m1v3",
}
#: A start before each of the three sentences of the row, and one behind them.
STARTS = 4


class Chat(Words):
    """The toy's words with a chat that opens every answer alike, whatever was asked."""

    chat_template = "start "

    def apply_chat_template(self, turns, **options):
        assert [turn["role"] for turn in turns] == ["user"]
        return self.chat_template


class Pictures:
    """What prepares pictures, not texts."""

    def __call__(self, images, **options):
        raise AssertionError


@pytest.fixture
def loaded(monkeypatch):
    model = decoder(0).eval()
    monkeypatch.setattr(module, "load", lambda name, **_: (model, Chat()))
    monkeypatch.setattr(analysing.method, "sentence_encoder", lambda: exact_encoder)
    return model


@pytest.fixture
def unloaded(monkeypatch):
    monkeypatch.setattr(module, "load", lambda *_, **__: pytest.fail("a model was loaded"))


def call(*arguments):
    return CliRunner().invoke(app, ["diagnose", "anchors", "toy", *map(str, arguments)])


def written(folder, *rows):
    path = folder / "traces.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return path


def drawn(out):
    """The rollouts kept in a folder."""
    (path,) = (out / "parts").glob("rollouts-*.jsonl")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def kept(out):
    return {path: path.stat().st_mtime_ns for path in (out / "parts").iterdir()}


def test_json_is_all_that_is_printed_and_what_is_written(loaded, tmp_path):
    out = tmp_path / "out"
    done = call("--traces", written(tmp_path, ROW), "--out", out, "--json")
    assert done.exit_code == 0, done.exception
    found = Anchors.from_json(done.stdout)
    assert json.loads((out / "anchors.json").read_text(encoding="utf-8")) == json.loads(done.stdout)
    (trace,) = found.traces
    assert (trace.name, trace.answer, len(trace.sentences)) == (ROW["name"], "m1v3", 3)
    assert found.model["name"] == "toy"
    assert trace.importance == []


def test_findings_are_told_and_the_page_is_written(loaded, tmp_path):
    out = tmp_path / "out"
    done = call("--traces", written(tmp_path, ROW), "--out", out)
    assert done.exit_code == 0, done.exception
    assert {path.name for path in out.iterdir()} == {"anchors.html", "anchors.json", "parts"}
    told = Anchors.from_json((out / "anchors.json").read_text(encoding="utf-8"))
    for sentence in (*told.findings, *told.warnings):
        assert sentence in done.stdout
    assert str(out / "anchors.html") in done.stdout
    page = (out / "anchors.html").read_text(encoding="utf-8")
    assert "mode-is-m1" in page
    assert ROW["name"] not in page


def test_rollouts_are_announced_drawn_and_read_by_the_given_answer(loaded, tmp_path):
    out = tmp_path / "out"
    given = ("--traces", written(tmp_path, ROW), "--rollouts", 12, "--tokens", 5, "--out", out, "--json")
    done = call(*given, "--answer", FINAL)
    assert done.exit_code == 0, done.exception
    assert f"{12 * STARTS} rollouts of {12 * STARTS * 5} tokens at most" in done.stderr
    rollouts = drawn(out)
    assert len(rollouts) == 12 * STARTS
    assert all(len(one["text"].split()) == 5 for one in rollouts)
    data = json.loads(done.stdout)
    importance = data["traces"][0]["importance"]
    assert [one["sentence"] for one in importance] == [0, 1, 2]
    assert any(one["resampling"]["divergence"]["value"] > 0 for one in importance)
    assert data["run"]["settings"]["rollouts"] == 12
    assert not any("No answers were resampled" in warning for warning in data["warnings"])
    never = call(*given, "--answer", "(none of these)")
    assert len(drawn(out)) == 12 * STARTS, "another answer reads the same rollouts"
    for one in json.loads(never.stdout)["traces"][0]["importance"][:2]:
        assert one["resampling"]["divergence"]["value"] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(("settle", "each"), [(1e-9, 30), (100.0, 25)])
def test_settled_sentences_are_not_drawn_again(loaded, tmp_path, settle, each):
    given = ("--rollouts", 30, "--tokens", 2, "--answer", FINAL, "--settle", settle)
    done = call("--traces", written(tmp_path, ROW), *given, "--out", tmp_path / "out", "--json")
    assert done.exit_code == 0, done.exception
    assert len(drawn(tmp_path / "out")) == each * STARTS
    assert json.loads(done.stdout)["run"]["settings"]["settle"] == settle


def test_a_question_is_thought_about_once(loaded, tmp_path, monkeypatch):
    given = ("--question", "What does k0 give?", "--tokens", 30, "--out", tmp_path / "out", "--json")
    done = call(*given)
    assert done.exit_code == 0, done.exception
    (trace,) = json.loads(done.stdout)["traces"]
    assert trace["name"] == "thought 1"
    assert trace["prompt"].startswith("start ")
    assert len("".join(trace["sentences"]).split()) <= 30
    monkeypatch.setattr(module, "think", lambda *_, **__: pytest.fail("the model thought again"))
    again = json.loads(call(*given).stdout)
    assert again["traces"][0]["sentences"] == trace["sentences"]
    assert again["traces"][0]["matrix"] == trace["matrix"]
    with pytest.raises(pytest.fail.Exception, match="thought again"):
        call(given[0], "What does k1 give?", *given[2:])


def test_without_traces_the_model_is_asked_two_questions(loaded, tmp_path):
    done = call("--tokens", 20, "--out", tmp_path, "--json")
    assert done.exit_code == 0, done.exception
    assert [trace["name"] for trace in json.loads(done.stdout)["traces"]] == ["thought 1", "thought 2"]


def test_rows_that_cannot_be_used_are_refused_by_line_or_skipped_and_told(loaded, tmp_path):
    path = written(tmp_path, ROW, "{", ROW)
    refused = call("--traces", path, "--out", tmp_path / "out")
    assert isinstance(refused.exception, HeadwayError)
    assert "line 2" in str(refused.exception)
    done = call("--traces", path, "--out", tmp_path / "out", "--bad-rows", "skip", "--json")
    data = json.loads(done.stdout)
    assert len(data["traces"]) == 2
    assert data["run"]["left out"][0].startswith("line 2")
    assert "left out: line 2" in data["warnings"][0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--traces", "TRACES", "--question", "why?"], ["--traces, --question", "got both", "expected one", "makes a"]),
        (["--traces", "nowhere.jsonl"], ["--traces", "got nowhere.jsonl", "expected a file", "Check the path"]),
        (["--rollouts", "-1"], ["rollouts", "got -1", "expected at least 0"]),
        (["--orders", "-1"], ["orders", "got -1", "expected at least 0"]),
        (["--tokens", "0"], ["tokens", "got 0", "expected at least 1"]),
        (["--proximity", "0"], ["proximity", "got 0", "expected at least 1"]),
        (["--top", "0"], ["top", "got 0", "expected at least 1"]),
        (["--settle", "0"], ["settle", "got 0", "expected a width", "Leave it out"]),
        (["--answer", "("], ["got '('", "no regular expression"]),
        (["--answer", r"\d+"], ["without a group", "expected one around the answer", "as in"]),
        (["--bad-rows", "drop"], ["--bad-rows", "'drop'", "refuse", "skip"]),
        (["--seed", "-1"], ["seed", "got -1", "expected at least 0"]),
        (["--which-answer", "middle"], ["which", "'middle'", "first", "last"]),
        (["--out", "TRACES"], ["--out", "which is a file", "expected a folder", "Name another"]),
    ],
)
def test_arguments_that_cannot_be_used_are_refused_before_a_model_is_loaded(unloaded, tmp_path, arguments, words):
    path = written(tmp_path, ROW)
    done = call("--out", tmp_path / "out", *(str(path) if one == "TRACES" else one for one in arguments))
    assert isinstance(done.exception, HeadwayError), done.exception
    for word in words:
        assert word in str(done.exception)
    assert "\n" not in str(done.exception)


def test_an_interrupted_command_goes_on_from_kept_parts(loaded, tmp_path, monkeypatch):
    out = tmp_path / "out"
    given = ("--traces", written(tmp_path, ROW), "--rollouts", 6, "--tokens", 2, "--answer", FINAL, "--json")

    def stop():
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(analysing.method, "sentence_encoder", stop)
        assert call(*given, "--out", out).exit_code != 0
    assert not (out / "anchors.json").exists()
    before = kept(out)
    assert {path.name.partition("-")[0] for path in before} == {"effects", "rollouts"}
    with monkeypatch.context() as patch:
        patch.setattr(LocalSampler, "__call__", lambda *_: pytest.fail("a rollout was drawn again"))
        again = call(*given, "--out", out)
    assert again.exit_code == 0, again.exception
    assert kept(out) == before
    went_on, whole = (json.loads(one.stdout)["traces"][0] for one in (again, call(*given, "--out", tmp_path / "whole")))
    assert went_on.pop("forwards") == 0
    assert whole.pop("forwards") > 1
    assert went_on == whole


@pytest.mark.parametrize(("loads", "words"), [((bert().bert, Chat()), "causal"), ((decoder(0), Pictures()), "of text")])
def test_a_model_of_another_kind_is_refused_before_it_is_asked(tmp_path, monkeypatch, loads, words):
    monkeypatch.setattr(module, "load", lambda name, **_: loads)
    done = call("--question", "Why?", "--out", tmp_path / "out")
    assert isinstance(done.exception, HeadwayError), done.exception
    assert words in str(done.exception)
