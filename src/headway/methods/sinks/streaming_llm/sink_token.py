"""A dedicated sink token: one more row of the embedding, put in front of every training sample, kept for ever (S = 1).

The paper trains models with such a token from the start; one sink then suffices. A tokenizer can carry it: texts then
begin with it of themselves, also after both were saved and loaded. The paper's other way, the "zero sink", is the
softmax with one more in the denominator: `headway.use(model, ZeroSink())` while training and after it.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from headway.door.call import AttentionCall
from headway.door.stages import PHASES, Editor
from headway.errors import ArgumentError, HostError

#: How the token is written in a tokenizer.
SINK = "<|sink|>"


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


def add_sink_token(model: Any, tokenizer: Any = None, *, seed: int = 0) -> int:
    """Adds one token to a transformers model and returns its id. Its row starts as the mean of the others plus noise of
    a hundredth of their spread; `model.save_pretrained` and `from_pretrained` keep it.

    `tokenizer`, where given, gets it as the special token SINK in front of every text that is tokenized with special
    tokens; `tokenizer.save_pretrained` keeps both, and `sink_token_of` finds the id again. The id is then the next of
    the tokenizer, which may be a row that the model keeps in reserve. Raises HostError for a host without a token
    embedding to enlarge, ArgumentError for a tokenizer that has a sink or cannot be given one."""
    table = model.get_input_embeddings()
    if not isinstance(table, nn.Embedding) or not hasattr(model, "resize_token_embeddings"):
        raise HostError(f"{type(model).__name__}: got a host without a token embedding to enlarge, expected a decoder.")
    token = table.num_embeddings if tokenizer is None else _put_in_front(tokenizer)
    if token >= table.num_embeddings:
        model.resize_token_embeddings(token + 1, mean_resizing=False)
    generator = torch.Generator().manual_seed(seed)
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        weight = getattr(layer, "weight", None)
        if weight is not None and weight.shape[0] > token:
            with torch.no_grad():
                noise = torch.randn(weight.shape[1], generator=generator).to(weight)
                weight[token] = weight[:token].mean(0) + 0.01 * weight[:token].std(0) * noise
    return token


def sink_token_of(tokenizer: Any) -> int:
    """The id of the sink token of a tokenizer that `add_sink_token` was given, now or before it was saved. Raises
    ArgumentError where there is none."""
    found = tokenizer.get_added_vocab().get(SINK)
    if found is None:
        raise ArgumentError(
            f"tokenizer: got {type(tokenizer).__name__} without the token {SINK}, expected one that "
            "add_sink_token(model, tokenizer) was given."
        )
    return int(found)


def with_sink(ids: Int[Tensor, "batch tokens"], token: int) -> Int[Tensor, "batch tokens+1"]:
    """The samples with the sink token in front."""
    return torch.cat([ids.new_full((ids.shape[0], 1), token), ids], 1)


def _put_in_front(tokenizer: Any) -> int:
    """Adds SINK to a tokenizer, and to what it puts around every text."""
    from tokenizers import AddedToken, processors

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ArgumentError(
            f"tokenizer: got {type(tokenizer).__name__}, expected one of the tokenizers library, which can put a token "
            "in front of every text. Add the token without a tokenizer and use with_sink."
        )
    if SINK in tokenizer.get_vocab():
        raise ArgumentError(f"tokenizer: got one that has the token {SINK}, expected one without. Use sink_token_of.")
    tokenizer.add_tokens([AddedToken(SINK, special=True, normalized=False)], special_tokens=True)
    token = int(tokenizer.convert_tokens_to_ids(SINK))
    front = processors.TemplateProcessing(
        single=f"{SINK}:0 $A:0", pair=f"{SINK}:0 $A:0 $B:1", special_tokens=[(SINK, token)]
    )
    before = backend.post_processor
    backend.post_processor = front if before is None else processors.Sequence([before, front])
    return token
