"""DHSA: prompts are cut into chunks of varying length, and each block of queries reads the chunks that score highest.

    S_ic = q̄_i · k_c ,   k_c = √n_c · mean(keys of chunk c)
    S_ij = S_i,chunk(j) ,   out_i = softmax attention over { N_b keys of highest S_ij } ∪ local ∪ global, inside N_b

Chunks end where the keys change: a small trained network says so (`Predicted`), the label it is trained on
(`Oracle`: dense attention treats both sides differently), key similarity, separators, or a fixed size. Without training
`Similarity` is what there is, so it is the default; the paper's method is `DHSA(boundaries=Predicted(predictor=…))`.
Chunks do not fit a grid of blocks, so what runs are lists of keys, one per block of queries.

Paper: Long-Context Modeling with Dynamic Hierarchical Sparse Attention for On-Device LLMs, arXiv 2510.24606.

Where paper and released code differ: the code scores fixed blocks of queries (`queries="blocks"`, default), the paper
chunks of queries with a choice per row ("chunks"). The code averages over heads and makes one choice for all
(`heads="mean"`); here each KV head chooses ("kv"). The code reads everything when it generates (`decode="dense"`); the
default follows the paper: generated tokens form one growing chunk, the current one stands alone. The code's lists may
name a key twice, which then counts twice, and lose real picks to its global tokens; here lists are sets. Equal scores
go to later keys, the same in every run. Boundaries keep their distance to both ends of a prompt as well, and the
question at its end begins exactly `suffix` tokens before the end (one later in the code). The later block kernels of
the repository, without learned boundaries, are not part of this method.
"""

from __future__ import annotations

from headway.card import Card
from headway.methods.long_context.dhsa.boundaries import (
    BoundarySource,
    Fixed,
    Given,
    Oracle,
    Piece,
    Predicted,
    Separators,
    Similarity,
    select_gaps,
    separator_ids,
    window_similarity,
)
from headway.methods.long_context.dhsa.choosing import choose_for_row, choose_tokens, key_lists
from headway.methods.long_context.dhsa.chunks import NORMS, Chunks, chunks_of, normalised
from headway.methods.long_context.dhsa.labels import attention_ratio, boundary_targets
from headway.methods.long_context.dhsa.predictor import BoundaryPredictor
from headway.methods.long_context.dhsa.selector import DHSA, at_budget
from headway.methods.long_context.dhsa.training import (
    BoundaryRecorder,
    BoundaryScores,
    Recorded,
    Trained,
    focal_loss,
    record_boundaries,
    score_predictor,
    train_predictor,
)

CARD = Card(
    slug="dhsa",
    title="Long-Context Modeling with Dynamic Hierarchical Sparse Attention for On-Device LLMs",
    year=2025,
    arxiv="2510.24606",
    family="long_context",
    stages=("Selector",),
    needs=("a causal host", "a predictor trained on the model for the paper's boundaries"),
    knobs={
        "boundaries": "where chunks come from: Predicted, Oracle, Similarity, Separators, Fixed, Given",
        "budget": "keys that a query reads",
        "block": "queries that share a list of keys",
        "norm": "how the sum of a chunk's keys is scaled: sqrt, mean, sum",
        "heads": "every KV head chooses, or all together",
    },
    summary="Cuts the prompt into chunks of varying length and reads those whose mean key, scaled by √n, fits the "
    "query.",
)

__all__ = [
    "CARD",
    "DHSA",
    "NORMS",
    "BoundaryPredictor",
    "BoundaryRecorder",
    "BoundaryScores",
    "BoundarySource",
    "Chunks",
    "Fixed",
    "Given",
    "Oracle",
    "Piece",
    "Predicted",
    "Recorded",
    "Separators",
    "Similarity",
    "Trained",
    "at_budget",
    "attention_ratio",
    "boundary_targets",
    "choose_for_row",
    "choose_tokens",
    "chunks_of",
    "focal_loss",
    "key_lists",
    "normalised",
    "record_boundaries",
    "score_predictor",
    "select_gaps",
    "separator_ids",
    "train_predictor",
    "window_similarity",
]
