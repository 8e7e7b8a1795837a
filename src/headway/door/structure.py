"""What a host is made of, read from its modules: which attend through the registry, which do not, and why not."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from headway.door.adapter import uses_registry

#: Class names of token mixers that have no softmax over keys, with what they are.
MIXERS = (
    (r"mamba|\bssm|ssd|selectivescan|bamba|falconh1mixer", "state-space mixer"),
    (r"rwkv", "RWKV recurrence"),
    (r"rglru|recurrent|lstm|xlstm|gru", "gated recurrence"),
    (r"deltanet|deltaattention|linearattention|lightningattention|retention", "linear attention"),
    (r"shortconv|hyena|convmixer", "convolution mixer"),
    (r"neuralmemory", "neural memory, which has no weights over keys"),
)
#: Parts of such hosts that carry the family's name and mix no tokens.
_WRAPPERS = re.compile(r"norm|model|layer$|block$|cache|forcausallm|mlp|feedforward|rotary|embed|backend|head")
#: Mixers that are called layers.
_MIXING_LAYERS = frozenset({"granitemoehybridmambalayer", "xlstmlayer"})
_ATTENTION = re.compile(r"attention|attn", re.IGNORECASE)
#: Parts that carry the word in their name and compute no attention of their own.
_PARTS = re.compile(
    r"output|norm|embed|layer$|block$|model|decoder|encoder|pool|mask|bias|intermediate|rotary|indexer|cache|gate|scale|"
    r"resampler|stack|compressor|residual",
    re.IGNORECASE,
)


def mixer_kind(module: nn.Module) -> str | None:
    """What kind of attention-free mixer a module is by its class name; None when it is not one."""
    name = type(module).__name__.lower()
    for pattern, kind in MIXERS:
        if re.search(pattern, name) and (name in _MIXING_LAYERS or not _WRAPPERS.search(name)):
            return kind
    return None


def hard_coded(module: nn.Module) -> bool:
    """Whether a module is attention by name and by its projections, but does not ask the registry for its function."""
    name = type(module).__name__
    if not _ATTENTION.search(name) or _PARTS.search(name) or uses_registry(module) or mixer_kind(module):
        return False
    children = list(module.modules())[1:]
    if any(uses_registry(child) for child in children):
        return False
    own = any(parameter.ndim >= 2 for parameter in module.parameters(recurse=False))
    return own or any(_projects(child) for child in module.children())


def _projects(module: nn.Module) -> bool:
    return getattr(getattr(module, "weight", None), "ndim", 0) == 2 and not isinstance(module, nn.Embedding)


@contextmanager
def bypasses(model: nn.Module) -> Iterator[list[str]]:
    """Collects the hard-coded attention modules that run while the context is open, one line per class."""
    seen: dict[str, str] = {}
    hooks = []
    for name, module in model.named_modules():
        if hard_coded(module):
            kind = type(module).__name__

            def note(module: nn.Module, args: object, kind: str = kind, name: str = name) -> None:
                seen.setdefault(kind, f"{kind} at {name} is hard-coded attention")

            hooks.append(module.register_forward_pre_hook(note))
    lines: list[str] = []
    try:
        yield lines
    finally:
        for hook in hooks:
            hook.remove()
        lines.extend(seen.values())


def why_not(model: nn.Module) -> str:
    """One line that says why no attention of a host passes the door."""
    hard = sorted({type(m).__name__ for m in model.modules() if hard_coded(m)})
    mixers = sorted({f"{type(m).__name__} ({kind})" for m in model.modules() if (kind := mixer_kind(m))})
    asks = sorted({type(m).__name__ for m in model.modules() if uses_registry(m)})
    host = type(model).__name__
    fix = "Use a host whose attention goes through transformers' attention registry."
    if hard:
        return f"{host} has hard-coded attention ({', '.join(hard)}) that does not ask the attention registry. {fix}"
    if mixers:
        return (
            f"{host} has no self-attention: its mixers are {', '.join(mixers)}. What reads or changes attention, "
            "headway.look among it, needs at least one layer that gives keys weights: use another host, or a hybrid "
            "that has such layers beside these."
        )
    if asks:
        names = ", ".join(asks)
        return f"{host} has attention modules ({names}) that did not run. Pass example={{…}} that reaches them."
    return f"{host} has no self-attention that could be found. {fix}"
