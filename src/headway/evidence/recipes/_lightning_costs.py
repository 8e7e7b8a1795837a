"""What lightning attention costs beside softmax: milliseconds by length, bytes kept for training, a decoded token."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from headway.evidence.recipe import Context
from headway.evidence.timing import milliseconds
from headway.kernels.scan import causal_scan
from headway.kernels.slopes import head_slopes
from headway.methods.layers.lightning import tnl_fields
from headway.models import HeadwayConfig, HeadwayForCausalLM

HEADS, DIM = 4, 64
#: The length at which the ratio to softmax is asked for, and the one of the backward claim.
LONG, BACKWARD = 16_384, 8192
#: Tokens in front of a decoded one.
NEAR, FAR = 100, 10_000
#: Tokens of the memory claim, and of its growth.
KEPT = (1024, 2048)
SLOPES = head_slopes(HEADS)


def forward(context: Context) -> dict[str, Any]:
    """Milliseconds of a forward pass by length, for both sides, repeat by repeat."""
    lengths = context.choose(
        smoke=(128, 512, 1024), small=(1024, 4096, LONG, 32_768), full=(1024, 4096, LONG, 32_768, 131_072)
    )
    repeats = context.choose(smoke=2, small=7, full=15)
    sides: dict[str, list[Callable[[], Any]]] = {"lightning": [], "softmax": []}
    generator = context.torch_generator("forward")
    for tokens in lengths:
        q, k, v = (torch.randn(1, HEADS, tokens, DIM, generator=generator) for _ in range(3))
        sides["lightning"].append(partial(causal_scan, q, k, v, SLOPES))
        sides["softmax"].append(partial(scaled_dot_product_attention, q, k, v, is_causal=True))
    # The longest softmax passes take half the time of the recipe and say nothing about lightning.
    shared = [n for n in lengths if n <= LONG]
    found = {
        "lightning": milliseconds(context, sides["lightning"], repeats),
        "softmax": milliseconds(context, sides["softmax"][: len(shared)], max(repeats // 2, 2)),
    }
    return {"lengths": list(lengths), **found}


def both_ways(context: Context) -> dict[str, Any]:
    """Milliseconds of forward and backward pass at one length."""
    tokens, repeats = context.choose(smoke=(256, 2), small=(BACKWARD, 3), full=(32_768, 5))
    generator = context.torch_generator("backward")
    q, k, v = (torch.randn(1, HEADS, tokens, DIM, generator=generator).requires_grad_() for _ in range(3))
    upstream = torch.randn(1, HEADS, tokens, DIM, generator=generator)

    def lightning() -> None:
        torch.autograd.grad(causal_scan(q, k, v, SLOPES)[0], (q, k, v), upstream)

    def softmax() -> None:
        torch.autograd.grad(scaled_dot_product_attention(q, k, v, is_causal=True), (q, k, v), upstream)

    times = milliseconds(context, [lightning, softmax], repeats)
    return {"tokens": tokens, "lightning": times[0], "softmax": times[1]}


def training(context: Context) -> dict[str, Any]:
    """Milliseconds of a training step (forward, backward) of a whole TNL and of a softmax model, by length."""
    lengths = context.choose(smoke=(128, 256, 512), small=(1024, 4096, 8192), full=(1024, 8192, 32_768, 131_072))
    repeats = context.choose(smoke=2, small=3, full=5)
    found: dict[str, Any] = {"lengths": list(lengths)}
    for name in ("lightning", "softmax"):
        model = small_model(name, width=64, layers=2)
        calls = []
        for tokens in lengths:
            ids = torch.randint(256, (1, tokens), generator=context.torch_generator("training"))
            calls.append(partial(learn, model, ids))
        found[name] = milliseconds(context, calls, repeats)
    return found


def learn(model: nn.Module, ids: Tensor) -> None:
    """Forward and backward pass."""
    model(input_ids=ids, labels=ids).loss.backward()
    model.zero_grad()


@torch.no_grad()
def decoding(context: Context) -> dict[str, Any]:
    """Milliseconds per decoded token and bytes of the cache, near the beginning and far from it."""
    near, far, steps, repeats = context.choose(
        smoke=(20, 200, 4, 3), small=(NEAR, FAR, 50, 7), full=(NEAR, 10 * FAR, 200, 15)
    )
    found: dict[str, Any] = {"near": near, "far": far}
    for name in ("lightning", "softmax"):
        model = small_model(name, width=64, layers=2).eval()
        token, calls, sizes = torch.zeros(1, 1, dtype=torch.long), [], []
        for tokens in (near, far):
            ids = torch.randint(256, (1, tokens), generator=context.torch_generator("decoding"))
            cache = model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
            sizes.append(cache.bytes)

            calls.append(partial(decode, model, token, cache, steps))
        times = milliseconds(context, calls, repeats)
        found[name] = {"bytes": sizes, "near": [t / steps for t in times[0]], "far": [t / steps for t in times[1]]}
    return found


def decode(model: nn.Module, token: Tensor, cache: Any, steps: int) -> None:
    """The same token, `steps` times; the cache goes on."""
    for _ in range(steps):
        model(input_ids=token, past_key_values=cache, use_cache=True)


def memory(context: Context) -> dict[str, Any]:
    """Bytes per token that a training step keeps for its backward pass: blocks beside the running sum over tokens."""
    found: dict[str, Any] = {"tokens": list(KEPT), "blocks": [], "cumulative": []}
    generator = context.torch_generator("memory")
    for tokens in KEPT:
        q, k, v = (torch.randn(1, 1, tokens, DIM, generator=generator).requires_grad_() for _ in range(3))
        found["blocks"].append(kept_bytes(partial(causal_scan, q, k, v)) / tokens)
        found["cumulative"].append(kept_bytes(partial(cumulative, q, k, v)) / tokens)
    return found


def cumulative(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Linear attention by a running sum of k vᵀ over tokens: a state per token."""
    states = torch.einsum("bhtd,bhte->bhtde", k, v).cumsum(2)
    return torch.einsum("bhtd,bhtde->bhte", q, states)


def kept_bytes(function: Callable[[], Any]) -> int:
    """Bytes of the storages that the graph of a function's result holds on to."""
    kept: dict[int, int] = {}
    holding: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        holding.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        function()
    return sum(kept.values())


def small_model(name: str, *, width: int, layers: int) -> HeadwayForCausalLM:
    """A whole TNL, or a softmax model with rotary positions and a SwiGLU, over bytes."""
    if name == "lightning":
        return HeadwayForCausalLM(HeadwayConfig(vocab_size=256, layers=layers, heads=HEADS, **tnl_fields(width=width)))
    config = HeadwayConfig(
        vocab_size=256, layers=layers, heads=HEADS, width=width, mixer="softmax", tie=False, mlp="swiglu"
    )
    return HeadwayForCausalLM(config)
