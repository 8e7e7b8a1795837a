"""Patterns of a running model: an observer for the door."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from headway.door.call import AttentionCall
from headway.door.rotary import site_frequencies
from headway.door.stages import Observer
from headway.kernels.rope import Layout
from headway.methods.long_context.tappa.profile import PatternProfile, average_profiles, profile_call


@dataclass(kw_only=True, eq=False)
class PatternObserver(Observer):
    """Collects a `PatternProfile` per site while it is attached; several sequences and forwards of a site are averaged.

    frequencies: rotary frequencies for all sites, a mapping from site name to frequencies (None: not rotated), or None
    for a host without RoPE; `PatternObserver.of(model)` finds them. layout: "half" or "interleaved". max_rows:
    attention rows read per sequence. max_lag: longest lag of the curves. Single decoding steps say nothing about time
    and are skipped once a site has a profile."""

    reads_weights = True
    on_text = True

    frequencies: Tensor | Mapping[str, Tensor | None] | None = None
    layout: Layout = "half"
    max_rows: int | None = 512
    max_lag: int = 128
    _profiles: dict[str, list[PatternProfile]] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def of(cls, model: nn.Module, *, max_rows: int | None = 512, max_lag: int = 128) -> PatternObserver:
        """An observer with the frequencies of this host, site by site, tried out by `site_frequencies`.

        To be called while nothing is attached to the model."""
        frequencies, layout = site_frequencies(model)
        return cls(frequencies=frequencies, layout=layout, max_rows=max_rows, max_lag=max_lag)

    def start(self) -> None:
        self._profiles.clear()

    def observe(self, call: AttentionCall, output: Tensor, lse: Tensor | None = None) -> None:
        if call.queries < 2 and call.site.name in self._profiles:
            return
        given = self.frequencies
        found = profile_call(
            call,
            frequencies=given.get(call.site.name) if isinstance(given, Mapping) else given,
            layout=self.layout,
            max_rows=self.max_rows,
            max_lag=self.max_lag,
        )
        self._profiles.setdefault(call.site.name, []).extend(found)

    def result(self) -> list[PatternProfile]:
        """One profile per site, in the order in which the host ran them."""
        return [average_profiles(profiles) for profiles in self._profiles.values()]
