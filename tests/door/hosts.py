"""Tiny random hosts of each kind the door must carry."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as tf
from torch import nn

DECODER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 90,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def sharpen(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights large enough that a wrong mask, scale or sink changes the output plainly."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 1.2 / parameter.shape[-1] ** 0.5, generator=generator)
            elif "sinks" in name:
                parameter.normal_(0, 1, generator=generator)
    return model.eval()


def decoder(family: str, **changes: Any) -> nn.Module:
    config = getattr(tf, f"{family}Config")(**(DECODER | changes))
    return sharpen(getattr(tf, f"{family}ForCausalLM")(config))


CAUSAL: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: decoder("Llama"),
    "llama eager": lambda: decoder("Llama", attn_implementation="eager"),
    "multi-query": lambda: decoder("Llama", num_key_value_heads=1),
    "qwen3": lambda: decoder("Qwen3"),
    "mistral sliding": lambda: decoder("Mistral", sliding_window=6),
    "gemma2 soft cap": lambda: decoder("Gemma2", sliding_window=6, attn_logit_softcapping=5.0, query_pre_attn_scalar=8),
    "gemma3 sliding": lambda: gemma3(),
    "gpt-oss learned sinks": lambda: decoder("GptOss", num_local_experts=2, num_experts_per_tok=1, sliding_window=6),
    "gpt2": lambda: sharpen(
        tf.GPT2LMHeadModel(tf.GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=90, n_positions=128))
    ),
}


def gemma3() -> nn.Module:
    return sharpen(
        tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**(DECODER | {"sliding_window": 6, "query_pre_attn_scalar": 8})))
    )


def tokens(batch: int = 2, length: int = 14, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 90, (batch, length), generator=torch.Generator().manual_seed(seed))


def bert() -> tuple[nn.Module, dict[str, Any]]:
    config = tf.BertConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=90
    )
    mask = torch.ones(2, 14, dtype=torch.long)
    mask[0, 10:] = 0
    return sharpen(tf.BertModel(config)), {"input_ids": tokens(), "attention_mask": mask}


def albert() -> tuple[nn.Module, dict[str, Any]]:
    config = tf.AlbertConfig(
        hidden_size=32,
        embedding_size=16,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        vocab_size=90,
    )
    return sharpen(tf.AlbertModel(config)), {"input_ids": tokens()}


def vit() -> tuple[nn.Module, dict[str, Any]]:
    config = tf.ViTConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=4
    )
    return sharpen(tf.ViTModel(config)), {
        "pixel_values": torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    }


def dinov2() -> tuple[nn.Module, dict[str, Any]]:
    config = tf.Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=28, patch_size=7)
    return sharpen(tf.Dinov2Model(config)), {
        "pixel_values": torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    }


def clip() -> tuple[nn.Module, dict[str, Any]]:
    tower = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "projection_dim": 16,
    }
    config = tf.CLIPConfig(
        text_config=tower | {"vocab_size": 90, "max_position_embeddings": 32, "eos_token_id": 2},
        vision_config=tower | {"image_size": 16, "patch_size": 4},
        projection_dim=16,
    )
    picture = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return sharpen(tf.CLIPModel(config)), {"input_ids": tokens(), "pixel_values": picture}


def whisper() -> tuple[nn.Module, dict[str, Any]]:
    config = tf.WhisperConfig(
        d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=48, decoder_ffn_dim=48, vocab_size=90, num_mel_bins=8, max_source_positions=20,
        max_target_positions=40, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    sound = torch.randn(2, 8, 40, generator=torch.Generator().manual_seed(0))
    return sharpen(tf.WhisperForConditionalGeneration(config)), {
        "input_features": sound,
        "decoder_input_ids": tokens(2, 7),
    }


def t5() -> tuple[nn.Module, dict[str, Any]]:
    config = tf.T5Config(
        d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=90, decoder_start_token_id=0
    )
    return sharpen(tf.T5ForConditionalGeneration(config)), {"input_ids": tokens(), "decoder_input_ids": tokens(2, 7)}


OTHERS: dict[str, Callable[[], tuple[nn.Module, dict[str, Any]]]] = {
    "bert": bert,
    "albert (one module, three layers)": albert,
    "vit": vit,
    "dinov2": dinov2,
    "clip": clip,
    "whisper (cross-attention)": whisper,
    "t5 (position bias)": t5,
}
