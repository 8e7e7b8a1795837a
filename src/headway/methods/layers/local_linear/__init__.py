"""Local linear attention: every query fits an affine map of values on keys around itself and reads it off at the query.

    o_i = Σ_j P_ij v_j ,   P_ij = p_ij (1 + (k_j − k̄_i)·x_i) ,   x_i = (Cov_p(k) + λI)⁻¹ (q_i − k̄_i)

Softmax attention is a local constant fit, linear attention one global linear fit; this is the local linear fit between
them, with ridge λ and bandwidth 1/s. It keeps all keys and values and costs more than softmax; it is less biased where
values change with keys, and exact where they are linear in them. Rows of P sum to one and may hold negative weights.

Paper: Local Linear Attention, arXiv 2510.01450. The released code's backward pass leaves out how the ridge λ Σ w
depends on Σ w; here the gradient is whole, and `detach_ridge_weight=True` gives theirs. The paper writes the ridge as
λ, its code as λ Σ w; the latter, which does not depend on the number of keys, is meant here. Their defaults of λ are 10
in the functions and 0.1 in the examples: 0.1, for keys of length one. `variant="parallax"` has a learned probe instead
of the solve (arXiv 2605.29157). Kernels: `headway.kernels.local_linear`.
"""

from __future__ import annotations

from headway.card import Card
from headway.methods.layers.local_linear.editor import LocalLinear
from headway.methods.layers.local_linear.mixer import NORMS, VARIANTS, LocalLinearMixer
from headway.methods.layers.local_linear.weighing import LocalLinearWeighing, SlopedWeighing

CARD = Card(
    slug="local-linear-attention",
    title="Local Linear Attention: An Optimal Interpolation of Linear and Softmax Attention For Test-Time Regression",
    year=2025,
    arxiv="2510.01450",
    family="layers",
    stages=("Mixer", "Editor"),
    knobs={
        "ridge": "λ, in units of squared key length; learned per head in the mixer",
        "scale": "inverse bandwidth s of the weights exp(s q·k)",
        "qk_norm": "how queries and keys are brought to one length: l2, rms or none",
        "variant": "solve for the slope, or parallax: read it off the input",
        "solver": "conjugate gradients, or the covariance formed and factored",
        "tolerance": "relative residual at which a row's solve stops",
    },
    summary="Attention as a local affine fit at every query: exact where values are linear in keys, local elsewhere.",
)

__all__ = [
    "CARD",
    "NORMS",
    "VARIANTS",
    "LocalLinear",
    "LocalLinearMixer",
    "LocalLinearWeighing",
    "SlopedWeighing",
]
