"""CLIP concept consistency: what each attention head of a CLIP writes, in words; and what silencing it costs.

    e / ‖e‖ = Σ heads + Σ MLPs        TextSpan: m texts per head        CCS = how many of them fit one concept

Heads whose texts agree carry accuracy and concept-specific skill, and also bias. `decompose` splits embeddings,
`gather` does so for many pictures, `text_span` and `describe` find texts, `score` labels and judges, `pruned` silences
heads at the door, `retrieval_skews` measures bias.

Papers: Pruning the Paradox, arXiv 2503.11103; the decomposition and TextSpan from arXiv 2310.05916. Differences: the
released pruning code has fixed head lists and no code for the score; controls here are as many heads of the same
layers; the four defects of its MaxSkew are mended (see `bias`).
"""

from __future__ import annotations

from headway.card import Card
from headway.methods.diagnosis.clip_ccs.bank import TextBank, embed_bank, tokeniser_of
from headway.methods.diagnosis.clip_ccs.bias import Skew, chance_skew, groups_of, mean_max_skew, retrieval_skews, skew
from headway.methods.diagnosis.clip_ccs.consistency import (
    HeadConcept,
    by_class,
    concentrated_ratio,
    consistency_class,
    histogram,
    of_concept,
    score_head,
)
from headway.methods.diagnosis.clip_ccs.decomposition import Decomposition, ReconstructionError, decompose, embed
from headway.methods.diagnosis.clip_ccs.judges import Lexicon, PromptJudge, PromptLabeller, lexicon, parse_answer
from headway.methods.diagnosis.clip_ccs.pruning import class_vectors, equal_count, layer_matched, pruned, right
from headway.methods.diagnosis.clip_ccs.scoring import Contributions, describe, gather, last_layers, score
from headway.methods.diagnosis.clip_ccs.textspan import TextSpan, completeness, text_span
from headway.methods.diagnosis.clip_ccs.tiny import attribute_clip
from headway.methods.diagnosis.clip_ccs.towers import Tower, tower

CARD = Card(
    slug="clip-ccs",
    title="Pruning the Paradox: How CLIP's Most Informative Heads Enhance Performance While Amplifying Bias",
    year=2025,
    arxiv="2503.11103",
    family="diagnosis",
    stages=("Observer", "Editor"),
    needs=("a CLIP model (two towers), or a DINOv2 encoder for the decomposition alone",),
    knobs={
        "texts": "texts per head (5)",
        "rank": "directions of a head that texts are projected on (80, at most its dimension)",
        "layers": "layers whose heads are described (the last 4)",
    },
    summary="Describes each head of a CLIP by texts, scores how far they share one concept, and measures what "
    "silencing the head costs in accuracy and saves in bias.",
)

__all__ = [
    "CARD",
    "Contributions",
    "Decomposition",
    "HeadConcept",
    "Lexicon",
    "PromptJudge",
    "PromptLabeller",
    "ReconstructionError",
    "Skew",
    "TextBank",
    "TextSpan",
    "Tower",
    "attribute_clip",
    "by_class",
    "chance_skew",
    "class_vectors",
    "completeness",
    "concentrated_ratio",
    "consistency_class",
    "decompose",
    "describe",
    "embed",
    "embed_bank",
    "equal_count",
    "gather",
    "groups_of",
    "histogram",
    "last_layers",
    "layer_matched",
    "lexicon",
    "mean_max_skew",
    "of_concept",
    "parse_answer",
    "pruned",
    "retrieval_skews",
    "right",
    "score",
    "score_head",
    "skew",
    "text_span",
    "tokeniser_of",
    "tower",
]
