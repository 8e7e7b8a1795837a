"""What makes these modules `transformers` models: weights, initial values, and loading without a meta device."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from headway.door.mixer import Mixer
from headway.models.stack import initialise


class HeadwayPreTrainedModel(PreTrainedModel):
    _supports_sdpa = True
    _supports_flash_attn = False
    _no_split_modules = ["Block"]  # noqa: RUF012

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
