"""`look`: read what every attention head of a model does on one text.

`headway.look` is this package and the function of the same name: calling the package calls `headway.look.look`.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from headway.look.looking import look
from headway.look.result import HeadMap, HeadMetric, Labels, LayerSeries, Look

__all__ = ["HeadMap", "HeadMetric", "Labels", "LayerSeries", "Look", "look"]


class _CallablePackage(ModuleType):
    def __call__(self, *arguments: Any, **options: Any) -> Look:
        return look(*arguments, **options)


sys.modules[__name__].__class__ = _CallablePackage
