"""The command: its table, its JSON, its check against the clock, and how it fails."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from headway.cli import app
from headway.errors import HeadwayError
from headway.hosts.tiny import tiny_host
from headway.plan.check import best_time, check
from headway.plan.command import duration, size
from headway.plan.hardware import HARDWARE


def run(*arguments: str):
    return CliRunner().invoke(app, ["plan", *arguments])


def test_the_table_shows_methods_beside_dense():
    done = run("llama-3.1-70b", "--tokens", "1M", "--methods", "duo-attention,flexprefill", "--budgets", "0.1")
    assert done.exit_code == 0, done.output
    for words in ("dense", "duo-attention", "at 10 %", "328 GB", "131,072 positions"):
        assert words in done.output


def test_json_holds_the_same_plan():
    done = run("smollm2", "--tokens", "4k", "--methods", "duo-attention", "--budgets", "0.5,0.25", "--json")
    found = json.loads(done.stdout)
    assert [(row["method"], row["budget"]) for row in found["rows"]] == [
        ("dense", None), ("duo-attention", 0.5), ("duo-attention", 0.25),
    ]  # fmt: skip
    assert found["rows"][0]["kv_bytes"] == 30 * 3 * 2 * 64 * 2 * 4000
    assert found["model"]["layers"] == 30
    assert found["rows"][0]["prompt"]["parts"][1]["name"] == "attention"
    assert found["rows"][0]["prompt"]["seconds"] > 0


def test_sizes_stand_for_a_model_of_ones_own():
    done = run("--layers", "2", "--hidden", "64", "--heads", "4", "--kv-heads", "2", "--tokens", "100",
               "--methods", "", "--json")  # fmt: skip
    assert json.loads(done.stdout)["rows"][0]["kv_bytes"] == 2 * 2 * 2 * 16 * 2 * 100


@pytest.mark.parametrize("machine", ["h100", "a100", "cpu"])
@pytest.mark.parametrize(
    "spelling",
    [
        ["--context", "1M", "--method", "duo-attention", "--budget", "10%"],
        ["--tokens", "1M", "--methods", "duo-attention", "--budgets", "0.1"],
    ],
)
def test_every_spelling_of_an_option_plans_the_same(machine, spelling):
    done = run("llama-3.1-70b", "--hardware", machine, *spelling, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert (found["tokens"], found["hardware"]["name"]) == (1_000_000, machine)
    dense, duo = found["rows"]
    assert (duo["method"], duo["budget"]) == ("duo-attention", 0.1)
    # 80 layers, 8 KV heads of 128 dimensions, keys and values of two bytes.
    assert dense["kv_bytes"] == 80 * 8 * 128 * 2 * 2 * 1_000_000
    assert 0.09 < duo["kv_bytes"] / dense["kv_bytes"] < 0.12
    assert duo["step"]["seconds"] < dense["step"]["seconds"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["llama-9"], "expected one of"),
        (["smollm2", "--tokens", "lots"], "128Ki"),
        (["smollm2", "--budgets", "2"], "--budgets"),
        (["smollm2", "--budgets", "half"], "--budgets"),
        (["smollm2", "--methods", "nothing"], "method"),
        (["smollm2", "--hardware", "b200"], "h100"),
        (["smollm2", "--layers", "3"], "--layers"),
        (["--layers", "3"], "--hidden"),
        (["--check", "--layers", "3"], "--check"),
        (["--check", "--hardware", "a100"], "--hardware"),
        (["--check", "--batch", "2"], "--batch"),
    ],
)
def test_wrong_arguments_give_one_useful_line(arguments, words):
    done = run(*arguments)
    assert isinstance(done.exception, HeadwayError), done.output
    assert words in str(done.exception)


def test_a_check_puts_both_sides_next_to_each_other(tmp_path):
    """On a tiny model: every phase of every method, and bytes that agree to the byte."""
    from tests.look.tiny import byte_tokenizer, tiny_llama

    tiny_llama().save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    done = run(str(tmp_path), "--check", "--tokens", "96", "--methods", "duo-attention", "--budgets", "0.5", "--json")
    found = json.loads(done.stdout)
    assert [(row["method"], row["phase"]) for row in found["rows"]] == [
        ("dense", "prompt"), ("dense", "step"), ("duo-attention", "prompt"), ("duo-attention", "step"),
    ]  # fmt: skip
    for row in found["rows"]:
        assert row["predicted_bytes"] == row["held_bytes"]
        assert row["ratio"] == pytest.approx(row["predicted"] / row["measured"])
    assert found["machine"]["flops"] > 0


def test_a_check_longer_than_the_model_is_refused():
    model, _ = tiny_host("llama")
    with pytest.raises(HeadwayError, match="64 positions"):
        check(model, tokens=64)
    with pytest.raises(HeadwayError, match="at least 2"):
        check(model, tokens=1)


def test_the_best_of_some_repetitions_counts_calls(monkeypatch):
    """A clock that ticks a second a call gives a second a call, however many calls a repetition has."""
    from headway.plan import check as module

    now = [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])

    def work() -> None:
        now[0] += 1.0

    assert best_time(work, least=5.0, repeats=2) == 1.0


def test_every_machine_names_its_source():
    assert set(HARDWARE) == {"h100", "a100", "cpu"}
    assert all(len(machine.source) > 40 for machine in HARDWARE.values())
    # Both numbers stand in the makers' data sheets and are checked against each other's ratio here.
    assert HARDWARE["h100"].flops / HARDWARE["a100"].flops == pytest.approx(989.4 / 312)


def test_quantities_are_written_with_their_units():
    assert [size(n) for n in (0, 999, 1000, 327.68e9)] == ["0 B", "999 B", "1 kB", "328 GB"]
    assert [duration(t) for t in (2e-6, 0.0232, 45.2, 243.6, 7200, 2 * 86_400)] == [
        "2 µs", "23.2 ms", "45.2 s", "4.06 min", "2 h", "2 d",
    ]  # fmt: skip
