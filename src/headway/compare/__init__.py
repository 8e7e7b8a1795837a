"""`compare`: methods beside dense attention in one run, at several budgets, with one recommendation.

`headway.compare` is this package and the function of the same name: calling the package calls the function.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from headway.compare.cells import Cell, Ratio, Score, Timing
from headway.compare.comparing import compare
from headway.compare.methods import Method
from headway.compare.result import Comparison, Loss, Point, Recommendation, pareto

__all__ = [
    "Cell",
    "Comparison",
    "Loss",
    "Method",
    "Point",
    "Ratio",
    "Recommendation",
    "Score",
    "Timing",
    "compare",
    "pareto",
]


class _CallablePackage(ModuleType):
    def __call__(self, *arguments: Any, **options: Any) -> Comparison:
        return compare(*arguments, **options)


sys.modules[__name__].__class__ = _CallablePackage
