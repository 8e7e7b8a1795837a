"""Thought Anchors: which sentences of a chain of thought the rest, and the answer, hang on.

    rollouts     draw each sentence anew and see how final answers change         (black box)
    receivers    heads in which many later sentences look back at a few            (white box)
    suppression  hide one sentence and see which later predictions change          (causal)

Paper: Thought Anchors: Which LLM Reasoning Steps Matter?, arXiv 2506.19143. `sentences` makes the trace, `sampling`,
`rollouts`, `answers`, `similarity` and `importance` are the first method, `receivers` and `ablation` the second,
`suppression` the third; `graph` compares them, `categories` says what sentences do. Where the released code differs is
told in each module.
"""

from __future__ import annotations

from headway.card import Card
from headway.methods.diagnosis.thought_anchors.ablation import Ablation, ablate
from headway.methods.diagnosis.thought_anchors.answers import (
    NO_ANSWER,
    answer_reader,
    boxed_answer,
    normalised,
    pattern_answer,
    stated_answer,
)
from headway.methods.diagnosis.thought_anchors.categories import (
    CATEGORIES,
    Label,
    by_category,
    label_prompt,
    model_labels,
    parse_labels,
    rule_labels,
)
from headway.methods.diagnosis.thought_anchors.graph import (
    Edge,
    agreement,
    concordance,
    edge_auroc,
    edge_marks,
    mean_attention,
    mean_auroc,
    nearness,
    outgoing,
    strongest_edges,
)
from headway.methods.diagnosis.thought_anchors.importance import (
    Effect,
    Importance,
    effect,
    sentence_importance,
    sentence_to_sentence,
    settled_starts,
)
from headway.methods.diagnosis.thought_anchors.receivers import (
    kurtosis,
    layered_maps,
    mean_kurtosis,
    position_null,
    receiver_heads,
    receiver_scores,
    sentence_maps,
    split_half_reliability,
    vertical_scores,
)
from headway.methods.diagnosis.thought_anchors.rollouts import Cost, Rollout, RolloutCache, Sampler, collect, estimate
from headway.methods.diagnosis.thought_anchors.sampling import LocalSampler
from headway.methods.diagnosis.thought_anchors.sentences import Prefix, Trace, read_trace
from headway.methods.diagnosis.thought_anchors.similarity import exact_encoder, sentence_encoder
from headway.methods.diagnosis.thought_anchors.suppression import (
    Suppression,
    divergence,
    row_normalised,
    sentence_effects,
    suppression_matrix,
)

CARD = Card(
    slug="thought-anchors",
    title="Thought Anchors: Which LLM Reasoning Steps Matter?",
    year=2025,
    arxiv="2506.19143",
    family="diagnosis",
    stages=("Observer", "Editor"),
    needs=("a causal language model that generates", "a sentence encoder for counterfactual importance"),
    knobs={
        "rollouts": "continuations drawn for each sentence (paper: 100)",
        "temperature": "of sampling and of the compared distributions (0.6)",
        "different_below": "cosine under which a resampled sentence differs (0.8)",
        "proximity": "sentences this near are not looked back at (4)",
        "top": "how many receiver heads (20)",
        "depth_control": "ranks in place of attention, so that short rows weigh no more",
        "baseline": "full distributions, or top_p of each with the rest as one event",
    },
    summary="Finds the sentences of a chain of thought that its later sentences and its answer depend on.",
)

__all__ = [
    "CARD",
    "CATEGORIES",
    "NO_ANSWER",
    "Ablation",
    "Cost",
    "Edge",
    "Effect",
    "Importance",
    "Label",
    "LocalSampler",
    "Prefix",
    "Rollout",
    "RolloutCache",
    "Sampler",
    "Suppression",
    "Trace",
    "ablate",
    "agreement",
    "answer_reader",
    "boxed_answer",
    "by_category",
    "collect",
    "concordance",
    "divergence",
    "edge_auroc",
    "edge_marks",
    "effect",
    "estimate",
    "exact_encoder",
    "kurtosis",
    "label_prompt",
    "layered_maps",
    "mean_attention",
    "mean_auroc",
    "mean_kurtosis",
    "model_labels",
    "nearness",
    "normalised",
    "outgoing",
    "parse_labels",
    "pattern_answer",
    "position_null",
    "read_trace",
    "receiver_heads",
    "receiver_scores",
    "row_normalised",
    "rule_labels",
    "sentence_effects",
    "sentence_encoder",
    "sentence_importance",
    "sentence_maps",
    "sentence_to_sentence",
    "settled_starts",
    "split_half_reliability",
    "stated_answer",
    "strongest_edges",
    "suppression_matrix",
    "vertical_scores",
]
