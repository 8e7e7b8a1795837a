"""Softmax attention as a mixer: the baseline of every other one. See `mixer`."""

from __future__ import annotations

from headway.methods.layers.softmax.mixer import POSITIONS, SoftmaxAttention

__all__ = ["POSITIONS", "SoftmaxAttention"]
