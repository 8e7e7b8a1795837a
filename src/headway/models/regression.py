"""A stack of any mixers over sequences of numbers, as a `transformers` model: linear map in, linear map out."""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor, nn

from headway.errors import ArgumentError
from headway.kernels.norms import make_norm
from headway.models.base import HeadwayPreTrainedModel
from headway.models.config import HeadwayRegressionConfig
from headway.models.stack import Block


class HeadwayRegression(HeadwayPreTrainedModel):
    """Numbers (batch, tokens, inputs) to numbers (batch, tokens, outputs), causally: y = W_o norm(blocks(W_i x)).

    Trained by `headway.train.regression.regression_loss`, which asks for the last tokens of each sequence."""

    config_class = HeadwayRegressionConfig
    main_input_name = "numbers"

    def __init__(self, config: HeadwayRegressionConfig) -> None:
        super().__init__(config)
        self.embed = nn.Linear(config.inputs, config.width)
        self.layers = nn.ModuleList(Block(config, layer, causal=True) for layer in range(config.layers))
        self.norm = make_norm(config.norm, config.width)
        self.head = nn.Linear(config.width, config.outputs)
        self.initialise_outside_mixers()
        # A token has a few numbers of size one, not a row of a table: it enters at the size that blocks normalise.
        nn.init.normal_(self.embed.weight, std=config.inputs**-0.5)
        self.post_init()

    def forward(
        self,
        numbers: Float[Tensor, "batch tokens inputs"],
        attention_mask: Bool[Tensor, "batch tokens"] | None = None,
        mode: str = "block",
    ) -> Float[Tensor, "batch tokens outputs"]:
        """The outputs. Raises ArgumentError for tokens of another size."""
        if numbers.ndim != 3 or numbers.shape[2] != self.config.inputs:
            raise ArgumentError(
                f"numbers: got shape {tuple(numbers.shape)}, expected (batch, tokens, {self.config.inputs})."
            )
        x = self.embed(numbers)
        mask = None if attention_mask is None else attention_mask.bool()
        for block in self.layers:
            x, _ = block(x, mask=mask, mode=mode)
        return self.head(self.norm(x))
