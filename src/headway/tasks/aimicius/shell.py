"""A shell that is not one: a few commands of a made-up machine, with fixed answers. Nothing is ever executed.

A command is split as a shell would, its options are checked against what the tool knows, and its output is made from
the machine's description. Pipes, redirections, substitutions and anything else that would need a real shell are
refused.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

#: Characters that would mean something to a real shell.
_SHELL = re.compile(r"[|&;<>`\n]|\$\(")

#: What the made-up machine holds.
NVIDIA = [
    {"index": "0", "name": "NVIDIA A100-SXM4-80GB", "memory.total": "81920 MiB", "memory.used": "1024 MiB",
     "temperature.gpu": "34", "power.draw": "61.20 W", "utilization.gpu": "0 %", "driver_version": "550.54.15"},
    {"index": "1", "name": "NVIDIA A100-SXM4-80GB", "memory.total": "81920 MiB", "memory.used": "40960 MiB",
     "temperature.gpu": "51", "power.draw": "243.75 W", "utilization.gpu": "87 %", "driver_version": "550.54.15"},
]  # fmt: skip
AMD = [
    {"temp": "41.0c", "power": "90.0W", "use": "3%", "vram": "65536 MB"},
    {"temp": "48.0c", "power": "188.0W", "use": "72%", "vram": "65536 MB"},
]


@dataclass(frozen=True)
class Ran:
    """What a command gave: whether it worked, and its output (or the reason)."""

    ok: bool
    output: str


@dataclass(frozen=True)
class Tool:
    """Options without and with a value (name -> pattern of the value), and what makes the output of them."""

    flags: frozenset[str] = frozenset()
    values: dict[str, str] = field(default_factory=dict)
    output: Callable[[dict[str, str], Sequence[str]], str | None] = lambda options, rest: ""
    operands: str | None = None


def run_command(command: str) -> Ran:
    """Runs a command line on the made-up machine."""
    line = command.strip()
    if _SHELL.search(line):
        return Ran(False, "pipes, redirections and substitutions are not simulated")
    try:
        words = shlex.split(line)
    except ValueError as error:
        return Ran(False, f"cannot be split: {error}")
    environment = re.compile(r"[A-Z_][A-Z0-9_]*=\S*")
    while words and environment.fullmatch(words[0]):
        words.pop(0)
    if not words or words[0].removeprefix("./") not in TOOLS:
        return Ran(False, f"{words[0] if words else 'nothing'}: command not found")
    name = words[0].removeprefix("./")
    parsed = _parse(TOOLS[name], words[1:])
    if isinstance(parsed, str):
        return Ran(False, f"{name}: {parsed}")
    output = TOOLS[name].output(*parsed)
    return Ran(False, f"{name}: bad arguments") if output is None else Ran(True, output)


def _parse(tool: Tool, words: Sequence[str]) -> tuple[dict[str, str], list[str]] | str:
    """Options by name and operands, or why they are wrong."""
    options: dict[str, str] = {}
    operands: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        name, joined, value = word.partition("=")
        if word in tool.flags:
            options[word] = ""
        elif name in tool.values:
            if not joined:
                if not rest:
                    return f"{name} needs a value"
                value = rest.pop(0)
            if not re.fullmatch(tool.values[name], value):
                return f"{name}: invalid value {value}"
            options[name] = value
        elif not word.startswith("-") and tool.operands and re.fullmatch(tool.operands, word):
            operands.append(word)
        else:
            return f"unknown argument {word}"
    return options, operands


def _nvidia_smi(options: dict[str, str], rest: Sequence[str]) -> str | None:
    which = options.get("-i", options.get("--id"))
    if which is not None and int(which) >= len(NVIDIA):
        return None
    gpus = NVIDIA if which is None else [NVIDIA[int(which)]]
    if tuple(rest) == ("topo",):
        return "\tGPU0\tGPU1\nGPU0\t X \tNV12\nGPU1\tNV12\t X " if "-m" in options else None
    if rest or "-m" in options:
        return None
    if "-L" in options:
        return "\n".join(f"GPU {gpu['index']}: {gpu['name']}" for gpu in gpus)
    asked = options.get("--query-gpu")
    if asked is None:
        return "\n".join(" | ".join(gpu.values()) for gpu in gpus)
    fields = [name.strip() for name in asked.split(",")]
    if "--format" not in options or any(name not in NVIDIA[0] for name in fields):
        return None
    heading = [] if "noheader" in options["--format"] else [", ".join(fields)]
    return "\n".join(heading + [", ".join(gpu[name] for name in fields) for gpu in gpus])


def _rocm_smi(options: dict[str, str], rest: Sequence[str]) -> str | None:
    shown = {"--showtemp": "temp", "--showpower": "power", "--showuse": "use", "--showmeminfo": "vram"}
    which = options.get("-d", options.get("--device"))
    if which is not None and int(which) >= len(AMD):
        return None
    numbers = range(len(AMD)) if which is None else [int(which)]
    names = [field for option, field in shown.items() if option in options] or ["temp", "power", "use"]
    return "\n".join(f"GPU[{number}]: " + " ".join(AMD[number][name] for name in names) for number in numbers)


def _collective(library: str, kind: str) -> Callable[[dict[str, str], Sequence[str]], str | None]:
    def output(options: dict[str, str], rest: Sequence[str]) -> str | None:
        first, last = (_bytes(options.get(name, "32M")) for name in ("-b", "-e"))
        factor = int(options.get("-f", "2"))
        if not 1 <= first <= last or factor < 2 or int(options.get("-g", "1")) > 8:
            return None
        lines = [f"# {library} {kind} on {options.get('-g', '1')} GPUs"]
        while first <= last:
            lines.append(f"{first} bytes {first / (first + 1_000_000) * 200:.1f} GB/s")
            first *= factor
        return "\n".join(lines)

    return output


def _bytes(text: str) -> int:
    return int(text.rstrip("KMG")) * 1024 ** " KMG".index(text[-1] if text[-1] in "KMG" else " ")


def _compile(options: dict[str, str], rest: Sequence[str]) -> str | None:
    if "--version" in options:
        return "Cuda compilation tools, release 12.4"
    return f"compiled {rest[0]} to {options.get('-o', 'a.out')}" if len(rest) == 1 else None


def _superbench(options: dict[str, str], rest: Sequence[str]) -> str | None:
    known = {("version",): "0.11.0", ("benchmark", "list"): "gemm-flops\nkernel-launch\nmem-bw\nnccl-bw\nrccl-bw"}
    if tuple(rest) == ("run",):
        return f"run {options['-c']} on {options.get('-f', 'localhost')}" if "-c" in options else None
    return known.get(tuple(rest))


_SIZE = r"\d{1,12}[KMG]?"
_COLLECTIVE = {"-b": _SIZE, "-e": _SIZE, "-f": r"\d{1,4}", "-g": r"[1-9]\d?", "-n": r"\d{1,9}", "-w": r"\d{1,9}"}
_KINDS = ("all_reduce", "all_gather", "reduce_scatter", "alltoall", "broadcast")

TOOLS: dict[str, Tool] = {
    "nvidia-smi": Tool(
        frozenset({"-L", "-m"}),
        {"-i": r"\d{1,3}", "--id": r"\d{1,3}", "--query-gpu": r"[\w.,\s]+", "--format": r"csv(,(noheader|nounits))*"},
        _nvidia_smi,
        r"topo",
    ),
    "rocm-smi": Tool(
        frozenset({"--showtemp", "--showpower", "--showuse"}),
        {"-d": r"\d{1,3}", "--device": r"\d{1,3}", "--showmeminfo": "vram"},
        _rocm_smi,
    ),
    "nvcc": Tool(
        frozenset({"--version", "-O3", "-lineinfo"}),
        {"-o": r"[\w./-]+", "-arch": r"(sm|compute)_\d+"},
        _compile,
        r"[\w./-]+\.cu",
    ),
    "sb": Tool(frozenset(), {"-c": r"[\w./-]+\.yaml", "-f": r"[\w./-]+"}, _superbench, r"version|benchmark|list|run"),
    "nproc": Tool(output=lambda options, rest: "96"),
    "hostname": Tool(output=lambda options, rest: "node-0"),
    **{f"{kind}_perf": Tool(values=_COLLECTIVE, output=_collective("nccl-tests", kind)) for kind in _KINDS},
    **{f"rccl-tests/{kind}_perf": Tool(values=_COLLECTIVE, output=_collective("rccl-tests", kind)) for kind in _KINDS},
}
