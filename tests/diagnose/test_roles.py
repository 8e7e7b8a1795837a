"""`headway diagnose roles`: logs marked and told, heads found, adapters trained and taken off, parts kept, the page."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from headway.cli import app
from headway.diagnose.roles import Options, Roles, analysing, diagnose_roles
from headway.diagnose.roles import command as module
from headway.diagnose.roles.findings import findings
from headway.diagnose.roles.findings import findings as sentences
from headway.errors import ArgumentError, HostError
from headway.methods.diagnosis import diagnose_localize_align as dla
from tests.methods.roles_words import words_model, words_tokenizer
from tests.methods.song_hosts import bert

FEW = Options(kinds=("case", "format", "length"), relations=("system-user",), new_tokens=2, draws=2, share=0.2)


def row(name, reply, condition="neutral", role="mathematician", **rules):
    return {
        "id": name,
        "question": "2 + 2?",
        "condition": condition,
        "turns": [{"role": role, "reply": reply}],
        "rules": {"constraints": ["^So"], **rules},
    }


ROWS = [
    *(row(f"q{i}", "So it is 4.", answers=["4"]) for i in range(4)),
    *(row(f"q{i}", "No <img src=x onerror=alert(1)> idea.", "conflict", answers=["4"]) for i in range(4)),
    row("q9", "So be it.", "neutral", role="poet"),
]


class Harsh:
    """A judge that marks one below the rule judge."""

    name = "harsh"

    def judge(self, turn, rubric):
        found = dla.RuleJudge().judge(turn, rubric)
        return dla.Judgement({name: max(1.0, mark - 1) for name, mark in found.scores.items()}, found.reasons)

    def identity(self):
        return "harsh"


@pytest.fixture(scope="module")
def tokenizer():
    return words_tokenizer()


@pytest.fixture(scope="module")
def host(tokenizer):
    return words_model(tokenizer)


@pytest.fixture(scope="module")
def log():
    return dla.read_conversations(map(json.dumps, ROWS))


@pytest.fixture(scope="module")
def found(host, tokenizer, log, tmp_path_factory):
    out = tmp_path_factory.mktemp("roles")
    options = replace(FEW, align=2, weigh="cras", learning_rate=1e-2)
    return diagnose_roles(
        host, tokenizer, conversations=log, judges=[dla.RuleJudge(), Harsh()], options=options, out=out, name="words"
    )


def written(tmp_path, rows=ROWS):
    path = tmp_path / "log.jsonl"
    path.write_text("\n".join(one if isinstance(one, str) else json.dumps(one) for one in rows), encoding="utf-8")
    return path


def test_a_log_needs_no_model(log):
    found = diagnose_roles(conversations=log, localize=False, name="log.jsonl")
    assert found.localisation is None
    (judge,) = found.log["judges"]
    assert judge["all"]["turns"] == 9
    assert {group["name"] for group in judge["conditions"]} == {"neutral", "conflict"}
    assert {group["name"] for group in judge["roles"]} == {"mathematician", "poet"}
    # Goal and constraint fall from 5 to 1 in all four queries: (4 + 4) / 4 a turn.
    assert found.log["lost"][0]["value"]["value"] == pytest.approx(2.0)
    assert any("Under conflict role adherence is 2 [2, 2] lower than under neutral" in f for f in found.findings)
    assert any("the general one" in w for w in found.warnings)


def test_two_judges_are_held_against_each_other(found):
    (pair,) = found.log["agreement"]
    assert (pair["first"], pair["second"], pair["turns"]) == ("rules", "harsh", 9)
    assert pair["spearman"]["all"]["value"] == pytest.approx(1)
    assert pair["kappa"]["GA"] < 1
    assert any("rank turns with ρ = 1" in f for f in found.findings)


def test_every_part_is_there(found):
    where = found.localisation
    assert len(where["scores"]) == 3
    assert len(where["held_out"]) == len(where["neutral"]) == 3
    assert len(where["gates"]["by_control"]) == 2
    assert [turn["condition"] for turn in found.replies["turns"][:2]] == ["neutral", "conflict"]
    assert [r["layers_of"] for r in found.alignment["rows"]] == ["focal", "random", "least moved", "all"]
    assert found.alignment["seen"] == 2
    assert len(found.alignment["items"]) == 6
    for words in ("heads are focal", "held-out conflicts are won", "Silencing", "LoRA on focal layers moves"):
        assert any(words in f for f in found.findings), words


def test_training_moves_margins_and_leaves_the_model_as_it_was(found, host, tokenizer):
    rows = {r["layers_of"]: r for r in found.alignment["rows"]}
    assert rows["all"]["losses"][0] == pytest.approx(0.6931, abs=1e-3)
    assert rows["all"]["conflict"] != found.alignment["before"]["conflict"]
    fresh = words_model(tokenizer)
    assert list(fresh.state_dict()) == list(host.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), host.parameters(), strict=True))
    assert all(p.requires_grad for p in host.parameters())
    assert not any("lora" in name for name, _ in host.named_modules())


def test_sentences_say_what_was_asked(found):
    said = " ".join(found.findings)
    assert "50 % of their drift or more in" in said
    assert "in agreement by" in said
    assert any("templates of 3 kinds" in warning for warning in found.warnings)
    settings = found.run["settings"]
    for changes, words in (
        ({"cover": 0.8}, "80 % of their drift or more in"),
        ({"window": 1}, "among runs of that length"),
    ):
        other = replace(found, run={**found.run, "settings": {**settings, **changes}})
        assert words in " ".join(sentences(other))


def test_focal_adapters_are_saved_and_do_what_was_measured(host, tokenizer, tmp_path):
    peft = pytest.importorskip("peft")
    options = replace(FEW, new_tokens=0, align=2, learning_rate=1e-2)
    found = diagnose_roles(host, tokenizer, options=options, out=tmp_path)
    folder = tmp_path / found.alignment["rows"][0]["adapter"]
    assert (folder / "adapter_model.safetensors").exists()
    again = peft.PeftModel.from_pretrained(words_model(tokenizer), folder).eval()
    held = dla.conflict_items(tokenizer, kinds=FEW.kinds, relations=FEW.relations, count=2, first=2)
    by_name = dict(zip(found.alignment["items"], found.alignment["rows"][0]["conflict"], strict=True))
    for item in held:
        (margin,) = dla.margins(again.get_base_model(), [item])
        assert margin == pytest.approx(by_name[item.name], abs=1e-4)


def test_a_result_survives_its_json(found):
    assert Roles.from_json(found.to_json()).to_json() == found.to_json()
    assert findings(Roles.from_json(found.to_json())) == found.findings
    with pytest.raises(ArgumentError, match="diagnose roles"):
        Roles.from_json('{"format": 0}')


def test_cases_may_be_weighed_by_what_the_conflict_costs_without_a_judge(host, tokenizer, monkeypatch):
    options = replace(FEW, items=2, weigh="accuracy", new_tokens=0)
    items = dla.conflict_items(tokenizer, kinds=FEW.kinds, relations=FEW.relations, count=2)
    names = [item.name for item in items]

    def margin(model, item, condition, kept, name):
        """The first conflict turns a sure answer over, the second makes it even, the others change nothing."""
        place = names.index(item.name)
        return 0.0 if place > 1 else 40.0 if condition == "neutral" else (-40.0, 0.0)[place]

    monkeypatch.setattr(analysing, "item_margin", margin)
    found = diagnose_roles(host, tokenizer, options=options)
    np.testing.assert_allclose(found.localisation["weights"], [2 / 3, 1 / 3] + [0] * (len(items) - 2), atol=1e-9)
    plain = diagnose_roles(host, tokenizer, options=replace(options, weigh="even"))
    assert plain.localisation["weights"] is None
    assert plain.localisation["scores"] != found.localisation["scores"]


def test_cases_that_cost_nothing_weigh_alike_and_the_report_says_so(host, tokenizer, monkeypatch):
    monkeypatch.setattr(analysing, "item_margin", lambda *_: 0.0)
    options = replace(FEW, new_tokens=0)
    found = diagnose_roles(host, tokenizer, options=replace(options, weigh="accuracy"))
    assert found.localisation["weights"] is None
    assert any("By accuracy no conflict cost anything" in w for w in found.warnings)
    plain = diagnose_roles(host, tokenizer, options=options)
    assert not any("no conflict cost anything" in w for w in plain.warnings)
    assert plain.localisation["scores"] == found.localisation["scores"]


def test_an_interrupted_diagnosis_goes_on(host, tokenizer, log, tmp_path):
    options = replace(FEW, align=1)

    def stop(what, done, total):
        if what.startswith("training adapters on all"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        diagnose_roles(host, tokenizer, conversations=log, options=options, out=tmp_path, progress=stop)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "parts").iterdir()}
    again = diagnose_roles(host, tokenizer, conversations=log, options=options, out=tmp_path)
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "parts").iterdir()}
    assert len(after) == len(before) + 1
    assert {path: after[path] for path in before} == before
    whole = diagnose_roles(host, tokenizer, conversations=log, options=options)
    again.alignment["rows"][0]["adapter"] = None
    for part in ("log", "replies", "localisation", "alignment"):
        assert json.dumps(getattr(again, part)) == json.dumps(getattr(whole, part)), part


def test_readings_of_another_model_are_not_taken(host, tokenizer, tmp_path):
    options = replace(FEW, new_tokens=0)
    first = diagnose_roles(host, tokenizer, options=options, out=tmp_path)
    other = diagnose_roles(words_model(tokenizer, seed=1), tokenizer, options=options, out=tmp_path)
    assert first.localisation["scores"] != other.localisation["scores"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"items": 0}, "items"),
        ({"kinds": ("language", "colour")}, "colour"),
        ({"kinds": ()}, "different ones"),
        ({"kinds": ("case", "case")}, "different ones"),
        ({"share": 0.5}, "share"),
        ({"items": 7, "held_out": 5}, "at most 12"),
        ({"cover": 0.0}, "cover"),
        ({"weigh": "odd"}, "accuracy"),
        ({"window": 0}, "window"),
        ({"seed": -1}, "seed"),
        ({"rank": 0}, "rank"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"weigh": "cras", "new_tokens": 0}, "replies"),
        ({"weights": "reward"}, "uniform"),
        ({"align": 1, "kinds": ("case", "format")}, "at least 3"),
    ],
)
def test_options_that_cannot_be_are_refused(options, words):
    with pytest.raises(ArgumentError, match=words):
        Options(**options)


def test_nothing_to_do_is_refused(log, host):
    with pytest.raises(ArgumentError, match="model"):
        diagnose_roles()
    with pytest.raises(ArgumentError, match="neither"):
        diagnose_roles(host, localize=False)
    with pytest.raises(ArgumentError, match="own name"):
        diagnose_roles(conversations=log, localize=False, judges=[dla.RuleJudge(), dla.RuleJudge()])


def call(*arguments):
    return CliRunner().invoke(app, ["diagnose", "roles", *map(str, arguments)])


def test_the_command_marks_a_log_without_a_model(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "load", lambda *a, **k: pytest.fail("a model was loaded"))
    path = written(tmp_path)
    done = call("--log", path, "--out", tmp_path / "out", "--json")
    assert done.exit_code == 0, done.output
    data = json.loads(done.stdout)
    assert data["log"]["judges"][0]["all"]["turns"] == 9
    assert json.loads((tmp_path / "out" / "roles.json").read_text()) == data
    told = call("--log", path, "--out", tmp_path / "out").stdout
    assert "Role adherence is" in told
    assert "roles.html" in told


def test_the_command_looks_into_a_model_and_judges_with_it(tmp_path, monkeypatch, host, tokenizer):
    monkeypatch.setattr(module, "load", lambda *a, **k: (host, tokenizer))
    done = call(
        "--log", written(tmp_path), "--judge", "rules,model", "--localize", "--kinds", "case,format,length",
        "--relations", "system-user", "--draws", 2, "--share", 0.2, "--reply-tokens", 0, "--json",
        "--out", tmp_path / "out",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    data = json.loads(done.stdout)
    assert [judge["name"] for judge in data["log"]["judges"]] == ["rules", "model"]
    assert data["log"]["agreement"][0]["turns"] == 9
    assert data["localisation"]["focal"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--judge", "rulez"], "--judge"),
        (["--kinds", "case,colour"], "colour"),
        (["--no-localize"], "--log"),
        (["--share", "0.9"], "share"),
        (["--bad-rows", "drop", "--log", "LOG"], "bad_rows"),
        (["--format", "chat", "--log", "LOG"], "form"),
        (["--align", "3", "--log", "LOG"], "--localize"),
        (["--window", "0"], "window"),
        (["--seed", "-1"], "seed"),
        (["--learning-rate", "-1", "--align", "3"], "learning_rate"),
        (["--rank", "0"], "rank"),
    ],
)
def test_arguments_that_cannot_be_used_are_refused_before_a_model_is_loaded(tmp_path, monkeypatch, arguments, words):
    monkeypatch.setattr(module, "load", lambda *a, **k: pytest.fail("a model was loaded"))
    given = [str(written(tmp_path)) if one == "LOG" else one for one in arguments]
    done = call(*given, "--out", tmp_path / "out")
    assert done.exit_code != 0
    assert isinstance(done.exception, SystemExit | ArgumentError)
    assert words in f"{done.output} {done.exception}"


@pytest.mark.parametrize("judged", [[], ["--judge", "model", "--log", "LOG"]])
def test_a_model_of_another_kind_is_refused(tmp_path, monkeypatch, tokenizer, judged):
    monkeypatch.setattr(module, "load", lambda *a, **k: (bert().bert, tokenizer))
    done = call(*(written(tmp_path) if one == "LOG" else one for one in judged), "--out", tmp_path / "out")
    assert isinstance(done.exception, HostError), done.exception
    assert "causal language model" in str(done.exception)
    with pytest.raises(HostError, match="a model of text"):
        diagnose_roles(words_model(tokenizer), object())


def test_bad_rows_are_refused_by_line_or_skipped_and_told(tmp_path):
    path = written(tmp_path, [ROWS[0], "{", ROWS[1]])
    done = call("--log", path, "--out", tmp_path / "out")
    assert done.exit_code != 0
    assert "line 2" in f"{done.output} {done.exception}"
    done = call("--log", path, "--out", tmp_path / "out", "--bad-rows", "skip", "--json")
    data = json.loads(done.stdout)
    assert data["log"]["bad"][0]["line"] == 2
    assert any("1 malformed row was left out, the first in line 2" in w for w in data["warnings"])


def test_the_page_holds_words_of_the_log_as_text(found):
    page = found.to_html()
    assert "<img src=x" not in page
    assert "Focal heads" in page
    assert "Alignment" in page
