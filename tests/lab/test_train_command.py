"""`headway train` and `headway data tokenize`: what they write, print, and refuse."""

from __future__ import annotations

import json
import signal

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import headway
from headway.cli import app
from headway.errors import ArgumentError
from headway.lab.train_data import VALIDATION, parse_settings, parse_value
from headway.train import images, read_log
from headway.train.images import Images
from headway.train.regression import PiecewiseRegression, regression_loss
from tests.look.tiny import TEXT

SMALL = ["--width", "16", "--layers", "2", "--heads", "2", "--batch", "2", "--steps", "6"]


def call(*arguments: str) -> str:
    """Standard output of a command; errors are raised."""
    return CliRunner().invoke(app, [*map(str, arguments)], catch_exceptions=False, standalone_mode=False).stdout


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT * 6, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory, text):
    """A folder that `headway train lm` wrote, and what it printed."""
    out = tmp_path_factory.mktemp("run") / "run"
    return out, call("train", "lm", "--data", text, "--tokens", 48, "--out", out, "--json", *SMALL)


def test_a_run_writes_a_model_that_loads_and_generates(trained):
    out, printed = trained
    facts = json.loads(printed)
    assert facts == json.loads((out / "train.json").read_text())
    assert facts["steps"] == 6
    assert facts["tokens"] == 6 * 2 * 48
    model, tokenizer = headway.load(out)
    assert sum(p.numel() for p in model.parameters()) == facts["parameters"]
    ids = tokenizer("The door", return_tensors="pt")["input_ids"]
    assert model.generate(ids, max_new_tokens=4, do_sample=False).shape == (1, 12)


def test_what_was_trained_can_be_looked_at(trained, text, tmp_path):
    page = tmp_path / "look"
    call("look", trained[0], "--text", text, "--tokens", 40, "--out", page)
    assert (page / "look.html").stat().st_size > 10_000


@pytest.fixture
def at_step_3(monkeypatch):
    """Ctrl-C behind the third step of the first run; runs after it are left alone."""
    from headway.train import stepping

    step = stepping.Stepper.step

    def interrupted(self, run, callbacks):
        step(self, run, callbacks)
        if run.step == 3:
            monkeypatch.setattr(stepping.Stepper, "step", step)
            signal.raise_signal(signal.SIGINT)

    return lambda: monkeypatch.setattr(stepping.Stepper, "step", interrupted)


def goes_on_with_resume(options, out, whole, interrupt) -> None:
    """The command, interrupted and resumed, logs the losses of the run in `whole`."""
    options = [*options, "--out", out]
    interrupt()
    assert CliRunner().invoke(app, [*map(str, options)]).exit_code != 0
    assert len(read_log(out)) == 3
    with pytest.raises(ArgumentError, match="holds a run already"):
        call(*options)
    call(*options, "--resume")
    losses = [[row["loss"] for row in read_log(folder)] for folder in (out, whole)]
    assert losses[0] == losses[1]
    assert len(set(losses[0])) == len(losses[0]) > 3


def test_a_run_that_was_interrupted_goes_on_with_resume(tmp_path, text, trained, at_step_3):
    options = ["train", "lm", "--data", text, "--tokens", 48, *SMALL]
    goes_on_with_resume(options, tmp_path / "run", trained[0], at_step_3)


@pytest.mark.parametrize(
    "data",
    [
        "recall:pairs=2,gap=2",
        "key-value:pairs=2",
        "copy:count=4",
        "state:group=S3,count=8",
        "piecewise-regression:dim=2,segments=2,per_segment=4,queries=2",
    ],
)
def test_every_generated_task_trains_and_goes_on(tmp_path, data, at_step_3):
    options = ["train", "lm", "--mixer", "lightning", "--data", data, *SMALL]
    whole = tmp_path / "whole"
    facts = json.loads(call(*options, "--out", whole, "--json"))
    assert facts["data"].startswith(data.split(":")[0])
    assert "validation_loss" in facts
    goes_on_with_resume(options, tmp_path / "run", whole, at_step_3)


def test_images_go_on_with_resume(tmp_path, monkeypatch, at_step_3):
    pixels = torch.rand(60, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    made = Images(name="made", source="here", pixels=pixels, labels=torch.arange(60) % 3, classes=3)
    monkeypatch.setattr(images, "load_images", lambda name: made)
    options = ["train", "vit", "--patch", 2, "--width", 16, "--heads", 2, "--batch", 8, "--steps", 6]
    call(*options, "--out", tmp_path / "whole")
    goes_on_with_resume(options, tmp_path / "run", tmp_path / "whole", at_step_3)


def test_regression_trains_a_model_of_numbers_that_loads_and_passes_the_door(tmp_path):
    """Judged by the error of answering zero; a look, which reads texts, says that it cannot."""
    out = tmp_path / "run"
    data = "piecewise-regression:dim=2,segments=1,per_segment=12,queries=4,noise=0"
    printed = call(
        "train", "lm", "--mixer", "local_linear", "--option", "position=none", "--data", data, "--width", "16",
        "--layers", "1", "--heads", "2", "--batch", "32", "--steps", "80", "--learning-rate", "1e-2", "--out", out,
    )  # fmt: skip
    assert "(an answer of zero: 0.5000)" in printed
    facts = json.loads((out / "train.json").read_text())
    assert facts["sequences"] == 80 * 32
    assert facts["chance"] == 0.5
    assert facts["validation_loss"] < 0.3
    model, processor = headway.load(out)
    assert processor is None
    task = PiecewiseRegression(dim=2, segments=1, per_segment=12, queries=4, noise=0.0, rows=32)
    rows = task.held_out(VALIDATION)
    with torch.no_grad(), headway.capture(model, what=("weights",)) as captured:
        losses = [float(regression_loss(model, batch).value) for batch in rows]
    assert sum(losses) / VALIDATION == pytest.approx(facts["validation_loss"], rel=1e-4)
    (site,) = captured.result()
    weights = captured.result().calls(site)[0]["weights"]
    torch.testing.assert_close(weights.sum(-1), torch.ones(32, 2, 16))
    with pytest.raises(ArgumentError, match=r"numbers: got shape \(1, 3, 4\), expected \(batch, tokens, 5\)"):
        model(torch.zeros(1, 3, 4))
    with pytest.raises(ArgumentError, match="does not read text; choose a text model"):
        call("look", out, "--out", tmp_path / "look")


def test_token_files_are_made_once_and_used(tmp_path, text):
    printed = json.loads(call("data", "tokenize", text, "--out", tmp_path / "tokens", "--split", "line", "--json"))
    assert printed["tokenizer"] == "bytes"
    assert printed["vocabulary"] == 257
    facts = json.loads(
        call("train", "lm", "--data", tmp_path / "tokens", "--tokens", 32, "--out", tmp_path / "run", "--json", *SMALL)
    )
    assert f"{printed['tokens']:,} tokens" in facts["data"]
    assert not (tmp_path / "run" / "data").exists()
    assert "headway train lm --data" in call("data", "tokenize", text, "--out", tmp_path / "tokens", "--split", "line")


def test_generated_tasks_are_told_beside_their_chance(tmp_path):
    printed = call(
        "train", "lm", "--mixer", "softmax,lightning", "--normalizer", "softpick", "--option", "window=8",
        "--data", "recall:pairs=4,questions=1,gap=3", "--optimizer", "muon", "--out", tmp_path / "run", *SMALL,
    )  # fmt: skip
    assert "validation accuracy" in printed
    assert "(a guess: 25.0%)" in printed
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["mixer"] == ["softmax", "lightning"]
    assert config["mixer_options"] == {"softmax": {"window": 8, "normalizer": "softpick"}, "lightning": {}}
    assert config["vocab_size"] == 80


def test_images_are_classified(tmp_path, monkeypatch):
    pixels = torch.rand(60, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    made = Images(name="made", source="here", pixels=pixels, labels=torch.arange(60) % 3, classes=3)
    monkeypatch.setattr(images, "load_images", lambda name: made)
    facts = json.loads(
        call("train", "vit", "--patch", 2, "--width", 16, "--heads", 2, "--batch", 8, "--steps", 4, "--out",
             tmp_path / "run", "--json")
    )  # fmt: skip
    assert facts["images"] == 4 * 8
    assert facts["chance"] == pytest.approx(1 / 3)
    assert 0 <= facts["validation_accuracy"] <= 1


def test_an_image_classifier_comes_back_with_what_prepares_its_images(tmp_path, monkeypatch):
    """A grey picture through the saved processor is the pixels that the model was trained on, at any size of it; the
    door observes it, and a look, which reads texts, says that it cannot."""
    levels = torch.randint(0, 256, (60, 1, 4, 6), generator=torch.Generator().manual_seed(0))
    made = Images(name="made", source="here", pixels=levels / 255, labels=torch.arange(60) % 3, classes=3)
    monkeypatch.setattr(images, "load_images", lambda name: made)
    out = tmp_path / "run"
    call("train", "vit", "--patch", 2, "--width", 16, "--heads", 2, "--batch", 8, "--steps", 4, "--out", out, "--json")
    model, processor = headway.load(out)
    picture = Image.fromarray(levels[7, 0].numpy().astype("uint8"))
    prepared = processor(picture, return_tensors="pt")
    torch.testing.assert_close(prepared["pixel_values"], made.pixels[7:8], rtol=0, atol=1e-6)
    assert processor(picture.resize((60, 40)), return_tensors="pt")["pixel_values"].shape == (1, 1, 4, 6)
    with torch.no_grad(), headway.capture(model, what=("weights",)) as captured:
        assert model(**prepared).logits.shape == (1, 3)
    found = captured.result()
    assert len(list(found)) == model.config.layers
    for site in found:
        torch.testing.assert_close(found.calls(site)[0]["weights"].sum(-1), torch.ones(1, 2, 6))
    with pytest.raises(ArgumentError, match="does not read text; choose a text model"):
        call("look", out, "--out", tmp_path / "look")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--mixer", "lighning"], "--mixer: got 'lighning'.* Did you mean 'lightning'"),
        (["--mixer", "softmax,softmax,softmax"], "--mixer: got 3 names for 4 layers"),
        (["--normalizer", "softpik"], "--normalizer: got 'softpik'.* Did you mean 'softpick'"),
        (["--mixer", "lightning", "--normalizer", "softpick"], "--normalizer: got 'softpick', expected a mixer"),
        (["--option", "windw=3"], "--option: got 'windw'.* Did you mean 'window'"),
        (["--option", "window"], "--option: got 'window', expected name=value"),
        (["--heads", "3"], "--heads: got 3, expected a number that divides the width 128"),
        (["--data", "recal"], "data: got 'recal'.* Did you mean 'recall'.*Or give a file"),
        (["--data", "copy:counts=3"], "data copy: got 'counts'.* Did you mean 'count'"),
        (["--data", "piecewise-regression:dims=3"], "data piecewise-regression: got 'dims'.* Did you mean 'dim'"),
        (["--data", "piecewise-regresion"], "data: got 'piecewise-regresion'.* Did you mean 'piecewise-regression'"),
        (["--data", "copy:count"], "data: got 'count', expected name=value"),
        (["--schedule", "cosin"], "Did you mean 'cosine'"),
        (["--optimizer", "adam"], "--optimizer: got 'adam'.* Did you mean 'adamw'"),
        (["--learning-rate", "0"], "--learning-rate, --weight-decay: got 0.0"),
        (["--batch", "0"], "--batch: got 0"),
        (["--steps", "0"], "steps: got 0"),
        (["--mlp", "glu"], "mlp: got 'glu'"),
    ],
)
def test_what_cannot_be_used_is_named_before_anything_is_trained(tmp_path, options, words):
    with pytest.raises(ArgumentError, match=words):
        call("train", "lm", "--out", tmp_path / "run", "--data", "copy", *options)
    assert not (tmp_path / "run" / "log.jsonl").exists()


def test_values_of_settings_are_json_where_they_can_be():
    assert parse_settings("data", "pairs=4, group=S5,flag=true,key-length=2") == {
        "pairs": 4,
        "group": "S5",
        "flag": True,
        "key_length": 2,
    }
    assert parse_value("[1, 2]") == [1, 2]
    assert parse_value("softpick") == "softpick"
