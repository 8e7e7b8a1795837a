"""`headway diagnose agreement`: texts from files, resumable parts, findings true of planted scores, sheet and page."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from typer.testing import CliRunner

from headway.cli import app
from headway.diagnose.agreement import (
    Agreement,
    Options,
    analysing,
    command,
    diagnose_agreement,
    findings,
    make_ready,
    read_rows,
)
from headway.diagnose.agreement.sheets import chosen_methods, read_people, write_sheet
from headway.errors import ArgumentError, HeadwayError
from headway.methods.diagnosis.song_of_disagreement import METHODS, Settings, encode
from tests.methods.song_hosts import bert, classifier, decoder, example, linear, reader_of_the_last

RUNNER = CliRunner()
QUICK = Settings(masks=20, steps=4)
SOME = ("attention_last", "attention_rollout", "integrated_gradients", "lime", "ablation")


class Words:
    """A fast tokenizer for texts of words: every word is a token."""

    is_fast = True
    mask_token_id = 3

    def __call__(self, text, *, max_length=512, return_offsets_mapping=True, **options):
        spans, at = [], 0
        for word in text.split(" "):
            spans.append((at, at + len(word)))
            at += len(word) + 1
        spans = [(a, b) for a, b in spans if b > a][: max_length - 2]
        ids = [1, *(5 + sum(map(ord, text[a:b])) % 25 for a, b in spans), 2]
        words = [None, *range(len(spans)), None]
        data = {
            "input_ids": ids,
            "special_tokens_mask": [1, *[0] * len(spans), 1],
            "offset_mapping": [(0, 0), *spans, (0, 0)],
        }

        class Coded(dict):
            def word_ids(self):
                return words

        return Coded(data)

    def convert_ids_to_tokens(self, ids):
        return [f"w{i}" for i in ids]

    def decode(self, ids):
        return f"w{ids[0]}"


@pytest.fixture(scope="module")
def model():
    return classifier()


@pytest.fixture(scope="module")
def examples():
    found = [example(count, seed=seed, label=seed % 3) for seed, count in enumerate((9, 8, 10, 3))]
    for one in found[:3]:
        object.__setattr__(one, "rationale", np.arange(len(one.tokens)) == 2)
    return found


@pytest.fixture(scope="module")
def found(model, examples):
    return diagnose_agreement(model, examples, options=Options(methods=SOME, settings=QUICK))


def measurement(value: float, width: float = 0.1) -> dict:
    return {"value": value, "low": value - width, "high": value + width, "n": 12, "seeds": [], "unit": ""}


def made() -> Agreement:
    """A finished diagnosis with every part."""
    names = ["attention_last", "attention_rollout", "value_zeroing", "integrated_gradients", "lime", "ablation"]
    random = np.random.default_rng(0)
    methods = [
        {
            "name": name, "family": METHODS[name].family, "words": METHODS[name].words, "with_others": 0.1 * i,
            "ceiling": measurement(0.8) if name == "lime" else None, "position": measurement(0.05),
            "frequency": measurement(0.2), "near_ties": 0.2, "comprehensiveness": measurement(0.3),
            "sufficiency": measurement(0.1), "excess": measurement(0.2 - 0.06 * i),
            "auroc": measurement(0.99 - 0.1 * i), "precision": measurement(0.5),
            "completeness": 0.4 if i == 3 else None, "note": "",
        }
        for i, name in enumerate(names)
    ]  # fmt: skip
    pairs = [
        {"first": a, "second": b, "tau": measurement(0.1 * (i - j) + 0.5), "sd": 0.2, "undefined": 0, "short": 1,
         "top": measurement(0.3), "corrected": 0.4}
        for i, a in enumerate(names) for j, b in enumerate(names) if i < j
    ]  # fmt: skip
    tokens = ["[CLS]", "a", "splen", "##did", "<img", "src=x>", "film", "[SEP]"]
    texts = [
        {
            "name": name, "tokens": tokens, "special": [True, *[False] * 6, True],
            "words": [-1, 0, 1, 1, 2, 3, 4, -1], "predicted": "praises", "output": 0.93, "label": "complains",
            "rationale": [False, False, True, True, False, False, False, False],
            "scores": {m: random.random(8).tolist() for m in names},
        }
        for name in ("<b>one</b>", "two")
    ]  # fmt: skip
    return Agreement(
        model={"name": "made", "layers": 3, "heads": 4, "dtype": "torch.float32", "parameters": 1000, "accuracy": 0.8,
               "held_out": 40, "kind": "probe"},
        run={"date": "2026-01-01", "settings": {"measure": "kendall", "special": "exclude",
                                                "settings": {"baseline": "pad"}}},
        methods=methods, pairs=pairs, texts=texts,
        controls={"items": 6, "chance": [-0.5, 0.5], "random": measurement(0.0), "pairs": 0.3,
                  "pairs_other_special": 0.4, "baselines": {"mean": measurement(0.6), "zero": None}},
        refused={"deep_lift": "deep_lift: not covered."},
        people={"people": ["ann"], "answers": 9, "ties": 1, "preferred": {"lime": measurement(0.7)},
                "pairs": [{"first": "ablation", "second": "lime", "won": measurement(0.3)}], "alpha": None,
                "consistency": measurement(1.0, 0.0), "left": measurement(0.5), "words": {"lime": "LIME"}},
        findings=["Two methods agree by 0.3."], warnings=["Few texts."],
    )  # fmt: skip


def test_every_method_and_pair_is_there(found):
    assert [m["name"] for m in found.methods] == list(SOME)
    assert len(found.pairs) == 10
    assert all(-1 <= p["tau"]["value"] <= 1 for p in found.pairs)
    # The text of three tokens has one ordinary one: nothing to rank.
    assert {p["short"] for p in found.pairs} == {1}
    assert [m["ceiling"] is not None for m in found.methods] == [m == "lime" for m in SOME]
    assert all(m["auroc"]["n"] == 3 for m in found.methods)
    assert set(found.controls["baselines"]) == {"mask", "mean", "zero"}
    assert found.texts[0]["predicted"] in "012"


def test_warnings_name_what_limits_the_numbers(found):
    text = " ".join(found.warnings)
    assert "4 texts are few" in text
    assert "1 of 4 texts have too few tokens" in text
    assert "no evidence" in text


def test_a_result_survives_its_json(found):
    again = Agreement.from_json(found.to_json())
    assert again.to_json() == found.to_json()
    assert again.to_html() == found.to_html()
    with pytest.raises(ArgumentError, match="format"):
        Agreement.from_json("{}")


def test_what_a_classifier_does_not_allow_is_left_out_by_name(model, examples):
    found = diagnose_agreement(model, examples[:2], options=Options(settings=QUICK))
    assert "gelu" in found.refused["deep_lift"]
    assert "deep_lift" not in [m["name"] for m in found.methods]
    assert any("deep_lift was left out" in w for w in found.warnings)
    with pytest.raises(ArgumentError, match="deep_lift"):
        diagnose_agreement(model, examples[:2], options=Options(methods=("lime", "deep_lift"), settings=QUICK))


def test_a_model_without_attention_is_compared_by_the_rest():
    found = diagnose_agreement(linear(), [example(9)], options=Options(settings=QUICK))
    names = {m["name"] for m in found.methods}
    assert {"integrated_gradients", "deep_lift", "lime", "ablation"} <= names
    assert "attention_last" in found.refused
    exact = next(p for p in found.pairs if {p["first"], p["second"]} == {"integrated_gradients", "deep_lift"})
    assert exact["tau"]["value"] == pytest.approx(1.0)


def test_an_interrupted_diagnosis_goes_on(model, examples, tmp_path, found, monkeypatch):
    options = Options(methods=SOME, settings=QUICK)

    def stop(what, done, total):
        if what == "explaining texts" and done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        diagnose_agreement(model, examples, options=options, out=tmp_path, progress=stop)
    parts = list((tmp_path / "parts").iterdir())
    assert len(parts) == 2
    parts[0].write_bytes(parts[0].read_bytes()[:50])
    fresh = []
    real = analysing.read.__globals__["_read"]
    monkeypatch.setitem(analysing.read.__globals__, "_read", lambda *a: fresh.append(1) or real(*a))
    again = diagnose_agreement(model, examples, options=options, out=tmp_path)
    assert len(fresh) == 3, "two texts that were not read yet, and one whose part is damaged"
    assert again.pairs == found.pairs
    # Another seed, other settings or another model read anew.
    diagnose_agreement(model, examples[:1], options=Options(methods=SOME, settings=QUICK, seed=1), out=tmp_path)
    diagnose_agreement(classifier(seed=5), examples[:1], options=options, out=tmp_path)
    assert len(fresh) == 5


def test_special_tokens_and_measures_are_choices(model, examples, tmp_path):
    base = {"methods": SOME[:3], "settings": QUICK}
    left_out, ranked, top = (
        diagnose_agreement(model, examples, options=Options(**base, **more), out=tmp_path)
        for more in ({}, {"special": "include"}, {"measure": "overlap-3"})
    )
    assert left_out.controls["pairs_other_special"] == pytest.approx(ranked.controls["pairs"])
    assert ranked.controls["items"] > left_out.controls["items"]
    assert all(0 <= p["tau"]["value"] <= 1 for p in top.pairs)


def test_the_thesis_is_told_when_it_is_so():
    told = " ".join(findings.findings(made()))
    assert "1 of 6 methods find the words that decide" in told
    both = made()
    for m in both.methods:
        m["auroc"] = measurement(0.97)
    told = " ".join(findings.findings(both))
    assert "Those 6 agree with each other by τ = 0.27" in told
    assert "LIME was preferred most" in told


def test_a_baseline_that_decides_much_is_warned_of():
    told = " ".join(findings.warnings(made()))
    assert "other baselines than pad agree with themselves by mean 0.6 only" in told
    assert "right on 80 %" in told
    steady = made()
    steady.controls["baselines"] = {"mean": measurement(0.9)}
    assert "other baselines" not in " ".join(findings.warnings(steady))


def test_the_least_and_most_alike_are_named():
    first = findings.findings(made())[0]
    assert "0.3 on average over 15 pairs" in first
    assert "least attention of the last layer and leave one token out (0)" in first


def test_rows_are_read_from_lines(tmp_path):
    path = tmp_path / "some.jsonl"
    rows = [
        {"text": "a fine fine film", "label": 1, "rationale": ["fine", "fine"]},
        {"text": "poor", "label": "bad", "rationale": [[0, 4]], "name": "two"},
        {"text": "plain"},
    ]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n", encoding="utf-8")
    found, left_out = read_rows(path)
    assert [r.name for r in found] == ["line 1", "two", "line 3"]
    assert found[0].rationale == ((2, 6), (7, 11))
    assert [r.label for r in found] == ["1", "bad", None]
    assert left_out == []
    plain = tmp_path / "some.txt"
    plain.write_text("one text\n\nanother\n", encoding="utf-8")
    assert [(r.name, r.text) for r in read_rows(plain)[0]] == [("line 1", "one text"), ("line 3", "another")]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("{", "no JSON"),
        ("[1]", "'text'"),
        ('{"text": " "}', "'text'"),
        ('{"text": "x", "extra": 1}', "extra"),
        ('{"text": "x", "label": 1.5}', "label"),
        ('{"text": "x", "rationale": ["y"]}', "not in the text"),
        ('{"text": "x", "rationale": [[0, 2]]}', "1 characters"),
        ('{"text": "x", "rationale": [3]}', "expected a word"),
        ('{"text": "x", "rationale": []}', "expected a list"),
    ],
)
def test_a_row_that_cannot_be_used_is_refused_or_skipped_by_its_line(tmp_path, row, words, caplog):
    path = tmp_path / "some.jsonl"
    path.write_text(f'{{"text": "good"}}\n{row}\n', encoding="utf-8")
    with pytest.raises(HeadwayError, match="line 2") as error:
        read_rows(path)
    assert words in str(error.value)
    found, left_out = read_rows(path, bad_rows="skip")
    assert len(found) == 1
    assert left_out[0].startswith("line 2")
    assert "line 2" in caplog.text
    path.write_text(row, encoding="utf-8")
    with pytest.raises(ArgumentError, match="without a usable row"):
        read_rows(path, bad_rows="skip")
    with pytest.raises(ArgumentError, match="bad_rows"):
        read_rows(path, bad_rows="drop")


def labelled(count: int = 24) -> list:
    rows = [
        {"text": f"{'good' if i % 2 else 'bad'} film number {i} seen with two old friends", "label": "ab"[i % 2]}
        for i in range(count)
    ]
    return [SimpleNamespace(**row, name=f"row {i}", rationale=((0, 3),)) for i, row in enumerate(rows)]


def test_a_bare_encoder_gets_a_probe_that_never_saw_what_is_explained():
    ready = make_ready(bert().bert, Words(), labelled(), count=4, tokens=16)
    assert ready.kind == "probe"
    assert ready.classes == ("a", "b")
    assert ready.held_out == 6
    assert len(ready.examples) == 4
    assert np.flatnonzero(ready.examples[0].rationale).tolist() == [1]
    assert ready.name_of(1) == "b"


def test_a_head_is_explained_by_its_classes_and_a_decoder_by_its_next_token():
    ready = make_ready(bert(), Words(), labelled(), count=3, tokens=16)
    assert (ready.kind, ready.classes, len(ready.examples)) == ("classifier", ("LABEL_0", "LABEL_1", "LABEL_2"), 3)
    assert np.isnan(ready.accuracy)
    following = make_ready(decoder(), Words(), None, count=2, tokens=16)
    assert following.kind == "next token"
    assert following.name_of(7) == "w7"
    assert len(following.examples) == 2


def test_texts_that_a_probe_cannot_be_fitted_on_are_refused():
    host = bert().bert
    rows = labelled()
    rows[3].label = None
    with pytest.raises(ArgumentError, match="row 3"):
        make_ready(host, Words(), rows, tokens=16)
    with pytest.raises(ArgumentError, match="two or more classes"):
        make_ready(host, Words(), labelled(5), count=4, tokens=16)
    with pytest.raises(ArgumentError, match="64 positions"):
        make_ready(host, Words(), labelled(), tokens=65)
    with pytest.raises(ArgumentError, match="--count"):
        make_ready(host, Words(), labelled(), tokens=16, count=0)


def test_options_are_checked():
    for options, words in (
        ({"methods": ("lime",)}, "two or more"), ({"methods": ("lime", "x")}, "method: got 'x'"),
        ({"measure": "tau"}, "measure"), ({"special": "no"}, "special"), ({"words": "mean"}, "words"),
        ({"minimum": 1}, "minimum"),
    ):  # fmt: skip
        with pytest.raises(ArgumentError, match=words):
            Options(**options)
    with pytest.raises(ArgumentError, match="examples: got none"):
        diagnose_agreement(linear(), [])


def test_a_sheet_that_may_be_filled_in_is_never_overwritten(found, examples, tmp_path):
    methods = chosen_methods(found, None)
    assert methods == ["attention_rollout", "integrated_gradients", "lime"]
    files, why_not = write_sheet(found, examples, methods, texts=4, seed=0, out=tmp_path)
    assert [f.name for f in files] == ["sheet.csv", "sheet.html", "sheet-key.json"]
    assert why_not == ""
    assert write_sheet(found, examples, methods, texts=4, seed=0, out=tmp_path)[1] == ""
    (tmp_path / "sheet.csv").write_text("item,answer\n", encoding="utf-8")
    files, why_not = write_sheet(found, examples, methods, texts=4, seed=0, out=tmp_path)
    assert files == []
    assert "filled in" in why_not
    with pytest.raises(ArgumentError, match="--sheet-methods"):
        chosen_methods(found, ["gradient"])
    with pytest.raises(HeadwayError, match=r"sheet-key\.json"):
        read_people([tmp_path / "sheet.csv"], tmp_path / "other", bad_rows="refuse")


@pytest.fixture
def small_host(monkeypatch):
    host = bert().bert
    monkeypatch.setattr(command, "load", lambda name, **options: (host, Words()))


def run(*arguments: object):
    return RUNNER.invoke(app, ["diagnose", "agreement", *map(str, arguments)])


def rows_file(folder: Path) -> Path:
    path = folder / "rows.jsonl"
    rows = [{"text": r.text, "label": r.label, "rationale": [[0, 3]]} for r in labelled()]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


ARGUMENTS = ("--count", 3, "--tokens", 16, "--masks", 15, "--steps", 3)


def test_the_command_writes_page_numbers_and_sheet(small_host, tmp_path):
    out = tmp_path / "out"
    result = run("any", "--texts", rows_file(tmp_path), "--out", out, *ARGUMENTS)
    assert result.exit_code == 0, result.output
    assert "Two methods order the tokens" in result.output
    assert {p.name for p in out.iterdir()} >= {"agreement.html", "agreement.json", "sheet.csv", "sheet.html", "parts"}
    found = Agreement.from_json((out / "agreement.json").read_text(encoding="utf-8"))
    assert found.model["kind"] == "probe"
    # The sheet filled in and given back.
    rows = list(csv.DictReader((out / "sheet.csv").read_text(encoding="utf-8").splitlines()))
    filled = tmp_path / "ann.csv"
    lines = [f"{row['item']},A" for row in rows]
    filled.write_text("\n".join(["item,answer", *lines, "q999,A"]), encoding="utf-8")
    result = run("any", "--texts", rows_file(tmp_path), "--out", out, *ARGUMENTS, "--answers", filled)
    assert result.exit_code != 0
    assert f"line {len(rows) + 2}" in str(result.exception) + result.output
    result = run(
        "any",
        "--texts",
        rows_file(tmp_path),
        "--out",
        out,
        *ARGUMENTS,
        "--answers",
        filled,
        "--bad-rows",
        "skip",
        "--json",
    )
    data = json.loads(result.stdout)
    assert data["people"]["people"] == ["ann"]
    assert data["people"]["left"]["value"] == 1.0
    assert any("answers could not be used" in w for w in data["warnings"])
    assert (out / "sheet.csv").read_text(encoding="utf-8").startswith("item,predicted")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--bad-rows", "drop"), "--bad-rows"),
        (("--readout", "middle"), "--readout"),
        (("--sheet", -1), "--sheet"),
        (("--methods", "lime"), "two or more"),
        (("--sheet-methods", "limes"), "Did you mean"),
        (("--baseline", "noise"), "baseline"),
        (("--measure", "tau"), "measure"),
        (("--sign", "both"), "sign"),
        (("--target", "glod"), "Did you mean 'gold'"),
        (("--seed", -1), "seed"),
        (("--masks", 0), "masks"),
        (("--special", "no"), "special"),
        (("--texts", "nowhere.jsonl"), "no file"),
        (("--answers", "nowhere.csv"), "sheet-key.json"),
    ],
)
def test_wrong_arguments_are_refused_before_a_model_is_loaded(arguments, words, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "load", lambda *a, **k: pytest.fail("a model was loaded"))
    result = run("any", "--out", tmp_path, *arguments)
    assert result.exit_code != 0
    assert words in str(result.exception) + result.output


def test_a_person_counts_once_in_all_files(found, examples, tmp_path):
    files, _ = write_sheet(found, examples, chosen_methods(found, None), texts=4, seed=0, out=tmp_path)
    items = [row["item"] for row in csv.DictReader(files[0].read_text(encoding="utf-8").splitlines())]
    first, other = tmp_path / "ann.csv", tmp_path / "more" / "ann.csv"
    other.parent.mkdir()
    first.write_text("\n".join(["item,answer", *(f"{item},A" for item in items)]), encoding="utf-8")
    other.write_text(f"item,answer,person\n{items[0]},B,\n{items[0]},B,ben\n", encoding="utf-8")
    for again in (first, other):
        with pytest.raises(ArgumentError, match=f"ann.csv line 2: ann answered {items[0]} in ann.csv before"):
            read_people([first, again], tmp_path, bad_rows="refuse")
    once, _ = read_people([first], tmp_path, bad_rows="refuse")
    twice, complaints = read_people([first, first], tmp_path, bad_rows="skip")
    assert twice == once
    assert len(complaints) == len(items)
    both, complaints = read_people([first, other], tmp_path, bad_rows="skip")
    assert both["people"] == ["ann", "ben"]
    assert both["answers"] == len(items) + 1
    assert len(complaints) == 1


def test_a_model_of_pictures_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "load", lambda *a, **k: (bert().bert, lambda images: None))
    result = run("any", "--out", tmp_path)
    assert isinstance(result.exception, HeadwayError), result.exception
    assert "a model of text" in str(result.exception)


def test_a_decoder_with_classes_is_read_at_its_last_token():
    host = reader_of_the_last()
    ready = make_ready(host, Words(), labelled(), count=2, tokens=16)
    assert (ready.kind, ready.classifier.readout) == ("classifier", "last")
    assert make_ready(bert(), Words(), labelled(), count=2, tokens=16).classifier.readout == "first"


def test_the_page_holds_text_as_text():
    page = made().to_html()
    assert "<img src=x" not in page
    assert "<b>one</b>" not in page
    assert "Who is right" in page


def test_encoding_marks_the_characters_of_a_rationale():
    given = encode(Words(), "a very good film", tokens=16, rationale=[(7, 11)])
    assert given.rationale.tolist() == [False, False, False, True, False, False]
    with pytest.raises(ArgumentError, match="16 characters"):
        encode(Words(), "a very good film", tokens=16, rationale=[(7, 17)])
