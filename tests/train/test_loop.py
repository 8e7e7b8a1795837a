"""What one run does: gradients, schedule, log, callbacks, and everything it must leave as it was."""

from __future__ import annotations

import csv
import json
import math
import random

import numpy as np
import pytest
import torch
from torch import nn

from headway.errors import ArgumentError, HeadwayError, MissingExtraError, NumericError
from headway.methods.layers.lightning import Lightning
from headway.methods.layers.titans import TitansLMM, TitansMAC
from headway.train import (
    Callback,
    EarlyStop,
    GradientNorms,
    Loss,
    Measure,
    adamw,
    classification_loss,
    cosine,
    model_loss,
    next_token_loss,
    parameter_groups,
    read_log,
    token_loss,
    train,
)
from headway.train.devices import OneDevice
from headway.train.randomness import random_state
from tests.train.small import VOCABULARY, batch, model


def plain(**options):
    """A short run without dropout, so that only what is tested differs."""
    net = options.pop("net", None) or still(model())
    options = {"steps": 4, "loss": next_token_loss, "learning_rate": 1e-2, **options}
    return net, train(net, options.pop("batches", batch), **options)


def still(net: nn.Module) -> nn.Module:
    net.dropout.p = 0.0
    net.running.requires_grad_(False)
    net.register_buffer("running", torch.zeros_like(net.running))
    net.running = net.running.to(torch.float64).to(torch.float32)
    return net


class Linear(nn.Module):
    """y = w·x, with the squared error as its loss: gradients are known by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, -2.0]))

    def forward(self, x):
        return x @ self.weight


def squared(net, given) -> Loss:
    difference = net(given["x"]) - given["y"]
    return Loss(difference.square().mean(), count=len(difference))


def rows(*numbers) -> dict[str, torch.Tensor]:
    x = torch.tensor(numbers, dtype=torch.float32)
    return {"x": x, "y": x.sum(1)}


def test_one_step_of_plain_gradient_descent_is_the_formula():
    net, given = Linear(), rows([1.0, 2.0], [0.0, 1.0])
    expected = net.weight.detach() - 0.5 * (2 / 2) * (given["x"].T @ (net(given["x"]) - given["y"])).detach()
    train(net, [given], steps=1, loss=squared, optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=0.5),
          schedule="constant", clip=None)  # fmt: skip
    torch.testing.assert_close(net.weight.detach(), expected)


def test_accumulating_uneven_batches_equals_one_large_batch():
    parts = [rows([1.0, 2.0]), rows([0.0, 1.0], [3.0, 1.0], [-1.0, 4.0])]
    whole = {name: torch.cat([part[name] for part in parts]) for name in ("x", "y")}
    nets = [Linear(), Linear()]
    found = [
        train(nets[0], parts * 3, steps=3, loss=squared, accumulate=2, learning_rate=0.1),
        train(nets[1], [whole] * 3, steps=3, loss=squared, learning_rate=0.1),
    ]
    torch.testing.assert_close(nets[0].weight, nets[1].weight)
    assert found[0].losses == pytest.approx(found[1].losses)
    assert found[0].column("gradient_norm") == pytest.approx(found[1].column("gradient_norm"))


def test_accumulating_language_batches_weighs_by_scored_labels():
    few, many = batch(0, rows=2), batch(1, rows=2)
    masked = few.clone()
    masked[:, 3:] = -100
    parts = [{"input_ids": few, "labels": masked}, {"input_ids": many, "labels": many}]
    whole = {name: torch.cat([part[name] for part in parts]) for name in ("input_ids", "labels")}
    nets = [model().eval(), model().eval()]
    for net in nets:
        net.dropout.p = 0.0
        net.register_forward_pre_hook(lambda module, given: module.eval() and None)
    train(nets[0], parts, steps=1, loss=next_token_loss, accumulate=2, optimizer=sgd)
    train(nets[1], [whole], steps=1, loss=next_token_loss, optimizer=sgd)
    torch.testing.assert_close(nets[0].embedding.weight, nets[1].embedding.weight)


def sgd(net):
    return torch.optim.SGD(net.parameters(), lr=0.3)


def test_a_transformers_model_trains_on_ids_alone():
    from headway.hosts.tiny import tiny_host

    host, _ = tiny_host("llama")
    ids = torch.arange(12).repeat(2, 2) % 7
    found = train(host, [ids] * 8, steps=8, learning_rate=1e-2)
    assert found.loss < found.losses[0]
    assert found.tokens == 8 * ids.numel()
    host.eval()
    by_hand = token_loss(host(ids).logits, ids)[0]
    assert float(model_loss(host, ids).value.detach()) == pytest.approx(float(by_hand.detach()), rel=1e-5)


def test_rates_follow_the_schedule_and_are_logged():
    _, found = plain(steps=10, warmup=3, schedule="cosine")
    share = cosine(10, warmup=3)
    assert found.column("learning_rate") == pytest.approx([1e-2 * share(i) for i in range(10)])


def test_each_group_of_a_given_optimiser_keeps_its_own_peak():
    net = Linear()
    net.other = nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.SGD([{"params": [net.weight], "lr": 0.2}, {"params": [net.other], "lr": 0.1}])
    rates = []
    train(net, [rows([1.0, 1.0])] * 2, steps=2, loss=squared, optimizer=optimizer, schedule=lambda i: 0.5 / (i + 1),
          callbacks=[lambda run: rates.append([g["lr"] for g in run.optimizer.param_groups])])  # fmt: skip
    assert rates == [[0.1, 0.05], [0.05, 0.025]]


def test_clipping_bounds_the_gradient_and_logs_the_norm_before():
    class Watch(Callback):
        def step(self, run):
            seen.append(run.gradient_norms()["weight"])

    seen: list[float] = []
    net = Linear()
    found = train(net, [rows([30.0, 40.0])], steps=1, loss=squared, clip=0.25, callbacks=[Watch()])
    assert found.column("gradient_norm")[0] > 100
    assert seen[0] == pytest.approx(0.25, rel=1e-4)


def test_norms_biases_and_vectors_do_not_decay():
    net = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2, bias=False))
    net.gate = nn.Parameter(torch.ones(3, 3))
    net.no_decay = ("gate",)
    net[2].weight.requires_grad_(False)
    decayed, kept = parameter_groups(net, weight_decay=0.3)
    assert [p is net[0].weight for p in decayed["params"]] == [True]
    assert {id(p) for p in kept["params"]} == {id(p) for p in (net.gate, net[0].bias, *net[1].parameters())}
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.3, 0.0)


@pytest.mark.parametrize(
    ("mixer", "names"),
    [
        (TitansLMM, ("memory.gain", "memory.shift")),
        (TitansMAC, ("memory.gain",)),
        (Lightning, ("lrpe.theta",)),
    ],
)
def test_gains_and_angles_of_mixers_do_not_decay(mixer, names):
    net = mixer.example()
    _, kept = parameter_groups(net, weight_decay=0.3)
    spared = {id(p) for p in kept["params"]}
    assert all(id(net.get_parameter(name)) in spared for name in names)


def test_the_seed_decides_and_the_global_generators_are_left_as_they_were():
    torch.manual_seed(11)
    before = random_state()
    first = plain(net=model(), seed=3)[1].losses
    after = random_state()
    assert torch.equal(before["torch"], after["torch"])
    assert before["python"] == after["python"]
    assert np.array_equal(before["numpy"][1], after["numpy"][1])
    random.random(), torch.rand(3)
    assert plain(net=model(), seed=3)[1].losses == first
    assert plain(net=model(), seed=4)[1].losses != first


def test_without_a_seed_the_global_generator_is_used():
    losses = []
    for _ in range(2):
        torch.manual_seed(5)
        losses.append(plain(net=model(), seed=None)[1].losses)
    assert losses[0] == losses[1]


def test_validation_changes_nothing_in_the_training():
    with_it, without = model(), model()
    judged = plain(net=with_it, validation=[batch(-1)], validate_every=1)[1]
    plain(net=without)
    for one, other in zip(with_it.parameters(), without.parameters(), strict=True):
        assert torch.equal(one, other)
    assert len(judged.column("validation_loss")) == 4
    assert len(judged.column("validation_accuracy")) == 4


def test_a_function_may_validate():
    _, found = plain(validation=lambda net: {"mode": float(net.training), "size": 3})
    assert found.column("mode") == (0.0,)
    assert found.column("size") == (3.0,)


def test_each_module_returns_to_its_own_mode_and_no_gradient_stays():
    net = model()
    net.eval()
    net.norm.train()
    plain(net=net, validation=[batch(-1)])
    assert [net.training, net.norm.training, net.dropout.training] == [False, True, False]
    assert all(p.grad is None for p in net.parameters())


def test_only_what_requires_gradients_moves():
    net = model()
    net.norm.requires_grad_(False)
    before = net.norm.weight.clone()
    plain(net=net)
    assert torch.equal(net.norm.weight, before)


def test_bfloat16_runs_the_forward_in_bfloat16_and_keeps_float32_weights():
    seen = []
    net = model()
    net.head.register_forward_hook(lambda module, given, output: seen.append(output.dtype))
    _, found = plain(net=net, dtype="bfloat16", steps=30)
    assert set(seen) == {torch.bfloat16}
    assert net.head.weight.dtype == torch.float32
    assert found.loss < found.losses[0]


def test_the_log_can_be_read_as_json_lines_and_as_a_table(tmp_path):
    _, found = plain(folder=tmp_path, validation=[batch(-1)], validate_every=2, callbacks=[nan_row])
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert [line["loss"] for line in lines] == list(found.losses)
    assert lines[0]["strange"] is None
    with (tmp_path / "log.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [float(row["loss"]) for row in table] == list(found.losses)
    assert [row["validation_loss"] != "" for row in table] == [False, True, False, True]
    assert read_log(tmp_path)[-1]["tokens"] == found.tokens == 4 * 32
    facts = json.loads((tmp_path / "run.json").read_text())
    assert {"seed", "dtype", "device", "threads", "torch", "optimizer"} <= facts.keys()


def nan_row(run) -> None:
    run.row["strange"] = math.nan


def test_early_stop_ends_a_run_that_no_longer_improves(tmp_path):
    def worse(net):
        return {"validation_loss": calls.pop(0)}

    calls = [3.0, 2.0, 2.5, 2.1, 9.0, 9.0]
    stop = EarlyStop(patience=2)
    _, found = plain(steps=6, validation=worse, validate_every=1, callbacks=[stop], folder=tmp_path)
    assert found.steps == 4
    assert "validation_loss has not improved on 2" in found.stopped
    again = plain(steps=6, validation=worse, validate_every=1, callbacks=[EarlyStop(patience=2)], folder=tmp_path,
                  resume=True)[1]  # fmt: skip
    assert again.steps == 4
    assert again.stopped == found.stopped


def test_an_early_stop_that_never_saw_its_metric_says_so(caplog):
    plain(callbacks=[EarlyStop(metric="acuracy")])
    assert "no row has 'acuracy'" in caplog.text


def test_measures_and_gradient_norms_join_the_log():
    _, found = plain(steps=5, callbacks=[Measure(lambda net: {"weight": 1.5}, every=2), GradientNorms("embedding")])
    assert [row["step"] for row in found.rows if "weight" in row] == [2, 4, 5]
    assert all(row["grad/embedding.weight"] > 0 for row in found.rows)


def test_callbacks_meet_gradients_before_they_are_clipped():
    class Watch(Callback):
        def start(self, run):
            order.append("start")

        def gradients(self, run):
            order.append("gradients")
            assert run.gradient_norms()["weight"] == pytest.approx(run.row["gradient_norm"])

        def step(self, run):
            order.append("step")

        def end(self, run):
            order.append("end")

    order: list[str] = []
    train(Linear(), [rows([30.0, 40.0])], steps=1, loss=squared, clip=0.1, callbacks=[Watch()])
    assert order == ["start", "gradients", "step", "end"]


def test_progress_is_told_after_each_step():
    told = []
    plain(progress=lambda what, done, total: told.append((done, total, "loss" in what)))
    assert told == [(i, 4, True) for i in range(1, 5)]


def test_classification_counts_right_answers():
    net = nn.Linear(2, 2)
    with torch.no_grad():
        net.weight.copy_(torch.eye(2))
        net.bias.zero_()
    given = {"points": torch.tensor([[9.0, 0.0], [0.0, 9.0], [9.0, 0.0]]), "labels": torch.tensor([0, 1, 1])}
    loss = classification_loss(net, given)
    assert loss.metrics["accuracy"] == pytest.approx(2 / 3)
    assert loss.count == 3


def test_a_loss_over_no_label_is_zero_and_harms_nothing():
    labels = torch.full((2, 8), -100)
    net, found = plain(batches=[{"input_ids": batch(0, rows=2), "labels": labels}], steps=1)
    assert found.losses == (0.0,)
    assert all(p.isfinite().all() for p in net.parameters())


def test_a_loss_that_is_not_finite_stops_with_the_parameters_of_before():
    net = Linear()
    bad = {"x": torch.tensor([[1.0, math.inf]]), "y": torch.zeros(1)}
    with pytest.raises(NumericError, match=r"loss at step 1: got (nan|inf), expected a finite number. Lower the learn"):
        train(net, [rows([1.0, 1.0]), bad], steps=2, loss=squared)
    assert net.weight.isfinite().all()


def test_a_gradient_that_is_not_finite_names_its_parameter():
    def root(net, given):
        return (net(given["x"]) * 0).abs().sqrt().sum()

    with pytest.raises(NumericError, match=r"gradient at step 0: got a norm of nan \(in weight\)"):
        train(Linear(), [rows([1.0, 1.0])], steps=1, loss=root)


class Mute(nn.Linear):
    """Takes labels and makes no loss of them."""

    def __init__(self) -> None:
        super().__init__(1, 1)

    def forward(self, input_ids, labels):
        return self.weight


class Faulty(nn.Module):
    def forward(self, ids):
        raise RuntimeError("the model's own fault")


def test_compiling_is_counted_and_its_failure_is_no_silent_fallback(monkeypatch):
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda net: real(net, backend="eager"))
    _, found = plain(compile=True)
    assert found.compiled.graphs >= 1
    assert found.compiled.seconds > 0

    def broken(graph, inputs):
        raise ValueError("no compiler")

    monkeypatch.setattr(torch, "compile", lambda net: real(net, backend=broken))
    torch._dynamo.reset()
    with pytest.raises(HeadwayError, match=r"compile: torch.compile failed .* Train without compile"):
        plain(compile=True)


def test_a_fault_of_the_model_itself_is_passed_on():
    net = Faulty()
    net.weight = nn.Parameter(torch.zeros(2))
    with pytest.raises(RuntimeError, match="the model's own fault"):
        train(net, [batch(0)], steps=1, loss=next_token_loss)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": 0}, "steps: got 0, expected a whole number of at least 1"),
        ({"steps": 2.5}, "steps: got 2.5"),
        ({"accumulate": 0}, "accumulate: got 0"),
        ({"clip": 0.0}, "clip: got 0.0, expected above 0, or None"),
        ({"learning_rate": 0.0}, "learning_rate, weight_decay: got 0.0"),
        ({"weight_decay": -1.0}, "got 0.01, -1.0"),
        ({"schedule": "cosin"}, "Did you mean 'cosine'"),
        ({"warmup": 9}, "warmup: got 9 steps, expected 0..4"),
        ({"dtype": "float8"}, "dtype: got 'float8'"),
        ({"resume": True}, "folder: got None, expected one"),
        ({"checkpoint_every": 2}, "folder: got None"),
        ({"validate_every": 2}, "validate_every: got it without validation"),
        ({"validation": iter([])}, "validation: got list_iterator, expected a list of batches"),
        ({"validation": torch.zeros(2)}, "validation: got Tensor"),
        ({"callbacks": [3]}, "callbacks: got int"),
        ({"batches": torch.zeros(2, 3)}, "batches: got Tensor"),
        ({"batches": 3}, "batches: got int"),
        ({"batches": [batch(0)]}, "batches: got 1, expected one for each of 4 steps"),
        ({"batches": [batch(0)] * 5, "accumulate": 2}, "batches: got 5, expected 2 for each of 4 steps"),
        ({"batches": [{"labels": batch(0)}] * 4}, r"batch: got \['labels'\], expected input_ids among them"),
        ({"loss": model_loss, "net": Mute()}, "model: got a Mute that returns no loss"),
        ({"loss": lambda net, given: net(given).mean(-1)}, r"loss: got \(4, 8\), expected a tensor of one number"),
        ({"loss": lambda net, given: torch.ones(())}, "loss: got a tensor without a gradient"),
        ({"optimizer": lambda net: net, "learning_rate": None}, "optimizer: got Small"),
        ({"optimizer": sgd}, "learning_rate: got it beside an optimizer"),
        ({"accelerator": "yes"}, "accelerator: got str"),
    ],
)
def test_arguments_that_cannot_be_used_are_named(options, words):
    with pytest.raises(ArgumentError, match=words):
        plain(**options)


def test_a_model_without_trainable_parameters_is_refused():
    with pytest.raises(ArgumentError, match="no parameter that requires gradients"):
        plain(net=model().requires_grad_(False))


def test_a_missing_accelerate_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "accelerate", None)
    with pytest.raises(MissingExtraError, match=r"headway\[train\]"):
        plain(accelerator="auto")


def test_an_accelerator_of_one_process_changes_nothing():
    from accelerate import Accelerator

    alone, spread = model(), model()
    plain(net=alone)
    plain(net=spread, accelerator=Accelerator(cpu=True))
    for one, other in zip(alone.parameters(), spread.parameters(), strict=True):
        assert torch.equal(one, other)
    assert OneDevice(alone).world == 1


def test_the_default_optimiser_is_adamw_over_the_groups():
    net = model()
    groups = adamw(net, learning_rate=0.5).param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert groups[0]["betas"] == (0.9, 0.95)
    assert groups[0]["params"][0].numel() == VOCABULARY * 16
