"""The unit of work of `select`: shards of consecutive records, the plan that cuts them, and the ledger of their
scores."""

from __future__ import annotations

from headway.select.shards.ledger import Ledger, ScoredRecord
from headway.select.shards.plan import Plan, make_plan
from headway.select.shards.work import Shard, score_shard

__all__ = ["Ledger", "Plan", "ScoredRecord", "Shard", "make_plan", "score_shard"]
