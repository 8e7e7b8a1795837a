"""A small decoder whose retrieval heads are planted, with the lookups that need them.

Tokens are facts (one of `KEYS` keys with a value for each of three attributes), questions (a key and an attribute), and
filler. A planted head finds the fact of the question's key by its content, wherever it stands, and copies one attribute
into its own part of the residual stream, from which the answer is read. All other heads read themselves or the first
token, which sinks and recent tokens cover. So the three planted heads are what a right answer needs, and nothing else.

Heads know position through RoPE; content sits in pairs that hardly turn within the text (θ ≤ 1e-4 rad per token), the
local heads in pairs that turn fast.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

KEYS, VALUES, ATTRIBUTES = 8, 8, 3
FILLERS = 40
LAYERS, KV_HEADS, GROUPS, HEAD_DIM = 3, 4, 2, 32
BASE = 1e8
#: Scaled logits: a fact of the right key, the first token, and a local head on its own token.
MATCH, FIRST, LOCAL = 14.0, 9.0, 24.0
#: Pairs that turn fast enough to be local, and slow dimensions (half layout) that hold content.
FAST = range(4)
SLOW = [*range(8, 16), 24]
#: Size of random weights everywhere, so that no head is exactly idle.
NOISE = 0.02
FACTS = KEYS * VALUES**ATTRIBUTES
#: Where the entries behind those of a fact begin in the residual stream, and where answers are written.
ASKED = KEYS + ATTRIBUTES * VALUES
ANSWER = ASKED + ATTRIBUTES + 2 + 8


@dataclass(frozen=True)
class Lookup:
    """A text with questions at its end: their rows, the attributes asked for and the right values."""

    ids: Int[Tensor, "1 tokens"]
    rows: Int[Tensor, " questions"]
    attributes: Int[Tensor, " questions"]
    values: Int[Tensor, " questions"]


class Layout:
    """Where things stand in the residual stream and in the vocabulary."""

    key = range(KEYS)
    value = tuple(range(KEYS + a * VALUES, KEYS + (a + 1) * VALUES) for a in range(ATTRIBUTES))
    asked = range(ASKED, ASKED + ATTRIBUTES)
    first = asked.stop
    one = asked.stop + 1
    filler = range(one + 1, ANSWER)
    answer = tuple(range(ANSWER + a * VALUES, ANSWER + (a + 1) * VALUES) for a in range(ATTRIBUTES))
    scratch = range(answer[-1].stop, answer[-1].stop + 16)
    width = scratch.stop + (-scratch.stop) % 8
    #: Vocabulary: the first token, questions, filler, facts; answers are the first tokens of the output.
    question = 1
    fill = question + ATTRIBUTES * KEYS
    fact = fill + FILLERS
    vocabulary = fact + FACTS


def planted_heads(seed: int) -> list[tuple[int, int]]:
    """(layer, KV head) of each attribute's retrieval head: one per layer."""
    generator = torch.Generator().manual_seed(seed)
    return [(layer, int(torch.randint(KV_HEADS, (1,), generator=generator))) for layer in range(LAYERS)]


def planted_model(seed: int) -> nn.Module:
    """The decoder with the heads of `planted_heads(seed)`; `lm_head` reads answers in its first entries."""
    import transformers as tf

    config = tf.LlamaConfig(  # type: ignore[call-arg]
        hidden_size=Layout.width, intermediate_size=8, num_hidden_layers=LAYERS, num_attention_heads=KV_HEADS * GROUPS,
        num_key_value_heads=KV_HEADS, head_dim=HEAD_DIM, vocab_size=Layout.vocabulary, rope_theta=BASE,
        rope_parameters={"rope_theta": BASE, "rope_type": "default"}, max_position_embeddings=4096,
        pad_token_id=0, bos_token_id=0, eos_token_id=None, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        model: Any = tf.LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, NOISE / parameter.shape[1] ** 0.5, generator=generator)
            else:
                parameter.fill_(1.0)
            if "mlp" in name:
                parameter.zero_()
        _embed(model.model.embed_tokens.weight, generator)
        for attribute, place in enumerate(planted_heads(seed)):
            for head in range(KV_HEADS):
                attention = model.model.layers[place[0]].self_attn
                if head == place[1]:
                    _plant_retrieval(attention, head, attribute)
                else:
                    _plant_near(attention, head, local=bool(head % 2), generator=generator)
        for attribute in range(ATTRIBUTES):
            for value in range(VALUES):
                model.lm_head.weight[attribute * VALUES + value, Layout.answer[attribute][value]] = 4.0
    return model.eval()


def lookup(seed: int, tokens: int = 320, questions: int = 12, *, near: int = 100) -> Lookup:
    """A text of filler with a fact for every key, none among the first 24 or the last `near` tokens; then questions."""
    generator = torch.Generator().manual_seed(seed)
    ids = Layout.fill + torch.randint(FILLERS, (tokens,), generator=generator)
    ids[0] = 0
    places = 24 + torch.randperm(tokens - questions - near - 24, generator=generator)[:KEYS]
    values = torch.randint(VALUES, (KEYS, ATTRIBUTES), generator=generator)
    powers = VALUES ** torch.arange(ATTRIBUTES)
    ids[places] = Layout.fact + torch.arange(KEYS) * VALUES**ATTRIBUTES + (values * powers).sum(1)
    rows = torch.arange(tokens - questions, tokens)
    keys = torch.randint(KEYS, (questions,), generator=generator)
    attributes = torch.arange(questions) % ATTRIBUTES
    ids[rows] = Layout.question + attributes * KEYS + keys
    return Lookup(ids[None], rows, attributes, values[keys, attributes])


@torch.no_grad()
def lookup_accuracy(model: nn.Module, samples: list[Lookup]) -> float:
    """Share of questions whose largest answer of the asked attribute is the right value."""
    right = total = 0
    for sample in samples:
        logits = model(input_ids=sample.ids, use_cache=True).logits[0, sample.rows]
        index = sample.attributes[:, None] * VALUES + torch.arange(VALUES)
        right += int((logits.gather(1, index).argmax(1) == sample.values).sum())
        total += sample.rows.numel()
    return right / total


def _embed(weight: Tensor, generator: torch.Generator) -> None:
    """Every token carries the constant; rows have about equal norms, so the host's norms leave their shape alone."""
    weight[:, Layout.one] = 1.0
    weight[0, Layout.first] = 2.0
    for attribute in range(ATTRIBUTES):
        for key in range(KEYS):
            row = Layout.question + attribute * KEYS + key
            weight[row, Layout.key[key]] = 1.0
            weight[row, Layout.asked[attribute]] = 1.0
    for filler in range(FILLERS):
        direction = torch.nn.functional.normalize(torch.randn(8, generator=generator), dim=0)
        weight[Layout.fill + filler, list(Layout.filler)] = 2**0.5 * direction
    for fact in range(FACTS):
        row = Layout.fact + fact
        weight[row, Layout.key[fact // VALUES**ATTRIBUTES]] = 1.0
        for attribute in range(ATTRIBUTES):
            weight[row, Layout.value[attribute][fact // VALUES**attribute % VALUES]] = 0.7


def _norm(entries: float) -> float:
    """RMS of a row whose squares sum to `entries`: what the norm in front of attention divides by."""
    return (entries / Layout.width) ** 0.5


def _heads(projection: nn.Linear, head: int, count: int) -> Tensor:
    """The rows of one KV head (all its query heads), as (query heads, dim, width)."""
    return projection.weight.view(KV_HEADS, count, HEAD_DIM, Layout.width)[head]


def _plant_retrieval(attention: Any, head: int, attribute: int) -> None:
    """Query: the key of a question about this attribute. Key: that of a fact. All else rests on the first token."""
    question, fact, first = _norm(3.0), _norm(2.0 + ATTRIBUTES * 0.49), _norm(5.0)
    query, key = _heads(attention.q_proj, head, GROUPS), _heads(attention.k_proj, head, 1)[0]
    scale = HEAD_DIM**0.5
    for index, slow in zip(range(KEYS), SLOW[:KEYS], strict=True):
        query[:, slow, Layout.key[index]] = question * MATCH * scale
        key[slow, Layout.key[index]] = fact
        # A question is no fact: its own key must not match.
        key[slow, list(Layout.asked)] = -fact
        # A question about another attribute is pushed below the first token.
        for other in range(ATTRIBUTES):
            if other != attribute:
                query[:, slow, Layout.asked[other]] = -question * MATCH * scale
    query[:, SLOW[-1], Layout.one] = FIRST * scale * question
    key[SLOW[-1], Layout.first] = first / 2.0
    value = _heads(attention.v_proj, head, 1)[0]
    output = attention.o_proj.weight.view(Layout.width, KV_HEADS, GROUPS, HEAD_DIM)[:, head]
    for v in range(VALUES):
        value[v, Layout.value[attribute][v]] = fact / 0.7
        output[Layout.answer[attribute][v], :, v] = 1.0 / GROUPS


def _plant_near(attention: Any, head: int, *, local: bool, generator: torch.Generator) -> None:
    """A head that reads its own token (fast pairs) or the first one, and writes what it reads into scratch space."""
    query, key = _heads(attention.q_proj, head, GROUPS), _heads(attention.k_proj, head, 1)[0]
    scale = HEAD_DIM**0.5
    if local:
        for pair in FAST:
            query[:, pair, Layout.one] = LOCAL * scale / len(FAST) * _norm(3.0) ** 2
            key[pair, Layout.one] = 1.0
    else:
        query[:, SLOW[-1], Layout.one] = FIRST * scale * _norm(3.0)
        key[SLOW[-1], Layout.first] = _norm(5.0) / 2.0
    value = _heads(attention.v_proj, head, 1)[0]
    output = attention.o_proj.weight.view(Layout.width, KV_HEADS, GROUPS, HEAD_DIM)[:, head]
    value[:8, list(Layout.filler)] = torch.eye(8) * _norm(3.0)
    for index, to in enumerate(list(Layout.scratch)[:8]):
        output[to, :, index] = 0.2 * (1 + torch.rand(1, generator=generator)) / GROUPS
