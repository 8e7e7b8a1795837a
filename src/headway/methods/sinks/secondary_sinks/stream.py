"""One pass over a decoder that keeps numbers, not streams: norms, cosines and vectors of a few tokens.

A dump of the stream costs layers · tokens · width; what detection needs is, per layer, a norm per token and a cosine
per token and candidate position. They are taken inside hooks, so a text costs layers · tokens · (candidates + 1)
numbers. A second pass (`gather`), made only where there are sinks, keeps the MLP stages of chosen tokens at chosen
layers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from headway.door import use
from headway.door.call import AttentionCall
from headway.door.stages import Observer
from headway.errors import ArgumentError, HostError, InterceptionError, NumericError
from headway.methods.sinks.secondary_sinks.detection import (
    CHAT_CANDIDATES,
    PLAIN_CANDIDATES,
    check_candidates,
    stream_cosines,
    token_norms,
)
from headway.methods.sinks.secondary_sinks.measures import CHUNK, chunk_entropies
from headway.methods.sinks.secondary_sinks.structure import Block, Mlp, find_norms, find_structure, first_tensor

#: Called after each layer with (layers done, layers in all, what is being done).
Progress = Callable[[int, int, str], None]


@dataclass
class Scan:
    """What one pass kept of one row, padding left out.

    `cosines[c, l, t]` compares token t with candidate c at layer l; `outputs[c, l]` is what the MLP of layer l wrote at
    candidate c. `kept` are the columns of the real tokens in the given row. `entropy[l]` is the matrix entropy of each
    chunk. `normed` are the layers whose output was a normalised stream, read before that norm instead."""

    norms: Float[Tensor, "layers tokens"]
    cosines: Float[Tensor, "candidates layers tokens"]
    candidates: tuple[int, ...]
    kept: Int[Tensor, " tokens"]
    outputs: list[Float[Tensor, "candidates width"]] = field(default_factory=list)
    entropy: list[list[float]] = field(default_factory=list)
    normed: list[int] = field(default_factory=list)


class KeyValueNorms(Observer):
    """Norms of keys and values by layer, batch row and token, averaged over key heads. Rotary embedding keeps norms, so
    reading them after it changes nothing."""

    reads_keys = True

    def __init__(self) -> None:
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def start(self) -> None:
        self.layers = {}

    def observe(self, call: AttentionCall, output: Tensor, lse: Tensor | None = None) -> None:
        if call.site.kind == "self":
            self.layers[call.site.layer] = (token_norms(call.key).mean(1).cpu(), token_norms(call.value).mean(1).cpu())

    def result(self) -> dict[int, tuple[Float[Tensor, "batch keys"], Float[Tensor, "batch keys"]]]:
        return self.layers


@dataclass
class Reading:
    """What a forward pass left behind: the blocks of the model, a Scan per row, and key and value norms by layer (None,
    with the reason in `notes`, where the door could not be used)."""

    blocks: list[Block]
    rows: list[Scan]
    key_value: dict[int, tuple[Tensor, Tensor]] | None = None
    notes: list[str] = field(default_factory=list)


@contextmanager
def read_streams(
    model: nn.Module,
    input_ids: Int[Tensor, "batch tokens"],
    attention_mask: Tensor | None = None,
    *,
    chat_template: bool = False,
    candidates: Sequence[int] | None = None,
    entropy: str | None = "chunks",
    chunk: int = CHUNK,
    alpha: float = 1.0,
    key_value: bool = True,
    progress: Progress | None = None,
) -> Iterator[Reading]:
    """Reads the streams of the one forward pass over `input_ids` made inside the context, whoever makes it.

    The Reading is complete when the context closes; pass it to `analyse_rows`. Options as there. Raises HostError when
    the model has no blocks or MLPs that can be found or does not run each once, NumericError naming the first layer
    whose stream is not finite, ArgumentError for a row that is too short."""
    input_ids, kept = real_tokens(input_ids, attention_mask)
    places = candidate_positions(chat_template, candidates)
    for columns in kept:
        check_candidates(places, columns.numel())
    reading = Reading(find_structure(model), [])
    layers = len(reading.blocks)
    reading.rows = [
        Scan(
            norms=torch.full((layers, columns.numel()), torch.nan),
            cosines=torch.zeros(len(places), layers, columns.numel()),
            candidates=places,
            kept=columns,
        )
        for columns in kept
    ]

    def keep_stream(layer: int, stream: Tensor, normed: bool) -> None:
        for row, real in _real_rows(stream, reading.rows, input_ids):
            row.norms[layer] = token_norms(real).cpu()
            if not bool(torch.isfinite(row.norms[layer]).all()):
                raise NumericError(
                    f"stream after layer {layer}: got NaN or infinity, expected finite numbers. Check the weights of "
                    "the model, or load it in float32 or bfloat16 (float16 overflows at massive activations)."
                )
            for i, position in enumerate(places):
                row.cosines[i, layer] = stream_cosines(real, real[position]).cpu()
            if entropy is not None:
                row.entropy.append(chunk_entropies(real, chunk=chunk, alpha=alpha, mode=entropy))
            if normed:
                row.normed.append(layer)
        if progress is not None:
            progress(layer + 1, layers, "reading the stream")

    def keep_output(output: Tensor) -> None:
        for row, real in _real_rows(output, reading.rows, input_ids):
            row.outputs.append(real[list(places)].cpu())

    with ExitStack() as stack:
        observer = _observe_keys(model, reading, stack) if key_value else None
        fired = stack.enter_context(_reading_streams([block.module for block in reading.blocks], keep_stream))
        for block in reading.blocks:
            stack.callback(_on_output(block.mlp.exit, keep_output).remove)
        yield reading
    if sorted(fired) != list(range(layers)):
        raise HostError(
            f"model: got blocks {sorted(fired)} running in {type(model).__name__}, expected each of {layers} once. "
            "Make one forward over the whole text (no chunks, no early exit, no layer drop)."
        )
    reading.key_value = None if observer is None else observer.result()


def candidate_positions(chat_template: bool, candidates: Sequence[int] | None) -> tuple[int, ...]:
    """Where the primary sink may be: as given, else the first three positions (chat template) or the first two."""
    if candidates is not None:
        return tuple(int(c) for c in candidates)
    return CHAT_CANDIDATES if chat_template else PLAIN_CANDIDATES


def gather(
    model: nn.Module,
    blocks: Sequence[Block],
    input_ids: Int[Tensor, "batch tokens"],
    attention_mask: Tensor | None,
    wanted: Mapping[int, Mapping[int, Sequence[int]]],
    progress: Progress | None = None,
) -> dict[int, dict[int, dict[str, Float[Tensor, "tokens dim"]]]]:
    """The MLP stages, attention output and residual of chosen tokens, by one forward pass.

    `wanted[row][layer]` are columns of the given row; the result is [row][layer][stage]: the stages of `Mlp.stages`,
    "attention" (attention output before it joins the residual), "residual" and "stream" (input and output of the
    block), in float32."""
    found: dict[int, dict[int, dict[str, Tensor]]] = {
        row: {layer: {} for layer in layers} for row, layers in wanted.items()
    }
    layers = sorted({layer for chosen in wanted.values() for layer in chosen})
    batch = input_ids.shape[0]

    def keeper(layer: int, stage: str) -> Callable[[Tensor], None]:
        def keep(x: Tensor) -> None:
            x = x.reshape(batch, -1, x.shape[-1])
            for row, chosen in wanted.items():
                if layer in chosen:
                    found[row][layer][stage] = x[row, list(chosen[layer])].float().cpu()
            if stage == "down" and progress is not None:
                progress(layers.index(layer) + 1, len(layers), "reading the MLPs")

        return keep

    with ExitStack() as stack:
        for layer in layers:
            for hook in _stage_hooks(blocks[layer], partial(keeper, layer)):
                stack.callback(hook.remove)
        run(model, input_ids, attention_mask)
    return found


@torch.no_grad()
def run(model: nn.Module, input_ids: Int[Tensor, "batch tokens"], attention_mask: Tensor | None = None) -> Any:
    """One forward pass in evaluation mode, without a cache and, where the host allows it, without logits."""
    accepted = inspect.signature(model.forward).parameters
    options: dict[str, Any] = {"use_cache": False, "logits_to_keep": 1}
    options = {name: value for name, value in options.items() if name in accepted}
    if attention_mask is not None:
        options["attention_mask"] = attention_mask.to(input_ids.device)
        if "position_ids" in accepted:
            options["position_ids"] = (options["attention_mask"].long().cumsum(-1) - 1).clamp_min(0)
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        return model(input_ids=input_ids, **options)
    finally:
        for module in training:
            module.training = True


def real_tokens(
    input_ids: Int[Tensor, "batch tokens"], attention_mask: Tensor | None
) -> tuple[Int[Tensor, "batch tokens"], list[Int[Tensor, " tokens"]]]:
    """The ids as a batch, and for each row the columns that are not padding. Raises ArgumentError for other shapes."""
    if not isinstance(input_ids, Tensor) or input_ids.ndim not in (1, 2) or input_ids.is_floating_point():
        got = (
            f"{tuple(input_ids.shape)} of {input_ids.dtype}"
            if isinstance(input_ids, Tensor)
            else type(input_ids).__name__
        )
        raise ArgumentError(
            f"input_ids: got {got}, expected token ids as an integer tensor (batch, tokens) or (tokens,)."
        )
    ids = input_ids if input_ids.ndim == 2 else input_ids[None]
    if attention_mask is None:
        return ids, [torch.arange(ids.shape[1]) for _ in range(ids.shape[0])]
    if tuple(attention_mask.shape) != tuple(ids.shape):
        raise ArgumentError(
            f"attention_mask: got shape {tuple(attention_mask.shape)}, expected {tuple(ids.shape)} as input_ids. Pass "
            "the mask of the tokenizer (1 for tokens, 0 for padding)."
        )
    return ids, [row.nonzero()[:, 0] for row in (attention_mask != 0).cpu()]


def _real_rows(
    x: Tensor, rows: Sequence[Scan], input_ids: Int[Tensor, "batch tokens"]
) -> Iterator[tuple[Scan, Float[Tensor, "tokens width"]]]:
    """Each row with its real tokens in float32; some hosts flatten batch and tokens into one axis."""
    if x.numel() != input_ids.numel() * x.shape[-1]:
        raise HostError(
            f"model: got activations of shape {tuple(x.shape)}, expected one vector for each of "
            f"{tuple(input_ids.shape)} tokens. Make one forward over the whole text, with the ids that were given; "
            "hosts that keep several streams per token, or put tokens of their own in front, cannot be analysed."
        )
    for row, values in zip(rows, x.reshape(len(rows), -1, x.shape[-1]), strict=True):
        yield row, values[row.kept.to(x.device)].float()


def _observe_keys(model: nn.Module, reading: Reading, stack: ExitStack) -> KeyValueNorms | None:
    observer = KeyValueNorms()
    try:
        stack.enter_context(use(model, observer))
    except InterceptionError as error:
        reading.notes.append(f"There are no key and value norms. {error}")
        return None
    return observer


@contextmanager
def _reading_streams(blocks: Sequence[nn.Module], keep: Callable[[int, Tensor, bool], None]) -> Iterator[list[int]]:
    """Calls keep(layer, stream, normed) after each block. Where the block returns the output of one of its own norms
    (post-norm hosts), the stream is that norm's input: after the norm every token has the same length."""
    fired: list[int] = []
    last_norm: list[tuple[Tensor, Tensor] | None] = [None]
    hooks: list[Any] = []

    def note_norm(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if args and isinstance(output, Tensor):
            last_norm[0] = (args[0], output)

    def read(layer: int, output: Any) -> None:
        stream = first_tensor(output)
        before, last_norm[0] = last_norm[0], None
        normed = before is not None and before[1].data_ptr() == stream.data_ptr()
        keep(layer, before[0] if normed and before is not None else stream, normed)
        fired.append(layer)

    try:
        for layer, block in enumerate(blocks):
            hooks += [norm.register_forward_hook(note_norm) for norm in find_norms(block)]
            hooks.append(block.register_forward_hook(lambda m, a, output, layer=layer: read(layer, output)))
        yield fired
    finally:
        for hook in hooks:
            hook.remove()


def _stage_hooks(block: Block, keeper: Callable[[str], Callable[[Tensor], None]]) -> list[Any]:
    """Hooks that hand every stage of a block to its keeper."""
    mlp: Mlp = block.mlp
    hooks = [_on_input(mlp.entry, keeper("input")), _on_output(mlp.exit, keeper("down"))]
    if mlp.fused is not None:
        keep_gate, keep_up = keeper("gate"), keeper("up")

        def halves(x: Tensor) -> None:
            gate, up = x.chunk(2, dim=-1)
            keep_gate(gate)
            keep_up(up)

        hooks.append(_on_output(mlp.fused, halves))
    for stage, part in (("gate", mlp.gate), ("up", mlp.up)):
        if part is not None:
            hooks.append(_on_output(part, keeper(stage)))
    if "product" in mlp.stages:
        hooks.append(_on_input(mlp.exit, keeper("product")))
        if mlp.act is not None:
            hooks.append(_on_output(mlp.act, keeper("act")))
    elif "act" in mlp.stages:
        hooks.append(_on_input(mlp.exit, keeper("act")))
    if block.attention is not None:
        hooks.append(_on_output(block.attention, keeper("attention")))
    hooks += [_on_input(block.module, keeper("residual")), _on_output(block.module, keeper("stream"))]
    return hooks


def _on_output(module: nn.Module, keep: Callable[[Tensor], None]) -> Any:
    return module.register_forward_hook(lambda m, args, output: keep(first_tensor(output)))


def _on_input(module: nn.Module, keep: Callable[[Tensor], None]) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = args[0] if args else next(x for x in kwargs.values() if isinstance(x, Tensor))
        keep(given)

    return module.register_forward_pre_hook(hook, with_kwargs=True)
