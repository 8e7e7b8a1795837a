"""PosIR: does a retriever find an answer less often when it stands later in its document?

    PSI = 1 − min_b m_b / max_b m_b ,    m_b = mean nDCG@10 of the queries whose answer lies in position bin b

Paper: PosIR: Position-Aware Heterogeneous Information Retrieval Benchmark, arXiv 2601.08363. `data` and `reading` hold
sets with reference spans, `encoders`, `encoding` and `retrieval` make rankings, `metrics` scores them, `sensitivity`
says what depends on the position and what is chance, `saliency`, `attention` and `paired` ask why.

The released code gives one number without its chance level, and prefixes queries with an instruction for one family of
models only; here the null is part of the index and a prefix is an option of the encoder.
"""

from __future__ import annotations

from headway.card import Card
from headway.methods.diagnosis.posir.attention import AttentionByPosition, pooling_attention
from headway.methods.diagnosis.posir.data import (
    Query,
    RetrievalSet,
    check_texts,
    count_tokens,
    from_corpus,
    from_documents,
    keyword_questions,
    mismatch,
    settle_positives,
)
from headway.methods.diagnosis.posir.encoders import (
    INSTRUCTION,
    Bm25,
    CallableEncoder,
    Encoder,
    PooledEncoder,
    Scorer,
    SentenceTransformersEncoder,
    TransformersEncoder,
    load_sentence_transformer,
)
from headway.methods.diagnosis.posir.encoding import encoded, encoded_blocks
from headway.methods.diagnosis.posir.evaluation import Evaluation, evaluate, pool_domains
from headway.methods.diagnosis.posir.metrics import retrieval_measures, single_ndcg
from headway.methods.diagnosis.posir.paired import Paired, paired_intervention
from headway.methods.diagnosis.posir.planted import WordEncoder, word_tokens
from headway.methods.diagnosis.posir.reading import read_set, read_sets, write_set
from headway.methods.diagnosis.posir.retrieval import Ranking, cosine_top, rank_scores
from headway.methods.diagnosis.posir.saliency import Curves, middle_evidence, saliency
from headway.methods.diagnosis.posir.sensitivity import (
    AgainstChance,
    Sensitivity,
    bin_of,
    bucket_of,
    by_bucket,
    psi,
    sensitivity,
)

CARD = Card(
    slug="posir",
    title="PosIR: Position-Aware Heterogeneous Information Retrieval Benchmark",
    year=2026,
    arxiv="2601.08363",
    family="diagnosis",
    stages=("Observer",),
    needs=("a text encoder, or any function that scores documents",),
    knobs={
        "edges": "length buckets in tokens",
        "bins": "bins of the relative position",
        "several": "what to do with queries that have several positives",
        "max_tokens": "what the encoder reads of a document",
    },
    summary="Measures whether a retriever finds answers less often when they stand later in a document.",
)

__all__ = [
    "CARD",
    "INSTRUCTION",
    "AgainstChance",
    "AttentionByPosition",
    "Bm25",
    "CallableEncoder",
    "Curves",
    "Encoder",
    "Evaluation",
    "Paired",
    "PooledEncoder",
    "Query",
    "Ranking",
    "RetrievalSet",
    "Scorer",
    "Sensitivity",
    "SentenceTransformersEncoder",
    "TransformersEncoder",
    "WordEncoder",
    "bin_of",
    "bucket_of",
    "by_bucket",
    "check_texts",
    "cosine_top",
    "count_tokens",
    "encoded",
    "encoded_blocks",
    "evaluate",
    "from_corpus",
    "from_documents",
    "keyword_questions",
    "load_sentence_transformer",
    "middle_evidence",
    "mismatch",
    "paired_intervention",
    "pool_domains",
    "pooling_attention",
    "psi",
    "rank_scores",
    "read_set",
    "read_sets",
    "retrieval_measures",
    "saliency",
    "sensitivity",
    "settle_positives",
    "single_ndcg",
    "word_tokens",
    "write_set",
]
