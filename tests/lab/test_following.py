"""Sinks followed through a run: the log has what a look afterwards finds, and the run is the one without it."""

from __future__ import annotations

import pytest
import torch

from headway.errors import ArgumentError
from headway.lab import Arm, SinkCourse
from headway.lab.training import build
from headway.methods.sinks.sink_emergence import measure_sinks
from headway.train import train

ARM = Arm(name="followed", width=32, layers=2, heads=2, length=24)


def ids(seed, sequences=6):
    return torch.randint(0, 256, (sequences, 24), generator=torch.Generator().manual_seed(seed))


def batch(number):
    tokens = ids(number, 4)
    return {"input_ids": tokens, "labels": tokens}


def trained(*callbacks, steps=5):
    model = build(ARM, 0)
    return model, train(model, batch, steps=steps, learning_rate=5e-2, callbacks=list(callbacks))


def test_the_log_has_what_a_look_at_the_model_finds():
    judged = ids(100)
    # An ε that splits the heads of this model, so that the rates are neither all 0 nor all 1.
    model, run = trained(SinkCourse(judged, every=2, epsilon=0.14))
    assert [row["step"] for row in run.rows if "sink_1" in row] == [2, 4, 5]
    found = measure_sinks(model.eval(), judged, epsilon=0.14, length=None, special_ids=())
    last = run.rows[-1]
    assert last["sink_1"] == pytest.approx(float(found.rates.overall[0]))
    assert (last["sink_position"], last["sink_strongest"]) == pytest.approx(found.strongest)
    assert 0 < last["sink_strongest"] < 1


def test_watching_changes_nothing():
    watched, _ = trained(SinkCourse(ids(100), every=1))
    alone, _ = trained()
    for (name, one), other in zip(watched.named_parameters(), alone.parameters(), strict=True):
        assert torch.equal(one, other), name
    assert watched.training == alone.training


@pytest.mark.parametrize("wrong", [torch.zeros(3, dtype=torch.long), torch.zeros(0, 4, dtype=torch.long)])
def test_ids_that_are_no_sequences(wrong):
    with pytest.raises(ArgumentError, match=r"ids: got shape"):
        SinkCourse(wrong, every=1)


def test_every_no_step():
    with pytest.raises(ArgumentError, match="every: got 0"):
        SinkCourse(ids(0), every=0)
