"""`headway compare` as a command: what it writes and prints, how it fails, and that it goes on where it was killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from headway.cli import app
from headway.compare import Comparison
from headway.compare.command import parse_names
from headway.errors import ArgumentError, HeadwayError
from headway.methods.budget import parse_shares
from tests.look.tiny import TEXT, byte_tokenizer, tiny_llama

COMMAND = [sys.executable, "-m", "headway.cli", "compare"]
QUICK = ["--tasks", "perplexity", "--repeats", "2", "--new-tokens", "2", "--methods", "window", "--budgets", "0.5"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("model")
    tiny_llama(num_hidden_layers=2).save_pretrained(place)
    byte_tokenizer().save_pretrained(place)
    (place / "text.txt").write_text(" ".join([TEXT] * 4), encoding="utf-8")
    return place


def run(folder: Path, *arguments: str, **options) -> subprocess.CompletedProcess:
    command = [*COMMAND, str(folder), "--text", str(folder / "text.txt"), "--tokens", "200", *QUICK, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, **options)


def test_it_writes_the_page_and_its_numbers_and_prints_the_table(folder, tmp_path):
    done = run(folder, "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["cells", "compare.html", "compare.json"]
    found = Comparison.from_json((tmp_path / "out" / "compare.json").read_text(encoding="utf-8"))
    assert [p.label for p in found.points] == ["dense", "window at 50 %"]
    assert "window" in done.stdout
    assert "compare.html" in done.stdout
    again = run(folder, "--out", str(tmp_path / "out"), "--json")
    assert json.loads(again.stdout)["run"]["cells_reused"] == 6


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_killed_run_goes_on_from_its_finished_cells(folder, tmp_path):
    command = [*COMMAND, str(folder), "--text", str(folder / "text.txt"), "--tokens", "200", *QUICK, "--budgets",
               "0.9,0.8,0.7,0.6,0.5,0.4", "--repeats", "8", "--out", str(tmp_path)]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True) as it:
        end = time.monotonic() + 120
        while time.monotonic() < end and len(list(tmp_path.glob("cells/*.json"))) < 3 and it.poll() is None:
            time.sleep(0.05)
        os.killpg(it.pid, signal.SIGKILL) if it.poll() is None else None
    kept = len(list(tmp_path.glob("cells/*.json")))
    assert kept >= 3
    for path in tmp_path.glob("cells/*.json"):
        json.loads(path.read_text(encoding="utf-8"))
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=200)
    assert json.loads(done.stdout)["run"]["cells_reused"] == kept


def test_an_interrupted_run_says_where_it_goes_on(folder, tmp_path):
    command = [*COMMAND, str(folder), "--text", str(folder / "text.txt"), "--tokens", "200", *QUICK]
    command += ["--repeats", "5000", "--out", str(tmp_path)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as it:
        end = time.monotonic() + 120
        while time.monotonic() < end and len(list(tmp_path.glob("cells/*.json"))) < 2 and it.poll() is None:
            time.sleep(0.05)
        os.killpg(it.pid, signal.SIGINT)
        _, errors = it.communicate(timeout=60)
    assert it.returncode == 130
    assert "goes on from them" in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--methods", "windw"], "window"),
        (["--methods", "a,,b"], "--methods"),
        (["--methods", "sink-survey"], "no form at a budget"),
        (["--tasks", "perplexty"], "perplexity"),
        (["--task", "niah_singl_1"], "niah_single_1"),
        (["--method", "windw"], "window"),
        (["--budget", "150%"], "--budgets"),
        (["--budgets", "1.5"], "(0, 1]"),
        (["--budgets", "0"], "(0, 1]"),
        (["--budgets", "half"], "--budgets"),
        (["--modes", "blind,deaf"], "blind"),
        (["--save", "money"], "memory"),
        (["--tolerance", "-1"], "tolerance"),
        (["--text", "/no/such/file"], "no file"),
        (["--count", "0"], "count"),
        (["--chunk", "0"], "chunk"),
        (["--tokens", "100"], "at least 160"),
        (["--repeats", "1"], "at least 2, for an interval"),
        (["--new-tokens", "1"], "new_tokens: got 1, expected a whole number of at least 2"),
        (["--tokens", "200", "--new-tokens", "101"], "expected 2..100"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line_before_the_model_is_loaded(arguments, words, tmp_path):
    done = CliRunner().invoke(app, ["compare", "./no-such-model", *arguments, "--out", str(tmp_path)])
    assert isinstance(done.exception, HeadwayError), done.exception
    assert words in str(done.exception)
    assert "\n" not in str(done.exception)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("data", "words"), [(b"", "empty"), (b"caf\xe9 " * 100, "not utf-8")])
def test_texts_that_cannot_be_read_are_refused_in_one_line(data, words, tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(data)
    done = CliRunner().invoke(app, ["compare", "./no-such-model", "--text", str(path), "--out", str(tmp_path / "out")])
    assert isinstance(done.exception, HeadwayError)
    assert words in str(done.exception)


def test_a_text_that_is_too_short_gives_one_useful_line(folder, tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(b"too short")
    done = run(folder, "--text", str(path), "--out", str(tmp_path / "out"))
    assert done.returncode == 1
    assert "at least 160" in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 3


def test_an_output_that_is_a_file_is_refused(folder, tmp_path):
    (tmp_path / "taken").write_text("")
    done = run(folder, "--out", str(tmp_path / "taken"))
    assert done.returncode == 1
    assert "folder" in done.stderr


@pytest.mark.parametrize(
    "spelling",
    [
        ["--methods", "window,sinks-window", "--tasks", "perplexity,passkey", "--budgets", "0.5,25%"],
        ["--method", "window,sinks-window", "--task", "perplexity,passkey", "--budget", "0.5,25%"],
    ],
)
def test_every_spelling_of_an_option_says_the_same(spelling, monkeypatch, tmp_path):
    """What arrives behind the command: the model, the text, names and shares as they were written."""
    from headway.compare import command

    class EnoughError(Exception):
        pass

    def compare(host, tokenizer, given, **options):
        raise EnoughError(host, given.text, *(options[name] for name in ("methods", "tasks", "budgets", "chat")))

    monkeypatch.setattr(command, "load", lambda name, **_: (name, None))
    monkeypatch.setattr(command, "compare", compare)
    (tmp_path / "text.txt").write_text("a text", encoding="utf-8")
    given = ["compare", "MODEL", "--text", str(tmp_path / "text.txt"), *spelling, "--out", str(tmp_path / "out")]
    given.append("--chat")
    done = CliRunner().invoke(app, given)
    wanted = ("MODEL", "a text", ["window", "sinks-window"], ["perplexity", "passkey"], [0.5, 0.25], True)
    assert isinstance(done.exception, EnoughError), done.exception
    assert done.exception.args == wanted


def test_one_method_at_one_budget_on_one_task_runs_by_the_singular_spellings(folder, tmp_path):
    options = ["--method", "streaming-llm", "--budget", "50%", "--task", "passkey", "--tokens", "420", "--count", "2"]
    command = [*COMMAND, str(folder), "--text", str(folder / "text.txt"), *options, "--repeats", "2"]
    command += ["--new-tokens", "2", "--out", str(tmp_path), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    found = Comparison.from_json(done.stdout)
    assert [(p.method, p.budget) for p in found.points] == [("dense", None), ("streaming-llm", 0.5)]
    assert found.qualities == [("passkey", "blind"), ("passkey", "aware")]
    assert found.point("streaming-llm", 0.5).status == "measured"


def test_budgets_are_shares_or_per_cent_and_each_counts_once():
    assert parse_shares("--budgets", "0.5, 25%,1,50%") == [0.5, 0.25, 1.0]
    for wrong in ("0.5,x", "0.5,", "0", "150%", "nan", "-0.1"):
        with pytest.raises(ArgumentError, match=r"--budgets: got '.*', expected shares of the keys in \(0, 1\]"):
            parse_shares("--budgets", wrong)


def test_names_are_given_once_each():
    assert parse_names("--methods", "a, b,a") == ["a", "b"]
