"""Nested states (of optimisers, random generators, streams) as tensors and JSON, and back: nothing is pickled."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headway.errors import ArgumentError


def split(tree: Any) -> tuple[Any, dict[str, Tensor]]:
    """The tree with every tensor replaced by its name, ready for JSON, and the tensors by name, on the CPU.

    Dicts (with keys of text or whole numbers), lists, tuples, tensors, arrays, numbers, text, booleans and None are
    told apart, so `join` gives back exactly what came in. Tensors that are one and the same are stored once. Raises
    ArgumentError for anything else, naming where it is."""
    tensors: dict[str, Tensor] = {}
    return _split(tree, "", tensors, {}), tensors


def join(plain: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The tree that `split` took apart."""
    if not isinstance(plain, dict):
        return plain
    (kind, content), *_ = plain.items()
    match kind:
        case "tensor":
            return tensors[content]
        case "array":
            return tensors[content].numpy()
        case "dict":
            return {key: join(value, tensors) for key, value in content}
        case "tuple":
            return tuple(join(value, tensors) for value in content)
        case _:
            return [join(value, tensors) for value in content]


def _split(tree: Any, path: str, tensors: dict[str, Tensor], names: dict[tuple, str]) -> Any:
    if tree is None or isinstance(tree, str | bool | int | float):
        return tree
    if isinstance(tree, np.generic):
        return tree.item()
    if isinstance(tree, Tensor):
        return {"tensor": _store(tree, path, tensors, names)}
    if isinstance(tree, np.ndarray):
        return {"array": _store(torch.from_numpy(tree.copy()), path, tensors, names)}
    if isinstance(tree, Mapping):
        if strange := [key for key in tree if not isinstance(key, str | int) or isinstance(key, bool)]:
            raise ArgumentError(f"state {path or '(top)'}: got the key {strange[0]!r}, expected text or whole numbers.")
        return {"dict": [[key, _split(value, _below(path, key), tensors, names)] for key, value in tree.items()]}
    if isinstance(tree, list | tuple):
        kind = "tuple" if isinstance(tree, tuple) else "list"
        return {kind: [_split(value, _below(path, i), tensors, names) for i, value in enumerate(tree)]}
    raise ArgumentError(
        f"state {path or '(top)'}: got {type(tree).__name__}, expected tensors, numbers, text, or lists and dicts of "
        "them; nothing else can be stored without pickle."
    )


def _store(tensor: Tensor, path: str, tensors: dict[str, Tensor], names: dict[tuple, str]) -> str:
    """The name under which the tensor is kept; the first one where it is shared (tied weights)."""
    identity = (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
    if tensor.numel() and identity in names:
        return names[identity]
    name = path or "value"
    names[identity] = name
    kept = tensor.detach().to("cpu").contiguous()
    if kept.untyped_storage().nbytes() != kept.numel() * kept.element_size():
        kept = kept.clone()  # A view would be stored with everything around it.
    tensors[name] = kept
    return name


def _below(path: str, key: object) -> str:
    return f"{path}/{key}" if path else str(key)
