"""A run that was ended in any way and resumed equals one that was not: bit for bit, in weights and in log."""

from __future__ import annotations

import json
import signal
import threading
import time
from dataclasses import replace

import pytest
import torch

from headway.errors import ArgumentError, ConflictError, HeadwayError
from headway.models import HeadwayConfig, HeadwayForCausalLM
from headway.train import Stream, Trained, checkpoint_steps, load_checkpoint, read_log, train, wsd
from headway.train.generated import Copy, KeyValue
from headway.train.regression import PiecewiseRegression
from headway.train.trees import join, split
from tests.train.small import EVERY, STEPS, batch, in_a_process, model, run


def equal_states(one, other) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def without_time(rows) -> list[dict]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The folder, weights and result of a run that nothing disturbed."""
    folder, net = tmp_path_factory.mktemp("whole") / "run", model()
    found = run(folder, net=net)
    return folder, net.state_dict(), found


def equals_the_uninterrupted(folder, uninterrupted) -> None:
    whole, weights, found = uninterrupted
    mine, theirs = load_checkpoint(folder / "checkpoints"), load_checkpoint(whole / "checkpoints")
    assert mine.step == theirs.step == STEPS
    equal_states(mine.parts["model"], weights)
    moments = [part.parts["optimizer"]["state"] for part in (mine, theirs)]
    for number in moments[1]:
        equal_states(moments[0][number], moments[1][number])
    assert torch.equal(mine.parts["random"][0]["torch"], theirs.parts["random"][0]["torch"])
    assert without_time(read_log(folder)) == without_time(read_log(whole)) == without_time(found.rows)


@pytest.mark.parametrize(
    ("arguments", "left"),
    [
        (("--kill-at", str(EVERY + 3)), [EVERY]),
        (("--kill-writing", str(2 * EVERY)), [EVERY]),
        (("--kill-at", "2"), []),
    ],
    ids=["between checkpoints", "while a checkpoint is written", "before the first checkpoint"],
)
def test_a_run_killed_with_sigkill_and_resumed_equals_the_uninterrupted_one(tmp_path, uninterrupted, arguments, left):
    folder = tmp_path / "run"
    assert in_a_process(folder, *arguments) == -signal.SIGKILL
    assert checkpoint_steps(folder / "checkpoints") == left
    assert in_a_process(folder, "--resume") == 0
    equals_the_uninterrupted(folder, uninterrupted)
    assert not list((folder / "checkpoints").glob(".*"))


def test_ctrl_c_finishes_the_step_keeps_it_and_tells_how_to_go_on(tmp_path, uninterrupted):
    def interrupt(state) -> None:
        if state.step == 5:
            signal.raise_signal(signal.SIGINT)

    folder = tmp_path / "run"
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt) as caught:
        run(folder, callbacks=[interrupt])
    assert "resume=True goes on at step 5" in caught.value.__notes__[0]
    assert signal.getsignal(signal.SIGINT) is before
    assert checkpoint_steps(folder / "checkpoints") == [EVERY, 5]
    found = run(folder, resume=True, callbacks=[lambda state: None])
    assert found.resumed == 5
    equals_the_uninterrupted(folder, uninterrupted)


def test_a_second_ctrl_c_ends_at_once(tmp_path):
    def interrupt(state) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", callbacks=[interrupt])
    assert checkpoint_steps(tmp_path / "run" / "checkpoints") == []


def test_sigterm_keeps_the_step_too(tmp_path):
    ended = []

    def end(*_) -> None:
        ended.append("as before")
        raise SystemExit(143)

    before = signal.signal(signal.SIGTERM, end)
    try:
        with pytest.raises(SystemExit):
            run(tmp_path / "run", callbacks=[lambda s: signal.raise_signal(signal.SIGTERM) if s.step == 3 else None])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert ended == ["as before"]
    assert checkpoint_steps(tmp_path / "run" / "checkpoints")[0] == 3


def test_a_run_in_another_thread_leaves_signals_alone(tmp_path):
    found = []
    thread = threading.Thread(target=lambda: found.append(run(tmp_path / "run")))
    thread.start()
    thread.join()
    assert found[0].steps == STEPS


def test_a_finished_run_is_not_trained_again(tmp_path, uninterrupted):
    folder, weights, found = uninterrupted
    net, began = model(1), time.time()
    again = run(folder, resume=True, net=net)
    equal_states(net.state_dict(), weights)
    assert again.resumed == STEPS
    assert again.losses == found.losses
    assert all(path.stat().st_mtime < began for path in (folder / "checkpoints").rglob("*.safetensors"))


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, uninterrupted, caplog):
    folder = tmp_path / "run"
    run(folder, net=model())
    newest = folder / "checkpoints" / f"step-{STEPS:08d}"
    weights = newest / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8] + b"\0" * 8)
    found = run(folder, resume=True)
    assert found.resumed == STEPS - EVERY
    assert "is damaged" in caplog.text
    equals_the_uninterrupted(folder, uninterrupted)
    for path in (folder / "checkpoints").glob("*/state.json"):
        path.write_text("{")
    with pytest.raises(HeadwayError, match=r"none in .* is whole"):
        run(folder, resume=True)


def test_a_torn_last_line_and_rows_behind_the_checkpoint_leave_the_log(tmp_path):
    folder = tmp_path / "run"
    run(folder, net=model())
    lines = (folder / "log.jsonl").read_text().splitlines()
    (folder / "checkpoints" / f"step-{STEPS:08d}" / "state.json").unlink()
    (folder / "log.jsonl").write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:20])
    run(folder, resume=True)
    assert [row["step"] for row in read_log(folder)] == list(range(1, STEPS + 1))


def test_a_lost_log_is_told(tmp_path):
    run(tmp_path / "run")
    (tmp_path / "run" / "log.jsonl").unlink()
    with pytest.raises(HeadwayError, match=r"the log of .* has 0 of 12 rows"):
        run(tmp_path / "run", resume=True)


@pytest.mark.parametrize(
    ("batches", "same"),
    [
        (lambda: [batch(i) for i in range(2 * STEPS)], True),
        (lambda: Numbered(), True),
        (lambda: (batch(i) for i in range(3)), False),
    ],
    ids=["a list", "a stream", "an iterator that ends early"],
)
def test_every_kind_of_batches_goes_on_where_it_was(tmp_path, uninterrupted, batches, same):
    folder = tmp_path / "run"

    def fail(state) -> None:
        if state.step == 6:
            raise RuntimeError("a crash")

    if same:
        with pytest.raises(RuntimeError, match="a crash"):
            run(folder, batches=batches(), callbacks=[fail])
        run(folder, batches=batches(), resume=True, callbacks=[lambda state: None])
        equals_the_uninterrupted(folder, uninterrupted)
    else:
        with pytest.raises(RuntimeError, match="a crash"):
            run(folder, callbacks=[fail], batches=[batch(i) for i in range(2 * STEPS)])
        with pytest.raises(ArgumentError, match=r"batches: got 3, expected at least 8 \(so many were read"):
            run(folder, batches=batches(), resume=True, callbacks=[lambda state: None])


class Numbered(Stream):
    def batch(self, index):
        return batch(index)


def test_only_the_newest_checkpoints_stay(tmp_path):
    run(tmp_path / "run", checkpoint_every=2, keep=3)
    assert checkpoint_steps(tmp_path / "run" / "checkpoints") == [STEPS - 4, STEPS - 2, STEPS]


def test_checkpoints_are_safetensors_and_json_with_tied_weights_once(uninterrupted):
    folder, *_ = uninterrupted
    files = list((folder / "checkpoints").rglob("*.*"))
    assert {path.suffix for path in files if path.is_file()} == {".safetensors", ".json"}
    state = json.loads((folder / "checkpoints" / f"step-{STEPS:08d}" / "state.json").read_text())
    names = dict(state["parts"]["model"]["dict"])
    assert names["head.weight"] == names["embedding.weight"] == {"tensor": "embedding.weight"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"seed": 5}, "seed was 0 and is 5"),
        ({"clip": 2.0}, "clip was 1.0 and is 2.0"),
        ({"steps": 20}, "schedule: got other rates"),
        ({"schedule": "constant"}, "schedule: got other rates"),
        ({"callbacks": [lambda run: None]}, "callbacks: got 3, expected the 2"),
    ],
)
def test_another_run_is_not_mixed_with_this_one(uninterrupted, options, words):
    with pytest.raises(ArgumentError, match=words):
        run(uninterrupted[0], resume=True, **options)


COPY = Copy(count=4, symbols=16, rows=2)


def of_a_config(folder, *, steps: int, task=COPY, **options) -> Trained:
    config = HeadwayConfig(vocab_size=64, width=8, layers=1, heads=2, mixer_options={"window": 4} | options)
    torch.manual_seed(0)
    return train(
        HeadwayForCausalLM(config), replace(task), steps=steps, schedule="constant", folder=folder, resume=True
    )


def test_other_data_or_another_model_of_the_same_shapes_is_another_run(tmp_path):
    """Their checkpoints fit, so nothing else would tell."""
    of_a_config(tmp_path, steps=2)
    for task, words in (
        (replace(COPY, rows=4), "batches.rows was 2 and is 4"),
        (replace(COPY, seed=1), "batches.seed was 0 and is 1"),
        (replace(COPY, gap=3), "batches.gap was 0 and is 3"),
        (KeyValue(rows=2), "batches.task was 'copy' and is 'key-value'"),
        (PiecewiseRegression(rows=2), "batches.task was 'copy' and is 'piecewise-regression'"),
    ):
        with pytest.raises(ArgumentError, match=words):
            of_a_config(tmp_path, steps=3, task=task)
    with pytest.raises(ArgumentError, match=r"config.mixer_options was \{'window': 4\} and is \{'window': 5\}"):
        of_a_config(tmp_path, steps=3, window=5)
    assert of_a_config(tmp_path, steps=3).resumed == 2


def test_a_saved_model_goes_on_with_its_run(tmp_path):
    """Saving writes into the config of a model, which makes it no other model."""
    options = {"schedule": "constant", "folder": tmp_path / "run", "resume": True}
    config = HeadwayConfig(vocab_size=64, width=8, layers=1, heads=2)
    model = HeadwayForCausalLM(config)
    train(model, replace(COPY), steps=2, **options)
    model.save_pretrained(tmp_path / "model")
    again = HeadwayForCausalLM.from_pretrained(tmp_path / "model")
    assert train(again, replace(COPY), steps=3, **options).resumed == 2


def test_a_folder_with_a_run_is_not_overwritten(uninterrupted):
    with pytest.raises(ArgumentError, match="holds a run already"):
        run(uninterrupted[0])


def test_a_second_run_in_the_same_folder_is_refused_while_the_first_one_lasts(tmp_path):
    def second(state) -> None:
        if state.step == 2:
            with pytest.raises(ConflictError, match="another process trains in"):
                run(tmp_path / "run", resume=True)

    run(tmp_path / "run", callbacks=[second])
    assert run(tmp_path / "run", resume=True, callbacks=[lambda state: None]).resumed == STEPS


def test_a_full_disk_leaves_the_checkpoint_before_and_is_told(tmp_path, monkeypatch):
    import safetensors.torch as store
    from safetensors import SafetensorError

    def full(tensors, path) -> None:
        if "step-" not in str(path) and checkpoint_steps(tmp_path / "run" / "checkpoints"):
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        save(tensors, path)

    save = store.save_file
    monkeypatch.setattr(store, "save_file", full)
    with pytest.raises(
        HeadwayError, match=r"step 8 cannot be written .*No space left .* the checkpoint before is whole"
    ):
        run(tmp_path / "run")
    monkeypatch.setattr(store, "save_file", save)
    assert checkpoint_steps(tmp_path / "run" / "checkpoints") == [EVERY]
    assert run(tmp_path / "run", resume=True).resumed == EVERY


def test_a_stable_schedule_may_be_made_longer(tmp_path):
    short, long = wsd(12, warmup=2, decay=0), wsd(18, warmup=2, decay=4)
    run(tmp_path / "run", schedule=short)
    found = run(tmp_path / "run", schedule=long, steps=18, resume=True)
    assert (found.resumed, found.steps) == (12, 18)
    whole = run(tmp_path / "other", schedule=long, steps=18)
    assert found.losses == whole.losses


def test_states_come_back_as_they_were():
    shared = torch.arange(6.0).view(2, 3)
    tree = {
        0: {"step": torch.tensor(3.0), "moments": [shared, shared.T]},
        "groups": [{"betas": (0.9, 0.95), "lr": 0.1 + 0.2, "none": None, "flag": True}],
        "nan": float("inf"),
        "half": torch.ones(3, dtype=torch.bfloat16),
        "view": torch.arange(100)[10:12],
        "again": shared,
    }
    plain, tensors = split(tree)
    back = join(json.loads(json.dumps(plain)), tensors)
    assert back["groups"] == tree["groups"]
    assert back["nan"] == tree["nan"]
    assert isinstance(back["groups"][0]["betas"], tuple)
    assert torch.equal(back[0]["moments"][1], shared.T)
    assert back["half"].dtype == torch.bfloat16
    assert torch.equal(back["view"], tree["view"])
    assert tensors["view"].untyped_storage().nbytes() == 16
    assert back["again"] is back[0]["moments"][0]


def test_what_cannot_be_stored_without_pickle_is_refused_by_place():
    with pytest.raises(ArgumentError, match="state groups/0/rule: got function"):
        split({"groups": [{"rule": lambda: None}]})
