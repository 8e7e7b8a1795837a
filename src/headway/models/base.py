"""What makes these modules `transformers` models: weights, initial values, and loading without a meta device."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from headway.door import capture
from headway.door.mixer import Mixer
from headway.errors import ArgumentError
from headway.models.stack import initialise

log = logging.getLogger(__name__)
Output = TypeVar("Output")


class HeadwayPreTrainedModel(PreTrainedModel):
    _supports_sdpa = True
    _supports_flash_attn = False
    _no_split_modules = ["Block"]  # noqa: RUF012

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As of `transformers`. Raises ArgumentError for weights of other shapes than the config asks for."""
        try:
            return super().from_pretrained(*args, **kwargs)
        except RuntimeError as error:
            if "ignore_mismatched_sizes" not in str(error):
                raise
            raise ArgumentError(
                "config: asks for other shapes than the weights in the folder have (see the report above), expected "
                "those they were saved with. Heads are merged by headway.methods.layers.diffqkv: convert for a model "
                "of transformers, pool_heads for a single weight."
            ) from error

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Mixers set their own initial values when they are built."""

    def initialise_outside_mixers(self) -> None:
        """The initial values of everything that is no part of a mixer."""
        inside = {id(m) for mixer in self.modules() if isinstance(mixer, Mixer) for m in mixer.modules()}
        for module in self.modules():
            if id(module) not in inside:
                initialise(module, self.config.init_std)

    @classmethod
    def get_init_context(cls, *args: Any, **kwargs: Any) -> list[Any]:
        """Built with real tensors: tables that mixers compute when they are built are not part of a checkpoint."""
        contexts = super().get_init_context(*args, **kwargs)
        return [c for c in contexts if not isinstance(c, torch.device) and "meta" not in type(c).__name__.lower()]

    def _move_missing_keys_from_meta_to_device(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is on the meta device."""

    def with_attentions(self, run: Callable[[], Output]) -> tuple[Output, tuple[Tensor | None, ...]]:
        """What `run` returns, and the weights (batch, heads, queries, keys) with which each layer made its output; None
        for a layer that has none, or that attends more than once. They carry no gradient.

        Weights are read at the door, in the parallel form, whatever the mixer computes with: signed and of any sum for
        linear ones. All of them are kept, so memory grows with the square of the tokens, which is logged."""
        log.warning(
            "output_attentions: keeps batch × heads × tokens² weights of every layer; "
            "`headway.capture` can reduce them block by block"
        )
        with capture(self, what=("weights",), selftest=False) as captured:
            output = run()
        found = captured.result()
        weights: list[Tensor | None] = [None] * self.config.layers
        for name, site in found.sites.items():
            calls = found.calls(name)
            weights[site.layer] = calls[0]["weights"] if len(calls) == 1 else None
        if all(part is None for part in weights):
            raise ArgumentError(
                "output_attentions: got True, but no layer of this model has weights over keys. Leave it out."
            )
        return output, tuple(weights)
