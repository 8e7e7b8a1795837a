"""The laboratory: trains small models that differ in one thing, measures them alike, and puts them in one table.

from headway.lab import load_experiment, run_sinks
found = run_sinks(load_experiment("mitigation"), out="lab-out")
"""

from __future__ import annotations

from headway.lab.arms import Arm, Experiment, load_experiment, shipped_experiments
from headway.lab.following import SinkCourse
from headway.lab.result import ArmResult, SinkLab
from headway.lab.sinks import run_sinks

__all__ = [
    "Arm",
    "ArmResult",
    "Experiment",
    "SinkCourse",
    "SinkLab",
    "load_experiment",
    "run_sinks",
    "shipped_experiments",
]
