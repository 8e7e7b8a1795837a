"""Every method at one budget: the stages that read, store or keep about a share of a context's keys.

A method's module (the one with its `CARD`) offers `at_budget(share, *, tokens, model) -> stages`; share 1 is dense.
"""

from __future__ import annotations

import math
from types import ModuleType

from torch import nn

from headway.card import homes
from headway.door.stages import Stage
from headway.errors import ArgumentError, unknown


def budgeted() -> dict[str, ModuleType]:
    """The modules of the methods that have a budget, by slug."""
    return {slug: module for slug, module in homes().items() if hasattr(module, "at_budget")}


def parse_shares(option: str, text: str) -> list[float]:
    """Budgets from what a command was given, such as "0.5,0.25" or "50%,25%"; each once, in order.

    Raises ArgumentError, which names the option, for what is no share in (0, 1]."""
    shares = []
    for part in text.split(","):
        word = part.strip()
        try:
            share = float(word.removesuffix("%")) / (100 if word.endswith("%") else 1)
        except ValueError:
            share = math.nan
        if not 0 < share <= 1:
            raise ArgumentError(
                f"{option}: got {word!r}, expected shares of the keys in (0, 1] with commas, such as 0.5,0.25 or "
                "50%,25%."
            )
        shares.append(share)
    return list(dict.fromkeys(shares))


def check_share(share: float, tokens: int) -> None:
    """Raises ArgumentError for a budget that cannot be: what `at_budget` of a method checks first."""
    if not 0 < share <= 1:
        raise ArgumentError(f"share: got {share}, expected a share of the keys in (0, 1]; 1 is dense.")
    if tokens < 1:
        raise ArgumentError(f"tokens: got {tokens}, expected at least 1.")


def stages_at_budget(slug: str, share: float, *, tokens: int, model: nn.Module) -> tuple[Stage, ...]:
    """The stages of a method for a share in (0, 1] of the keys of a context of `tokens`. "dense" has none.

    Raises ArgumentError for an unknown method, one without a budget, or numbers out of range."""
    if not 0 < share <= 1:
        raise ArgumentError(f"budget: got {share}, expected a share in (0, 1]; 1 is dense.")
    if tokens < 1:
        raise ArgumentError(f"tokens: got {tokens}, expected at least 1.")
    if slug == "dense":
        return ()
    modules = budgeted()
    if slug not in modules:
        raise unknown("method", slug, ("dense", *modules), fix="`headway papers` says what each is for.")
    return tuple(modules[slug].at_budget(share, tokens=tokens, model=model))
