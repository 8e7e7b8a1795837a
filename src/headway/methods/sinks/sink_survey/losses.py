"""Loss terms of the survey's utilization chapter; the mitigation terms are in `headway.train`'s losses.

    inter-position distillation   KL(A_start ‖ A_target)          a later position learns the map of the first one
    attraction                    −mean log Σ_{s ∈ P} A_is        a prefix P learns to be the sink
    self-distilled registers      ‖f_T(X) − f_S([X; R])‖²         a student with registers R, a teacher without
    sink divergence               λ · mean_h ReLU(d_h) ,          d_h = sink attention, harmful − refusing samples

Survey: arXiv 2604.10098, whose wording leaves the attraction term open: the form here is ours.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from headway.errors import ArgumentError

#: Keeps the logarithm of an empty weight finite.
TINY = 1e-9


def position_distillation(
    start: Float[Tensor, "*batch keys"], target: Float[Tensor, "*batch keys"]
) -> Float[Tensor, ""]:
    """KL(start ‖ target) in nats, the mean over rows: 0 when both maps are the same. Weights that are 0 in `start`
    count nothing."""
    if start.shape != target.shape:
        raise ArgumentError(
            f"start, target: got shapes {tuple(start.shape)} and {tuple(target.shape)}, expected equal ones: rows over "
            "the same keys."
        )
    first, second = start.float(), target.float().clamp(min=TINY)
    return (torch.xlogy(first, first) - first * second.log()).sum(-1).mean()


def attraction(weights: Float[Tensor, "*batch queries keys"], prefix: Bool[Tensor, " keys"] | int) -> Float[Tensor, ""]:
    """−mean log of the mass on the prefix (a mask, or how many first keys it has), over the rows behind it."""
    count = prefix if isinstance(prefix, int) else int(prefix.sum())
    if not 0 < count < weights.shape[-1]:
        raise ArgumentError(f"prefix: got {count} of {weights.shape[-1]} keys, expected some and not all.")
    if isinstance(prefix, int):
        prefix = torch.arange(weights.shape[-1], device=weights.device) < prefix
    mass = (weights.float() * prefix).sum(-1)
    behind = torch.arange(weights.shape[-2], device=weights.device) + weights.shape[-1] - weights.shape[-2] >= count
    return -(mass.clamp(min=TINY).log() * behind).sum(-1).mean() / behind.sum()


def self_distilled_registers(
    teacher: Float[Tensor, "batch tokens width"], student: Float[Tensor, "batch tokens_and_registers width"]
) -> Float[Tensor, ""]:
    """Mean squared distance of the student's tokens from the teacher's; the student's registers, behind the tokens,
    are left out. No gradient reaches the teacher."""
    tokens = teacher.shape[1]
    if student.shape[1] < tokens or student.shape[0] != teacher.shape[0] or student.shape[2] != teacher.shape[2]:
        raise ArgumentError(
            f"student: got shape {tuple(student.shape)}, expected (batch, {tokens} tokens and registers, width) like "
            f"the teacher's {tuple(teacher.shape)}."
        )
    return (student[:, :tokens].float() - teacher.detach().float()).square().mean()


def sink_divergence(
    harmful: Float[Tensor, "samples heads"], refusing: Float[Tensor, "others heads"], *, weight: float = 1.0
) -> Float[Tensor, ""]:
    """λ · mean_h ReLU(mean sink attention on harmful samples − on refusing ones): 0 where no head sinks more on the
    harmful ones."""
    if harmful.shape[-1] != refusing.shape[-1]:
        raise ArgumentError(
            f"harmful, refusing: got {harmful.shape[-1]} and {refusing.shape[-1]} heads, expected the same heads."
        )
    return weight * torch.relu(harmful.float().mean(0) - refusing.float().mean(0)).mean()
