"""Puts InLine (or linear) attention into a vision transformer of the transformers library, layer by layer.

The attention modules of the chosen layers are exchanged for mixers that start from their projections; the model then
needs training. Nothing else of the model is touched, and `restore` puts the old modules back.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from headway.errors import ArgumentError, HostError
from headway.methods.layers.inline.mixer import FeatureMixer, InlineMixer

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
#: Tokens in front of the patches: the class token, and DeiT's distillation token.
_PREFIX = {"vit": 1, "dinov2": 1, "dinov2_with_registers": 1, "vit_msn": 1, "deit": 2, "ijepa": 0}


class VisionAttention(nn.Module):
    """A mixer in the place of a host's attention module: takes what the host passes and returns (output, None)."""

    def __init__(self, mixer: FeatureMixer, shape: _Shape) -> None:
        super().__init__()
        self.mixer, self._shape = mixer, shape

    def forward(
        self, hidden_states: Float[Tensor, "batch tokens width"], attention_mask: Tensor | None = None, **options: Any
    ) -> tuple[Float[Tensor, "batch tokens width"], None]:
        if attention_mask is not None:
            raise ArgumentError(
                f"attention_mask: got one of shape {tuple(attention_mask.shape)}, expected None: the replaced layers "
                "read whole images."
            )
        if options.get("position_embeddings") is not None:
            raise HostError("the host rotates queries and keys, which the replaced layers do not; take another model.")
        return self.mixer(hidden_states, grid=self._shape.grid)[0], None


class _Shape:
    """The grid of the images that are in the model, told by a hook at its entrance."""

    def __init__(self, patch: tuple[int, int]) -> None:
        self.patch = patch
        self.grid: tuple[int, int] | None = None

    def read(self, module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        pixels = options.get("pixel_values", arguments[0] if arguments else None)
        if isinstance(pixels, Tensor) and pixels.ndim == 4:
            self.grid = (pixels.shape[2] // self.patch[0], pixels.shape[3] // self.patch[1])


class Replacement:
    """What was exchanged. Leaving it as a context, or `restore`, puts the old modules back."""

    def __init__(self, model: nn.Module, old: dict[str, nn.Module], new: dict[str, VisionAttention], hook: Any) -> None:
        self.model, self.modules = model, new
        self._old, self._hook = old, hook

    def parameters(self) -> Iterator[nn.Parameter]:
        """Those of the new modules alone."""
        for module in self.modules.values():
            yield from module.parameters()

    def restore(self) -> None:
        """The model as it was; a second call does nothing."""
        for name, module in self._old.items():
            _put(self.model, name, module)
        self._old = {}
        self._hook.remove()

    def __enter__(self) -> Replacement:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()


def replace_attention(
    model: nn.Module,
    *,
    layers: Sequence[int] | None = None,
    mixer: type[FeatureMixer] = InlineMixer,
    prefix: int | None = None,
    copy_weights: bool = True,
    **options: Any,
) -> Replacement:
    """Exchanges the self-attention of a transformers vision model in the given layers (all by default).

    prefix: tokens in front of the patches; None takes those of the model where they are known (ViT, DeiT, DINOv2 with
    or without registers, MSN, I-JEPA). copy_weights: start from the host's projections, else from new ones. `options`
    go to the mixer. The residual's predictor is new in any case, so the model gives other outputs until it is trained.

    Raises HostError for a model whose attention has another form, ArgumentError for layers that are not there."""
    found = [(name, module) for name, module in model.named_modules() if _is_attention(module)]
    if not found:
        raise HostError(
            f"model: got {type(model).__name__}, in which no module has {', '.join(PROJECTIONS)} of one width and "
            "reads both ways; expected a vision transformer such as ViT, DeiT or DINOv2."
        )
    chosen = range(len(found)) if layers is None else layers
    for layer in chosen:
        if not 0 <= layer < len(found):
            raise ArgumentError(f"layers: got {layer}, expected 0..{len(found) - 1}.")
    shape = _Shape(_patch(model))
    options["prefix"] = _prefix(model) if prefix is None else prefix
    old: dict[str, nn.Module] = {}
    new: dict[str, VisionAttention] = {}
    for layer in chosen:
        name, module = found[layer]
        old[name], new[name] = (
            module,
            VisionAttention(_mixer(module, mixer, layer, len(found), copy_weights, options), shape),
        )
    for name, attention in new.items():
        _put(model, name, attention.train(model.training))
    return Replacement(model, old, new, model.register_forward_pre_hook(shape.read, with_kwargs=True))


def _mixer(
    module: Any, mixer: type[FeatureMixer], layer: int, layers: int, copy_weights: bool, options: dict[str, Any]
) -> FeatureMixer:
    width = module.q_proj.in_features
    built = mixer(width, heads=module.num_attention_heads, layer=layer, layers=layers, causal=False, **options)
    for name in PROJECTIONS:
        projection = copy.deepcopy(getattr(module, name))
        if not copy_weights:
            projection.reset_parameters()
        setattr(built, name, projection)
    weight = module.q_proj.weight
    return built.to(device=weight.device, dtype=weight.dtype)


def _is_attention(module: nn.Module) -> bool:
    projections = [getattr(module, name, None) for name in PROJECTIONS]
    if not all(isinstance(p, nn.Linear) for p in projections) or getattr(module, "is_causal", True):
        return False
    widths = {side for p in projections if isinstance(p, nn.Linear) for side in (p.in_features, p.out_features)}
    return len(widths) == 1 and hasattr(module, "num_attention_heads")


def _patch(model: nn.Module) -> tuple[int, int]:
    patch = getattr(getattr(model, "config", None), "patch_size", None)
    if isinstance(patch, int):
        return patch, patch
    if isinstance(patch, (tuple, list)) and len(patch) == 2:
        return int(patch[0]), int(patch[1])
    raise HostError(f"model: got a config with patch_size {patch!r}, expected the side of a patch.")


def _prefix(model: nn.Module) -> int:
    config: Any = getattr(model, "config", None)
    kind = getattr(config, "model_type", None)
    if kind not in _PREFIX:
        raise ArgumentError(
            f"prefix: got None for a model of type {kind!r}, expected the number of tokens in front of its patches "
            "(class, distillation and register tokens)."
        )
    return _PREFIX[kind] + int(getattr(config, "num_register_tokens", 0) or 0)


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
