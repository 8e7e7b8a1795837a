"""A host whose retrieval head is known, and texts with planted facts for it.

The host is a GPT-2 with layers of two heads whose weights are set by hand. Nothing but the embeddings passes from
layer to layer (no positions, no feed-forward part), so head 0 of the last layer,

    logit(i, j) = gain · ⟨W e_i, W e_j⟩ / √d ,    e: random embedding of a word, W: orthogonal

attends from each word to the same word wherever it stands; the other heads attend to everything alike. A fact is found
through the name that it shares with the question; words that stand everywhere share their attention among many places.

`answering_host` can also say what it found. One head of its first layer hands each word on to the second word behind
it,

    m_i = e_{i−2} ,   logit₂(i, j) = gain₂ · ⟨e_i, m_j⟩ ,   output ← e_j        "n is v":  at the last word n, v

so that a prompt that ends with a name is continued by the value of that name wherever the fact stands.

A text is made of filler sentences, facts about other names, and the facts that are asked for. A word is a token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from headway.errors import ArgumentError

WIDTH, HEADS, LAYERS = 128, 2, 2
#: The retrieval head in the last layer.
RETRIEVAL_HEAD = 0
#: Logit of a word on itself: about gain · √(WIDTH / HEADS) = 16, with a standard deviation of 2 on other words.
GAIN = 2.0
OUTPUT = 0.1
#: Of the host that answers: sharpness of its two heads, and how loud the word that it found is beside its own.
PLACE_GAIN, NAME_GAIN, SAID = 5.0, 2.0, 4.0
FILLERS, NAMES, VALUES = 200, 300, 300
COMMON = ("the", "code", "of", "is", "what", "leads", "to", ".", "?", "answer", ":")
#: Every so many sentences one is a fact about a name that nobody asks for.
OTHER_FACTS = 8
FILLER_WORDS = (5, 12)


@dataclass(frozen=True, kw_only=True)
class PlantedText:
    """Sentences, the question, and the numbers of the sentences that are asked for."""

    sentences: tuple[str, ...]
    question: str
    needles: tuple[int, ...]

    @property
    def text(self) -> str:
        return " ".join(self.sentences)


def planted_host(*, positions: int = 512, layers: int = LAYERS, seed: int = 0) -> tuple[Any, Any]:
    """The model and its tokenizer, which splits at white space and marks."""
    model, tokenizer = _bare_host(positions=positions, layers=layers, heads=HEADS, width=WIDTH, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        model.transformer.wte.weight.normal_(0, 1, generator=generator)
        width = WIDTH // HEADS
        last, head = model.transformer.h[-1], RETRIEVAL_HEAD
        square = torch.empty(WIDTH, WIDTH)
        nn.init.orthogonal_(square, generator=generator)
        weight: Any = last.attn.c_attn.weight
        for part, scale in ((0, GAIN), (WIDTH, 1.0), (2 * WIDTH, 1.0)):
            weight[:, part + head * width : part + (head + 1) * width] = scale * square[:, :width]
        # What was found goes on to the output a little, so that the host does use its attention.
        back: Any = last.attn.c_proj.weight
        back[head * width : (head + 1) * width] = OUTPUT * square[:, :width].T
    return model, tokenizer


def _bare_host(*, positions: int, layers: int, heads: int, width: int, seed: int) -> tuple[Any, Any]:
    """A GPT-2 whose layers do nothing and whose embeddings are zero, and the tokenizer."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    vocabulary = ["<unk>", "<end>", *COMMON]
    for stem, count in (("w", FILLERS), ("n", NAMES), ("v", VALUES)):
        vocabulary += [f"{stem}{i}" for i in range(count)]
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    core.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="<end>")
    config = GPT2Config(
        vocab_size=len(vocabulary),
        n_positions=positions,
        n_embd=width,
        n_layer=layers,
        n_head=heads,
        n_inner=4,
        bos_token_id=1,
        eos_token_id=1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.transformer.h.named_parameters():
            parameter.fill_(1.0 if ".ln_" in f".{name}" and name.endswith("weight") else 0.0)
        model.transformer.wpe.weight.zero_()
        model.transformer.wte.weight.zero_()
    return model, tokenizer


def answering_host(*, positions: int = 512, seed: int = 0) -> tuple[Any, Any]:
    """A host that answers: behind "… n7" it says the word that stood two places behind an earlier n7.

    Embeddings have a part for the word, one for its place (cosines and sines of random frequencies, which a rotation
    shifts by two places) and one for the word two places before, which the first layer fills in. The second layer
    matches a word with that part and hands on what stands there."""
    part, heads = WIDTH // HEADS, 3
    model, tokenizer = _bare_host(positions=positions, layers=2, heads=heads, width=heads * part, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    word, place, before = (slice(i * part, (i + 1) * part) for i in range(heads))
    frequencies = torch.pi * torch.rand(part // 2, generator=generator)
    angles = torch.arange(positions)[:, None] * frequencies
    turn = torch.zeros(part, part)
    for i, angle in enumerate((2 * frequencies).tolist()):
        c, s = math.cos(angle), math.sin(angle)
        turn[2 * i : 2 * i + 2, 2 * i : 2 * i + 2] = torch.tensor([[c, -s], [s, c]])
    eye = torch.eye(part)
    with torch.no_grad():
        words: Any = model.transformer.wte.weight
        words[:, word] = torch.randn(words.shape[0], part, generator=generator)
        places: Any = model.transformer.wpe.weight
        places[:, place] = torch.stack([angles.cos(), angles.sin()], -1).flatten(1)
        for layer, ask, asked, given, back, gain in (
            (model.transformer.h[0], place, place, word, before, PLACE_GAIN),
            (model.transformer.h[1], word, before, word, word, NAME_GAIN),
        ):
            inward: Any = layer.attn.c_attn.weight
            inward[ask, :part] = gain * (turn if layer is model.transformer.h[0] else eye)
            inward[asked, heads * part : (heads + 1) * part] = eye
            inward[given, 2 * heads * part : (2 * heads + 1) * part] = eye
            outward: Any = layer.attn.c_proj.weight
            outward[:part, back] = (1.0 if back == before else SAID) * eye
    return model, tokenizer


def planted_text(tokens: int, depths: Sequence[float], random: np.random.Generator) -> PlantedText:
    """About `tokens` tokens of text with one fact at each depth (0 first, 1 last); the question asks for all of them.

    Names and values are drawn without repetition among the facts that are asked for, and other facts have other
    names."""
    if tokens < 1 or not depths or any(not 0 <= depth <= 1 for depth in depths):
        raise ArgumentError(f"tokens, depths: got {tokens}, {list(depths)}; expected some tokens and depths in [0, 1].")
    names = random.permutation(NAMES).tolist()
    asked, others = names[: len(depths)], names[len(depths) :]
    sentences: list[str] = []
    size = 0
    while size < tokens:
        if len(sentences) % OTHER_FACTS == OTHER_FACTS - 1:
            sentence = fact(int(random.choice(others)), int(random.integers(VALUES)))
        else:
            count = int(random.integers(*FILLER_WORDS))
            sentence = f"the {' '.join(f'w{i}' for i in random.integers(FILLERS, size=count))} ."
        sentences.append(sentence)
        size += len(sentence.split())
    facts = [fact(name, int(random.integers(VALUES))) for name in asked]
    return plant(sentences, facts, depths, f"what is the code of {' '.join(f'n{i}' for i in asked)} ?")


def chain_text(tokens: int, random: np.random.Generator) -> PlantedText:
    """Two hops: the first half says "the code of n is v", the second "m leads to n"; the question asks for m alone.

    The question shares a name with the second fact, and only that one with the first."""
    first, second = random.permutation(NAMES)[:2].tolist()
    plain = planted_text(tokens, [0.5], random)
    sentences = [s for i, s in enumerate(plain.sentences) if i not in plain.needles]
    free = [s for s in sentences if f"n{first}" not in s.split() and f"n{second}" not in s.split()]
    facts = [fact(first, int(random.integers(VALUES))), f"n{second} leads to n{first} ."]
    return plant(free, facts, [0.2, 0.7], f"what is the code of n{second} ?")


def fact(name: int, value: int) -> str:
    return f"the code of n{name} is v{value} ."


def plant(sentences: Sequence[str], facts: Sequence[str], depths: Sequence[float], question: str) -> PlantedText:
    """The sentences with each fact at its depth, which must not fall."""
    places = [round(depth * len(sentences)) for depth in depths]
    if places != sorted(places):
        raise ArgumentError(f"depths: got {list(depths)}, expected them in order.")
    out: list[str] = []
    needles, done = [], 0
    for place, one in zip(places, facts, strict=True):
        out += sentences[done:place]
        needles.append(len(out))
        out.append(one)
        done = place
    return PlantedText(sentences=(*out, *sentences[done:]), question=question, needles=tuple(needles))
