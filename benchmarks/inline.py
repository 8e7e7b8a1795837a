"""What InLine attention costs beside softmax attention: over growing grids, in a model, causal, and step by step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.harness import compare
from headway.kernels.inline import causal_feature_attention, feature_attention, inline_attention
from headway.methods.layers.inline import InlineMixer, local_residual
from headway.models import HeadwayViT, HeadwayViTConfig

HEADS, DIM = 3, 64
#: Grids of 14, 28, 56 and 112 patches a side.
GRIDS = (196, 784, 3136, 12544)


def _sides(tokens: int, batch: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, HEADS, tokens, DIM, generator=generator) for _ in range(3)]


def inline_grids() -> None:
    """Attention alone at four grids, against softmax attention by the fused kernel."""
    for tokens in GRIDS:
        sides = _sides(tokens)
        compare(
            f"inline_grid_{tokens}",
            lambda sides=sides: inline_attention(*sides),
            lambda sides=sides: scaled_dot_product_attention(*sides),
            labels=("InLine", "softmax (SDPA)"),
            repeats=5,
            memory=tokens == GRIDS[-1],
            settings={"tokens": tokens, "heads": HEADS, "dim": DIM},
        )


def inline_vit() -> None:
    """A classifier of four layers of width 192 on an image of 56 × 56 patches: forward and backward, InLine with its
    residual against softmax."""

    def step(mixer: str, options: dict[str, Any]) -> Callable[[], None]:
        torch.manual_seed(0)
        model = HeadwayViT(
            HeadwayViTConfig(
                image_size=224, patch_size=4, width=192, layers=4, heads=HEADS, mixer=mixer, mixer_options=options
            )
        )
        pixels, labels = torch.rand(1, 1, 224, 224), torch.zeros(1, dtype=torch.long)

        def run() -> None:
            model.zero_grad()
            model(pixel_values=pixels, labels=labels).loss.backward()

        return run

    compare(
        "inline_vit_3136",
        step("inline", {}),
        step("softmax", {}),
        labels=("InLine with residual", "softmax"),
        repeats=3,
        settings={"tokens": 3136, "width": 192, "layers": 4},
    )


def inline_causal() -> None:
    """The causal block form at 16,384 tokens, against causal softmax attention and against its own both-ways form."""
    sides = _sides(16384)
    settings = {"tokens": 16384, "heads": HEADS, "dim": DIM}
    compare(
        "inline_causal_softmax",
        lambda: causal_feature_attention(*sides),
        lambda: scaled_dot_product_attention(*sides, is_causal=True),
        labels=("InLine, causal blocks", "causal softmax (SDPA)"),
        repeats=3,
        settings=settings,
    )
    compare(
        "inline_causal_both_ways",
        lambda: causal_feature_attention(*sides),
        lambda: feature_attention(*sides),
        labels=("causal blocks", "both ways"),
        repeats=5,
        settings=settings,
    )


def inline_decode() -> None:
    """64 tokens decoded behind 32,768, against 64 behind 256: a step costs the same."""
    mixer = InlineMixer(192, heads=HEADS).eval()

    @torch.no_grad()
    def steps(tokens: int) -> Callable[[], None]:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(1, tokens, 192, generator=generator)
        _, start = mixer(x, state=mixer.init_state(1))

        def run() -> None:
            state = start
            with torch.no_grad():
                for token in range(64):
                    _, state = mixer(x[:, token : token + 1], state=state)

        return run

    compare(
        "inline_decode",
        steps(32768),
        steps(256),
        labels=("behind 32,768 tokens", "behind 256"),
        repeats=7,
        settings={"steps": 64, "width": 192, "bytes": mixer.init_state(1).bytes},
    )


def inline_residual() -> None:
    """The local residual of 8 images of 56 × 56 patches and 192 channels: one grouped convolution against nine shifted
    copies."""
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(8, 192, 56, 56, generator=generator)
    kernel = torch.randn(8, 192, 3, 3, generator=generator)
    compare(
        "inline_residual",
        lambda: local_residual(value, kernel),
        lambda: local_residual(value, kernel, mode="reference"),
        labels=("grouped convolution", "shifted copies"),
        repeats=5,
        settings={"batch": 8, "channels": 192, "grid": [56, 56]},
    )
