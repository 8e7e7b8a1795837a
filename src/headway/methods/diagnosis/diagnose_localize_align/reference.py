"""What the frozen reference says of preference pairs, read once before training: log-probabilities and token weights.

With adapters the reference is the model without them, so no second model is held.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from headway.door import capture, use
from headway.errors import ArgumentError, unknown
from headway.methods.diagnosis.diagnose_localize_align import preference

if TYPE_CHECKING:
    from headway.methods.diagnosis.diagnose_localize_align.training import AlignSettings, PreferencePair

Head = tuple[int, int]


@dataclass(frozen=True)
class Reference:
    """What the frozen reference says of one pair: log-probabilities of the answers' tokens, and their weights, chosen
    first."""

    logps: tuple[Float[Tensor, " chosen"], Float[Tensor, " rejected"]]
    weights: tuple[Float[Tensor, " chosen"], Float[Tensor, " rejected"]]


@torch.no_grad()
def read_reference(
    model: nn.Module,
    pairs: Sequence[PreferencePair],
    settings: AlignSettings,
    *,
    heads: Sequence[Head] = (),
    reward_model: nn.Module | None = None,
) -> list[Reference]:
    """Log-probabilities and token weights of every answer under the frozen reference, one answer at a time."""
    if settings.weights == "attention" and not heads:
        raise ArgumentError("heads: got none, expected the focal heads that credit tokens (see focal_heads).")
    if settings.weights == "reward" and reward_model is None:
        raise ArgumentError("reward_model: got none, expected a causal language model for weights='reward'.")
    was_training = model.training
    model.eval()
    try:
        # The outer scope tests the host once for all readings inside; without heads nothing is read.
        with adapters_off(model), use(_base(model)) if heads else nullcontext():
            return [_reference_of(model, pair, settings, heads, reward_model) for pair in pairs]
    finally:
        model.train(was_training)


def adapters_off(model: nn.Module) -> Any:
    """A scope in which a peft model is its base; nothing for any other model."""
    off = getattr(model, "disable_adapter", None)
    return off() if callable(off) else nullcontext()


def _reference_of(
    model: nn.Module,
    pair: PreferencePair,
    settings: AlignSettings,
    heads: Sequence[Head],
    reward_model: nn.Module | None,
) -> Reference:
    device = next(model.parameters()).device
    logps, weights = [], []
    for side, answer in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        ids = torch.cat([pair.prompt, answer])[None].to(device)
        start = pair.prompt.numel()
        inside = torch.ones(1, answer.numel(), dtype=torch.bool)
        credit = None
        if settings.weights == "attention":
            logits, credit = _with_credit(model, ids, start, pair.system, heads)
        else:
            logits = model(input_ids=ids, use_cache=False).logits
        own = _answer_logps(logits, ids, start).cpu()
        logps.append(own)
        if credit is not None:
            found = preference.attention_weights(
                credit[None], inside, strength=settings.strength, largest=settings.largest
            )
        elif settings.weights == "uniform":
            found = preference.uniform_weights(inside)
        else:
            reward = preference.constant_reward(settings.constant, inside)
            if settings.weights == "reward" and reward_model is not None:
                judged = reward_model(input_ids=ids.to(next(reward_model.parameters()).device), use_cache=False).logits
                reward = (_answer_logps(judged.to(device), ids, start).cpu() - own)[None]
            found = preference.reward_weights(
                reward,
                inside,
                side=side,  # type: ignore[arg-type]
                beta=settings.beta,
                strength=settings.strength,
                clip=settings.clip_negative,
                rescale=settings.rescale,
            )
        weights.append(found[0])
    return Reference((logps[0], logps[1]), (weights[0], weights[1]))


def _with_credit(
    model: nn.Module, ids: Int[Tensor, "1 tokens"], start: int, system: tuple[int, int], heads: Sequence[Head]
) -> tuple[Float[Tensor, "1 tokens vocabulary"], Float[Tensor, " answer"]]:
    """Logits, and the mean mass that focal heads put on the system span in the rows that predict the answer."""
    base: Any = _base(model)
    rows = torch.arange(start - 1, ids.shape[1] - 1, device=ids.device)
    layers = tuple(sorted({layer for layer, _ in heads}))
    with capture(base, what=("span_mass",), layers=layers, rows=rows, spans=(system,), selftest=False) as reading:
        logits = base(input_ids=ids, use_cache=False).logits
    captured = reading.result()
    for layer, head in heads:
        count = captured[layer]["span_mass"].shape[1]
        if not 0 <= head < count:
            raise unknown(f"heads of layer {layer}", head, range(count))
    masses = [captured[layer]["span_mass"][0, head, :, 0] for layer, head in heads]
    return logits, torch.stack(masses).mean(0).cpu()


def _base(model: nn.Module) -> nn.Module:
    """The model itself, inside a peft model."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def _answer_logps(logits: Tensor, ids: Tensor, start: int) -> Float[Tensor, " answer"]:
    response = torch.zeros_like(ids, dtype=torch.bool)
    response[:, start:] = True
    return preference.token_logps(logits, ids, response)[0, start:]
