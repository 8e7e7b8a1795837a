"""Heads whose pattern is known, for the FlexPrefill recipe: what is chosen for them, and what it keeps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch.nn.functional import normalize

from headway.door.call import AttentionCall
from headway.door.selection import Blocks
from headway.errors import unknown
from headway.evidence.recipe import Context
from headway.kernels.rope import rope_frequencies, rotate
from headway.methods.long_context.flexprefill import FlexPrefill
from headway.tasks.fidelity import fidelity

KINDS = ("topic", "vertical", "noisy local", "clean local", "isotropic")
#: Heads whose pattern is known, and whether it is the query-aware one.
PATTERNS = {"topic": True, "vertical": False, "noisy local": False}


def planted_head(kind: str, generator: torch.Generator, *, tokens: int = 1024, dim: int = 32) -> AttentionCall:
    """A call of one head whose pattern is known.

    topic: tokens of 4 topics in runs of 32 read their own topic's runs. vertical: six keys that every row reads.
    clean local, noisy local: one direction turned by RoPE, so that logits fall with distance; in the noisy one queries
    and keys carry as much that has nothing to do with position, which block means average away. isotropic: noise."""
    if kind not in KINDS:
        raise unknown("kind", kind, KINDS)
    query, key, value = (torch.randn(tokens, dim, generator=generator) for _ in range(3))
    if kind.endswith("local"):
        base = torch.randn(dim, generator=generator)
        noise = 0.7 if kind == "noisy local" else 0.1
        frequencies = rope_frequencies(dim)
        at = torch.arange(tokens)
        query, key = (rotate(3 * (base + noise * x)[None, None], at, frequencies)[0, 0] for x in (query, key))
    elif kind == "vertical":
        direction = normalize(torch.randn(dim, generator=generator), dim=0)
        query = query + 8 * direction
        key[torch.randperm(tokens, generator=generator)[:6]] += 8 * direction
    elif kind == "topic":
        centres = 3 * torch.randn(4, dim, generator=generator)
        topic = torch.arange(tokens) // 32 % 4
        query, key = centres[topic] + 0.1 * query, centres[topic] + 0.1 * key
    return AttentionCall.from_tensors(query[None, None], key[None, None], value[None, None], causal=True)


def planted(context: Context) -> dict[str, Any]:
    """Pattern and density of planted heads, and what one quota for a head leaves to its last rows."""
    heads = context.choose(smoke=2, small=15, full=100)
    method = FlexPrefill(block=32, min_budget=None, approximates=False)
    found: dict[str, Any] = {"patterns": [], "density": {"clean local": [], "isotropic": []}, "late": []}
    for number in context.track(range(heads), "planted heads"):
        generator = context.torch_generator(f"planted {number}")
        for kind, aware in PATTERNS.items():
            chosen = method.blocks_of(planted_head(kind, generator))
            found["patterns"].append(
                {
                    "kind": kind,
                    "right": bool(chosen.query_aware) == aware,
                    "divergence": float(chosen.divergence),
                    "density": chosen.density,
                }
            )
        for kind, densities in found["density"].items():
            call = planted_head(kind, generator)
            chosen = method.blocks_of(call)
            densities.append({"density": chosen.density, "mass": fidelity(call, Blocks(chosen.mask)).mean_mass()})
        masses = {}
        for selection in ("global", "row"):
            aware_head = replace(method, tau=1.0, selection=selection)
            kept = fidelity(call, Blocks(aware_head.blocks_of(call).mask))
            masses[selection] = {"mean": kept.mean_mass(), "last": kept.last_mass(32)}
        found["late"].append(masses)
    return found
