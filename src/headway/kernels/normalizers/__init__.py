"""Normalisers: how attention logits become weights, one registry for all of them; and gates, which may join any.

normalizer = make_normalizer("softpick", width=64, heads=4, kv_heads=4, head_dim=16)
weights = normalizer.bind(x)(logits, visible, positions=…, query=…, key=…)          # explicit weights
output, _ = normalizer.attend(Operation(query=…, key=…, value=…, scale=…, causal=True), normalizer.bind(x))
"""

from __future__ import annotations

from headway.kernels.normalizers.affine_module import AffineScaled
from headway.kernels.normalizers.base import Normalizer, make_normalizer, normalizers
from headway.kernels.normalizers.columns import (
    KeySlot,
    KeyValueSlot,
    LearnedDenominator,
    Softmax,
    SoftmaxPlusOne,
    ValueBias,
)
from headway.kernels.normalizers.explicit import (
    Clipped,
    Elastic,
    Elu,
    KernelElu,
    KernelIdentity,
    KernelMlp,
    Sigmoid,
    Softpick,
)
from headway.kernels.normalizers.gates import GATES, Gate, make_gate, options_by_gate, split_query_gate
from headway.kernels.normalizers.operation import Operation, explicit_attention

__all__ = [
    "GATES",
    "AffineScaled",
    "Clipped",
    "Elastic",
    "Elu",
    "Gate",
    "KernelElu",
    "KernelIdentity",
    "KernelMlp",
    "KeySlot",
    "KeyValueSlot",
    "LearnedDenominator",
    "Normalizer",
    "Operation",
    "Sigmoid",
    "Softmax",
    "SoftmaxPlusOne",
    "Softpick",
    "ValueBias",
    "explicit_attention",
    "make_gate",
    "make_normalizer",
    "normalizers",
    "options_by_gate",
    "split_query_gate",
]
