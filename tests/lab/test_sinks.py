"""The grid: it resumes, says what its numbers say, and makes a page that is safe."""

from __future__ import annotations

import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from headway.errors import ArgumentError, NumericError
from headway.lab import Arm, ArmResult, Experiment, SinkLab, run_sinks
from headway.lab import sinks as module
from headway.lab.command import sinks, table_of
from headway.lab.report import SCRIPTS, STYLES, number, own_settings, payload, render
from headway.lab.table import COLUMNS, cell, conclude, paired_difference, rows
from headway.pages.shell import source
from tests.look.synthetic import HOSTILE
from tests.pages.reading import Page

SMALL = {"width": 16, "layers": 1, "heads": 2, "length": 16, "batch": 2, "steps": 4, "warmup": 1}


def experiment(**changes) -> Experiment:
    arms = (Arm(name="softmax", **SMALL), Arm(name="softpick", normalizer="softpick", **SMALL))
    return Experiment(name="small", about="Which?", arms=arms, seeds=(0, 1), **changes)


def made(sink: dict[str, float], loss: dict[str, float] | None = None, seeds=(0, 1, 2)) -> SinkLab:
    """A laboratory with given numbers, the same for all seeds but for a little."""
    others = {column.name: 1.0 for column in COLUMNS}
    results = [
        ArmResult(
            arm=name,
            seed=seed,
            course=[3.0, 2.0],
            numbers={**others, "sink_1": s + 0.001 * seed, "loss": (loss or {}).get(name, 2.0)},
        )
        for name, s in sink.items()
        for seed in seeds
    ]
    lab = SinkLab(
        name="made", about="", arms={name: {"normalizer": name} for name in sink}, groups=dict.fromkeys(sink, ""),
        seeds=list(seeds), results=results, run={"text": "a text", "settings_of_all_arms": {"steps": 3}},
    )  # fmt: skip
    lab.findings, lab.warnings = conclude(lab)
    return lab


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    out = tmp_path_factory.mktemp("lab")
    told = []
    lab = run_sinks(experiment(), out=out, evaluation=4, progress=lambda *a: told.append(a))
    return out, lab, told


class TestGrid:
    def test_every_arm_is_trained_with_every_seed(self, found):
        _, lab, told = found
        assert [(r.arm, r.seed) for r in lab.results] == [(a, s) for a in ("softmax", "softpick") for s in (0, 1)]
        assert told[-1][1:] == (4000, 4000)
        assert all(done <= total for _, done, total in told)

    def test_a_second_call_trains_nothing(self, found, monkeypatch):
        out, lab, _ = found
        monkeypatch.setattr(module, "run_arm", lambda *a, **k: pytest.fail("trained again"))
        again = run_sinks(experiment(), out=out, evaluation=4)
        assert again.results == lab.results
        assert again.run["arms_reused"] == 4

    def test_other_settings_are_trained_anew_and_a_renamed_arm_is_not(self, found, monkeypatch):
        out, _, _ = found
        ran = []

        def note(arm, seed, *rest, **options):
            ran.append((arm.name, seed))
            return ArmResult(arm=arm.name, seed=seed, numbers={"loss": 1.0, "sink_1": 0.5})

        monkeypatch.setattr(module, "run_arm", note)
        arms = experiment().arms
        changed = replace(experiment(), arms=(arms[0], replace(arms[1], weight_decay=0.3)))
        run_sinks(changed, out=out, evaluation=4)
        assert ran == [("softpick", 0), ("softpick", 1)]

    def test_a_damaged_file_is_measured_again(self, found, caplog):
        out, lab, _ = found
        path = sorted((out / "arms").glob("softmax-0-*.json"))[0]
        kept = path.read_text()
        path.write_text("{")
        again = run_sinks(experiment(), out=out, evaluation=4)
        assert again.results[0].numbers["loss"] == pytest.approx(lab.results[0].numbers["loss"])
        assert "no result of this version" in caplog.text
        assert json.loads(kept)["arm"] == "softmax"

    def test_an_arm_that_breaks_is_a_failure_and_the_others_go_on(self, monkeypatch):
        real = module.run_arm

        def broken(arm, *rest, **options):
            if arm.name == "softpick":
                raise NumericError("loss: got NaN")
            return real(arm, *rest, **options)

        monkeypatch.setattr(module, "run_arm", broken)
        lab = run_sinks(experiment(), evaluation=4)
        assert [bool(r.failure) for r in lab.results] == [False, False, True, True]
        assert any("softpick, seed 1: loss: got NaN" in w for w in lab.warnings)
        assert "loss: got NaN" in Page(render(lab)).text

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"normalizer": "softmx"}, "softmx"),
            ({"normalizer_options": {"taper": 1}}, "taper"),
            ({"gate": "door"}, "door"),
            ({"mlp": "swigloo"}, "swigloo"),
            ({"heads": 3}, "heads"),
        ],
    )
    def test_a_wrong_option_of_the_last_arm_is_told_before_any_training(self, monkeypatch, options, words):
        monkeypatch.setattr(module, "run_arm", lambda *a, **k: pytest.fail("trained before all arms were built"))
        arms = (Arm(name="softmax", **SMALL), Arm(name="odd", **{**SMALL, **options}))
        with pytest.raises(ArgumentError, match=words) as error:
            run_sinks(Experiment(name="x", arms=arms), evaluation=4)
        assert error.value.__notes__ == ["in arm 'odd'"]

    def test_a_text_that_is_too_short_is_refused_before_any_work(self):
        from headway.hosts import Text

        with pytest.raises(ArgumentError, match="held-out bytes"):
            run_sinks(experiment(), text=Text.of("short " * 20, "a short text"))

    def test_a_killed_run_goes_on_from_its_checkpoint(self, tmp_path):
        """kill -9 in the middle of an arm: the finished one is kept, the other goes on, the numbers are those of a run
        that was not disturbed."""
        code = (
            "import torch; torch.set_num_threads(1)\n"
            "from headway.lab import Arm, Experiment, run_sinks\n"
            f"small = {SMALL | {'steps': 60}!r}\n"
            "arms = (Arm(name='a', **small), Arm(name='b', weight_decay=0.2, **small))\n"
            f"run_sinks(Experiment(name='x', arms=arms), out={str(tmp_path / 'out')!r}, evaluation=4)\n"
        )
        process = subprocess.Popen([sys.executable, "-c", code])
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if list((tmp_path / "out").glob("arms/b-0-*/checkpoints/*")):
                break
            time.sleep(0.01)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert len(list((tmp_path / "out" / "arms").glob("a-0-*.json"))) == 1
        small = SMALL | {"steps": 60}
        arms = (Arm(name="a", **small), Arm(name="b", weight_decay=0.2, **small))
        resumed = run_sinks(Experiment(name="x", arms=arms), out=tmp_path / "out", evaluation=4)
        straight = run_sinks(Experiment(name="x", arms=arms), evaluation=4)
        assert resumed.run["arms_reused"] >= 1
        for one, two in zip(resumed.results, straight.results, strict=True):
            assert one.numbers["loss"] == pytest.approx(two.numbers["loss"], rel=1e-5)
        assert not [p for p in (tmp_path / "out" / "arms").iterdir() if p.is_dir()]


class TestTable:
    def test_means_and_intervals(self):
        got = cell([1.0, 2.0, 3.0])
        assert (got.value, got.seeds) == (2.0, 3)
        assert got.high - got.value == pytest.approx(4.3027 / math.sqrt(3), rel=1e-3)
        assert math.isnan(cell([1.0]).low)
        assert math.isnan(cell([]).value)
        assert cell([float("nan"), 2.0]).value == 2.0

    def test_every_column_of_the_survey_is_there(self):
        names = {column.name for column in COLUMNS}
        assert names >= {"loss", "sink_1", "first_share", "mass", "kurtosis", "inf_norm", "massive_ratio", "int8_gap",
                         "streaming_gap", "params", "ms_per_step"}  # fmt: skip
        assert [arm for arm, _ in rows(made({"softmax": 0.4, "b": 0.01}))] == ["softmax", "b"]

    def test_arms_without_the_sink_are_named_with_their_loss(self):
        lab = made({"softmax": 0.4, "good": 0.01, "dear": 0.0, "same": 0.38}, {"good": 1.98, "dear": 2.5})
        text = " ".join(lab.findings)
        assert "2 of 3 arms have at most a fifth" in text
        assert "good has the lowest loss of those, 1.980 (−1.0\u00a0% of the baseline's; −0.020 nats" in text
        assert not lab.warnings

    def test_without_a_sink_in_the_baseline_nothing_is_concluded(self):
        lab = made({"softmax": 0.01, "other": 0.0})
        assert len(lab.findings) == 1
        assert "no sink grew" in lab.warnings[0]

    def test_few_seeds_are_warned_of(self):
        assert "1 seed:" in made({"softmax": 0.4, "b": 0.0}, seeds=(0,)).warnings[0]

    def test_differences_are_paired_by_seed(self):
        lab = made({"softmax": 0.4, "b": 0.1})
        got = paired_difference(lab, "b", "sink_1")
        assert got.value == pytest.approx(-0.3)
        assert got.high - got.low < 1e-9

    def test_results_survive_a_round_trip(self, found):
        _, lab, _ = found
        again = SinkLab.from_json(lab.to_json())
        assert again.to_json() == lab.to_json()
        with pytest.raises(ArgumentError, match="format"):
            SinkLab.from_json("{}")


class TestPage:
    def test_the_page_holds_the_table_and_the_findings(self, found):
        _, lab, _ = found
        page = render(lab)
        text = Page(page).text
        for words in ("softpick", "Sink₁", "Streaming gap", "INT8 gap", *lab.findings, *lab.warnings):
            assert words in text
        data = Page(page).data()
        assert [arm["name"] for arm in data["arms"]] == ["softmax", "softpick"]
        assert data["arms"][1]["settings"] == payload(lab)["arms"][1]["settings"]
        assert len(data["arms"][0]["course"]) == 2
        assert len(page) < 2_500_000

    def test_small_print_is_what_tells_an_arm_from_the_baseline(self):
        lab = made({"softmax": 0.4, "window": 0.1, "natural": 0.0})
        lab.arms = {
            "softmax": {"width": 64, "first": "fixed"},
            "window": {"width": 64, "first": "fixed", "window": 8},
            "natural": {"width": 64},
        }
        assert own_settings(lab, "softmax") == {"first": "fixed"}
        assert own_settings(lab, "window") == {"window": 8}
        assert own_settings(lab, "natural") == {"first": "natural"}
        alone = made({"softmax": 0.4})
        assert own_settings(alone, "softmax") == {"normalizer": "softmax"}

    def test_hostile_names_stay_text(self):
        for words in HOSTILE:
            lab = made({f"softmax{words}": 0.4, f"b{words}": 0.0})
            parsed = Page(render(lab))
            assert [attributes.get("id") for attributes, _ in parsed.scripts] == ["data", "plotly", None]
            assert not [a for _, a in parsed.tags if any(name.startswith("on") for name in a)]

    def test_the_page_refers_to_nothing_outside_itself(self):
        for _, attributes in Page(render(made({"softmax": 0.4}))).tags:
            assert "src" not in attributes
            assert attributes.get("href", "#").startswith("#")
        assert "url(" not in "".join(source("headway.lab", name) for name in STYLES)

    def test_scripts_never_write_markup(self):
        for name in SCRIPTS:
            text = source("headway.lab", name)
            for word in (
                "innerHTML",
                "outerHTML",
                "insertAdjacentHTML",
                "document.write",
                "eval(",
                "</script",
                "fetch(",
            ):
                assert word not in text

    def test_numbers_are_short(self):
        assert [number(x, u) for x, u in ((0.1234, "%"), (12345.0, "n"), (1.23456, ""), (2.5, "×"), (float("nan"), ""),
                                          (-0.5, ""), (1e-6, ""))] == [
            "12.3 %", "12,345", "1.235", "2.500 ×", "–", "−0.500", "1.0e−06",
        ]  # fmt: skip


class TestCommand:
    YAML = (
        "base: {width: 16, layers: 1, heads: 2, length: 16, batch: 2, steps: 3, warmup: 1}\narms: [{name: softmax}]\n"
    )

    def test_it_writes_the_page_and_the_numbers(self, tmp_path, capsys):
        (tmp_path / "own.yaml").write_text(self.YAML)
        sinks(str(tmp_path / "own.yaml"), out=tmp_path / "out", evaluation=4, seeds="0,5")
        printed = capsys.readouterr().out
        assert (tmp_path / "out" / "sinks.html").exists()
        lab = SinkLab.from_json((tmp_path / "out" / "sinks.json").read_text())
        assert lab.seeds == [0, 5]
        assert "Sink" in printed
        assert "sinks.html" in printed.replace("\n", "")

    def test_json_prints_the_numbers_and_nothing_else(self, tmp_path, capsys):
        (tmp_path / "own.yaml").write_text(self.YAML)
        sinks(str(tmp_path / "own.yaml"), out=tmp_path / "out", evaluation=4, steps=2, as_json=True)
        assert json.loads(capsys.readouterr().out)["name"] == "own"
        assert not (tmp_path / "out" / "sinks.html").exists()

    def test_without_arms_it_lists_what_there_is(self, capsys):
        sinks(None)
        assert "mitigation" in capsys.readouterr().out

    def test_a_folder_that_is_a_file_is_refused_before_any_work(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(ArgumentError, match="--out"):
            sinks("quick", out=tmp_path / "file")
        with pytest.raises(ArgumentError, match="--seeds: got 'a'"):
            sinks("quick", out=Path(tmp_path), seeds="a")

    def test_the_terminal_shows_every_arm(self):
        out = io.StringIO()
        Console(file=out, width=200).print(table_of(made({"softmax": 0.4, "b": 0.0})))
        assert "softmax" in out.getvalue()
        assert "Kurtosis" in out.getvalue()

    def test_the_verb_is_there(self, tmp_path):
        from typer.testing import CliRunner

        from headway.cli import app

        (tmp_path / "own.yaml").write_text(self.YAML)
        arguments = ["lab", "sinks", str(tmp_path / "own.yaml"), "--out", str(tmp_path / "out"), "--evaluation", "4"]
        result = CliRunner().invoke(app, [*arguments, "--steps", "2", "--json"])
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["results"][0]["arm"] == "softmax"
