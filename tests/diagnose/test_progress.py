"""Every diagnosis, and `select`, says where it is: each long part, each piece of it once and in order, never beyond its
end. A bar that stands still is taken for a hang."""

from __future__ import annotations

import json
from collections import defaultdict

import numpy as np
import pytest

from headway.diagnose.agreement import Options as AgreementOptions
from headway.diagnose.agreement import diagnose_agreement
from headway.diagnose.anchors import Options as AnchorsOptions
from headway.diagnose.anchors import analysing, diagnose_anchors
from headway.diagnose.concepts import Settings, audit, scenes
from headway.diagnose.concepts.pictures import scene_bank
from headway.diagnose.position import Options as PositionOptions
from headway.diagnose.position import diagnose_position, looking
from headway.diagnose.roles import Options as RolesOptions
from headway.diagnose.roles import diagnose_roles
from headway.evidence.recipes import _anchors_toy as anchors
from headway.evidence.recipes import _posir_toy as posir
from headway.methods.diagnosis import diagnose_localize_align as dla
from headway.methods.diagnosis import song_of_disagreement as song
from headway.methods.diagnosis.clip_ccs import embed_bank, tiny, tower
from headway.methods.diagnosis.posir import from_corpus
from headway.methods.diagnosis.thought_anchors import exact_encoder, pattern_answer
from headway.select.selecting import select
from tests.look.tiny import byte_tokenizer, tiny_llama
from tests.methods.roles_words import words_model, words_tokenizer
from tests.methods.song_hosts import classifier, example
from tests.select.standins import write_corpus


class Told:
    """A Tell that keeps what it is told, by part of the work."""

    def __init__(self) -> None:
        self.parts: dict[str, list[int]] = defaultdict(list)
        self.totals: dict[str, set[int]] = defaultdict(set)

    def __call__(self, what: str, done: int, total: int) -> None:
        assert 0 <= done <= total, f"{what}: {done} of {total}"
        assert not self.parts[what] or done >= self.parts[what][-1], f"{what} went back to {done}"
        self.parts[what].append(done)
        self.totals[what].add(total)
        assert len(self.totals[what]) == 1, f"{what}: the end moved, {self.totals[what]}"

    def steps(self, what: str) -> list[int]:
        assert what in self.parts, f"nothing was told of {what!r}, only of {', '.join(self.parts)}"
        return self.parts[what]

    def steady(self, what: str) -> bool:
        """Whether it is told piece by piece, before each (0 … total − 1) or behind each (1 … total)."""
        steps, (total,) = self.steps(what), self.totals[what]
        return steps in (list(range(total)), list(range(1, total + 1)))


def test_agreement_tells_every_text():
    told, given = Told(), [example(9) for _ in range(3)]
    options = AgreementOptions(methods=("attention_last", "ablation"), settings=song.Settings(masks=10, steps=2))
    diagnose_agreement(classifier(), given, options=options, progress=told)
    assert told.steps("explaining texts") == [0, 1, 2]
    assert list(told.parts) == ["explaining texts", "comparing methods"]


def test_anchors_tell_every_trace_sentence_order_and_rollout(monkeypatch):
    monkeypatch.setattr(analysing.method, "sentence_encoder", lambda: exact_encoder)
    told, (row,) = Told(), anchors.draw_ids(1, np.random.default_rng(0))
    trace = anchors.planted(row.tolist(), name="one").trace
    options = AnchorsOptions(top=3, orders=4, rollouts=2, tokens=2, extract=pattern_answer(anchors.FINAL))
    diagnose_anchors(anchors.decoder(0).eval(), anchors.Words(), [trace], options=options, progress=told)
    hiding, orders, rollouts = (
        next(what for what in told.parts if what.startswith(words)) for words in ("hiding", "other orders", "rollouts")
    )
    assert told.steady(hiding)
    assert told.totals[hiding] == {sum(stop < len(row) for _, stop in trace.tokens)}
    assert told.steady(orders)
    assert told.totals[orders] == {4}
    assert told.totals[rollouts] == {2 * (len(trace) + 1)}
    assert told.steps(rollouts) == [2 * sentence for sentence in range(len(trace) + 1)]


def test_concepts_tell_every_batch_and_every_silencing():
    model, reader, told = tiny.untrained(0).eval(), tiny.tokenizer(), Told()
    known = scene_bank()
    bank = embed_bank(tower(model, "text"), lambda texts: tiny.tokens(reader, texts), list(known), concepts=known)
    audit(
        model, lambda texts: tiny.tokens(reader, texts), scenes(20, seed=1), bank,
        settings=Settings(layers=1, draws=2), progress=told,
    )  # fmt: skip
    assert told.steady("decomposing pictures")
    assert told.steps("describing heads") == [0]
    silenced = told.steps("silencing heads")
    assert silenced[0] == 0
    assert len(set(silenced)) == len(silenced) >= 3, "a set of heads that was silenced before is not told again"


def test_position_tells_encoding_chance_and_gradients(monkeypatch):
    monkeypatch.setattr(looking, "GROUP", 1)
    told, encoder = Told(), posir.bi_encoder(0, name="toy")
    given = [from_corpus(posir.corpus(20, np.random.default_rng(0), asked=3, others=0), name="law")]
    options = PositionOptions(edges=(12, 24, 36), resamples=20, moved=2, saliency=4, batch=2)
    diagnose_position(given, encoder, options=options, progress=told)
    assert told.steps("toy: chance") == [0]
    (pairs,) = told.totals["toy: gradients"]
    assert told.steps("toy: gradients") == [*range(2, pairs, 2), pairs]
    assert told.steady("toy: attention")
    assert sum(what.startswith("toy: ") and "documents" in what for what in told.parts) >= 1, list(told.parts)


def test_roles_tell_marks_replies_heads_and_every_training():
    told, tokenizer = Told(), words_tokenizer()
    rows = [
        {"id": f"q{i}", "question": "2 + 2?", "turns": [{"role": "poet", "reply": "So it is 4."}], "rules": {}}
        for i in range(3)
    ]
    log = dla.read_conversations(map(json.dumps, rows))
    options = RolesOptions(
        kinds=("case", "format", "length"), relations=("system-user",), new_tokens=1, draws=2, share=0.2, align=1
    )
    diagnose_roles(words_model(tokenizer), tokenizer, conversations=log, options=options, progress=told)
    (marking,) = (what for what in told.parts if what.startswith("marking the log"))
    assert told.totals[marking] == {3}
    assert told.steady(marking)
    assert told.steady("the model replies")
    assert told.steady("silencing heads")
    trainings = [(what, steps) for what, steps in told.parts.items() if what.startswith("training adapters")]
    assert [steps for _, steps in trainings] == [[0], [1], [2], [3]]
    assert {what.split()[3] for what, _ in trainings} == {"focal", "random", "least", "all"}


@pytest.mark.parametrize("controls", [0, 1])
def test_select_tells_every_record(tmp_path, controls):
    told, corpus = Told(), write_corpus(tmp_path / "corpus", records=150, files=2)
    select(
        corpus, tiny_llama(num_hidden_layers=2), byte_tokenizer(bos=True), out=tmp_path / "out", heads=[(1, 0)],
        floor=0, controls=controls, progress=told,
    )  # fmt: skip
    assert told.totals["scoring records"] == {150}
    assert told.steps("scoring records")[0] == 0
    assert told.steps("scoring records")[-1] == 150
    assert len(told.steps("scoring records")) == 1 + len(told.steps("writing"))
    read, written = list(told.parts).index("reading part-0.jsonl"), list(told.parts).index("writing")
    assert read < list(told.parts).index("scoring records") < list(told.parts).index("choosing") < written
    assert ("scoring with other heads" in told.parts) == bool(controls)
