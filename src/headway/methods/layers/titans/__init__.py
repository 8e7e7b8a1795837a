"""Titans: a memory whose state is the weights of a small network, trained by gradient descent on what it reads.

    S_t = η_t S_{t−1} − θ_t ∇‖M_c(k_t) − v_t‖² ,   M_t = (1 − α_t) M_{t−1} + S_t ,   y_t = M_t(q_t)

S is momentum ("surprise over time"), α forgets, and θ, η, α are read off each token; M_c is the memory at the start of
the token's chunk. Four mixers join it to attention: `titans_lmm` (the memory alone), `titans_mac` (memory as context of
attention within segments), `titans_mag` (beside sliding-window attention, joined by a gate) and `titans_mal` (a layer
below sliding-window attention). The state does not grow with the text.

Paper: Titans: Learning to Memorize at Test Time, arXiv 2501.00663. No code was released. Where the paper is silent or
would read the future, this is what is done here:

- W_0 is learned, S_0 is zero. What the persistent tokens would write at the start of a document is a constant of the
  model, hence part of W_0: attention alone reads them, without a position.
- θ is bounded, since a chunk sums its gradients at one point and momentum multiplies them by 1 / (1 − η): `stability`.
- Joining by ⊗ is norm(y) ⊙ σ(norm(m) + bias); `join="add"` adds the two norms.
- MAC as written puts a retrieval for every token of a segment before the segment, where earlier tokens read later ones,
  and reads the memory behind the whole segment. Here the retrieved tokens come from learned queries or from the segment
  before (`memory_query`), or are seen only by tokens at or behind their own; and each token reads the memory as of
  itself. `causal=False` is the form as written, for encoders.
- `gate_granularity="channel"` is the paper's α in [0, 1]^d, one per output of each layer of the memory; "scalar", one
  per head, is what implementations use and the default.
- A padded step is no step: θ = 0 alone would let the old momentum move the memory on.
"""

from __future__ import annotations

from headway.card import Card
from headway.methods.layers.titans.context import TitansMAC
from headway.methods.layers.titans.memory import MemoryOptions, MemoryTrace, NeuralMemory
from headway.methods.layers.titans.mixers import TitansLMM, TitansMAG, TitansMAL
from headway.methods.layers.titans.window import WindowAttention

CARD = Card(
    slug="titans",
    title="Titans: Learning to Memorize at Test Time",
    year=2024,
    arxiv="2501.00663",
    family="layers",
    stages=("Mixer",),
    needs=("training from scratch",),
    knobs={
        "depth": "layers of the memory network",
        "chunk": "tokens whose gradients are taken at one point",
        "window": "keys of sliding-window attention (MAG, MAL)",
        "segment": "tokens per segment (MAC)",
        "persistent": "learned tokens that attention always reads",
        "memory_query": "what MAC asks the memory for a segment",
        "stability": "how the step size is bounded",
    },
    summary="Layers with a small network as their memory, which learns while it reads: recall far beyond a window at a "
    "state of constant size.",
)

__all__ = [
    "CARD",
    "MemoryOptions",
    "MemoryTrace",
    "NeuralMemory",
    "TitansLMM",
    "TitansMAC",
    "TitansMAG",
    "TitansMAL",
    "WindowAttention",
]
