"""The command: what it prints, how it fails, and that it leaves nothing half-written."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from headway import __version__
from headway.cli import app
from headway.errors import HeadwayError
from tests.look.tiny import TEXT, byte_tokenizer, tiny_llama

COMMAND = [sys.executable, "-m", "headway.cli"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A local model folder, as a user would have one."""
    place = tmp_path_factory.mktemp("model")
    tiny_llama().save_pretrained(place)
    byte_tokenizer().save_pretrained(place)
    return place


def run(*arguments: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=120, **options)


def test_help_and_version():
    assert "look" in run("--help").stdout
    assert run("--version").stdout.strip() == f"headway {__version__}"


def test_look_writes_a_report_and_its_numbers(folder, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    done = run("look", str(folder), "--text", str(text), "--tokens", "100", "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["look.html", "look.json"]
    assert "Report" in done.stdout


def test_look_reads_standard_input_and_prints_json(folder, tmp_path):
    from headway.look import Look

    done = run("look", str(folder), "--text", "-", "--tokens", "80", "--json", input=TEXT, cwd=tmp_path)
    assert Look.from_json(done.stdout).run["tokens"] == 80
    assert not list(tmp_path.iterdir())


def test_an_interrupted_look_leaves_the_old_report_or_the_whole_new_one(folder, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "look.html").write_text("old")
    with subprocess.Popen(
        [*COMMAND, "look", str(folder), "--tokens", "900", "--out", str(out)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    ) as process:  # fmt: skip
        time.sleep(4)
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    if process.returncode != 0:
        assert process.returncode in (130, -signal.SIGINT), errors
        left = (out / "look.html").read_text(encoding="utf-8")
        assert left == "old" or left.rstrip().endswith("</html>")
    assert [p.name for p in out.iterdir() if p.name.startswith(".")] == []


def test_an_interrupt_tells_how_to_go_on(capsys, monkeypatch):
    """typer turns an interrupt into an exit code; what the interrupt carries along is printed all the same."""
    from headway import cli

    def interrupted(*_: object, **__: object) -> None:
        error = KeyboardInterrupt()
        error.add_note("Continue with: headway prove tappa --resume runs/tappa/1")
        raise error

    monkeypatch.setattr("headway.evidence.command.prove", interrupted)
    monkeypatch.setattr("sys.argv", ["headway", "prove", "tappa"])
    with pytest.raises(SystemExit) as done:
        cli.main()
    assert done.value.code == 130
    assert "--resume runs/tappa/1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["look", "smolm2"], "smollm2"),
        (["look", "smollm2", "--layers", "x"], "--layers"),
        (["look", "smollm2", "--heads", "7"], "--heads"),
        (["look", "smollm2", "--text", "/no/such/file"], "no file"),
        (["look", "smollm2", "--encoding", "klingon", "--text", "README.md"], "encoding"),
        (["look", "./no-such-folder"], "no-such-folder"),
        (["prove", "sink-emergance"], "sink-emergence"),
        (["plan", "llama-3.1-70b", "--context", "1M", "--method", "flexprefil"], "flexprefill"),
        (["plan", "llama-3.1-70b", "--context", "a lot"], "tokens"),
        (["plan", "llama-3.1-70b", "--hardware", "h1000"], "h100"),
        (["compare", "smollm2", "--methods", "dhs"], "dhsa"),
        (["compare", "smollm2", "--budget", "3"], "(0, 1]"),
        (["prove", "tappa", "--resume", "no-such-run"], "no-such-run"),
    ],
)
def test_wrong_arguments_give_one_useful_line(arguments, words):
    done = run(*arguments, cwd=Path(__file__).parents[1])
    assert done.returncode == 1, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 3


def test_an_output_that_is_a_file_is_refused_before_any_work(tmp_path):
    (tmp_path / "taken").write_text("")
    done = run("look", "smollm2", "--out", str(tmp_path / "taken"))
    assert done.returncode == 1
    assert "folder" in done.stderr


def test_papers_lists_every_card():
    done = run("papers", "--json")
    assert {"sink-emergence", "secondary-sinks", "tappa", "sink-survey"} <= set(done.stdout.split('"'))
    assert run("papers", "nothing-like-this").returncode == 1


def test_doctor_tells_what_a_model_allows(folder):
    done = run("doctor", str(folder), "--json")
    assert '"layer": 3' in done.stdout


@settings(max_examples=25, deadline=None)
@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12), max_size=5))
def test_any_arguments_end_in_a_known_way(words):
    chosen = ["look", "./no such model", *words]
    done = CliRunner().invoke(app, chosen)
    assert done.exception is None or isinstance(done.exception, SystemExit | HeadwayError), done.exception


@settings(max_examples=20, deadline=None)
@given(data=st.binary(max_size=200))
def test_any_bytes_as_text_end_in_a_known_way(data, tmp_path_factory):
    from headway.hosts import read_text

    path = tmp_path_factory.mktemp("bytes") / "text"
    path.write_bytes(data)
    try:
        ended = read_text(path).text.strip() != ""
    except HeadwayError as error:
        ended = str(path) in str(error)
    assert ended


def test_an_interrupt_lost_in_a_finaliser_is_given_again():
    code = """
import signal, sys, time
from headway import cli

class Finalised:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)

@cli.app.command("wait")
def wait():
    Finalised()
    time.sleep(20)

sys.argv = ["headway", "wait"]
cli.main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 130
    assert "interrupted" in done.stderr
    assert "ignored" not in done.stderr
