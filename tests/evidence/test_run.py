"""Runs: what is written, resumed, refused and recorded."""

from __future__ import annotations

import json
import math
import os
from datetime import datetime
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import headway.evidence.run as run_module
from headway.errors import ArgumentError, HeadwayError
from headway.evidence import (
    EditedRecordError,
    Measurement,
    NotRunnableError,
    Run,
    Verdict,
    at_least,
    prove,
    record_run,
)
from headway.evidence.environment import environment

from .examples import CRITERIA, claim, recipe, two_claims


@pytest.fixture
def project(tmp_path, monkeypatch):
    """An empty project as the current folder."""
    (tmp_path / "project" / "evidence").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "project")
    return tmp_path / "project"


@pytest.fixture(scope="module")
def stored_run(tmp_path_factory):
    """The JSON of one run."""
    return prove(recipe(), out=tmp_path_factory.mktemp("stored"), show_progress=False).to_json()


def edited(path: Path, change) -> str:
    data = json.loads(path.read_text())
    change(data)
    return json.dumps(data)


class TestResult:
    def test_the_result_holds_claims_and_where_they_were_measured(self, project):
        run = prove(recipe(), size="smoke", seed=3, show_progress=False)
        assert run.folder is not None
        assert run.folder.parent == Path("runs/planted-paper")
        stored = json.loads((run.folder / "result.json").read_text())
        assert {"slug": "planted-paper", "size": "smoke", "seed": 3, "planned": True}.items() <= stored.items()
        assert [c["verdict"] for c in stored["claims"]] == ["holds", "inconclusive"]
        assert stored["environment"]["torch"] == torch.__version__
        assert stored["environment"]["threads"] == torch.get_num_threads()
        assert datetime.fromisoformat(stored["started"]).utcoffset() is not None
        assert run.counts == {Verdict.HOLDS: 1, Verdict.FAILS: 0, Verdict.INCONCLUSIVE: 1}
        assert run.command == "headway prove planted-paper --size smoke --seed 3"

    def test_a_run_survives_json(self, project):
        run = prove(recipe(), show_progress=False)
        assert Run.from_json(run.to_json()) == run

    def test_two_runs_in_one_second_have_two_folders(self, project):
        folders = {prove(recipe(), size="smoke", show_progress=False).folder for _ in range(3)}
        assert len(folders) == 3

    def test_out_replaces_the_folder_runs(self, tmp_path):
        run = prove(recipe(), size="smoke", out=tmp_path / "elsewhere", show_progress=False)
        assert (tmp_path / "elsewhere" / "planted-paper" / run.folder.name / "result.json").is_file()

    def test_a_verdict_edited_in_the_file_is_detected(self, project):
        path = prove(recipe(), show_progress=False).folder / "result.json"
        text = edited(path, lambda data: data["claims"][1].update(verdict="holds"))
        with pytest.raises(EditedRecordError, match="'smaller'"):
            Run.from_json(text)

    @pytest.mark.parametrize(
        "change",
        [
            lambda data: data["claims"][0]["measured"].update(value=1.55),
            lambda data: data["claims"][0].update(statement="Better."),
            lambda data: data["claims"].pop(),
            lambda data: data.update(seed=1),
            lambda data: data["environment"].update(dirty=False, commit="0" * 40),
            lambda data: data.pop("digest"),
        ],
    )
    def test_any_other_edit_is_detected(self, project, change):
        path = prove(recipe(), show_progress=False).folder / "result.json"
        with pytest.raises(EditedRecordError, match="digest"):
            Run.from_json(edited(path, change))

    def test_the_same_content_in_another_layout_is_accepted(self, project):
        path = prove(recipe(), show_progress=False).folder / "result.json"
        assert Run.from_json(edited(path, lambda data: None)).counts[Verdict.HOLDS] == 1

    @pytest.mark.parametrize(
        "text", ["", "[]", "{}", '{"format": 99}', '{"format": 1}', '{"format": 1, "claims": [{}]}']
    )
    def test_other_files_raise(self, text):
        with pytest.raises(ArgumentError):
            Run.from_json(text, name="x.json")

    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(data=st.data())
    def test_any_damage_to_a_record_raises_a_clear_error(self, stored_run, data):
        content = json.loads(stored_run)
        node, steps = content, data.draw(st.integers(1, 5))
        for step in range(steps):
            key = data.draw(st.sampled_from(list(node) if isinstance(node, dict) else range(len(node))))
            if step == steps - 1 or not isinstance(node[key], dict | list) or not node[key]:
                break
            node = node[key]
        node[key] = data.draw(
            st.one_of(st.none(), st.integers(), st.text(max_size=3), st.just([]), st.just({"a": [1]}))
        )
        damaged = json.dumps(content)
        if json.loads(damaged) != json.loads(stored_run):
            with pytest.raises(HeadwayError):
                Run.from_json(damaged)

    def test_a_plot_that_fails_does_not_lose_the_result(self, project):
        def plots(context, claims):
            raise RuntimeError("no font")

        with pytest.raises(RuntimeError, match="no font"):
            prove(recipe(plots=plots), show_progress=False)
        assert len(list(Path("runs").rglob("result.json"))) == 1

    def test_plots_are_given_the_claims(self, project):
        seen = []
        prove(recipe(plots=lambda context, claims: seen.extend(claims)), show_progress=False)
        assert [c.id for c in seen] == ["larger", "smaller"]

    def test_an_interrupt_while_writing_leaves_no_half_file(self, project, monkeypatch):
        replace = os.replace

        def interrupted(source, target):
            if Path(target).name == "result.json":
                raise KeyboardInterrupt
            replace(source, target)

        monkeypatch.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prove(recipe(), show_progress=False)
        assert [path.name for path in Path("runs").rglob("*") if path.is_file()] == ["run.json"]


class TestPlannedCriteria:
    def test_another_criterion_than_the_declared_one_is_refused(self, project):
        softened = recipe(run=lambda context: [claim(criterion=at_least(1.0)), two_claims(context)[1]])
        with pytest.raises(ArgumentError, match=r"claim 'larger': got .*≥ 1 .*declares .*≥ 1\.3"):
            prove(softened, show_progress=False)

    def test_a_claim_that_is_left_out_is_refused(self, project):
        with pytest.raises(
            ArgumentError, match=r"got claims \['larger'\], its criteria declare \['larger', 'smaller'\]"
        ):
            prove(recipe(run=lambda context: [claim()]), show_progress=False)

    def test_a_claim_that_could_not_be_measured_is_inconclusive(self, project):
        unmeasured = claim(measured=Measurement(math.nan))
        run = prove(
            recipe(run=lambda context: [unmeasured], criteria={"larger": CRITERIA["larger"]}), show_progress=False
        )
        assert run.claims[0].verdict is Verdict.INCONCLUSIVE
        assert Run.from_json(run.to_json()).claims[0].verdict is Verdict.INCONCLUSIVE

    def test_a_result_that_is_no_claim_is_named(self, project):
        with pytest.raises(ArgumentError, match="got dict in its result"):
            prove(recipe(run=lambda context: [{"verdict": "holds"}]), show_progress=False)

    @pytest.mark.parametrize("claims", [[], [claim(), claim()]])
    def test_no_claims_and_repeated_ids_are_refused(self, project, claims):
        with pytest.raises(ArgumentError, match="one or more with distinct ids"):
            prove(recipe(run=lambda context: claims, criteria={}), show_progress=False)


class TestResume:
    def make(self, calls: list[str], interrupt: list[bool]):
        def first():
            calls.append("first")
            return torch.rand(2)

        def second():
            calls.append("second")
            if interrupt:
                raise KeyboardInterrupt
            return torch.rand(1)

        def run(context):
            value = sum(context.stage("first", first)) + sum(context.stage("second", second))
            return [claim(measured=Measurement(10 + value))]

        return recipe(run=run, criteria={"larger": CRITERIA["larger"]})

    def test_an_interrupted_run_continues_behind_its_last_stage(self, project):
        calls: list[str] = []
        interrupt = [True]
        interrupted = self.make(calls, interrupt)
        with pytest.raises(KeyboardInterrupt) as caught:
            prove(interrupted, size="smoke", seed=5, show_progress=False)
        folder = next(Path("runs/planted-paper").iterdir())
        assert str(folder) in caught.value.__notes__[0]
        assert not (folder / "result.json").exists()
        assert sorted(p.name for p in (folder / "stages").iterdir()) == ["first.json"]

        interrupt.clear()
        resumed = prove(interrupted, resume=folder, show_progress=False)
        assert calls == ["first", "second", "second"]
        assert (resumed.size, resumed.seed, resumed.folder) == ("smoke", 5, folder)
        assert resumed.reused_stages == ("first",)
        assert (folder / "result.json").is_file()

        whole = prove(interrupted, size="smoke", seed=5, show_progress=False)
        assert whole.claims == resumed.claims
        assert whole.reused_stages == ()

    def test_a_run_is_resumed_by_its_name(self, project):
        finished = prove(recipe(), size="smoke", show_progress=False)
        assert prove(recipe(), resume=finished.folder.name, show_progress=False).folder == finished.folder

    def test_an_unknown_run_lists_what_there_is(self, project):
        finished = prove(recipe(), size="smoke", show_progress=False)
        with pytest.raises(ArgumentError, match=rf"resume: got 'x'.*{finished.folder.name}"):
            prove(recipe(), resume="x", show_progress=False)

    def test_another_size_seed_or_recipe_is_refused(self, project):
        folder = prove(recipe(), size="smoke", seed=1, show_progress=False).folder
        for options, message in (({"size": "small"}, "size: got 'small'"), ({"seed": 2}, "seed: got 2")):
            with pytest.raises(ArgumentError, match=message):
                prove(recipe(), resume=folder, show_progress=False, **options)
        with pytest.raises(ArgumentError, match="slug: got 'other-paper'"):
            prove(recipe(slug="other-paper"), resume=folder, show_progress=False)

    def test_a_recipe_that_changed_since_is_refused(self, project, monkeypatch):
        folder = prove(recipe(), size="smoke", show_progress=False).folder
        monkeypatch.setattr(run_module, "source_digest", lambda function: "changed")
        with pytest.raises(ArgumentError, match="has changed since the run began"):
            prove(recipe(), resume=folder, show_progress=False)


class TestRecord:
    def test_a_recorded_run_is_the_result_file(self, project):
        run = prove(recipe(), record=True, show_progress=False)
        assert (project / "evidence" / "planted-paper.json").read_text() == (run.folder / "result.json").read_text()

    def test_a_finished_run_can_be_recorded_by_resuming_it(self, project):
        run = prove(recipe(), show_progress=False)
        prove(recipe(), resume=run.folder, record=True, show_progress=False)
        assert (project / "evidence" / "planted-paper.json").is_file()

    @pytest.mark.parametrize(
        ("changes", "options", "message"),
        [
            ({}, {"size": "smoke"}, "smoke run"),
            ({"criteria": {}}, {"size": "small"}, "declares no criteria"),
        ],
    )
    def test_what_cannot_be_recorded_is_refused_before_it_runs(self, project, changes, options, message):
        refused = recipe(run=lambda context: pytest.fail("ran"), **changes)
        with pytest.raises(ArgumentError, match=message):
            prove(refused, record=True, show_progress=False, **options)
        assert not Path("runs").exists()

    def test_outside_a_project_recording_is_refused_before_it_runs(self, tmp_path, monkeypatch):
        (tmp_path / "foreign" / ".git").mkdir(parents=True)
        (tmp_path / "evidence").mkdir()
        monkeypatch.chdir(tmp_path / "foreign")
        with pytest.raises(ArgumentError, match="in no project"):
            prove(recipe(run=lambda context: pytest.fail("ran")), record=True, show_progress=False)

    def test_a_checkout_of_headway_needs_no_evidence_folder(self, tmp_path, monkeypatch):
        (tmp_path / "docs").mkdir()
        (tmp_path / "pyproject.toml").write_text('[project]\nname = "headway"\n')
        monkeypatch.chdir(tmp_path / "docs")
        prove(recipe(), record=True, show_progress=False)
        assert (tmp_path / "evidence" / "planted-paper.json").is_file()

    @pytest.mark.parametrize("place", ["details", "notes"])
    def test_paths_and_host_names_are_refused(self, project, monkeypatch, place):
        monkeypatch.setattr(run_module.socket, "gethostname", lambda: "gpu-box-7")
        for private in (f"{Path.home()}/data.txt", "measured on gpu-box-7"):
            content = {"source": private} if place == "details" else private
            leaking = recipe(run=lambda context, c=content: [claim(**{place: c}), two_claims(context)[1]])
            with pytest.raises(ArgumentError, match="names this machine or its folders"):
                prove(leaking, record=True, show_progress=False)
        assert not list((project / "evidence").iterdir())

    def test_record_run_refuses_a_smoke_run(self, project):
        with pytest.raises(ArgumentError, match="smoke run"):
            record_run(prove(recipe(), size="smoke", show_progress=False), project)


class TestArguments:
    def test_an_unknown_size_is_named(self, project):
        with pytest.raises(ArgumentError, match="size: got 'big'"):
            prove(recipe(), size="big", show_progress=False)

    @pytest.mark.parametrize("seed", [-1, 0.5, True, "0"])
    def test_a_bad_seed_is_named(self, project, seed):
        with pytest.raises(ArgumentError, match="seed: got"):
            prove(recipe(), seed=seed, show_progress=False)

    def test_full_that_cannot_run_says_why(self, project):
        blocked = recipe(obstacle=lambda size: "needs a GPU with 24 GB" if size == "full" else None)
        with pytest.raises(NotRunnableError, match="needs a GPU with 24 GB"):
            prove(blocked, size="full", show_progress=False)
        assert not Path("runs").exists()


class TestEnvironment:
    def test_the_environment_names_no_machine_user_or_folder(self):
        text = json.dumps(environment())
        assert not [word for word in (os.uname().nodename, str(Path.home()), str(Path.cwd()), os.sep) if word in text]

    def test_the_commit_of_the_source_is_found(self):
        """Only in a checkout: an installed wheel has none."""
        found = environment()
        in_checkout = (Path(run_module.__file__).parents[3] / ".git").exists()
        assert (found["commit"] is not None) == (found["dirty"] is not None) == in_checkout
