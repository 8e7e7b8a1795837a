"""Local linear attention: every query fits an affine map of values on keys around itself and reads it off at the query.

    p_ij = softmax_j(s q_i·k_j) ,   k̄_i = Σ_j p_ij k_j ,   C_i = Σ_j p_ij (k_j − k̄_i)(k_j − k̄_i)ᵀ + λ_i I
    x_i = C_i⁻¹ (q_i − k̄_i) ,   P_ij = p_ij (1 + (k_j − k̄_i)·x_i) ,   o_i = Σ_j P_ij v_j

This is the weighted ridge regression with intercept min_{b,W} Σ_j w_ij ‖v_j − b − W(k_j − q_i)‖² + λ ω_i ‖W‖² with
ω_i = Σ_j w_ij, whose b is o_i. The paper writes it with μ_i = Σ w (k − q), Σ_i = Σ w (k − q)(k − q)ᵀ + λ ω_i I, ρ =
Σ⁻¹ μ, δ = ω − μ·ρ and P = w (1 − (k − q)·ρ) / δ. Eliminating the intercept (Sherman–Morrison) gives the form above:
the rows of P sum to one for any x, no denominator can vanish, and C is better conditioned than Σ. `reference`
computes the paper's form, `attention` this one, tile by tile with Θ(n d) memory.

λ → ∞ is softmax attention, s = 0 ridge regression with intercept. Rows of P may hold negative numbers and numbers above
one. Paper: Local Linear Attention, arXiv 2510.01450. Differences from its released code: ridge, masks and heads as
below, and a gradient that does not leave out how λ ω_i depends on ω_i (`detach_ridge_weight=True` leaves it out).
"""

from __future__ import annotations

from headway.kernels.local_linear.attention import LocalFit, fit_local_linear, local_linear_attention, sloped_attention
from headway.kernels.local_linear.reference import reference_weights
from headway.kernels.local_linear.weights import local_linear_weights, sloped_weights

__all__ = [
    "LocalFit",
    "fit_local_linear",
    "local_linear_attention",
    "local_linear_weights",
    "reference_weights",
    "sloped_attention",
    "sloped_weights",
]
