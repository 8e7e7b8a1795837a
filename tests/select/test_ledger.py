"""The ledger: a record is there once or not yet, whatever ended the run."""

from __future__ import annotations

import multiprocessing
import signal
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.errors import HeadwayError, HostError
from headway.select.records import Reading, find_sources
from headway.select.selecting import open_ledger, score_all
from headway.select.shards import Ledger, ScoredRecord, make_plan
from headway.select.shards.ledger import line_of
from tests.select.standins import StandInRecipe, expected, text, write_corpus


def scored(number: int) -> list[ScoredRecord]:
    one = ScoredRecord(f"r{number}", "a", number, "all", 5, 1.0, float("nan"), 0.5, 0.0, ("short",))
    return [one, one]


def filled(path: Path, shards: int = 4) -> Path:
    with Ledger(path, {"a": 1}, shards) as ledger:
        for number in range(shards):
            ledger.append(line_of(number, scored(number)))
    return path


class TestLedger:
    def test_what_was_written_is_read_again(self, tmp_path):
        with Ledger(filled(tmp_path / "ledger"), {"a": 1}, 4) as ledger:
            assert ledger.done == 4
            found = ledger.scores(2)
        assert found[0].id == "r2"
        assert found[0].flags == ("short",)
        assert found[0].masked_loss != found[0].masked_loss

    def test_a_shard_enters_once(self, tmp_path):
        with Ledger(tmp_path / "ledger", {}, 2) as ledger:
            assert ledger.append(line_of(1, scored(1)))
            assert not ledger.append(line_of(1, scored(1)))
            assert list(ledger.missing()) == [0]

    @given(cut=st.integers(1, 400))
    @settings(max_examples=40, deadline=None)
    def test_a_torn_end_costs_only_the_shard_it_is_of(self, tmp_path_factory, cut):
        path = filled(tmp_path_factory.mktemp("torn") / "ledger")
        data = path.read_bytes()
        lines = data.splitlines(keepends=True)
        path.write_bytes(data[: max(len(data) - cut, len(lines[0]))])
        left = len(path.read_bytes())
        whole = sum(left >= sum(map(len, lines[: n + 1])) for n in range(1, 5))
        with Ledger(path, {"a": 1}, 4) as ledger:
            assert ledger.done == whole
            for number in list(ledger.missing()):
                ledger.append(line_of(number, scored(number)))
        assert sorted(path.read_bytes().splitlines()) == sorted(data.splitlines())

    def test_a_damaged_line_inside_is_scored_again(self, tmp_path):
        path = filled(tmp_path / "ledger")
        lines = path.read_bytes().splitlines(keepends=True)
        lines[2] = lines[2].replace(b"r1", b"rX", 1)
        path.write_bytes(b"".join(lines))
        with Ledger(path, {"a": 1}, 4) as ledger:
            assert list(ledger.missing()) == [1]
            assert ledger.damaged == 1

    def test_scores_of_other_settings_are_refused(self, tmp_path):
        path = filled(tmp_path / "ledger")
        with pytest.raises(HostError, match="another run"), Ledger(path, {"a": 2}, 4):
            pass

    def test_a_second_writer_is_refused(self, tmp_path):
        with (
            Ledger(tmp_path / "ledger", {}, 1),
            pytest.raises(HeadwayError, match="another run is writing"),
            Ledger(tmp_path / "ledger", {}, 1),
        ):
            pass


def _run(corpus: Path, out: Path) -> None:
    """A run that takes its time, for a process of its own."""
    plan = make_plan(find_sources([corpus])[0], Reading(id_field="id"), out / "state")
    recipe = StandInRecipe(slow=0.05)
    with open_ledger(plan, recipe, out) as ledger:
        score_all(plan, ledger, recipe)


def test_a_killed_run_goes_on_without_losing_or_repeating_a_record(tmp_path):
    corpus = write_corpus(tmp_path / "corpus", records=1500)
    plan = make_plan(find_sources([corpus])[0], Reading(id_field="id"), tmp_path / "out" / "state")
    assert plan.shards > 20
    recipe, kept = StandInRecipe(), 0
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    for _ in range(3):
        child = context.Process(target=_run, args=(corpus, tmp_path / "out"))
        child.start()
        end, wanted = time.monotonic() + 120, kept + 4
        while time.monotonic() < end and child.is_alive() and kept < wanted:
            found = list((tmp_path / "out" / "state").glob("scores-*/ledger"))
            kept = len(found[0].read_bytes().splitlines()) - 1 if found else 0
            time.sleep(0.01)
        child.kill()
        child.join()
        assert child.exitcode == -signal.SIGKILL
    with open_ledger(plan, recipe, tmp_path / "out") as ledger:
        found_before = ledger.done
        assert found_before >= 8
        score_all(plan, ledger, recipe)
        records = [score for number in range(plan.shards) for score in ledger.scores(number)]
    assert sorted(r.id for r in records) == sorted(f"r{n}" for n in range(1500))
    assert all(r.influence == pytest.approx(expected(text(int(r.id[1:]))), abs=1e-6) for r in records)
