"""PowerAttention: exact reach, gradients, recall after a short fine-tune, an untrained real model, and cost.

Reach is checked two ways that share nothing: hop numbers on the mask, and gradients of a random transformer under it.
Recall is the pass-key task on a small language model trained here: trained dense, then fine-tuned for a few steps with
the mask or with a window of the same out-degree, from the same weights on the same data. A pass-key further back than
layers · (window − 1) tokens is out of a window's reach whatever it learns.

Paper: PowerAttention, arXiv 2503.03588. Its models (Qwen2-7B, 32k tokens and more) need a GPU; times are a benchmark.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
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
from headway.evidence.criteria import all_of, at_least, at_most, interval_excludes
from headway.evidence.recipe import Context, Recipe
from headway.methods.long_context.power_attention import (
    PATTERNS,
    PowerAttention,
    fine_tune,
    hops_to_all,
    key_blocks,
    pattern_mask,
    power_mask,
    reach,
    reached,
)
from headway.statistics import Measurement, bootstrap, bootstrap_difference

#: Layers after which the last of so many blocks reaches all, with 5 local blocks and a sink; beside a window of 10.
HOPS = {64: (5, 7), 128: (6, 14), 256: (7, 29), 512: (8, 57)}
#: Blocks reached after 1, 2, … layers at 128 blocks.
COVERAGE = {"power": [10, 35, 75, 110, 126, 128], "window": [11, 20, 29, 38, 47, 56]}

#: The toy: tokens, layers, values of a pass-key, tokens that mean nothing.
TOKENS, LAYERS, VALUES, NOISE = 48, 4, 8, 24
TOY = PowerAttention(block=1, window=5, sink=1, trained=True)
#: Keys that the last row of the mask reads beside the sink: the window of equal out-degree.
DEGREE = len(key_blocks(TOKENS - 1)) - 1
#: A window of so many keys hands nothing on beyond this distance.
WINDOW_REACH = LAYERS * (DEGREE - 1)
CHANCE = 1 / VALUES
#: On the real model: 16 tokens a block, so that 640 tokens have 40 blocks.
REAL = PowerAttention(block=16, window=5, sink=1)

CRITERIA = {
    "hops": at_most(0, minimum_n=8, label="numbers that differ"),
    "popcount": at_most(0, minimum_n=255, label="distances that take another number of hops"),
    "reach": at_most(0, minimum_n=100, label="tokens on the wrong side"),
    "recall": all_of(
        at_least(0.9, label="recall beyond a window's reach"),
        at_most(CHANCE + 0.15, of="baseline", label="recall of the window"),
        interval_excludes(0, of="difference", side="above", minimum_n=3),
        requires=at_least(0.9, of="dense", label="recall of the dense model"),
    ),
    "fine-tuning": interval_excludes(
        0, side="above", minimum_n=3, requires=at_least(0.9, of="dense", label="recall of the dense model")
    ),
    "probe": all_of(
        at_least(0.9, label="probe of the last layer"),
        interval_excludes(0, of="difference", side="above", minimum_n=3),
    ),
    "text": at_most(0.05, minimum_n=3, label="nats lost to a window"),
    "untrained-perplexity": interval_excludes(0, side="above", minimum_n=10),
    "untrained-needle": interval_excludes(0, side="above", minimum_n=6),
    "cost": at_most(0.05, minimum_n=4, label="relative error of the growth"),
}


def run(context: Context) -> list[Claim]:
    hops = context.stage("hops", lambda: _hops(context))
    toys = [context.stage(f"recall-{seed}", partial(_recall, context, seed)) for seed in _toy_seeds(context)]
    real = context.stage("real", lambda: _real(context))
    return [
        _hops_claim(hops),
        _popcount_claim(hops),
        _reach_claim(context.stage("reach", lambda: _gradients(context))),
        _recall_claim(context, toys),
        _tuning_claim(context, toys),
        _probe_claim(context, toys),
        _text_claim(context, context.stage("text", lambda: _text(context))),
        _perplexity_claim(context, real),
        _needle_claim(context, real),
        _cost_claim(context.stage("cost", lambda: _cost(context))),
    ]


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


def _hops(context: Context) -> dict[str, Any]:
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


def _gradients(context: Context) -> dict[str, Any]:
    """Whether ∂ last output / ∂ embedding of each token is zero exactly where the mask says so, for random models."""
    seeds, tokens = context.choose(smoke=(1, 40), small=(4, 128), full=(20, 256))
    wrong, seen = 0, 0
    reachable: dict[str, list[float]] = {"power": [], "window": []}
    for seed in range(seeds):
        for layers in (1, 2, 3):
            model = tiny_lm(_seed(context, f"reach {seed} {layers}"), vocabulary=64, tokens=tokens, layers=layers)
            ids = torch.randint(64, (1, tokens), generator=context.torch_generator(f"reach {seed}"))
            for name, method, mask in (
                ("power", PowerAttention(block=1, window=2, sink=1, trained=True), power_mask(tokens, window=2)),
                ("window", Pattern(pattern="window", degree=6), pattern_mask("window", tokens, degree=6)),
            ):
                moved = _moved(model, method, ids)
                expected = reached(mask, layers)[-1]
                wrong += int((moved != expected).sum())
                seen += tokens
                reachable[name].append(float(expected.double().mean()))
    return {"wrong": wrong, "tokens": seen, "reachable": {k: float(np.mean(v)) for k, v in reachable.items()}}


def _moved(model: nn.Module, method: Selector, ids: Tensor) -> Tensor:
    """Which embeddings have any influence on the last row of logits."""
    host = cast(Any, model)
    embedded = host.get_input_embeddings()(ids).detach().requires_grad_()
    with use(model, method, selftest=False):
        host(inputs_embeds=embedded, use_cache=False).logits[0, -1].square().sum().backward()
    return embedded.grad[0].abs().sum(-1) > 0


def tiny_lm(seed: int, *, vocabulary: int, tokens: int, layers: int, width: int = 64) -> nn.Module:
    """A Llama with random weights of its own initialiser."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LlamaConfig(
            hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers, num_attention_heads=4,
            num_key_value_heads=4, vocab_size=vocabulary, max_position_embeddings=2 * tokens, bos_token_id=None,
            eos_token_id=None,
        )  # fmt: skip
        return LlamaForCausalLM(config)


def passkeys(generator: torch.Generator, batch: int, *, tokens: int = TOKENS) -> dict[str, Tensor]:
    """Noise with one pass-key at a random place (never the first, which every mask sees). Every later position has to
    say which it was: many supervised tokens a text, at every distance."""
    ids = torch.randint(VALUES, VALUES + NOISE, (batch, tokens), generator=generator)
    at = torch.randint(1, tokens - 1, (batch,), generator=generator)
    value = torch.randint(0, VALUES, (batch,), generator=generator)
    ids[torch.arange(batch), at] = value
    labels = value[:, None].expand(-1, tokens).masked_fill(torch.arange(tokens) <= at[:, None], -100)
    return {"input_ids": ids, "labels": labels}


def _stream(generator: torch.Generator, batch: int) -> Iterator[dict[str, Tensor]]:
    while True:
        yield passkeys(generator, batch)


def _toy_seeds(context: Context) -> list[int]:
    return list(range(context.choose(smoke=1, small=5, full=10)))


def _recall(context: Context, seed: int) -> dict[str, Any]:
    """One model: trained dense, then fine-tuned with each mask from the same weights on the same texts."""
    dense_steps, steps, batch, texts = context.choose(
        smoke=(4, 3, 4, 16), small=(110, 100, 24, 192), full=(600, 400, 64, 2048)
    )
    others = context.choose(smoke=("window",), small=("window",), full=("window", "dilated", "stride", "segments"))
    model = tiny_lm(_seed(context, f"toy {seed}"), vocabulary=VALUES + NOISE, tokens=TOKENS, layers=LAYERS)
    data = context.torch_generator(f"dense data {seed}")
    fine_tune(model, _stream(data, batch), None, steps=dense_steps, learning_rate=5e-3)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    test = passkeys(context.torch_generator(f"test {seed}"), texts)
    probes = [passkeys(context.torch_generator(f"probe {part} {seed}"), texts) for part in ("fit", "test")]
    found: dict[str, Any] = {"seed": seed, "dense": _accuracy(model, None, test)}
    methods: dict[str, Selector] = {"power": TOY, **{n: Pattern(pattern=n, degree=DEGREE) for n in others}}
    for name, method in methods.items():
        model.load_state_dict(start)
        before = _accuracy(model, method, test)
        tuned = fine_tune(
            model, _stream(context.torch_generator(f"tune {seed}"), batch), method, steps=steps, learning_rate=3e-3
        )
        found[name] = {
            "before": before,
            "after": _accuracy(model, method, test),
            "probe": _probe(model, method, *probes),
            "loss": tuned.losses[-1],
        }
    return found


@torch.no_grad()
def _accuracy(model: nn.Module, method: Selector | None, test: dict[str, Tensor]) -> dict[str, float]:
    """Share of positions that name the pass-key, by its distance."""
    with _scope(model, method):
        said = cast(Any, model)(input_ids=test["input_ids"], use_cache=False).logits.argmax(-1)
    value = test["labels"][:, -1:]
    at = (test["labels"] == -100).sum(1) - 1
    distance = torch.arange(said.shape[1]) - at[:, None]
    right = said == value
    bins = {
        "near": (distance >= 0) & (distance < DEGREE),
        "between": (distance >= DEGREE) & (distance <= WINDOW_REACH),
        "far": distance > WINDOW_REACH,
    }
    return {name: float(right[inside].double().mean()) for name, inside in bins.items()}


@torch.no_grad()
def _probe(
    model: nn.Module, method: Selector, fit: dict[str, Tensor], test: dict[str, Tensor]
) -> dict[str, list[float]]:
    """Per layer: how often a linear classifier of the last token's hidden state names a pass-key that stood beyond a
    window's reach. Least squares on one-hot targets with a small ridge, in place of a logistic classifier."""
    states = []
    for part in (fit, test):
        with _scope(model, method):
            output = cast(Any, model)(input_ids=part["input_ids"], use_cache=False, output_hidden_states=True)
        states.append([layer[:, -1].double() for layer in output.hidden_states])
    ends = [(part["labels"] == -100).sum(1) - 1 for part in (fit, test)]
    far = TOKENS - 1 - ends[1] > WINDOW_REACH
    targets = torch.nn.functional.one_hot(fit["labels"][:, -1], VALUES).double()
    found = []
    for fitted, tested in zip(*states, strict=True):
        x, y = (torch.cat([s, s.new_ones(s.shape[0], 1)], 1) for s in (fitted, tested))
        weights = torch.linalg.solve(x.T @ x + 1e-3 * torch.eye(x.shape[1], dtype=x.dtype), x.T @ targets)
        right = (y @ weights).argmax(-1) == test["labels"][:, -1]
        found.append(float(right[far].double().mean()))
    return {"far": found}


def _scope(model: nn.Module, method: Selector | None) -> Any:
    return nullcontext() if method is None else use(model, method, selftest=False)


def _text(context: Context) -> list[dict[str, float]]:
    """Byte language models trained on natural text from scratch, with the mask and with a window of equal degree."""
    from headway.hosts import default_text

    seeds, steps, tokens, batch = context.choose(smoke=(1, 2, 64, 2), small=(3, 40, 128, 16), full=(10, 2000, 512, 32))
    held_out = context.choose(smoke=4, small=32, full=256)
    data = torch.frombuffer(bytearray(default_text().text.encode()), dtype=torch.uint8).long()
    edge = data.numel() * 9 // 10
    block, window = 4, 3
    degree = len(key_blocks(tokens // block - 1, window=window)) - 1
    methods: dict[str, Selector] = {
        "power": PowerAttention(block=block, window=window, sink=1, trained=True),
        "window": SinkWindow(sinks=block, window=degree * block),
    }
    found = []
    for seed in context.track(range(seeds), "byte models"):
        test = _pieces(data[edge:], held_out, tokens, context.torch_generator(f"text test {seed}"))
        losses = {}
        for name, method in methods.items():
            model = tiny_lm(_seed(context, f"text {seed}"), vocabulary=256, tokens=tokens, layers=LAYERS)
            generator = context.torch_generator(f"text data {seed}")
            batches = (_pieces(data[:edge], batch, tokens, generator) for _ in range(steps))
            fine_tune(model, batches, method, steps=steps, learning_rate=5e-3)
            with torch.no_grad(), use(model, method, selftest=False):
                losses[name] = float(cast(Any, model)(input_ids=test, labels=test, use_cache=False).loss)
        found.append({"seed": seed, **losses})
    return found


def _pieces(data: Tensor, count: int, tokens: int, generator: torch.Generator) -> Tensor:
    starts = torch.randint(0, data.numel() - tokens, (count,), generator=generator)
    return data[starts[:, None] + torch.arange(tokens)]


def _real(context: Context) -> dict[str, Any]:
    """A trained model with the mask put in as it is: perplexity of text, and how surely it gives a planted value."""
    from headway.hosts import default_text
    from headway.tasks.needle import needle_grid, planted_score
    from headway.tasks.perplexity import perplexity

    model, tokenizer, ids = _host(context)
    degree = len(key_blocks(-(-ids[0].shape[1] // REAL.block) - 1)) - 1
    methods: dict[str, Selector | None] = {
        "dense": None,
        "power": REAL,
        "window": SinkWindow(sinks=REAL.block, window=degree * REAL.block),
    }
    blocks: dict[str, list[float]] = {name: [] for name in methods}
    density: dict[str, float] = {}
    for name, method in methods.items():
        for text in context.track(ids, f"perplexity, {name}"):
            scope = nullcontext() if method is None else use(model, method)
            with scope as handle:
                found = perplexity(model, text, chunk=text.shape[1])
            if handle is not None:
                density[name] = float(np.mean([row["density"] for row in handle.report()]))
            blocks[name] += found.block_means(32).tolist()
    needles: dict[str, list[float]] = {name: [] for name in methods}
    if tokenizer is None:
        return {"model": "tiny", "blocks": blocks, "density": density, "needles": needles, "depths": []}
    length, depths, repeats = context.choose(small=(640, (10, 30, 50), 2), full=(4096, tuple(range(0, 70, 10)), 5))
    samples = list(needle_grid(tokenizer, [length], depths=depths, text=default_text().text, repeats=repeats))
    for name, method in methods.items():
        with nullcontext() if method is None else use(model, method):
            for sample in context.track(samples, f"needles, {name}"):
                needles[name].append(planted_score(model, tokenizer, sample, question_aware=True).mean_nll)
    depths_of = [sample.meta["depth"] for sample in samples]
    return {"model": "smollm2", "blocks": blocks, "density": density, "needles": needles, "depths": depths_of}


def _host(context: Context) -> tuple[nn.Module, Any, list[Tensor]]:
    """The model, its tokenizer and texts; a tiny random one, without a tokenizer, to see that the measurement runs."""
    texts, tokens = context.choose(smoke=(1, 192), small=(2, 640), full=(8, 4096))
    if context.size == "smoke":
        model = tiny_lm(0, vocabulary=64, tokens=tokens, layers=2)
        ids = torch.randint(64, (texts, tokens), generator=context.torch_generator("tiny text"))
        return model.eval(), None, list(ids[:, None])
    from headway.hosts import default_text, load, tokenize

    model, tokenizer = load("smollm2", device="cuda" if context.size == "full" else "cpu")
    whole = tokenize(tokenizer, default_text(), 3 * texts * tokens)
    starts = [3 * tokens * number for number in range(texts)]
    return model, tokenizer, [whole[:, start : start + tokens] for start in starts]


def _cost(context: Context) -> dict[str, Any]:
    """Pairs of blocks that the mask reads, counted row by row, and how they grow when the text doubles."""
    largest = context.choose(smoke=10, small=13, full=15)
    sizes = [2**k for k in range(6, largest + 1)]
    pairs, total, done = {}, 0, 0
    for size in sizes:
        total += sum(len(key_blocks(block)) for block in range(done, size))
        done = size
        pairs[size] = total
    return {"pairs": pairs, "dense": {size: size * (size + 1) // 2 for size in sizes}}


def _seed(context: Context, name: str) -> int:
    return int(context.generator(name).integers(2**31))


def _hops_claim(found: dict[str, Any]) -> Claim:
    numbers = [(found["hops"][str(size)], list(HOPS[int(size)])) for size in found["hops"]]
    wrong = sum(a != b for got, want in numbers for a, b in zip(got, want, strict=True))
    wrong += sum(a != b for name, want in COVERAGE.items() for a, b in zip(found["coverage"][name], want, strict=True))
    return Claim(
        id="hops",
        statement="About log₂ n layers of the mask reach every earlier block; a window of equal degree needs n / 9.",
        paper=PaperValue("at most 5 layers against 14", "128 blocks, equal sparsity", "table as given by a digest"),
        measured=Measurement(wrong, n=2 * len(numbers) + 12, unit="numbers"),
        criterion=CRITERIA["hops"],
        notes="Against hop numbers counted from the mask's formula beforehand: 5, 6, 7, 8 layers at 64 to 512 blocks, "
        "7, 14, 29, 57 for the window. At 128 blocks five layers reach 126 of 128.",
        details={"hops": found["hops"], "reach at 128": found["coverage"], "other patterns": found["others"]},
    )


def _popcount_claim(found: dict[str, Any]) -> Claim:
    return Claim(
        id="popcount",
        statement="With power-of-two edges alone, i reaches j in as many hops as i − j has 1-bits, so within log₂ n.",
        paper=PaperValue("within log₂ n hops, out-degree below log₂ n", where="theorem B.1"),
        measured=Measurement(found["wrong distances"], n=found["distances"], unit="distances"),
        criterion=CRITERIA["popcount"],
    )


def _reach_claim(found: dict[str, Any]) -> Claim:
    return Claim(
        id="reach",
        statement="A token influences the last output exactly when the mask lets it through the layers.",
        paper=PaperValue("receptive field = reachable set", where="section 3"),
        measured=Measurement(found["wrong"], n=found["tokens"], unit="tokens"),
        criterion=CRITERIA["reach"],
        notes="Random transformers of one to three layers; influence is a gradient that is not zero. A window of equal "
        "kind stands in the same count.",
        details={"share that is reachable": found["reachable"]},
    )


def _toy_values(toys: Sequence[dict[str, Any]], name: str, when: str, where: str = "far") -> list[float]:
    return [toy[name][when][where] for toy in toys]


def _dense(context: Context, toys: Sequence[dict[str, Any]]) -> Measurement:
    return bootstrap([toy["dense"]["far"] for toy in toys], generator=context.generator("dense"))


def _recall_claim(context: Context, toys: Sequence[dict[str, Any]]) -> Claim:
    random = context.generator("recall interval")
    power, window = (_toy_values(toys, name, "after") for name in ("power", "window"))
    seeds = [toy["seed"] for toy in toys]
    return Claim(
        id="recall",
        statement="After the same short fine-tune the mask recalls pass-keys that a window of equal degree cannot.",
        paper=PaperValue("5 to 40 % better than static patterns", "Qwen2-7B, pass-key and RULER", "abstract"),
        measured=bootstrap(power, generator=random, seeds=seeds),
        baseline=bootstrap(window, generator=random, seeds=seeds),
        criterion=CRITERIA["recall"],
        others={
            "difference": bootstrap_difference(power, window, paired=True, generator=random, seeds=seeds),
            "dense": _dense(context, toys),
        },
        notes=f"{TOKENS} tokens, {LAYERS} layers, {DEGREE} keys and a sink per row; pass-keys more than {WINDOW_REACH} "
        f"tokens back; chance is {CHANCE}. Steps and sizes of the toy come from pilot runs on other seeds, made before "
        "this criterion was written, in which dense attention and the mask learned the task and the window did not.",
        details={"by seed": list(toys)},
    )


def _tuning_claim(context: Context, toys: Sequence[dict[str, Any]]) -> Claim:
    before, after = (_toy_values(toys, "power", when) for when in ("before", "after"))
    return Claim(
        id="fine-tuning",
        statement="The mask needs light training: put into a model that was trained dense, it loses far recall, and a "
        "short fine-tune brings it back.",
        paper=PaperValue("probe 0.56 untrained, 1.00 trained", "16k tokens, last layer, last block", "section 4.6"),
        measured=bootstrap_difference(
            after, before, paired=True, generator=context.generator("tuning"), seeds=[toy["seed"] for toy in toys]
        ),
        criterion=CRITERIA["fine-tuning"],
        others={"dense": _dense(context, toys)},
        details={"before": before, "after": after, "window before": _toy_values(toys, "window", "before")},
    )  # fmt: skip


def _probe_claim(context: Context, toys: Sequence[dict[str, Any]]) -> Claim:
    random = context.generator("probe interval")
    layers = {name: np.array([toy[name]["probe"]["far"] for toy in toys]) for name in ("power", "window")}
    power, window = (layers[name][:, -1] for name in ("power", "window"))
    return Claim(
        id="probe",
        statement="After the last layer the last token holds far pass-keys under the mask and not under a window.",
        paper=PaperValue("power 1.00, window 0.37, full 1.00", "post-trained, 6 pass-keys, 16k tokens", "section 4.6"),
        measured=bootstrap(power, generator=random),
        baseline=bootstrap(window, generator=random),
        criterion=CRITERIA["probe"],
        others={"difference": bootstrap_difference(power, window, paired=True, generator=random)},
        notes="A linear probe of the hidden state; by layer in the details, the embedding first.",
        details={"by layer": {name: values.mean(0).tolist() for name, values in layers.items()}},
    )


def _text_claim(context: Context, found: Sequence[dict[str, float]]) -> Claim:
    power, window = ([row[name] for row in found] for name in ("power", "window"))
    random = context.generator("text interval")
    return Claim(
        id="text",
        statement="On natural text the mask, trained briefly, loses next to nothing to a window of equal degree.",
        paper=PaperValue("perplexity tables not seen", "PG19, 4k to 32k", "experiments"),
        measured=bootstrap_difference(power, window, paired=True, generator=random, unit="nats"),
        baseline=bootstrap(window, generator=random, unit="nats"),
        criterion=CRITERIA["text"],
        notes="Byte models from scratch, same initial weights and data; held-out text; 4 tokens a block.",
        details={"by seed": list(found)},
    )


def _perplexity_claim(context: Context, found: dict[str, Any]) -> Claim:
    random = context.generator("perplexity interval")
    dense, power, window = (found["blocks"][name] for name in ("dense", "power", "window"))
    return Claim(
        id="untrained-perplexity",
        statement="Put into a trained model without training, the mask costs perplexity.",
        paper=PaperValue("probe 0.56 without training against 1.00", "Qwen2-7B", "section 4.6"),
        measured=bootstrap_difference(power, dense, paired=True, generator=random, unit="nats"),
        criterion=CRITERIA["untrained-perplexity"],
        others={
            "window_minus_dense": bootstrap_difference(window, dense, paired=True, generator=random, unit="nats"),
            "power_minus_window": bootstrap_difference(power, window, paired=True, generator=random, unit="nats"),
        },
        notes="Mean nll of blocks of 32 tokens, which are taken as the units. "
        f"Mask: {REAL.window} blocks of {REAL.block}, sink block and powers; the window has the same degree.",
        details={
            "model": found["model"],
            "density": found["density"],
            "perplexity": {name: math.exp(float(np.mean(v))) for name, v in found["blocks"].items()},
        },
    )


def _needle_claim(context: Context, found: dict[str, Any]) -> Claim:
    random = context.generator("needle interval")
    power, window = (found["needles"][name] for name in ("power", "window"))
    measured = (
        bootstrap_difference(window, power, paired=True, generator=random, unit="nats")
        if power
        else Measurement(math.nan, n=0, unit="nats")
    )
    return Claim(
        id="untrained-needle",
        statement="Already without training a far needle is easier to give back with the mask than with a window.",
        paper=PaperValue("probe 0.56 against 0.48", "Qwen2-7B, untrained, last layer, last block", "section 4.6"),
        measured=measured,
        criterion=CRITERIA["untrained-needle"],
        notes="Difference of the mean nll of the value's tokens, window minus mask; prefill and decoding both sparse.",
        details={"model": found["model"], "nll": found["needles"], "depths": found["depths"]},
    )


def growth(pairs: dict[str, int]) -> dict[int, float]:
    """How much more is read when a text of so many blocks doubles."""
    sizes = sorted(int(size) for size in pairs)
    return {size: pairs[str(2 * size)] / pairs[str(size)] for size in sizes[:-1]}


def _cost_claim(found: dict[str, Any]) -> Claim:
    grown = growth(found["pairs"])
    expected = {size: 2 * (math.log2(2 * size) + 6) / (math.log2(size) + 6) for size in grown}
    errors = [abs(grown[size] / expected[size] - 1) for size in grown]
    return Claim(
        id="cost",
        statement="What the mask reads grows as n log n: twice the text, a little more than twice the pairs.",
        paper=PaperValue("O(n log n) per layer", where="section 3"),
        measured=Measurement(max(errors), n=len(errors)),
        baseline=Measurement(max(growth(found["dense"]).values()), n=len(errors), unit="× for dense"),
        criterion=CRITERIA["cost"],
        notes="Against 2 (log₂ 2n + 6) / (log₂ n + 6), which follows from the mask. Pairs are counted, not timed; "
        "`benchmarks/prefill.py` has times.",
        details={"growth": grown, "expected": expected, "pairs": found["pairs"]},
    )


def _plots(context: Context, claims: Sequence[Claim]) -> None:
    import plotly.graph_objects as go

    layers = cast(dict[str, list[float]], next(c for c in claims if c.id == "probe").details["by layer"])
    figure = go.Figure([go.Scatter(y=values, name=name, mode="lines+markers") for name, values in layers.items()])
    figure.update_layout(title="Far pass-keys in the last token", xaxis_title="layer", yaxis_title="probe accuracy")
    context.save_plot(figure, "probe")


def _obstacle(size: str) -> str | None:
    if size == "full" and not torch.cuda.is_available():
        return "it trains and runs models on 4,096 tokens and more and there is no GPU. Run --size small."
    return None


RECIPE = Recipe(
    slug="power-attention",
    title="PowerAttention: Exponentially Scaling of Receptive Fields for Effective Sparse Attention",
    run=run,
    criteria=CRITERIA,
    plots=_plots,
    obstacle=_obstacle,
)
