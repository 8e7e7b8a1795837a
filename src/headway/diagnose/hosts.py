"""What a diagnosis asks of a model before any work: that it reads text, or that it continues it."""

from __future__ import annotations

from typing import Any

from headway.errors import HostError


def check_reads_text(host: Any, tokenizer: Any) -> None:
    """Raises HostError for a model without a text tokenizer (of pictures, sounds, or several at once)."""
    # An image processor is callable too, but knows no tokens.
    if not callable(tokenizer) or not hasattr(tokenizer, "decode") or hasattr(tokenizer, "image_processor"):
        raise HostError(
            f"model: got {type(host).__name__} with {type(tokenizer).__name__}, expected a model of text with its "
            "tokenizer. Choose one, such as smollm2 or minilm."
        )


def check_continues_text(host: Any, tokenizer: Any) -> None:
    """Raises HostError unless a model reads text and predicts the token behind it, without an encoder of its own."""
    check_reads_text(host, tokenizer)
    config: Any = getattr(host, "config", None)
    can = getattr(host, "can_generate", None)
    if not callable(can) or not can() or getattr(config, "is_encoder_decoder", False):
        raise HostError(
            f"model: got {type(host).__name__}, which does not continue a text token by token, expected a causal "
            "language model. Choose one, such as smollm2."
        )
