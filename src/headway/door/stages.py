"""The stages a method may have. A method is a frozen dataclass that inherits the stages it needs and nothing else.

selectors (which keys) -> executor (kernel) -> editors (weights or output) -> observers (read only)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from headway.door.call import AttentionCall, Site
from headway.door.selection import Selection


class Stage:
    """What every stage can say: whether it acts at a site. The default is every site."""

    def acts_at(self, site: Site) -> bool:
        return True

    def prepare(self, sites: Sequence[Site]) -> None:
        """Called on attach with the sites of the host: the place to refuse a layer or head that is not there."""

    @property
    def title(self) -> str:
        return type(self).__name__


class Selector(Stage):
    """Chooses the keys that each query may read."""

    def select(self, call: AttentionCall) -> Selection:
        raise NotImplementedError


class Editor(Stage):
    """Changes attention: the tensors before it, the weights inside it, or the output after it.

    An editor overrides what it needs. Editing weights makes the site compute explicit weights block by block.
    `keeps_weights` is for an editor that uses that stage and still leaves the weights what q and k say."""

    keeps_weights = False

    def edit_call(self, call: AttentionCall) -> AttentionCall:
        return call

    def edit_weights(
        self,
        call: AttentionCall,
        weights: Float[Tensor, "batch heads rows keys"],
        rows: Int[Tensor, " rows"],
    ) -> Float[Tensor, "batch heads rows keys"]:
        return weights

    def edit_output(
        self,
        call: AttentionCall,
        output: Float[Tensor, "batch heads queries value_dim"],
        lse: Float[Tensor, "batch heads queries"] | None,
    ) -> Float[Tensor, "batch heads queries value_dim"]:
        return output

    @property
    def edits(self) -> frozenset[str]:
        """Which of "call", "weights", "output" this editor overrides."""
        kinds = {"call": "edit_call", "weights": "edit_weights", "output": "edit_output"}
        return frozenset(k for k, name in kinds.items() if getattr(type(self), name) is not getattr(Editor, name))


class Observer(Stage):
    """Reads calls and their outputs; never changes them. State belongs to one attachment: `start` clears it.
    `reads_weights` says that it takes weights from q and k, which an editor of weights would make untrue."""

    reads_weights = False

    def start(self) -> None:
        """Called once when the observer is attached."""

    def observe(
        self,
        call: AttentionCall,
        output: Float[Tensor, "batch heads queries value_dim"],
        lse: Float[Tensor, "batch heads queries"] | None = None,
    ) -> None:
        """Called after every attention operation. `lse` is the log-sum-exp of the rows where the kernel that ran gave
        it (natural log, learned sinks included), else None."""
        raise NotImplementedError

    def result(self) -> Any:
        raise NotImplementedError
