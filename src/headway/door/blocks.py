"""The blocks of a host: leaving some out, leaving out their attention, and running a host from the middle on.

    without_blocks      h_{l+1} = h_l for the layers named; the rest are numbered anew, so that caches fit
    without_attention   h ← h + 0 in place of h + attention(h); projections, attention and cache entries are not made
    starting_at         the blocks before a layer do not run; the layer reads a stored h_l

What is left out is not computed. Leaving a context restores modules, numbers and config, also after an exception.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from headway.door.adapter import uses_registry
from headway.door.attach import _DOORS
from headway.door.example import example_inputs
from headway.errors import ArgumentError, ConflictError, HostError, unknown


def host_blocks(model: nn.Module) -> nn.ModuleList:
    """The list of a host's blocks in order: the `ModuleList` whose every entry attends through the registry.

    Raises HostError for hosts with no such list or with two (encoder-decoders)."""
    return _holder(model)[2]


@contextmanager
def without_blocks(model: nn.Module, layers: Sequence[int]) -> Iterator[nn.Module]:
    """The model without some of its blocks. Scopes (`headway.use`) are opened inside, and count the layers anew.

    Raises HostError where blocks hang on each other by number (shared keys, an input of their own per layer)."""
    parent, name, blocks = _holder(model)
    kept = _kept(model, blocks, layers)
    config = _text_config(model)
    for field in ("num_kv_shared_layers", "hidden_size_per_layer_input"):
        if getattr(config, field, 0):
            raise HostError(
                f"layers: got {type(model).__name__} with {field} = {getattr(config, field)}, expected blocks that do "
                "not depend on the number of another. Use another host."
            )
    before = _config_fields(config, len(blocks))
    numbers = _layer_numbers(blocks)
    try:
        setattr(parent, name, nn.ModuleList(blocks[i] for i in kept))
        for field, value in before.items():
            setattr(config, field, len(kept) if isinstance(value, int) else [value[i] for i in kept])
        _number({module: kept.index(block) for module, (block, _) in numbers.items() if block in kept})
        yield model
    finally:
        setattr(parent, name, blocks)
        for field, value in before.items():
            setattr(config, field, value)
        _number({module: number for module, (_, number) in numbers.items()})


@contextmanager
def without_attention(model: nn.Module, layers: Sequence[int]) -> Iterator[nn.Module]:
    """The model whose named blocks add nothing from attention. Scopes are opened inside.

    Raises HostError where layers differ in kind (sliding and full ones), since a cache numbers the layers that attend
    and would take one kind for the other."""
    blocks = host_blocks(model)
    kept = _kept(model, blocks, layers)
    kinds = getattr(_text_config(model), "layer_types", None) or []
    if len(set(kinds)) > 1:
        raise HostError(
            f"layers: got {type(model).__name__}, whose layers are of kinds {', '.join(sorted(set(kinds)))}; expected "
            "layers of one kind. Leave out whole blocks instead."
        )
    numbers = _layer_numbers(blocks)
    silenced = [_attention(blocks[i]) for i in range(len(blocks)) if i not in kept]
    shapes = _output_lengths(model, silenced)
    try:
        _number({module: kept.index(block) for module, (block, _) in numbers.items() if block in kept})
        for module, length in zip(silenced, shapes, strict=True):
            module.forward = _Silent(length)
        yield model
    finally:
        for module in silenced:
            module.__dict__.pop("forward", None)
        _number({module: number for module, (_, number) in numbers.items()})


@contextmanager
def recorded_inputs(model: nn.Module) -> Iterator[list[Float[Tensor, "batch tokens width"]]]:
    """What enters each block in the forwards of this context, block after block, and last what leaves the final one."""
    found: list[Tensor] = []
    blocks = host_blocks(model)
    hooks = [
        block.register_forward_pre_hook(lambda m, args, kwargs: found.append(_hidden(args, kwargs)), with_kwargs=True)
        for block in blocks
    ]
    hooks.append(blocks[-1].register_forward_hook(lambda m, args, out: found.append(_first(out))))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def starting_at(
    model: nn.Module,
    layer: int,
    hidden: Float[Tensor, "batch tokens width"],
    *,
    forms: Sequence[int | None] | None = None,
) -> Iterator[nn.Module]:
    """The model whose block `layer` reads `hidden`, recorded in a forward of the same input; earlier blocks do not run.

    For forwards without a cache: the blocks that do not run store no keys. `forms` are those of `block_forms(model)`,
    for a caller who comes often."""
    blocks = host_blocks(model)
    if not 0 <= layer < len(blocks):
        raise unknown("layer", layer, range(len(blocks)))

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})

    skipped = list(blocks)[:layer]
    lengths = block_forms(model)[:layer] if forms is None else list(forms)[:layer]
    hook = blocks[layer].register_forward_pre_hook(enter, with_kwargs=True)
    try:
        for block, length in zip(skipped, lengths, strict=True):
            block.forward = _Through(length)
        yield model
    finally:
        hook.remove()
        for block in skipped:
            block.__dict__.pop("forward", None)


def block_forms(model: nn.Module) -> list[int | None]:
    """How many values each block returns, None for a bare tensor; one small forward."""
    return _output_lengths(model, list(host_blocks(model)))


class _Through:
    """A block that does nothing, with the block's form of output."""

    def __init__(self, length: int | None) -> None:
        self.length = length

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _in_form(_hidden(args, kwargs), self.length)


class _Silent(_Through):
    """An attention that adds nothing."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _in_form(torch.zeros_like(_hidden(args, kwargs)), self.length)


def _in_form(hidden: Tensor, length: int | None) -> Any:
    return hidden if length is None else (hidden, *[None] * (length - 1))


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _holder(model: nn.Module) -> tuple[nn.Module, str, nn.ModuleList]:
    """The module that owns the list of blocks, the attribute's name, and the list."""
    found = []
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) and all(_attends(block) for block in module):
            parent, _, name = path.rpartition(".")
            found.append((model.get_submodule(parent), name, module))
    if len(found) != 1:
        raise HostError(
            f"model: got {type(model).__name__} with {len(found)} lists of blocks that all attend through the "
            "registry, expected one. Use a decoder or an encoder without other mixers."
        )
    return found[0]


def _attends(block: nn.Module) -> bool:
    return any(uses_registry(module) for module in block.modules())


def _attention(block: nn.Module) -> nn.Module:
    found = [module for module in block.modules() if uses_registry(module)]
    if len(found) > 1:
        raise HostError(
            f"{type(block).__name__}: got {len(found)} attentions in a block, expected one. Leave blocks out."
        )
    return found[0]


def _kept(model: nn.Module, blocks: nn.ModuleList, layers: Sequence[int]) -> list[int]:
    """The layers that stay. Raises for numbers out of range, repeated ones, and when none would stay."""
    if model in _DOORS:
        raise ConflictError(
            f"layers: got {list(layers)} to leave out of {type(model).__name__} while a scope is open on it; expected "
            "none. Open the scope inside this context."
        )
    for layer in layers:
        if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < len(blocks):
            raise unknown("layers", layer, range(len(blocks)))
    if len(set(layers)) != len(layers):
        raise ArgumentError(f"layers: got {list(layers)}, expected each layer once. Remove the repeated ones.")
    kept = [i for i in range(len(blocks)) if i not in set(layers)]
    if not kept:
        raise ArgumentError(f"layers: got all {len(blocks)}, expected at least one to stay. Leave out fewer.")
    return kept


def _text_config(model: nn.Module) -> Any:
    config: Any = model.config
    return getattr(config, "text_config", None) or config


def _config_fields(config: Any, count: int) -> dict[str, Any]:
    """The number of layers and every list with one entry per layer."""
    names = [config.attribute_map.get("num_hidden_layers", "num_hidden_layers")]
    lists = {k: v for k, v in vars(config).items() if isinstance(v, list) and len(v) == count}
    return {name: getattr(config, name) for name in names} | lists


def _layer_numbers(blocks: nn.ModuleList) -> dict[nn.Module, tuple[int, int]]:
    """Every module with a layer number: its block and the number."""
    return {
        module: (i, int(module.layer_idx))  # type: ignore[arg-type]
        for i, block in enumerate(blocks)
        for module in block.modules()
        if isinstance(getattr(module, "layer_idx", None), int)
    }


def _number(numbers: dict[nn.Module, int]) -> None:
    for module, number in numbers.items():
        module.layer_idx = number  # type: ignore[assignment]


def _output_lengths(model: nn.Module, modules: Sequence[nn.Module]) -> list[int | None]:
    """How many values each module returns, None for a bare tensor, seen in one small forward."""
    seen: dict[nn.Module, int | None] = {}

    def note(module: nn.Module, args: Any, output: Any) -> None:
        seen[module] = len(output) if isinstance(output, tuple) else None

    hooks = [module.register_forward_hook(note) for module in modules]
    try:
        if modules:
            with torch.no_grad():
                model(**example_inputs(model))
    finally:
        for hook in hooks:
            hook.remove()
    return [seen[module] for module in modules]
