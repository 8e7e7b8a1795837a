"""The trigger-conditional task with any normaliser or gate of the registry: one layer per seed, trained side by side.

Projections, data and training are those of `headway.tasks.trigger_averaging`; what turns logits into weights, and what
is multiplied behind them, comes from `headway.kernels.normalizers`, a module of its own for every seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from headway.kernels.normalizers import make_gate, make_normalizer
from headway.statistics import mixed_seed
from headway.tasks.trigger_averaging import (
    EVALUATION,
    HEAD_DIM,
    WIDTH,
    TriggerAttention,
    data_generators,
    judge,
    train,
    trigger_batch,
)

#: Arm -> normaliser and gate.
ARMS: dict[str, tuple[str, str | None]] = {
    "softmax": ("softmax", None),
    "softmax-plus-one": ("softmax_plus_one", None),
    "learned-denominator": ("learned_denominator", None),
    "head-gate": ("softmax", "head"),
    "affine": ("affine", None),
}


#: The stream of randomness of a seed that starts normalisers and gates.
RULES = 2


class ArenaLayer(TriggerAttention):
    """One causal head per seed with a normaliser and a gate of the registry."""

    def __init__(self, seeds: Sequence[int], *, normalizer: str, gate: str | None = None, bias: bool = False) -> None:
        super().__init__(seeds, bias=bias)
        self.normalizer = normalizer if gate is None else f"{normalizer} with gate {gate}"
        shape = {"width": WIDTH, "heads": 1, "kv_heads": 1, "head_dim": HEAD_DIM}
        rules, gates = [], []
        for seed in seeds:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(mixed_seed(RULES, seed))
                rules.append(make_normalizer(normalizer, scale=HEAD_DIM**-0.5, **shape))
                gates.append(nn.Identity() if gate is None else make_gate(gate, **shape))
        self.rules, self.gates = nn.ModuleList(rules), nn.ModuleList(gates)
        self.gated = gate is not None

    def forward(self, inputs: Tensor, *, without_first: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = (self.project(name, inputs) for name in ("query", "key", "value"))
        items = inputs.shape[2]
        visible = torch.ones(items, items, dtype=torch.bool).tril()
        if without_first:
            visible[1:, 0] = False
        scores = query @ key.transpose(-1, -2) * HEAD_DIM**-0.5
        weights, outputs = [], []
        modules: Any = zip(self.rules, self.gates, strict=True)
        for seed, (rule, gate) in enumerate(modules):
            weighing = rule.bind(inputs[seed], length=items)
            own = weighing(
                scores[seed][:, None], visible[None, None], positions=torch.arange(items),
                query=query[seed][:, None], key=key[seed][:, None],
            )  # fmt: skip
            output = own @ value[seed][:, None]
            weights.append(own[:, 0])
            outputs.append(gate(inputs[seed], output)[:, 0] if self.gated else output[:, 0])
        stacked = torch.stack(weights)
        return self.project("output", torch.stack(outputs)), stacked, value


def run_arm(name: str, seeds: Sequence[int], *, steps: int, bias: bool = False) -> dict[str, Any]:
    """Trains an arm with every seed and judges it: the numbers of `TriggerResult`, and `proxy_share`, the part of
    |weights| on item 0 at unflagged items, which also means something where weights are signed."""
    normalizer, gate = ARMS[name]
    model = ArenaLayer(seeds, normalizer=normalizer, gate=gate, bias=bias)
    generators = data_generators(seeds)
    train(model, generators, steps=steps)
    model.eval()
    batch = trigger_batch(generators, EVALUATION)
    found = asdict(judge(model, batch, seeds=seeds, steps=steps))
    with torch.no_grad():
        size = model(batch.inputs)[1].abs()
    unflagged = ~batch.flags
    unflagged[:, :, 0] = False
    share = size[..., 0] / size.sum(-1).clamp(min=1e-8)
    found["proxy_share"] = ((share * unflagged).sum((1, 2)) / unflagged.sum((1, 2))).tolist()
    return found
