"""Secondary attention sinks: later tokens that one middle MLP turns into sinks along the first token's direction.

    flagged(t, l)  =  |cos(h_t^l, h_b^l)| > 0.9   for t > b and layers inside the primary sink's range
    level(t)       =  (first flagged layer, number of flagged layers)

`detect` works on hidden states, `analyse` on a model and a text: primary range, detections with lifetimes and labels,
level table, sink score, origin in the MLP, triggers, norms and matrix entropy; `rescale_writes` intervenes.

Paper: "On the Existence and Behaviour of Secondary Attention Sinks", arXiv 2512.22213. The released code always finds a
primary sink and has label constants for 28 to 64 layers; here a flat norm profile gives "no primary sink found"
(`min_jump=0` as released), and `rule=` selects the paper's constants or ones scaled to the depth of the model.
"""

from __future__ import annotations

from headway.card import Card
from headway.methods.sinks.secondary_sinks.analysis import SecondarySinks, analyse, analyse_rows
from headway.methods.sinks.secondary_sinks.detection import (
    LabelRule,
    Primary,
    SinkMap,
    TokenSink,
    detect,
    find_primary,
    label_rule,
)
from headway.methods.sinks.secondary_sinks.intervention import Rescaled, rescale_writes
from headway.methods.sinks.secondary_sinks.law import lifetime_law, norm_for_lifetime, simulate_lifetimes
from headway.methods.sinks.secondary_sinks.levels import LevelTable
from headway.methods.sinks.secondary_sinks.measures import (
    chunk_entropies,
    group_profile,
    matrix_entropy,
    sink_score,
    token_groups,
)
from headway.methods.sinks.secondary_sinks.origin import ALIGNED, Origin, stage_cosines
from headway.methods.sinks.secondary_sinks.stream import Reading, read_streams
from headway.methods.sinks.secondary_sinks.structure import find_structure
from headway.methods.sinks.secondary_sinks.triggers import Trigger

__all__ = [
    "ALIGNED",
    "CARD",
    "LabelRule",
    "LevelTable",
    "Origin",
    "Primary",
    "Reading",
    "Rescaled",
    "SecondarySinks",
    "SinkMap",
    "TokenSink",
    "Trigger",
    "analyse",
    "analyse_rows",
    "chunk_entropies",
    "detect",
    "find_primary",
    "find_structure",
    "group_profile",
    "label_rule",
    "lifetime_law",
    "matrix_entropy",
    "norm_for_lifetime",
    "read_streams",
    "rescale_writes",
    "simulate_lifetimes",
    "sink_score",
    "stage_cosines",
    "token_groups",
]

CARD = Card(
    slug="secondary-sinks",
    title="On the Existence and Behaviour of Secondary Attention Sinks",
    year=2025,
    arxiv="2512.22213",
    family="sinks",
    stages=("observe",),
    needs=("decoder blocks with an MLP", "one forward pass with hooks"),
    knobs={
        "threshold": "cosine with the primary sink's stream above which a token is flagged (0.9)",
        "lifetime": "count of flagged layers, or the longest run of them",
        "rule": "label constants: the paper's, scaled to the depth, or chosen by it",
        "min_jump": "jump of the primary's norm, in median norms of other tokens, below which there is none (2)",
        "chat_template": "whether position 2 may hold the primary sink",
    },
    summary="Finds the later tokens that a middle MLP turns into attention sinks: at which layers, how long, and why.",
)
