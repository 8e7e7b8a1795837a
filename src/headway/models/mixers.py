"""Mixers by name: imports the methods that define them, and builds the one of a layer."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from headway.door.mixer import Mixer, registered_mixer, registered_mixers
from headway.errors import unknown

_PACKAGE = "headway.methods.layers"


def mixers() -> dict[str, type[Mixer]]:
    """Every mixer there is, by slug."""
    package = importlib.import_module(_PACKAGE)
    for info in pkgutil.walk_packages(package.__path__, _PACKAGE + "."):
        importlib.import_module(info.name)
    return registered_mixers()


def reads_grid(slug: str) -> bool:
    """Whether a mixer uses the places of patches in an image."""
    return mixers().get(slug, Mixer).reads_grid


def build_mixer(slug: str, width: int, heads: int, layer: int, layers: int, options: dict[str, Any]) -> Mixer:
    """The mixer of one layer. Raises ArgumentError for a name or an option that it does not have."""
    if slug not in mixers():
        raise unknown(f"mixer of layer {layer}", slug, mixers())
    cls = registered_mixer(slug)
    for name in options:
        if name not in cls.option_names():
            raise unknown(f"mixer_options of {slug}", name, cls.option_names())
    return cls(width, heads=heads, layer=layer, layers=layers, **options)
