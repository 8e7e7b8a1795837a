"""The errors of Headway. Every message names the argument, what came, what was expected, and a fix."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


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


def missing_extra(package: str, extra: str, purpose: str) -> MissingExtraError:
    """The error for a missing optional package: one line with the command that installs it."""
    return MissingExtraError(
        f"{purpose} needs the package {package!r}; install it with: pip install 'headway[{extra}]'"
    )
