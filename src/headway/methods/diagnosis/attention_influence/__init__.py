"""AttentionInfluence: which texts need a model's retrieval heads.

    heads = retrieval heads on generated key-value questions ;   AI(x) = (L_masked(x) − L_base(x)) / L_base(x)

Per domain, the texts with the largest AI are kept for training. `detection` finds the heads, `influence` scores texts,
`ranking` selects; the questions are those of `tasks.retrieval_probe`. A masked head weighs all visible keys alike: it
is not zeroed, and the key head that it shares with others stays.

Paper: AttentionInfluence: Adopting Attention Head Influence for Weak-to-Strong Pretraining Data Selection, arXiv
2505.07293; the retrieval score is that of Wu et al., arXiv 2404.15574. The paper has no code of its own; it writes the
weight of a masked head as 1/L over the whole sequence, which would look ahead in a causal model: here row t has
1/(t + 1).
"""

from __future__ import annotations

from headway.card import Card
from headway.methods.diagnosis.attention_influence.detection import (
    FRACTION,
    HeadScores,
    NoRetrievalHeadsError,
    detect_heads,
    measure_heads,
)
from headway.methods.diagnosis.attention_influence.influence import (
    CONTEXT,
    FLOOR,
    QUARANTINED,
    Influence,
    InfluenceScorer,
    TokenLosses,
    relative_rise,
)
from headway.methods.diagnosis.attention_influence.ranking import (
    SHARE,
    UNRANKED,
    DomainSummary,
    Ranking,
    rank_texts,
    repetition_share,
)

CARD = Card(
    slug="attention-influence",
    title="AttentionInfluence: Adopting Attention Head Influence for Weak-to-Strong Pretraining Data Selection",
    year=2025,
    arxiv="2505.07293",
    family="diagnosis",
    stages=("Observer", "Editor"),
    needs=("a causal language model that copies in context", "a tokenizer"),
    knobs={
        "threshold": "retrieval score from which a head counts, or",
        "fraction": "the share of heads with the highest scores (0.05 in the paper)",
        "context": "tokens per chunk of a long text",
        "share": "the part of each domain that is kept (0.2 in the paper)",
        "repetition_weight": "how much repetition inside a text is taken off its score",
    },
    summary="Scores texts by how much a model's loss on them rises when its retrieval heads are masked, and keeps the "
    "top of each domain.",
)

__all__ = [
    "CARD",
    "CONTEXT",
    "FLOOR",
    "FRACTION",
    "QUARANTINED",
    "SHARE",
    "UNRANKED",
    "DomainSummary",
    "HeadScores",
    "Influence",
    "InfluenceScorer",
    "NoRetrievalHeadsError",
    "Ranking",
    "TokenLosses",
    "detect_heads",
    "measure_heads",
    "rank_texts",
    "relative_rise",
    "repetition_share",
]
