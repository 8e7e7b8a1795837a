"""The page of `headway diagnose roles`: marks of the log and of the model's replies, drift by layer and head, what
silencing focal heads does, and what training on their layers mends. Its shell is `headway.diagnose.page`."""

from __future__ import annotations

from typing import Any

from headway.diagnose.page import diagnosis_page
from headway.diagnose.roles.findings import gains
from headway.diagnose.roles.result import Roles
from headway.methods.diagnosis.diagnose_localize_align import DIMENSIONS
from headway.pages.plain import rounded

#: Turns that the page lists, those with the lowest marks; all of them stand in the JSON.
LISTED = 200
#: Characters of a reply that the page shows.
SHOWN = 600


def render(found: Roles) -> str:
    """The page as one self-contained HTML file, without any network access."""
    sections = []
    if found.log is not None:
        sections += [("marks", "Role adherence"), ("turns", "Turns")]
    if found.replies is not None:
        sections.append(("replies", "The model's replies"))
    if found.localisation is not None:
        sections += [("heads", "Focal heads"), ("controls", "Controls")]
    if found.alignment is not None:
        sections.append(("alignment", "Alignment"))
    return diagnosis_page(found, "roles", about="roles", counts=_counts(found), sections=sections, data=payload(found))


def payload(found: Roles) -> dict[str, Any]:
    """What the scripts read."""
    return rounded(
        {
            "dimensions": DIMENSIONS,
            "log": _marks(found.log),
            "replies": _marks(found.replies),
            "heads": found.localisation,
            "alignment": _alignment(found.alignment),
        }
    )


def _counts(found: Roles) -> list[str]:
    told = []
    if found.log is not None:
        conversations = {(turn["conversation"], turn["condition"]) for turn in found.log["turns"]}
        told.append(f"{len(found.log['turns'])} turns of {len(conversations)} conversations")
    if found.localisation is not None:
        told.append(f"{len(found.localisation['items'])} conflicts, {len(found.localisation['held_out'])} held out")
    return told


def _marks(marks: dict[str, Any] | None) -> dict[str, Any] | None:
    if marks is None:
        return None
    turns = sorted(marks["turns"], key=_lowest)[:LISTED]
    return {
        **marks,
        "turns": [{**turn, "reply": _shortened(turn["reply"])} for turn in turns],
        "all": len(marks["turns"]),
    }


def _lowest(turn: dict[str, Any]) -> float:
    return min((one["value"] for one in turn["marks"].values() if one["value"] is not None), default=0.0)


def _alignment(found: dict[str, Any] | None) -> dict[str, Any] | None:
    if found is None:
        return None

    def gain(row: dict[str, Any], seen: bool, condition: str) -> dict[str, Any] | None:
        measured = gains(found, row, seen=seen, condition=condition)
        return None if measured is None else measured.to_dict()

    rows = [
        {
            "name": row["layers_of"],
            "layers": row["layers"],
            "parameters": row["parameters"],
            "losses": row["losses"],
            "seen": gain(row, True, "conflict"),
            "unseen": gain(row, False, "conflict"),
            "agreement": gain(row, True, "neutral"),
        }
        for row in found["rows"]
    ]
    return {"rows": rows, "steps": found["steps"], "weights": found["weights"]}


def _shortened(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"
