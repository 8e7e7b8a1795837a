"""Which rule wins: by the probability of answers that obey one or the other, and by replies of the model itself.

    margin = mean_t log p(answer that obeys the rule) − mean_t log p(answer that obeys the clause)

A conflict moves the margin from what it is in agreement; silencing heads that arbitrate moves it again. It needs no
judge and no sampling.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor, nn

from headway.door.evaluating import evaluating
from headway.errors import ArgumentError, unknown
from headway.methods.diagnosis.diagnose_localize_align.conversations import Turn
from headway.methods.diagnosis.diagnose_localize_align.drift import last_logits
from headway.methods.diagnosis.diagnose_localize_align.pairs import Item
from headway.methods.diagnosis.diagnose_localize_align.preference import token_logps

Condition = Literal["neutral", "conflict"]
CONDITIONS: tuple[Condition, Condition] = ("neutral", "conflict")
NEW_TOKENS = 24


@torch.no_grad()
def margins(
    model: nn.Module,
    items: Sequence[Item],
    condition: Condition = "conflict",
    *,
    progress: Callable[[int, int], None] | None = None,
) -> list[float]:
    """The margin of each item in nats per token; above 0 the rule wins, below 0 the clause. Whatever is attached to the
    model is measured."""
    if condition not in CONDITIONS:
        raise unknown("condition", condition, CONDITIONS)
    found = []
    for number, item in enumerate(items):
        prompt = item.neutral if condition == "neutral" else item.conflict
        found.append(answer_margin(model, prompt, item.obeys_rule, item.obeys_clause))
        if progress is not None:
            progress(number + 1, len(items))
    return found


@torch.no_grad()
def answer_margin(
    model: nn.Module,
    prompt: Int[Tensor, " prompt"],
    obeys_rule: Int[Tensor, " first"],
    obeys_clause: Int[Tensor, " second"],
) -> float:
    """Mean log-probability per token of one answer, minus that of the other, after a prompt."""
    device = next(model.parameters()).device
    answers = (obeys_rule, obeys_clause)
    if any(answer.numel() == 0 for answer in answers):
        raise ArgumentError("obeys_rule, obeys_clause: got an answer without a token, expected at least one.")
    start, longest = prompt.numel(), max(answer.numel() for answer in answers)
    ids = torch.zeros(2, start + longest, dtype=torch.long)
    response = torch.zeros(2, start + longest, dtype=torch.bool)
    for row, answer in enumerate(answers):
        ids[row, : start + answer.numel()] = torch.cat([prompt, answer])
        response[row, start : start + answer.numel()] = True
    # Padding stands behind the answers, where a causal model cannot look.
    with evaluating(model):
        logits = last_logits(model, ids.to(device), longest + 1).cpu()
    scores = token_logps(logits, ids[:, start - 1 :], response[:, start - 1 :]).sum(-1) / response.sum(-1)
    return float(scores[0] - scores[1])


@torch.no_grad()
def replies(
    model: Any,
    tokenizer: Any,
    items: Sequence[Item],
    *,
    new_tokens: int = NEW_TOKENS,
    role: str = "assistant",
    progress: Callable[[int, int], None] | None = None,
) -> list[Turn]:
    """What the model itself answers in agreement and in conflict, greedily, as turns that judges can mark. Each item is
    one conversation under two conditions."""
    turns = []
    work = [(item, condition) for item in items for condition in CONDITIONS]
    device = next(model.parameters()).device
    for number, (item, condition) in enumerate(work):
        prompt = getattr(item, condition)[None].to(device)
        with evaluating(model):
            made = model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            )
        text = tokenizer.decode(made[0, prompt.shape[1] :], skip_special_tokens=True).strip()
        turns.append(
            Turn(
                conversation=item.name,
                index=0,
                role=role,
                reply=text or "(no reply)",
                question=f"{item.rule} {item.question}",
                condition=condition,
                rules=item.rules,
            )
        )
        if progress is not None:
            progress(number + 1, len(work))
    return turns
