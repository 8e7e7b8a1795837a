"""`look`: read what every attention head of a model does on one text."""

from __future__ import annotations

from headway.look.looking import look
from headway.look.result import HeadMap, HeadMetric, Labels, LayerSeries, Look

__all__ = ["HeadMap", "HeadMetric", "Labels", "LayerSeries", "Look", "look"]
