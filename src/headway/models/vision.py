"""An image classifier of any mixers that read both ways, as a `transformers` model."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.modeling_outputs import ImageClassifierOutput

from headway.errors import missing_extra
from headway.kernels.norms import make_norm
from headway.models.base import HeadwayPreTrainedModel
from headway.models.config import HeadwayViTConfig
from headway.models.stack import Block


def image_processor(config: HeadwayViTConfig) -> Any:
    """What prepares images for a classifier that was trained on pixels in [0, 1]: resized to its size, divided by 255.

    Grey images stay of one channel (PIL's mode "L"), so pictures for a model of one channel are to be converted to it.
    Raises MissingExtraError where pillow is not installed."""
    from transformers.utils import is_vision_available

    if not is_vision_available():
        raise missing_extra("pillow", "vision", "preparing images")
    from transformers import ViTImageProcessorPil

    size = config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    return ViTImageProcessorPil(
        size={"height": height, "width": width}, do_normalize=False, do_convert_rgb=config.num_channels == 3
    )


class HeadwayViT(HeadwayPreTrainedModel):
    """Pixels (batch, channels, height, width) to class logits."""

    config_class = HeadwayViTConfig
    main_input_name = "pixel_values"

    def __init__(self, config: HeadwayViTConfig) -> None:
        super().__init__(config)
        patch = config.patch_size
        self.patches = nn.Conv2d(config.num_channels, config.width, kernel_size=patch, stride=patch)
        rows, columns = config.grid
        extra = int(config.cls_token)
        self.cls = nn.Parameter(torch.zeros(1, 1, config.width)) if config.cls_token else None
        self.places = nn.Parameter(torch.randn(1, rows * columns + extra, config.width) * config.init_std)
        self.layers = nn.ModuleList(Block(config, layer, causal=False, prefix=extra) for layer in range(config.layers))
        self.norm = make_norm(config.norm, config.width)
        self.head = nn.Linear(config.width, config.classes)
        self.initialise_outside_mixers()
        self.post_init()

    def forward(
        self,
        pixel_values: Float[Tensor, "batch channels height width"],
        labels: Int[Tensor, " batch"] | None = None,
        return_dict: bool | None = None,
        output_hidden_states: bool | None = None,
        mode: str = "block",
        output_attentions: bool | None = None,
        **further: Any,
    ) -> ImageClassifierOutput | tuple[Any, ...]:
        if output_attentions:
            output, attentions = self.with_attentions(
                lambda: self(pixel_values, labels=labels, output_hidden_states=output_hidden_states, mode=mode)
            )
            output.attentions = attentions
            return output.to_tuple() if return_dict is False else output
        x = self.patches(pixel_values).flatten(2).transpose(1, 2)
        if self.cls is not None:
            x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1)
        x = x + self.places
        hidden = [x]
        for block in self.layers:
            x, _ = block(x, mode=mode, grid=self.config.grid)
            hidden.append(x)
        x = self.norm(x)
        logits = self.head(x[:, 0] if self.cls is not None else x.mean(1))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        output = ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=tuple(hidden) if output_hidden_states else None
        )
        return output.to_tuple() if return_dict is False else output
