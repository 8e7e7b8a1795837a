"""DuoAttention on planted decoders, where it is known which heads retrieve: gates, accuracies and effects of a seed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from headway.door import use
from headway.evidence.recipes import _planted_retrieval as planted
from headway.methods.long_context.duo_attention import DuoAttention, GateSample, learn_gates

#: What streaming heads keep: facts stand further back.
TOY: dict[str, Any] = {"sinks": 4, "recent": 32}
TOY_RATE, TOY_FULL = 0.05, 3 / 12
RANDOM_DRAWS = 3


def toy_run(seed: int, steps: int, count: int) -> dict[str, Any]:
    """Gates of one planted model, learned on lookups and on plain text, and the accuracy of each choice of heads on
    `count` texts."""
    model = planted.planted_model(seed % 2**31)
    samples = [planted.lookup(seed + i) for i in range(count)]
    options: dict[str, Any] = {"steps": steps, "learning_rate": TOY_RATE, **TOY}
    gates = learn_gates(model, partial(_lookups, seed), **options).gates.values
    plain = learn_gates(model, partial(_plain, seed), **options).gates.values
    accuracy = partial(_toy_accuracy, model, samples)
    generator = torch.Generator().manual_seed(seed)
    random = [accuracy(torch.rand(gates.shape, generator=generator)) for _ in range(RANDOM_DRAWS)]
    return {
        "gates": gates,
        "planted": planted.planted_heads(seed % 2**31),
        "full": planted.lookup_accuracy(model, samples),
        "learned": accuracy(gates),
        "inverted": accuracy(-gates),
        "random": sum(random) / len(random),
        "plain": accuracy(plain),
        "effects": _effects(model, samples[: max(count // 4, 2)], gates.shape),
    }


def _lookups(seed: int, step: int) -> GateSample:
    sample = planted.lookup(seed + 10_000 + step)
    rows = torch.zeros(sample.ids.shape[1], dtype=torch.bool)
    rows[sample.rows] = True
    return GateSample(sample.ids, rows)


def _plain(seed: int, step: int) -> GateSample:
    """The same texts without their questions; every row counts, as in language modelling."""
    sample = planted.lookup(seed + 10_000 + step)
    ids = sample.ids[:, : int(sample.rows[0])]
    return GateSample(ids, torch.ones(ids.shape[1], dtype=torch.bool))


def _toy_accuracy(model: nn.Module, samples: list[planted.Lookup], gates: Tensor) -> float:
    with use(model, DuoAttention(gates=gates, sparsity=_toy_sparsity(gates), **TOY)):
        return planted.lookup_accuracy(model, samples)


def _toy_sparsity(gates: Tensor) -> float:
    """At which three of twelve heads keep everything."""
    return (gates.numel() - TOY_FULL * gates.numel()) / (gates.numel() - 1)


def _effects(model: nn.Module, samples: list[planted.Lookup], shape: Sequence[int]) -> list[list[float]]:
    """How far the answers' logits move when one head alone is made a streaming head, as a root mean square."""
    effects = torch.zeros(*shape)
    ones = torch.ones(*shape)
    with torch.no_grad():
        native = [model(input_ids=s.ids, use_cache=True).logits[0, s.rows, : _answers()] for s in samples]
        for layer in range(shape[0]):
            for head in range(shape[1]):
                gates = ones.clone()
                gates[layer, head] = 0
                with use(model, DuoAttention(gates=gates, threshold=0.5, **TOY)):
                    moved = [model(input_ids=s.ids, use_cache=True).logits[0, s.rows, : _answers()] for s in samples]
                change = torch.cat(moved) - torch.cat(native)
                effects[layer, head] = change.square().mean().sqrt()
    return effects.tolist()


def _answers() -> int:
    return planted.ATTRIBUTES * planted.VALUES
