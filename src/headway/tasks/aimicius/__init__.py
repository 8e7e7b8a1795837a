"""AIMicius in small: four tasks of work on computing infrastructure, with the scores of the benchmark of that name.

cmdgen      a question             -> one shell command
infrawise   an intent              -> a query for benchmark records, then the records that answer it
optiflow    tables of link speeds  -> a program that prints an all-gather plan, then a faster one
nl2kql      a request              -> a Kusto query

The benchmark itself (Sigma, arXiv 2501.13629) is not public. These are a few tasks of the same kind written for this
project, with the metrics of the paper, so that a scorer can be tried: their scores say nothing about the paper's
numbers. Where the paper compares sentence embeddings (all-MiniLM-L6-v2), the default here is the cosine of hashed
character n-grams (`ngram_similarity`), which knows spelling and no meaning; `embedding_similarity` makes the other
one of an encoder. Nothing a model writes is executed: commands meet a simulated shell, plans a small interpreter.
"""

from __future__ import annotations

from headway.tasks.aimicius import cmdgen, infrawise, kql, optiflow
from headway.tasks.aimicius.scoring import TASKS, evaluate, gold_answers, model_answers
from headway.tasks.aimicius.similarity import Similarity, embedding_similarity, ngram_similarity

__all__ = [
    "TASKS",
    "Similarity",
    "cmdgen",
    "embedding_similarity",
    "evaluate",
    "gold_answers",
    "infrawise",
    "kql",
    "model_answers",
    "ngram_similarity",
    "optiflow",
]
