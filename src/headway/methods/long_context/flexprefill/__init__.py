"""FlexPrefill: which blocks a prompt needs, head by head, from its last block of queries.

The last b queries attend to everything (exact probe Â). With v the mean of Â by key and s its mean by offset i − j:

    D = √JSD( softmax(mean q̂ · k̄ᵀ) ‖ block sums of v )
    D ≥ τ  "vertical-slash":  the columns and diagonals of largest mass, as many as cover a share γ of v and of s
    D < τ  "query-aware":     pooling can be trusted, so blocks of softmax(q̄ k̄ᵀ) that cover a share γ of its mass

Exact attention runs on the union, prefill only; decoding stays dense, since the estimate needs all keys and a step is
bound by memory. Paper: FlexPrefill, arXiv 2502.20766.

Where the released code slips, the corrected form is the default here: 0 · ln 0 is 0 (there a NaN that turns a head to
vertical-slash); density counts the causal triangle; a batch of any size works, and left padding is never read, but
blocks are counted from the first column, so that padding by other than whole blocks changes which keys share one.
`count="blocks"` takes as many blocks as hold the share γ, and counts an offset that falls on two block distances for
both. The code counts the tokens that hold γ and divides by 128 (`count="tokens"` divides by the block size): tokens
that lie scattered then leave their mass uncovered. The sink block comes beside the chosen columns, not in place of one.

Kept as options: `selection="global"` is the paper's one quota for a whole head, which lets early rows take it all
("row" gives each row its own), `stop="separate"` covers γ of v and of s each ("union" stops when columns and diagonals
together cover γ of the last block). `density` is ours: a fixed share of the triangle in place of γ. `trust` is the
guard of SpargeAttn (arXiv 2502.18137): the divergence D tests pooling by the last block of queries alone, the
self-similarity of a block tests every one. Which blocks early rows read depends on later tokens through the probe;
their outputs use no later keys. Defaults are those of the code: γ 0.9 (the paper also takes 0.95), τ 0.1, 1,024 tokens
at least, blocks of 128. Compare methods at equal density.
"""

from __future__ import annotations

from headway.card import Card
from headway.methods.long_context.flexprefill.selector import FlexPrefill, FlexSelection, at_budget, select_blocks

CARD = Card(
    slug="flexprefill",
    title="FlexPrefill: A Context-Aware Sparse Attention Mechanism for Efficient Long-Sequence Inference",
    year=2025,
    arxiv="2502.20766",
    family="long_context",
    stages=("Selector",),
    needs=("the whole prompt in one forward",),
    knobs={
        "gamma": "share of attention mass to cover",
        "density": "share of the causal triangle to read, in place of gamma",
        "tau": "divergence below which pooling is trusted",
        "min_budget": "least tokens a row reads",
        "block": "tokens per block",
        "trust": "self-similarity below which a block is read whole in query-aware heads",
    },
    summary="Chooses key blocks per head and prompt in prefill so that a given share of attention mass is covered.",
)

__all__ = ["CARD", "FlexPrefill", "FlexSelection", "at_budget", "select_blocks"]
