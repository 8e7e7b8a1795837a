"""Generated traces whose dependency graph is known, a decoder that writes them, and distractors planted in it.

A setup gives facts (a value for each key), void statements about some of the keys, fillers, and one mode, in random
order. Derivations follow: each asks for a key and answers with its value under the mode. So every derivation rests on
exactly two sentences, its fact and the mode, and no sentence repeats a fact or shares its value: one path each. Which
of two keys is asked first is free, the others follow in their order, and the answer to the last is the final one; after
the setup only the mode decides it.

One head in each layer is idle: its output has no way into the residual stream, from initialisation on. `IdleLooks`
makes these heads stare at void statements and fillers: attention that means nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn

from headway.door.call import AttentionCall, Site
from headway.door.stages import Editor
from headway.methods.diagnosis.thought_anchors import Trace

KEYS, VALUES, MODES = 8, 9, 3
DERIVATIONS = KEYS - 1
VOIDS, FILLERS, FILLER_WORDS = 2, 2, 4
LAYERS, HEADS, WIDTH = 3, 4, 64
IDLE = HEADS - 1
BATCH, RATE = 32, 3e-3
#: Weight of tokens that are not answers in the loss; most of them are drawn at random.
OTHERS = 0.1
#: Share of right answers in each of so many steps from which the toy has learned, and steps that settle it then.
LEARNED, SURE, SETTLE, WARM = 0.98, 10, 30, 30

_WORDS = (
    ["start ", ". "]
    + [f"as-noted-{i} " for i in range(FILLER_WORDS)]
    + [f"mode-is-m{m} " for m in range(MODES)]
    + [f"given:k{k}={v} " for k in range(KEYS) for v in range(VALUES)]
    + [f"not-true:k{k}={v} " for k in range(KEYS) for v in range(VALUES)]
    + [f"then-k{k}-gives " for k in range(KEYS)]
    + [f"m{m}v{v} " for m in range(MODES) for v in range(VALUES)]
    + ["end "]
)
_ID = {word: i for i, word in enumerate(_WORDS)}
START, STOP, FILLER, MODE = 0, 1, 2, 2 + FILLER_WORDS
FACT = MODE + MODES
VOID = FACT + KEYS * VALUES
ASK = VOID + KEYS * VALUES
ANSWER = ASK + KEYS
END = ANSWER + MODES * VALUES
SETUP = KEYS + VOIDS + FILLERS + 1
LENGTH = 2 + 2 * SETUP + 3 * DERIVATIONS
#: Positions of the answers.
ANSWERS = [1 + 2 * SETUP + 3 * d + 1 for d in range(DERIVATIONS)]
#: Position of a mode that is said last.
MODE_LAST = 2 * SETUP - 1
#: What the final answer looks like.
FINAL = r"\b(m\dv\d)"


class Words:
    """The tokenizer: every token is a word with its space."""

    is_fast = False
    all_special_ids: tuple[int, ...] = ()
    eos_token_id = None

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": [_ID[f"{word} "] for word in text.split(" ") if word]}

    def decode(self, ids: Sequence[int], **options: Any) -> str:
        return "".join(_WORDS[int(i)] for i in ids)


@dataclass(frozen=True)
class Planted:
    """A trace and its truth: edges (source, target) between sentences, the mode's place, the derivations, and the token
    columns of sentences that nothing rests on (voids and fillers)."""

    trace: Trace
    edges: tuple[tuple[int, int], ...]
    mode: int
    derivations: tuple[int, ...]
    distractors: tuple[int, ...]


def draw_ids(count: int, generator: np.random.Generator, *, mode_last: bool = False) -> Int[Tensor, "batch tokens"]:
    """`count` traces as token ids; `mode_last` puts the mode behind the other sentences of the setup."""
    values = generator.permuted(np.tile(np.arange(VALUES), (count, 1)), axis=1)[:, :KEYS]
    mode = generator.integers(MODES, size=count)
    voided = generator.permuted(np.tile(np.arange(KEYS), (count, 1)), axis=1)[:, :VOIDS]
    other = (np.take_along_axis(values, voided, 1) + generator.integers(1, VALUES, size=voided.shape)) % VALUES
    setup = [FACT + VALUES * np.arange(KEYS) + values, VOID + VALUES * voided + other]
    setup += [FILLER + generator.integers(FILLER_WORDS, size=(count, FILLERS))]
    said = [MODE + mode[:, None]]
    words = generator.permuted(np.concatenate(setup if mode_last else [*setup, *said], 1), axis=1)
    words = np.concatenate([words, *said], 1) if mode_last else words
    asked = np.tile(np.arange(1, KEYS), (count, 1))
    asked[:, 0] = generator.integers(2, size=count)
    answers = VALUES * mode[:, None] + np.take_along_axis(values, asked, 1)
    parts = np.stack([words, np.full_like(words, STOP)], 2).reshape(count, -1)
    derived = np.stack([ASK + asked, ANSWER + answers, np.full_like(asked, STOP)], 2).reshape(count, -1)
    ends = np.full((2, count, 1), [[[START]], [[END]]])
    return torch.from_numpy(np.concatenate([ends[0], parts, derived, ends[1]], 1))


def planted(ids: Sequence[int], name: str = "trace") -> Planted:
    """The trace of a row of token ids with its truth."""
    ids = [int(i) for i in ids]
    words = [_WORDS[i] for i in ids]
    stops = [i + 1 for i, token in enumerate(ids) if token == STOP]
    tokens = list(zip([1, *stops], stops, strict=False))
    ends = np.cumsum([len(w) for w in words]).tolist()
    starts = [0, *ends[:-1]]
    trace = Trace(
        text="".join(words),
        ids=tuple(ids),
        starts=tuple(starts),
        characters=tuple((starts[a], ends[b - 1]) for a, b in tokens),
        tokens=tuple(tokens),
        name=name,
        answer=words[ANSWERS[-1]].strip(),
    )
    heads = [words[a] for a, _ in tokens]
    mode = next(i for i, w in enumerate(heads) if w.startswith("mode"))
    facts = {w[6:].partition("=")[0]: i for i, w in enumerate(heads) if w.startswith("given")}
    derived = [i for i, w in enumerate(heads) if w.startswith("then")]
    edges = [(s, i) for i in derived for s in (facts[heads[i].split("-")[1]], mode)]
    idle = [i for i, w in enumerate(heads) if w.startswith(("not-true", "as-noted"))]
    columns = tuple(t for i in idle for t in range(*tokens[i]))
    return Planted(trace, tuple(edges), mode, tuple(derived), columns)


def decoder(seed: int) -> Any:
    """An untrained decoder. Words that name a key and a value start as the sum of both; idle heads are cut off."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(_WORDS), hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=HEADS, max_position_embeddings=4 * LENGTH, bos_token_id=START,
        eos_token_id=None, pad_token_id=None, initializer_range=WIDTH**-0.5,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = LlamaForCausalLM(config)
        parts = torch.randn(KEYS + VALUES + 3, WIDTH) * 0.3
    embeddings = model.get_input_embeddings().weight
    with torch.no_grad():
        for word, i in _ID.items():
            if "=" in word:
                k, v = (int(x.strip("k ")) for x in word.partition(":")[2].split("="))
                embeddings[i] = parts[k] + parts[KEYS + v] + parts[KEYS + VALUES + word.startswith("not")]
            elif word.startswith("then"):
                embeddings[i] = parts[int(word.split("-")[1][1:])] + parts[-1]
        for layer in model.model.layers:
            _cut_off(layer.self_attn.o_proj)
    return model


def train(most: int, seed: int) -> Any:
    """A decoder trained on fresh traces until it derives rightly, at most `most` steps, and then a little at a falling
    rate; when it begins to recall differs between seeds by a factor of two.

    In every second step the mode stands last, where it counts in the loss: there it is a coin that the model must have
    learned to toss."""
    generator = np.random.default_rng(seed)
    model = decoder(seed).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    right: list[float] = []
    settling = 0
    while len(right) < most and settling < SETTLE:
        learned = len(right) >= SURE and min(right[-SURE:]) >= LEARNED
        settling += bool(settling) or learned
        for group in optimiser.param_groups:
            group["lr"] = RATE * min((len(right) + 1) / WARM, 1 - settling / (SETTLE + 1))
        last = len(right) % 2 == 1
        right.append(_step(model, optimiser, draw_ids(BATCH, generator, mode_last=last), last))
    return model.eval()


def _step(model: Any, optimiser: torch.optim.Optimizer, ids: Int[Tensor, "batch tokens"], mode_last: bool) -> float:
    """One step; the share of answers that were right before it."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    wanted = ids[:, 1:]
    losses = nn.functional.cross_entropy(logits.transpose(1, 2), wanted, reduction="none")
    answers = (wanted >= ANSWER) & (wanted < END)
    weight = torch.where(answers, 1.0, OTHERS)
    if mode_last:
        weight[:, MODE_LAST - 1] = 1.0
    optimiser.zero_grad()
    ((losses * weight).sum() / weight.sum()).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimiser.step()
    return float((logits.argmax(-1) == wanted)[answers].float().mean())


@torch.no_grad()
def derived_right(model: Any, ids: Int[Tensor, "batch tokens"]) -> float:
    """The share of derivations whose answer the model gives."""
    answers = torch.tensor(ANSWERS)
    found = model(input_ids=ids, use_cache=False).logits[:, answers - 1].argmax(-1)
    return float((found == ids[:, answers]).float().mean())


@dataclass(frozen=True, kw_only=True, eq=False)
class IdleLooks(Editor):
    """Adds `strength` to the logits of key positions `columns` in the idle heads."""

    columns: Sequence[int]
    strength: float = 8.0

    def acts_at(self, site: Site) -> bool:
        return bool(self.columns)

    def edit_call(self, call: AttentionCall) -> AttentionCall:
        wanted = torch.isin(call.key_positions, torch.tensor(self.columns, device=call.query.device))
        bias = torch.zeros(1, call.heads, 1, call.keys, device=call.query.device)
        bias[:, IDLE, 0] = self.strength * wanted
        return call.replace(bias=bias if call.bias is None else call.bias + bias)


def _cut_off(projection: nn.Linear) -> None:
    """Takes the idle head's way out of a layer, and keeps it out of training."""
    size = WIDTH // HEADS
    keep = torch.ones(WIDTH)
    keep[IDLE * size : (IDLE + 1) * size] = 0
    with torch.no_grad():
        projection.weight *= keep
    projection.weight.register_hook(lambda gradient: gradient * keep)
