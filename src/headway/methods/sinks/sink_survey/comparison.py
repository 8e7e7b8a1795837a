"""What a comparison of models says of their sinks: the measures that every arm of an experiment gets alike.

    loss            nats per token on held-out text
    Sink_1          share of heads that give the first token more than 0.3 of their attention (α_1 > ε)
    first share     mean weight on the first token;  mass: mean row sum;  slot: what is left of a row for a virtual slot
    kurtosis, inf norm, massive ratio   of the states between blocks
    INT8 gap        loss with all linear maps in absmax INT8 (weights and inputs, one scale per tensor) − loss
    streaming gap   loss when every row sees a window without the first tokens ÷ loss

Weights that are no distribution are read through the proxy of arXiv 2410.10781 (A / ΣA, signed |A| / Σ|A|), and the raw
mass stands beside it: a row of tiny weights has a proxy of one all the same. Softmax with slots in its denominator is
read as it is: what the slot gets is its business. Comparison: arXiv 2604.10098.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from headway.door import AttentionCall, Observer, Site
from headway.door.attach import observe as attach
from headway.errors import ArgumentError
from headway.methods.sinks.sink_survey.metrics import infinity_norm, kurtosis, norm_ratio
from headway.methods.sinks.sink_survey.quantisation import quantise
from headway.train.losses import token_loss

#: The ε of Sink_k^ε, and the proxy's guard against a row of zeros (arXiv 2410.10781 and its code).
EPSILON, PROXY_EPS = 0.3, 1e-8
#: Query rows per block.
ROWS = 128
#: Softmax with something more in its denominator: rows sum to less than one, and are read as they are.
SLOTS = ("softmax_plus_one", "learned_denominator", "key_slot", "key_value_slot")
#: Token ids, and labels of which −100 is not scored.
Judged = tuple[Int[Tensor, "batch tokens"], Int[Tensor, "batch tokens"]]


@torch.no_grad()
def measure_model(model: Any, batches: Sequence[Judged], *, window: int) -> dict[str, float]:
    """Every measure but those of training, on held-out batches without padding. The model is in eval mode; `window` is
    that of the streaming gap."""
    loss = loss_of(model, batches)
    observer, states = _Sinks(), _States()
    with attach(model, observer):
        for ids, _ in batches:
            hidden = model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
            states.add(hidden[1:-1] or hidden[:1])
    with in_int8(model):
        rounded = loss_of(model, batches)
    with narrowed(model, window):
        streamed = loss_of(model, batches)
    return {
        "loss": loss,
        **observer.result(),
        **states.result(),
        "int8_gap": rounded - loss,
        "streaming_gap": streamed / loss,
    }


@torch.no_grad()
def loss_of(model: Any, batches: Sequence[Judged]) -> float:
    """Mean loss over all scored tokens."""
    total = count = 0.0
    for ids, labels in batches:
        scored = float((labels[:, 1:] >= 0).sum())
        value, _ = token_loss(model(input_ids=ids, use_cache=False).logits, labels)
        total, count = total + float(value) * scored, count + scored
    return total / count


def readable_weights(
    call: AttentionCall, rows: Int[Tensor, " rows"]
) -> tuple[Float[Tensor, "batch heads rows keys"], Float[Tensor, "batch heads rows"]]:
    """Weights as a share of attention, and the raw sum of each row: softmax weights as they are, with or without a
    slot, others through the proxy."""
    weights = call.weights(rows).float()
    mass = weights.sum(-1)
    rule = call.weighing
    if rule is None or rule.whole or rule.name in SLOTS:
        return weights, mass
    size = weights.abs()
    return size / (size.sum(-1, keepdim=True) + PROXY_EPS), mass


@dataclass(frozen=True, kw_only=True)
class _Sinks(Observer):
    """α, first share and mass by layer, from the first token on; sequences have no padding."""

    reads_weights = True
    found: dict[str, dict[str, Tensor]] = field(default_factory=dict, init=False, compare=False)

    def start(self) -> None:
        self.found.clear()

    def acts_at(self, site: Site) -> bool:
        return site.kind == "self"

    def observe(self, call: AttentionCall, output: Tensor, lse: Tensor | None = None) -> None:
        batch, heads, keys = call.query.shape[0], call.heads, call.keys
        received, seen = (torch.zeros(batch, heads, keys) for _ in range(2))
        mass = torch.zeros(batch, heads)
        slotted = call.sinks is not None or (call.weighing is not None and call.weighing.name in SLOTS)
        for rows in torch.arange(call.queries).split(ROWS):
            visible = call.visible(rows)
            weights, raw = readable_weights(call, rows)
            received += (weights * visible).sum(2)
            seen += visible.float().sum(2)
            mass += raw.sum(-1)
        first = received[..., 0] / seen[..., 0].clamp(min=1)
        # The first row of a causal map can read nothing but itself.
        row, own = readable_weights(call, torch.zeros(1, dtype=torch.long))
        one, own = row[..., 0, 0], own[..., 0]
        later = (seen[..., 0] - 1).clamp(min=1)
        mean_mass = mass / call.queries
        entry = {
            "alpha": received / seen.clamp(min=1),
            "first": first,
            "share": (received[..., 0] - one) / later,
            "raw": (mass - own) / max(call.queries - 1, 1),
            "slot": 1 - mean_mass if slotted else torch.zeros_like(mean_mass),
        }
        kept = self.found.setdefault(call.site.name, {})
        for name, value in entry.items():
            kept[name] = torch.cat([kept[name], value]) if name in kept else value

    def result(self) -> dict[str, float]:
        if not self.found:
            raise ArgumentError("model: got one without self-attention that passes the door, expected a mixer with it.")
        layers = list(self.found.values())

        def mean(name: str) -> float:
            return float(torch.stack([layer[name].mean() for layer in layers]).mean())

        alpha = torch.stack([(layer["alpha"] > EPSILON).float().mean((0, 1)) for layer in layers]).mean(0)
        enough = alpha[1 : max(int(0.75 * alpha.numel()), 2)]
        return {
            "sink_1": float(alpha[0]),
            "sink_next": float(enough.max()),
            "sink_slot": float(torch.stack([(layer["slot"] > EPSILON).float().mean() for layer in layers]).mean()),
            "first_share": mean("share"),
            "mass": mean("raw"),
            "slot": mean("slot"),
        }


class _States:
    """Outliers of the states between blocks: means over tokens, the largest block."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Tensor]] = []

    def add(self, hidden: Any) -> None:
        self.rows.append(
            {
                "kurtosis": torch.stack([kurtosis(h).mean() for h in hidden]),
                "inf_norm": torch.stack([infinity_norm(h).amax() for h in hidden]),
                "massive_ratio": torch.stack([norm_ratio(h).mean() for h in hidden]),
            }
        )

    def result(self) -> dict[str, float]:
        means = {name: torch.stack([row[name] for row in self.rows]) for name in self.rows[0]}
        return {
            "kurtosis": float(means["kurtosis"].mean(0).amax()),
            "inf_norm": float(means["inf_norm"].amax()),
            "massive_ratio": float(means["massive_ratio"].mean(0).amax()),
        }


@contextmanager
def in_int8(model: Any, *, bits: int = 8) -> Iterator[None]:
    """While the context is open, every linear map but the last reads its input and its weight through absmax integers
    of so many bits, one scale per tensor. The numbers are those of integer arithmetic; the speed is not."""
    last = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    maps = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not last]
    kept = [m.weight.data for m in maps]
    hooks = [
        m.register_forward_pre_hook(lambda module, args: (quantise(args[0], bits=bits).to(args[0].dtype), *args[1:]))
        for m in maps
    ]
    try:
        for m in maps:
            m.weight.data = quantise(m.weight.data, bits=bits).to(m.weight.dtype)
        yield
    finally:
        for m, weight in zip(maps, kept, strict=True):
            m.weight.data = weight
        for hook in hooks:
            hook.remove()


@contextmanager
def narrowed(model: nn.Module, window: int) -> Iterator[None]:
    """While the context is open, rows of softmax mixers see the last `window` tokens alone, their prefix and first
    tokens not among them. Mixers without a window are left as they are."""
    if window < 1:
        raise ArgumentError(f"window: got {window}, expected at least 1: the token itself.")
    mixers: list[Any] = [m for m in model.modules() if hasattr(m, "normalizer") and hasattr(m, "window")]
    kept = [(m, m.window, m.prefix) for m in mixers]
    try:
        for m in mixers:
            m.window = window if m.window is None else min(m.window, window)
            m.prefix = 0
        yield
    finally:
        for m, before, prefix in kept:
            m.window, m.prefix = before, prefix
