"""Towers: where a two-tower model keeps the residual stream that its embedding is read from.

A tower is a stack of pre-norm blocks; its embedding is P · LN(z), with z the stream at one token after the last block:
the class token of an image tower, the end token of a text tower. Supported are the image and text towers of CLIP in
transformers (separate q, k and v projections) and the DINOv2 image encoder, whose blocks scale what they write.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from headway.door.call import AttentionCall, Site
from headway.door.stages import Editor
from headway.errors import ArgumentError, HostError, unknown

SUPPORTED = (
    "CLIPModel (image and text tower), CLIPVisionModelWithProjection, CLIPTextModelWithProjection, Dinov2Model, "
    "Dinov2WithRegistersModel"
)


@dataclass(frozen=True)
class Tower:
    """One tower of one model.

    `blocks` are the module paths of its layers; `outputs` the output projections and `scales` what multiplies what each
    attention writes (None for one); `first` is the block whose input is the first stage; `mlps` are the modules whose
    outputs are the MLP stages. `embed` runs the host and gives its embeddings before they are normalised."""

    model: nn.Module
    kind: str
    blocks: tuple[str, ...]
    heads: int
    head_dim: int
    first: nn.Module
    outputs: tuple[nn.Linear, ...]
    scales: tuple[Tensor | None, ...]
    mlps: tuple[nn.Module, ...]
    norm: nn.LayerNorm
    projection: nn.Linear | None
    embed: Callable[[Any], Float[Tensor, "batch joint"]]
    positions: Callable[[Any], Int[Tensor, " batch"]]

    @property
    def layers(self) -> int:
        return len(self.outputs)

    @property
    def sites(self) -> list[str]:
        """Patterns of the tower's attention sites."""
        return [f"{path}.*" for path in self.blocks]

    def layer_of(self, site: Site) -> int | None:
        """The layer that a site belongs to, counted in this tower; the door counts through both towers of a host."""
        return next((i for i, path in enumerate(self.blocks) if site.name.startswith(f"{path}.")), None)

    def check_heads(self, heads: Any) -> list[tuple[int, int]]:
        """(layer, head) pairs, both counted from 0. Raises ArgumentError for one that does not exist."""
        pairs = sorted({(int(layer), int(head)) for layer, head in heads})
        for layer, head in pairs:
            if not (0 <= layer < self.layers and 0 <= head < self.heads):
                raise ArgumentError(
                    f"heads: got ({layer}, {head}), expected layer 0..{self.layers - 1} and head 0..{self.heads - 1} "
                    f"of the {self.kind} tower; layers and heads count from 0."
                )
        return pairs

    def check_layers(self, layers: Any) -> list[int]:
        chosen = sorted({int(layer) for layer in layers})
        for layer in chosen:
            if not 0 <= layer < self.layers:
                raise ArgumentError(
                    f"layers: got {layer}, expected 0..{self.layers - 1} of the {self.kind} tower; layers count from 0."
                )
        if not chosen:
            raise ArgumentError("layers: got none, expected at least one.")
        return chosen


@dataclass(frozen=True, kw_only=True, eq=False)
class TowerGate(Editor):
    """Multiplies the output of heads of one tower by a factor: 1 is the identity, 0 removes the head.

    `gates` maps (layer, head), counted in the tower, to its factor."""

    part: Tower
    gates: Mapping[tuple[int, int], float]

    def acts_at(self, site: Site) -> bool:
        return any(layer == self.part.layer_of(site) for layer, _ in self.gates)

    def edit_output(
        self,
        call: AttentionCall,
        output: Float[Tensor, "batch heads queries value_dim"],
        lse: Float[Tensor, "batch heads queries"] | None,
    ) -> Float[Tensor, "batch heads queries value_dim"]:
        factor = torch.ones(call.heads, dtype=output.dtype, device=output.device)
        for (layer, head), gate in self.gates.items():
            if layer == self.part.layer_of(call.site):
                factor[head] = gate
        return output * factor.view(1, -1, 1, 1)


def tower(model: nn.Module, kind: str = "image") -> Tower:
    """The image or text tower of a model. Raises HostError for a layout without a class or end token to read."""
    if kind not in ("image", "text"):
        raise unknown("kind", kind, ("image", "text"))
    name = type(model).__name__
    if name == "Dinov2Model" or name == "Dinov2WithRegistersModel":
        if kind == "text":
            raise HostError(f"model: got {name}, which has no text tower; expected one of {SUPPORTED}.")
        return _dinov2(model)
    part = getattr(model, "vision_model" if kind == "image" else "text_model", None)
    if part is None or not hasattr(getattr(part, "encoder", None), "layers"):
        raise HostError(_refusal(model, kind))
    if getattr(part, "use_head", False) or hasattr(part, "head"):
        raise HostError(_refusal(model, kind, "its embedding is pooled by attention over all patches"))
    norm = getattr(part, "post_layernorm" if kind == "image" else "final_layer_norm", None)
    projection = getattr(model, "visual_projection" if kind == "image" else "text_projection", None)
    first = part.encoder.layers[0]
    if not name.startswith("CLIP") or not isinstance(norm, nn.LayerNorm) or not hasattr(first, "self_attn"):
        raise HostError(_refusal(model, kind))
    blocks = list(part.encoder.layers)
    _check_activation(model, part.config, blocks, kind)
    return Tower(
        model=model,
        kind=kind,
        blocks=_paths(model, blocks),
        heads=first.self_attn.num_heads,
        head_dim=first.self_attn.head_dim,
        first=first,
        outputs=tuple(block.self_attn.out_proj for block in blocks),
        scales=(None,) * len(blocks),
        mlps=tuple(block.mlp for block in blocks),
        norm=norm,
        projection=projection,
        embed=_clip_image(model) if kind == "image" else _clip_text(model),
        positions=_class_token if kind == "image" else _end_token(part),
    )


def _check_activation(model: Any, config: Any, blocks: Sequence[Any], kind: str) -> None:
    """OpenAI's weights were trained with QuickGELU, most others with GELU. The parts of an embedding add up under
    either, so a reconstruction does not tell that the wrong one runs; the configuration and the name do."""
    from transformers.activations import ACT2FN

    stated = str(config.hidden_act)
    wanted = type(ACT2FN[stated])
    for layer, block in enumerate(blocks):
        found = type(block.mlp.activation_fn)
        if found is not wanted:
            raise HostError(
                f"model: layer {layer} of the {kind} tower runs {found.__name__}, but its configuration says "
                f"{stated!r} ({wanted.__name__}), so its embeddings are not those that were trained. Load it again "
                "with one hidden_act."
            )
    name = str(getattr(model, "name_or_path", "") or getattr(model.config, "_name_or_path", ""))
    if name.startswith("openai/clip") and stated != "quick_gelu":
        raise HostError(
            f"model: {name} was trained with quick_gelu, but the {kind} tower is configured with {stated!r}, so its "
            "embeddings are not those that were trained. Set hidden_act to quick_gelu in its configuration."
        )


def _refusal(model: nn.Module, kind: str, why: str = "") -> str:
    reason = f" ({why})" if why else ""
    return (
        f"model: got {type(model).__name__}, which has no CLS residual stream in an {kind} tower{reason}; expected one "
        f"of {SUPPORTED}."
        if kind == "image"
        else f"model: got {type(model).__name__}, which has no end-token residual stream in a text tower{reason}; "
        f"expected one of {SUPPORTED}."
    )


def _dinov2(model: Any) -> Tower:
    blocks = list(model.encoder.layer if hasattr(model.encoder, "layer") else model.encoder.layers)
    attention = blocks[0].attention
    return Tower(
        model=model,
        kind="image",
        blocks=_paths(model, blocks),
        heads=attention.num_attention_heads,
        head_dim=attention.head_dim,
        first=blocks[0],
        outputs=tuple(block.attention.o_proj for block in blocks),
        scales=tuple(block.layer_scale1.lambda1.detach() for block in blocks),
        mlps=tuple(block.layer_scale2 for block in blocks),
        norm=model.layernorm,
        projection=None,
        embed=lambda pixels: model(pixel_values=pixels).pooler_output,
        positions=_class_token,
    )


def _paths(model: nn.Module, blocks: Sequence[nn.Module]) -> tuple[str, ...]:
    names = {module: name for name, module in model.named_modules()}
    return tuple(names[block] for block in blocks)


def _clip_image(model: Any) -> Callable[[Any], Tensor]:
    if hasattr(model, "get_image_features"):
        return lambda pixels: _pooled(model.get_image_features(pixel_values=pixels))
    return lambda pixels: model(pixel_values=pixels).image_embeds


def _clip_text(model: Any) -> Callable[[Any], Tensor]:
    if hasattr(model, "get_text_features"):
        return lambda given: _pooled(model.get_text_features(**given))
    return lambda given: model(**given).text_embeds


def _pooled(output: Any) -> Tensor:
    """The projected embedding: newer releases of transformers return it inside an output."""
    return output if isinstance(output, Tensor) else output.pooler_output


def _class_token(pixels: Tensor) -> Int[Tensor, " batch"]:
    return torch.zeros(pixels.shape[0], dtype=torch.long, device=pixels.device)


def _end_token(part: Any) -> Callable[[Any], Int[Tensor, " batch"]]:
    """Where CLIP reads a text: its first end token, or the highest id where the config still says 2 for it."""

    def positions(given: Any) -> Int[Tensor, " batch"]:
        ids = given["input_ids"]
        end = part.eos_token_id
        if end == 2:
            return ids.argmax(-1)
        found = ids == end
        if not bool(found.any(-1).all()):
            raise ArgumentError(
                f"input_ids: got a text without the end token {end}, expected one in each; it was cut by the "
                "tokenizer. Use truncation=True of the model's own tokenizer, or shorter texts."
            )
        return found.int().argmax(-1)

    return positions
