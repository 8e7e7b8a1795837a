"""The boundary predictor: a small network that reads the keys around a gap and says whether a chunk ends there.

    x = 2w keys around the gap (heads side by side) ;  h = LayerNorm(self-attention(x))
    l, r = means of the left and right half ;  logit = MLP([l, r, |l − r|, l ⊙ r, cos(l, r)])

The released code also knows a depth-wise convolution ("conv") or four pre-norm blocks ("stack") in place of the
self-attention, and halves pooled by learned weights ("gated"). One set of weights serves every layer. The file is
safetensors with a JSON beside it that names the model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, linear, pad, scaled_dot_product_attention

from headway.errors import ArgumentError, unknown
from headway.files import write_atomically
from headway.hosts.fingerprint import Fingerprint, check_fingerprint
from headway.methods.long_context.dhsa.labels import WINDOW

FORMAT = "headway dhsa boundary predictor"
VERSION = 1
WEIGHTS, SETTINGS = "predictor.safetensors", "predictor.json"
ENCODERS, POOLS = ("attention", "conv", "stack"), ("mean", "gated")
#: Blocks and dropout of the stacked encoder.
BLOCKS, DROPOUT = 4, 0.1
HIDDEN = 256
HEADS = 8
#: Gaps at a time: 512 windows of 8 keys of 1,024 numbers are 16 MB.
GAPS = 512


class BoundaryPredictor(nn.Module):
    """logit of a boundary behind every token: (batch, tokens, width) -> (batch, tokens).

    width: KV heads × head dimension of the model. window: tokens on each side. heads: of its attention, a divisor of
    the width. encoder, pool: see the module. made_on: the fingerprint of the model it was trained on; source: how."""

    def __init__(
        self,
        width: int,
        *,
        window: int = WINDOW,
        heads: int = HEADS,
        hidden: int = HIDDEN,
        encoder: str = "attention",
        pool: str = "mean",
        made_on: Fingerprint | None = None,
        source: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if width < 1 or window < 1 or hidden < 1 or heads < 1 or width % heads:
            raise ArgumentError(
                f"width, window, heads, hidden: got {width}, {window}, {heads}, {hidden}; expected at least 1 each and "
                "a width that is a multiple of the heads."
            )
        for name, value, known in (("encoder", encoder, ENCODERS), ("pool", pool, POOLS)):
            if value not in known:
                raise unknown(name, value, known)
        self.width, self.window, self.heads, self.hidden = width, window, heads, hidden
        self.encoder, self.pool = encoder, pool
        self.made_on = made_on
        self.source = dict(source or {})
        self.mixer = _mixer(encoder, width, heads)
        self.gate = nn.Linear(width, 1) if pool == "gated" else None
        self.norm = nn.LayerNorm(width)
        self.head = nn.Sequential(nn.Linear(4 * width + 1, hidden), nn.ReLU(), nn.Linear(hidden, 1))

    def forward(self, keys: Float[Tensor, "batch tokens width"]) -> Float[Tensor, "batch tokens"]:
        if keys.ndim != 3 or keys.shape[2] != self.width:
            raise ArgumentError(
                f"keys: got shape {tuple(keys.shape)}, expected (batch, tokens, {self.width}), heads side by side."
            )
        padded = pad(keys.float(), (0, 0, self.window - 1, self.window))
        if isinstance(self.mixer, nn.MultiheadAttention):
            # A token is projected once, not in each of the windows that it is part of.
            padded = linear(padded, self.mixer.in_proj_weight, self.mixer.in_proj_bias)
        around = padded.unfold(1, 2 * self.window, 1)
        return torch.cat([self._logit(part.transpose(2, 3)) for part in around.split(GAPS, 1)], 1)

    def _logit(self, around: Float[Tensor, "batch gaps keys width"]) -> Float[Tensor, "batch gaps"]:
        mixed = self.norm(self._mixed(around.flatten(0, 1)))
        left, right = (self._pooled(half) for half in mixed.split(self.window, 1))
        alike = cosine_similarity(left, right, dim=-1)[:, None]
        features = torch.cat([left, right, (left - right).abs(), left * right, alike], -1)
        return self.head(features)[:, 0].view(around.shape[:2])

    def _mixed(self, flat: Float[Tensor, "gaps keys width"]) -> Float[Tensor, "gaps keys width"]:
        """The keys of every window after they saw each other; for self-attention `flat` holds queries, keys, values."""
        if isinstance(self.mixer, nn.MultiheadAttention):
            split = flat.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            mixed = scaled_dot_product_attention(split[0], split[1], split[2])
            return self.mixer.out_proj(mixed.transpose(1, 2).flatten(2))
        return self.mixer(flat.transpose(1, 2)).transpose(1, 2) if self.encoder == "conv" else self.mixer(flat)

    def _pooled(self, half: Float[Tensor, "gaps keys width"]) -> Float[Tensor, "gaps width"]:
        return half.mean(1) if self.gate is None else (self.gate(half).softmax(1) * half).sum(1)

    def check(self, model: nn.Module) -> None:
        """Raises HostError, naming every difference, when the predictor was trained on another model."""
        if self.made_on is not None:
            check_fingerprint(self.made_on, model, "predictor")

    def save(self, folder: str | Path) -> Path:
        """Writes `predictor.safetensors` and `predictor.json` into a folder; neither is ever seen half written."""
        folder = Path(folder)
        settings = {
            "format": FORMAT,
            "version": VERSION,
            "width": self.width,
            "window": self.window,
            "heads": self.heads,
            "hidden": self.hidden,
            "encoder": self.encoder,
            "pool": self.pool,
            "made_on": None if self.made_on is None else self.made_on.to_dict(),
            "source": self.source,
        }
        tensors = {name: x.detach().cpu().contiguous() for name, x in self.state_dict().items()}
        write_atomically(folder / WEIGHTS, save_tensors(tensors))
        write_atomically(folder / SETTINGS, json.dumps(settings, ensure_ascii=False, indent=1) + "\n")
        return folder

    @classmethod
    def load(cls, folder: str | Path, *, model: nn.Module | None = None) -> BoundaryPredictor:
        """The predictor that `save` wrote, in eval mode; with `model`, checked against it.

        Raises ArgumentError for anything else in the folder, HostError for another model."""
        folder = Path(folder)
        try:
            data = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
            if not isinstance(data, dict) or data.get("format") != FORMAT or data.get("version") != VERSION:
                raise ArgumentError(
                    f"folder: got {folder / SETTINGS} without format {FORMAT!r} and version {VERSION}, expected what "
                    "BoundaryPredictor.save wrote."
                )
            made_on = data["made_on"] and Fingerprint.from_dict(data["made_on"])
            sizes = {name: data[name] for name in ("window", "heads", "hidden", "encoder", "pool")}
            predictor = cls(data["width"], **sizes, made_on=made_on, source=data["source"])
            predictor.load_state_dict(load_tensors((folder / WEIGHTS).read_bytes()))
        except FileNotFoundError as error:
            raise ArgumentError(
                f"folder: got {folder} without {Path(error.filename).name}, expected what BoundaryPredictor.save wrote."
            ) from None
        except ArgumentError:
            raise
        except (KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
            raise ArgumentError(f"folder: got {folder} with fields missing or broken ({error}).") from None
        if model is not None:
            predictor.check(model)
        return predictor.eval()


def _mixer(encoder: str, width: int, heads: int) -> nn.Module:
    """What lets the keys of a window see each other."""
    if encoder == "attention":
        return nn.MultiheadAttention(width, heads, batch_first=True)
    if encoder == "conv":
        return nn.Conv1d(width, width, 3, padding=1, groups=width)
    layer = nn.TransformerEncoderLayer(
        width, heads, 4 * width, DROPOUT, activation="gelu", batch_first=True, norm_first=True
    )
    return nn.TransformerEncoder(layer, BLOCKS, enable_nested_tensor=False)
