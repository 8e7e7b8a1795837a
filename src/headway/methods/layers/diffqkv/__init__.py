"""DiffQKV: fewer key heads than value heads, and a query that is made larger because it is never stored.

    q = Aug(x W_Q) ,   o_i = softmax( q_i K_κ(i)ᵀ / √d_k ) V_ν(i) ,   κ(i) = ⌊i·n_k/n_q⌋ ,   ν(i) = ⌊i·n_v/n_q⌋

Compressing K costs less quality than compressing V, so K gets few heads (and may get smaller ones) and V many; K and
V are stored with head counts of their own, and neither is ever expanded. Paper: Sigma: Differential Rescaling of
Query, Key and Value for Efficient Language Models, arXiv 2501.13629.

The appendix has an augmentation without residual or norm, which is the default (`aug_residual`). The paper leaves
open how rotation meets smaller keys: the default absorbs the projection into the query (`key_expand="absorbed"`),
"mlp" is the literal reading. It leaves open whether the weights of selected values are made to sum to one: they are,
unless `renormalize=False`. `convert` turns a grouped-query checkpoint by taking means of heads, as a start for more
training.
"""

from __future__ import annotations

from headway.card import Card
from headway.methods.layers.diffqkv.convert import convert, load_converted, pool_heads
from headway.methods.layers.diffqkv.heads import HeadLayout, break_even_tokens
from headway.methods.layers.diffqkv.mixer import DiffQKV
from headway.methods.layers.diffqkv.presets import SIGMA_PRESETS, sigma_fields
from headway.methods.layers.diffqkv.query import AugmentedQuery
from headway.methods.layers.diffqkv.selective import CoveredMass, SelectedWeights, SelectiveValues
from headway.methods.layers.diffqkv.static import UnequalStaticLayer, static_cache

CARD = Card(
    slug="sigma-diffqkv",
    title="Sigma: Differential Rescaling of Query, Key and Value for Efficient Language Models",
    year=2025,
    arxiv="2501.13629",
    family="layers",
    stages=("Mixer", "Selector", "Editor", "Observer"),
    knobs={
        "key_heads": "heads of K, which may be few",
        "value_heads": "heads of V",
        "key_dim": "size of a key head, smaller than that of a query with key_expand",
        "aug_dim": "width of the query's augmentation",
        "selective_values": "how many values a query reads",
    },
    summary="Stores few key heads, many value heads and enlarges the query, so that long contexts cost less memory.",
)

__all__ = [
    "CARD",
    "SIGMA_PRESETS",
    "AugmentedQuery",
    "CoveredMass",
    "DiffQKV",
    "HeadLayout",
    "SelectedWeights",
    "SelectiveValues",
    "UnequalStaticLayer",
    "break_even_tokens",
    "convert",
    "load_converted",
    "pool_heads",
    "sigma_fields",
    "static_cache",
]
