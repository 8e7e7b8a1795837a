"""Agreement of explanations: attention and attribution methods on one classifier, compared with each other, with
their own noise, and with what is true.

    with any classifier of word embeddings (a transformers host through the door, or a recurrent one):
    explain(...)           token scores by attention (last layer, mean, rollout, flow, values, value zeroing) and by
                           attribution (gradients, integrated gradients, Grad-SHAP, DeepLIFT, LIME, ablation)
    agreement_table(...)   Kendall's τ, top-k τ, overlap and others for every pair, with counts of undefined cases
    faithfulness(...)      what the best tokens do to the output; average_precision against a planted rationale
    make_sheet(...)        a blinded sheet for people, and its answers read back

Rank correlation between explanations is not evidence that either is right: methods that all find the tokens that
decide may order the rest in any way, and the rest are most of the pairs. So every agreement stands beside noise
ceilings and chance.

Paper: A Song of (Dis)agreement: Evaluating the Evaluation of Explainable Artificial Intelligence in Natural Language
Processing (HHAI 2022, doi 10.3233/FAIA220190; workshop form arXiv 2105.03287). The released self-attention
multiplies values by an output matrix that is not transposed and applies head weights after it, so its fine-tuned
transformer is not the standard function; here every host is the stock model. Its DeepLIFT passes layer norm, GELU
and attention products as plain gradients; here that is refused unless `allow_unsupported`, and the completeness
error stands beside each result. Its plain average of attention takes the largest weight of each token's own row; it
is kept as `attention_peak`, and `attention_mean` is what the readout attends to.
"""

from __future__ import annotations

from headway.card import Card
from headway.methods.diagnosis.song_of_disagreement.agreement import (
    MEASURES,
    ap_correlation,
    kendall,
    measure_named,
    non_zero_k,
    overlap,
    pearson,
    rank_biased_overlap,
    spearman,
    top_k_kendall,
    weighted_kendall,
)
from headway.methods.diagnosis.song_of_disagreement.attention_explanations import (
    attention_scores,
    rollout,
    value_zeroing,
)
from headway.methods.diagnosis.song_of_disagreement.attributions import (
    Explanation,
    Problem,
    Settings,
    baseline_sensitivity,
    prepare,
)
from headway.methods.diagnosis.song_of_disagreement.classifier import (
    Classifier,
    Example,
    HostClassifier,
    NextToken,
    encode,
)
from headway.methods.diagnosis.song_of_disagreement.deep_rules import OperationCheck, check_operations
from headway.methods.diagnosis.song_of_disagreement.explaining import (
    METHODS,
    Method,
    explain,
    relative_errors,
    usable_methods,
)
from headway.methods.diagnosis.song_of_disagreement.faithfulness import (
    Faithfulness,
    average_precision,
    faithfulness,
)
from headway.methods.diagnosis.song_of_disagreement.flow import attention_flow
from headway.methods.diagnosis.song_of_disagreement.human import (
    Answer,
    Judgement,
    Sheet,
    judge,
    krippendorff_alpha,
    make_sheet,
    read_answers,
)
from headway.methods.diagnosis.song_of_disagreement.probe import accuracy, fit_probe
from headway.methods.diagnosis.song_of_disagreement.recurrent import AttentiveLSTM, RecurrentClassifier, entmax
from headway.methods.diagnosis.song_of_disagreement.table import (
    PairAgreement,
    agreement_table,
    chance_interval,
    disattenuated,
    frequency_scores,
    items_of,
    mean_off_diagonal,
    near_tie_share,
    pair_agreement,
    position_scores,
    random_scores,
)

CARD = Card(
    slug="song-of-disagreement",
    title="A Song of (Dis)agreement: Evaluating the Evaluation of Explainable Artificial Intelligence in NLP",
    year=2022,
    arxiv="2105.03287",
    family="diagnosis",
    stages=("observer", "editor"),
    needs=("a classifier of word embeddings",),
    summary="Compares attention and attribution explanations with each other, with their own noise and with the truth.",
    knobs={
        "baseline": "what a removed token becomes: pad, mask, mean or zero embedding",
        "sign": "abs, positive or signed scores; attention has no sign",
        "special": "whether special tokens are ranked, for all methods alike",
        "measure": "kendall, spearman, pearson, weighted, ap, rbo, top-K, top-K%, overlap-K",
    },
)

__all__ = [
    "CARD",
    "MEASURES",
    "METHODS",
    "Answer",
    "AttentiveLSTM",
    "Classifier",
    "Example",
    "Explanation",
    "Faithfulness",
    "HostClassifier",
    "Judgement",
    "Method",
    "NextToken",
    "OperationCheck",
    "PairAgreement",
    "Problem",
    "RecurrentClassifier",
    "Settings",
    "Sheet",
    "accuracy",
    "agreement_table",
    "ap_correlation",
    "attention_flow",
    "attention_scores",
    "average_precision",
    "baseline_sensitivity",
    "chance_interval",
    "check_operations",
    "disattenuated",
    "encode",
    "entmax",
    "explain",
    "faithfulness",
    "fit_probe",
    "frequency_scores",
    "items_of",
    "judge",
    "kendall",
    "krippendorff_alpha",
    "make_sheet",
    "mean_off_diagonal",
    "measure_named",
    "near_tie_share",
    "non_zero_k",
    "overlap",
    "pair_agreement",
    "pearson",
    "position_scores",
    "prepare",
    "random_scores",
    "rank_biased_overlap",
    "read_answers",
    "relative_errors",
    "rollout",
    "spearman",
    "top_k_kendall",
    "usable_methods",
    "value_zeroing",
    "weighted_kendall",
]
