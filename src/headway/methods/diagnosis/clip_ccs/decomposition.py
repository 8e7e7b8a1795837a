"""The embedding of a tower as a sum of what each head and each MLP wrote.

    e / ‖e‖ = Σ_layers Σ_heads A[layer, head] + Σ_stages M[stage],     e = P · LN(z),   z = Σ of the 2L + 1 writes

LN is taken with the mean μ and deviation s = √(var + ε) of the whole z; each of the M = 2L + 1 stages carries the share
μ/M of the mean and β/M of the bias, and a head of the h in its layer 1/h of its stage's shares. The output projection's
bias is shared equally by its heads. What a head wrote is its output at the door times its slice of that projection.

Paper: Interpreting CLIP's Image Representation via Text-Based Decomposition, arXiv 2310.05916, section 3.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from headway.door import Observer, observe, use
from headway.door.call import AttentionCall, Site
from headway.errors import HeadwayError
from headway.methods.diagnosis.clip_ccs.towers import Tower, TowerGate

Head = tuple[int, int]
#: Largest distance between the sum of all parts and the host's own embedding, which has length one.
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


class ReconstructionError(HeadwayError):
    """The parts of an embedding do not add up to it, so nothing may be said about heads."""


@dataclass(frozen=True)
class Decomposition:
    """`heads[b, l, h]` and `stages[b, s]` in the joint space; stage 0 is the input of the first block, stage l + 1 the
    MLP of layer l. All of them sum to `embedding`, which has length one. `error` is the largest distance from it.
    `tokens[b, l, h, t]`, where asked for, splits a head by the token it read from."""

    heads: Float[Tensor, "batch layers heads joint"]
    stages: Float[Tensor, "batch stages joint"]
    embedding: Float[Tensor, "batch joint"]
    error: float
    tokens: Float[Tensor, "batch layers heads tokens joint"] | None = None

    def total(self) -> Float[Tensor, "batch joint"]:
        return self.heads.sum((1, 2)) + self.stages.sum(1)


@torch.no_grad()
def decompose(
    part: Tower, inputs: Any, *, spatial: bool = False, gates: Mapping[Head, float] | None = None
) -> Decomposition:
    """The parts of the embeddings of one batch: pixels for an image tower, `{"input_ids": …, "attention_mask": …}` for
    a text tower.

    `gates` multiplies heads as TowerGate does; statistics are those of the gated run. `spatial` keeps the tokens apart,
    at batch × layers × heads × tokens × joint numbers. Raises ReconstructionError where the sum is not the host's own
    embedding (another ε, another norm, a block with a further branch)."""
    gates = {} if gates is None else dict(gates)
    part.check_heads(gates)
    reader = _Heads(part, part.positions(inputs), spatial)
    with ExitStack() as scopes:
        if gates:
            scopes.enter_context(use(part.model, TowerGate(part=part, gates=gates), sites=part.sites))
        scopes.enter_context(observe(part.model, reader, sites=part.sites))
        stream = scopes.enter_context(_stream(part, reader.positions))
        embedding = part.embed(inputs)
    return _assemble(part, reader, stream, embedding, gates)


@torch.no_grad()
def embed(part: Tower, batches: Iterable[Any]) -> Float[Tensor, "batch joint"]:
    """Normalised embeddings of a tower over batches, in float32."""
    return torch.cat([nn.functional.normalize(part.embed(batch).float(), dim=-1) for batch in batches])


class _Heads(Observer):
    """The output of every head at one token of each row; with `spatial` also what it took from each token."""

    def __init__(self, part: Tower, positions: Tensor, spatial: bool) -> None:
        self.part = part
        self.positions = positions
        self.spatial = spatial
        self.reads_weights = self.reads_keys = spatial
        self.start()

    def start(self) -> None:
        self.outputs: dict[int, Tensor] = {}
        self.tokens: dict[int, Tensor] = {}

    def acts_at(self, site: Site) -> bool:
        return self.part.layer_of(site) is not None

    def observe(self, call: AttentionCall, output: Tensor, lse: Tensor | None = None) -> None:
        layer = self.part.layer_of(call.site)
        assert layer is not None
        rows = torch.arange(output.shape[0], device=output.device)
        self.outputs[layer] = output[rows, :, self.positions]
        if self.spatial:
            wanted, back = self.positions.unique(return_inverse=True)
            weights = call.weights(wanted)[rows, :, back]
            values = call.value.repeat_interleave(call.groups, 1)
            self.tokens[layer] = weights[..., None] * values

    def result(self) -> dict[int, Tensor]:
        return self.outputs


@contextmanager
def _stream(part: Tower, positions: Tensor) -> Iterator[dict[str, Tensor]]:
    """What the first block reads and what each MLP writes, at one token of each row."""
    seen: dict[str, Tensor] = {}
    rows = torch.arange(positions.numel(), device=positions.device)

    def keep(name: str, tensor: Tensor) -> None:
        seen[name] = tensor[rows, positions].detach()

    def first(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        keep("first", args[0] if args else kwargs["hidden_states"])

    hooks = [part.first.register_forward_pre_hook(first, with_kwargs=True)]
    for layer, mlp in enumerate(part.mlps):
        hooks.append(mlp.register_forward_hook(lambda m, a, output, layer=layer: keep(f"mlp {layer}", output)))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _assemble(
    part: Tower, reader: _Heads, stream: Mapping[str, Tensor], embedding: Tensor, gates: Mapping[Head, float]
) -> Decomposition:
    written = torch.stack([_written(part, reader.outputs[layer], layer) for layer in range(part.layers)], 1)
    stages = torch.stack([stream["first"], *(stream[f"mlp {layer}"] for layer in range(part.layers))], 1)
    z = written.double().sum((1, 2)) + stages.double().sum(1)
    linear = _Linearised(part, z, embedding)
    found = Decomposition(
        heads=linear(written, share=part.heads).to(embedding.dtype),
        stages=linear(stages).to(embedding.dtype),
        embedding=embedding / embedding.norm(dim=-1, keepdim=True),
        error=0.0,
        tokens=_by_token(part, reader, linear, gates).to(embedding.dtype) if reader.spatial else None,
    )
    error = float((found.total().double() - found.embedding.double()).norm(dim=-1).max())
    allowed = TOLERANCE.get(embedding.dtype, 1e-2)
    if not error <= allowed:
        raise ReconstructionError(
            f"model: the heads and MLPs of the {part.kind} tower of {type(part.model).__name__} add up to something "
            f"else than its embedding (off by {error:.2g}, expected at most {allowed:.0e}), so no head can be scored. "
            "The usual causes are a LayerNorm whose ε or form differs from what it states, or a block with a further "
            "branch."
        )
    return Decomposition(found.heads, found.stages, found.embedding, error, found.tokens)


def _written(part: Tower, output: Float[Tensor, "batch heads dim"], layer: int) -> Float[Tensor, "batch heads width"]:
    """What each head adds to the stream: its slice of the output projection, and its share of the bias."""
    return _project(part, output, layer) + _bias(part, layer) / part.heads


def _project(part: Tower, output: Float[Tensor, "batch heads *tokens dim"], layer: int) -> Tensor:
    weight = part.outputs[layer].weight.unflatten(1, (part.heads, part.head_dim))
    wrote = torch.einsum("bh...d,whd->bh...w", output.to(weight.dtype), weight)
    scale = part.scales[layer]
    return wrote if scale is None else wrote * scale


def _bias(part: Tower, layer: int) -> Tensor:
    weight, bias = part.outputs[layer].weight, part.outputs[layer].bias
    if bias is None:
        return weight.new_zeros(weight.shape[0])
    scale = part.scales[layer]
    return bias if scale is None else bias * scale


def _by_token(part: Tower, reader: _Heads, linear: _Linearised, gates: Mapping[Head, float]) -> Tensor:
    layers = []
    for layer in range(part.layers):
        pieces = reader.tokens[layer]
        factor = torch.tensor([gates.get((layer, head), 1.0) for head in range(part.heads)]).to(pieces)
        wrote = _project(part, pieces * factor[:, None, None], layer)
        layers.append(wrote + _bias(part, layer) / (part.heads * pieces.shape[2]))
    stacked = torch.stack(layers, 1)
    return linear(stacked, share=part.heads * stacked.shape[3])


class _Linearised:
    """P · LN with the statistics of the whole stream, for pieces of which `share` make up one stage."""

    def __init__(self, part: Tower, z: Float[Tensor, "batch width"], embedding: Tensor) -> None:
        self.norm, self.projection = part.norm, part.projection
        self.mean = z.mean(-1)
        self.deviation = (z.var(-1, unbiased=False) + part.norm.eps).sqrt()
        self.length = embedding.double().norm(dim=-1)
        self.stages = 2 * part.layers + 1

    def __call__(self, pieces: Float[Tensor, "batch ... width"], share: int = 1) -> Tensor:
        shape = (-1,) + (1,) * (pieces.ndim - 1)
        count = self.stages * share
        gamma = torch.ones_like(pieces[0]) if self.norm.weight is None else self.norm.weight.double()
        beta = 0.0 if self.norm.bias is None else self.norm.bias.double()
        centred = (pieces.double() - (self.mean / count).view(shape)) / self.deviation.view(shape)
        normed = centred * gamma + beta / count
        joint = normed if self.projection is None else normed @ self.projection.weight.double().T
        return joint / self.length.view(shape)


def stacked(parts: Sequence[Decomposition]) -> Decomposition:
    """Batches put end to end, without tokens."""
    return Decomposition(
        heads=torch.cat([p.heads for p in parts]),
        stages=torch.cat([p.stages for p in parts]),
        embedding=torch.cat([p.embedding for p in parts]),
        error=max(p.error for p in parts),
    )
