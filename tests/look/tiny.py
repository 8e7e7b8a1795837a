"""A tiny random host with a byte-level tokenizer, for everything in `look` that needs no trained model."""

from __future__ import annotations

from typing import Any

import transformers as tf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn

from tests.door.hosts import DECODER, sharpen


def byte_tokenizer(bos: bool = False) -> Any:
    """One token per byte, with or without a beginning-of-sequence token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<pad>", "<bos>", "<eos>", *alphabet]
    inner = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    special = {"pad_token": "<pad>", "eos_token": "<eos>"} | ({"bos_token": "<bos>"} if bos else {})
    return tf.PreTrainedTokenizerFast(tokenizer_object=inner, **special)


def tiny_llama(**changes: Any) -> nn.Module:
    fields = DECODER | {"vocab_size": 259, "max_position_embeddings": 1024, "num_hidden_layers": 4} | changes
    return sharpen(tf.LlamaForCausalLM(tf.LlamaConfig(**fields)))


TEXT = (
    "The door is open. A reader looks at every head and asks what it does. Some heads look at the first token. "
    "Others copy what stood before. One looks back at a sentence that mattered. None of them knows its name. "
    "This is a short text with some sentences. It ends here. It goes on a little. Now it is done."
)
