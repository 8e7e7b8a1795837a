"""Claims: the verdict is computed, stored, and computed again."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import torch

from headway.errors import ArgumentError
from headway.evidence import Claim, EditedRecordError, Measurement, PaperValue, Verdict, at_least, ratio_at_least

from .examples import claim


def test_a_claim_survives_json():
    original = claim(
        baseline=Measurement(1.0), others={"loss": Measurement(0.1, 0.05, 0.2, n=3)}, details={"a": [1, 2]}
    )
    assert Claim.from_json(original.to_json()) == original


def test_a_verdict_edited_by_hand_is_detected():
    data = json.loads(claim(measured=Measurement(0.2, 0.1, 0.3)).to_json())
    assert data["verdict"] == "fails"
    data["verdict"] = "holds"
    with pytest.raises(EditedRecordError, match=r"'larger'.*says 'holds'.*give 'fails'.*edited by hand"):
        Claim.from_json(json.dumps(data))


def test_a_measurement_edited_by_hand_changes_the_verdict_and_is_detected():
    data = claim().to_dict()
    data["measured"]["low"] = 1.2
    with pytest.raises(EditedRecordError, match="inconclusive"):
        Claim.from_dict(data)


def test_nothing_accepts_a_verdict():
    with pytest.raises(TypeError):
        claim(verdict=Verdict.HOLDS)
    with pytest.raises((TypeError, ValueError), match="verdict"):
        dataclasses.replace(claim(), verdict=Verdict.FAILS)
    with pytest.raises(dataclasses.FrozenInstanceError):
        claim().verdict = Verdict.FAILS


def test_replacing_a_measurement_computes_the_verdict_again():
    assert dataclasses.replace(claim(), measured=Measurement(0.1)).verdict is Verdict.FAILS


def test_a_criterion_that_reads_a_missing_quantity_is_an_error_when_the_claim_is_made():
    with pytest.raises(ArgumentError, match="'baseline'"):
        claim(criterion=ratio_at_least(1.3))
    with pytest.raises(ArgumentError, match=r"'accuracies'.*Did you mean 'accuracy'"):
        claim(criterion=at_least(1, of="accuracies"), others={"accuracy": Measurement(1)})


def test_details_become_plain_data():
    details = claim(details={"tensor": torch.ones(2), "array": np.arange(2), 3: (np.float32(0.5), math.nan)}).details
    assert details == {"tensor": [1.0, 1.0], "array": [0, 1], "3": [0.5, None]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"id": "Has Spaces"}, "id: got 'Has Spaces'"),
        ({"id": "../up"}, "id: got"),
        ({"statement": " "}, "statement"),
        ({"others": {"measured": Measurement(1)}}, "reserved"),
        ({"details": {"model": {"weights": object()}}}, r"details of larger\['model'\]\['weights'\]: got object"),
    ],
)
def test_bad_fields_are_named(changes, message):
    with pytest.raises(ArgumentError, match=message):
        claim(**changes)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"id": "x"}', '{"id": "x", "statement": "s", "paper": 3}'])
def test_other_text_raises_argument_error(text):
    with pytest.raises(ArgumentError):
        Claim.from_json(text)


def test_paper_value_needs_only_a_value():
    assert PaperValue("18.18 %").where == ""
