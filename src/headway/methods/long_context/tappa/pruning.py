"""Which layers to leave out: those that change the stream little and whose attention can be foretold go first.

    BI_l = 1 − mean_t cos(h_in, h_out) ,   BI'_l = norm(BI)_l + β (1 − norm(q_sim)_l) ,   lowest BI' first

norm is min-max over layers; β = 0 is ShortGPT (arXiv 2403.03853). q_sim is read before RoPE over all tokens of a chunk
and averaged over heads. β of the released settings: 0.2 for Llama-2-7B, 0.3 for Llama-3.1-8B, 0.1 for Qwen2.5-7B; the
data there are chunks of 1,024 tokens of PG-19, every 256. arXiv 2601.21709.

`headway.door.blocks.without_blocks(model, layers)` leaves them out for the length of a context, `without_attention`
only their attention.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from headway.door.attach import observe
from headway.door.blocks import host_blocks, recorded_inputs
from headway.door.call import AttentionCall
from headway.door.rotary import site_frequencies
from headway.door.stages import Observer
from headway.errors import ArgumentError, is_number
from headway.kernels.rope import Layout
from headway.methods.long_context.tappa.similarity import Pairs, query_similarity

BETA = 0.2


@dataclass(frozen=True, eq=False)
class LayerMeasures:
    """Block influence and query similarity of each layer."""

    influence: Float[Tensor, " layers"]
    similarity: Float[Tensor, " layers"]

    def order(self, beta: float = BETA) -> list[int]:
        """`prune_order` of these measures."""
        return prune_order(self.influence, self.similarity, beta=beta)


def block_influence(
    before: Float[Tensor, "batch tokens width"],
    after: Float[Tensor, "batch tokens width"],
    valid: Bool[Tensor, "batch tokens"] | None = None,
) -> float:
    """1 − mean cosine between what enters and what leaves a block, over the tokens that are valid."""
    alike = torch.nn.functional.cosine_similarity(before.double(), after.double(), dim=-1)
    return float(1 - (alike.mean() if valid is None else alike[valid].mean()))


def adjusted_influence(
    influence: Float[Tensor, " layers"], similarity: Float[Tensor, " layers"], *, beta: float = BETA
) -> Float[Tensor, " layers"]:
    """BI': both measures scaled to 0 … 1 over the layers (to 0 where all are equal)."""
    if influence.ndim != 1 or influence.shape != similarity.shape or not influence.numel():
        raise ArgumentError(
            f"influence, similarity: got shapes {tuple(influence.shape)} and {tuple(similarity.shape)}, expected one "
            "number per layer in both."
        )
    if not (is_number(beta) and beta >= 0):
        raise ArgumentError(f"beta: got {beta!r}, expected 0 or more; 0 leaves similarity out.")
    if not bool(torch.isfinite(influence).all() and torch.isfinite(similarity).all()):
        raise ArgumentError("influence, similarity: got NaN or infinity, expected finite numbers. Check the text.")
    return _scaled(influence) + beta * (1 - _scaled(similarity))


def prune_order(
    influence: Float[Tensor, " layers"], similarity: Float[Tensor, " layers"], *, beta: float = BETA
) -> list[int]:
    """All layers, the first to go first; equal ones by their number."""
    return adjusted_influence(influence, similarity, beta=beta).argsort(stable=True).tolist()


@torch.no_grad()
def measure_layers(
    model: nn.Module, chunks: Iterable[Int[Tensor, "batch tokens"]], *, pairs: Pairs = "all"
) -> LayerMeasures:
    """Both measures over chunks of text, one forward each. Hosts without RoPE give the queries as they are.

    The frequencies are the host's own; where a host normalises queries after the projection (Qwen3), similarity is that
    of the normalised ones. To be called while nothing is attached. Raises ArgumentError for no chunks."""
    count = len(host_blocks(model))
    frequencies, layout = site_frequencies(model)
    influence, similarity = torch.zeros(count, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)
    number = 0
    for ids in chunks:
        reader = _Similarity(frequencies, layout, pairs)
        with observe(model, reader), recorded_inputs(model) as streams:
            model(input_ids=ids, use_cache=False)
        if len(streams) != count + 1:
            raise ArgumentError(f"model: got {len(streams) - 1} block inputs in one forward, expected {count}.")
        influence += torch.tensor([block_influence(a, b) for a, b in itertools.pairwise(streams)])
        similarity += torch.tensor(reader.result(), dtype=torch.float64)
        number += 1
    if not number:
        raise ArgumentError("chunks: got none, expected at least one chunk of token ids.")
    return LayerMeasures(influence / number, similarity / number)


def text_chunks(
    ids: Int[Tensor, "1 tokens"], *, length: int = 1024, stride: int = 256, most: int | None = None
) -> list[Tensor]:
    """Whole chunks of a text, one every `stride` tokens, at most `most`."""
    if length < 2 or stride < 1 or ids.shape[1] < length:
        raise ArgumentError(
            f"length, stride: got {length}, {stride} for {ids.shape[1]} tokens, expected at least 2 and 1, and a text "
            "of one chunk or more."
        )
    starts: Sequence[int] = range(0, ids.shape[1] - length + 1, stride)
    return [ids[:, start : start + length] for start in starts[:most]]


class _Similarity(Observer):
    """Mean query similarity of each self-attention site, in the order in which they ran."""

    def __init__(self, frequencies: Mapping[str, Tensor | None] | Tensor | None, layout: Layout, pairs: Pairs) -> None:
        self.frequencies, self.layout, self.pairs = frequencies, layout, pairs

    def start(self) -> None:
        self._found: list[float] = []

    def observe(self, call: AttentionCall, output: Tensor, lse: Tensor | None = None) -> None:
        if call.site.kind != "self":
            return
        given = self.frequencies.get(call.site.name) if isinstance(self.frequencies, Mapping) else self.frequencies
        padded = call.padded_rows()
        found = query_similarity(
            call.query,
            pairs=self.pairs,
            stage="post_rope" if given is None else "pre_rope",
            valid=None if padded is None else ~padded,
            positions=call.query_positions,
            frequencies=given,
            layout=self.layout,
        )
        self._found.append(float(found.mean()))

    def result(self) -> list[float]:
        return self._found


def _scaled(x: Tensor) -> Tensor:
    low, high = x.double().min(), x.double().max()
    return (x.double() - low) / (high - low) if bool(high > low) else torch.zeros_like(x, dtype=torch.float64)
