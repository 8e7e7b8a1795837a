"""Optimisers against outliers: Adam in a rotated basis, and Muon for the matrices of a model.

    OrthoAdam   u_t = Adam step on Qᵀ g_t ,   θ ← θ − rate · Q u_t          Q: fixed random orthogonal, per parameter
    Muon        θ ← θ − rate · orthogonalised momentum                      hidden matrices; AdamW for all the rest

Adam's step is a sign in each coordinate, which favours the axes of the residual stream and so single channels that grow
large. In a random basis there is no such axis (arXiv 2410.17174). Q turns the first axis of a matrix; where that is
longer than `largest` the last one, and where both are, the parameter takes plain Adam steps. Muon is the optimiser of
outlier-safe pre-training (arXiv 2506.19697); its steps are those of `torch.optim.Muon`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from headway.errors import ArgumentError, unknown
from headway.train.groups import BETAS, adamw, parameter_groups, trained_parameters

OPTIMIZERS = ("adamw", "orthoadam", "muon")
#: Axes longer than this are not turned: Q has its square of entries.
LARGEST = 4096
EPS = 1e-8


class OrthoAdam(Optimizer):
    """Adam with decoupled weight decay on rotated gradients. `rotate=False` is AdamW.

    The rotations depend on `seed` and the place of the parameter alone, and are kept with the state."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = BETAS,
        eps: float = EPS,
        weight_decay: float = 0.0,
        *,
        rotate: bool = True,
        largest: int = LARGEST,
        seed: int = 0,
    ) -> None:
        if not (lr >= 0 and eps > 0 and weight_decay >= 0 and all(0 <= b < 1 for b in betas) and largest >= 0):
            raise ArgumentError(
                f"lr, betas, eps, weight_decay, largest: got {lr}, {betas}, {eps}, {weight_decay}, {largest}; expected "
                "non-negative numbers, betas below 1 and a positive eps."
            )
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "rotate": rotate}
        super().__init__(params, {**defaults, "largest": largest, "seed": seed})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        place = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                place += 1
                if parameter.grad is not None:
                    self._step_one(parameter, parameter.grad, group, place)
        return loss

    def _step_one(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any], place: int) -> None:
        state = self.state[parameter]
        axis = _turned_axis(parameter, group)
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["mean"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["square"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            if axis is not None:
                state["rotation"] = random_rotation(parameter.shape[axis], group["seed"] + place).to(parameter)
        first, second = group["betas"]
        state["step"] += 1
        count = float(state["step"])
        if axis is not None:
            gradient = _turn(gradient, state["rotation"].T, axis)
        state["mean"].lerp_(gradient, 1 - first)
        state["square"].mul_(second).addcmul_(gradient, gradient, value=1 - second)
        size = state["square"].sqrt() / math.sqrt(1 - second**count) + group["eps"]
        update = state["mean"] / (1 - first**count) / size
        if axis is not None:
            update = _turn(update, state["rotation"], axis)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(update, alpha=-group["lr"])


def random_rotation(size: int, seed: int) -> Tensor:
    """An orthogonal matrix drawn evenly from all of them (QR of a Gaussian one, signs fixed), in float32."""
    gaussian = torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    orthogonal, upper = torch.linalg.qr(gaussian)
    return (orthogonal * torch.where(upper.diagonal() < 0, -1.0, 1.0)).float()


def _turned_axis(parameter: Tensor, group: dict[str, Any]) -> int | None:
    if not group["rotate"] or parameter.ndim == 0:
        return None
    return next((axis for axis in (0, parameter.ndim - 1) if parameter.shape[axis] <= group["largest"]), None)


def _turn(x: Tensor, rotation: Tensor, axis: int) -> Tensor:
    """rotation · x along an axis."""
    return torch.tensordot(rotation, x, dims=([1], [axis])).movedim(0, axis)


class MuonWithAdamW(Optimizer):
    """Muon for hidden matrices and AdamW for everything else, as one optimiser with one list of groups.

    Embeddings, the output head (tied or not) and all that is no matrix take AdamW steps."""

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        matrix_lr: float | None = None,
        betas: tuple[float, float] = BETAS,
        eps: float = EPS,
    ) -> None:
        if not hasattr(torch.optim, "Muon"):
            raise ArgumentError(
                f"optimizer: got 'muon' with torch {torch.__version__}, which has no torch.optim.Muon. Install torch "
                "2.9 or later, or use 'adamw'."
            )
        outside = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        head = getattr(model, "get_output_embeddings", lambda: None)()
        outside |= {id(p) for p in head.parameters()} if isinstance(head, nn.Module) else set()
        matrices = [p for p in trained_parameters(model) if p.ndim == 2 and id(p) not in outside]
        inside = {id(p) for p in matrices}
        groups: list[dict[str, Any]] = []
        if matrices:
            groups.append({"params": matrices, "method": "muon", "lr": lr if matrix_lr is None else matrix_lr})
            groups[0]["weight_decay"] = weight_decay
        for group in parameter_groups(model, weight_decay=weight_decay):
            rest = [p for p in group["params"] if id(p) not in inside]
            if rest:
                groups.append({**group, "params": rest, "method": "adamw", "lr": lr})
        # Both steppers fill in what they need into the very groups that are kept here.
        self._steppers: dict[str, Optimizer] = {}
        for method, made in (
            ("muon", lambda g: torch.optim.Muon(g, momentum=momentum)),
            ("adamw", lambda g: torch.optim.AdamW(g, betas=betas, eps=eps)),
        ):
            chosen = [group for group in groups if group["method"] == method]
            if chosen:
                self._steppers[method] = made(chosen)
        super().__init__([g for s in self._steppers.values() for g in s.param_groups], {})
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for stepper in self._steppers.values():
            stepper.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()

    def _share(self) -> None:
        """The steppers work on the groups and the state of this optimiser."""
        for method, stepper in self._steppers.items():
            stepper.param_groups = [group for group in self.param_groups if group["method"] == method]
            stepper.state = self.state


def make_optimizer(
    name: str, model: nn.Module, *, learning_rate: float = 3e-4, weight_decay: float = 0.1, **options: Any
) -> Optimizer:
    """The optimiser of that name over the model's parameters: "adamw", "orthoadam" or "muon".

    Vectors (norms, biases) are not decayed. `options` are those of the class. For `train`:
    `optimizer=lambda model: make_optimizer("muon", model)`."""
    if name not in OPTIMIZERS:
        raise unknown("optimizer", name, OPTIMIZERS)
    if name == "adamw":
        return adamw(model, learning_rate=learning_rate, weight_decay=weight_decay, **options)
    if name == "muon":
        return MuonWithAdamW(model, lr=learning_rate, weight_decay=weight_decay, **options)
    return OrthoAdam(parameter_groups(model, weight_decay=weight_decay), lr=learning_rate, **options)
