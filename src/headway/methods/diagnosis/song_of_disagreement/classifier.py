"""What is explained: a function of word embeddings, the example it is asked about, and the baseline it is compared
with.

    f_c(E) = p(c | E),   E ∈ R^{tokens × width} the word embeddings,   E0: a baseline embedding at every position

A classifier needs `embed` and `outputs`; attention methods also need a `host` that passes the door, or `token_weights`
where its attention is one distribution over tokens. `outputs` has a column per class: a model with one logit gives two,
so that the predicted side can be explained.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from weakref import WeakSet

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from headway.door.evaluating import evaluating
from headway.errors import ArgumentError, NumericError, unknown

log = logging.getLogger(__name__)

Readout = Literal["first", "last", "mean"]
READOUTS: tuple[Readout, ...] = ("first", "last", "mean")
BASELINES = ("pad", "mask", "mean", "zero")
#: Classifiers whose empty pad or mask embedding was warned of: once is enough.
_TOLD: WeakSet[Classifier] = WeakSet()


@dataclass(frozen=True, kw_only=True, eq=False)
class Example:
    """One text as the classifier reads it. `special` marks [CLS], [SEP] and their like; `words` numbers the word of
    each token (−1 for special ones). `mask` is False on padding, None without any. `label` is the right class where
    it is known, `rationale` marks the tokens that decide it, where that is known."""

    ids: Int[Tensor, " tokens"]
    tokens: tuple[str, ...]
    special: Bool[np.ndarray, " tokens"]
    words: Int[np.ndarray, " tokens"]
    mask: Bool[Tensor, " tokens"] | None = None
    label: int | None = None
    rationale: Bool[np.ndarray, " tokens"] | None = None
    text: str = ""

    def __post_init__(self) -> None:
        count = self.ids.numel()
        if self.ids.ndim != 1 or count == 0:
            raise ArgumentError(f"ids: got shape {tuple(self.ids.shape)}, expected a flat list of at least one token.")
        for name in ("tokens", "special", "words", "mask", "rationale"):
            given = getattr(self, name)
            if given is not None and len(given) != count:
                raise ArgumentError(f"{name}: got {len(given)} entries, expected one for each of {count} tokens.")

    @property
    def real(self) -> Bool[np.ndarray, " tokens"]:
        """Tokens that are no padding."""
        return np.ones(self.ids.numel(), bool) if self.mask is None else self.mask.numpy().astype(bool)

    def padded(self, pad_id: int, count: int) -> Example:
        """The same text with `count` tokens of padding behind it."""
        width = (0, count)
        return Example(
            ids=nn.functional.pad(self.ids, width, value=pad_id),
            tokens=(*self.tokens, *["[PAD]"] * count),
            special=np.pad(self.special, width, constant_values=True),
            words=np.pad(self.words, width, constant_values=-1),
            mask=torch.from_numpy(np.pad(self.real, width)),
            label=self.label,
            rationale=None if self.rationale is None else np.pad(self.rationale, width),
            text=self.text,
        )


class Classifier:
    """A function of word embeddings. `module` is everything it runs; `host` the part whose attention passes the door,
    None where there is none; `readout` the query rows whose attention reaches the output. `log_scale` says that the
    outputs are log-probabilities."""

    module: nn.Module
    host: nn.Module | None = None
    readout: Readout = "first"
    log_scale: bool = False
    pad_id: int | None = None
    mask_id: int | None = None

    @property
    def embedding(self) -> nn.Embedding:
        raise NotImplementedError

    def embed(self, ids: Int[Tensor, "batch tokens"]) -> Float[Tensor, "batch tokens width"]:
        return self.embedding(ids)

    def outputs(
        self, embeddings: Float[Tensor, "batch tokens width"], mask: Bool[Tensor, "batch tokens"]
    ) -> Float[Tensor, "batch classes"]:
        raise NotImplementedError

    def token_weights(
        self, embeddings: Float[Tensor, "batch tokens width"], mask: Bool[Tensor, "batch tokens"]
    ) -> Float[Tensor, "batch tokens"] | None:
        """The attention over tokens where there is one such distribution (recurrent classifiers)."""
        return None

    def hidden(
        self, embeddings: Float[Tensor, "batch tokens width"], mask: Bool[Tensor, "batch tokens"]
    ) -> list[Float[Tensor, "batch tokens width"]]:
        """Token representations behind each layer of the host."""
        raise ArgumentError(f"classifier: {type(self).__name__} has no layers to read; leave value zeroing out.")

    @torch.no_grad()
    def predict(self, examples: Sequence[Example]) -> Float[np.ndarray, "examples classes"]:
        """The outputs for each example, one by one."""
        with evaluating(self.module):
            rows = [self.outputs(*inputs_of(self, example))[0] for example in examples]
        return torch.stack(rows).double().cpu().numpy()


class HostClassifier(Classifier):
    """A transformers host with a classification head, or a bare host with a `head` of its own.

    head: pooled representation (batch, width) -> logits (batch, classes); None for a host that gives `logits`.
    readout: how tokens become one vector: "first" ([CLS]), "last" (decoders) or "mean". With a host's own logits it
    must be what that host does: see `readout_of`. One that reads the last token is not given the padding behind it,
    which it could not tell from words, and one without a padding token gets its rows one by one.

    Raises ArgumentError for a host without logits and head, and for an unknown readout."""

    def __init__(
        self,
        host: nn.Module,
        *,
        head: Callable[[Tensor], Tensor] | None = None,
        readout: Readout = "first",
        pad_id: int | None = None,
        mask_id: int | None = None,
        normalise: bool = False,
    ) -> None:
        if readout not in READOUTS:
            raise unknown("readout", readout, READOUTS)
        self.host = host
        self.link = Probabilities()
        self.module = nn.ModuleList([host, *([head] if isinstance(head, nn.Module) else []), self.link])
        self.head, self.readout, self.normalise = head, readout, normalise
        config: Any = host.config
        self.pad_id = config.pad_token_id if pad_id is None else pad_id
        self.mask_id = mask_id

    @property
    def embedding(self) -> nn.Embedding:
        host: Any = self.host
        return host.get_input_embeddings()

    def pooled(self, embeddings: Tensor, mask: Tensor) -> Float[Tensor, "batch width"]:
        """The vector that the head reads."""
        host: Any = self.host
        states = host(inputs_embeds=embeddings, attention_mask=mask.long()).last_hidden_state
        vector = (states * readout_weights(self.readout, mask).to(states.dtype)[..., None]).sum(1)
        return nn.functional.normalize(vector, dim=-1) if self.normalise else vector

    def outputs(self, embeddings: Tensor, mask: Tensor) -> Tensor:
        if self.head is not None:
            return self.link(self.head(self.pooled(embeddings, mask)))
        host: Any = self.host
        if self.readout == "last":
            embeddings, mask = _without_padding(embeddings, mask)
        alone = self.readout == "last" and host.config.get_text_config().pad_token_id is None
        parts = zip(embeddings.split(1), mask.split(1), strict=True) if alone else [(embeddings, mask)]
        answers = [host(inputs_embeds=some, attention_mask=seen.long()) for some, seen in parts]
        if getattr(answers[0], "logits", None) is None:
            raise ArgumentError(
                f"host: {type(host).__name__} gives no logits, expected a sequence classifier. Pass head=… (a probe on "
                "its pooled representation)."
            )
        return self.link(torch.cat([answer.logits for answer in answers]))

    def hidden(self, embeddings: Tensor, mask: Tensor) -> list[Tensor]:
        # Without the head, which a batch of some hosts would need a padding token for.
        host: Any = getattr(self.host, "base_model", self.host)
        states = host(inputs_embeds=embeddings, attention_mask=mask.long(), output_hidden_states=True).hidden_states
        return list(states[1:])


class NextToken(Classifier):
    """A causal language model asked for its next token: log-probabilities over the vocabulary, or over `choices` (ids)
    alone. The readout is the last token."""

    log_scale = True
    readout: Readout = "last"

    def __init__(self, host: nn.Module, *, choices: Sequence[int] | None = None, pad_id: int | None = None) -> None:
        self.host = self.module = host
        self.choices = None if choices is None else list(choices)
        config: Any = host.config
        self.pad_id = pad_id if pad_id is not None else config.pad_token_id
        if self.pad_id is None:
            end = config.eos_token_id
            self.pad_id = end[0] if isinstance(end, list) else end

    @property
    def embedding(self) -> nn.Embedding:
        host: Any = self.host
        return host.get_input_embeddings()

    def outputs(self, embeddings: Tensor, mask: Tensor) -> Tensor:
        host: Any = self.host
        logits = host(inputs_embeds=embeddings, attention_mask=mask.long(), use_cache=False).logits
        last = mask.long().cumsum(1).argmax(1)
        scores = logits[torch.arange(len(last)), last].float().log_softmax(-1)
        return scores if self.choices is None else scores[:, self.choices]


class Probabilities(nn.Module):
    """Softmax over classes; one logit z stands for the pair (−z, z). Two classes go through one sigmoid of their
    difference: the same function, and a module whose rule DeepLIFT has, which it has for no softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.sigmoid = nn.Sigmoid()

    def forward(self, logits: Float[Tensor, "batch classes"]) -> Float[Tensor, "batch classes"]:
        if logits.ndim != 2:
            raise ArgumentError(f"logits: got shape {tuple(logits.shape)}, expected (batch, classes).")
        if logits.shape[1] > 2:
            return logits.softmax(-1)
        difference = logits[:, 0] if logits.shape[1] == 1 else logits[:, 1] - logits[:, 0]
        return self.sigmoid(torch.stack([-difference, difference], 1))


def _without_padding(embeddings: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Rows up to the last token that any of them has."""
    length = int(mask.any(0).nonzero()[-1]) + 1
    if not bool(mask[:, length - 1].all()):
        raise ArgumentError(
            "mask: got rows of different lengths for a classifier that reads the last token, expected one length. Give "
            "them one by one."
        )
    return embeddings[:, :length], mask[:, :length]


def readout_of(host: nn.Module, ids: Int[Tensor, "1 tokens"]) -> Readout:
    """Which tokens' last states the classes of a host hang on: the first one, the last one, or several ("mean").

    Read from the gradient of its logits, which is exact and needs no list of architectures."""
    model: Any = host
    kept: list[Tensor] = []
    handle = model.base_model.register_forward_hook(lambda _module, _given, output: kept.append(output[0]))
    try:
        with evaluating(host), torch.enable_grad():
            embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
            logits = model(inputs_embeds=embeddings, attention_mask=torch.ones_like(ids)).logits
            (gradient,) = torch.autograd.grad(logits.square().sum(), kept[0], allow_unused=True)
    finally:
        handle.remove()
    if gradient is None:
        return "first"
    read = gradient[0].abs().sum(-1).nonzero()[:, 0].tolist()
    return "first" if read == [0] else "last" if read == [ids.shape[1] - 1] else "mean"


def readout_weights(readout: Readout, mask: Bool[Tensor, "batch tokens"]) -> Float[Tensor, "batch tokens"]:
    """Weight of each token's row in what is read: one for the first or last token, equal ones for the mean."""
    if readout == "mean":
        return mask / mask.sum(1, keepdim=True)
    weights = torch.zeros(mask.shape, device=mask.device)
    index = torch.zeros_like(mask[:, 0], dtype=torch.long) if readout == "first" else mask.long().cumsum(1).argmax(1)
    weights[torch.arange(len(mask)), index] = 1.0
    return weights


def inputs_of(classifier: Classifier, example: Example) -> tuple[Tensor, Tensor]:
    """Embeddings (1, tokens, width), detached, and mask (1, tokens) of one example."""
    ids = example.ids[None].to(classifier.embedding.weight.device)
    size = classifier.embedding.num_embeddings
    if int(ids.min()) < 0 or int(ids.max()) >= size:
        raise ArgumentError(f"ids: got {int(ids.min())}..{int(ids.max())}, expected token ids in 0..{size - 1}.")
    return classifier.embed(ids).detach(), torch.from_numpy(example.real)[None].to(ids.device)


def baseline_of(
    classifier: Classifier, kind: str, embeddings: Float[Tensor, "1 tokens width"], mask: Bool[Tensor, "1 tokens"]
) -> Float[Tensor, "1 tokens width"]:
    """The baseline embedding at every real position; padding stays what it is.

    kind: "pad" or "mask", the embedding of that token; "mean", of the whole vocabulary; "zero". A pad embedding of
    zeros is warned about: many libraries never train it, and then "pad" is "zero" under another name.

    Raises ArgumentError for an unknown kind, and for a token that the classifier lacks."""
    if kind not in BASELINES:
        raise unknown("baseline", kind, BASELINES)
    table = classifier.embedding.weight.detach()
    if kind in ("pad", "mask"):
        token = classifier.pad_id if kind == "pad" else classifier.mask_id
        if token is None or not 0 <= token < len(table):
            raise ArgumentError(
                f"baseline: got {kind!r}, but the classifier's {kind} token is {token}, outside its vocabulary of "
                f"{len(table):,}; use another of {', '.join(BASELINES)}."
            )
        vector = table[token]
        if not bool(vector.any()) and classifier not in _TOLD:
            _TOLD.add(classifier)
            log.warning("The embedding of the %s token is zero: this baseline is the zero vector.", kind)
    else:
        vector = table.mean(0) if kind == "mean" else torch.zeros_like(table[0])
    return torch.where(mask[..., None], vector.expand_as(embeddings), embeddings)


def target_of(outputs: Float[Tensor, "1 classes"], example: Example, target: str | int) -> int:
    """The class that is explained: "predicted", "gold" (the example's label) or a number."""
    if not bool(torch.isfinite(outputs).all()):
        raise NumericError(
            "outputs: got NaN or infinity, expected finite numbers. Check the weights of the classifier."
        )
    classes = outputs.shape[1]
    if target == "predicted":
        return int(outputs[0].argmax())
    if target == "gold" and example.label is None:
        raise ArgumentError("target: got 'gold' for an example without a label. Give labels, or explain 'predicted'.")
    wanted = example.label if target == "gold" else target
    if not isinstance(wanted, int) or isinstance(wanted, bool) or not 0 <= wanted < classes:
        raise ArgumentError(f"target: got {wanted!r}, expected 'predicted', 'gold' or a class in 0..{classes - 1}.")
    return wanted


def encode(
    tokenizer: Any,
    text: str,
    *,
    tokens: int,
    label: int | None = None,
    rationale: Sequence[tuple[int, int]] | None = None,
) -> Example:
    """A text through a Hugging Face tokenizer, cut to `tokens` tokens; words come from the tokenizer where it knows.

    rationale: [start, end) characters that decide the label; every token that shares one with them is marked. Raises
    ArgumentError for a rationale outside the text, and for one with a tokenizer that does not know its characters."""
    fast = bool(getattr(tokenizer, "is_fast", False))
    coded = tokenizer(
        text, truncation=True, max_length=tokens, return_special_tokens_mask=True, return_offsets_mapping=fast,
        verbose=False,
    )  # fmt: skip
    ids = coded["input_ids"]
    special = np.array(coded["special_tokens_mask"], bool)
    numbers = coded.word_ids() if fast else [None if s else i for i, s in enumerate(special)]
    return Example(
        ids=torch.tensor(ids, dtype=torch.long),
        tokens=tuple(tokenizer.convert_ids_to_tokens(ids)),
        special=special,
        words=np.array([-1 if number is None else number for number in numbers]),
        label=label,
        rationale=None if rationale is None else _marked(coded, special, rationale, text, fast),
        text=text,
    )


def _marked(coded: Any, special: np.ndarray, spans: Sequence[tuple[int, int]], text: str, fast: bool) -> np.ndarray:
    """Tokens that share a character with one of the spans."""
    if not fast:
        raise ArgumentError("rationale: the tokenizer does not know its characters; use a fast one, or leave it out.")
    for start, end in spans:
        if not 0 <= start < end <= len(text):
            raise ArgumentError(f"rationale: got [{start}, {end}), expected 0 ≤ start < end ≤ {len(text)} characters.")
    offsets = np.array(coded["offset_mapping"]).reshape(-1, 2)
    shared = [(offsets[:, 0] < end) & (offsets[:, 1] > start) for start, end in spans]
    return np.any([np.zeros(len(offsets), bool), *shared], axis=0) & ~special
