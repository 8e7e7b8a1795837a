"""Attribution methods: how much each word embedding moved one output away from its value at a baseline.

    gradient            ∂f/∂E
    input_x_gradient    (E − E0) · ∂f/∂E
    integrated          (E − E0) · Σ_k w_k ∂f/∂E (E0 + t_k (E − E0)) ,  t, w: Gauss-Legendre on [0, 1]
    grad_shap           (E − E0) · mean_s ∂f/∂E (E0 + t_s (E − E0)) ,   t_s uniform on [0, 1]
    lime                weights of a ridge regression of f on random masks, near ones counting more
    ablation            f(E) − f(E with token j at the baseline)

Sources: arXiv 1703.01365 (integrated gradients), 1705.07874 (SHAP), 1602.04938 (LIME).

A token's attribution is the sum over embedding dimensions; LIME and ablation have one number per token to begin with.
Integrated gradients and ablation run through captum. Grad-SHAP and LIME are written here: captum's draw from global
random states, and its LIME runs one mask at a time. DeepLIFT is in `deep_rules`.

Every forward holds at most `Settings.budget` tokens, whatever steps, samples or masks are asked for. Methods that
promise Σ_j attribution_j = f(E) − f(E0) return how far they miss it as `error`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from headway.door.evaluating import evaluating
from headway.errors import ArgumentError, missing_extra, unknown
from headway.methods.diagnosis.song_of_disagreement.classifier import (
    BASELINES,
    Classifier,
    Example,
    baseline_of,
    inputs_of,
    target_of,
)

Sign = Literal["abs", "positive", "signed"]
SIGNS: tuple[Sign, ...] = ("abs", "positive", "signed")
#: Width of LIME's kernel over cosine distances, as in captum and the released code.
KERNEL_WIDTH = 1.0


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How explanations are taken. `steps` of integrated gradients, `samples` of Grad-SHAP and `masks` of LIME are the
    paper's. `ridge` is LIME's penalty. `target`: "predicted", "gold" or a class. `sign`: what becomes of the sign,
    which attention does not have. `budget`: tokens of one forward. `allow_unsupported` lets DeepLIFT run on
    operations that its rules do not cover; the error then says what that cost. `references`: baselines of Deep-SHAP.
    `flow_tokens`: longest text that attention flow is tried on."""

    baseline: str = "pad"
    steps: int = 50
    samples: int = 5
    masks: int = 1000
    ridge: float = 1.0
    target: str | int = "predicted"
    sign: Sign = "abs"
    budget: int = 4096
    flow_tokens: int = 128
    allow_unsupported: bool = False
    references: tuple[str, ...] = ("pad", "mean", "zero")

    def __post_init__(self) -> None:
        for name in ("baseline", *["references"] * len(self.references)):
            given = [self.baseline] if name == "baseline" else self.references
            for kind in given:
                if kind not in BASELINES:
                    raise unknown(name, kind, BASELINES)
        if self.sign not in SIGNS:
            raise unknown("sign", self.sign, SIGNS)
        if isinstance(self.target, str) and self.target not in ("predicted", "gold"):
            raise unknown("target", self.target, ("predicted", "gold", "a class such as 1"))
        for name in ("steps", "samples", "masks", "budget", "flow_tokens"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ArgumentError(f"{name}: got {value!r}, expected a whole number of at least 1.")
        if not self.ridge >= 0:
            raise ArgumentError(f"ridge: got {self.ridge}, expected a penalty of 0 or more.")
        if not self.references:
            raise ArgumentError("references: got none, expected at least one baseline for Deep-SHAP.")


@dataclass(frozen=True, kw_only=True, eq=False)
class Explanation:
    """Token scores of one method for one example. `signed` is before the sign policy, `scores` after it; padding is
    0 in both. `value` and `baseline_value` are f at the input and at the baseline, `error` is Σ signed − (value −
    baseline_value) where the method promises that to be 0, else None. `note` says what a reader must know."""

    method: str
    signed: Float[np.ndarray, " tokens"]
    scores: Float[np.ndarray, " tokens"]
    target: int
    value: float
    baseline_value: float | None = None
    error: float | None = None
    note: str = ""


@dataclass(frozen=True, eq=False)
class Problem:
    """One example made ready: f(embeddings) of the explained class, with everything that methods share."""

    classifier: Classifier
    example: Example
    embeddings: Float[Tensor, "1 tokens width"]
    baseline: Float[Tensor, "1 tokens width"]
    mask: Bool[Tensor, "1 tokens"]
    target: int
    settings: Settings
    value: float = 0.0
    baseline_value: float = 0.0
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    @property
    def rows(self) -> int:
        """Rows of one forward within the budget."""
        return max(1, self.settings.budget // self.mask.shape[1])

    def f(self, embeddings: Float[Tensor, "rows tokens width"]) -> Float[Tensor, " rows"]:
        """The explained output of each row, in evaluation mode: dropout would make every explanation another one."""
        with evaluating(self.classifier.module):
            return self.classifier.outputs(embeddings, self.mask.expand(len(embeddings), -1))[:, self.target]

    @torch.no_grad()
    def values(self, embeddings: Callable[[slice], Tensor], count: int) -> Float[Tensor, " count"]:
        """f of `count` inputs, made and read within the budget."""
        parts = [self.f(embeddings(slice(i, min(i + self.rows, count)))) for i in range(0, count, self.rows)]
        return torch.cat(parts).double().cpu()


def prepare(classifier: Classifier, example: Example, settings: Settings, *, seed: int = 0) -> Problem:
    """Embeddings, baseline and explained class of one example. `seed` is that of the sampling methods."""
    embeddings, mask = inputs_of(classifier, example)
    baseline = baseline_of(classifier, settings.baseline, embeddings, mask)
    with torch.no_grad(), evaluating(classifier.module):
        outputs = classifier.outputs(torch.cat([embeddings, baseline]), mask.expand(2, -1))
    target = target_of(outputs[:1], example, settings.target)
    return Problem(
        classifier,
        example,
        embeddings,
        baseline,
        mask,
        target,
        settings,
        float(outputs[0, target]),
        float(outputs[1, target]),
        torch.Generator().manual_seed(seed),
    )


def apply_sign(signed: Float[np.ndarray, " tokens"], sign: str) -> Float[np.ndarray, " tokens"]:
    """ "abs" |s|, "positive" max(s, 0), "signed" s."""
    if sign not in SIGNS:
        raise unknown("sign", sign, SIGNS)
    return np.abs(signed) if sign == "abs" else np.maximum(signed, 0.0) if sign == "positive" else signed


def explained(
    problem: Problem, method: str, signed: Tensor | np.ndarray, *, promises: bool, note: str = ""
) -> Explanation:
    """An Explanation of token numbers; `promises` says that they ought to add up."""
    numbers = np.asarray(torch.as_tensor(signed).detach().double().cpu()) * problem.mask[0].cpu().numpy()
    error = float(numbers.sum()) - (problem.value - problem.baseline_value) if promises else None
    return Explanation(
        method=method,
        signed=numbers,
        scores=apply_sign(numbers, problem.settings.sign),
        target=problem.target,
        value=problem.value,
        baseline_value=problem.baseline_value,
        error=error,
        note=note,
    )


def gradient(problem: Problem) -> Explanation:
    """Σ_dim ∂f/∂E of each token."""
    return explained(problem, "gradient", _gradients(problem, problem.embeddings).sum(-1)[0], promises=False)


def input_x_gradient(problem: Problem) -> Explanation:
    """Σ_dim (E − E0) ∂f/∂E of each token: the first-order change, which need not add up."""
    moved = (problem.embeddings - problem.baseline) * _gradients(problem, problem.embeddings)
    return explained(problem, "input_x_gradient", moved.sum(-1)[0], promises=True)


def integrated_gradients(problem: Problem) -> Explanation:
    """Integrated gradients by captum, Gauss-Legendre nodes, sub-batches within the budget."""
    attr = captum_attr("integrated gradients")
    with _quiet(), kept_gradients(problem.classifier):
        found = attr.IntegratedGradients(problem.f).attribute(
            problem.embeddings.clone().requires_grad_(),
            baselines=problem.baseline,
            n_steps=problem.settings.steps,
            method="gausslegendre",
            internal_batch_size=problem.rows,
        )
    return explained(problem, "integrated_gradients", found.sum(-1)[0], promises=True)


def grad_shap(problem: Problem) -> Explanation:
    """Expected gradients on `samples` random points of the straight path; no noise, as in the paper's runs."""
    samples = problem.settings.samples
    places = torch.rand(samples, generator=problem.generator)[:, None, None].to(problem.embeddings)
    difference = problem.embeddings - problem.baseline
    total = torch.zeros_like(problem.embeddings[0])
    for start in range(0, samples, problem.rows):
        points = problem.baseline + places[start : start + problem.rows] * difference
        total += _gradients(problem, points).sum(0)
    return explained(problem, "grad_shap", (difference[0] * total / samples).sum(-1), promises=True)


def lime(problem: Problem) -> Explanation:
    """Ridge weights of `masks` random masks; a masked token is at the baseline.

    Masks are Bernoulli(1/2) over real tokens, the weight of one is exp(−d² / 2) with d the cosine distance of its
    flattened embeddings from the input's, padding left out. The intercept is not penalised. For a linear f the
    weights approach (E − E0) · ∂f/∂E."""
    settings = problem.settings
    real = problem.mask[0].nonzero()[:, 0].cpu()
    drawn = torch.rand(settings.masks, len(real), generator=problem.generator) < 0.5
    kept = torch.ones(settings.masks, problem.mask.shape[1], dtype=torch.bool)
    kept[:, real] = drawn
    distances: list[Tensor] = []
    whole = problem.embeddings[:, real].flatten(1).double()

    def perturbed(part: slice) -> Tensor:
        points = torch.where(kept[part][..., None].to(problem.mask.device), problem.embeddings, problem.baseline)
        distances.append(1 - torch.cosine_similarity(points[:, real].flatten(1).double(), whole, dim=1).cpu())
        return points

    values = problem.values(perturbed, settings.masks)
    weights = torch.exp(-(torch.cat(distances) ** 2) / (2 * KERNEL_WIDTH**2))
    signed = torch.zeros(problem.mask.shape[1], dtype=torch.float64)
    signed[real] = ridge_weights(drawn.double(), values, weights, settings.ridge)
    return explained(problem, "lime", signed, promises=False)


def ridge_weights(
    masks: Float[Tensor, "masks tokens"],
    values: Float[Tensor, " masks"],
    weights: Float[Tensor, " masks"],
    penalty: float,
) -> Float[Tensor, " tokens"]:
    """argmin_β Σ_m w_m (y_m − β0 − β·z_m)² + penalty ‖β‖², with a free intercept."""
    share = weights / weights.sum()
    z, y = masks - share @ masks, values - share @ values
    weighted = z * weights[:, None]
    system = weighted.T @ z + penalty * torch.eye(z.shape[1], dtype=z.dtype)
    if penalty == 0 and int(torch.linalg.matrix_rank(system)) < len(system):
        raise ArgumentError(
            f"masks: got {len(masks)} for {len(system)} tokens without a ridge penalty, expected more masks than "
            "tokens. Use more masks or ridge > 0."
        )
    return torch.linalg.solve(system, weighted.T @ y)


def ablation(problem: Problem) -> Explanation:
    """f(E) − f(E with the token at the baseline), by captum's feature ablation, one group of dimensions per token."""
    attr = captum_attr("feature ablation")
    count, width = problem.embeddings.shape[1:]
    groups = torch.arange(count, device=problem.mask.device)[None, :, None].expand(1, count, width)
    with _quiet(), torch.no_grad():
        found = attr.FeatureAblation(problem.f).attribute(
            problem.embeddings,
            baselines=problem.baseline,
            feature_mask=groups,
            perturbations_per_eval=min(problem.rows, count),
        )
    return explained(problem, "ablation", found.mean(-1)[0], promises=False)


def baseline_sensitivity(
    classifier: Classifier,
    example: Example,
    method: Callable[[Problem], Explanation],
    settings: Settings | None = None,
    *,
    baselines: tuple[str, ...] = ("pad", "mean", "zero"),
    seed: int = 0,
) -> dict[str, Explanation]:
    """The same method with each baseline; correlate them to see how much the choice decides."""
    base = settings or Settings()
    return {kind: method(prepare(classifier, example, replace(base, baseline=kind), seed=seed)) for kind in baselines}


def captum_attr(purpose: str) -> Any:
    """captum's `attr` module, or the one-line error that says how to install it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import captum.attr
    except ImportError:
        raise missing_extra("captum", "attribution", purpose) from None
    return captum.attr


def _gradients(problem: Problem, points: Float[Tensor, "rows tokens width"]) -> Float[Tensor, "rows tokens width"]:
    with torch.enable_grad(), kept_gradients(problem.classifier):
        points = points.detach().clone().requires_grad_()
        return torch.autograd.grad(problem.f(points).sum(), points)[0]


@contextmanager
def kept_gradients(classifier: Classifier) -> Iterator[None]:
    """No parameter records a gradient inside: graphs stay small, and nothing of the model changes. Recurrent layers
    on a GPU cannot go backward in eval mode by cuDNN, which is switched off for them."""
    parameters = [p for p in classifier.module.parameters() if p.requires_grad]
    recurrent = any(isinstance(m, torch.nn.RNNBase) for m in classifier.module.modules())
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        with torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled and not recurrent):
            yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


@contextmanager
def _quiet() -> Iterator[None]:
    """captum warns of what is meant here: sub-batches, and hooks that it removes again."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="captum")
        yield
