"""Agreement with dense attention: the same model on the same text, once as it is and once with a method attached.

    reference   = record(model, prompt)                       dense: greedy answer a_1 … a_m, next-token distributions
    agreement   = agree(model, reference)                     the same, in a scope that attaches a method

    token agreement   (1/m) Σ_i 1[b_i = a_i]                  b: the method's own greedy answer
    common prefix     the first i where b_i ≠ a_i, minus one
    next-token rate   share of rows whose most likely token is dense's, on the same teacher-forced text
    KL                mean over those rows of Σ_x p(x) ln( p(x) / q(x) ), nats; p dense, q with the method

The teacher-forced text is the prompt and dense's answer; `rows` of it are looked at, evenly over the prompt, and every
row of the answer. Answer tokens are fed one by one, so that methods act as they do in decoding. A reference keeps
(rows + m) × vocabulary numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from headway.errors import ArgumentError
from headway.tasks.answering import chunks, forward
from headway.tasks.perplexity import DEFAULT_CHUNK

ROWS = 64
NEW_TOKENS = 32


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Dense attention on one prompt: `rows` are positions in prompt + answer whose next-token log-probabilities are
    kept."""

    prompt_ids: Int[Tensor, "1 prompt"]
    answer_ids: Int[Tensor, " answer"]
    rows: Int[Tensor, " rows"]
    log_probabilities: Float[Tensor, "rows vocabulary"]


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How near a run is to its reference. `kl` (nats) and `same` are by row, `in_answer` says which rows are the
    answer's."""

    answer_ids: Int[Tensor, " answer"]
    token_agreement: float
    common_prefix: int
    rows: Int[Tensor, " rows"]
    kl: Float[Tensor, " rows"]
    same: Bool[Tensor, " rows"]
    in_answer: Bool[Tensor, " rows"]

    @property
    def mean_kl(self) -> float:
        return float(self.kl.double().mean())

    @property
    def next_token_rate(self) -> float:
        return float(self.same.double().mean())


@torch.no_grad()
def record(
    model: nn.Module,
    prompt_ids: Int[Tensor, "1 prompt"],
    *,
    max_new_tokens: int = NEW_TOKENS,
    rows: int = ROWS,
    prefill_chunk: int = DEFAULT_CHUNK,
) -> Reference:
    """Greedy answer of exactly `max_new_tokens` tokens (also past an end of sequence) and the log-probabilities."""
    if max_new_tokens < 1 or rows < 1:
        raise ArgumentError(f"max_new_tokens, rows: got {max_new_tokens}, {rows}; expected at least 1 of each.")
    prompt = prompt_ids.shape[1]
    chosen = torch.linspace(0, prompt - 1, min(rows, prompt)).round().long().unique()
    log_probabilities, answer_ids, decoding = _run(model, prompt_ids, chosen, prefill_chunk, max_new_tokens)
    return Reference(
        prompt_ids=prompt_ids,
        answer_ids=answer_ids,
        rows=torch.cat([chosen, torch.arange(prompt, prompt + max_new_tokens - 1)]),
        log_probabilities=torch.cat([log_probabilities, decoding[:-1]]),
    )


@torch.no_grad()
def agree(model: nn.Module, reference: Reference, *, prefill_chunk: int = DEFAULT_CHUNK) -> Agreement:
    """Runs the model as it is now, methods and all, on the reference's text."""
    prompt, wanted = reference.prompt_ids.shape[1], reference.answer_ids
    chosen = reference.rows[reference.rows < prompt]
    forced, free, decoding = _run(model, reference.prompt_ids, chosen, prefill_chunk, wanted.numel())
    equal = free == wanted
    differs = (~equal).nonzero()
    prefix = int(differs[0]) if differs.numel() else wanted.numel()
    if prefix < wanted.numel() - 1:
        decoding = _run(model, reference.prompt_ids, chosen[:0], prefill_chunk, wanted.numel(), forced=wanted)[2]
    here = torch.cat([forced, decoding[:-1]])
    dense = reference.log_probabilities
    return Agreement(
        answer_ids=free,
        token_agreement=float(equal.double().mean()),
        common_prefix=prefix,
        rows=reference.rows,
        kl=kl_divergence(dense, here),
        same=here.argmax(-1) == dense.argmax(-1),
        in_answer=reference.rows >= prompt - 1,
    )


def kl_divergence(p: Float[Tensor, "rows vocabulary"], q: Float[Tensor, "rows vocabulary"]) -> Float[Tensor, " rows"]:
    """KL(p ‖ q) of each row in nats, from log-probabilities; never below zero."""
    return torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1).clamp(min=0)


def _run(
    model: nn.Module,
    prompt_ids: Int[Tensor, "1 prompt"],
    rows: Int[Tensor, " rows"],
    chunk: int | None,
    new_tokens: int,
    *,
    forced: Int[Tensor, " answer"] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities at `rows` of the prompt; the answer (greedy, or `forced`); the log-probabilities behind each of
    its tokens but the last, for which no forward is run (that row is left as zeros)."""
    kept, start, cache, last = [], 0, None, torch.empty(0)
    for piece in chunks(prompt_ids, chunk):
        inside = rows[(rows >= start) & (rows < start + piece.shape[1])] - start
        logits, cache = forward(model, piece, cache, keep=None if inside.numel() else 1)
        kept.append(logits[inside.to(logits.device)].log_softmax(-1).cpu() if inside.numel() else logits[:0].cpu())
        last = logits[-1].clone()
        start += piece.shape[1]
        del logits
    answer, behind = [], torch.zeros(new_tokens, last.numel())
    for step in range(new_tokens):
        token = int(last.argmax()) if forced is None else int(forced[step])
        answer.append(token)
        if step + 1 < new_tokens:
            logits, cache = forward(model, torch.tensor([[token]]), cache, keep=1)
            last = logits[-1]
            behind[step] = last.log_softmax(-1).cpu()
    return torch.cat(kept), torch.tensor(answer), behind
