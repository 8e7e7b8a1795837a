"""Operations, bytes and the least time of a prompt and of a decoding step.

    time of a part = max(operations / peak rate, bytes / bandwidth)        (the roofline)

A prompt of n tokens multiplies every active weight n times and the output layer once, and takes 2·(d_k + d_v)
operations for each pair of a query and a key that is read. A step reads all its weights and what it attends to once.
Activations, norms, rotations, sampling and traffic between devices are not counted: real times are longer.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from headway.errors import unknown
from headway.plan.footprint import Footprint
from headway.plan.hardware import BYTES, Hardware
from headway.plan.shape import ModelShape


@dataclass(frozen=True, kw_only=True)
class Part:
    """One kind of work in a phase: operations, bytes moved, least seconds, and which of the two takes them."""

    name: str
    flops: float
    bytes: float
    seconds: float
    bound: str


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A prompt, or one decoding step: its parts in order, which run one after the other."""

    name: str
    parts: tuple[Part, ...]
    overhead: float = 0.0

    @property
    def flops(self) -> float:
        return sum(part.flops for part in self.parts)

    @property
    def bytes(self) -> float:
        return sum(part.bytes for part in self.parts)

    @property
    def seconds(self) -> float:
        return sum(part.seconds for part in self.parts) + self.overhead

    @property
    def bound(self) -> str:
        """What takes most of the time: the part and its limit."""
        longest = max(self.parts, key=lambda part: part.seconds)
        return f"{longest.name}, {longest.bound}"

    def to_dict(self) -> dict[str, Any]:
        own = {"flops": self.flops, "bytes": self.bytes, "seconds": self.seconds, "bound": self.bound}
        return own | {"parts": [asdict(part) for part in self.parts]}


def number_bytes(dtype: str) -> int:
    """Bytes of one number. Raises ArgumentError for a type that is not known."""
    if dtype not in BYTES:
        raise unknown("dtype", dtype, BYTES)
    return BYTES[dtype]


def kv_bytes(shape: ModelShape, used: Footprint, *, dtype: str, batch: int = 1) -> int:
    """Bytes of the keys and values that are held after the prompt."""
    entries = zip(shape.layers, used.layers, strict=True)
    return batch * number_bytes(dtype) * sum(layer.entry * use.stored for layer, use in entries)


def weight_bytes(shape: ModelShape, dtype: str) -> int:
    return shape.parameters * number_bytes(dtype)


def prompt(shape: ModelShape, used: Footprint, machine: Hardware, *, dtype: str, batch: int, devices: int) -> Phase:
    """The whole prompt in one forward, which returns the logits of its last token."""
    size, rows = number_bytes(dtype), batch * used.tokens
    linear = 2 * rows * shape.active_weights + 2 * batch * shape.output_weights
    pairs = list(zip(shape.layers, used.layers, strict=True))
    attention = batch * sum(2 * layer.entry * use.pairs for layer, use in pairs)
    written = size * rows * sum(layer.entry * layer.kv_heads for layer in shape.layers if not layer.borrows)
    chosen = batch * sum(use.choosing[0] for use in used.layers)
    rate = _rates(machine, dtype, devices)
    parts = [
        _part("weights", linear, size * shape.weights_read(rows), rate),
        _part("attention", attention, written, rate, attends=True),
    ]
    if chosen:
        parts.append(_part("choosing keys", chosen, written / 2, rate))
    return Phase(name="prompt", parts=tuple(parts), overhead=machine.overhead * len(shape.layers))


def step(shape: ModelShape, used: Footprint, machine: Hardware, *, dtype: str, batch: int, devices: int) -> Phase:
    """One decoding step behind the prompt, a token for every sequence."""
    size = number_bytes(dtype)
    linear = 2 * batch * (shape.active_weights + shape.output_weights)
    both = list(zip(shape.layers, used.layers, strict=True))
    attention = batch * sum(2 * layer.entry * use.read * layer.heads / layer.kv_heads for layer, use in both)
    read = size * batch * sum(layer.entry * use.read for layer, use in both)
    chosen = batch * sum(use.choosing[1] for use in used.layers)
    rate = _rates(machine, dtype, devices)
    parts = [
        _part("weights", linear, size * shape.weights_read(batch), rate),
        _part("attention", attention, read, rate, attends=True),
    ]
    if chosen:
        parts.append(_part("choosing keys", chosen, 0.0, rate))
    return Phase(name="step", parts=tuple(parts), overhead=machine.overhead * len(shape.layers))


@dataclass(frozen=True)
class _Rates:
    flops: float
    attention: float
    bandwidth: float


def _rates(machine: Hardware, dtype: str, devices: int) -> _Rates:
    """Wider numbers than those of the data sheet go at a lower rate in proportion; narrower ones no faster."""
    slower = min(1.0, BYTES[machine.type] / number_bytes(dtype))
    flops = machine.flops * slower * devices
    own = machine.attention_flops
    return _Rates(flops, flops if own is None else own * slower * devices, machine.bandwidth * devices)


def _part(name: str, flops: float, moved: float, rate: _Rates, *, attends: bool = False) -> Part:
    computing = flops / (rate.attention if attends else rate.flops)
    moving = moved / rate.bandwidth
    return Part(
        name=name,
        flops=flops,
        bytes=moved,
        seconds=max(computing, moving),
        bound="compute" if computing >= moving else "memory",
    )
