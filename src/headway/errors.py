"""The errors of Headway. Every message names the argument, what came, what was expected, and a fix."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from math import isfinite
from numbers import Integral, Real
from typing import TypeGuard


class HeadwayError(Exception):
    """Base of all errors raised on purpose; the command line prints these without a traceback."""


class ArgumentError(HeadwayError, ValueError):
    """An argument has a value that cannot be used."""


class HostError(HeadwayError):
    """A model, tokenizer or text cannot be loaded or is not what it claims to be."""


class InterceptionError(HeadwayError):
    """An attention operation of the host does not pass the door, or not in a form the door understands."""


class ConflictError(HeadwayError):
    """Two methods, or two scopes, want the same thing at the same site."""


class EmptyRowError(HeadwayError):
    """A query row has no visible key left."""


class NumericError(HeadwayError):
    """A tensor holds NaN or infinity where finite numbers are needed."""


class MissingExtraError(HeadwayError, ImportError):
    """An optional package is not installed."""


def unknown(argument: str, got: object, valid: Iterable[object], *, fix: str = "") -> ArgumentError:
    """The error for a name or index outside a known set: the nearest match and what is valid (a range by its ends)."""
    if isinstance(valid, range) and valid.step == 1 and len(valid) > 1:
        whole = f"expected a number from {valid[0]} to {valid[-1]}."
        return ArgumentError(f"{argument}: got {got!r}, {whole}{' ' + fix if fix else ''}")
    names = [str(v) for v in valid]
    near = get_close_matches(str(got), names, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    shown = ", ".join(names[:24]) + (", …" if len(names) > 24 else "")
    return ArgumentError(f"{argument}: got {got!r}, expected one of {shown}.{hint}{' ' + fix if fix else ''}")


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value is a finite number; a bool is none."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return False
    return isinstance(value, Integral) or isfinite(value)


def check_whole(name: str, value: object, least: int, *, optional: bool = False) -> None:
    """ArgumentError unless a value is a whole number of at least `least`, or None where that is `optional`."""
    if (value is None and optional) or (
        isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least
    ):
        return
    near = max(int(value), least) if is_number(value) else least
    raise ArgumentError(
        f"{name}: got {value!r}, expected a whole number of at least {least}{', or None' if optional else ''}. "
        f"Pass {name}={near}, say."
    )


def missing_extra(package: str, extra: str, purpose: str) -> MissingExtraError:
    """The error for a missing optional package: one line with the command that installs it."""
    return MissingExtraError(
        f"{purpose} needs the package {package!r}; install it with: pip install 'headway[{extra}]'"
    )
