"""DeepLIFT's rescale rule and Deep-SHAP, through captum, where their rules cover what the classifier computes.

    rescale    multiplier of a non-linear y = σ(x):  (y − y0) / (x − x0)  in place of σ'(x)      (arXiv 1704.02685)
    Deep-SHAP  the mean of DeepLIFT over several references                                      (arXiv 1705.07874)

captum applies the rule by hooks on activation *modules*. Everything else (GELU as a function, layer norm, products
of two activations, an LSTM's inside, a softmax over tokens) silently passes as a plain gradient, and its softmax
rule subtracts a mean over the whole batch: the numbers look fine and do not add up. So the operations of one forward
are listed first, and what the rules do not cover is refused by name.
"""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from headway.errors import ArgumentError
from headway.methods.diagnosis.song_of_disagreement.attributions import (
    Explanation,
    Problem,
    captum_attr,
    explained,
    kept_gradients,
)
from headway.methods.diagnosis.song_of_disagreement.classifier import baseline_of


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


#: Activation modules whose hook in captum is the rescale rule. Its softmax rule is left out on purpose.
COVERED = (nn.ReLU, nn.ELU, nn.LeakyReLU, nn.Sigmoid, nn.Tanh, nn.Softplus)
#: Operations that are linear in activations, so that a gradient is already the right multiplier.
LINEAR = _names(
    """add sub neg rsub sum mean t transpose permute view _unsafe_view reshape expand unsqueeze squeeze slice select
    cat stack split unbind clone detach alias contiguous _to_copy to index index_select embedding gather pad
    constant_pad_nd addmm mm linear bmm matmul mul div copy_ zeros_like ones_like zeros ones empty arange full
    scalar_tensor lift_fresh cumsum flip masked_fill where zero_ fill_ lt gt le ge eq ne logical_and logical_not
    bitwise_and any all _local_scalar_dense new_zeros new_ones repeat as_strided"""
)
#: Linear only while one side does not depend on the input.
PRODUCTS = _names("addmm mm bmm matmul mul div linear where")


@dataclass(frozen=True)
class OperationCheck:
    """What one forward computes that the rescale rule does not cover: operation → where it ran; and activation modules
    that ran more than once: module → how often. With those the rule cannot be applied at all."""

    unsupported: dict[str, str] = field(default_factory=dict)
    repeated: dict[str, int] = field(default_factory=dict)

    @property
    def sound(self) -> bool:
        return not self.unsupported and not self.repeated

    def sentence(self) -> str:
        parts = [f"{label} runs {count} times" for label, count in self.repeated.items()]
        return "; ".join([*parts, *(f"{name} in {place}" for name, place in self.unsupported.items())])


def check_operations(problem: Problem) -> OperationCheck:
    """Lists what the rescale rule does not cover: operations outside covered modules, products of two activations, and
    activation modules that run more than once in a forward (captum's hooks hold one state per module)."""
    places: list[str] = []
    ran: Counter[str] = Counter()
    handles = []
    for name, module in problem.classifier.module.named_modules():
        label = f"{type(module).__name__}{f' at {name}' if name else ''}"

        def enter(module: nn.Module, args: object, label: str = label) -> None:
            places.append(label if isinstance(module, COVERED) else f" {label}")
            ran[label] += isinstance(module, COVERED)

        def leave(module: nn.Module, args: object, output: object) -> None:
            places.pop()

        handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    mode = _Listing(places)
    try:
        points = problem.embeddings.clone()
        mode.mark(points)
        with torch.no_grad(), mode:
            problem.f(points)
    finally:
        for handle in handles:
            handle.remove()
    return OperationCheck(dict(mode.found), {label: count for label, count in ran.items() if count > 1})


class _Listing(TorchDispatchMode):
    """Notes every operation on a tensor that depends on the input and is neither linear nor inside a covered module."""

    def __init__(self, places: list[str]) -> None:
        super().__init__()
        self.places = places
        self.found: dict[str, str] = {}
        self.depends: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        flat = _tensors(args)
        active = [t for t in flat if self._depends(t)]
        if active:
            if name not in ("detach", "_local_scalar_dense", "any", "all"):
                self.mark(result)
            covered = bool(self.places) and not self.places[-1].startswith(" ")
            product = name in PRODUCTS and len(active) > 1
            if not covered and (name not in LINEAR or product):
                where = self.places[-1].strip() if self.places else "the classifier's own code"
                self.found.setdefault(f"{name} of two activations" if product else name, where)
        return result

    def _depends(self, tensor: Tensor) -> bool:
        return id(tensor) in self.depends

    def mark(self, result: Any) -> None:
        for tensor in _tensors(result):
            if tensor.is_floating_point():
                # Kept alive, so that no later tensor gets the same id.
                self.depends[id(tensor)] = tensor


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in _tensors(item)]
    return []


class _Function(nn.Module):
    """f as a module, which is what captum's hooks need."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.problem = problem
        # Registered so that captum finds the modules to put its hooks on.
        self.inner = problem.classifier.module

    def forward(self, embeddings: Tensor) -> Tensor:
        return self.problem.f(embeddings)[:, None]


def deep_lift(problem: Problem) -> Explanation:
    """DeepLIFT's rescale rule. Raises ArgumentError with the operations that it does not cover, unless
    `settings.allow_unsupported`; the completeness error of the result then says how far off it is. Activation modules
    that run twice are refused in any case."""
    note = _checked(problem, "deep_lift")
    return explained(problem, "deep_lift", _deep_lift(problem), promises=True, note=note)


def deep_shap(problem: Problem) -> Explanation:
    """The mean of DeepLIFT over `settings.references`; `baseline_value` is the mean of f over them."""
    note = _checked(problem, "deep_shap")
    settings = problem.settings
    parts, values = [], []
    for kind in settings.references:
        baseline = baseline_of(problem.classifier, kind, problem.embeddings, problem.mask)
        parts.append(_deep_lift(replace(problem, baseline=baseline)))
        with torch.no_grad():
            values.append(float(problem.f(baseline)[0]))
    mean = replace(problem, baseline_value=sum(values) / len(values))
    return explained(mean, "deep_shap", torch.stack(parts).mean(0), promises=True, note=note)


def _deep_lift(problem: Problem) -> Tensor:
    attr = captum_attr("DeepLIFT")
    with kept_gradients(problem.classifier), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = attr.DeepLift(_Function(problem)).attribute(
            problem.embeddings.clone().requires_grad_(), baselines=problem.baseline, target=0
        )
    return found.detach().sum(-1)[0]


def _checked(problem: Problem, method: str) -> str:
    check = check_operations(problem)
    if check.sound:
        return ""
    if check.repeated:
        raise ArgumentError(
            f"{method}: got a classifier in which {check.sentence()}, expected each activation module to run once: the "
            "rule keeps one state in each. Give every call a module of its own, or use integrated_gradients."
        )
    if not problem.settings.allow_unsupported:
        raise ArgumentError(
            f"{method}: got a classifier with operations that the rescale rule does not cover ({check.sentence()}), "
            "so its numbers would not add up. Use integrated_gradients, or allow_unsupported=True and read the error."
        )
    return f"not covered by the rescale rule: {check.sentence()}"
