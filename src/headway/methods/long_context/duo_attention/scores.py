"""Scores of KV heads without training: how much of a head's attention lies far back.

    rope profile   q̄, k̄: a head's mean query and key before RoPE, over a text; both repeated T times, rotated;
                   a = softmax(q̄_T · k̄_j · scale) ,   score = (1/T) Σ_t Σ_{j≤t} a_j        (large: mass far back)
    distant mass   mean over rows of  1 − Σ_{j<S or i−j≤R} w_ij

The first is that of the library kvpress (its maintainers found it better than learned gates on their benchmark; T =
500, averaged over texts); it sees what RoPE alone does to a head's average query and key. Queries and keys are taken as
attention gets them and turned back, so that q and k norms count. Both are averaged over the query heads of a KV head.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from headway.door.attach import observe
from headway.door.call import AttentionCall
from headway.door.rotary import site_frequencies
from headway.door.stages import Observer
from headway.errors import ArgumentError, HostError, unknown
from headway.kernels.head_scores import streaming_mass
from headway.kernels.rope import Layout, rotate, unrotate
from headway.methods.long_context.duo_attention.gates import Gates, kv_geometry

SCORINGS = ("rope_profile", "distant_mass")
#: T of the rope profile.
PROFILE_TOKENS = 500
ROWS = 128


@torch.no_grad()
def score_heads(
    model: nn.Module,
    texts: Sequence[Int[Tensor, "1 tokens"]],
    *,
    scoring: str = "rope_profile",
    sinks: int = 64,
    recent: int = 256,
) -> Gates:
    """Training-free gates of a model from a few tokenized texts (5 to 10 suffice).

    `sinks` and `recent` say what is not distant; the rope profile does not need them. Layers with a sliding window get
    0: they stream already. Raises ArgumentError for texts too short to have distant keys, HostError for a rope profile
    of a host without rotary positions."""
    if scoring not in SCORINGS:
        raise unknown("scoring", scoring, SCORINGS)
    if not texts:
        raise ArgumentError("texts: got none, expected tokens of at least one text.")
    shape = kv_geometry(model)
    reader: RopeProfile | DistantMass
    if scoring == "rope_profile":
        frequencies, layout = site_frequencies(model)
        if frequencies is None or (isinstance(frequencies, dict) and all(f is None for f in frequencies.values())):
            raise HostError(
                f"{type(model).__name__}: got a host without rotary positions, expected RoPE. Use "
                "scoring='distant_mass'."
            )
        reader = RopeProfile(frequencies, layout)
    else:
        shortest = min(ids.shape[1] for ids in texts)
        if shortest <= sinks + recent + 1:
            raise ArgumentError(
                f"texts: got one of {shortest} tokens, expected more than sinks + recent + 1 = {sinks + recent + 1}. "
                "Give longer texts or count fewer tokens as near."
            )
        reader = DistantMass(sinks, recent)
    device = next(model.parameters()).device
    with observe(model, reader):
        for ids in texts:
            model(input_ids=ids.to(device), use_cache=False)
    scores = torch.zeros(shape)
    for layer, found in reader.result().items():
        scores[layer] = torch.stack(found).mean(0).view(shape[1], -1).mean(-1)
    return Gates.of(model, scores, how=scoring, texts=len(texts))


def rope_profile(
    query: Float[Tensor, "heads dim"],
    key: Float[Tensor, "kv_heads dim"],
    frequencies: Float[Tensor, " pairs"],
    *,
    scale: float,
    layout: Layout = "half",
    tokens: int = PROFILE_TOKENS,
) -> Float[Tensor, " heads"]:
    """(1/T) Σ_t Σ_{j≤t} a_j of mean q and k before RoPE: between 0 and 1, about ½ where position does not matter."""
    places = torch.arange(tokens, device=query.device)
    turned = rotate(query[:, None].float(), places[-1:], frequencies, layout)
    keys = rotate(key[:, None].float().expand(-1, tokens, -1), places, frequencies, layout)
    keys = keys.repeat_interleave(query.shape[0] // key.shape[0], 0)
    weights = (turned @ keys.transpose(-1, -2) * scale).softmax(-1)[:, 0]
    return weights.cumsum(-1).mean(-1)


class RopeProfile(Observer):
    """The rope profile of every head, a text at a time."""

    def __init__(self, frequencies: dict[str, Tensor | None] | Tensor, layout: Layout) -> None:
        self.frequencies, self.layout = frequencies, layout

    def start(self) -> None:
        self._found: dict[int, list[Tensor]] = defaultdict(list)

    def observe(self, call: AttentionCall, output: Tensor, lse: Tensor | None = None) -> None:
        table = self.frequencies
        own = table if isinstance(table, Tensor) else table.get(call.site.name)
        if call.site.kind != "self" or call.site.window is not None:
            return
        query, key = call.query.float(), call.key.float()
        if own is None:
            own = torch.zeros(1, device=query.device)
        else:
            query = unrotate(query, call.query_positions, own, self.layout)
            key = unrotate(key, call.key_positions, own, self.layout)
        score = rope_profile(query.mean(2)[0], key.mean(2)[0], own, scale=call.scale, layout=self.layout)
        self._found[call.site.layer].append(score.cpu())

    def result(self) -> dict[int, list[Tensor]]:
        return self._found


class DistantMass(Observer):
    """The share of attention outside sinks and recent keys, over the rows that have distant ones, a text at a time."""

    reads_weights = True

    def __init__(self, sinks: int, recent: int) -> None:
        self.sinks, self.recent = sinks, recent

    def start(self) -> None:
        self._found: dict[int, list[Tensor]] = defaultdict(list)

    def observe(self, call: AttentionCall, output: Tensor, lse: Tensor | None = None) -> None:
        if call.site.kind != "self" or call.site.window is not None:
            return
        total = torch.zeros(call.heads)
        begin = self.sinks + self.recent + 1
        for start in range(begin, call.queries, ROWS):
            rows = torch.arange(start, min(start + ROWS, call.queries), device=call.query.device)
            weights = call.weights(rows)
            near = streaming_mass(weights, rows, sinks=self.sinks, window=self.recent + 1)[1]
            total += (weights.sum(-1) - near)[0].sum(-1).cpu()
        self._found[call.site.layer].append(total / (call.queries - begin))

    def result(self) -> dict[int, list[Tensor]]:
        return self._found
