"""Diagnose, Localize, Align: agents that obey the wrong instruction, found, located in heads and mended in few layers.

    diagnose   CRAS = mean of four marks (goal, role, knowledge boundary, constraints) of every turn, by a judge
    localize   S = Σ_i ω_i (rank M_i + rank D_i + rank R_i) / 3   by head: what a conflicting message changes there
    align      L = −log σ( β Σ w⁺ρ⁺ − β Σ w⁻ρ⁻ )   with LoRA on the layers that hold the focal heads

Paper: Diagnose, Localize, Align: A Full-Stack Framework for Reliable LLM Multi-Agent Systems under Instruction
Conflicts, arXiv 2509.23188 (v1; later versions say that v1 was not the final draft). Released code exists for the first
and the last stage. The paper credits tokens by focal attention, the released code by a reward model: both are here, as
`weights="attention"` and `weights="reward"`. All formulas of drift, the choice of layers and the putting together of
marks are ours; each module says so.
"""

from __future__ import annotations

from headway.card import Card
from headway.methods.diagnosis.diagnose_localize_align.adapters import (
    Adapted,
    add_lora,
    parse_layers,
    projection_names,
)
from headway.methods.diagnosis.diagnose_localize_align.arbitration import answer_margin, margins, replies
from headway.methods.diagnosis.diagnose_localize_align.conversations import (
    Conversations,
    Rules,
    Turn,
    read_conversations,
)
from headway.methods.diagnosis.diagnose_localize_align.drift import (
    Drift,
    MatchedPair,
    attention_drift,
    condition_weights,
    head_drift,
    jensen_shannon,
    unpadded,
)
from headway.methods.diagnosis.diagnose_localize_align.focal import (
    Concentration,
    GateEffect,
    concentration,
    focal_heads,
    focal_layers,
    gate_effect,
    inverse_layers,
    middle_third,
    random_layers,
)
from headway.methods.diagnosis.diagnose_localize_align.judges import (
    Judge,
    Judgement,
    ModelJudge,
    RuleJudge,
    TextJudge,
    scoring_prompt,
)
from headway.methods.diagnosis.diagnose_localize_align.localize import Localisation, localize
from headway.methods.diagnosis.diagnose_localize_align.pairs import (
    KINDS,
    RELATIONS,
    Item,
    conflict_items,
    locate,
    matched_pair,
)
from headway.methods.diagnosis.diagnose_localize_align.preference import (
    PreferenceLoss,
    attention_weights,
    negative_share,
    preference_loss,
    reward_weights,
    token_logps,
    uniform_weights,
)
from headway.methods.diagnosis.diagnose_localize_align.rubric import (
    DIMENSIONS,
    Rubric,
    generate_rubric,
    rubric_for,
    shipped_rubrics,
)
from headway.methods.diagnosis.diagnose_localize_align.scoring import (
    Agreement,
    Cras,
    Scored,
    agreement,
    by_query,
    cohen_kappa,
    cras,
    lost,
    score_turns,
)
from headway.methods.diagnosis.diagnose_localize_align.training import (
    Aligned,
    AlignSettings,
    PreferencePair,
    align,
    choose_pair,
    prepare_pairs,
)

CARD = Card(
    slug="diagnose-localize-align",
    title="Diagnose, Localize, Align: A Full-Stack Framework for Reliable LLM Multi-Agent Systems under Instruction "
    "Conflicts",
    year=2025,
    arxiv="2509.23188",
    family="diagnosis",
    stages=("Observer",),
    needs=("peft, for LoRA",),
    knobs={
        "judge": "rules, a local model, or any callable",
        "share": "which part of the heads is focal",
        "cover": "the part of the focal score that the focal layers hold",
        "weights": "uniform (DPO), attention (the paper), reward (released code), constant",
        "strength": "how far token weights leave 1",
    },
    summary="Scores how agents keep their role, finds the heads that conflicting instructions move, and trains LoRA on "
    "their layers with a token-weighted preference loss.",
)

__all__ = [
    "CARD",
    "DIMENSIONS",
    "KINDS",
    "RELATIONS",
    "Adapted",
    "Agreement",
    "AlignSettings",
    "Aligned",
    "Concentration",
    "Conversations",
    "Cras",
    "Drift",
    "GateEffect",
    "Item",
    "Judge",
    "Judgement",
    "Localisation",
    "MatchedPair",
    "ModelJudge",
    "PreferenceLoss",
    "PreferencePair",
    "Rubric",
    "RuleJudge",
    "Rules",
    "Scored",
    "TextJudge",
    "Turn",
    "add_lora",
    "agreement",
    "align",
    "answer_margin",
    "attention_drift",
    "attention_weights",
    "by_query",
    "choose_pair",
    "cohen_kappa",
    "concentration",
    "condition_weights",
    "conflict_items",
    "cras",
    "focal_heads",
    "focal_layers",
    "gate_effect",
    "generate_rubric",
    "head_drift",
    "inverse_layers",
    "jensen_shannon",
    "localize",
    "locate",
    "lost",
    "margins",
    "matched_pair",
    "middle_third",
    "negative_share",
    "parse_layers",
    "preference_loss",
    "prepare_pairs",
    "projection_names",
    "random_layers",
    "read_conversations",
    "replies",
    "reward_weights",
    "rubric_for",
    "score_turns",
    "scoring_prompt",
    "shipped_rubrics",
    "token_logps",
    "uniform_weights",
    "unpadded",
]
