"""What works on this machine, and why not."""

from __future__ import annotations

import importlib.util
import json
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from rich.console import Console
from rich.table import Table

from headway.errors import HeadwayError

#: Optional packages: import name -> (extra, what it is for).
OPTIONAL = {
    "gguf": ("smollm2", "reading the embedded language model once"),
    "accelerate": ("smollm2", "reading the embedded language model once"),
    "onnx": ("vision", "reading the embedded ViT once"),
    "pandas": ("frames", "Look.to_frame"),
}


def run(model: str | None, *, as_json: bool) -> None:
    """Prints the state of packages and embedded hosts; with a model, its attention sites."""
    found = examine()
    table = None
    if model is not None:
        from headway.door import inspect
        from headway.hosts import load

        host, _ = load(model)
        table = inspect(host)
        found["sites"] = {"host": table.host, "refused": table.refused, "rows": table.to_dicts()}
    console = Console()
    if as_json:
        console.file.write(json.dumps(found, indent=2) + "\n")
        return
    console.print(
        f"Python {found['python']}, torch {found['torch']}, transformers {found['transformers']}, {found['device']}"
    )
    shown = Table("what", "state", "fix")
    for row in found["checks"]:
        shown.add_row(row["what"], "[green]ok[/]" if row["ok"] else f"[yellow]{row['why']}[/]", row["fix"])
    console.print(shown)
    if table is not None:
        console.print(table)


def examine() -> dict[str, Any]:
    """Versions, device, and a row per package and embedded host: works, or why not and how to mend it."""
    import torch

    from headway.hosts import status

    device = (
        f"CUDA: {torch.cuda.get_device_name()}"
        if torch.cuda.is_available()
        else f"CPU, {torch.get_num_threads()} threads"
    )
    checks = [
        {
            "what": f"{package}, for {purpose}",
            "ok": (ok := importlib.util.find_spec(package) is not None),
            "why": "" if ok else "not installed",
            "fix": "" if ok else f"pip install 'headway[{extra}]'",
        }
        for package, (extra, purpose) in OPTIONAL.items()
    ]
    checks += [{"what": f"host {s.name}", "ok": s.available, "why": s.why_not, "fix": s.fix} for s in status()]
    checks.append(_registry())
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": _version("transformers"),
        "device": device,
        "checks": checks,
    }


def _registry() -> dict[str, Any]:
    """Whether the door can enter a host of the installed transformers."""
    try:
        from headway.door import inspect
        from headway.hosts.tiny import tiny_host

        model, example = tiny_host("llama")
        refused = inspect(model, example=example).refused
    except (HeadwayError, ImportError) as error:
        refused = str(error)
    fix = "" if not refused else "pip install 'transformers>=5.20'"
    return {"what": "the door into transformers", "ok": not refused, "why": refused, "fix": fix}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
