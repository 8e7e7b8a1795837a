"""A tiny CLIP that is trained here in about a minute, for machines without any downloaded weights.

It is an ordinary `transformers` CLIPModel on 32 × 32 attribute scenes, trained with the contrastive loss over pictures
and texts in which every caption that is true of a picture counts as its own (arXiv 2204.03610): short captions are true
of many pictures of a batch, and calling those wrong would teach noise.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from headway.errors import HostError
from headway.hosts.cache import Report, converted
from headway.methods.diagnosis.clip_ccs.pruning import class_vectors, right
from headway.methods.diagnosis.clip_ccs.towers import tower
from headway.tasks.attribute_scenes import (
    CONCEPTS,
    SIDE,
    Scenes,
    draw_captions,
    draw_labels,
    draw_scenes,
    make_scenes,
    prompts,
    vocabulary,
)

log = logging.getLogger(__name__)

PAD, START, UNKNOWN, END = "<pad>", "<start>", "<unknown>", "<end>"
#: Changes with the training, so that a cached copy of another one is not taken for it.
RECIPE = 1
STEPS, BATCH, RATE = 300, 64, 2e-3
#: Captions of each scene of a batch: texts cost a tenth of what pictures cost.
CAPTIONS = 4
#: What pictures are normalised by.
MEAN, DEVIATION = 0.1, 0.3
#: Steps over which the rate rises, at most a tenth of all; it then falls along a half cosine.
WARM = 20
#: Deviations of the first weights of patches, places and words, and a factor on those of q, k and v. CLIP's own (0.02
#: for all three, and 1) hide the place of a patch behind its content and a text's words behind its length, which so
#: short a training does not undo.
PATCH, PLACE, WORD, ATTEND = 0.08, 0.8, 0.2, 3.0
#: Mean zero-shot accuracy over the five attributes below which nothing is said about its heads. Chance is 0.27.
GATE = 0.8
GATE_SCENES = 400
Progress = Callable[[int, int], None]


def tokenizer() -> Any:
    """Words of the scenes' captions, with CLIP's start and end tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = [PAD, START, UNKNOWN, END, *vocabulary()]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=UNKNOWN))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends = [(START, words.index(START)), (END, words.index(END))]
    inner.post_processor = processors.TemplateProcessing(single=f"{START} $A {END}", special_tokens=ends)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token=PAD,
        bos_token=START,
        eos_token=END,
        unk_token=UNKNOWN,
        model_max_length=16,
    )


def untrained(seed: int, *, width: int = 96, heads: int = 8, layers: int = 4) -> Any:
    """The architecture with random weights: 4 image layers of 8 heads, 2 text layers of 4 heads."""
    from transformers import CLIPConfig, CLIPModel

    words = len(vocabulary()) + 4
    config = CLIPConfig(
        text_config={
            "vocab_size": words, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
            "hidden_act": "gelu", "num_attention_heads": 4, "max_position_embeddings": 16, "pad_token_id": 0,
            "bos_token_id": 1, "eos_token_id": 3, "projection_dim": 64,
        },
        vision_config={
            "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers, "hidden_act": "gelu",
            "num_attention_heads": heads, "image_size": SIDE, "patch_size": 8, "projection_dim": 64,
        },
        projection_dim=64,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CLIPModel(config)
        with torch.no_grad():
            model.vision_model.embeddings.patch_embedding.weight.normal_(std=PATCH)
            model.vision_model.embeddings.position_embedding.weight.normal_(std=PLACE)
            model.text_model.embeddings.token_embedding.weight.normal_(std=WORD)
            for name, weight in model.named_parameters():
                if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
                    weight.mul_(ATTEND)
        return model


def pixels(images: Float[Tensor, "batch 3 side side"]) -> Float[Tensor, "batch 3 side side"]:
    """Pictures in [0, 1] as the model reads them: the ground near zero."""
    return (images - MEAN) / DEVIATION


def tokens(reader: Any, texts: Sequence[str]) -> dict[str, Tensor]:
    """Texts as the text tower reads them."""
    made = reader(list(texts), padding=True, return_tensors="pt")
    return {"input_ids": made["input_ids"], "attention_mask": made["attention_mask"]}


def contrastive_loss(logits: Float[Tensor, "images texts"], true: Bool[Tensor, "images texts"]) -> Float[Tensor, ""]:
    """Cross-entropy both ways; what is true of one another shares the target evenly."""
    loss = logits.new_zeros(())
    for scores, match in ((logits, true), (logits.T, true.T)):
        share = match.to(scores.dtype)
        loss = loss - (scores.log_softmax(-1) * share / share.sum(-1, keepdim=True)).sum(-1).mean()
    return loss / 2


def train(
    model: Any,
    *,
    seed: int,
    steps: int = STEPS,
    rate: float = RATE,
    correlation: tuple[str, str, float] | None = None,
    progress: Progress | None = None,
) -> list[float]:
    """Trains on fresh scenes; `correlation` plants one in them. Gives the loss by step; the model is left in eval
    mode."""
    reader, generator = tokenizer(), torch.Generator().manual_seed(seed)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.02, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(_rate, steps))
    course = []
    for step in range(steps):
        labels = draw_labels(BATCH, generator, correlation=correlation)
        scenes, captions = draw_scenes(labels, generator), draw_captions(labels.repeat(CAPTIONS, 1), generator)
        given = tokens(reader, captions.texts)
        image = nn.functional.normalize(
            model.get_image_features(pixel_values=pixels(scenes.images)).pooler_output, dim=-1
        )
        text = nn.functional.normalize(model.get_text_features(**given).pooler_output, dim=-1)
        logits = model.logit_scale.exp().clamp(max=100) * image @ text.T
        loss = contrastive_loss(logits, captions.true_of(labels))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        course.append(float(loss.detach()))
        if progress is not None:
            progress(step + 1, steps)
    model.eval()
    return course


def _rate(steps: int, step: int) -> float:
    warm = max(min(WARM, steps // 10), 1)
    return min(1.0, (step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * min(step / steps, 1.0)))


def zero_shot(model: Any, scenes: Scenes) -> dict[str, float]:
    """Zero-shot accuracy by attribute."""
    images = embed_images(model, scenes.images)
    return {
        concept: float(right(images, vectors(model, concept), scenes.of(concept)).float().mean())
        for concept in CONCEPTS
    }


def vectors(model: Any, concept: str) -> Float[Tensor, "values joint"]:
    """The class vectors of an attribute's values."""
    reader = tokenizer()
    return class_vectors(tower(model, "text"), {v: tokens(reader, p) for v, p in prompts(concept).items()})


@torch.no_grad()
def embed_images(model: Any, images: Float[Tensor, "images 3 side side"], *, batch: int = 200) -> Tensor:
    """Unit embeddings of pictures."""
    part = tower(model)
    return torch.cat([nn.functional.normalize(part.embed(pixels(some)), dim=-1) for some in images.split(batch)])


def attribute_clip(seed: int = 0) -> tuple[Any, Any]:
    """The tiny CLIP from the user's cache, trained there on first use, and its tokenizer.

    Raises HostError where its own zero-shot accuracy is below GATE: nothing is said about heads of a model that has not
    learned its task."""
    from transformers import CLIPModel, PreTrainedTokenizerFast

    from headway.hosts.convert import quiet_bars

    folder = converted(f"attribute-clip-{RECIPE}-{seed}", partial(_make, seed), title="the tiny CLIP", room=4_000_000)
    with quiet_bars():
        model = CLIPModel.from_pretrained(folder, use_safetensors=True, local_files_only=True)
        reader = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    model.name_or_path = f"attribute-clip (seed {seed})"
    return model.eval(), reader


def _make(seed: int, folder: Path, report: Report) -> None:
    from headway.hosts.convert import quiet_bars

    model = untrained(seed)
    train(model, seed=seed, progress=lambda done, total: report(f"training, step {done} of {total}"))
    accuracy = zero_shot(model, make_scenes(GATE_SCENES, seed=seed + 1_000_000))
    mean = sum(accuracy.values()) / len(accuracy)
    if mean < GATE:
        shown = ", ".join(f"{name} {value:.2f}" for name, value in accuracy.items())
        raise HostError(
            f"the tiny CLIP: got a zero-shot accuracy of {mean:.2f} after training ({shown}), expected {GATE} or more. "
            "Train it from another seed."
        )
    with quiet_bars():
        model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    save_processor(folder)
    (folder / "accuracy.json").write_text(json.dumps(accuracy), encoding="utf-8")


def save_processor(folder: Path) -> None:
    """What lets the folder be loaded like any other CLIP; left out where Pillow is not installed."""
    from transformers.utils import is_vision_available

    if not is_vision_available():
        return
    from transformers import CLIPProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    images = CLIPImageProcessorPil(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_mean=[MEAN] * 3,
        image_std=[DEVIATION] * 3,
    )
    CLIPProcessor(image_processor=images, tokenizer=tokenizer()).save_pretrained(folder)
