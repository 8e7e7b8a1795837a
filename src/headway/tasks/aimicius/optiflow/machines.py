"""The made-up machines, a plan that works on all of them, and one that is faster on each."""

from __future__ import annotations

from dataclasses import dataclass

from headway.errors import ArgumentError

Matrix = tuple[tuple[float, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Machine:
    """GPUs and one switch (the last row and column). Latency in µs, bandwidth in GB/s, 0 where there is no link.

    `ring` is an order of the GPUs in which each has a fast link to the next."""

    name: str
    gpus: int
    chunks: int
    chunk_bytes: int
    latency: Matrix
    bandwidth: Matrix
    ring: tuple[int, ...]

    def __post_init__(self) -> None:
        size = self.gpus + 1
        for name in ("latency", "bandwidth"):
            rows = getattr(self, name)
            if len(rows) != size or any(len(row) != size for row in rows):
                raise ArgumentError(
                    f"{name}: got {len(rows)} rows for {self.gpus} GPUs and a switch, expected {size} × {size}."
                )
        if sorted(self.ring) != list(range(self.gpus)):
            raise ArgumentError(f"ring: got {self.ring}, expected every GPU once.")


#: Every GPU sends its own chunks to every other one, all in one step.
DIRECT = """def generate_plan(gpus, chunks):
    for source in range(gpus):
        for chunk in range(chunks):
            for other in range(gpus):
                if other != source:
                    print(f"D({source},{chunk}): G({source}) => G({other})")
"""

_RING = """def generate_plan(gpus, chunks):
    ring = {ring}
    for turn in range(gpus - 1):
        print("step")
        for place in range(gpus):
            source = ring[(place - turn) % gpus]
            for chunk in range(chunks):
                print(f"D({{source}},{{chunk}}): G({{ring[place]}}) => G({{ring[(place + 1) % gpus]}})")
"""


def improved_program(machine: Machine) -> str:
    """The all-gather round the machine's fast ring, each chunk one place further in each step."""
    return _RING.format(ring=list(machine.ring))


def machines() -> tuple[Machine, ...]:
    """Rings of fast links in different orders, whose other pairs meet at a slow switch or over slow links."""
    return tuple(
        _ring_machine(name, ring, chunks=chunks, megabytes=size, fast=fast, switch=switch, slow=slow)
        for name, ring, chunks, size, fast, switch, slow in (
            ("four in a ring", (0, 1, 2, 3), 1, 4, 100.0, 10.0, 0.0),
            ("four, crossed", (0, 2, 1, 3), 1, 16, 200.0, 25.0, 0.0),
            ("four, two chunks", (0, 3, 1, 2), 2, 8, 150.0, 12.0, 0.0),
            ("six in a ring", (0, 1, 2, 3, 4, 5), 1, 8, 100.0, 20.0, 0.0),
            ("eight, interleaved", (0, 4, 1, 5, 2, 6, 3, 7), 1, 4, 250.0, 50.0, 0.0),
            ("eight, slow links", (0, 1, 3, 2, 6, 7, 5, 4), 2, 2, 300.0, 25.0, 5.0),
        )
    )


def _ring_machine(
    name: str, ring: tuple[int, ...], *, chunks: int, megabytes: int, fast: float, switch: float, slow: float
) -> Machine:
    gpus = len(ring)
    near = {frozenset((ring[i], ring[(i + 1) % gpus])) for i in range(gpus)}

    def entry(a: int, b: int, of_fast: float, of_switch: float, of_slow: float) -> float:
        if a == b:
            return 0.0
        if gpus in (a, b):
            return of_switch
        return of_fast if frozenset((a, b)) in near else of_slow

    places = range(gpus + 1)
    return Machine(
        name=name,
        gpus=gpus,
        chunks=chunks,
        chunk_bytes=megabytes * 1024**2,
        latency=tuple(tuple(entry(a, b, 1.0, 3.0, 8.0) for b in places) for a in places),
        bandwidth=tuple(tuple(entry(a, b, fast, switch, slow) for b in places) for a in places),
        ring=ring,
    )
