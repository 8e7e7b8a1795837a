"""Tests of explanations of attention sinks. Each returns a `Finding`: a number, a verdict and a sentence."""

from __future__ import annotations

from headway.methods.sinks.sink_survey.interpretation.bias import (
    ConstantSink,
    contributions,
    implicit_bias,
    mean_cosine,
)
from headway.methods.sinks.sink_survey.interpretation.circuit import (
    CircuitTrace,
    outlier_circuit,
    trace_circuit,
    without_coordinates,
)
from headway.methods.sinks.sink_survey.interpretation.finding import NO, UNCLEAR, YES, Finding
from headway.methods.sinks.sink_survey.interpretation.geometry import (
    drift_to_sink,
    geometry_of_model,
    key_apart,
    positional_direction,
    positional_part,
)
from headway.methods.sinks.sink_survey.interpretation.no_op import (
    no_op,
    no_op_of_model,
    normaliser_swap,
    sink_contribution,
)
from headway.methods.sinks.sink_survey.interpretation.others import (
    dormant_head,
    matrix_entropy,
    mix_compress_refine,
    over_mixing,
    rescaling,
    rotary_decay,
    rotary_decay_of_model,
    spectral_energy,
    visibility,
)

__all__ = [
    "NO",
    "UNCLEAR",
    "YES",
    "CircuitTrace",
    "ConstantSink",
    "Finding",
    "contributions",
    "dormant_head",
    "drift_to_sink",
    "geometry_of_model",
    "implicit_bias",
    "key_apart",
    "matrix_entropy",
    "mean_cosine",
    "mix_compress_refine",
    "no_op",
    "no_op_of_model",
    "normaliser_swap",
    "outlier_circuit",
    "over_mixing",
    "positional_direction",
    "positional_part",
    "rescaling",
    "rotary_decay",
    "rotary_decay_of_model",
    "sink_contribution",
    "spectral_energy",
    "trace_circuit",
    "visibility",
    "without_coordinates",
]
