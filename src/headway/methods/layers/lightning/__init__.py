"""Lightning attention and TNL: causal linear attention with decay, gate and norm, at a constant cost per token.

    o_t = Σ_{s≤t} λ_h^(t−s) (q_t·k_s) v_s ,   y = W_o [ SRMSNorm(o) ⊙ u ] ,   q, k = SiLU(x W_q), SiLU(x W_k)

The state is one d × e matrix a head, whatever the length (`headway.kernels.scan`). `Lightning` is the mixer, with the
presets "tnl" and "minimax"; `tnl_fields` gives the fields of a whole TransNormerLLM for `HeadwayConfig`.

Papers: Various Lengths, Constant Speed: Efficient Language Modeling with Lightning Attention, arXiv 2405.17381;
Lightning Attention-2, arXiv 2401.04658; TransNormerLLM, arXiv 2307.14995.

The papers write decays linear in the head, exp(−8h/H · (1 − l/L)); the released models have ALiBi's geometric slopes
times 1 − l/(L−1) + 10⁻⁵. The second is the default (`decay="alibi"`), the first is `decay="linear"`. As in the released
code there is no 1/√d. LRPE is applied in the first layer alone, as the paper's "Mix" does (`lrpe="first"`). Added here:
padding and packed documents as part of the operation, a carried state for any number of tokens, and stacks of a single
layer, for which the released temperature divides by zero.
"""

from __future__ import annotations

from headway.card import Card
from headway.methods.layers.lightning.lrpe import LRPE
from headway.methods.layers.lightning.mixer import PRESETS, DecayWeighing, Lightning
from headway.methods.layers.lightning.tnl import tnl_fields

CARD = Card(
    slug="lightning-attention",
    title="Various Lengths, Constant Speed: Efficient Language Modeling with Lightning Attention",
    year=2024,
    arxiv="2405.17381",
    family="layers",
    stages=("Mixer",),
    knobs={
        "preset": "tnl or minimax: activations, norm, gate and positions together",
        "decay": "slopes of the heads: alibi (as released), linear (as in the paper) or none",
        "lrpe": "rotating positions in the first layer, in all or in none",
        "gate": "what the output is multiplied by: a projection of x, its sigmoid, its SiLU, or nothing",
    },
    summary="Linear attention for language models whose speed and decoding memory do not depend on the length.",
)

__all__ = ["CARD", "LRPE", "PRESETS", "DecayWeighing", "Lightning", "tnl_fields"]
