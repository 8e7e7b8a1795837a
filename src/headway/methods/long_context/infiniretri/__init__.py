"""InfiniRetri: answers from a text of any length with a model of few positions, by the model's own attention.

The text is read in chunks, each behind the sentences kept so far and before the question. In each pass

    z_j = Σ_i ω_i² Σ_{|j' − j| < w/2} Σ_heads A_{i,j'} ,   ω_i = Σ_{j in question} A_{i,j}        i: question tokens

with A the attention of the last layer; the whole sentences that hold the K largest z are kept, as text, for the next
pass, and the answer is given from them. Cost is linear in the text, memory that of a chunk. It finds what is asked for:
it is no summary, and no pass sees two distant places together unless both were kept.

Paper: Infinite Retrieval: Attention Enhanced LLMs in Long-Context Processing, arXiv 2502.12962. The paper takes a plain
sum over question tokens (`weighting="sum"`); the released package weights them by ω², from the first pass alone
(default; `refresh=True` takes them anew). Of the package's defects, corrected here: full maps of every layer where
the question's rows of one are needed; eager attention and blank lines around template slots required; an even phrase
window shifted by half a token (`centred=False` gives it back); text found by string comparison; tokens decoded and
encoded again; no bound on what is kept (`overflow="raise"` refuses what exceeds it, as published runs must not);
temperature without effect; no record of what came from where. `keep="accumulate"` drops nothing while there is room;
the paper's "replace" forgets what one pass does not choose again. Keys and values are never carried; that mode of the
package needs fine-tuning by its authors' own word and is left out.

`InfiniRetri` wraps `generate`; `retrieve` and `answer` work on text and streams; `Scan` is the loop over any source of
attention.
"""

from __future__ import annotations

from headway.card import Card
from headway.methods.long_context.infiniretri.driver import InfiniRetri, at_budget
from headway.methods.long_context.infiniretri.reading import TEMPLATE, LongAnswer, answer, frame_of, retrieve
from headway.methods.long_context.infiniretri.rows import HostRows, scoring_sites
from headway.methods.long_context.infiniretri.scan import Frame, Kept, Pass, Retrieval, Scan
from headway.methods.long_context.infiniretri.scoring import (
    fill,
    phrase_smooth,
    question_weights,
    rank_sentences,
    token_scores,
    top_tokens,
)
from headway.methods.long_context.infiniretri.sentences import (
    Sentence,
    pack,
    sentences_of_ids,
    sentences_of_text,
    split_text,
)
from headway.methods.long_context.infiniretri.settings import Settings

CARD = Card(
    slug="infiniretri",
    title="Infinite Retrieval: Attention Enhanced LLMs in Long-Context Processing",
    year=2025,
    arxiv="2502.12962",
    family="long_context",
    stages=("Driver",),
    needs=("a decoder with a layer that sees the whole prompt",),
    knobs={
        "window": "tokens of new text per pass",
        "topk": "best tokens whose sentences are kept",
        "phrase": "width of the smoothing window",
        "budget": "most tokens kept",
        "layer": "where attention is read",
        "heads": "heads to read, such as known retrieval heads",
        "keep": "replace (paper) or accumulate",
    },
    summary="Reads a text of any length in chunks, keeps the sentences that the question attends to, and answers from "
    "them.",
)

__all__ = [
    "CARD",
    "TEMPLATE",
    "Frame",
    "HostRows",
    "InfiniRetri",
    "Kept",
    "LongAnswer",
    "Pass",
    "Retrieval",
    "Scan",
    "Sentence",
    "Settings",
    "answer",
    "at_budget",
    "fill",
    "frame_of",
    "pack",
    "phrase_smooth",
    "question_weights",
    "rank_sentences",
    "retrieve",
    "scoring_sites",
    "sentences_of_ids",
    "sentences_of_text",
    "split_text",
    "token_scores",
    "top_tokens",
]
