"""The trained toy of the PosIR recipe: two bi-encoders that differ only in where their training answers stood.

Documents are single filler words with facts "name attribute" between them; a question is another word for the
attribute, and the name. One fact of each training document is asked for and others are not. For one encoder the fact
that is asked for stands anywhere, for the other in the first fifth, so that it pays to leave out the rest.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch

from headway.methods.diagnosis.posir import TransformersEncoder
from headway.tasks.positioned_evidence import Fact, PositionedCorpus, Sizes, placed, scattered

NAMES, ATTRIBUTES, FILLERS = 256, 8, 200
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
SIZES: Sizes = (8, 48)
#: Length buckets in words, and the share of a document in which the early encoder's answers stand.
EDGES, EARLY = (12, 24, 36), (0.0, 0.2)
ANYWHERE = (0.0, 1.0)
OTHERS = 2
WIDTH, LAYERS, HEADS, POSITIONS = 64, 2, 4, 64
BATCH, RATE, TEMPERATURE = 48, 2e-3, 0.05


def corpus(
    documents: int,
    random: np.random.Generator,
    *,
    asked: int = 1,
    others: int = OTHERS,
    where: tuple[float, float] = ANYWHERE,
    sizes: Sizes = SIZES,
) -> PositionedCorpus:
    """Documents with `asked` facts in `where` and `others` anywhere. No fact stands in two documents, as far as there
    are enough."""
    room = NAMES * ATTRIBUTES
    drawn = random.permutation(room)[np.arange(documents * (asked + others)) % room]
    texts, questions = {}, []
    for number in range(documents):
        own = drawn[number * (asked + others) : (number + 1) * (asked + others)].tolist()
        facts = [_fact(one) for one in own]
        size = int(random.integers(sizes[0], sizes[1] + 1)) - 2 * len(facts)
        words = [f"w{i}" for i in random.integers(FILLERS, size=max(size, 1))]
        sentences = scattered(words, [fact.statement for fact in facts[asked:]], random)
        name = f"d{number:05d}"
        texts[name], found = placed(name, sentences, facts[:asked], where, random)
        questions += found
    return PositionedCorpus(documents=texts, questions=tuple(questions), about=f"{documents} documents of the toy")


def _fact(number: int) -> Fact:
    name, attribute = divmod(number, ATTRIBUTES)
    return Fact(statement=f"n{name} a{attribute}", question=f"q{attribute} n{name}")


@lru_cache(maxsize=1)
def tokenizer() -> Any:
    """One token a word, with [CLS] in front and [SEP] behind."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = [
        *SPECIAL,
        *(f"w{i}" for i in range(FILLERS)),
        *(f"n{i}" for i in range(NAMES)),
        *(f"{kind}{i}" for kind in "aq" for i in range(ATTRIBUTES)),
    ]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


def bi_encoder(seed: int, *, name: str = "toy", pooling: str = "mean") -> TransformersEncoder:
    """An untrained encoder."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=len(tokenizer()),
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=2 * WIDTH,
        max_position_embeddings=POSITIONS,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.1,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = BertModel(config, add_pooling_layer=False)
    return TransformersEncoder(model=model.eval(), tokenizer=tokenizer(), pooling=pooling, name=name, batch=64)


def train(steps: int, seed: int, *, where: tuple[float, float], name: str) -> TransformersEncoder:
    """A bi-encoder after `steps` batches of fresh documents, each against the others of its batch."""
    encoder = bi_encoder(seed, name=name)
    random = np.random.default_rng([seed, 1])
    optimizer = torch.optim.AdamW(encoder.model.parameters(), lr=RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=RATE, total_steps=max(steps, 2))
    encoder.model.train()
    for _ in range(steps):
        made = corpus(BATCH, random, where=where)
        asked = encoder.pooled(encoder.tokenized([q.text for q in made.questions], is_query=True))
        found = encoder.pooled(encoder.tokenized([made.documents[q.document] for q in made.questions], is_query=False))
        cosine = torch.nn.functional.normalize(asked, dim=-1) @ torch.nn.functional.normalize(found, dim=-1).T
        target = torch.arange(len(cosine))
        sides = torch.stack([cosine, cosine.T]).flatten(0, 1) / TEMPERATURE
        loss = torch.nn.functional.cross_entropy(sides, target.repeat(2))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    encoder.model.eval()
    return encoder
