"""Parameter groups: weight decay belongs to matrices, not to norms, biases and other vectors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from headway.errors import ArgumentError

#: Adam's usual averages for language models.
BETAS = (0.9, 0.95)

OptimizerFactory = Callable[[nn.Module], torch.optim.Optimizer]


def parameter_groups(model: nn.Module, *, weight_decay: float) -> list[dict[str, Any]]:
    """The parameters that require gradients in two groups: those that decay, and those that do not.

    Not decayed: everything with fewer than two axes (biases, gains of norms, slopes, gates per head), all of a norm
    module, and what a module names in its `no_decay` (gains and angles per head, which have two axes)."""
    spared = {id(p) for module in model.modules() if "norm" in type(module).__name__.lower() and _is_leaf(module)
              for p in module.parameters()}  # fmt: skip
    for module in model.modules():
        spared |= {id(getattr(module, name)) for name in getattr(module, "no_decay", ())}
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for parameter in trained_parameters(model):
        vector = parameter.ndim < 2 or id(parameter) in spared
        (kept if vector else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def adamw(
    model: nn.Module,
    *,
    learning_rate: float = 3e-4,
    weight_decay: float = 0.1,
    betas: tuple[float, float] = BETAS,
    eps: float = 1e-8,
) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`."""
    groups = parameter_groups(model, weight_decay=weight_decay)
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=eps)


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that require gradients, tied ones once. Raises ArgumentError when there are none."""
    found = [p for p in model.parameters() if p.requires_grad]
    if not found:
        raise ArgumentError("model: got no parameter that requires gradients. Call model.requires_grad_(True) first.")
    return found


def _is_leaf(module: nn.Module) -> bool:
    return next(module.children(), None) is None
