"""InLine attention: linear attention that can tell queries apart, with a cheap look at the neighbours.

    w_ij = s·φ(q_i)·φ(k_j)/N − mean_j( … ) + 1/N ,   o_i = Σ_j w_ij v_j + r_i

Dividing by the row sum gives all queries on one ray the same weights; subtracting the mean does not, and needs neither
a positive φ nor a denominator. r is a 3 × 3 depthwise convolution of the values whose kernels each image predicts.

Paper: Bridging the Divide: Reconsidering Softmax and Linear Attention, arXiv 2412.06590. The released code scales the
products by dim^-½/N where the paper's equation sums them (`scale` = N), predicts nine coefficients per channel where
the paper writes nine (`kernel_per="head"`), and takes the root of the number of tokens for the grid. The first two are
here as in the code by default, and the grid is given. The causal form, masks, packed documents and the state are
additions.
"""

from __future__ import annotations

from headway.card import Card
from headway.methods.layers.inline.block import InlineBlock
from headway.methods.layers.inline.diagnosis import (
    ConfusionObserver,
    Injectivity,
    LocalityObserver,
    MaskTokens,
    confusion_count,
    injectivity,
    locality_mass,
    neighbourhood,
    same_row_query,
)
from headway.methods.layers.inline.mixer import InlineMixer, LinearMixer
from headway.methods.layers.inline.residual import LocalResidual, local_residual
from headway.methods.layers.inline.vit import Replacement, VisionAttention, replace_attention

CARD = Card(
    slug="inline-attention",
    title="Bridging the Divide: Reconsidering Softmax and Linear Attention",
    year=2024,
    arxiv="2412.06590",
    family="layers",
    stages=("Mixer", "Editor", "Observer"),
    knobs={
        "feature": "the map of query and key: identity, relu, leaky_relu, exp or elu_plus_one",
        "residual": "whether a 3 × 3 convolution of the values joins, with kernels that each image predicts",
        "prefix": "class and register tokens in front of the patches, which get no residual",
        "kernel_per": "whether the kernels of the residual are of each channel or of each head",
        "qk_norm": "whether query and key are normalised per head",
    },
    summary="Linear-cost attention for vision models whose rows tell queries apart, with a local residual.",
)

__all__ = [
    "CARD",
    "ConfusionObserver",
    "Injectivity",
    "InlineBlock",
    "InlineMixer",
    "LinearMixer",
    "LocalResidual",
    "LocalityObserver",
    "MaskTokens",
    "Replacement",
    "VisionAttention",
    "confusion_count",
    "injectivity",
    "local_residual",
    "locality_mass",
    "neighbourhood",
    "replace_attention",
    "same_row_query",
]
