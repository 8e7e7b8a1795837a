"""Attention influence: how much worse a model predicts a text when its retrieval heads can no longer choose what they
read.

    AI(x) = (L_masked(x) − L_base(x)) / L_base(x)                                                    (Eq. 5)

L is the mean cross-entropy per predicted token (nats); L_masked is that of the model whose chosen heads weigh all
visible keys alike. Texts longer than the context are cut into chunks that follow one another without overlap; each
chunk starts anew, and losses are summed over all predicted tokens before the mean is taken.

Rows are padded on the right and get no padding mask: a causal row never reads what comes after it, so a text scores the
same in any batch, and uniform heads cost a running mean of the values instead of a map. The masked pass starts at the
first layer that has a chosen head, from the hidden states that the base pass brought there, on hosts where that gives
the same numbers (checked once, `shares_prefix`).

Paper: AttentionInfluence, arXiv 2505.07293; the overview figure prints L_masked in the denominator, here it is the
equation's L_base. The chunks, the floors and the flags are ours.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from headway.door import UniformHeads, use
from headway.door.blocks import block_forms, host_blocks, starting_at
from headway.door.evaluating import evaluating
from headway.errors import ArgumentError, HeadwayError
from headway.hosts import positions_of
from headway.methods.diagnosis.attention_influence.rows import batches, padded, readable
from headway.tasks.perplexity import negative_log_likelihood
from headway.tasks.samples import opening_ids, plain_ids

#: Tokens per chunk where the model has room for more: the context of the paper's 1.3-billion detector.
CONTEXT = 4096
#: Tokens below which the score of a text is mostly noise.
FLOOR = 64
#: Least loss to divide by, nats per token: a text that is known by heart has no scale of its own.
TINY_LOSS = 1e-3
#: Most numbers in the logits of one forward: 256 MiB of float32.
LOGITS = 2**26

#: A text with one of these flags has no score that can be ranked.
QUARANTINED = frozenset({"empty", "not-finite", "not-text"})


@dataclass(frozen=True, kw_only=True)
class Influence:
    """The score of one text. Losses are nats per predicted token, `tokens` the number of predicted tokens.

    Flags: "short" (fewer than the floor of predicted tokens), "tiny-loss" (the base loss was raised to `TINY_LOSS` in
    the denominator), "empty" (no token to predict), "not-finite" (a loss is NaN or infinite), "not-text" (control
    characters, halves of pairs). The last three have no usable score; `influence` is NaN where there is no number."""

    base_loss: float
    masked_loss: float
    tokens: int
    influence: float
    flags: tuple[str, ...]

    @property
    def usable(self) -> bool:
        return not QUARANTINED & set(self.flags)


@dataclass(frozen=True)
class TokenLosses:
    """The predicted tokens of one text and their losses in nats, intact and with the heads masked."""

    ids: Int[Tensor, " tokens"]
    base: Float[Tensor, " tokens"]
    masked: Float[Tensor, " tokens"]

    @property
    def rise(self) -> Float[Tensor, " tokens"]:
        return self.masked - self.base


def relative_rise(base_loss: float, masked_loss: float, *, least: float = TINY_LOSS) -> float:
    """(L_masked − L_base) / max(L_base, least); NaN when a loss is not finite."""
    if not (math.isfinite(base_loss) and math.isfinite(masked_loss)):
        return math.nan
    return (masked_loss - base_loss) / max(base_loss, least)


class InfluenceScorer:
    """Scores texts with one model and a set of (layer, query head) pairs.

    `context` is the number of tokens per chunk (the model's positions, at most `CONTEXT`, by default), `batch_tokens`
    the most tokens in one forward, padding included (fewer where the vocabulary makes the logits large; a single chunk
    always runs), `floor` the predicted tokens below which a text is flagged as short. The model is left as it was.

    Raises ArgumentError for a context that the model has no room for and for heads that it does not have, HostError and
    InterceptionError as the door does."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        heads: Sequence[tuple[int, int]],
        *,
        context: int | None = None,
        batch_tokens: int = 4096,
        floor: int = FLOOR,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.heads = tuple(sorted({(int(layer), int(head)) for layer, head in heads}))
        self.opening = opening_ids(tokenizer)
        self.context = _context(model, context, len(self.opening))
        if batch_tokens < 1 or floor < 0:
            raise ArgumentError(
                f"batch_tokens, floor: got {batch_tokens}, {floor}; expected batch_tokens ≥ 1 and floor ≥ 0."
            )
        self.batch_tokens = batch_tokens
        self.floor = floor
        self._forms: list[int | None] | None = None
        self._checked = False

    def score(self, texts: Sequence[str]) -> list[Influence]:
        """One score per text, in order. A text scores the same, to rounding, beside any others."""
        if isinstance(texts, str):
            raise ArgumentError("texts: got one string, expected a list of texts. Pass [text].")
        rows, strange = [], []
        for number, text in enumerate(texts):
            clean, odd = readable(text)
            strange.append(odd)
            rows += [(number, chunk) for chunk in self.chunks(clean)]
        base, masked = ([0.0] * len(texts) for _ in range(2))
        tokens = [0] * len(texts)
        with self._prepared():
            for batch in batches(rows, self.most_tokens()):
                for (number, _), before, after in zip(batch, *self._losses([c for _, c in batch]), strict=True):
                    base[number] += float(before.double().sum())
                    masked[number] += float(after.double().sum())
                    tokens[number] += len(before)
        return [self._result(*each) for each in zip(base, masked, tokens, strange, strict=True)]

    def inspect(self, text: str) -> TokenLosses:
        """Where in a text the loss rises: the losses of every predicted token, intact and masked."""
        rows = self.chunks(readable(text)[0])
        first = max(len(self.opening), 1)
        base, masked = [torch.zeros(0)], [torch.zeros(0)]
        with self._prepared():
            for row in rows:
                before, after = self._losses([row])
                base += before
                masked += after
        ids = [token for row in rows for token in row[first:]]
        return TokenLosses(torch.tensor(ids, dtype=torch.long), torch.cat(base), torch.cat(masked))

    def chunks(self, text: str) -> list[list[int]]:
        """The rows of token ids of a text: at most `context` long, the tokenizer's opening tokens in front of each. A
        last row without a token to predict is left out."""
        ids = plain_ids(self.tokenizer, text) if text else []
        room = self.context - len(self.opening)
        rows = [self.opening + ids[start : start + room] for start in range(0, len(ids), room)]
        return [row for row in rows if len(row) > max(len(self.opening), 1)]

    @property
    def shares_prefix(self) -> bool:
        """Whether the masked pass starts from the base pass's hidden states at the first masked layer. Runs a few tiny
        forwards the first time."""
        with self._prepared():
            return self._forms is not None

    def _result(self, base: float, masked: float, tokens: int, strange: bool) -> Influence:
        flags = ["not-text"] if strange else []
        if tokens == 0:
            return Influence(
                base_loss=math.nan, masked_loss=math.nan, tokens=0, influence=math.nan, flags=(*flags, "empty")
            )
        base_loss, masked_loss = base / tokens, masked / tokens
        influence = relative_rise(base_loss, masked_loss)
        if tokens < self.floor:
            flags.append("short")
        if math.isnan(influence):
            flags.append("not-finite")
        elif base_loss < TINY_LOSS:
            flags.append("tiny-loss")
        return Influence(
            base_loss=base_loss, masked_loss=masked_loss, tokens=tokens, influence=influence, flags=tuple(flags)
        )

    def most_tokens(self) -> int:
        """The most tokens of one forward: `batch_tokens`, or fewer where the logits of so many would be large."""
        vocabulary = getattr(self.model.config.get_text_config(), "vocab_size", 0)  # type: ignore[operator,union-attr]
        return min(self.batch_tokens, max(LOGITS // vocabulary, 1)) if vocabulary else self.batch_tokens

    @contextmanager
    def _prepared(self) -> Iterator[None]:
        """The model in evaluation mode under an open door; what is shared is found out the first time."""
        with evaluating(self.model), torch.no_grad(), ExitStack() as stack:
            if self.heads:
                stack.enter_context(use(self.model))
                if not self._checked:
                    refuse_looking_ahead(self.model)
                    with use(self.model, UniformHeads(heads=self.heads)):
                        pass
                    self._forms = self._shareable()
                    self._checked = True
            yield

    def _losses(self, chunks: Sequence[Sequence[int]]) -> tuple[list[Tensor], list[Tensor]]:
        """The losses of the predicted tokens of each row, intact and masked."""
        device = next(self.model.parameters()).device
        ids = padded(chunks).to(device)
        lengths = [len(chunk) for chunk in chunks]
        with _entering(self.model, self.heads[0][0] if self._forms is not None else None) as kept:
            base = self._row_losses(self._logits(ids), ids, lengths)
        if not self.heads:
            return base, base
        return base, self._row_losses(self._masked_logits(ids, kept[0] if kept else None), ids, lengths)

    def _masked_logits(self, ids: Tensor, hidden: Tensor | None) -> Float[Tensor, "rows tokens vocabulary"]:
        with ExitStack() as stack:
            stack.enter_context(use(self.model, UniformHeads(heads=self.heads)))
            if hidden is not None:
                stack.enter_context(starting_at(self.model, self.heads[0][0], hidden, forms=self._forms))
            return self._logits(ids)

    def _logits(self, ids: Tensor) -> Float[Tensor, "rows tokens vocabulary"]:
        logits = getattr(self.model(input_ids=ids, use_cache=False), "logits", None)
        if logits is None or logits.shape[:2] != ids.shape:
            raise _no_logits(self.model)
        return logits

    def _row_losses(self, logits: Tensor, ids: Tensor, lengths: Sequence[int]) -> list[Tensor]:
        first = max(len(self.opening), 1)
        return [
            negative_log_likelihood(row[first - 1 : n - 1], wanted[first:n])
            for row, wanted, n in zip(logits, ids, lengths, strict=True)
        ]

    def _shareable(self) -> list[int | None] | None:
        """The forms of the host's blocks, when a masked pass from the middle gives exactly what a whole one does."""
        layer = self.heads[0][0]
        vocabulary = getattr(self.model.config.get_text_config(), "vocab_size", 0)  # type: ignore[operator,union-attr]
        if layer == 0 or not vocabulary:
            return None
        length = min(self.context, 24)
        drawn = torch.randint(vocabulary, (2, length), generator=torch.Generator().manual_seed(0))
        ids = drawn.to(next(self.model.parameters()).device)
        try:
            if layer >= len(host_blocks(self.model)):
                return None
            forms = block_forms(self.model)
            with _entering(self.model, layer) as kept:
                self._logits(ids)
            whole = self._masked_logits(ids, None)
            self._forms = forms
            short = self._masked_logits(ids, kept[0])
        except (HeadwayError, TypeError, IndexError, AttributeError):
            # Hosts whose blocks hang on one another, or that have no list of blocks, run the whole masked pass.
            return None
        finally:
            self._forms = None
        return forms if torch.equal(whole, short) else None


def refuse_looking_ahead(model: nn.Module) -> None:
    """Raises ArgumentError for a model whose earlier rows change with a later token: one forward of two short rows."""
    vocabulary = getattr(model.config.get_text_config(), "vocab_size", 0)  # type: ignore[operator,union-attr]
    if vocabulary < 2:
        return
    ids = torch.randint(vocabulary, (1, 8), generator=torch.Generator().manual_seed(0)).repeat(2, 1)
    ids[1, -1] = (ids[1, -1] + 1) % vocabulary
    output = model(input_ids=ids.to(next(model.parameters()).device), use_cache=False)
    logits = getattr(output, "logits", None)
    if logits is None or logits.shape[:2] != ids.shape:
        raise _no_logits(model)
    if not torch.allclose(logits[0, :-1], logits[1, :-1], rtol=1e-3, atol=1e-3, equal_nan=True):
        raise ArgumentError(
            f"model: got {type(model).__name__}, whose earlier tokens change with later ones; expected a causal "
            "language model."
        )


def _no_logits(model: nn.Module) -> ArgumentError:
    return ArgumentError(
        f"model: got {type(model).__name__} without next-token logits, expected a causal language model. Load it with "
        "its language-model head."
    )


@contextmanager
def _entering(model: nn.Module, layer: int | None) -> Iterator[list[Tensor]]:
    """What enters block `layer` in the forward of this context; nothing for None."""
    kept: list[Tensor] = []
    if layer is None:
        yield kept
        return

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kept.append(args[0] if args else kwargs["hidden_states"])

    hook = host_blocks(model)[layer].register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield kept
    finally:
        hook.remove()


def _context(model: nn.Module, context: int | None, opening: int) -> int:
    positions = positions_of(model)
    if context is None:
        return CONTEXT if positions is None else min(CONTEXT, positions)
    if isinstance(context, bool) or not isinstance(context, int) or context < opening + 2:
        raise ArgumentError(f"context: got {context!r}, expected a whole number of at least {opening + 2} tokens.")
    if positions is not None and context > positions:
        raise ArgumentError(
            f"context: got {context:,}, expected at most {positions:,}, the positions of the model. Longer texts are "
            "cut into chunks."
        )
    return context
