"""Chosen heads: which may be tried, and the set that a search found, stored with the model it belongs to."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from headway.door.sites import inspect
from headway.errors import ArgumentError, HostError
from headway.files import write_atomically
from headway.hosts.fingerprint import Fingerprint, check_fingerprint, fingerprint
from headway.methods.sinks.act.editor import ACT, check_one_stack, in_tower

Head = tuple[int, int]
FORMAT = "headway act heads 1"
#: Fields of `ACT` that a head set stores: the heads are good at these.
SETTINGS = ("beta", "threshold", "tau", "alpha", "least_rows", "scope", "initial")


def candidate_heads(model: nn.Module, *, skip_first: int = 2, skip_last: int = 1) -> list[Head]:
    """Every (layer, query head) of a host's self-attention, without its first and last layers (the released search
    leaves out two and one of 32) and without towers that read pictures or sound. Runs one tiny forward."""
    usable = [row for row in inspect(model).rows if row.allows and row.kind == "self" and row.layer is not None]
    rows = [row for row in usable if not in_tower(row.site)]
    check_one_stack([row.site for row in rows])
    layers = sorted({row.layer for row in rows if row.layer is not None})
    if min(skip_first, skip_last) < 0 or skip_first + skip_last >= len(layers):
        raise ArgumentError(
            f"skip_first, skip_last: got {skip_first}, {skip_last} of {len(layers)} layers, expected to leave at least "
            "one. Skip fewer."
        )
    kept = layers[skip_first : len(layers) - skip_last]
    return sorted({(row.layer, head) for row in rows if row.layer in kept for head in range(row.heads or 0)})


@dataclass(frozen=True, kw_only=True)
class HeadSet:
    """Heads with the settings they were searched at and the fingerprint of their model. `notes` may hold anything that
    JSON can: gains, tasks, sizes."""

    heads: tuple[Head, ...]
    host: Fingerprint
    settings: Mapping[str, Any] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, act: ACT, **notes: Any) -> HeadSet:
        """The heads and settings of a stage, for this model."""
        settings = {name: getattr(act, name) for name in SETTINGS}
        return cls(heads=tuple(act.heads), host=fingerprint(model), settings=settings, notes=notes)

    def stage(self, model: nn.Module, **changes: Any) -> ACT:
        """The stage for this model. Raises HostError, naming the differences, for another model."""
        check_fingerprint(self.host, model, "heads")
        return ACT(**{"heads": self.heads, **self.settings, **changes})

    def save(self, path: str | Path) -> Path:
        """Writes JSON."""
        data = {"format": FORMAT, **asdict(self), "host": self.host.to_dict(), "heads": [list(h) for h in self.heads]}
        return write_atomically(Path(path), json.dumps(data, indent=1, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> HeadSet:
        """Reads what `save` wrote. Raises HostError for a file that is something else."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            if data["format"] != FORMAT:
                raise KeyError("format")
            return cls(
                heads=_pairs(data["heads"]),
                host=Fingerprint.from_dict(data["host"]),
                settings={name: data["settings"][name] for name in SETTINGS if name in data["settings"]},
                notes=data["notes"],
            )
        except OSError as error:
            raise HostError(f"heads: {path} cannot be read ({error.strerror}); check the path.") from error
        except (ValueError, KeyError, TypeError) as error:
            raise HostError(
                f"heads: {path} holds no head set ({error!r}), expected what HeadSet.save writes. Search again."
            ) from error


def _pairs(heads: Sequence[Sequence[int]]) -> tuple[Head, ...]:
    return tuple((int(layer), int(head)) for layer, head in heads)
