"""How InfiniRetri reads: sizes, scoring, and what is carried from chunk to chunk, checked once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from headway.errors import ArgumentError, check_whole, unknown
from headway.methods.long_context.infiniretri.scoring import WEIGHTING

KEEP = ("replace", "accumulate")
OVERFLOW = ("trim", "raise")
#: Tokens of new text per pass, best tokens, width of a phrase and tokens of an answer: the released code's defaults.
WINDOW, TOPK, PHRASE, ANSWER = 1024, 300, 8, 128


@dataclass(frozen=True, kw_only=True)
class Settings:
    """window: tokens of new text per pass.
    topk: best tokens whose sentences are kept; None keeps the best sentences that fill the budget.
    phrase: width of the smoothing window in tokens, about the length of an answer.
    budget: most tokens kept; None is what the model's positions leave beside a chunk, template and question.
    layer: where attention is read, counted over the layers that see the whole prompt (-1, the paper's, is the last),
        or several of them; their attention is added up.
    heads: (layer, head) pairs to read instead, with the host's own layer numbers; retrieval heads, say.
    keep: "replace" (paper) keeps what the last pass chose; "accumulate" drops nothing while it fits the budget.
    overflow: "trim" leaves out the worst sentences when the chosen ones exceed the budget; "raise" is an error, for
        runs that must be the published one.
    weighting: exponent of the question's weights: "squared" (released code), "linear", "sum" (paper: no weights).
    refresh: take the question's weights anew in every pass, not from the first alone as the released code does.
    cue: the rows from the question to the end of the prompt score, answer cue included; else the question's alone.
    centred: correct the half token by which an even phrase window is shifted in the released code.
    early_stop: end a pass behind the last layer that is read.
    limit: positions of the model; None takes them from its config."""

    window: int = WINDOW
    topk: int | None = TOPK
    phrase: int = PHRASE
    budget: int | None = None
    layer: int | tuple[int, ...] = -1
    heads: tuple[tuple[int, int], ...] | None = None
    keep: str = "replace"
    overflow: str = "trim"
    weighting: str = "squared"
    refresh: bool = False
    cue: bool = True
    centred: bool = True
    early_stop: bool = True
    limit: int | None = None

    def __post_init__(self) -> None:
        for name in ("window", "topk", "phrase", "budget", "limit"):
            check_whole(name, getattr(self, name), 1, optional=name in ("topk", "budget", "limit"))
        for name, valid in (("keep", KEEP), ("overflow", OVERFLOW), ("weighting", WEIGHTING)):
            if getattr(self, name) not in valid:
                raise unknown(name, getattr(self, name), valid)
        object.__setattr__(self, "layer", _layers(self.layer))
        object.__setattr__(self, "heads", _pairs(self.heads))

    @property
    def power(self) -> int:
        return WEIGHTING[self.weighting]

    def budget_for(self, limit: int | None, fixed: int, answer: int) -> int:
        """Tokens that may be kept beside `fixed` tokens of template and question, so that neither a pass (one chunk
        more) nor the answer exceeds `limit` positions. Raises ArgumentError with the sum when they would."""
        if limit is None:
            return self.window if self.budget is None else self.budget
        least = 1 if self.budget is None else self.budget
        for what, size in (("window", self.window), ("answer", answer)):
            if size + least + fixed > limit:
                raise ArgumentError(
                    f"{what}: {what} {size:,} + kept {least:,} + template and question {fixed:,} exceeds the model's "
                    f"{limit:,} positions; lower {'window or budget' if what == 'window' else 'max_new_tokens'}."
                )
        return limit - fixed - max(self.window, answer) if self.budget is None else self.budget

    def longest(self, budget: int) -> int:
        """Most tokens of a sentence: it has to fit into a chunk, and alone into what is kept."""
        return min(self.window, budget)


def positions(model: Any, settings: Settings) -> int | None:
    """The model's positions: the setting, else its config's; None where it has no limit."""
    if settings.limit is not None:
        return settings.limit
    config = getattr(model, "config", None)
    for holder in (config, getattr(config, "text_config", None)):
        found = getattr(holder, "max_position_embeddings", None)
        if isinstance(found, int) and found > 0:
            return found
    return None


def _layers(given: Any) -> int | tuple[int, ...]:
    layers = tuple(given) if isinstance(given, Sequence) else (given,)
    if not layers or not all(isinstance(layer, int) and not isinstance(layer, bool) for layer in layers):
        raise ArgumentError(f"layer: got {given!r}, expected a layer number or several, such as -1.")
    if len(set(layers)) < len(layers):
        raise ArgumentError(f"layer: got {layers}, expected each layer once.")
    return layers[0] if len(layers) == 1 else layers


def _pairs(given: Any) -> tuple[tuple[int, int], ...] | None:
    if given is None:
        return None
    pairs = tuple(given) if isinstance(given, Sequence) else ()
    if not pairs or not all(_is_pair(pair) for pair in pairs):
        raise ArgumentError(f"heads: got {given!r}, expected (layer, head) pairs such as ((17, 3), (20, 0)).")
    pairs = tuple((int(layer), int(head)) for layer, head in pairs)
    if len(set(pairs)) < len(pairs):
        raise ArgumentError(f"heads: got {pairs}, expected each pair once.")
    return pairs


def _is_pair(pair: Any) -> bool:
    return isinstance(pair, Sequence) and len(pair) == 2 and all(isinstance(x, int) and x >= 0 for x in pair)
