"""The Ray engine: shards as a Ray Data set, scored by a pool of actors that load the model once each.

What travels is small: places of records to the actors, which read the files themselves (every machine must see the
corpus and the model under the same path), and lines of the ledger back. The driver alone writes. An actor that dies is
started again by Ray and its shards are run again; a shard that was scored twice enters the ledger once.

Without an address a cluster of this machine is started on the loopback interface, without dashboard and usage reports,
and ended with the run.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from headway.errors import ArgumentError, HeadwayError, missing_extra
from headway.select.records import Cursor
from headway.select.shards.ledger import Ledger, line_of, shard_of
from headway.select.shards.plan import Plan
from headway.select.shards.work import Recipe, Scorer, Shard, score_shard

log = logging.getLogger(__name__)

#: Shards of one data set: the driver holds their places, about 2 kB each.
ROUND = 8192
#: Begins a line that holds an error. A line of the ledger begins with a hexadecimal number.
FAILED = "failed: "
#: Memory of the local object store, which holds places and scores alone: Ray's least is 75 MiB.
STORE = 2**27
#: Read by Ray when it is imported or started; what the user has set stays.
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_DEDUP_LOGS": "1",
}
#: On Linux Ray listens on all interfaces, unless it is told that it may not span machines.
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}


class ShardScorer:
    """An actor: builds the scorer once, scores the shards it is given. An error of Headway's own travels as a line,
    since Ray would wrap it, and try again what cannot succeed."""

    def __init__(self, recipe: Recipe, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self.recipe = recipe
        self.scorer: Scorer | None = None
        self.cursor: Cursor | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        try:
            return {"line": [self.line(Shard.from_json(str(text))) for text in batch["shard"]]}
        except HeadwayError as error:
            return {"line": [f"{FAILED}{error}"]}

    def line(self, shard: Shard) -> str:
        self.scorer = self.scorer or self.recipe.build()
        if self.cursor is None or self.cursor.reading != shard.reading:
            self.cursor = Cursor(shard.reading)
        return line_of(shard.number, score_shard(shard, shard.records(self.cursor), self.scorer)).decode()


def score_on_ray(
    plan: Plan,
    ledger: Ledger,
    recipe: Recipe,
    done: Callable[[int], None],
    *,
    workers: int = 2,
    threads: int = 1,
    gpus: float = 0,
    address: str | None = None,
) -> None:
    """Scores every shard that the ledger lacks on `workers` actors of `threads` CPUs and `gpus` GPUs each."""
    if workers < 1 or threads < 1:
        raise ArgumentError(f"workers, threads: got {workers} and {threads}, expected 1 or more of both.")
    ray = _ray(local=address is None)
    missing = ledger.missing()
    with _cluster(ray, address, workers * threads, workers * gpus):
        while numbers := list(itertools.islice(missing, ROUND)):
            rows = [{"shard": plan.shard(number).to_json()} for number in numbers]
            scored = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
                ShardScorer,
                batch_size=1,
                batch_format="numpy",
                compute=ray.data.ActorPoolStrategy(size=min(workers, len(rows)), max_tasks_in_flight_per_actor=2),
                num_cpus=threads,
                num_gpus=gpus or None,
                fn_constructor_args=(recipe, threads),
            )
            try:
                for row in scored.iter_rows():
                    if row["line"].startswith(FAILED):
                        raise HeadwayError(row["line"].removeprefix(FAILED))
                    if ledger.append(line := row["line"].encode()):
                        done(shard_of(line))
            except ray.exceptions.RayError as error:
                first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
                raise HeadwayError(
                    f"ray: the run on the cluster failed ({first.strip()}). What is scored is kept: run the same "
                    "command again."
                ) from error


def _ray(*, local: bool) -> Any:
    for name, value in (QUIET | LOOPBACK if local else QUIET).items():
        os.environ.setdefault(name, value)
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise missing_extra("ray[data]", "scale", "the engine ray") from error
    return ray


@contextmanager
def _cluster(ray: Any, address: str | None, cpus: int, gpus: float) -> Iterator[None]:
    """A connection to the cluster at `address`, or a local cluster for the time of the block. A connection that is
    there already is used and left."""
    if ray.is_initialized():
        yield
        return
    shared = {"log_to_driver": False, "logging_level": logging.ERROR, "include_dashboard": False}
    try:
        if address is None:
            ray.init(address="local", num_cpus=cpus, num_gpus=gpus or None, object_store_memory=STORE,
                     **shared)  # fmt: skip
            if (where := ray.nodes()[0]["NodeManagerAddress"]) != "127.0.0.1":
                log.warning("Ray was imported before and listens on %s, not on the loopback interface alone.", where)
        else:
            ray.init(address=address, **{k: v for k, v in shared.items() if k != "include_dashboard"})
    except Exception as error:  # Ray raises a bare Exception where a node does not start in time.
        where = "a local cluster" if address is None else f"the cluster at {address}"
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        fix = (
            "Run the same command again when the machine is less busy, or with --engine local."
            if address is None
            else "Check --address, or leave it out for a cluster of this machine."
        )
        raise HeadwayError(f"ray: {where} cannot be reached ({first}). {fix}") from error
    context = ray.data.DataContext.get_current()
    before = context.enable_progress_bars
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    try:
        yield
    finally:
        context.enable_progress_bars = before
        ray.shutdown()
