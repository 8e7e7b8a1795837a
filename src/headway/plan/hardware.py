"""What a machine can do at most: arithmetic, memory traffic, memory. Numbers are those of its maker's data sheet."""

from __future__ import annotations

from dataclasses import dataclass

from headway.errors import unknown

#: Bytes per number of each type a model can run in.
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8": 1}


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """Floating-point operations per second (a multiplication and an addition are two), bytes per second from memory,
    bytes of memory, and where the numbers stand. `type` is that of the numbers the rate holds for.

    `overhead` is time per layer and forward that no arithmetic explains (calls, small kernels), `attention_flops` the
    rate of attention where it was measured apart; both are 0 or None for data sheets."""

    name: str
    what: str
    flops: float
    bandwidth: float
    memory: float | None
    source: str
    type: str = "bfloat16"
    attention_flops: float | None = None
    overhead: float = 0.0


HARDWARE = {
    hardware.name: hardware
    for hardware in (
        Hardware(
            name="h100",
            what="NVIDIA H100 SXM, 80 GB",
            flops=989.4e12,
            bandwidth=3.35e12,
            memory=80e9,
            source="NVIDIA H100 Tensor Core GPU data sheet: BF16 tensor core 1,979 TFLOPS with sparsity, half without",
        ),
        Hardware(
            name="a100",
            what="NVIDIA A100 SXM, 80 GB",
            flops=312e12,
            bandwidth=2.039e12,
            memory=80e9,
            source="NVIDIA A100 Tensor Core GPU data sheet: BF16 tensor core 312 TFLOPS, 2,039 GB/s",
        ),
        Hardware(
            name="cpu",
            what="a server CPU of 56 cores (Intel Xeon Platinum 8480+), float32",
            flops=56 * 2.0e9 * 64,
            bandwidth=8 * 4800e6 * 8,
            memory=None,
            type="float32",
            source="Intel's specification: 56 cores at 2.0 GHz, two AVX-512 units (64 operations a cycle in float32), "
            "eight channels of DDR5-4800",
        ),
    )
}


def hardware(name: str) -> Hardware:
    """The machine of that name. Raises ArgumentError, naming those that are known."""
    if name not in HARDWARE:
        raise unknown("hardware", name, HARDWARE, fix="`--check` measures this machine instead.")
    return HARDWARE[name]
