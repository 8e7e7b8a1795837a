"""What a model of mixers is made of."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import PretrainedConfig

from headway.errors import ArgumentError, unknown

NORMS = ("rms", "srms", "layer", "single_scale")
#: MLPs whose hidden units are gated, and those that are not.
GATED, PLAIN = ("swiglu", "geglu", "reglu", "sglu"), ("gelu", "relu", "swish")
MLPS = (*GATED, *PLAIN, "none")
PLACES = ("pre", "post")


class _Stack(PretrainedConfig):
    """The fields that language and image models share.

    `mixer`: the name of a registered mixer, or one name per layer (a hybrid stack). `mixer_options`: its constructor
    options; where layers differ, a dictionary by mixer name. `norm_place="post"` normalises behind the residual sum.
    `mlp_width` is 8/3 of the width, rounded up to a multiple of 8, for gated MLPs and 4 times the width for others."""

    # What transformers calls these fields.
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "width",
        "num_hidden_layers": "layers",
        "num_attention_heads": "heads",
    }

    def __init__(
        self,
        width: int = 128,
        layers: int = 4,
        heads: int = 4,
        mixer: str | list[str] = "softmax",
        mixer_options: dict[str, Any] | None = None,
        norm: str = "rms",
        norm_place: str = "pre",
        mlp: str = "swiglu",
        mlp_width: int | None = None,
        init_std: float = 0.02,
        **further: Any,
    ) -> None:
        self.width, self.layers, self.heads = width, layers, heads
        self.mixer = list(mixer) if isinstance(mixer, list | tuple) else mixer
        self.mixer_options = dict(mixer_options or {})
        self.norm, self.norm_place, self.mlp, self.init_std = norm, norm_place, mlp, init_std
        self.mlp_width = mlp_width if mlp_width is not None else _mlp_width(width, mlp)
        self._check()
        super().__init__(**further)

    def mixer_of(self, layer: int) -> tuple[str, dict[str, Any]]:
        """Name and options of the mixer of a layer."""
        name = self.mixer[layer] if isinstance(self.mixer, list) else self.mixer
        options = self.mixer_options
        if isinstance(self.mixer, list) or (set(options) == {name} and isinstance(options[name], dict)):
            options = options.get(name, {})
        return name, dict(options)

    def _check(self) -> None:
        for name, valid in (("norm", NORMS), ("mlp", MLPS), ("norm_place", PLACES)):
            if getattr(self, name) not in valid:
                raise unknown(name, getattr(self, name), valid)
        if self.layers < 1:
            raise ArgumentError(f"layers: got {self.layers}, expected at least 1.")
        if isinstance(self.mixer, list) and len(self.mixer) != self.layers:
            raise ArgumentError(
                f"mixer: got {len(self.mixer)} names for {self.layers} layers, expected one per layer or one for all."
            )
        if isinstance(self.mixer, list):
            for name, options in self.mixer_options.items():
                if name not in self.mixer:
                    raise unknown("mixer_options", name, sorted(set(self.mixer)))
                if not isinstance(options, dict):
                    raise ArgumentError(
                        f"mixer_options: got {options!r} for {name}, expected its options by name, as layers differ: "
                        f"{{{name!r}: {{…}}}}."
                    )


class HeadwayConfig(_Stack):
    """A causal language model. `tie`: input and output embedding are one matrix. `embed_scale`: embeddings are
    multiplied by √width. `embed_projection`: a square map behind the input embedding and one before the output
    embedding, which take the outliers of embeddings off the stream (OSP, arXiv 2506.19697). `positions` is how many
    tokens it was made for; nothing refuses more."""

    model_type = "headway"

    def __init__(
        self,
        vocab_size: int = 512,
        tie: bool = True,
        embed_scale: bool = False,
        embed_projection: bool = False,
        positions: int | None = None,
        pad_token_id: int | None = None,
        bos_token_id: int | None = None,
        eos_token_id: int | None = None,
        **stack: Any,
    ) -> None:
        self.vocab_size, self.tie, self.positions = vocab_size, tie, positions
        self.embed_scale, self.embed_projection = embed_scale, embed_projection
        # The field that hosts carry; None would be read as unlimited.
        self.max_position_embeddings = positions
        stack.setdefault("tie_word_embeddings", tie)
        stack.pop("max_position_embeddings", None)
        stack.pop("is_decoder", None)
        super().__init__(
            pad_token_id=pad_token_id, bos_token_id=bos_token_id, eos_token_id=eos_token_id, is_decoder=True, **stack
        )


class HeadwayViTConfig(_Stack):
    """An image classifier over square patches. `cls_token`: the class is read from a token of its own instead of the
    mean over patches. Mixers that can read both ways are built with causal=False."""

    model_type = "headway-vit"

    def __init__(
        self,
        image_size: int | tuple[int, int] = 8,
        patch_size: int = 2,
        num_channels: int = 1,
        classes: int = 10,
        cls_token: bool = False,
        **stack: Any,
    ) -> None:
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        if height % patch_size or width % patch_size:
            raise ArgumentError(
                f"patch_size: got {patch_size} for images of {height} × {width}, expected a divisor of both sides."
            )
        self.image_size = image_size if isinstance(image_size, int) else list(image_size)
        self.patch_size, self.num_channels, self.cls_token, self.classes = patch_size, num_channels, cls_token, classes
        stack.setdefault("num_labels", classes)
        super().__init__(**stack)

    @property
    def grid(self) -> tuple[int, int]:
        height, width = (self.image_size,) * 2 if isinstance(self.image_size, int) else self.image_size
        return height // self.patch_size, width // self.patch_size


class HeadwayRegressionConfig(_Stack):
    """A causal stack over sequences of numbers: tokens of `inputs` numbers, `outputs` numbers at each."""

    model_type = "headway-regression"

    def __init__(self, inputs: int = 17, outputs: int = 8, **stack: Any) -> None:
        for name, got in (("inputs", inputs), ("outputs", outputs)):
            if got < 1:
                raise ArgumentError(f"{name}: got {got}, expected at least 1.")
        self.inputs, self.outputs = inputs, outputs
        super().__init__(**stack)


def _mlp_width(width: int, mlp: str) -> int:
    return -(-8 * width // 24) * 8 if mlp in GATED else 4 * width
