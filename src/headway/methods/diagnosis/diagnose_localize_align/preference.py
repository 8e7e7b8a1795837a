"""The token-weighted preference loss.

    ρ_t = log π_θ(y_t | ·) − log π_ref(y_t | ·)
    m   = β ( Σ_t w⁺_t ρ⁺_t − Σ_t w⁻_t ρ⁻_t ) ,      L = −log σ(m) ,      ∂L/∂m = −σ(−m)

With every weight 1 this is direct preference optimisation (DPO, arXiv 2305.18290). Weights never carry a gradient and
are 0 on the prompt and on padding. Three sources of weights:

    attention   w_t = T · c̃_t / Σ c̃ ,  c̃_t = clip(1 + a (u_t − 1), 0, w_max) ,  u_t = c_t / mean c
                c_t: attention that the row which predicts y_t puts on the system span, mean over focal heads of the
                frozen reference; T the number of response tokens
    reward      w⁺_t = 1 + a β r_t ,  w⁻_t = 1 − a β r_t ,  r_t = log π_R(y_t) − log π_ref(y_t)
    constant    reward weights with one r for every token: the ablation

Paper: Diagnose, Localize, Align, arXiv 2509.23188. Its abstract credits tokens by their focal attention; the released
training code has the reward weights and no attention. The formula of the attention weights is ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from headway.errors import ArgumentError, unknown

Mode = Literal["uniform", "attention", "reward", "constant"]
MODES: tuple[Mode, ...] = ("uniform", "attention", "reward", "constant")
#: Released settings: β, and the strength of the weighting.
BETA, STRENGTH = 0.1, 0.5
#: Largest attention weight before the rescaling.
LARGEST = 4.0


@dataclass(frozen=True)
class PreferenceLoss:
    """The loss over a batch, its margins, and the margins of plain DPO.

    `loss` is the mean over pairs. `margins` are what is optimised, β Σ w ρ of chosen minus rejected; `plain_margins`
    leave the weights out, which is what the released code logs. `accuracy` counts margins above 0."""

    loss: Float[Tensor, ""]
    margins: Float[Tensor, " pairs"]
    plain_margins: Float[Tensor, " pairs"]

    @property
    def accuracy(self) -> float:
        return float((self.margins > 0).float().mean())

    def metrics(self) -> dict[str, float]:
        """Numbers for a log."""
        return {
            "margin": float(self.margins.mean()),
            "plain_margin": float(self.plain_margins.mean()),
            "accuracy": self.accuracy,
        }


def preference_loss(
    chosen: Float[Tensor, "pairs chosen_tokens"],
    rejected: Float[Tensor, "pairs rejected_tokens"],
    chosen_weights: Float[Tensor, "pairs chosen_tokens"],
    rejected_weights: Float[Tensor, "pairs rejected_tokens"],
    *,
    beta: float = BETA,
) -> PreferenceLoss:
    """The loss from log-ratios ρ of policy to reference by token and their weights.

    A token counts as part of a response where its weight is not 0 or its log-ratio is not 0; give both as 0 outside.
    Raises ArgumentError for shapes that differ, and for weights that carry a gradient."""
    _check_beta(beta)
    for name, ratios, weights in (
        ("chosen_weights", chosen, chosen_weights),
        ("rejected_weights", rejected, rejected_weights),
    ):
        if weights.shape != ratios.shape:
            raise ArgumentError(
                f"{name}: got shape {tuple(weights.shape)}, expected {tuple(ratios.shape)}: one weight for each token."
            )
        if weights.requires_grad:
            raise ArgumentError(f"{name}: got weights with a gradient, expected constants. Call detach() on them.")
    if chosen.shape[0] != rejected.shape[0]:
        raise ArgumentError(
            f"chosen, rejected: got {chosen.shape[0]} and {rejected.shape[0]} responses, expected one of each per pair."
        )
    margins = beta * ((chosen_weights * chosen).sum(-1) - (rejected_weights * rejected).sum(-1))
    plain = beta * (chosen.detach().sum(-1) - rejected.detach().sum(-1))
    return PreferenceLoss(F.softplus(-margins).mean(), margins.detach(), plain)


def token_logps(
    logits: Float[Tensor, "batch tokens vocabulary"],
    ids: Int[Tensor, "batch tokens"],
    response: Bool[Tensor, "batch tokens"],
) -> Float[Tensor, "batch tokens"]:
    """log π(y_t | ·) at the place of y_t where `response` is True, 0 elsewhere. The first token has no prediction, so
    it cannot be part of a response."""
    if ids.shape != response.shape or logits.shape[:2] != ids.shape:
        raise ArgumentError(
            f"logits, ids, response: got {tuple(logits.shape)}, {tuple(ids.shape)} and {tuple(response.shape)}, "
            "expected (batch, tokens, vocabulary), (batch, tokens) and (batch, tokens)."
        )
    if bool(response[:, 0].any()):
        raise ArgumentError("response: got a response that starts at token 0, expected a prompt before it.")
    scores = logits[:, :-1].float().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    return F.pad(scores, (1, 0)) * response


def uniform_weights(response: Bool[Tensor, "batch tokens"]) -> Float[Tensor, "batch tokens"]:
    """1 on responses, 0 elsewhere: DPO."""
    return response.float()


def attention_weights(
    credit: Float[Tensor, "batch tokens"],
    response: Bool[Tensor, "batch tokens"],
    *,
    strength: float = STRENGTH,
    largest: float = LARGEST,
) -> Float[Tensor, "batch tokens"]:
    """Weights from the attention that the row before each token puts on the system span.

    They sum to the number of tokens in each response. A response without any credit gets weight 1 everywhere.
    `strength` in [0, 1]: 0 gives DPO."""
    if not 0 <= strength <= 1:
        raise ArgumentError(f"strength: got {strength}, expected a number in [0, 1] for attention weights.")
    if not largest >= 1:
        raise ArgumentError(
            f"largest: got {largest}, expected at least 1, or no token could weigh what it does in DPO."
        )
    if credit.shape != response.shape:
        raise ArgumentError(f"credit: got shape {tuple(credit.shape)}, expected {tuple(response.shape)}.")
    credit, inside = credit.detach().float(), response.float()
    if bool((credit[response] < 0).any()) or not bool(torch.isfinite(credit[response]).all()):
        raise ArgumentError("credit: got negative or infinite values, expected attention masses of at least 0.")
    count = inside.sum(-1, keepdim=True)
    mean = (credit * inside).sum(-1, keepdim=True) / count.clamp(min=1)
    relative = torch.where(mean > 0, credit / mean.clamp(min=1e-30), torch.ones_like(credit))
    return _rescaled((1 + strength * (relative - 1)).clamp(0, largest) * inside, inside)


def reward_weights(
    reward: Float[Tensor, "batch tokens"],
    response: Bool[Tensor, "batch tokens"],
    *,
    side: Literal["chosen", "rejected"],
    beta: float = BETA,
    strength: float = STRENGTH,
    clip: bool = False,
    rescale: bool = False,
) -> Float[Tensor, "batch tokens"]:
    """1 ± strength · β · r_t, with + for chosen and − for rejected responses, as released: neither bounded nor
    normalised, so it can be negative. `clip` bounds it below by 0; `rescale` makes it sum to the number of tokens, and
    needs `clip`. Tell how often it bites with `negative_share`."""
    if side not in ("chosen", "rejected"):
        raise unknown("side", side, ("chosen", "rejected"))
    if rescale and not clip:
        raise ArgumentError("rescale: got it without clip, expected clip=True: negative weights have no useful sum.")
    _check_beta(beta)
    sign = 1.0 if side == "chosen" else -1.0
    inside = response.float()
    weights = (1 + sign * strength * beta * reward.detach().float()) * inside
    if clip:
        weights = weights.clamp(min=0)
    return _rescaled(weights, inside) if rescale else weights


def constant_reward(reward: float, response: Bool[Tensor, "batch tokens"]) -> Float[Tensor, "batch tokens"]:
    """One reward for every token of a response: the ablation that takes the token's own credit away."""
    return reward * response.float()


def negative_share(weights: Float[Tensor, "batch tokens"], response: Bool[Tensor, "batch tokens"]) -> float:
    """Share of response tokens whose weight is below 0: those whose preference is turned around."""
    return float((weights[response] < 0).float().mean()) if bool(response.any()) else 0.0


def _rescaled(weights: Tensor, inside: Tensor) -> Tensor:
    """Weights that sum to the number of response tokens; uniform where all of them are 0."""
    total, count = weights.sum(-1, keepdim=True), inside.sum(-1, keepdim=True)
    return torch.where(total > 0, weights * count / total.clamp(min=1e-30), inside)


def _check_beta(beta: float) -> None:
    if not beta > 0:
        raise ArgumentError(f"beta: got {beta}, expected above 0.")
