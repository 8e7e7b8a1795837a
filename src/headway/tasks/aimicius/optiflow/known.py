"""What the interpreter of plans knows: its operators, calls and methods, and the bounds of a program."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from typing import Any

from headway.errors import HeadwayError

#: Nodes visited, elements of any value, printed characters, and calls inside calls.
STEPS, SIZE, OUTPUT, DEPTH = 400_000, 20_000, 400_000, 20
#: Largest whole number; a plan needs indices.
LARGEST = 10**12
#: Characters and nesting of a program that is parsed at all.
PROGRAM, NESTING = 20_000, 60


class ProgramError(HeadwayError):
    """A program uses something that is not known here, fails, or does not end."""


BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Div: operator.truediv,
    ast.Mod: operator.mod,
    ast.BitXor: operator.xor,
    ast.BitAnd: operator.and_,
    ast.BitOr: operator.or_,
}
COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
}
UNARY: dict[type[ast.unaryop], Callable[[Any], Any]] = {
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
    ast.Not: operator.not_,
}

#: What a program may call by name, beside its own functions and print.
CALLS: dict[str, Callable[..., Any]] = {
    "range": range, "len": len, "min": min, "max": max, "sum": sum, "abs": abs, "sorted": sorted, "int": int,
    "str": str,
    "list": list, "tuple": tuple, "set": set, "dict": dict, "bool": bool, "enumerate": enumerate, "zip": zip,
    "reversed": reversed, "any": any, "all": all, "divmod": divmod,
}  # fmt: skip
#: What a program may call on a value.
METHODS: dict[type, frozenset[str]] = {
    list: frozenset({"append", "extend", "pop", "insert", "index", "copy", "reverse", "sort", "remove"}),
    set: frozenset({"add", "discard", "remove", "union", "copy"}),
    dict: frozenset({"get", "items", "keys", "values", "setdefault", "copy"}),
    str: frozenset({"join", "strip", "upper", "lower"}),
}

#: Calls and methods that look at the outermost level of a value alone; all others may walk through all of it.
SHALLOW = frozenset(
    {
        "len", "range", "enumerate", "zip", "reversed", "list", "tuple", "bool", "any", "all",
        "append", "extend", "pop", "insert", "copy", "reverse", "items", "keys", "values",
    }
)  # fmt: skip
