"""What a decoding step of DuoAttention costs as the context grows: seconds and bytes at several lengths.

    bytes(t) = 2 d b Σ_layers H_kv ( r t + (1 − r) min(t, S + R) )

so behind S + R they grow r times as fast as those of a full cache.
The time of a step does too where reading keys and values is what grows. Caches are filled with random keys, a
piece at a time: a long context is not read in reasonable time on a CPU, and a step costs the same.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from headway.door import use
from headway.evidence.claims import Claim, PaperValue
from headway.evidence.criteria import all_of, at_most, equals
from headway.methods.long_context.duo_attention import DuoAttention
from headway.statistics import Measurement, bootstrap_ratio

#: A decoder whose step is mostly attention at long contexts.
LAYERS, HEADS, KV_HEADS, DIM = 4, 16, 8, 64
#: Room behind the filled tokens, for the steps that are run there.
RESERVE = 4096
PIECE = 1024
#: Shares of retrieval heads whose steps are timed beside those of a full cache, and how far a slope may be from r.
SHARES, SLOPE_ERROR = (0.25, 0.5), 0.1

DECODE_CRITERIA = {
    "decode-bytes": at_most(0, minimum_n=2, label="bytes off r times the growth of a full cache"),
    "decode-time": all_of(
        equals(
            0.25, SLOPE_ERROR, by="value", minimum_n=5, label="slope of time at r = 0.25, over that of a full cache"
        ),
        equals(0.5, SLOPE_ERROR, of="half", by="value", minimum_n=5, label="slope at r = 0.5, over the same"),
    ),
}


def decoder() -> Any:
    """A random decoder with grouped queries."""
    import transformers as tf

    config = tf.LlamaConfig(
        hidden_size=HEADS * DIM, intermediate_size=1024, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS, head_dim=DIM, vocab_size=512, max_position_embeddings=1 << 17,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return tf.LlamaForCausalLM(config).eval()


def policy(share: float, tokens: int) -> DuoAttention:
    """Every layer with the same share of retrieval heads, and room made beforehand."""
    gates = (torch.arange(KV_HEADS) < round(share * KV_HEADS)).float().expand(LAYERS, -1)
    return DuoAttention(gates=gates, threshold=0.5, reserve=tokens + RESERVE)


def fill(cache: Any, tokens: int, generator: torch.Generator) -> None:
    """So many more random tokens in every layer of a cache; a multiple of `PIECE`."""
    for layer in cache.layers:
        for _ in range(0, tokens, PIECE):
            key, value = (torch.randn(1, KV_HEADS, PIECE, DIM, generator=generator) for _ in range(2))
            layer.update(key, value)
            layer.learn_window(None)
            layer.fold()


@torch.no_grad()
def run_steps(model: Any, cache: Any, steps: int) -> None:
    """So many decoding steps on a cache."""
    ids = torch.tensor([[7]])
    for _ in range(steps):
        model(input_ids=ids, past_key_values=cache, use_cache=True)


def decode_costs(lengths: Sequence[int], shares: Sequence[float], rounds: int, steps: int) -> list[dict[str, Any]]:
    """For every share and length the bytes that are stored and, by round, the seconds of `steps` decoding steps.

    At every length the shares take turns within a round, so that a drift of the machine hits all of them."""
    hosts = {share: decoder() for share in shares}
    methods = {share: policy(share, max(lengths)) for share in shares}
    caches = {share: methods[share].make_cache(hosts[share]) for share in shares}
    found: list[dict[str, Any]] = []
    filled = 0
    for length in lengths:
        rows: dict[float, dict[str, Any]] = {}
        for share, cache in caches.items():
            fill(cache, length - filled, torch.Generator().manual_seed(length))
            rows[share] = {"share": share, "tokens": cache.get_seq_length(), "stored": cache.stored_bytes(),
                           "seconds": []}  # fmt: skip
        for turn in range(rounds + 1):
            for share in shares:
                with use(hosts[share], methods[share]):
                    start = time.perf_counter()
                    run_steps(hosts[share], caches[share], steps)
                    spent = time.perf_counter() - start
                if turn:
                    rows[share]["seconds"].append(spent)
        found += rows.values()
        filled = length
    return found


def decode_claims(found: dict[str, Any], generator: np.random.Generator) -> list[Claim]:
    """How bytes and time grow with the context: bytes from length to length, time by least squares in every round."""
    rows = {share: [row for row in found["rows"] if row["share"] == share] for share in (*SHARES, 1.0)}
    tokens = [row["tokens"] for row in rows[1.0]]
    stored = {share: np.array([row["stored"] for row in own]) for share, own in rows.items()}
    growth = {share: np.diff(values) for share, values in stored.items()}
    off = [float(x) for share in SHARES for x in np.abs(growth[share] - share * growth[1.0])]
    seconds = {
        share: np.array([_slope(tokens, round_) for round_ in zip(*(row["seconds"] for row in own), strict=True)])
        for share, own in rows.items()
    }
    ratios = {
        share: bootstrap_ratio(seconds[share], seconds[1.0], paired=True, generator=generator) for share in SHARES
    }
    paper = PaperValue("2.18× (25 % retrieval heads), 1.50× (50 %)", "latency of decoding on a GPU", "abstract")
    return [
        Claim(
            id="decode-bytes",
            statement="Behind the window, the cache grows r times as fast as a full one, to the byte.",
            paper=PaperValue("memory r + (1 − r)(S + R)/t of a full cache", where="section 2.3"),
            measured=Measurement(max(off), n=len(off), unit="bytes"),
            criterion=DECODE_CRITERIA["decode-bytes"],
            details={"tokens": tokens, "stored": {str(share): values for share, values in stored.items()}},
        ),
        Claim(
            id="decode-time",
            statement="The time of a decoding step grows with the context r times as fast as with all heads whole.",
            paper=paper,
            measured=ratios[0.25],
            criterion=DECODE_CRITERIA["decode-time"],
            others={"half": ratios[0.5]},
            notes=f"Slopes over {min(tokens):,} to {max(tokens):,} tokens of a random decoder on {found['threads']} "
            f"threads, {found['steps']} steps a round; the arms take turns. A slope leaves out what a step costs at "
            "any length. The paper's numbers are ratios of whole steps.",
            details={"rows": found["rows"]},
        ),
    ]


def _slope(tokens: Sequence[float], values: Sequence[float]) -> float:
    return float(np.polyfit(tokens, values, 1)[0])
