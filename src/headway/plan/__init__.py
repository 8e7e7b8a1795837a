"""The cost model: what a method would save on a model at a length, on named hardware, before anything is run."""

from __future__ import annotations

from headway.plan.cost import Part, Phase, kv_bytes, prompt, step, weight_bytes
from headway.plan.footprint import Footprint, LayerUse, footprint
from headway.plan.hardware import HARDWARE, Hardware, hardware
from headway.plan.planning import Plan, Row, parse_tokens, plan
from headway.plan.shape import Layer, ModelShape, config_from_sizes, config_of, shape_names, shape_of

__all__ = [
    "HARDWARE",
    "Footprint",
    "Hardware",
    "Layer",
    "LayerUse",
    "ModelShape",
    "Part",
    "Phase",
    "Plan",
    "Row",
    "config_from_sizes",
    "config_of",
    "footprint",
    "hardware",
    "kv_bytes",
    "parse_tokens",
    "plan",
    "prompt",
    "shape_names",
    "shape_of",
    "step",
    "weight_bytes",
]
