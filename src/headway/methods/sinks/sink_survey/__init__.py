"""The survey of attention sinks as a toolkit: find them, use them, explain them.

Paper: Attention Sink in Transformers: A Survey on Utilization, Interpretation, and Mitigation, arXiv 2604.10098. By its
chapters:

- detection: `metrics`, `quantisation` (and Sink_k^ε in `sink_emergence`);
- utilization: cache policies `H2O`, `A2SF`, `KeyDiff`, `OrthoRank`, `IntactKV`; selector `SinkMask`; editors
  `LogitLever`, `HeadBroadcast`, `Redistribution`, `VisualRedistribution`; `registers`, `prefix` and `losses`.
  StreamingLLM, DuoAttention and ACT, which the survey also lists, are methods of their own;
- interpretation: tests that return a number and a verdict;
- mitigation: the normalisers of `headway.kernels.normalizers`, and `headway lab sinks`, which trains them; beside the
  weights of a trained host `SinkAdapter`; at inference `norm_mask`.
"""

from __future__ import annotations

from headway.card import Card
from headway.methods.sinks.sink_survey.a2sf import A2SF
from headway.methods.sinks.sink_survey.adapters import SinkAdapter
from headway.methods.sinks.sink_survey.broadcast import HeadBroadcast, densest_heads, sink_density
from headway.methods.sinks.sink_survey.h2o import H2O
from headway.methods.sinks.sink_survey.intactkv import IntactKV
from headway.methods.sinks.sink_survey.keydiff import KeyDiff, key_difference
from headway.methods.sinks.sink_survey.lever import LogitLever, lever, tune_lever
from headway.methods.sinks.sink_survey.losses import (
    attraction,
    position_distillation,
    self_distilled_registers,
    sink_divergence,
)
from headway.methods.sinks.sink_survey.masks import SinkMask
from headway.methods.sinks.sink_survey.metrics import (
    CUMULATIVE_THRESHOLD,
    KURTOSIS_EPS,
    MASSIVE_MAGNITUDE,
    MASSIVE_RATIO,
    cosine_to_mean,
    cumulative_sinks,
    first_token_share,
    infinity_norm,
    kurtosis,
    massive_activations,
    mean_over,
    norm_ratio,
    row_entropy,
    token_mask,
    top_to_median,
)
from headway.methods.sinks.sink_survey.norm_mask import massive_dimensions, norm_mask
from headway.methods.sinks.sink_survey.orthorank import OrthoRank, orthogonality
from headway.methods.sinks.sink_survey.prefix import PrefixTokens, activation_error, prefix_search
from headway.methods.sinks.sink_survey.quantisation import QuantisationError, quantisation_error, quantise
from headway.methods.sinks.sink_survey.redistribution import (
    Redistribution,
    VisualRedistribution,
    dimension_sinks,
    redistribute_to,
    redistribute_to_image,
)
from headway.methods.sinks.sink_survey.registers import (
    find_register_neurons,
    moved_to,
    register_behind,
    run_with_register,
)

CARD = Card(
    slug="sink-survey",
    title="Attention Sink in Transformers: A Survey on Utilization, Interpretation, and Mitigation",
    year=2026,
    arxiv="2604.10098",
    family="sinks",
    stages=("Selector", "Editor"),
    needs=("weights", "keys", "values", "hidden states"),
    knobs={
        "threshold": "how many times the mean received mass makes a sink",
        "magnitude": "smallest absolute value of a massive activation",
        "ratio": "how many times the median a massive activation is at least",
    },
    summary="Finds attention sinks and their marks, puts them to use, and tests explanations of them.",
)

__all__ = [
    "A2SF",
    "CARD",
    "CUMULATIVE_THRESHOLD",
    "H2O",
    "KURTOSIS_EPS",
    "MASSIVE_MAGNITUDE",
    "MASSIVE_RATIO",
    "HeadBroadcast",
    "IntactKV",
    "KeyDiff",
    "LogitLever",
    "OrthoRank",
    "PrefixTokens",
    "QuantisationError",
    "Redistribution",
    "SinkAdapter",
    "SinkMask",
    "VisualRedistribution",
    "activation_error",
    "attraction",
    "cosine_to_mean",
    "cumulative_sinks",
    "densest_heads",
    "dimension_sinks",
    "find_register_neurons",
    "first_token_share",
    "infinity_norm",
    "key_difference",
    "kurtosis",
    "lever",
    "massive_activations",
    "massive_dimensions",
    "mean_over",
    "moved_to",
    "norm_mask",
    "norm_ratio",
    "orthogonality",
    "position_distillation",
    "prefix_search",
    "quantisation_error",
    "quantise",
    "redistribute_to",
    "redistribute_to_image",
    "register_behind",
    "row_entropy",
    "run_with_register",
    "self_distilled_registers",
    "sink_density",
    "sink_divergence",
    "token_mask",
    "top_to_median",
    "tune_lever",
]
