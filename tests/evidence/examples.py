"""Small recipes and claims with known verdicts."""

from __future__ import annotations

from headway.evidence import Claim, Context, Measurement, PaperValue, Recipe, at_least, at_most

CRITERIA = {"larger": at_least(1.3), "smaller": at_most(0.5, requires=at_least(0.9, of="accuracy"))}


def claim(**changes: object) -> Claim:
    """A claim that holds: 1.5 [1.4, 1.6] against ≥ 1.3."""
    fields = {
        "id": "larger",
        "statement": "The method is larger.",
        "paper": PaperValue("1.7", "7B model", "Table 2"),
        "measured": Measurement(1.5, 1.4, 1.6, n=20, seeds=(0, 1), unit="×"),
        "criterion": CRITERIA["larger"],
    }
    return Claim(**{**fields, **changes})


def two_claims(context: Context) -> list[Claim]:
    """One claim that holds, one whose gate is not met."""
    gated = claim(
        id="smaller",
        statement="The error is smaller.",
        measured=Measurement(0.1),
        criterion=CRITERIA["smaller"],
        others={"accuracy": Measurement(0.4)},
        notes="The toy did not learn.",
    )
    return [claim(), gated]


def recipe(**changes: object) -> Recipe:
    """A recipe that returns `two_claims`."""
    fields = {"slug": "planted-paper", "title": "A planted paper", "run": two_claims, "criteria": CRITERIA}
    return Recipe(**{**fields, **changes})
