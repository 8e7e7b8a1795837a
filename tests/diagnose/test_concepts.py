"""`headway diagnose concepts`: material from files, resumable parts, planted heads found, findings, and the command."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from headway.cli import app
from headway.diagnose.concepts import (
    Concepts,
    Effect,
    Pictures,
    Settings,
    audit,
    command,
    read_bank,
    read_pictures,
    scenes,
)
from headway.diagnose.concepts.auditing import head_sets
from headway.diagnose.concepts.findings import findings
from headway.diagnose.concepts.pictures import everyday_bank, scene_bank
from headway.diagnose.concepts.report import payload
from headway.diagnose.concepts.result import mean_drops
from headway.errors import ArgumentError, HeadwayError
from headway.methods.diagnosis.clip_ccs import HeadConcept, embed_bank, lexicon, tiny, tower
from headway.statistics import bootstrap

runner = CliRunner()


@pytest.fixture(scope="module")
def host():
    return tiny.untrained(0).eval()


@pytest.fixture(scope="module")
def reader():
    return tiny.tokenizer()


@pytest.fixture(scope="module")
def tokenise(reader):
    return lambda texts: tiny.tokens(reader, texts)


@pytest.fixture(scope="module")
def bank(host, tokenise):
    known = scene_bank()
    return embed_bank(tower(host, "text"), tokenise, list(known), concepts=known)


@pytest.fixture(scope="module")
def settings():
    return Settings(layers=2, draws=2)


@pytest.fixture(scope="module")
def found(host, tokenise, bank, settings):
    return audit(host, tokenise, scenes(60, seed=1), bank, settings=settings, name="made")


def scored(place, concept, score, asked=5):
    fits = tuple(i < score for i in range(asked))
    return HeadConcept(
        layer=place[0], head=place[1], texts=("t",) * asked, concept=concept, verdicts={}, fits=fits, asked=asked
    )


def made() -> Concepts:
    """A finished audit with every part."""
    texts = ["something red", "<img src=x onerror=alert(1)>", "navy paint", "a circle", "the colour teal"]
    heads = [
        {
            "layer": layer, "head": head, "concept": concept, "score": score, "of": 5, "kind": kind, "texts": texts,
            "fits": [i < score for i in range(5)], "verdicts": {"lexicon": [i < score for i in range(5)]},
            "explained": 0.4, "abstentions": 0, "ties": 0,
        }
        for layer in (2, 3)
        for head, (concept, score, kind) in enumerate(
            [("colour", 5, "high"), ("<b>shape</b>", 3, "moderate"), ("colour", 4, "between"), ("count", 1, "low")]
        )
    ]  # fmt: skip
    drops = {"colour": {"accuracy": 0.6, "drop": [0.3, 0.2, 0.4]}, "shape": {"accuracy": 0.8, "drop": [0.1, 0.0, 0.2]}}
    equal = {"count": 2, "drops": {"colour": [[0.3, 0.1], [0.2, 0.05]], "shape": [[0.1, 0.1], [0.1, 0.0]]}}
    skew = {"value": 0.9, "low": 0.5, "high": 1.2, "n": 4, "seeds": [], "unit": "nats"}
    lower = {**skew, "value": 0.4, "low": 0.1, "high": 0.7}
    accuracy = {name: {"value": 0.9, "low": 0.85, "high": 0.94, "n": 100, "seeds": [], "unit": ""} for name in drops}
    result = Concepts(
        model={"name": "made", "layers": 4, "heads": 4, "head_dim": 12, "dtype": "torch.float32", "parameters": 5000},
        run={"date": "2026-01-01", "pictures": "100 pictures", "settings": {"layers": 2}},
        heads=heads,
        shares=[0, 0.25, 0, 0.25, 0.25, 0.25],
        classes={"high": 2, "moderate": 2, "low": 2, "between": 2},
        concentrated=0.5,
        base={"accuracy": accuracy, "skew": {**skew, "chance": 0.3}},
        effects=[
            Effect(label="high", heads=[[2, 0], [3, 0]], questions=drops, equal=equal, skew=skew),
            Effect(label="low", heads=[[2, 3]], questions=drops, equal=None, skew=skew),
            Effect(label="concept: colour", heads=[[2, 0], [3, 0]], questions=drops, equal=equal, skew=lower),
        ],
        errors={"image": 1e-7, "text": 2e-7},
        against=equal,
        warnings=["Few pictures."],
    )
    result.findings = findings(result)
    return result


def test_every_part_is_there(found):
    assert [(row["layer"], row["head"]) for row in found.heads] == [(x, h) for x in (2, 3) for h in range(8)]
    assert all(len(row["texts"]) == row["of"] == 5 for row in found.heads)
    assert sum(found.shares) == pytest.approx(1)
    assert sum(found.classes.values()) == 16
    assert set(found.base["accuracy"]) == {"colour", "shape", "position", "texture", "count"}
    assert found.base["skew"]["n"] == 4
    assert 0.3 < found.base["skew"]["chance"] < 1.5
    assert max(found.errors.values()) < 1e-4
    for effect in found.effects:
        assert set(effect.questions) == set(found.base["accuracy"])
        assert effect.skew is not None
        if effect.equal is not None:
            assert all(len(draws) == 2 for draws in effect.equal["drops"].values())


def test_accuracy_and_drop_of_a_set_belong_together(found):
    for effect in found.effects:
        for name, row in effect.questions.items():
            before = found.base["accuracy"][name]["value"]
            assert row["drop"][0] == pytest.approx(before - row["accuracy"])
            assert row["drop"][1] <= row["drop"][0] <= row["drop"][2]


def test_a_result_survives_its_json(found):
    again = Concepts.from_json(found.to_json())
    assert again.to_json() == found.to_json()
    found_without = Concepts.from_json(found.to_json())
    found_without.concentrated = math.nan
    assert math.isnan(Concepts.from_json(found_without.to_json()).concentrated)
    with pytest.raises(ArgumentError, match="headway diagnose concepts"):
        Concepts.from_json("{}")


def test_sets_have_as_many_others_in_every_layer():
    heads = [scored((3, h), "colour" if h < 3 else "shape", 5 if h < 3 else (1 if h < 5 else 3)) for h in range(8)]
    heads += [scored((2, h), "count", 5) for h in range(8)]
    sets, against = head_sets(heads, Settings(draws=4))
    chosen, pairs = sets["high"]
    assert len(chosen) == 11
    for some, control in pairs:
        assert len(some) == len(control) == 3
        assert {layer for layer, _ in some + control} == {3}
        assert not set(control) & set(chosen)
    assert sets["concept: count"] == ([(2, h) for h in range(8)], [])
    assert "concept: colour" in sets
    assert len(against) == 4
    assert all(len(high) == len(low) == 2 for high, low in against)


def test_a_class_without_heads_is_not_silenced():
    sets, against = head_sets([scored((0, h), "colour", 3) for h in range(4)], Settings())
    assert "high" not in sets
    assert "low" not in sets
    assert against == []
    assert all(math.isnan(value) for value in mean_drops(None))


def test_findings_are_sentences_with_numbers():
    told = made().findings
    assert told[0] == (
        "2 of 8 described heads have 5 texts of one concept; the texts of 2 share none. The median score is 3.5."
    )
    assert any("Silencing the 2 high heads costs 20.0 points of accuracy." in one for one in told)
    assert any(
        "2 of them cost 17.5 points and as many other heads of the same layers 6.2 points" in one for one in told
    )
    assert any("costs 30.0 points on colour and 10.0 points on the other questions" in one for one in told)
    assert any("MaxSkew of 0.90 nats, lists drawn blindly 0.30" in one for one in told)
    assert any("silencing “colour” heads lowers it most, to 0.40" in one for one in told)


def test_one_neutral_prompt_has_no_interval_and_is_told():
    alone = made()
    unknown = bootstrap([0.9], generator=np.random.default_rng(0)).to_dict()
    alone.base["skew"].update(unknown)
    for effect in alone.effects:
        effect.skew = effect.skew | unknown
    assert findings(alone)[-1].endswith("0.30; one prompt has no interval to hold the silenced sets against.")
    bars = payload(alone)["skew"]
    assert [one["label"] for one in bars] == ["all heads at work", "drawn blindly", "high", "low", "colour"]
    assert all(one["low"] is None is one["high"] for one in bars)
    assert [one["low"] for one in payload(made())["skew"]] == [0.5, None, 0.5, 0.5, 0.1]


def test_an_interrupted_audit_goes_on_and_runs_nothing_twice(host, tokenise, bank, settings, found, tmp_path):
    def stop(what, done, total):
        if what == "silencing heads" and done >= 4:
            raise KeyboardInterrupt

    pictures = scenes(60, seed=1)
    with pytest.raises(KeyboardInterrupt):
        audit(host, tokenise, pictures, bank, settings=settings, name="made", out=tmp_path, progress=stop)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "parts").iterdir()}
    assert len([path for path in kept if path.name.startswith("pruned-")]) >= 2
    again = audit(host, tokenise, pictures, bank, settings=settings, name="made", out=tmp_path)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert again.effects == found.effects
    assert again.heads == found.heads


def test_parts_of_other_pictures_are_not_taken(host, tokenise, bank, settings, tmp_path):
    one = audit(host, tokenise, scenes(20, seed=1), bank, settings=settings, out=tmp_path)
    other = audit(host, tokenise, scenes(20, seed=2), bank, settings=settings, out=tmp_path)
    alone = audit(host, tokenise, scenes(20, seed=2), bank, settings=settings)
    assert other.effects == alone.effects
    assert other.base != one.base


def test_judges_are_named_and_their_silence_is_told(host, tokenise, bank, settings):
    judges = {"exact": lexicon(bank.concepts), "mute": lambda concept, text: "perhaps"}
    found = audit(host, tokenise, scenes(20, seed=1), bank, settings=settings, judges=judges)
    assert found.run["judges"] == ["exact", "mute"]
    assert any(one.startswith("The judges abstained on 80 of 160") for one in found.warnings)
    assert found.heads[0]["verdicts"]["mute"] == [None] * 5


def test_pictures_without_classes_are_told_by_their_nearest_text(host, tokenise, bank, settings):
    plain = scenes(20, seed=1)
    found = audit(host, tokenise, Pictures(plain.batches), bank, settings=settings)
    assert found.base["accuracy"]["nearest text unchanged"]["value"] == 1
    assert found.base["skew"] is None
    assert any("no classes" in one for one in found.warnings)
    assert "skew" not in found.to_html().split("<main")[0]


def test_what_cannot_be_audited_is_refused(host, tokenise, bank):
    with pytest.raises(ArgumentError, match="draws: got 0"):
        Settings(draws=0)
    with pytest.raises(ArgumentError, match="pictures: got 1"):
        audit(host, tokenise, scenes(1, seed=0), bank)


def test_a_bank_is_read_with_its_concepts(tmp_path):
    path = tmp_path / "bank.txt"
    path.write_text("a  red wall\tcolour\n\na dog\nat night\t\n", encoding="utf-8")
    assert read_bank(path) == ({"a red wall": "colour", "a dog": None, "at night": None}, [])
    assert len(everyday_bank()) > 200


@pytest.mark.parametrize(("line", "words"), [("a dog", "again"), ("\tcolour", "before the tab")])
def test_a_text_that_cannot_be_used_is_refused_or_skipped_by_its_line(tmp_path, line, words, caplog):
    path = tmp_path / "bank.txt"
    path.write_text(f"a dog\n{line}\na cat\n", encoding="utf-8")
    with pytest.raises(HeadwayError, match="line 2") as error:
        read_bank(path)
    assert words in str(error.value)
    assert "--bad-rows skip" in str(error.value)
    kept, left_out = read_bank(path, bad_rows="skip")
    assert list(kept) == ["a dog", "a cat"]
    assert left_out[0].startswith("line 2")
    assert "line 2" in caplog.text
    path.write_text("\n", encoding="utf-8")
    with pytest.raises(ArgumentError, match="without a text"):
        read_bank(path)


def painted(folder, name, colour):
    Image = pytest.importorskip("PIL.Image")
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), colour).save(path)
    return path


def pixels(opened):
    return torch.stack([torch.tensor(list(picture.getpixel((0, 0)))).float() for picture in opened])


def test_folders_are_classes(tmp_path):
    painted(tmp_path, "red_wall/1.png", (255, 0, 0))
    painted(tmp_path, "red_wall/2.png", (250, 0, 0))
    painted(tmp_path, "sea/1.png", (0, 0, 255))
    painted(tmp_path, "loose.png", (0, 255, 0))
    (tmp_path / "notes.txt").write_text("no picture")
    found = read_pictures(tmp_path, pixels, batch=3)
    assert [batch.shape[0] for batch in found.batches] == [3, 1]
    question = found.questions["class"]
    assert question.prompts == {"red_wall": ["a photo of a red wall."], "sea": ["a photo of a sea."]}
    assert sorted(question.labels.tolist()) == [-1, 0, 0, 1]
    assert found.groups is None
    assert len(read_pictures(tmp_path / "sea", pixels)) == 1
    assert len(read_pictures(tmp_path / "red_wall", pixels, most=1)) == 1


def test_pictures_are_read_from_lines(tmp_path):
    painted(tmp_path, "a.png", (255, 0, 0))
    painted(tmp_path, "b.png", (0, 0, 255))
    rows = [
        {"picture": "a.png", "labels": {"job": "nurse"}, "group": "x"},
        {"picture": "b.png", "labels": {"job": "pilot"}, "group": "y"},
    ]
    path = tmp_path / "some.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    found = read_pictures(path, pixels)
    assert found.groups == ["x", "y"]
    assert found.questions["job"].labels.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("{", "no JSON"),
        ('{"labels": {}}', "'picture'"),
        ('{"picture": "a.png", "colour": "red"}', "'picture'"),
        ('{"picture": "a.png", "labels": {"job": 3}}', "labels"),
        ('{"picture": "absent.png"}', "cannot be read"),
    ],
)
def test_a_row_that_cannot_be_used_is_refused_or_skipped_by_its_line(tmp_path, row, words, caplog):
    painted(tmp_path, "a.png", (255, 0, 0))
    good = json.dumps({"picture": "a.png"})
    path = tmp_path / "some.jsonl"
    path.write_text(f"{good}\n{row}\n{good}\n", encoding="utf-8")
    with pytest.raises(HeadwayError, match="line 2") as error:
        read_pictures(path, pixels)
    assert words in str(error.value)
    found = read_pictures(path, pixels, bad_rows="skip")
    assert len(found) == 2
    assert found.left_out[0].startswith("line 2")
    assert "line 2" in caplog.text


def test_bad_material_is_refused(tmp_path):
    with pytest.raises(ArgumentError, match="not there"):
        read_pictures(tmp_path / "absent", pixels)
    with pytest.raises(ArgumentError, match="without a picture"):
        read_pictures(tmp_path, pixels)
    with pytest.raises(ArgumentError, match="template"):
        read_pictures(tmp_path, pixels, template="a photo")
    with pytest.raises(ArgumentError, match="bad_rows"):
        read_bank(tmp_path / "x", bad_rows="drop")
    painted(tmp_path, "only/1.png", (255, 0, 0))
    with pytest.raises(ArgumentError, match="got one class, 'only'"):
        read_pictures(tmp_path, pixels)


@pytest.fixture
def untrained(monkeypatch, host, reader):
    monkeypatch.setattr(command, "attribute_clip", lambda: (host, reader))


def test_the_command_writes_the_page_and_prints_json(untrained, tmp_path):
    out = tmp_path / "out"
    given = ["diagnose", "concepts", "--count", "30", "--layers", "1", "--draws", "1", "--out", str(out)]
    done = runner.invoke(app, [*given, "--json"])
    assert done.exit_code == 0, done.output
    found = Concepts.from_json(done.stdout)
    assert found.run["pictures"] == "30 attribute scenes"
    assert Concepts.from_json((out / "concepts.json").read_text(encoding="utf-8")).to_json() == found.to_json()
    assert "something" in (out / "concepts.html").read_text(encoding="utf-8")
    told = runner.invoke(app, given)
    assert told.exit_code == 0, told.output
    assert "• " in told.stdout
    assert "Page:" in told.stdout


def test_another_clip_is_read_from_its_folder(host, tmp_path):
    pytest.importorskip("PIL")
    folder = tmp_path / "model"
    host.save_pretrained(folder)
    tiny.save_processor(folder)
    for i in range(4):
        painted(tmp_path, f"pictures/{'red' if i < 2 else 'blue'}/{i}.png", (255 - 40 * i, 60 * i, 80))
    (tmp_path / "bank.txt").write_text("something red\tcolour\na circle\tshape\nat the top\nsomething red\n")
    out = tmp_path / "out"
    given = ["diagnose", "concepts", str(folder), "--pictures", str(tmp_path / "pictures"), "--out", str(out)]
    given += ["--bank", str(tmp_path / "bank.txt"), "--texts", "2", "--layers", "1", "--draws", "1", "--json"]
    refused = runner.invoke(app, given)
    assert refused.exit_code != 0
    assert isinstance(refused.exception, HeadwayError) or "line 4" in refused.output
    done = runner.invoke(app, [*given, "--bad-rows", "skip"])
    assert done.exit_code == 0, done.output
    found = Concepts.from_json(done.stdout)
    assert found.run["pictures"] == "4 pictures of pictures"
    assert found.warnings[0].startswith("1 texts could not be used")
    assert "class" in found.base["accuracy"]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["some/clip"], "--pictures: got none"),
        (["--count", "1"], "--count: got 1"),
        (["--bad-rows", "drop"], "--bad-rows"),
        (["--layers", "0"], "layers: got 0"),
        (["--top", "0"], "top: got 0"),
        (["--rank", "0"], "rank: got 0"),
        (["--texts", "0"], "texts: got 0"),
    ],
)
def test_the_command_refuses_before_any_work(untrained, tmp_path, given, words):
    done = runner.invoke(app, ["diagnose", "concepts", *given, "--out", str(tmp_path / "out")])
    assert done.exit_code != 0
    assert words in str(done.exception) + done.output
    assert not (tmp_path / "out" / "concepts.html").exists()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--pictures", "."], "knows its own scenes"),
        (["some/clip", "--pictures", "no/such/folder"], "not there"),
        (["some/clip", "--pictures", ".", "--template", "a photo"], "template"),
        (["--neutral", "no-such-file"], "--neutral: got no-such-file, which cannot be read"),
        (["--neutral", "/dev/null"], "without a prompt"),
        (["--bank", "no-such-file"], "--bank: got no-such-file, which cannot be read"),
    ],
)
def test_nothing_is_trained_or_loaded_for_arguments_that_cannot_be_used(monkeypatch, tmp_path, given, words):
    for name in ("attribute_clip", "load"):
        monkeypatch.setattr(command, name, lambda *_, **__: pytest.fail("a model was made"))
    done = runner.invoke(app, ["diagnose", "concepts", *given, "--out", str(tmp_path / "out")])
    assert isinstance(done.exception, HeadwayError), done.output
    assert words in str(done.exception)


def test_groups_and_neutral_prompts_of_a_file_are_measured(host, tmp_path):
    pytest.importorskip("PIL")
    folder = tmp_path / "model"
    host.save_pretrained(folder)
    tiny.save_processor(folder)
    rows = []
    for i in range(6):
        painted(tmp_path, f"{i}.png", (255 - 40 * i, 60 * i % 256, 80))
        rows.append({"picture": f"{i}.png", "group": "even" if i % 2 else "odd"})
    manifest = tmp_path / "some.jsonl"
    (tmp_path / "bank.txt").write_text("something red\tcolour\na circle\tshape\nat the top\n", encoding="utf-8")
    (tmp_path / "neutral.txt").write_text("a circle\n\na square\n", encoding="utf-8")
    given = ["diagnose", "concepts", str(folder), "--pictures", str(manifest), "--bank", str(tmp_path / "bank.txt")]
    given += ["--neutral", str(tmp_path / "neutral.txt"), "--texts", "1", "--layers", "1", "--draws", "1", "--json"]
    manifest.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    done = runner.invoke(app, [*given, "--top", "2", "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    skew = Concepts.from_json(done.stdout).base["skew"]
    assert set(skew["prompts"]) == {"a circle", "a square"}
    assert all(sum(one["counts"].values()) == 2 for one in skew["prompts"].values())
    every = runner.invoke(app, [*given, "--out", str(tmp_path / "out")])
    assert any("every list holds them all" in one for one in Concepts.from_json(every.stdout).warnings)
    del rows[3]["group"]
    manifest.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    refused = runner.invoke(app, [*given, "--out", str(tmp_path / "out")])
    assert "give a JSONL with a 'group' in every row" in str(refused.exception)


def test_a_set_that_holds_a_whole_layer_is_told(host, tokenise, bank, found):
    one_layer = audit(
        host, tokenise, scenes(20, seed=1), bank, settings=Settings(layers=1, draws=1),
        labeller=lambda texts: "anything", judges={"all": lambda concept, text: True},
    )  # fmt: skip
    (told,) = (one for one in one_layer.warnings if "every head of a layer" in one)
    assert told.endswith("high, concept: anything.")
    whole = {e.label for e in found.effects for at in (2, 3) if sum(layer == at for layer, _ in e.heads) == 8}
    assert any("every head of a layer" in one for one in found.warnings) == bool(whole)


def test_the_page_holds_the_text_as_text():
    page = made().to_html()
    assert "<img src=x" not in page
    assert "<b>shape</b>" not in page
    assert "\\u003cimg" in page
