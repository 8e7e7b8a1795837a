"""The local engine: one process, one scorer; the next shards are read while one is scored."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from headway.select.records import Cursor, Record
from headway.select.shards.ledger import Ledger, line_of
from headway.select.shards.plan import Plan
from headway.select.shards.work import Scorer, Shard, score_shard

#: Shards that are read and wait.
AHEAD = 2


def score_locally(plan: Plan, ledger: Ledger, scorer: Scorer, done: Callable[[int], None]) -> None:
    """Scores every shard that the ledger lacks; `done(number)` is called after each. At most `AHEAD` + 1 shards are in
    memory."""
    cursor = Cursor(plan.reading)

    def read(number: int) -> tuple[Shard, list[Record]]:
        shard = plan.shard(number)
        return shard, shard.records(cursor)

    waiting: deque[Future[tuple[Shard, list[Record]]]] = deque()
    missing = ledger.missing()
    with ThreadPoolExecutor(1, "headway-reader") as reader:
        try:
            while True:
                while len(waiting) < AHEAD and (number := next(missing, None)) is not None:
                    waiting.append(reader.submit(read, number))
                if not waiting:
                    return
                shard, records = waiting.popleft().result()
                if (number := next(missing, None)) is not None:
                    waiting.append(reader.submit(read, number))
                ledger.append(line_of(shard.number, score_shard(shard, records, scorer)))
                done(shard.number)
        finally:
            for future in waiting:
                future.cancel()
            reader.submit(cursor.close)
