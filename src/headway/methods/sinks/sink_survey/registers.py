"""Test-time registers: the activations that make outlier tokens are moved to a zero token that is put beside the text.

    x_r,n ← the value of x_t,n with the largest size over t ∈ sources ,   x_t,n ← 0         for register neurons n

x is the input of a block's down-projection, r the added token. A few neurons write the massive activations; with their
values at r, r becomes the sink and the tokens are clean. Paper: Vision Transformers Don't Need Trained Registers, arXiv
2506.08010, which adds the token behind the patches and takes the maximum over all of them. A causal model needs it in
front, and its sources named (the sinks), as a maximum over all tokens would look ahead. Details of the search are ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from headway.errors import ArgumentError, HostError

#: (block, index in the input of its down-projection).
Neuron = tuple[int, int]


def down_projections(model: nn.Module) -> list[nn.Module]:
    """The module that leads back from the widened MLP to the stream, block by block: the last linear map of a block
    with more inputs than outputs. Raises HostError where a block has none."""
    found = []
    for number, block in enumerate(block_list(model)):
        narrowing = [m for m in block.modules() if _inputs(m) > _outputs(m)]
        if not narrowing:
            raise HostError(
                f"{type(model).__name__}: got block {number} without a map from a wider MLP, expected one in each."
            )
        found.append(narrowing[-1])
    return found


def block_list(model: nn.Module) -> nn.ModuleList:
    """The blocks of a transformer: the longest list of modules in it."""
    stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) > 0]
    if not stacks:
        raise HostError(f"{type(model).__name__}: got a model without a list of blocks, expected a transformer.")
    return max(stacks, key=lambda stack: (len(stack), sum(p.numel() for p in stack.parameters())))


def _inputs(module: nn.Module) -> int:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or isinstance(module, nn.Embedding):
        return 0
    return weight.shape[0] if type(module).__name__ == "Conv1D" else weight.shape[1]


def _outputs(module: nn.Module) -> int:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        return 0
    return weight.shape[1] if type(module).__name__ == "Conv1D" else weight.shape[0]


def find_register_neurons(
    model: nn.Module, inputs: Mapping[str, Any], tokens: Sequence[int], *, count: int = 8
) -> list[Neuron]:
    """The neurons whose values at `tokens` (columns of the input) stand out most from those at all others.

    A neuron counts by mean |x| at the tokens less the mean elsewhere, times the norm of what it writes."""
    maps = down_projections(model)
    scores: list[Tensor] = []

    def read(module: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0].detach().float().abs()
        x = x.reshape(-1, *x.shape[-2:])
        if not tokens or max(tokens) >= x.shape[1]:
            raise ArgumentError(f"tokens: got {list(tokens)}, expected columns 0..{x.shape[1] - 1}, at least one.")
        inside = torch.zeros(x.shape[1], dtype=torch.bool, device=x.device)
        inside[list(tokens)] = True
        weight: Tensor = module.weight.detach().float()  # type: ignore[operator]
        written = weight.norm(dim=1 if type(module).__name__ == "Conv1D" else 0)
        scores.append((x[:, inside].mean((0, 1)) - x[:, ~inside].mean((0, 1))) * written)

    hooks = [module.register_forward_pre_hook(read) for module in maps]
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    ranked = [(float(s), layer, n) for layer, score in enumerate(scores) for n, s in _top(score, count)]
    return [(layer, n) for _, layer, n in sorted(ranked, reverse=True)[:count]]


def _top(score: Float[Tensor, " neurons"], count: int) -> list[tuple[int, float]]:
    best = score.topk(min(count, score.numel()))
    return list(zip(best.indices.tolist(), best.values.tolist(), strict=True))


@contextmanager
def moved_to(
    model: nn.Module,
    neurons: Sequence[Neuron],
    register: int | Int[Tensor, " batch"],
    *,
    sources: Int[Tensor, "batch sources"] | None = None,
) -> Iterator[None]:
    """While the context is open, the neurons' values move from `sources` to the column `register`.

    sources: columns of each sequence; None are all columns but the register (for models that look both ways)."""
    maps = down_projections(model)
    by_layer: dict[int, list[int]] = {}
    for layer, neuron in neurons:
        if not 0 <= layer < len(maps) or not 0 <= neuron < _inputs(maps[layer]):
            raise ArgumentError(
                f"neurons: got ({layer}, {neuron}), expected a block below {len(maps)} and a neuron of its MLP."
            )
        by_layer.setdefault(layer, []).append(neuron)

    def move(columns: list[int], args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = args[0].clone()
        batch = torch.arange(x.shape[0], device=x.device)
        at = torch.as_tensor(register, device=x.device).expand(x.shape[0]) % x.shape[1]
        chosen = x[..., columns]
        taken = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
        if sources is None:
            taken[:] = True
            taken[batch, at] = False
        else:
            taken[batch[:, None], sources.to(x.device)] = True
        masked = torch.where(taken[..., None], chosen, 0.0)
        largest = masked.gather(1, masked.abs().argmax(1, keepdim=True))[:, 0]
        chosen = torch.where(taken[..., None], 0.0, chosen).to(x.dtype)
        chosen[batch, at] = largest
        x[..., columns] = chosen
        return (x, *args[1:])

    hooks = [
        maps[layer].register_forward_pre_hook(lambda module, args, columns=columns: move(columns, args))
        for layer, columns in by_layer.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def run_with_register(
    model: nn.Module,
    ids: Int[Tensor, "batch tokens"],
    neurons: Sequence[Neuron],
    *,
    attention_mask: Tensor | None = None,
    sources: Sequence[int] = (0,),
    **options: Any,
) -> Any:
    """One forward of a causal model with a register in front of each sequence; logits and hidden states come back
    without it.

    sources: the tokens whose activations move, counted from the first real one. Left-padded batches give what their
    rows give alone: the register stands right before the first token. Without neurons the register is a plain zero
    token."""
    batch, tokens = ids.shape
    mask = torch.ones_like(ids) if attention_mask is None else attention_mask.long()
    first = mask.argmax(1)
    if bool((mask.diff(dim=1) < 0).any()):
        raise ArgumentError("attention_mask: got padding behind tokens, expected padding in front only.")
    embedded = model.get_input_embeddings()(ids)  # type: ignore[operator]
    wide = torch.cat([embedded.new_zeros(batch, 1, embedded.shape[2]), embedded], 1)
    # Columns 0 … first − 1 are padding, column `first` is the register: padding moves one to the left.
    column = torch.arange(tokens + 1, device=ids.device)
    wide = torch.where((column == first[:, None])[..., None], 0.0, wide)
    shown = (column >= first[:, None]).long()
    places = (shown.cumsum(1) - 1).clamp(min=0)
    taken = first[:, None] + 1 + torch.tensor(list(sources), device=ids.device)
    with moved_to(model, neurons, first, sources=taken.clamp(max=tokens)):
        output = model(inputs_embeds=wide, attention_mask=shown, position_ids=places, use_cache=False, **options)
    keep = column[None] != first[:, None]

    def without(x: Tensor) -> Tensor:
        return x[keep].view(batch, tokens, x.shape[-1])

    output.logits = without(output.logits)
    if getattr(output, "hidden_states", None) is not None:
        output.hidden_states = tuple(without(h) for h in output.hidden_states)
    return output


@contextmanager
def register_behind(model: nn.Module, neurons: Sequence[Neuron]) -> Iterator[None]:
    """While the context is open, an image model reads one more token, a zero behind its patches, that takes over the
    neurons' largest values. Its outputs hold that token as their last.

    Raises HostError for a model without a module `embeddings` that gives (batch, tokens, width)."""
    place = next((m for name, m in model.named_modules() if name.rpartition(".")[2] == "embeddings"), None)
    if place is None:
        raise HostError(
            f"{type(model).__name__}: got no module `embeddings`, expected an image model of transformers. For causal "
            "models use run_with_register."
        )

    def append(module: nn.Module, args: Any, output: Any) -> Tensor:
        if not isinstance(output, Tensor) or output.ndim != 3:
            raise HostError(f"{type(model).__name__}: its embeddings give no (batch, tokens, width) tensor.")
        return torch.cat([output, output.new_zeros(output.shape[0], 1, output.shape[2])], 1)

    hook = place.register_forward_hook(append)
    try:
        with moved_to(model, neurons, -1):
            yield
    finally:
        hook.remove()
