"""A causal language model of any mixers, as a `transformers` model that generates, saves and loads."""

from __future__ import annotations

import math
from typing import Any

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from headway.door.mixer import Mixer, State
from headway.errors import ArgumentError
from headway.kernels.norms import make_norm
from headway.models.base import HeadwayPreTrainedModel
from headway.models.cache import HeadwayCache
from headway.models.config import HeadwayConfig
from headway.models.stack import Block


class HeadwayForCausalLM(HeadwayPreTrainedModel, GenerationMixin):
    """Token ids to next-token logits.

    `forward` takes the usual fields of a language model. `resets` (batch, tokens) marks the first token of each
    document in packed rows; `mode` chooses the form of the mixers ("block", "reference", "step")."""

    config_class = HeadwayConfig
    _tied_weights_keys = {"lm_head.weight": "embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: HeadwayConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(Block(config, layer, causal=True) for layer in range(config.layers))
        self.norm = make_norm(config.norm, config.width)
        self.lm_head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.embed_in = self.embed_out = None
        if config.embed_projection:
            self.embed_in, self.embed_out = (nn.Linear(config.width, config.width, bias=False) for _ in range(2))
        self.initialise_outside_mixers()
        for projection in (self.embed_in, self.embed_out):
            if projection is not None:
                # Orthogonal, so that it starts as a rotation and changes no norm.
                nn.init.orthogonal_(projection.weight)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        if not isinstance(value, nn.Embedding):
            raise ArgumentError(f"value: got {type(value).__name__}, expected an nn.Embedding.")
        self.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    @property
    def mixers(self) -> list[Mixer]:
        """The mixer of each layer."""
        return [block.mixer for block in self.layers if isinstance(block, Block)]

    def make_cache(self, batch: int) -> HeadwayCache:
        """An empty cache for a batch of sequences."""
        weight = self.embed_tokens.weight
        return HeadwayCache(self.mixers, batch, device=weight.device, dtype=weight.dtype)

    def forward(
        self,
        input_ids: Int[Tensor, "batch tokens"] | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: HeadwayCache | None = None,
        inputs_embeds: Float[Tensor, "batch tokens width"] | None = None,
        labels: Int[Tensor, "batch tokens"] | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        resets: Bool[Tensor, "batch tokens"] | None = None,
        mode: str = "block",
        output_attentions: bool | None = None,
        **further: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        if output_attentions:
            if past_key_values is not None and past_key_values.length:
                raise ArgumentError(
                    f"output_attentions: got True behind {past_key_values.length} cached tokens, expected a whole "
                    "sequence: states need not hold the keys of the past. Leave the cache out."
                )
            output, attentions = self.with_attentions(
                lambda: self(
                    input_ids=input_ids,
                    attention_mask=attention_mask,
                    past_key_values=past_key_values,
                    inputs_embeds=inputs_embeds,
                    labels=labels,
                    use_cache=use_cache,
                    logits_to_keep=logits_to_keep,
                    output_hidden_states=output_hidden_states,
                    resets=resets,
                    mode=mode,
                )
            )
            output.attentions = attentions
            return output.to_tuple() if return_dict is False else output
        if (input_ids is None) == (inputs_embeds is None):
            raise ArgumentError("input_ids, inputs_embeds: got both or none, expected exactly one of them.")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if self.config.embed_scale:
            x = x * math.sqrt(self.config.width)
        if self.embed_in is not None:
            x = self.embed_in(x)
        if past_key_values is None and use_cache:
            past_key_values = self.make_cache(x.shape[0])
        if past_key_values is not None and not isinstance(past_key_values, HeadwayCache):
            raise ArgumentError(
                f"past_key_values: got {type(past_key_values).__name__}, expected a HeadwayCache. Use "
                "model.make_cache(batch), or leave it out."
            )
        mask = real_tokens(attention_mask, x.shape[1], 0 if past_key_values is None else past_key_values.length)
        states = [None] * len(self.layers) if past_key_values is None else past_key_values.states
        hidden: list[Tensor] = []
        after: list[State | None] = []
        if past_key_values is not None:
            # Before the layers run: the door asks the cache how many keys there are, those of this call with them.
            past_key_values.length += x.shape[1]
        for block, state in zip(self.layers, states, strict=True):
            hidden.append(x)
            x, state = block(x, mask=mask, resets=resets, state=state, mode=mode)
            after.append(state)
        if past_key_values is not None:
            past_key_values.states = [state for state in after if state is not None]
        x = self.norm(x)
        hidden.append(x)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else slice(None)
        x = x[:, logits_to_keep if isinstance(logits_to_keep, Tensor) else kept]
        logits = self.lm_head(x if self.embed_out is None else self.embed_out(x))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size)
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=tuple(hidden) if output_hidden_states else None,
        )
        return output.to_tuple() if return_dict is False else output

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> Any:
        """One cache of mixer states for the beams or sequences that `generate` asks for."""
        if generation_config.cache_implementation is not None:
            raise ArgumentError(
                f"cache_implementation: got {generation_config.cache_implementation!r}, expected none: these models "
                "have one kind of cache, the states of their mixers. Leave it out."
            )
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache:
            copies = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
            model_kwargs["past_key_values"] = self.make_cache(batch_size * copies)


def real_tokens(attention_mask: Tensor | None, tokens: int, past: int) -> Bool[Tensor, "batch tokens"] | None:
    """The tokens of this call that are not padding; None where none is. Raises ArgumentError for masks of other shapes
    than (batch, tokens so far) or (batch, tokens)."""
    if attention_mask is None:
        return None
    if attention_mask.ndim != 2 or attention_mask.shape[1] not in (tokens, past + tokens):
        so_far = f" or (batch, {past + tokens})" if past else ""
        raise ArgumentError(
            f"attention_mask: got shape {tuple(attention_mask.shape)}, expected (batch, {tokens}){so_far} of zeros and "
            "ones. Documents in packed rows are told by `resets`."
        )
    mask = attention_mask[:, -tokens:].bool()
    return None if bool(mask.all()) else mask
