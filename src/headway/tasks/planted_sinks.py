"""A decoder with known sinks: a Llama whose weights are written by hand, so that the place and life of each are known.

    layer p₀   position 0 (a token of its own) is written r₀·u: the primary sink;   layer e writes −r₀·u: its end
    layer p_i  a token with trigger id i that comes after a marker is written r_i·u: a secondary sink
               (a head of layer p_1 copies a flag from the marker; a pair of MLP units fires on id and flag together);
               other units of the same MLP write r_i·u at position 0: unlike inputs, one output direction
    every layer writes σ·w_l, orthogonal to u and to each other, and a little that depends on the token

so that a sink created at layer p with the norm m at a right angle to u lives (r²·tan²(arccos 0.9) − m²) / σ² layers.
Trigger ids before the marker never fire: same id, no sink. One head per layer attends to what points along u, so that
sinks also receive attention, the more the larger their share of the stream. All directions are turned by one random
rotation: nothing lies along an axis. The setting is that of arXiv 2512.22213; the construction is ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from headway.errors import ArgumentError

#: Token ids with a meaning; ids from ORDINARY on have none.
PRIMARY_ID, MARKER_ID, FIRST_TRIGGER_ID, ORDINARY = 0, 1, 2, 8
VOCABULARY = 64
HEADS = 4
#: Lengths of an embedding and of the features inside it; the rest of an embedding is random.
EMBEDDING, FEATURE = 4.0, 2.4
#: A unit pair rises from 0 to its full write over this range of its gate, and is driven GAIN past either end.
STEP, GAIN = 10.0, 60.0
#: Attention logits of the sink head on a stream that lies along u, and of the flag head on a marker.
SINK_LOGIT, MARKER_LOGIT = 5.0, 20.0
#: Norm of what an MLP writes dependent on the token, relative to σ: small, so that the law still holds.
NOISE = 0.2
#: Scale of the random attention heads, for the same reason.
MIXED = 0.1
#: So slow a rotation that position does not change a logit.
ROPE_BASE = 1e12


@dataclass(frozen=True)
class Creation:
    """A layer that makes secondary sinks: the token id it fires on, the norm it writes, and the norm at a right angle
    to the sink's direction that the stream has there."""

    token_id: int
    layer: int
    norm: float
    before: float


@dataclass(frozen=True)
class PlantedSinks:
    """The model and its truth. `direction` is u; `write_norm` is σ; the primary lives in layers [start, end)."""

    model: nn.Module
    start: int
    end: int
    primary_norm: float
    creations: tuple[Creation, ...]
    write_norm: float
    direction: Float[Tensor, " width"]

    def text(
        self, tokens: int = 128, *, sinks: int = 12, generator: torch.Generator
    ) -> tuple[Int[Tensor, "1 tokens"], dict[int, int]]:
        """Token ids, and the truth: position -> layer of creation for every secondary sink in it.

        The marker stands at a third of the text. `sinks` tokens of each trigger id come after it and as many before."""
        marker = tokens // 3
        triggers = [c.token_id for c in self.creations]
        if sinks * len(triggers) > marker - 1:
            raise ArgumentError(
                f"sinks: got {sinks} for {len(triggers)} triggers in {tokens} tokens, expected at most "
                f"{(marker - 1) // len(triggers)}. Give a longer text."
            )
        ids = torch.randint(ORDINARY, VOCABULARY, (tokens,), generator=generator)
        ids[0], ids[marker] = PRIMARY_ID, MARKER_ID
        before = torch.randperm(marker - 1, generator=generator) + 1
        after = torch.randperm(tokens - marker - 1, generator=generator) + marker + 1
        truth: dict[int, int] = {}
        for i, creation in enumerate(self.creations):
            places = slice(i * sinks, (i + 1) * sinks)
            ids[before[places]] = creation.token_id
            ids[after[places]] = creation.token_id
            truth |= {int(position): creation.layer for position in after[places]}
        return ids[None], dict(sorted(truth.items()))


def planted_sinks(
    *,
    seed: int = 0,
    layers: int = 16,
    width: int = 64,
    start: int = 1,
    end: int = 15,
    primary_norm: float = 200.0,
    creations: tuple[tuple[int, float], ...] = ((3, 11.91), (8, 12.31)),
    write_norm: float = 1.0,
) -> PlantedSinks:
    """A planted model in float32 and evaluation mode. `creations` are (layer, norm) of the secondary sinks, one trigger
    id each; `start` and `end` are the primary's range, `write_norm` is σ."""
    _check(layers, width, start, end, creations)
    generator = torch.Generator().manual_seed(seed)
    space = _Space(layers, width, len(creations), generator)
    model = _empty_llama(layers, width, space.units(layers))
    _write_embeddings(model, space, generator)
    made = []
    for layer, block in enumerate(model.model.layers):
        mlp = _Units(block.mlp)
        flagged = FEATURE if layer >= creations[0][0] else 0.0
        before = math.sqrt(EMBEDDING**2 + flagged**2 + (layer + 1) * write_norm**2)
        _write_attention(block.self_attn, space, generator)
        if layer == creations[0][0]:
            _write_flag_head(block.self_attn, space, before)
        for i, (at, norm) in enumerate(creations):
            if at == layer:
                scale = before / (math.sqrt(width) * FEATURE)
                reads = (space.triggers[i] + space.flag) * scale
                mlp.step(reads, 1.5, norm * space.sink)
                mlp.step(space.first * (primary_norm / (math.sqrt(width) * FEATURE)), 0.5, norm * space.sink)
                made.append(Creation(FIRST_TRIGGER_ID + i, layer, norm, before))
        if layer == start:
            mlp.step(space.first * (before / (math.sqrt(width) * FEATURE)), 0.5, primary_norm * space.sink)
        if layer == end:
            total = primary_norm + sum(norm for _, norm in creations)
            mlp.step(space.first * (total / (math.sqrt(width) * FEATURE)), 0.5, -total * space.sink)
        mlp.linear(space.mixing(generator) * (NOISE * write_norm / math.sqrt(width)), space.free)
        block.mlp.down_proj.bias.data.copy_(write_norm * space.drift[layer])
    return PlantedSinks(
        model=model.eval(),
        start=start,
        end=end,
        primary_norm=primary_norm,
        creations=tuple(made),
        write_norm=write_norm,
        direction=space.sink,
    )


class _Space:
    """Orthonormal directions with a meaning: the sink, features of tokens, a drift per layer; and the free ones."""

    def __init__(self, layers: int, width: int, triggers: int, generator: torch.Generator) -> None:
        basis = torch.linalg.qr(torch.randn(width, width, generator=generator))[0].T
        self.sink, self.first, self.marker, self.flag = basis[:4]
        self.triggers, self.drift, self.free = basis[4:].split([triggers, layers, width - 4 - triggers - layers])

    def units(self, layers: int) -> int:
        """Hidden units of an MLP: the free directions, and two for each step that a layer may take."""
        return len(self.free) + 2 * (2 * len(self.triggers) + 2)

    def mixing(self, generator: torch.Generator) -> Float[Tensor, "free width"]:
        """A random antisymmetric map of the free part of the stream: what it writes is at a right angle to it."""
        size = len(self.free)
        random = torch.randn(size, size, generator=generator)
        turn = random - random.T
        return (turn / torch.linalg.matrix_norm(turn, 2)) @ self.free


class _Units:
    """Fills the hidden units of a Llama MLP one after another."""

    def __init__(self, mlp: Any) -> None:
        self.gate, self.up, self.down = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        self.used = 0

    def step(self, reads: Float[Tensor, " width"], threshold: float, write: Float[Tensor, " width"]) -> None:
        """Writes `write` where reads·x is above the threshold (by a sixth and more), nothing where it is below:
        silu(z) − silu(z − STEP) is 0 far below and STEP far above."""
        for shift, sign in ((0.0, 1.0), (STEP, -1.0)):
            unit = self.used
            self.gate.weight.data[unit] = 2 * GAIN * reads
            self.gate.bias.data[unit] = -2 * GAIN * threshold - shift + STEP / 2
            self.up.bias.data[unit] = 1.0
            self.down.weight.data[:, unit] = sign * write / STEP
            self.used += 1

    def linear(self, reads: Float[Tensor, "units width"], writes: Float[Tensor, "units width"]) -> None:
        """Writes Σ_k (reads_k·x)·writes_k: units whose gate does not depend on the input."""
        units = slice(self.used, self.used + len(reads))
        self.gate.bias.data[units] = 1.0
        self.up.weight.data[units] = reads / torch.nn.functional.silu(torch.tensor(1.0))
        self.down.weight.data[:, units] = writes.T
        self.used += len(reads)


def _empty_llama(layers: int, width: int, units: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=units,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_BASE},
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=True,
        bos_token_id=PRIMARY_ID,
        eos_token_id=None,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config)
    for block in model.model.layers:
        for parameter in (*block.self_attn.parameters(), *block.mlp.parameters()):
            parameter.data.zero_()
    return model


def _write_embeddings(model: Any, space: _Space, generator: torch.Generator) -> None:
    random = torch.nn.functional.normalize(torch.randn(VOCABULARY, len(space.free), generator=generator), dim=1)
    table = EMBEDDING * random @ space.free
    rest = math.sqrt(EMBEDDING**2 - FEATURE**2) / EMBEDDING
    features = {PRIMARY_ID: space.first, MARKER_ID: space.marker}
    features |= {FIRST_TRIGGER_ID + i: direction for i, direction in enumerate(space.triggers)}
    for token, direction in features.items():
        table[token] = FEATURE * direction + rest * table[token]
    model.get_input_embeddings().weight.data.copy_(table)


def _write_attention(attention: Any, space: _Space, generator: torch.Generator) -> None:
    """Head 0 attends to what lies along the sink's direction. Heads 2 and up mix the free part weakly. Queries are
    constant and sit, with the keys, in the slowest rotation, so that position does not matter."""
    slow, scale = attention.head_dim // 2 - 1, math.sqrt(attention.head_dim)
    width = len(space.sink)
    attention.q_proj.bias.data[slow] = scale
    attention.k_proj.weight.data[slow] = SINK_LOGIT / math.sqrt(width) * space.sink
    rows = slice(2 * attention.head_dim, HEADS * attention.head_dim)
    count = rows.stop - rows.start
    for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
        random = torch.randn(count, len(space.free), generator=generator) / math.sqrt(width)
        projection.weight.data[rows] = MIXED * random @ space.free
    random = torch.randn(len(space.free), count, generator=generator) / math.sqrt(count)
    attention.o_proj.weight.data[:, rows] = MIXED * space.free.T @ random


def _write_flag_head(attention: Any, space: _Space, before: float) -> None:
    """Head 1 attends to markers, else to the primary sink, and writes the flag from what it finds at a marker."""
    first = attention.head_dim
    slow, width = first + attention.head_dim // 2 - 1, len(space.sink)
    attention.q_proj.bias.data[slow] = math.sqrt(attention.head_dim)
    seen = before / (math.sqrt(width) * FEATURE) * space.marker
    attention.k_proj.weight.data[slow] = MARKER_LOGIT * seen + SINK_LOGIT / math.sqrt(width) * space.sink
    attention.v_proj.weight.data[first] = seen
    attention.o_proj.weight.data[:, first] = FEATURE * space.flag


def _check(layers: int, width: int, start: int, end: int, creations: tuple[tuple[int, float], ...]) -> None:
    if not 1 <= start < end < layers or not all(start < layer < end for layer, _ in creations):
        raise ArgumentError(
            f"start, end, creations: got {start}, {end} and layers {[layer for layer, _ in creations]}, expected "
            f"1 ≤ start < creation layers < end < {layers}."
        )
    if len(creations) > ORDINARY - FIRST_TRIGGER_ID:
        raise ArgumentError(f"creations: got {len(creations)}, expected at most {ORDINARY - FIRST_TRIGGER_ID}.")
    if width < layers + 4 + len(creations) + HEADS:
        raise ArgumentError(
            f"width: got {width}, expected at least {layers + 4 + len(creations) + HEADS}: a direction per layer, the "
            "features, and some room."
        )
