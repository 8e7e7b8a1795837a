"""A Look with planted, realistic numbers at any size, for the report and the terminal: no model runs."""

from __future__ import annotations

import base64
import re
from functools import cache
from pydoc_data.topics import topics

import numpy as np

from headway.look.result import DetailWindow, HeadMap, HeadMetric, Labels, LayerSeries, Look

HOSTILE = [
    "</script><script>window.hacked=1</script>",
    "<img src=x onerror=window.hacked=2>",
    "<!--<script>",
    "\"'`&amp;<b>bold</b>",
    "\x00\x07\x1b[31m",
    "\u2028\u2029",
    "\ud83d",
    "👩‍👩‍👧‍👦",
    "שלום",
    "\u202eevil",
    "",
    "\r\n",
    "${alert(1)}{{7*7}}{% raw %}",
]
PATTERNS = {
    "re-access": "a few keys are read by every query",
    "sequential": "the diagonal: each query reads the key one step on",
    "periodic": "diagonals that repeat with a RoPE period",
    "retrieval": "queries change too much for one shape",
}
METRICS = [
    ("sink_rate", "Sink rate", "sinks", "", "Share of inputs in which the first token receives more than 0.3."),
    ("received_first", "Mass on the first token", "sinks", "", "Mean mass that the first token receives per query."),
    ("value_drain", "Value drain", "sinks", "", "Norm of the first token's value over the mean norm of the others."),
    ("key_cosine", "Key to mean key", "sinks", "", "Cosine of the first key to the mean key."),
    ("secondary_score", "Secondary sink score", "secondary", "", "Mass on the secondary sinks per query."),
    ("secondary_share", "Secondary share", "secondary", "", "Secondary score over primary score."),
    ("query_similarity", "Query similarity", "patterns", "", "Mean cosine between queries of all pairs of steps."),
    ("query_adjacent", "Adjacent queries", "patterns", "", "Mean cosine between queries of adjacent steps."),
    ("vertical", "Vertical predictability", "patterns", "", "Cosine of a row with the row before."),
    ("diagonal", "Diagonal predictability", "patterns", "", "Cosine of a row with the row before, moved by one."),
    ("period", "Dominant period", "patterns", "tokens", "Period of the RoPE pair with most energy."),
    ("retrieval", "Retrieval score", "roles", "", "How often the head copies the needle token it reads."),
    ("previous", "Previous token", "roles", "", "Mean weight on the token one step back."),
    ("induction", "Induction score", "roles", "", "Weight on the token after the last occurrence of the current one."),
    ("streaming", "Streaming score", "roles", "", "Mass inside the sinks and the last 64 tokens."),
    ("receiver", "Receiver score", "roles", "", "Kurtosis of the received mass over sentences."),
    ("entropy", "Entropy", "roles", "nats", "Mean entropy of the rows."),
    ("distance", "Mean distance", "roles", "tokens", "Mean distance between query and key."),
    (
        "effect",
        "Effect on loss",
        "roles",
        "nats",
        "Change of the loss when the head is closed; below zero is better without.",
    ),
    ("copying", "Copying", "roles", "", "Positive share of the eigenvalues of the value-output product."),
]


def synthetic_tokens(count: int) -> list[str]:
    """`count` word-like tokens of real prose with line breaks, the first one a start token."""
    pieces = _pieces()
    repeats = count // len(pieces) + 1
    return (["<|im_start|>"] + pieces * repeats)[:count]


@cache
def _pieces() -> list[str]:
    return re.findall(r"\n+| ?\w{1,7}| ?[^\w\s]|\s", " ".join(topics.values()))


def synthetic_look(
    layers: int = 30,
    heads: int = 9,
    tokens: int = 2048,
    *,
    maps: int = 8,
    side: int = 512,
    hostile: bool = False,
    seed: int = 0,
) -> Look:
    """A Look of `layers` × `heads` heads and `tokens` tokens with `maps` head maps of at most `side` cells a side.

    Planted: layer 3, head 1 leads "retrieval" with 0.987; position 0 is a sink in every layer from 2 on; the first
    metric has intervals; "period" has NaN in layer 0; "effect" diverges. `hostile` puts markup, control and direction
    characters into every text the report shows."""
    random = np.random.default_rng(seed)
    text = synthetic_tokens(tokens)
    if hostile:
        text[1 : 1 + len(HOSTILE)] = HOSTILE[: max(0, tokens - 1)]
    kind = _kinds(random, layers, heads)
    bad = HOSTILE[0] if hostile else ""
    words = list(PATTERNS)
    metrics = [_metric(random, spec, kind, bad) for spec in METRICS]
    labels = Labels(
        name="pattern",
        label=f"Pattern{bad}",
        values=[[words[k] + bad for k in row] for row in kind],
        meaning={word + bad: meaning + bad for word, meaning in PATTERNS.items()},
    )
    secondary = [p for p in (7, tokens // 9, tokens // 3, tokens // 2, tokens - 5) if 0 < p < tokens]
    picked = [(int(i) // heads, int(i) % heads) for i in random.permutation(layers * heads)[:maps]]
    return Look(
        model={
            "name": f"SmolLM2-135M-Instruct{bad}",
            "class": "LlamaForCausalLM",
            "layers": layers,
            "heads": heads,
            "kv_heads": max(1, heads // 3),
            "head_dim": 64,
            "positions": 8192,
            "dtype": "torch.bfloat16",
            "parameters": 134_515_008,
        },
        run={
            "tokens": tokens,
            "text": f"the documentation topics of CPython{bad}",
            "rows": "all",
            "seed": seed,
            "seconds": 41.3,
            "threads": 2,
            "seconds_by_part": {"patterns": 20.1, "maps": 3.2},
            "date": "2026-11-23 22:36 UTC",
            "headway": "0.1.0",
            "torch": "2.13.0",
            "transformers": "5.23.0",
        },
        tokens=text,
        heads=metrics,
        layers=_series(random, layers),
        labels=[labels],
        received=_received(random, layers, tokens, secondary).tolist(),
        sinks={"positions": [0], "epsilon": 0.3, "sentence": f"The first token is the sink.{bad}", "sink_rate": 0.874},
        secondary=_secondary(text, layers, secondary, bad),
        patterns=_patterns(kind, layers, bad),
        roles={"retrieval": {"trials": 20, "needle_length": 24}, "induction": {"repeats": 2, "length": 64}},
        maps=[_map(random, layer, head, int(kind[layer][head]), tokens, side, secondary) for layer, head in picked],
        findings=[
            f"{int(np.sum(kind == 0))} of {layers * heads} heads give the first token more than 0.3 of their attention"
            f"; it takes 61.4 % of all attention from layer 2 on.{bad}",
            "The residual stream of the first token is 1,204 times as long as that of the others between layers 2 and "
            f"{layers - 2}.",
            f"{len(secondary)} tokens become secondary sinks in the middle layers; they take 2.7 % of attention there.",
            "11 heads are retrieval heads: they find a copied needle in more than half of the trials. The strongest is "
            "layer 3, head 1, with a score of 0.987.",
            "4 RoPE pairs carry half of the energy of the dominant channels; their periods are 9.7 to 41 tokens.",
        ],
        warnings=[
            f"Weights are bfloat16: differences below 0.004 are rounding.{bad}",
            "The text has 2,048 tokens; scores of heads that look further back are lower bounds.",
        ],
    )


def _kinds(random: np.random.Generator, layers: int, heads: int) -> np.ndarray:
    depth = np.linspace(0, 1, layers)[:, None]
    weights = np.stack([0.3 + depth + 0 * depth, 1.2 - depth, 0.35 + 0 * depth, 0.15 + 0.5 * depth], axis=-1)
    weights = weights / weights.sum(-1, keepdims=True)
    draws = random.random((layers, heads, 1))
    return (draws > np.cumsum(weights, axis=-1)[:, :, :]).sum(-1).clip(0, len(PATTERNS) - 1)


def _metric(random: np.random.Generator, spec: tuple[str, ...], kind: np.ndarray, bad: str) -> HeadMetric:
    name, label, family, unit, description = spec
    layers, heads = kind.shape
    depth = np.linspace(0, 1, layers)[:, None]
    bump = np.exp(-(((depth - random.random()) / 0.25) ** 2))
    values = random.beta(1.2, 4, (layers, heads)) * (0.3 + 0.7 * bump)
    values[kind == random.integers(len(PATTERNS))] += 0.35
    values = np.clip(values, 0, 0.97)
    low = high = None
    scale = "sequential"
    if name == "sink_rate":
        low, high = (np.clip(values + step, 0, 1).tolist() for step in (-0.02, 0.02))
    if name == "retrieval":
        values *= 0.9
        values[min(3, layers - 1), min(1, heads - 1)] = 0.987
    if name == "period":
        values = 6.283 * 10000 ** (values / 2)
        values[0] = np.nan
    if unit == "nats":
        values = 7 * values
    if name == "distance":
        values = 600 * values
    if name == "effect":
        values = random.normal(0, 0.02, (layers, heads))
        scale = "diverging"
    return HeadMetric(
        name=name,
        label=label + (bad if name == "sink_rate" else ""),
        family=family,
        unit=unit,
        description=description + bad,
        values=values.tolist(),
        low=low,
        high=high,
        scale=scale,
    )


def _series(random: np.random.Generator, layers: int) -> list[LayerSeries]:
    index = list(range(layers))
    depth = np.linspace(0, 1, layers)
    rise = 1 / (1 + np.exp(-(depth - 0.12) * 40))

    def series(name: str, label: str, chart: str, unit: str, values: np.ndarray, spread: float = 0) -> LayerSeries:
        noisy = values * (1 + 0.04 * random.standard_normal(layers))
        low, high = ((noisy * (1 + s)).tolist() if spread else None for s in (-spread, spread))
        return LayerSeries(name, label, chart, unit, index, noisy.tolist(), low, high)

    return [
        series("first", "first token", "Attention on sinks", "share", 0.05 + 0.6 * rise * (1 - 0.3 * depth**6), 0.08),
        series(
            "second", "secondary sinks", "Attention on sinks", "share", 0.03 * np.exp(-(((depth - 0.6) / 0.2) ** 2))
        ),
        series("norm_first", "first token", "Norm of the residual stream", "norm", 20 + 24000 * rise * (depth < 0.95)),
        series("norm_rest", "other tokens", "Norm of the residual stream", "norm", 18 + 60 * depth),
        series("norm_second", "secondary sinks", "Norm of the residual stream", "norm", 20 + 900 * (depth > 0.4)),
        series(
            "entropy", "mean over heads", "Entropy of attention rows", "nats", 4 - 2 * depth + np.sin(9 * depth), 0.05
        ),
        series("similarity", "all pairs", "Query similarity", "cosine", 0.4 + 0.3 * np.sin(3 * depth)),
        series("adjacent", "adjacent steps", "Query similarity", "cosine", 0.6 + 0.2 * np.sin(3 * depth)),
    ]


def _received(random: np.random.Generator, layers: int, tokens: int, secondary: list[int]) -> np.ndarray:
    visible = np.arange(tokens, 0, -1)
    base = np.exp(random.normal(0, 0.8, tokens) + random.normal(0, 0.4, (layers, tokens))) * 0.9 / (visible + 90)
    base[:, 0] = np.where(np.arange(layers) >= 2, 0.61, 0.06)
    for n, position in enumerate(secondary):
        start = min(layers - 1, 8 + 2 * n)
        base[start : start + 9, position] = 0.02 + 0.01 * n
    return base


def _secondary(text: list[str], layers: int, positions: list[int], bad: str) -> dict:
    rows = [
        {
            "position": p,
            "token": text[p],
            "start": min(layers - 1, 8 + 2 * n),
            "lifetime": 9 - n,
            "label": "secondary" + bad if n < 4 else "noise",
        }
        for n, p in enumerate(positions)
    ]
    return {
        "found": True,
        "sentence": f"{len(rows)} tokens turn along the primary sink after the layer where they are written.{bad}",
        "primary": {"position": 0, "start": 2, "end": layers - 1},
        "levels": [{"start": r["start"], "lifetime": r["lifetime"], "count": 1, "label": r["label"]} for r in rows],
        "tokens": rows,
        "stages": {"input": 0.12, "up": 0.31, "gate": 0.28, "activated": 0.55, "product": 0.93, "down": 0.994},
        "triggers": {
            "sinks": len(rows),
            "others": 812,
            "components": [
                {"component": 1, "sign": "+", "norm": 8.8, "cosine": 0.992},
                {"component": 3, "sign": "−", "norm": 11.1, "cosine": -0.994},
            ],
            f"<b>key</b>{bad}": bad or "plain",
        },
        "intervention": [{"norm": r, "score": 0.002 * r, "lifetime": round(0.06 * r)} for r in (0, 25, 50, 100, 150)],
        "score": {"primary": [0.6] * layers, "secondary": [0.01 * (n % 5) for n in range(layers)]},
        "norms": {"hidden": {"primary": [20.0 + 900 * n for n in range(layers)], "rest": [18.0] * layers}},
        "chunk_entropy": [3.1, 2.9, 2.7],
    }


def _patterns(kind: np.ndarray, layers: int, bad: str) -> dict:
    pairs = np.arange(32)
    depth = np.linspace(0, 1, layers)[:, None]
    energy = 0.02 + np.exp(-(((pairs - 6 - 14 * depth) / 3) ** 2)) + 0.6 * (pairs == 29)
    return {
        "counts": {word + bad: int(np.sum(kind == i)) for i, word in enumerate(PATTERNS)},
        "channels": {
            "layers": list(range(layers)),
            "periods": (2 * np.pi * 10000 ** (pairs / 32)).tolist(),
            "energy": (energy / energy.sum(1, keepdims=True)).tolist(),
        },
        "bounds": [
            {"bound": "vertical" + bad, "trials": 4096, "violations": 0, "tightness": 0.31},
            {"bound": "diagonal", "trials": 4096, "violations": 0, "tightness": 0.44},
        ],
    }


def _map(
    random: np.random.Generator, layer: int, head: int, kind: int, tokens: int, side: int, secondary: list[int]
) -> HeadMap:
    side = min(side, tokens)
    grid = np.arange(side) * tokens // side
    windows = []
    size = min(128, tokens)
    for row, column in {
        (0, 0),
        (tokens // 2, tokens // 2 - size // 2),
        (tokens - size, tokens - size),
        (tokens - size, 0),
    }:
        row, column = (int(np.clip(v, 0, tokens - size)) for v in (row, column))
        weights = _weights(random, row + np.arange(size), column + np.arange(size), kind, secondary)
        windows.append(DetailWindow(row, column, size, _pixels(weights)))
    weights = _weights(random, grid, grid, kind, secondary)
    return HeadMap(
        layer=layer,
        head=head,
        side=side,
        rows=tokens,
        columns=tokens,
        pixels=_pixels(weights),
        windows=sorted(windows, key=lambda w: (w.row, w.column)),
        pairs=[(q, q // 2, 0.9 - 0.05 * n) for n, q in enumerate(random.integers(2, tokens, 10).tolist())],
        keys=[(0, 0.61), *((p, 0.03 - 0.004 * n) for n, p in enumerate(secondary))],
    )


def _weights(
    random: np.random.Generator, queries: np.ndarray, keys: np.ndarray, kind: int, secondary: list[int]
) -> np.ndarray:
    gap = queries[:, None] - keys[None, :]
    near = 0.35 * np.exp(-np.maximum(gap, 0) / 40.0)
    noise = 0.02 * random.random(gap.shape) ** 4
    shape = [
        0.1 * near + np.isin(keys, secondary) * 0.2,
        0.9 * near,
        near * (0.2 + 0.8 * (np.cos(gap / 5) > 0.7)) + 0.12 * (np.cos(gap / 60) > 0.985),
        0.3 * near + 0.7 * (random.random(gap.shape) > 0.9992),
    ][kind]
    weights = shape + noise + np.where(keys == 0, 0.55, 0)
    return np.where(gap >= 0, np.clip(weights, 0, 1), 0)


def _pixels(weights: np.ndarray) -> str:
    return base64.b64encode(np.rint(255 * np.sqrt(weights)).astype(np.uint8).tobytes()).decode("ascii")
