"""What every method with a budget must do on every host, as pieces that the contract tests put together.

A method is given by its slug and is found through the catalogue; its stages are those of `at_budget`. A host is a tiny
random causal language model. What a method refuses stands in `refusals`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

import headway
from headway.door.stages import Observer, Stage
from headway.hosts.tiny import tiny_host
from headway.methods.budget import budgeted, stages_at_budget

#: Long enough for several blocks of keys, short enough for many forwards.
TOKENS = 320
#: A multiple of every block size that fits.
BLOCK = 64
#: Pads in front of each row of a batch: of a whole block, and within blocks, few and many.
PADS = ((0, BLOCK), (3, 37), (100, 37))
SLUGS = tuple(budgeted())
HOSTS: dict[str, dict[str, Any]] = {
    "llama": {"architecture": "llama", "num_key_value_heads": 2},
    "multi-query": {"architecture": "llama", "num_key_value_heads": 1},
    "multi-head": {"architecture": "llama"},
    "qwen3": {
        "architecture": "qwen3",
        "use_sliding_window": False,
        "layer_types": ["full_attention", "full_attention"],
    },
    "qwen3 sliding": {"architecture": "qwen3"},
    "mistral": {"architecture": "mistral", "sliding_window": 48},
    "gemma2": {"architecture": "gemma2"},
    "gemma3": {"architecture": "gemma3_text"},
    "phi": {"architecture": "phi"},
    "olmo": {"architecture": "olmo"},
}
#: One host of each family: grouped heads as in SmolLM2, normed queries, sliding layers, a window in every layer,
#: partly rotary positions with biases, norms without weights.
FAMILIES = ("llama", "qwen3", "gemma3", "mistral", "phi", "olmo")
#: Methods that count blocks from the first column of a batch, pads included, as their docstrings say.
BLOCKS_BY_COLUMN = ("dhsa", "flexprefill")


@cache
def host(name: str) -> nn.Module:
    """The tiny host of that name. Tests share it: every scope has to leave it as it was."""
    options = dict(HOSTS[name])
    return tiny_host(options.pop("architecture"), max_position_embeddings=2 * TOKENS, **options)[0]


@cache
def exact(name: str) -> nn.Module:
    """The same in float64, in which rounding cannot decide between two keys that a method ranks nearly alike."""
    return fresh(name).double()


def fresh(name: str) -> nn.Module:
    """A host of its own, for tests that leave marks."""
    return host.__wrapped__(name)


def compiled(model: nn.Module, how: str, backend: str = "inductor") -> nn.Module:
    """The model compiled in each of the ways that users know; nothing is traced before the first forward."""
    if how == "wrapped":
        return torch.compile(model, backend=backend)  # type: ignore[return-value]
    if how == "in place":
        model.compile(backend=backend)
    else:
        model.forward = torch.compile(model.forward, backend=backend)  # type: ignore[method-assign]
    return model


def tokens(batch: int = 1, length: int = TOKENS, seed: int = 0) -> Tensor:
    return torch.randint(8, 112, (batch, length), generator=torch.Generator().manual_seed(seed))


def stages(slug: str, name: str, share: float, length: int = TOKENS) -> tuple[Stage, ...]:
    """The stages at a budget. A selector that may give way to dense attention may not do so here."""
    found = stages_at_budget(slug, share, tokens=length, model=host(name))
    return tuple(
        dataclasses.replace(stage, approximates=False)  # type: ignore[type-var]
        if dataclasses.is_dataclass(stage) and "approximates" in {f.name for f in dataclasses.fields(stage)}
        else stage
        for stage in found
    )


@torch.no_grad()
def read(
    model: nn.Module, ids: Tensor, chunks: Sequence[int], mask: Tensor | None = None, between: Callable | None = None
) -> Tensor:
    """Logits of all tokens, read through the cache in chunks; ones at the end are decoding steps. `between` is called
    after every chunk."""
    assert sum(chunks) == ids.shape[1]
    past, start, logits = None, 0, []
    for chunk in chunks:
        inputs: dict[str, Any] = {}
        if mask is not None:
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, start : start + chunk]
            inputs = {"attention_mask": mask[:, : start + chunk], "position_ids": positions}
        out = model(input_ids=ids[:, start : start + chunk], past_key_values=past, use_cache=True, **inputs)
        past, start = out.past_key_values, start + chunk
        logits.append(out.logits)
        if between is not None:
            between()
    return torch.cat(logits, 1)


def padded(ids: Tensor, pads: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The rows with their first tokens replaced by pads, and the mask."""
    mask = torch.stack([torch.arange(ids.shape[1]) >= pad for pad in pads]).long()
    return ids * mask, mask


@torch.no_grad()
def in_turns(model: nn.Module, requests: Sequence[Tensor], chunks: Sequence[int]) -> list[Tensor]:
    """Logits of several requests that are read chunk by chunk, one after the other."""
    caches: list[Any] = [None] * len(requests)
    logits: list[list[Tensor]] = [[] for _ in requests]
    start = 0
    for chunk in chunks:
        for turn, ids in enumerate(requests):
            out = model(input_ids=ids[:, start : start + chunk], past_key_values=caches[turn], use_cache=True)
            caches[turn] = out.past_key_values
            logits[turn].append(out.logits)
        start += chunk
    return [torch.cat(found, 1) for found in logits]


def close(got: Tensor, expected: Tensor, what: str = "", share: float = 1e-4) -> None:
    """Equal up to `share` of the largest logit."""
    limit = share * float(expected.abs().max())
    worst = float((got - expected).abs().max())
    assert worst <= limit, f"{what}: logits differ by {worst:.3g}, expected at most {limit:.3g}"


def decodes(length: int = TOKENS, steps: int = 3) -> list[int]:
    """A whole prefill and some decoding steps."""
    return [length - steps, *[1] * steps]


class Reads(Observer):
    """Notes the largest weight that any row gives to a later key."""

    reads_weights = True

    def start(self) -> None:
        self.ahead = 0.0

    def observe(self, call, output, lse=None) -> None:
        for start in range(0, call.queries, 64):
            rows = torch.arange(start, min(start + 64, call.queries))
            later = call.key_positions > call.query_positions[rows][:, None]
            self.ahead = max(self.ahead, float(call.weights(rows).masked_fill(~later, 0).max()))

    def result(self) -> float:
        return self.ahead


def snapshot(model: nn.Module) -> dict[str, Any]:
    """What a scope must give back: names, hooks, attributes, buffers, weights."""
    modules = list(model.modules())
    return {
        "implementation": [
            str.__str__(m.config._attn_implementation_internal) for m in modules if hasattr(m, "config")
        ],
        "types": [type(m.config._attn_implementation_internal) for m in modules if hasattr(m, "config")],
        "hooks": [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in modules],
        "attributes": [sorted(vars(m)) for m in modules],
        "config": model.config.to_json_string(),
        "forward": [m.__dict__.get("forward") for m in modules],
        "state": {k: v.clone() for k, v in model.state_dict().items()},
        "buffers": {k: v.clone() for k, v in model.named_buffers()},
    }


def same(before: dict[str, Any], after: dict[str, Any]) -> None:
    for key, value in before.items():
        if key in ("state", "buffers"):
            assert value.keys() == after[key].keys(), key
            assert all(torch.equal(value[name], after[key][name]) for name in value), key
        else:
            assert value == after[key], key


def fields_of(stage: Stage) -> dict[str, str]:
    """A stage's attributes as text. A list or dictionary that a user hands in to be filled is left out."""
    return {k: repr(v) for k, v in vars(stage).items() if not isinstance(v, list | dict)}


def acts_on(stage_list: Sequence[Stage], kind: type[Stage]) -> bool:
    return any(isinstance(stage, kind) for stage in stage_list)


def saving(model: nn.Module, acting: Sequence[Stage], ids: Tensor) -> dict[str, float]:
    """What a prefill and a few steps take, over what dense attention takes: pairs read in prefill, keys read in decode,
    and bytes stored where the cache can tell."""
    with headway.use(model, *acting) as handle, torch.no_grad():
        past = model(input_ids=ids[:, :-4], use_cache=True).past_key_values
        before = {name: (r.density_sum, r.calls) for name, r in handle.reports.items()}
        for step in range(4):
            place = ids.shape[1] - 4 + step
            past = model(input_ids=ids[:, place : place + 1], past_key_values=past, use_cache=True).past_key_values
        after = {name: (r.density_sum, r.calls) for name, r in handle.reports.items()}
    decode = [(after[name][0] - before[name][0]) / (after[name][1] - before[name][1]) for name in before]
    prefill = [total / calls for total, calls in before.values()]
    found = {"prefill": sum(prefill) / len(prefill), "decode": sum(decode) / len(decode)}
    if hasattr(past, "stored_bytes"):
        config: Any = model.config
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        dense = 2 * config.num_hidden_layers * config.num_key_value_heads * dim * 4 * ids.numel()
        found["stored"] = past.stored_bytes() / dense
    return found
