"""The stages a method may have. A method is a frozen dataclass that inherits the stages it needs and nothing else.

    cache policy (what is stored) -> selectors (which keys) -> executor (kernel) -> editors -> observers (read only)

A driver stands outside this line: it wraps the host's `generate`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn

from headway.door.call import AttentionCall, Site
from headway.door.selection import Selection

PHASES = frozenset({"prefill", "decode"})


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
    """Chooses the keys that each query may read.

    `phases` are those of a forward ("prefill", "decode") in which the selector is asked; in others the site is dense,
    by the host's own kernel. A selector that returns `Dense()` has the same effect for one call. `approximates` says
    that the selection stands for dense attention and may give way to it where that is as fast (the report then says
    "native: dense is as fast"); a selector that is part of a model's definition leaves it False. `looks_ahead` is the
    reason why later tokens of a forward change which keys earlier rows read, where they do; no row may ever read a
    later key."""

    phases: frozenset[str] = PHASES
    approximates: bool = False
    looks_ahead: str = ""

    def select(self, call: AttentionCall) -> Selection:
        raise NotImplementedError


class Editor(Stage):
    """Changes attention: the tensors before it, the weights inside it, or the output after it.

    An editor overrides what it needs. Editing weights makes the site compute explicit weights block by block.
    `keeps_weights` is for an editor that uses that stage and still leaves the weights what q and k say.

    Beside a cache policy an editor meets calls that are not the host's: `edit_call` and `edit_output` see the new keys
    alone, as what was stored before is the policy's, and `edit_weights` calls over some of a site's heads
    (`AttentionCall.of_heads`) with keys from scattered positions (`key_at`). `reads_parts` are the phases in which
    every stage of this editor is right on such calls; beside a policy that narrows another phase it is refused."""

    keeps_weights = False
    reads_parts: frozenset[str] = frozenset()

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

    def heads_at(self, site: Site) -> Sequence[int] | None:
        """The heads whose weights this editor may change at a site; None: all of them.

        Where every editor of weights at a site names its heads, the other heads run by the fused kernel and
        `edit_weights` gets a call over the named heads alone, which `AttentionCall.of_heads` lists."""
        return None

    @property
    def edits(self) -> frozenset[str]:
        """Which of "call", "weights", "output" this editor overrides."""
        kinds = {"call": "edit_call", "weights": "edit_weights", "output": "edit_output"}
        return frozenset(k for k, name in kinds.items() if getattr(type(self), name) is not getattr(Editor, name))


class CachePolicy(Stage):
    """Decides what is kept of past keys and values, and what attention reads of it.

    The host's cache is replaced by `make_cache(model)` at the first forward that would use one; its state belongs to
    one request. `narrows` are the phases in which `read` may return calls of its own; a selector that acts in the same
    phase at the same site is refused. A policy acts on a whole model: only one may be attached. `by_forward` is the
    reason why a forward of several tokens leaves other keys behind than the same tokens one by one, where it does:
    assisted decoding, which reads drafts that way, is then refused."""

    narrows: frozenset[str] = PHASES
    by_forward: str = ""

    @property
    def moves_keys(self) -> bool:
        """Whether keys are read at other positions than the text's, so that logits are not dense attention's."""
        return False

    def make_cache(self, model: nn.Module) -> Any:
        """An empty cache for one request: a `headway.door.caches.PolicyCache`."""
        raise NotImplementedError

    def enter(self, cache: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        """The keyword inputs of the host's next forward, where they must differ (positions, say)."""
        return inputs

    def read(self, call: AttentionCall) -> Sequence[AttentionCall] | None:
        """The calls to run in place of this one, or None to leave it as it is.

        `call` holds the keys and values that the cache's `update` returned; `call.forward.cache` is the cache (None
        when the host runs without one). Calls over disjoint heads (`of_heads`) or query rows (`of_rows`) are put
        together; calls over the same heads and rows are parts of one softmax and are merged by their log-sum-exp. Masks
        must hide padding and the future."""
        return None

    def settle(self, cache: Any) -> None:
        """Called after each forward of the host: the place to evict."""


class Driver(Stage):
    """Wraps the host's `generate`: while it is attached, `model.generate(...)` calls the driver."""

    def generate(self, model: nn.Module, generate: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """`generate` is the host's own method."""
        raise NotImplementedError


class Observer(Stage):
    """Reads calls and their outputs; never changes them. State belongs to one attachment: `start` clears it.
    `reads_weights` says that it takes weights from q and k, which an editor of weights would make untrue; `reads_keys`
    that it takes keys or values of whole sequences, of which a cache policy's calls hold a part. Both are refused
    beside a policy. `on_text` asks for the text alone: keys in front of it are left out, so that rows sum to one less
    their share, and a layer that reads a text in pieces gives one call over all of it, once the last piece ran."""

    reads_weights = False
    reads_keys = False
    on_text = False

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
