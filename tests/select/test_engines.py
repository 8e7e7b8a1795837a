"""Both engines bring the same ledger content, also when a worker dies."""

from __future__ import annotations

import json
import os
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest

from headway.errors import HeadwayError, HostError
from headway.select.on_ray import _cluster
from headway.select.records import Reading, find_sources
from headway.select.selecting import open_ledger, score_all, select
from headway.select.shards import make_plan
from tests.look.tiny import byte_tokenizer, tiny_llama
from tests.select.standins import StandIn, StandInRecipe, expected, text, write_corpus


def run(corpus, out, recipe, **options):
    plan = make_plan(find_sources([corpus])[0], Reading(id_field="id", domain_field="kind"), out / "state")
    with open_ledger(plan, recipe, out) as ledger:
        score_all(plan, ledger, recipe, **options)
        return [score for number in range(plan.shards) for score in ledger.scores(number)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"), records=900)


@pytest.fixture(scope="module")
def locally(corpus, tmp_path_factory):
    return run(corpus, tmp_path_factory.mktemp("local"), StandInRecipe())


def test_every_record_is_scored_once_in_the_order_of_the_corpus(locally):
    assert [r.id for r in locally] == [f"r{n}" for part in range(3) for n in range(part, 900, 3)]
    assert all(r.influence == pytest.approx(expected(text(int(r.id[1:]))), abs=1e-6) for r in locally)


def test_a_corpus_that_changes_under_the_run_is_refused(tmp_path):
    folder = write_corpus(tmp_path / "corpus", records=6, files=1)
    plan = make_plan(find_sources([folder])[0], Reading(), tmp_path / "state")
    file = folder / "part-0.jsonl"
    file.write_bytes(file.read_bytes().replace(b"number 3", b"number 9"))
    recipe = StandInRecipe()
    with open_ledger(plan, recipe, tmp_path) as ledger, pytest.raises(HostError, match=r"line 4 of .*another text"):
        score_all(plan, ledger, recipe)


def test_an_interrupt_says_that_scores_are_kept(corpus, tmp_path):
    class Interrupted(StandIn):
        def score(self, texts):
            if self.calls == 3:
                raise KeyboardInterrupt
            return super().score(texts)

    plan = make_plan(find_sources([corpus])[0], Reading(), tmp_path / "state")
    recipe = StandInRecipe()
    with open_ledger(plan, recipe, tmp_path) as ledger:
        with pytest.raises(KeyboardInterrupt) as caught:
            score_all(plan, ledger, recipe, Interrupted())
        assert ledger.done == 3
    assert "are kept" in caught.value.__notes__[0]


@pytest.mark.parametrize(("address", "words"), [(None, "a local cluster"), ("10.0.0.1:6379", "--address")])
def test_a_cluster_that_does_not_start_is_an_error_of_headways_own(address, words):
    def init(**_):
        raise Exception("The current node timed out during startup.")

    ray = SimpleNamespace(is_initialized=lambda: False, init=init)
    told = pytest.raises(HeadwayError, match=r"cannot be reached \(The current node timed out.*\)")
    with told as caught, _cluster(ray, address, 1, 0):
        pass
    assert words in str(caught.value)


class TestRay:
    @pytest.fixture(scope="class", autouse=True)
    def cluster(self):
        """A cluster of two workers' size, whose workers find this package."""
        if find_spec("ray") is None:
            pytest.skip("ray is not installed")
        from headway.select.on_ray import _ray

        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", str(Path(__file__).parents[2]), prepend=os.pathsep)
            with _cluster(_ray(local=True), None, 2, 0):
                yield

    def test_nothing_listens_outside_this_machine(self):
        import psutil
        import ray

        assert [node["NodeManagerAddress"] for node in ray.nodes()] == ["127.0.0.1"]
        servers = [p for p in psutil.process_iter(["name"]) if p.info["name"] in ("raylet", "gcs_server")]
        listening = [c.laddr.ip for p in servers for c in p.net_connections("tcp") if c.status == "LISTEN"]
        assert listening
        assert set(listening) <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}

    def test_two_workers_bring_what_one_process_brings(self, corpus, locally, tmp_path):
        assert run(corpus, tmp_path, StandInRecipe(), engine="ray", workers=2) == locally

    def test_both_engines_write_the_same_files_with_a_real_scorer(self, tmp_path):
        corpus, model = write_corpus(tmp_path / "corpus", records=60), tmp_path / "model"
        tiny_llama(num_hidden_layers=2).save_pretrained(model)
        byte_tokenizer(bos=True).save_pretrained(model)
        reading = Reading(id_field="id", domain_field="kind")
        written = {}
        for engine, workers in (("local", 1), ("ray", 2)):
            out = tmp_path / engine
            select(
                [corpus], str(model), out=out, reading=reading, heads=[(1, 0), (1, 1)], floor=0, threads=1,
                engine=engine, workers=workers,
            )  # fmt: skip
            written[engine] = [(out / name).read_bytes() for name in ("scores.jsonl", "selected.jsonl")]
        scores, kept = (content.decode().splitlines() for content in written["local"])
        assert (len(scores), len(kept)) == (60, 12)
        assert len({json.loads(line)["influence"] for line in scores}) > 30
        assert written["ray"] == written["local"]

    def test_a_worker_that_dies_loses_and_repeats_nothing(self, corpus, locally, tmp_path):
        death = tmp_path / "died"
        found = run(corpus, tmp_path / "out", StandInRecipe(die=str(death)), engine="ray", workers=2)
        assert death.exists()
        assert found == locally

    def test_a_run_that_another_engine_began_is_finished(self, corpus, locally, tmp_path):
        plan = make_plan(find_sources([corpus])[0], Reading(id_field="id", domain_field="kind"), tmp_path / "state")
        recipe = StandInRecipe()
        from headway.select.records import Cursor
        from headway.select.shards.ledger import line_of
        from headway.select.shards.work import score_shard

        with open_ledger(plan, recipe, tmp_path) as ledger:
            shard = plan.shard(1)
            ledger.append(line_of(1, score_shard(shard, shard.records(Cursor(plan.reading)), recipe.build())))
        assert run(corpus, tmp_path, recipe, engine="ray", workers=2) == locally

    def test_the_error_of_a_worker_is_headways_own(self, tmp_path):
        folder = write_corpus(tmp_path / "corpus", records=6, files=1)
        plan = make_plan(find_sources([folder])[0], Reading(), tmp_path / "state")
        file = folder / "part-0.jsonl"
        file.write_bytes(file.read_bytes().replace(b"number 3", b"number 9"))
        recipe = StandInRecipe()
        with open_ledger(plan, recipe, tmp_path) as ledger, pytest.raises(HeadwayError, match="is not what it was"):
            score_all(plan, ledger, recipe, engine="ray", workers=1)
