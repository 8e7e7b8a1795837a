"""A dedicated sink token: one more row of the embedding, put in front of every training sample, kept for ever (S = 1).

The paper trains models with such a token from the start; one sink then suffices. Its other way, the "zero sink", is the
softmax with one more in the denominator: `headway.use(model, ZeroSink())` while training and after it.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from headway.door.call import AttentionCall
from headway.door.stages import PHASES, Editor
from headway.errors import HostError


class ZeroSink(Editor):
    """w_ij = exp(s_ij) / (1 + Σ_j exp(s_ij)): as if every row saw one more key, with logit 0 and value 0. A host with
    learned sinks has its own denominator and is refused. Cache policies carry the sink along."""

    reads_parts = PHASES

    def edit_call(self, call: AttentionCall) -> AttentionCall:
        if call.sinks is not None:
            raise HostError(
                f"{call.site.name}: got a host with learned sinks, expected one without. Leave ZeroSink out."
            )
        return call.replace(sinks=call.query.new_zeros(call.heads))


def add_sink_token(model: Any, *, seed: int = 0) -> int:
    """Adds one token to a transformers model and returns its id. The new row starts as the mean of the others plus
    noise of a hundredth of their spread; `model.save_pretrained` and `from_pretrained` keep it."""
    table = model.get_input_embeddings()
    if not isinstance(table, nn.Embedding) or not hasattr(model, "resize_token_embeddings"):
        raise HostError(f"{type(model).__name__}: got a host without a token embedding to enlarge, expected a decoder.")
    token = table.num_embeddings
    model.resize_token_embeddings(token + 1, mean_resizing=False)
    generator = torch.Generator().manual_seed(seed)
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        weight = getattr(layer, "weight", None)
        if weight is not None and weight.shape[0] == token + 1:
            with torch.no_grad():
                noise = torch.randn(weight.shape[1], generator=generator).to(weight)
                weight[token] = weight[:token].mean(0) + 0.01 * weight[:token].std(0) * noise
    return token


def with_sink(ids: Int[Tensor, "batch tokens"], token: int) -> Int[Tensor, "batch tokens+1"]:
    """The samples with the sink token in front."""
    return torch.cat([ids.new_full((ids.shape[0], 1), token), ids], 1)
