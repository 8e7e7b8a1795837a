"""What a method leaves of attention on a model: pairs read in a prompt, entries stored, entries read by a step.

An entry is the key and the value of one token in one KV head. Where a method's rule is arithmetic the numbers are its
own, to the entry (`exact`); where it looks at the data first, they are those of its budget.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from headway.card import homes
from headway.door.stages import PHASES, CachePolicy, Driver, Selector, Stage
from headway.errors import ArgumentError, HeadwayError, unknown
from headway.methods.budget import budgeted, stages_at_budget
from headway.plan.shape import Layer, ModelShape


@dataclass(frozen=True, kw_only=True)
class LayerUse:
    """One layer at one length, for one sequence.

    pairs: query-key pairs computed over a prompt, summed over heads. stored: entries held after it, summed over KV
    heads. read: entries read by the next step, its own included. choosing: operations that choosing keys takes, over
    the prompt and in a step."""

    pairs: float
    stored: int
    read: float
    choosing: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """A method on a model after `tokens` tokens. `note` says what is left out or assumed."""

    method: str
    budget: float | None
    tokens: int
    layers: tuple[LayerUse, ...]
    exact: bool
    note: str = ""


def footprint(method: str, budget: float | None, shape: ModelShape, *, tokens: int, model: nn.Module) -> Footprint:
    """The footprint of a method by its slug. `model` may stand on the meta device: no weights are read.

    Raises ArgumentError for a method that is unknown, has no budget, or changes what `generate` does."""
    if method == "dense":
        return Footprint(
            method=method, budget=None, tokens=tokens, exact=True, layers=tuple(dense(x, tokens) for x in shape.layers)
        )
    modules = budgeted()
    if method not in modules:
        what = "has no form at a budget and cannot be planned; " if method in homes() else ""
        raise unknown("method", method, ("dense", *modules), fix=what and f"{method!r} {what.rstrip('; ')}.")
    share = 1.0 if budget is None else budget
    split = getattr(modules[method], "budget_split", None)
    if split is not None and share < 1 and next(model.parameters()).is_meta:
        sinks, recent, whole = split(share, tokens=tokens, heads=sum(layer.kv_heads for layer in shape.layers))
        uniform = len({(layer.entry, layer.window) for layer in shape.layers}) == 1
        layers = _split(shape, tokens, sinks, recent, whole)
        return Footprint(method=method, budget=share, tokens=tokens, layers=layers, exact=uniform)
    try:
        stages = stages_at_budget(method, share, tokens=tokens, model=model)
    except (HeadwayError, NotImplementedError, RuntimeError):
        return _by_card(method, share, shape, tokens)
    return of_stages(method, share, stages, shape, tokens)


def of_stages(method: str, share: float, stages: tuple[Stage, ...], shape: ModelShape, tokens: int) -> Footprint:
    """The footprint of stages: their own rule where it is known, else their budget."""
    if any(isinstance(stage, Driver) for stage in stages):
        raise _driven(method)
    layers, exact, notes = [dense(layer, tokens) for layer in shape.layers], True, []
    for stage in stages:
        rule = _rule(stage)
        if rule is not None:
            layers = [rule(stage, layer, use, index, tokens) for index, (layer, use) in enumerate(
                zip(shape.layers, layers, strict=True))]  # fmt: skip
            exact = exact and type(stage).__name__ in EXACT
        elif isinstance(stage, Selector | CachePolicy):
            phases = stage.phases if isinstance(stage, Selector) else stage.narrows
            stores = isinstance(stage, CachePolicy)
            layers = [_scaled(layer, use, share, phases, stores=stores, tokens=tokens) for layer, use in zip(
                shape.layers, layers, strict=True)]  # fmt: skip
            exact = False
        else:
            notes.append(f"{stage.title} reads every key; what its edits cost is not counted")
    if not exact:
        notes.insert(0, "by its budget; what it reads depends on the data")
    return Footprint(
        method=method, budget=share, tokens=tokens, layers=tuple(layers), exact=exact, note="; ".join(notes)
    )


def dense(layer: Layer, tokens: int) -> LayerUse:
    """The host as it is."""
    return LayerUse(
        pairs=layer.heads * layer.pairs(tokens),
        stored=0 if layer.borrows else layer.kv_heads * layer.kept(tokens),
        read=layer.kv_heads * layer.seen(tokens),
    )


def streaming(stage: Any, layer: Layer, use: LayerUse, index: int, tokens: int) -> LayerUse:
    """Sinks have their slots from the first token on; the window holds tokens that are no sinks, and where the host's
    own window is shorter no more than that."""
    sinks = stage.sinks
    reach = stage.reach if layer.window is None else min(stage.reach, layer.window - 1)
    window = tokens - min(max(tokens - reach, sinks), tokens)
    most = sinks + reach + 1
    return LayerUse(
        pairs=layer.heads * min(_capped_pairs(tokens, most), layer.pairs(tokens)),
        stored=layer.kv_heads * (sinks + window),
        read=layer.kv_heads * min(tokens + 1, most),
    )


def duo(stage: Any, layer: Layer, use: LayerUse, index: int, tokens: int) -> LayerUse:
    """Retrieval heads keep everything, the others their sinks and recent tokens."""
    whole = int(stage.retrieval()[index].sum())
    found = _duo(layer, whole, stage.sinks, stage.recent, tokens)
    return replace(found, pairs=use.pairs) if stage.prefill == "dense" else found


def recycled(stage: Any, layer: Layer, use: LayerUse, index: int, tokens: int) -> LayerUse:
    """Everything, and a copy of the chosen where not all are; a full step every so many, counted as their mean."""
    if layer.window is not None:
        # Sliding layers choose nothing; they let old tokens go a window's worth at a time.
        held = tokens if tokens <= 3 * layer.window else 2 * layer.window
        return replace(use, stored=0 if layer.borrows else layer.kv_heads * held)
    if stage.stride == 1:
        return use
    chosen = stage.budget if stage.budget < tokens else 0
    seen = layer.seen(tokens)
    stride = stage.stride or float("inf")
    read = min(stage.budget, seen) + (seen - min(stage.budget, seen)) / stride
    return LayerUse(
        pairs=use.pairs, stored=layer.kv_heads * (tokens + chosen), read=layer.kv_heads * read, choosing=use.choosing
    )


def tappa(stage: Any, layer: Layer, use: LayerUse, index: int, tokens: int) -> LayerUse:
    """A whole prompt, judged by its last queries; then the budget, as a mean over layers (they may
    hold a quarter more for a while, and a short prompt's last queries, which is not counted)."""
    if tokens <= stage.budget + stage.window:
        return use
    judged = 2.0 * layer.key_dim * layer.heads * stage.window * tokens
    held = layer.kv_heads * stage.budget
    return LayerUse(pairs=use.pairs, stored=held, read=min(held + layer.kv_heads, use.read), choosing=(judged, 0.0))


def flex_prefill(stage: Any, layer: Layer, use: LayerUse, index: int, tokens: int) -> LayerUse:
    """A share of the prompt's pairs, after a probe of one block of rows and a map of block means."""
    if layer.window is not None or stage.density is None or stage.density >= 1 or tokens <= stage.block:
        return use
    blocks = -(-tokens // stage.block)
    probe = 2 * layer.key_dim * layer.heads * (stage.block * tokens + blocks * blocks)
    return LayerUse(pairs=use.pairs * stage.density, stored=use.stored, read=use.read, choosing=(probe, 0.0))


def power(stage: Any, layer: Layer, use: LayerUse, index: int, tokens: int) -> LayerUse:
    """The mask's own pairs and the last row's own keys."""
    if layer.window is not None or index in stage.full_layers:
        return use
    from headway.methods.long_context.power_attention import mask_density, power_mask

    blocks = -(-tokens // stage.block)
    if blocks <= stage.window:
        return use
    mask = power_mask(blocks, window=stage.window, sink=stage.sink, base=stage.base)
    share = mask_density(mask, tokens, stage.block)
    return LayerUse(
        pairs=use.pairs * share, stored=use.stored, read=layer.kv_heads * int(stage.keys_read(tokens).numel())
    )


#: Stages whose footprint is arithmetic, by class name.
RULES: dict[str, Callable[[Any, Layer, LayerUse, int, int], LayerUse]] = {
    "StreamingLLM": streaming,
    "DuoAttention": duo,
    "RecycledAttention": recycled,
    "TappaEviction": tappa,
    "FlexPrefill": flex_prefill,
    "PowerAttention": power,
}
EXACT = frozenset({"StreamingLLM", "DuoAttention", "RecycledAttention", "PowerAttention"})


def _rule(stage: Stage) -> Callable[[Any, Layer, LayerUse, int, int], LayerUse] | None:
    return next((RULES[kind.__name__] for kind in type(stage).__mro__ if kind.__name__ in RULES), None)


def _duo(layer: Layer, whole: int, sinks: int, recent: int, tokens: int) -> LayerUse:
    groups = layer.heads // layer.kv_heads
    if layer.window is not None and recent >= layer.window - 1:
        sinks, recent = 0, layer.window - 1
    most = sinks + recent
    rest = layer.kv_heads - whole
    pairs = whole * layer.pairs(tokens) + rest * min(_capped_pairs(tokens, most + 1), layer.pairs(tokens))
    return LayerUse(
        pairs=groups * pairs,
        stored=whole * layer.kept(tokens) + rest * min(tokens, most),
        read=whole * layer.seen(tokens) + rest * min(tokens + 1, most + 1),
    )


def _split(shape: ModelShape, tokens: int, sinks: int, recent: int, whole: int) -> tuple[LayerUse, ...]:
    """So many retrieval heads over all layers, wherever they are: layers are filled in turn."""
    found = []
    for layer in shape.layers:
        here = min(whole, layer.kv_heads)
        whole -= here
        found.append(_duo(layer, here, sinks, recent, tokens))
    return tuple(found)


def _by_card(method: str, share: float, shape: ModelShape, tokens: int) -> Footprint:
    """A method that needs weights before it can say more: its budget, by the stages that its card names."""
    stages = set(homes()[method].CARD.stages)
    if "Driver" in stages:
        raise _driven(method)
    if not {"Selector", "CachePolicy"} & stages:
        whole = tuple(dense(layer, tokens) for layer in shape.layers)
        note = "reads every key; what its edits cost is not counted"
        return Footprint(method=method, budget=share, tokens=tokens, layers=whole, exact=False, note=note)
    stores = "CachePolicy" in stages
    layers = tuple(
        _scaled(layer, dense(layer, tokens), share, PHASES, stores=stores, tokens=tokens) for layer in shape.layers
    )
    note = "by its budget: it looks at weights before it can say more"
    return Footprint(method=method, budget=share, tokens=tokens, layers=layers, exact=False, note=note)


def _driven(method: str) -> ArgumentError:
    return ArgumentError(
        f"method: got {method!r}, which reads a text in pieces inside `generate`; expected one whose cost is that of a "
        "prompt and of steps. Measure it with `headway compare`."
    )


def _scaled(
    layer: Layer, use: LayerUse, share: float, phases: frozenset[str], *, stores: bool, tokens: int
) -> LayerUse:
    return LayerUse(
        pairs=use.pairs * (share if "prefill" in phases else 1),
        stored=round(use.stored * share) if stores else use.stored,
        read=use.read * (share if "decode" in phases else 1),
        choosing=use.choosing,
    )


def _capped_pairs(tokens: int, most: int) -> int:
    """Σ_i min(i, most)."""
    reach = min(tokens, most)
    return reach * (reach + 1) // 2 + (tokens - reach) * reach
