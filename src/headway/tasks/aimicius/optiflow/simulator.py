"""An all-gather on a machine of GPUs and one switch, step by step.

    time of a step = max over links of ( latency + bytes on the link / bandwidth )

Transfers of a step happen at once, from what each GPU held before it. Two GPUs without a link of their own meet at the
switch: their bytes count on both of its links, and the latency of both is paid. A plan is valid when every transfer has
its data at hand and every GPU ends with every chunk.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from headway.errors import HeadwayError
from headway.tasks.aimicius.optiflow.machines import Machine

_TRANSFER = re.compile(r"D\(\s*(\d{1,4})\s*,\s*(\d{1,4})\s*\)\s*:\s*G\(\s*(\d{1,4})\s*\)\s*=>\s*G\(\s*(\d{1,4})\s*\)")
#: A GB/s is so many bytes in a microsecond.
BYTES_PER_US = 1e3


class PlanError(HeadwayError):
    """A plan cannot be read, or is not an all-gather on its machine."""


@dataclass(frozen=True)
class Transfer:
    """Chunk `chunk` of GPU `source`, sent from `sender` to `receiver`."""

    source: int
    chunk: int
    sender: int
    receiver: int


def parse_plan(text: str) -> list[list[Transfer]]:
    """Steps of transfers. A line that begins with "step" begins one; without any such line, a transfer stands in the
    first step at which its sender has the chunk. Raises PlanError for other lines and for an empty plan."""
    steps: list[list[Transfer]] = [[]]
    marked = False
    for line in (line.strip() for line in text.splitlines()):
        found = _TRANSFER.fullmatch(line)
        if found:
            steps[-1].append(Transfer(*(int(x) for x in found.groups())))
        elif line.lower().startswith("step"):
            marked = True
            steps.append([])
        elif line:
            raise PlanError(f"plan: got the line {line[:60]!r}, expected 'D(source, chunk): G(a) => G(b)' or 'step'.")
    steps = [step for step in steps if step]
    if not steps:
        raise PlanError("plan: got no transfer, expected at least one line 'D(source, chunk): G(a) => G(b)'.")
    return steps if marked else _by_arrival(steps[0])


def all_gather_latency(steps: Sequence[Sequence[Transfer]], machine: Machine) -> float:
    """Microseconds of a plan. Raises PlanError, with the reason, where it is not valid."""
    held = {(gpu, gpu, chunk) for gpu in range(machine.gpus) for chunk in range(machine.chunks)}
    total = 0.0
    for number, step in enumerate(steps, 1):
        loads: dict[tuple[tuple[int, int], ...], int] = defaultdict(int)
        on_link: dict[tuple[int, int], int] = defaultdict(int)
        for move in step:
            _check(move, machine, held, number)
            path = _path(move, machine)
            loads[path] += machine.chunk_bytes
            for link in path:
                on_link[link] += machine.chunk_bytes
        total += max(_time(path, on_link, machine) for path in loads)
        held |= {(move.receiver, move.source, move.chunk) for move in step}
    missing = machine.gpus**2 * machine.chunks - len(held)
    if missing:
        raise PlanError(f"plan: got one that leaves {missing} chunks undelivered, expected every GPU to hold all.")
    return total


def _by_arrival(moves: Sequence[Transfer]) -> list[list[Transfer]]:
    """Transfers in the first step at which their sender has the chunk."""
    arrives = {(move.source, move.source, move.chunk): 0 for move in moves}
    steps: dict[int, list[Transfer]] = defaultdict(list)
    for move in moves:
        at = arrives.get((move.sender, move.source, move.chunk), 0)
        steps[at].append(move)
        arrived = (move.receiver, move.source, move.chunk)
        arrives[arrived] = min(arrives.get(arrived, at + 1), at + 1)
    return [steps[at] for at in sorted(steps)]


def _check(move: Transfer, machine: Machine, held: set[tuple[int, int, int]], step: int) -> None:
    if max(move.source, move.sender, move.receiver) >= machine.gpus or move.chunk >= machine.chunks:
        raise PlanError(
            f"plan: got {move} in step {step}, expected GPUs below {machine.gpus} and chunks below {machine.chunks}."
        )
    if move.sender == move.receiver:
        raise PlanError(f"plan: got a transfer from GPU {move.sender} to itself in step {step}, expected two GPUs.")
    if (move.sender, move.source, move.chunk) not in held:
        raise PlanError(
            f"plan: got GPU {move.sender} sending D({move.source},{move.chunk}) in step {step}, expected it to hold it."
        )


def _path(move: Transfer, machine: Machine) -> tuple[tuple[int, int], ...]:
    if machine.bandwidth[move.sender][move.receiver] > 0:
        return ((move.sender, move.receiver),)
    path = ((move.sender, machine.gpus), (machine.gpus, move.receiver))
    if any(machine.bandwidth[a][b] <= 0 for a, b in path):
        raise PlanError(f"plan: got a transfer from GPU {move.sender} to {move.receiver}, expected two with a link.")
    return path


def _time(path: tuple[tuple[int, int], ...], on_link: dict[tuple[int, int], int], machine: Machine) -> float:
    latency = sum(machine.latency[a][b] for a, b in path)
    return latency + max(on_link[a, b] / (machine.bandwidth[a][b] * BYTES_PER_US) for a, b in path)
