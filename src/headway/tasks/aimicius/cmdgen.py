"""CMDGen: a question to one shell command.

    cmd       similarity of the commands            output    similarity of what both give on the made-up machine
    calibration   1 where cmd or output reaches the threshold
    exact     the same command up to white space    success   it runs and gives the output of the gold command
    accuracy  exact or success

Metrics of Sigma, arXiv 2501.13629, whose thresholds are not stated: 0.9 here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from headway.errors import ArgumentError
from headway.tasks.aimicius.shell import run_command
from headway.tasks.aimicius.similarity import Similarity, ngram_similarity

THRESHOLD = 0.9
GROUPS = ("NCCL", "nvidia-smi", "NVCC", "RCCL", "rocm-smi", "Superbench", "other")


@dataclass(frozen=True)
class Command:
    """A question of one of the groups, and its command."""

    group: str
    request: str
    command: str


_SAMPLES = (
    Command("nvidia-smi", "List the GPUs of this machine by name.", "nvidia-smi -L"),
    Command(
        "nvidia-smi",
        "Show the used and the total memory of every NVIDIA GPU as CSV.",
        "nvidia-smi --query-gpu=memory.used,memory.total --format=csv",
    ),
    Command(
        "nvidia-smi",
        "What is the temperature of GPU 1? Print the number without a header.",
        "nvidia-smi -i 1 --query-gpu=temperature.gpu --format=csv,noheader",
    ),
    Command("nvidia-smi", "How are the GPUs connected? Print the matrix.", "nvidia-smi topo -m"),
    Command(
        "NCCL",
        "Measure all-reduce from 8 bytes to 128 MB on 8 GPUs, doubling the size.",
        "./all_reduce_perf -b 8 -e 128M -f 2 -g 8",
    ),
    Command("NCCL", "Measure all-gather at 1 GB on 4 GPUs.", "./all_gather_perf -b 1G -e 1G -g 4"),
    Command(
        "NVCC", "Compile reduce.cu for compute capability 8.0 into reduce.", "nvcc -arch=sm_80 -o reduce reduce.cu"
    ),
    Command("NVCC", "Which version of the CUDA compiler is installed?", "nvcc --version"),
    Command(
        "RCCL",
        "Measure RCCL reduce-scatter between 1 MB and 16 MB on 2 GPUs, four times the size each step.",
        "rccl-tests/reduce_scatter_perf -b 1M -e 16M -f 4 -g 2",
    ),
    Command("rocm-smi", "How hot are the AMD GPUs?", "rocm-smi --showtemp"),
    Command("rocm-smi", "Show power draw and use of AMD GPU 1.", "rocm-smi -d 1 --showpower --showuse"),
    Command("rocm-smi", "How much VRAM have the AMD GPUs?", "rocm-smi --showmeminfo vram"),
    Command("Superbench", "Which benchmarks does SuperBench offer?", "sb benchmark list"),
    Command("Superbench", "Run SuperBench with the settings in node.yaml.", "sb run -c node.yaml"),
    Command("other", "How many processors has this machine?", "nproc"),
)


def samples() -> tuple[Command, ...]:
    return _SAMPLES


def question(sample: Command, answers: Sequence[str] = ()) -> str:
    return f"{sample.request}\nAnswer with one shell command and nothing else."


def gold(sample: Command) -> tuple[str]:
    return (sample.command,)


def score(
    sample: Command,
    answers: Sequence[str],
    *,
    similarity: Similarity = ngram_similarity,
    threshold: float = THRESHOLD,
) -> dict[str, float]:
    """All metrics of one answer. A code fence around a command is taken off; of several lines the first counts."""
    if not 0 < threshold <= 1:
        raise ArgumentError(f"threshold: got {threshold}, expected a similarity in (0, 1].")
    command = command_in(answers[0])
    wanted, got = run_command(sample.command), run_command(command)
    alike = similarity(command, sample.command)
    output = similarity(got.output, wanted.output) if got.ok else 0.0
    exact = command.split() == sample.command.split()
    success = got.ok and got.output == wanted.output
    return {
        "cmd": 1.0 if exact else alike,
        "output": 1.0 if success else output,
        "calibration": float(exact or success or alike >= threshold or output >= threshold),
        "exact": float(exact),
        "success": float(success),
        "accuracy": float(exact or success),
    }


def command_in(text: str) -> str:
    """The command of an answer: the first line of its code block, or of itself."""
    fenced = re.search(r"```[\w-]*\n(.*?)```", text, re.DOTALL)
    lines = (fenced.group(1) if fenced else text.strip().strip("`")).strip().splitlines()
    return lines[0].strip().removeprefix("$ ") if lines else ""
