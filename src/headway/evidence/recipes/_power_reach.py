"""How far the mask of PowerAttention reaches: hops on its graph, gradients of random transformers, and what it reads.

Hops and gradients share nothing. A token influences the last output exactly when the graph lets it through the layers,
which is looked at with single tokens as blocks, and at the paper's 32,768 tokens in blocks of 256.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from headway.door import use
from headway.door.call import AttentionCall
from headway.door.selection import BlockMask, Blocks, Selection, Window
from headway.door.stages import Selector
from headway.errors import ArgumentError
from headway.evidence.claims import Claim, PaperValue
from headway.evidence.criteria import Criterion
from headway.evidence.recipe import Context
from headway.methods.long_context.power_attention import (
    PATTERNS,
    PowerAttention,
    hops_to_all,
    key_blocks,
    pattern_mask,
    power_mask,
    reach,
    reached,
)
from headway.statistics import Measurement

#: Layers after which the last of so many blocks reaches all, with 5 local blocks and a sink; beside a window of 10.
HOPS = {64: (5, 7), 128: (6, 14), 256: (7, 29), 512: (8, 57)}
#: Blocks reached after 1, 2, … layers at 128 blocks.
COVERAGE = {"power": [10, 35, 75, 110, 126, 128], "window": [11, 20, 29, 38, 47, 56]}


@dataclass(frozen=True, kw_only=True)
class Pattern(Selector):
    """Any pattern of `pattern_mask` as a selector for whole texts, to stand beside the mask."""

    pattern: str
    degree: int
    block: int = 1

    def select(self, call: AttentionCall) -> Selection:
        if call.queries != call.keys:
            raise ArgumentError(f"queries: got {call.queries} on {call.keys} keys, expected a whole text at once.")
        count = -(-call.keys // self.block)
        blocks = pattern_mask(self.pattern, count, degree=self.degree)[None, None]
        return Blocks(BlockMask(blocks.to(call.query.device), call.queries, call.keys, self.block, self.block))


@dataclass(frozen=True, kw_only=True)
class SinkWindow(Selector):
    """The first `sinks` keys and the last `window`, in prefill and decoding."""

    sinks: int
    window: int

    def select(self, call: AttentionCall) -> Selection:
        return Window(self.sinks, self.window)


def measure_hops(context: Context) -> dict[str, Any]:
    """Hop numbers of both masks against the exact ones, and hops of every distance with power edges alone."""
    sizes = context.choose(smoke=(64, 128), small=tuple(HOPS), full=tuple(HOPS))
    found = {
        size: (hops_to_all(power_mask(size)), hops_to_all(pattern_mask("window", size, degree=10))) for size in sizes
    }
    furthest = context.choose(smoke=64, small=512, full=2048)
    alone = reached(power_mask(furthest, window=1, sink=0), furthest.bit_length())
    first = torch.stack(alone).int().argmax(0).flip(0) + 1
    wrong = sum(int(first[d]) != d.bit_count() for d in range(1, furthest))
    others = {}
    for name in PATTERNS[1:]:
        mask = pattern_mask(name, 128, degree=10)
        others[name] = {"hops": hops_to_all(mask), "reach": reach(mask, 6)}
    return {
        "hops": found,
        "coverage": {"power": reach(power_mask(128), 6), "window": others["window"]["reach"]},
        "wrong distances": wrong,
        "distances": furthest - 1,
        "others": others,
    }


def measure_gradients(context: Context) -> dict[str, Any]:
    """Whether ∂ last output / ∂ embedding of each token is zero exactly where the mask says so, for random models."""
    seeds, tokens = context.choose(smoke=(1, 40), small=(4, 128), full=(20, 256))
    wrong, seen = 0, 0
    reachable: dict[str, list[float]] = {"power": [], "window": []}
    for seed in range(seeds):
        for layers in (1, 2, 3):
            model = tiny_lm(seed_of(context, f"reach {seed} {layers}"), vocabulary=64, tokens=tokens, layers=layers)
            ids = torch.randint(64, (1, tokens), generator=context.torch_generator(f"reach {seed}"))
            for name, method, mask in (
                ("power", PowerAttention(block=1, window=2, sink=1, trained=True), power_mask(tokens, window=2)),
                ("window", Pattern(pattern="window", degree=6), pattern_mask("window", tokens, degree=6)),
            ):
                moved = influence(model, method, ids)
                expected = reached(mask, layers)[-1]
                wrong += int((moved != expected).sum())
                seen += tokens
                reachable[name].append(float(expected.double().mean()))
    return {"wrong": wrong, "tokens": seen, "reachable": {k: float(np.mean(v)) for k, v in reachable.items()}}


def measure_long_reach(context: Context) -> dict[str, Any]:
    """The same at the paper's length and blocks: a random model of as many layers as reach everything, and one less."""
    blocks, block = context.choose(smoke=(16, 8), small=(128, 256), full=(512, 256))
    layers = hops_to_all(power_mask(blocks)) or 0
    tokens = blocks * block
    ids = torch.randint(64, (1, tokens), generator=context.torch_generator("long reach"))
    window = Pattern(pattern="window", degree=10, block=block)
    power = PowerAttention(block=block, trained=True)
    arms = [
        ("power", layers, power, power_mask(blocks)),
        ("power, one layer less", layers - 1, power, power_mask(blocks)),
        ("window", layers, window, pattern_mask("window", blocks, degree=10)),
    ]
    wrong, found = 0, dict[str, Any]()
    for name, depth, method, mask in context.track(arms, "gradients at full length"):
        model = tiny_lm(seed_of(context, f"long {name}"), vocabulary=64, tokens=tokens, layers=depth, width=16, heads=1)
        moved = influence(model, method, ids)
        expected = reached(mask, depth)[-1]
        wrong += int((moved != expected.repeat_interleave(block)).sum())
        found[name] = {"layers": depth, "blocks": int(expected.sum()), "tokens": float(moved.double().mean())}
    return {"wrong": wrong, "seen": tokens * len(arms), "blocks": blocks, "block": block, "arms": found}


def influence(model: nn.Module, method: Selector, ids: Tensor) -> Tensor:
    """Which embeddings have any influence on the last row of logits."""
    host = cast(Any, model)
    embedded = host.get_input_embeddings()(ids).detach().requires_grad_()
    with use(model, method, selftest=False):
        host(inputs_embeds=embedded, use_cache=False).logits[0, -1].square().sum().backward()
    return embedded.grad[0].abs().sum(-1) > 0


def tiny_lm(seed: int, *, vocabulary: int, tokens: int, layers: int, width: int = 64, heads: int = 4) -> nn.Module:
    """A Llama with random weights of its own initialiser."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LlamaConfig(
            hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers, num_attention_heads=heads,
            num_key_value_heads=heads, vocab_size=vocabulary, max_position_embeddings=2 * tokens, bos_token_id=None,
            eos_token_id=None,
        )  # fmt: skip
        return LlamaForCausalLM(config)


def measure_cost(context: Context) -> dict[str, Any]:
    """Pairs of blocks that the mask reads, counted row by row, and how they grow when the text doubles."""
    largest = context.choose(smoke=10, small=13, full=15)
    sizes = [2**k for k in range(6, largest + 1)]
    pairs, total, done = {}, 0, 0
    for size in sizes:
        total += sum(len(key_blocks(block)) for block in range(done, size))
        done = size
        pairs[size] = total
    return {"pairs": pairs, "dense": {size: size * (size + 1) // 2 for size in sizes}}


def seed_of(context: Context, name: str) -> int:
    return int(context.generator(name).integers(2**31))


def hops_claim(found: dict[str, Any], criterion: Criterion) -> Claim:
    numbers = [(found["hops"][str(size)], list(HOPS[int(size)])) for size in found["hops"]]
    wrong = sum(a != b for got, want in numbers for a, b in zip(got, want, strict=True))
    wrong += sum(a != b for name, want in COVERAGE.items() for a, b in zip(found["coverage"][name], want, strict=True))
    return Claim(
        id="hops",
        statement="About log₂ n layers of the mask reach every earlier block; a window of equal degree needs n / 9.",
        paper=PaperValue("at most 5 layers against 14", "128 blocks, equal sparsity", "table as given by a digest"),
        measured=Measurement(wrong, n=2 * len(numbers) + 12, unit="numbers"),
        criterion=criterion,
        notes="Against hop numbers counted from the mask's formula beforehand: 5, 6, 7, 8 layers at 64 to 512 blocks, "
        "7, 14, 29, 57 for the window. At 128 blocks five layers reach 126 of 128.",
        details={"hops": found["hops"], "reach at 128": found["coverage"], "other patterns": found["others"]},
    )


def popcount_claim(found: dict[str, Any], criterion: Criterion) -> Claim:
    return Claim(
        id="popcount",
        statement="With power-of-two edges alone, i reaches j in as many hops as i − j has 1-bits, so within log₂ n.",
        paper=PaperValue("within log₂ n hops, out-degree below log₂ n", where="theorem B.1"),
        measured=Measurement(found["wrong distances"], n=found["distances"], unit="distances"),
        criterion=criterion,
    )


def reach_claim(found: dict[str, Any], criterion: Criterion) -> Claim:
    return Claim(
        id="reach",
        statement="A token influences the last output exactly when the mask lets it through the layers.",
        paper=PaperValue("receptive field = reachable set", where="section 3"),
        measured=Measurement(found["wrong"], n=found["tokens"], unit="tokens"),
        criterion=criterion,
        notes="Random transformers of one to three layers; influence is a gradient that is not zero. A window of equal "
        "kind stands in the same count.",
        details={"share that is reachable": found["reachable"]},
    )


def long_reach_claim(found: dict[str, Any], criterion: Criterion) -> Claim:
    arms = found["arms"]
    tokens = found["blocks"] * found["block"]

    def share(name: str) -> Measurement:
        return Measurement(arms[name]["tokens"], n=tokens)

    return Claim(
        id="long-reach",
        statement="At the paper's 32k tokens the layers that the graph asks for carry every token to the last output, "
        "by gradients too; one layer less does not, and a window of equal degree reaches less than half.",
        paper=PaperValue(
            "at most 5 layers against 14", "128 blocks of 256, equal sparsity", "table as given by a digest"
        ),
        measured=Measurement(found["wrong"], n=found["seen"], unit="tokens"),
        criterion=criterion,
        others={"power": share("power"), "less": share("power, one layer less"), "window": share("window")},
        notes=f"{tokens:,} tokens in {found['blocks']} blocks of {found['block']}, random weights. The digest's five "
        "layers reach 126 of 128 blocks by the mask's formula.",
        details=arms,
    )


def growth(pairs: dict[str, int]) -> dict[int, float]:
    """How much more is read when a text of so many blocks doubles."""
    sizes = sorted(int(size) for size in pairs)
    return {size: pairs[str(2 * size)] / pairs[str(size)] for size in sizes[:-1]}


def cost_claim(found: dict[str, Any], criterion: Criterion) -> Claim:
    grown = growth(found["pairs"])
    expected = {size: 2 * (math.log2(2 * size) + 6) / (math.log2(size) + 6) for size in grown}
    errors = [abs(grown[size] / expected[size] - 1) for size in grown]
    return Claim(
        id="cost",
        statement="What the mask reads grows as n log n: twice the text, a little more than twice the pairs.",
        paper=PaperValue("O(n log n) per layer", where="section 3"),
        measured=Measurement(max(errors), n=len(errors)),
        baseline=Measurement(max(growth(found["dense"]).values()), n=len(errors), unit="× for dense"),
        criterion=criterion,
        notes="Against 2 (log₂ 2n + 6) / (log₂ n + 6), which follows from the mask. Pairs are counted; the claim "
        "on growth of time is measured beside it.",
        details={"growth": grown, "expected": expected, "pairs": found["pairs"]},
    )
