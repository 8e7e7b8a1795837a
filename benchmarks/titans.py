"""Titans: the dual form against automatic differentiation token by token, decoding at any length, bytes of state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import normalize

from benchmarks.harness import compare, write_facts
from headway.kernels.deep_memory import Gates, deep_memory
from headway.kernels.memory_net import MemoryNet

HEADS, DIM, EXPANSION, CHUNK = 4, 64, 4, 16
VARIANTS = ("titans_lmm", "titans_mac", "titans_mag", "titans_mal")
WIDTH = HEADS * DIM


def _net() -> MemoryNet:
    weights = (torch.randn(HEADS, DIM, EXPANSION * DIM) / DIM**0.5, torch.randn(HEADS, EXPANSION * DIM, DIM) / 16)
    return MemoryNet(weights, True, torch.ones(HEADS, DIM), torch.zeros(HEADS, DIM))


def _stream(tokens: int) -> tuple[list[torch.Tensor], Gates]:
    query, key = (normalize(torch.randn(1, HEADS, tokens, DIM), dim=-1) for _ in range(2))
    ones = torch.ones(1, HEADS, tokens)
    return [query, key, torch.randn(1, HEADS, tokens, DIM)], Gates(0.005 * ones, 0.3 * ones, 0.02 * ones)


def titans_dual_form() -> None:
    """512 tokens through a two-layer memory of four heads of 64, forward, and forward with the outer backward: whole
    chunks by matrix products, against automatic differentiation of the inner loss token by token."""
    torch.manual_seed(0)
    tokens = 512
    parts, gates = _stream(tokens)
    settings = {"tokens": tokens, "heads": HEADS, "dim": DIM, "expansion": EXPANSION, "chunk": CHUNK, "depth": 2}

    def forward(mode: str) -> Callable[[], None]:
        net = _net()

        def run() -> None:
            with torch.no_grad():
                deep_memory(*parts, gates, net, chunk=CHUNK, mode=mode)

        return run

    def backward(mode: str) -> Callable[[], None]:
        net = _net()
        leaves = [x.clone().requires_grad_() for x in (*parts, *net.weights)]

        def run() -> None:
            learned = MemoryNet(tuple(leaves[3:]), True, net.gain, net.shift)
            out = deep_memory(*leaves[:3], gates, learned, chunk=CHUNK, mode=mode).output
            torch.autograd.grad(out.square().sum(), leaves)

        return run

    labels = ("dual form", "token by token")
    for name, side in (("forward", forward), ("backward", backward)):
        compare(
            f"titans_dual_{name}",
            side("block"),
            side("reference"),
            labels=labels,
            repeats=3,
            settings={**settings, "what": name, "bar": "≤ 1 / 20"},
        )


def _mixer(slug: str) -> Any:
    from headway.models import mixers

    torch.manual_seed(0)
    options: dict[str, Any] = {"chunk": CHUNK}
    if slug in ("titans_mag", "titans_mal"):
        options["window"] = 256
    if slug == "titans_mac":
        options["segment"] = 256
    return mixers()[slug](WIDTH, heads=HEADS, **options)


def titans_decode() -> None:
    """64 single tokens behind 16,384, against 64 behind 1,024, for each mixer; and the bytes of both states."""
    facts: dict[str, Any] = {}
    steps = 64
    for slug in VARIANTS:
        mixer = _mixer(slug)
        x = torch.randn(1, 16_384, WIDTH)
        states = {}
        with torch.no_grad():
            for length in (1024, 16_384):
                _, states[length] = mixer(x[:, :length], state=mixer.init_state(1))

        def run(length: int, mixer: Any = mixer, states: dict[int, Any] = states, x: torch.Tensor = x) -> None:
            state = states[length]
            with torch.no_grad():
                for at in range(steps):
                    _, state = mixer(x[:, at : at + 1], state=state, mode="step")

        compare(
            f"{slug}_decode",
            lambda run=run: run(16_384),
            lambda run=run: run(1024),
            labels=("behind 16,384 tokens", "behind 1,024 tokens"),
            repeats=5,
            settings={"width": WIDTH, "heads": HEADS, "steps": steps, "bar": "within 10 %"},
        )
        facts[slug] = {str(length): state.bytes for length, state in states.items()}
        print(f"{slug}: {facts[slug]} bytes of state")
    write_facts("titans_state", {"bytes": facts, "constant": all(len(set(f.values())) == 1 for f in facts.values())})


def titans_chunk_sizes() -> None:
    """2,048 tokens in chunks of 64, 16 and 4, against chunks of one token: what smaller chunks cost."""
    torch.manual_seed(0)
    parts, gates = _stream(2048)
    net = _net()

    def run(size: int) -> Callable[[], None]:
        def call() -> None:
            with torch.no_grad():
                deep_memory(*parts, gates, net, chunk=size)

        return call

    for size in (64, 16, 4):
        compare(
            f"titans_chunk_{size}",
            run(size),
            run(1),
            labels=(f"chunks of {size}", "chunks of 1"),
            repeats=3,
            settings={"tokens": 2048, "chunk": size},
        )


def titans_training() -> None:
    """Forward and backward of one layer at 1,024 tokens, each mixer beside softmax attention of the same width."""
    from headway.models import mixers

    x = torch.randn(1, 1024, WIDTH)
    softmax = mixers()["softmax"](WIDTH, heads=HEADS)

    def run(mixer: Any) -> Callable[[], None]:
        def call() -> None:
            mixer.zero_grad()
            mixer(x)[0].square().mean().backward()

        return call

    for slug in VARIANTS:
        compare(
            f"{slug}_training",
            run(_mixer(slug)),
            run(softmax),
            labels=(slug, "softmax"),
            repeats=5,
            settings={"tokens": 1024, "width": WIDTH, "heads": HEADS},
        )
