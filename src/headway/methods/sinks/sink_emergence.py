"""Sink_k^ε: in how many heads does a key receive more than ε of the attention of each query that sees it?

    α_k^{l,h} = 1/(T−k+1) Σ_{i≥k} A_ik          (k from 1; causal, no padding)
    Sink_k^ε  = mean over sequences, layers and heads of 1[α_k^{l,h} > ε] ,   ε = 0.3

T−k+1 counts the queries that see key k. Here α divides by that count as the mask gives it, so padding, sliding windows
and bidirectional attention keep the meaning. Beside the rate stand the paper's companion statistics of the first token:
the norm ratios of hidden state (massive activation), key and value (value drain), and

    q_t · k_1 = ‖q_t‖ ‖k_1‖ cos(q_t, k_1)       (the sink comes from the cosine, in spite of a small ‖k_1‖)

Paper: When Attention Sink Emerges in Language Models: An Empirical View, arXiv 2410.10781. It reports percentages over
100 sequences of 64 tokens with no BOS added; rates here are fractions. The released code keeps every T × T map; here α
is summed over blocks of query rows.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from headway.card import Card
from headway.door.call import AttentionCall, Site
from headway.door.stages import Observer
from headway.errors import ArgumentError, InterceptionError
from headway.methods.sinks.sink_survey import cosine_to_mean, norm_ratio

CARD = Card(
    slug="sink-emergence",
    title="When Attention Sink Emerges in Language Models: An Empirical View",
    year=2024,
    arxiv="2410.10781",
    family="sinks",
    stages=("observe",),
    needs=("query and key", "self-attention"),
    knobs={
        "epsilon": "share of attention above which a head counts as sinking into a key",
        "length": "tokens per sequence",
    },
    summary="Measures how many heads sink into a token, and the norms and angles that make them do it.",
)

#: The paper's ε and T: strict enough that the rate changes little with the length of the input.
EPSILON = 0.3
LENGTH = 64
#: Below this rate a model is said to have no sink.
NO_SINK = 0.05
#: A key counts for the verdict when at least this share of the most seen key's queries see it; α over a few queries is
#: noise, and over the last query alone it is the weight of a token on itself. Our choice.
SUPPORT = 0.25
#: Of the proxies for weights that are no distribution; the released code's value.
PROXY_EPS = 1e-8
#: Query rows per block of the observer.
ROWS = 128


def received_mean(
    weights: Float[Tensor, "*batch queries keys"] | None,
    *,
    visible: Bool[Tensor, "*#batch queries keys"] | None = None,
) -> Float[Tensor, "*batch keys"]:
    """α_k: the mean weight on key k over the queries that see it, in float32; NaN for a key that no query sees.

    `visible` says who sees what: all True for bidirectional attention, False in the rows of padding queries.
    `visible=None` is causal with the queries as the last rows of the keys. Raises ArgumentError for weights of None,
    which fused attention returns."""
    if weights is None:
        raise ArgumentError(
            "weights: got None, expected attention weights. Fused attention returns none: load the model with "
            "attn_implementation='eager' and call it with output_attentions=True, or use `measure_sinks`, which "
            "needs neither."
        )
    queries, keys = weights.shape[-2:]
    if visible is None:
        visible = torch.ones(queries, keys, dtype=torch.bool, device=weights.device).tril(keys - queries)
    received = (weights.float() * visible).sum(-2)
    return alpha_from_received(received, visible.sum(-2).float())


def alpha_from_received(
    received: Float[Tensor, "*batch keys"], visible_counts: Float[Tensor, "*#batch keys"]
) -> Float[Tensor, "*batch keys"]:
    """α_k from the mass Σ_i A_ik that each key receives and the number of queries that see it; NaN where that is 0."""
    counts = visible_counts.float()
    return torch.where(counts > 0, received.float() / counts.clamp(min=1), torch.nan)


def proxy(
    scores: Float[Tensor, "*batch queries keys"], *, signed: bool = False
) -> tuple[Float[Tensor, "*batch queries keys"], Float[Tensor, "*batch queries"]]:
    """Weights that are no distribution, made one, with the raw mass Σ_j A_ij of each row.

    Non-negative scores (sigmoid, elu + 1): A / (ΣA + 1e-8). Signed ones (linear kernels): |A| / (Σ|A| + 1e-8). Report
    the mass beside α: a row of tiny weights has a proxy of one all the same. Masked entries must be 0."""
    scores = scores.float()
    mass = scores.sum(-1)
    if not signed and bool((scores < 0).any()):
        raise ArgumentError(
            f"scores: got a negative entry ({float(scores.min()):g}), expected non-negative scores. Pass signed=True."
        )
    size = scores.abs()
    return size / (size.sum(-1, keepdim=True) + PROXY_EPS), mass


def uniform_alpha(tokens: int) -> Float[Tensor, " keys"]:
    """α_k of attention spread evenly over the causal past: (H_T − H_{k−1}) / (T−k+1) with harmonic numbers H."""
    tail = torch.arange(1, tokens + 1, dtype=torch.float64).reciprocal().flip(0).cumsum(0).flip(0)
    return (tail / torch.arange(tokens, 0, -1)).float()


@dataclass(frozen=True, kw_only=True)
class SinkRates:
    """Sink_k^ε by key position: over all heads (every layer weighs the same), by layer, and by head of each layer."""

    overall: Float[Tensor, " keys"]
    by_layer: Float[Tensor, "layers keys"]
    by_head: list[Float[Tensor, "heads keys"]]


def sink_rate(alpha: Sequence[Float[Tensor, "sequences heads keys"]] | Tensor, epsilon: float = EPSILON) -> SinkRates:
    """The share of sequences and heads with α_k > ε; `alpha` holds one tensor per layer.

    A NaN α (a key that no query sees) is left out; a position without any α has rate NaN."""
    _check_epsilon(epsilon)
    if len(alpha) == 0:
        raise ArgumentError("alpha: got no layer, expected one tensor (sequences, heads, keys) per layer.")
    by_head = [(a > epsilon).float().masked_fill(a.isnan(), torch.nan).nanmean(0) for a in alpha]
    by_layer = torch.stack([rates.nanmean(0) for rates in by_head])
    return SinkRates(overall=by_layer.nanmean(0), by_layer=by_layer, by_head=by_head)


def _check_epsilon(epsilon: float) -> None:
    if not 0 <= epsilon < 1:
        raise ArgumentError(f"epsilon: got {epsilon!r}, expected 0 ≤ ε < 1, a share of attention. The paper uses 0.3.")


@dataclass(frozen=True, kw_only=True)
class Decomposition:
    """Why queries meet the first key: q_t·k = ‖q_t‖ ‖k‖ cos(q_t, k), each a mean over the queries after it.

    `other_*` are means over the other keys that the same query sees, the measure for what is large and what is small.
    Products are unscaled. After rotary embedding, as the attention sees them."""

    query_norm: Float[Tensor, "*batch heads"]
    first_key_norm: Float[Tensor, "*batch heads"]
    first_cosine: Float[Tensor, "*batch heads"]
    first_product: Float[Tensor, "*batch heads"]
    other_key_norm: Float[Tensor, "*batch heads"]
    other_cosine: Float[Tensor, "*batch heads"]
    other_product: Float[Tensor, "*batch heads"]


PARTS = tuple(Decomposition.__dataclass_fields__)


def decompose_scores(
    query: Float[Tensor, "batch heads queries dim"],
    key: Float[Tensor, "batch kv_heads keys dim"],
    *,
    visible: Bool[Tensor, "#batch #heads queries keys"] | None = None,
    first: Int[Tensor, " batch"] | None = None,
) -> Decomposition:
    """Norms and cosines behind q_t · k_first, per sequence and head. `visible=None` is causal, `first=None` key 0."""
    batch, _, queries, _ = query.shape
    keys = key.shape[2]
    if visible is None:
        visible = torch.ones(1, 1, queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
    first = torch.zeros(batch, dtype=torch.long, device=query.device) if first is None else first
    parts, counted = _score_parts(
        query, key, visible, first, torch.arange(queries, device=query.device) + keys - queries
    )
    total = counted.sum(-1)
    return Decomposition(**{name: part.sum(-1) / total for name, part in parts.items()})


def _score_parts(
    query: Tensor, key: Tensor, visible: Tensor, first: Tensor, positions: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    """The parts per query (batch, heads, rows), zero where the query does not count, and which queries count: those
    that see the first key and at least one other, the first token itself left out."""
    batch, heads = query.shape[:2]
    groups = heads // key.shape[1]
    query, key = query.float(), key.float()
    key_norm = key.norm(dim=-1)
    at_first = first[:, None, None, None]
    is_first = torch.arange(key.shape[2], device=key.device) == at_first
    others = (visible & ~is_first).float()
    count = others.sum(-1)
    sees_first = (visible & is_first).any(-1)
    counted = (sees_first & (count > 0) & (positions != first[:, None, None])).expand(batch, heads, -1)

    def over_others(vectors: Tensor) -> Tensor:
        """Mean of per-key vectors over the other keys that each query sees: (batch, heads, rows, dim)."""
        per_head = vectors if others.shape[1] == 1 else vectors.repeat_interleave(groups, 1)
        mean = others @ per_head / count.clamp(min=1)[..., None]
        return mean if others.shape[1] > 1 else mean.repeat_interleave(groups, 1)

    unit = key / key_norm.clamp(min=torch.finfo(torch.float32).tiny)[..., None]
    query_norm = query.norm(dim=-1)
    unit_query = query / query_norm.clamp(min=torch.finfo(torch.float32).tiny)[..., None]
    index = at_first.expand(-1, key.shape[1], 1, key.shape[3])
    first_key = key.gather(2, index).repeat_interleave(groups, 1)
    first_unit = unit.gather(2, index).repeat_interleave(groups, 1)
    parts = {
        "query_norm": query_norm,
        "first_key_norm": first_key.norm(dim=-1).expand_as(query_norm),
        "first_cosine": (unit_query * first_unit).sum(-1),
        "first_product": (query * first_key).sum(-1),
        "other_key_norm": over_others(key_norm[..., None])[..., 0],
        "other_cosine": (unit_query * over_others(unit)).sum(-1),
        "other_product": (query * over_others(key)).sum(-1),
    }
    return {name: torch.where(counted, part, 0.0) for name, part in parts.items()}, counted


@dataclass(frozen=True, kw_only=True)
class SiteSinks:
    """What one attention site showed, a row per sequence. Key position 0 is the first token that is not padding.

    `seen`: queries that see each key. `first_share`: mean weight on the first token over the later queries that see it.
    `mass`: mean row sum (below one where a head has a learned sink). `key_ratio`, `value_ratio`: norm of the first
    token's vector over the mean of the rest. `key_cosine`: of the first key to the mean key."""

    site: Site
    alpha: Float[Tensor, "sequences heads keys"]
    seen: Float[Tensor, "sequences heads keys"]
    first_share: Float[Tensor, "sequences heads"]
    mass: Float[Tensor, "sequences heads"]
    key_ratio: Float[Tensor, "sequences kv_heads"]
    value_ratio: Float[Tensor, "sequences kv_heads"]
    key_cosine: Float[Tensor, "sequences kv_heads"]
    decomposition: Decomposition

    def supported(self, share: float = SUPPORT) -> Float[Tensor, "sequences heads keys"]:
        """α where a key is seen by at least `share` of the queries that see the most seen key, NaN elsewhere."""
        enough = self.seen >= share * self.seen.amax(-1, keepdim=True)
        return self.alpha.masked_fill(~enough, torch.nan)


@dataclass(frozen=True, kw_only=True)
class SinkObserver(Observer):
    """Gathers α and the companion statistics at every self-attention site, block by block: O(rows × keys) memory.

    Each batch row is one sequence. Prefill in pieces and cached decoding add to the sequence they continue; where a
    sliding cache has dropped the first key, its companion statistics rest on the queries before that. Padding is left
    out and left-padded rows are shifted to their first token."""

    reads_weights = True
    on_text = True
    rows: int = ROWS
    _sites: dict[str, _Running] = field(default_factory=dict, init=False, repr=False, compare=False)

    def acts_at(self, site: Site) -> bool:
        return site.kind == "self"

    def start(self) -> None:
        self._sites.clear()

    def observe(self, call: AttentionCall, output: Tensor, lse: Tensor | None = None) -> None:
        call.check_finite()
        running = self._sites.setdefault(call.site.name, _Running(call.site))
        if call.forward.step == 0:
            running.finish()
        running.add(call, self.rows)

    def result(self) -> list[SiteSinks]:
        """One entry per site in the order of layers. Raises ArgumentError when nothing was observed."""
        if not self._sites:
            raise ArgumentError(
                "observer: got no attention call, expected one forward at least. Run the model in the scope."
            )
        return [running.result() for running in sorted(self._sites.values(), key=lambda r: r.site.layer)]


class _Running:
    """One site: sums over the calls of the sequences at hand, and what the finished sequences gave."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.finished: list[dict[str, Tensor]] = []
        self.sums: dict[str, Tensor] = {}
        self.first = torch.zeros(0, dtype=torch.long)

    def add(self, call: AttentionCall, rows: int) -> None:
        self._make_room(call, rows)
        first = self.first - call.first_key
        held = bool((first >= 0).all())
        span = slice(call.first_key, call.first_key + call.keys)
        for block in torch.arange(call.queries, device=call.query.device).split(rows):
            visible = _counted_pairs(call, block)
            weights = call.weights(block) * visible
            self.sums["received"][..., span] += weights.sum(2)
            self.sums["seen"][..., span] += visible.sum(2)
            self.sums["mass"] += weights.sum((2, 3))
            self.sums["rows"] += visible.any(-1).sum(2)
            if held:
                self._add_first(call, block, visible, weights, first)
        if held:
            self._read_keys(call, first, self.sums["seen"][..., span])

    def _add_first(self, call: AttentionCall, block: Tensor, visible: Tensor, weights: Tensor, first: Tensor) -> None:
        """What the rows of a block do with the first key, which stands at index `first` of the call's keys."""
        positions = block + call.offset
        index = first[:, None, None, None].expand(*weights.shape[:3], 1)
        sees_first = visible.expand_as(weights).gather(3, index)[..., 0] & (positions != first[:, None, None])
        self.sums["first_mass"] += (weights.gather(3, index)[..., 0] * sees_first).sum(2)
        self.sums["first_rows"] += sees_first.sum(2)
        parts, counted = _score_parts(call.query[:, :, block], call.key, visible, first, positions)
        self.sums["counted"] += counted.sum(-1)
        for name, part in parts.items():
            self.sums[name] += part.sum(-1)

    def finish(self) -> None:
        """Turns the sums of the sequences at hand into their statistics."""
        if not self.sums:
            return
        s = self.sums
        alpha = alpha_from_received(s["received"], s["seen"])
        self.finished.append(
            {
                "alpha": _from_first(alpha, self.first, torch.nan),
                "seen": _from_first(s["seen"], self.first, 0.0),
                "mass": s["mass"] / s["rows"],
                "first_share": s["first_mass"] / s["first_rows"],
                **{name: s[name] / s["counted"] for name in PARTS},
                **{name: s[name] for name in ("key_ratio", "value_ratio", "key_cosine")},
            }
        )
        self.sums = {}

    def result(self) -> SiteSinks:
        self.finish()
        longest = max(f["alpha"].shape[-1] for f in self.finished)

        def joined(name: str, fill: float | None = None) -> Tensor:
            parts = [f[name] for f in self.finished]
            if fill is not None:
                parts = [nn.functional.pad(p, (0, longest - p.shape[-1]), value=fill) for p in parts]
            return torch.cat(parts).cpu()

        return SiteSinks(
            site=self.site,
            alpha=joined("alpha", torch.nan),
            seen=joined("seen", 0.0),
            first_share=joined("first_share"),
            mass=joined("mass"),
            key_ratio=joined("key_ratio"),
            value_ratio=joined("value_ratio"),
            key_cosine=joined("key_cosine"),
            decomposition=Decomposition(**{name: joined(name) for name in PARTS}),
        )

    def _make_room(self, call: AttentionCall, rows: int) -> None:
        """Sums for the keys of this call: fresh ones, or those of the sequences that it continues."""
        batch, heads, device = call.query.shape[0], call.heads, call.query.device
        width = call.first_key + call.keys
        if not self.sums:
            by_key = {name: torch.zeros(batch, heads, width, device=device) for name in ("received", "seen")}
            names = ("mass", "rows", "first_mass", "first_rows", "counted", *PARTS)
            self.sums = by_key | {name: torch.zeros(batch, heads, device=device) for name in names}
            self.first = _seen_keys(call, rows).int().argmax(-1) + call.first_key
            return
        known, _, before = self.sums["received"].shape
        if batch != known:
            raise InterceptionError(
                f"cache at {call.site.name}: got {batch} sequences in a step that continues {known}, expected the same "
                "ones. Measure in one pass with use_cache=False."
            )
        for name in ("received", "seen"):
            self.sums[name] = nn.functional.pad(self.sums[name], (0, max(width - before, 0)))

    def _read_keys(self, call: AttentionCall, first: Tensor, seen: Tensor) -> None:
        """Norm ratios and key cosine over the keys at hand; a later call of the same sequences replaces them."""
        valid = (seen > 0).any(1, keepdim=True)
        is_first = torch.arange(call.keys, device=valid.device) == first[:, None, None]
        index = first[:, None, None].expand(-1, call.key.shape[1], 1)
        self.sums["key_ratio"] = norm_ratio(call.key, is_first, valid=valid)
        self.sums["value_ratio"] = norm_ratio(call.value, is_first, valid=valid)
        self.sums["key_cosine"] = cosine_to_mean(call.key, valid=valid).gather(2, index)[..., 0]


def _counted_pairs(call: AttentionCall, block: Tensor) -> Bool[Tensor, "#batch #heads rows keys"]:
    """Which keys each row of a block sees; nothing for rows that are padding."""
    visible, padded = call.visible(block), call.padded_rows()
    return visible if padded is None else visible & ~padded[:, None, block, None]


def _seen_keys(call: AttentionCall, rows: int) -> Bool[Tensor, "batch keys"]:
    """Keys that at least one query sees: those that are not padding."""
    seen = torch.zeros(call.query.shape[0], call.keys, dtype=torch.bool, device=call.query.device)
    for block in torch.arange(call.queries, device=call.query.device).split(rows):
        seen |= _counted_pairs(call, block).any(2).any(1)
    return seen


def _from_first(x: Float[Tensor, "batch heads keys"], first: Int[Tensor, " batch"], fill: float) -> Tensor:
    """Each row shifted left so that its first token stands at 0."""
    keys = x.shape[-1]
    index = torch.arange(keys, device=x.device) + first[:, None]
    picked = x.gather(2, index.clamp(max=keys - 1)[:, None].expand_as(x))
    return picked.masked_fill((index >= keys)[:, None], fill)


@dataclass(frozen=True, kw_only=True)
class SinkMeasurement:
    """What `measure_sinks` found. `first_special` is the share of sequences whose position 0 is a special token;
    `hidden_ratio` is ‖h_1‖ / mean ‖h_t‖ of the residual stream that enters each layer (NaN where the host does not
    return it)."""

    epsilon: float
    length: int
    sequences: int
    sites: list[SiteSinks]
    rates: SinkRates
    first_special: float
    hidden_ratio: Float[Tensor, "sequences layers"]

    @property
    def supported_rates(self) -> Float[Tensor, " keys"]:
        """Sink_k^ε over keys that enough queries see (see `SUPPORT`), NaN elsewhere."""
        return sink_rate([site.supported() for site in self.sites], self.epsilon).overall

    @property
    def strongest(self) -> tuple[int, float]:
        """Position and rate of the strongest sink among the supported keys."""
        rates = self.supported_rates.nan_to_num(nan=-1.0)
        position = int(rates.argmax())
        return position, float(rates[position])

    def by_sequence(self, key: int = 0) -> Float[Tensor, " sequences"]:
        """Sink_k^ε of each sequence, the independent units of an interval."""
        layers = [
            (s.alpha[..., key] > self.epsilon).float().masked_fill(s.alpha[..., key].isnan(), torch.nan)
            for s in self.sites
        ]
        return torch.stack([layer.nanmean(1) for layer in layers]).nanmean(0)

    def summary(self) -> dict[str, Any]:
        """Plain numbers for JSON: the rates at position 0 and at the strongest key, and per layer the means over
        sequences and heads of the companion statistics."""
        position, rate = self.strongest

        def per_layer(values: Sequence[Tensor]) -> list[float]:
            return [float(v.nanmean()) for v in values]

        return {
            "epsilon": self.epsilon,
            "length": self.length,
            "sequences": self.sequences,
            "first_special": self.first_special,
            "sink_rate_first": float(self.rates.overall[0]),
            "strongest_position": position,
            "strongest_rate": rate,
            "layers": [site.site.layer for site in self.sites],
            "sink_rate_first_by_layer": self.rates.by_layer[:, 0].tolist(),
            "alpha_first": per_layer([s.alpha[..., 0] for s in self.sites]),
            "first_token_share": per_layer([s.first_share for s in self.sites]),
            "mass": per_layer([s.mass for s in self.sites]),
            "hidden_norm_ratio": self.hidden_ratio.nanmean(0).tolist(),
            "key_norm_ratio": per_layer([s.key_ratio for s in self.sites]),
            "value_norm_ratio": per_layer([s.value_ratio for s in self.sites]),
            "key_cosine_to_mean": per_layer([s.key_cosine for s in self.sites]),
            **{name: per_layer([getattr(s.decomposition, name) for s in self.sites]) for name in PARTS},
        }


def measure_sinks(
    model: nn.Module,
    sequences: Int[Tensor, "sequences tokens"],
    *,
    epsilon: float = EPSILON,
    length: int | None = LENGTH,
    attention_mask: Bool[Tensor, "sequences tokens"] | None = None,
    special_ids: Collection[int] | None = None,
    batch: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> SinkMeasurement:
    """Runs a transformers model over token ids and measures its sinks at every self-attention site.

    Each row gives its first `length` tokens that are not padding; `length=None` takes whole rows. Nothing is added: a
    BOS token is there only if the caller put it there, and `first_special` says whether position 0 is one of
    `special_ids` (by default the bos, eos and pad ids of the model's config). `progress(done, total)` is called after
    each batch. Raises ArgumentError when a row is shorter than `length`, or longer than the model's positions."""
    _check_epsilon(epsilon)
    tokens, mask = _tokens(sequences, attention_mask, length)
    _check_positions(model, tokens.shape[1])
    observer = SinkObserver()
    hidden_ratios = []
    from headway.door import observe

    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    options = _forward_options(model)
    with observe(model, observer), torch.no_grad():
        for start in range(0, len(tokens), batch):
            ids = tokens[start : start + batch].to(device)
            given = {} if mask is None else {"attention_mask": mask[start : start + batch].long().to(device)}
            output = model(input_ids=ids, **given, **options)
            valid = None if mask is None else mask[start : start + batch]
            hidden_ratios.append(_hidden_ratio(getattr(output, "hidden_states", None), valid, len(ids)))
            if progress is not None:
                progress(min(start + batch, len(tokens)), len(tokens))
    sites = observer.result()
    first = tokens[:, 0] if mask is None else tokens.gather(1, mask.int().argmax(1, keepdim=True))[:, 0]
    special = _special_ids(model) if special_ids is None else set(special_ids)
    return SinkMeasurement(
        epsilon=epsilon,
        length=tokens.shape[1],
        sequences=len(tokens),
        sites=sites,
        rates=sink_rate([site.alpha for site in sites], epsilon),
        first_special=sum(int(token) in special for token in first) / len(tokens),
        hidden_ratio=torch.cat(hidden_ratios),
    )


def verdict(measurement: SinkMeasurement) -> str:
    """One sentence: where the sink is and how strong, or that the model has none (highest rate below 5 %)."""
    position, rate = measurement.strongest
    size = f"over {measurement.sequences} sequences of {measurement.length} tokens"
    if rate < NO_SINK:
        return (
            f"No attention sink: the highest sink rate is {rate:.1%}, at position {position}, {size} "
            f"(a sink needs {NO_SINK:.0%} of heads that give one token more than {measurement.epsilon:g} of attention)."
        )
    kind = _first_kind(measurement.first_special) if position == 0 else "not the first token"
    return (
        f"Attention sink at position {position} ({kind}): {rate:.1%} of heads give it more than "
        f"{measurement.epsilon:g} of their attention, {size}."
    )


def _first_kind(share: float) -> str:
    if share in (0.0, 1.0):
        return "a special token" if share else "an ordinary token"
    return f"a special token in {share:.0%} of sequences"


def _tokens(sequences: Tensor, attention_mask: Tensor | None, length: int | None) -> tuple[Tensor, Tensor | None]:
    """The token ids to run, and a mask only where padding is left among them."""
    if sequences.ndim != 2 or sequences.is_floating_point() or 0 in sequences.shape:
        raise ArgumentError(
            f"sequences: got {sequences.dtype} of shape {tuple(sequences.shape)}, expected token ids "
            "(sequences, tokens) with at least one of each. Tokenize the text first."
        )
    if length is not None and length < 2:
        raise ArgumentError(f"length: got {length}, expected at least 2 tokens: one to sink into and one that looks.")
    mask = None if attention_mask is None else attention_mask.bool()
    counts = torch.full((len(sequences),), sequences.shape[1]) if mask is None else mask.sum(1)
    if mask is not None:
        _check_mask(mask, sequences)
    shortest = int(counts.min())
    if length is not None and shortest < length:
        raise ArgumentError(
            f"sequences: got one of {shortest} tokens, expected at least length={length}. Use longer text, a smaller "
            "length, or length=None to measure rows as they are."
        )
    if length is None:
        return sequences, None if mask is None or bool(mask.all()) else mask
    if mask is None:
        return sequences[:, :length], None
    index = mask.int().argmax(1, keepdim=True) + torch.arange(length, device=mask.device)
    return sequences.gather(1, index), None


def _check_mask(mask: Tensor, sequences: Tensor) -> None:
    if mask.shape != sequences.shape:
        raise ArgumentError(
            f"attention_mask: got shape {tuple(mask.shape)}, expected {tuple(sequences.shape)} like sequences."
        )
    edges = mask.int().diff(dim=1, prepend=torch.zeros(len(mask), 1, dtype=torch.int, device=mask.device))
    if not bool(((edges == 1).sum(1) == 1).all()):
        raise ArgumentError(
            "attention_mask: got a row without one unbroken run of tokens, expected padding at the ends only."
        )


def _check_positions(model: nn.Module, tokens: int) -> None:
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    limit = getattr(text, "max_position_embeddings", None)
    if isinstance(limit, int) and tokens > limit:
        raise ArgumentError(
            f"length: got {tokens} tokens, expected at most the model's {limit} positions. Pass length={limit}."
        )


def _forward_options(model: nn.Module) -> dict[str, Any]:
    """The options of one plain forward that the model knows: no cache, hidden states returned."""
    parameters = inspect.signature(model.forward).parameters
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    wanted = {"use_cache": False, "output_hidden_states": True}
    return {name: value for name, value in wanted.items() if open_ended or name in parameters}


def _hidden_ratio(
    hidden: Sequence[Tensor] | None, valid: Tensor | None, count: int
) -> Float[Tensor, "sequences layers"]:
    """The ratio per layer input; the last hidden state is left out, hosts return it behind their final norm."""
    if not hidden or len(hidden) < 2:
        return torch.full((count, 1), torch.nan)
    if valid is None:
        return torch.stack([norm_ratio(h) for h in hidden[:-1]], 1).cpu()
    first = valid & (valid.int().cumsum(1) == 1)
    return torch.stack([norm_ratio(h, first, valid=valid) for h in hidden[:-1]], 1).cpu()


def _special_ids(model: nn.Module) -> set[int]:
    config = getattr(model, "config", None)
    ids: set[int] = set()
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(config, name, None)
        ids |= set(value) if isinstance(value, list | tuple) else {value} if isinstance(value, int) else set()
    return ids
