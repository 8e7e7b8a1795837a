"""AIMicius in small: gold answers score 1 everywhere, wrong ones what they deserve, and nothing written is executed."""

from __future__ import annotations

import dataclasses
import subprocess

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.errors import ArgumentError
from headway.tasks.aimicius import (
    TASKS,
    cmdgen,
    embedding_similarity,
    evaluate,
    gold_answers,
    infrawise,
    kql,
    model_answers,
    ngram_similarity,
    optiflow,
)
from headway.tasks.aimicius.optiflow.interpreter import run_program
from headway.tasks.aimicius.optiflow.known import LARGEST, ProgramError
from headway.tasks.aimicius.optiflow.simulator import PlanError, all_gather_latency, parse_plan
from headway.tasks.aimicius.shell import TOOLS, run_command


class TestAllTasks:
    @pytest.mark.parametrize("name", sorted(TASKS))
    def test_gold_answers_score_one_on_every_metric(self, name):
        assert evaluate(name, gold_answers(name)) == pytest.approx(
            dict.fromkeys(evaluate(name, gold_answers(name)), 1.0), abs=1e-12
        )

    @pytest.mark.parametrize("name", sorted(TASKS))
    @pytest.mark.parametrize("answer", ["", "I do not know.", "```\n```", "{[(", "def generate_plan(:"])
    def test_useless_answers_score_nothing_where_it_counts(self, name, answer):
        found = evaluate(name, lambda turns: answer)
        assert found[TASKS[name].headline] == 0
        assert all(0 <= value <= 1 for value in found.values())

    @pytest.mark.parametrize("name", sorted(TASKS))
    @settings(max_examples=25, deadline=None)
    @given(answer=st.text(max_size=60))
    def test_any_text_gets_a_score(self, name, answer):
        sample = TASKS[name].samples()[0]
        found = TASKS[name].score(sample, [answer] * TASKS[name].turns)
        assert all(0 <= value <= 1 for value in found.values())

    def test_metrics_are_those_of_the_paper(self):
        found = {name: set(evaluate(name, gold_answers(name))) for name in TASKS}
        assert found == {
            "cmdgen": {"cmd", "output", "calibration", "exact", "success", "accuracy"},
            "infrawise": {
                "target", "baseline", "criterion", "workload", "dcw", "bench recall", "bench accuracy",
            },
            "optiflow": {"code detected", "code executable", "plan valid", "plan improved"},
            "nl2kql": {"syntax", "jaccard", "cluster recall", "database recall", "table recall", "column recall"},
        }  # fmt: skip

    def test_unknown_tasks_and_answers_that_are_no_text(self):
        with pytest.raises(ArgumentError, match="Did you mean 'cmdgen'"):
            evaluate("cmdgem", str)
        with pytest.raises(ArgumentError, match="answer: got NoneType"):
            evaluate("cmdgen", lambda turns: None)


class TestSimilarity:
    def test_equal_texts_are_one_and_strange_ones_near_zero(self):
        assert ngram_similarity("nvidia-smi -L", "nvidia-smi  -L ") == 1.0
        assert ngram_similarity("nvidia-smi -L", "qqqq") < 0.05
        assert (ngram_similarity("", ""), ngram_similarity("", "a")) == (1.0, 0.0)

    def test_closer_spelling_is_more_alike(self):
        gold = "nvidia-smi --query-gpu=memory.used --format=csv"
        assert ngram_similarity(gold, gold.replace("used", "total")) > ngram_similarity(gold, "nvidia-smi -L")

    @settings(max_examples=50, deadline=None)
    @given(first=st.text(max_size=30), second=st.text(max_size=30))
    def test_it_is_symmetric_and_bounded(self, first, second):
        assert 0 <= ngram_similarity(first, second) <= 1
        assert ngram_similarity(first, second) == pytest.approx(ngram_similarity(second, first))

    def test_an_encoder_may_take_its_place(self):
        class Encoder(torch.nn.Module):
            def forward(self, input_ids, attention_mask):
                states = torch.nn.functional.one_hot(input_ids, 8).float()
                return type("Output", (), {"last_hidden_state": states})

        def tokenize(texts, **_):
            ids = torch.tensor([[min(len(t), 7), 1] for t in texts])
            return {"input_ids": ids, "attention_mask": torch.tensor([[1, 0]] * len(texts))}

        alike = embedding_similarity(Encoder(), tokenize)
        assert alike("abc", "xyz") == pytest.approx(1.0)
        assert alike("abc", "ab") == pytest.approx(0.0)
        assert evaluate("cmdgen", gold_answers("cmdgen"), similarity=alike)["cmd"] == 1.0
        with pytest.raises(ArgumentError, match="expected an encoder and its tokenizer"):
            embedding_similarity("minilm", None)


@pytest.mark.real
def test_the_embedded_encoder_knows_meaning_where_spelling_differs():
    import headway

    alike = embedding_similarity(*headway.load("minilm"))
    near, far = (
        ("show the memory of the graphics card", "print GPU RAM"),
        ("show the memory of the graphics card", "a cat"),
    )
    assert alike(*near) > alike(*far)
    assert alike("nvidia-smi -L", "nvidia-smi -L") == pytest.approx(1.0, abs=1e-5)


@pytest.mark.real
def test_a_language_model_answers_in_turns():
    import headway

    answer = model_answers(*headway.load("smollm2"), max_new_tokens=4)
    first = answer(("Which command lists NVIDIA GPUs?",))
    assert isinstance(first, str)
    assert answer(("Which command lists NVIDIA GPUs?",)) == first
    assert isinstance(answer(("a", "b", "c")), str)
    with pytest.raises(ArgumentError, match="max_new_tokens: got 0"):
        model_answers(None, None, max_new_tokens=0)


class TestCommands:
    def score(self, answer, number=1, **options):
        return cmdgen.score(cmdgen.samples()[number], [answer], **options)

    def test_another_way_of_saying_it_is_a_success(self):
        found = self.score("nvidia-smi --format=csv --query-gpu=memory.used,memory.total")
        assert (found["exact"], found["success"], found["accuracy"]) == (0, 1, 1)

    def test_a_near_miss_is_calibrated_and_not_accurate(self):
        found = self.score("nvidia-smi --query-gpu=memory.used,memory.free --format=csv")
        assert (found["success"], found["accuracy"], found["calibration"]) == (0, 0, 1)
        assert found["cmd"] > 0.9
        assert found["output"] == 0
        assert self.score("nvidia-smi -L")["calibration"] == 0

    def test_a_code_fence_is_taken_off(self):
        assert self.score("```bash\nnvidia-smi -L\n```", 0)["exact"] == 1
        assert self.score("`nvidia-smi -L`", 0)["exact"] == 1

    def test_every_group_of_the_benchmark_is_there(self):
        assert {sample.group for sample in cmdgen.samples()} == set(cmdgen.GROUPS)

    def test_a_threshold_out_of_range(self):
        with pytest.raises(ArgumentError, match="threshold: got 0"):
            self.score("nvidia-smi", threshold=0)

    @pytest.mark.parametrize(
        "command",
        [
            "rm -rf /",
            "nvidia-smi; ls",
            "nvidia-smi | grep A100",
            "nvidia-smi > out",
            "$(nproc)",
            "nproc `ls`",
            "nproc &",
            "nvidia-smi -i 7",
            "nvidia-smi -i",
            "nvidia-smi --query-gpu=secret --format=csv",
            "nvidia-smi -x",
            "nvcc",
            "nvidia-smi 'unclosed",
            "all_reduce_perf -b 0 -e 8",
            "all_reduce_perf -b 8 -e 4",
            "all_reduce_perf -b " + "9" * 5000,
            "all_reduce_perf -b 8 -e 128M -f 1 -g 8",
            "sb run",
            "",
            "rocm-smi -d 9",
        ],
    )
    def test_what_the_made_up_machine_does_not_do_fails(self, command):
        assert not run_command(command).ok

    def test_nothing_is_executed(self, monkeypatch):
        def forbidden(*_, **__):
            raise AssertionError("a process was started")

        monkeypatch.setattr(subprocess, "Popen", forbidden)
        monkeypatch.setattr("os.system", forbidden)
        assert run_command("hostname") == run_command("  hostname ")
        assert run_command("nproc").output == "96"
        assert run_command("NCCL_DEBUG=INFO ./all_reduce_perf -b 8 -e 8 -g 2").ok

    @settings(max_examples=80, deadline=None)
    @given(tool=st.sampled_from(sorted(TOOLS)), rest=st.text("-abefgiLm0123=,. KMG\"'", max_size=25))
    def test_no_command_line_breaks_it(self, tool, rest):
        assert isinstance(run_command(f"{tool} {rest}").output, str)


class TestInfrawise:
    def test_each_field_counts_by_itself(self):
        sample = infrawise.samples()[0]
        query, chosen = infrawise.gold(sample)
        found = infrawise.score(sample, [query.replace("H100", "A100"), chosen])
        assert (found["target"], found["baseline"], found["dcw"]) == (1, 0, 0)
        assert found["bench accuracy"] == 1

    def test_recall_counts_right_ones_and_accuracy_the_exact_set(self):
        sample = infrawise.samples()[0]
        query, _ = infrawise.gold(sample)
        assert sorted(sample.chosen) == [0, 1]
        cases = {"[0]": (0.5, 0), "[0, 1, 2]": (1, 0), "0 and 1": (1, 1), "None": (0, 0), "the first": (0, 0)}
        for answer, (recall, accuracy) in cases.items():
            found = infrawise.score(sample, [query, answer])
            assert (found["bench recall"], found["bench accuracy"]) == (recall, accuracy), answer

    def test_nothing_found_is_answered_by_none(self):
        sample = infrawise.samples()[-1]
        query, chosen = infrawise.gold(sample)
        assert chosen == "None"
        assert infrawise.score(sample, [query, "[3]"])["bench accuracy"] == 0
        assert infrawise.score(sample, [query, "no idea"])["bench recall"] == 0

    def test_a_missing_baseline_is_not_one_that_says_none(self):
        sample = infrawise.samples()[4]
        assert sample.query["baseline"] == "None"
        assert infrawise.score(sample, ["no JSON", "None"])["baseline"] == 0
        said = '{"Design": {"Target": "H100", "Baseline": null}}'
        assert infrawise.score(sample, [said, "None"])["baseline"] == 1

    def test_json_inside_other_text_is_found(self):
        found = infrawise.parse_query('Sure {x} {"Design": {"Target": "a"}, "Criterion": "c"} bye')
        assert found == {"target": "a", "criterion": "c"}


class TestPlans:
    machine = optiflow.samples()[0]

    def test_the_ring_is_faster_than_sending_everything_at_once(self):
        for machine in optiflow.samples():
            direct, ring = (optiflow.measure(machine, answer).latency for answer in optiflow.gold(machine))
            assert 0 < ring < direct, machine.name

    def test_latency_is_the_formula(self):
        """Four GPUs, 4 MiB at 100 GB/s over links of 1 µs: three steps of 1 + 4·1024²/10⁵."""
        ring = optiflow.measure(self.machine, optiflow.gold(self.machine)[1]).latency
        assert ring == pytest.approx(3 * (1 + 4 * 1024**2 / 1e5))

    def test_pairs_without_a_link_share_those_of_the_switch(self):
        """Direct: GPU 0 reaches GPU 2 over the switch alone; 3 + 3 µs and one chunk at 10 GB/s."""
        direct = optiflow.measure(self.machine, optiflow.gold(self.machine)[0]).latency
        assert direct == pytest.approx(6 + 4 * 1024**2 / 1e4)

    def test_a_second_plan_must_beat_the_first(self):
        slow, fast = optiflow.gold(self.machine)
        assert optiflow.score(self.machine, [slow, slow])["plan improved"] == 0
        assert optiflow.score(self.machine, [fast, slow])["plan improved"] == 0
        assert optiflow.score(self.machine, [slow])["plan improved"] == 0
        assert optiflow.score(self.machine, [slow, "nothing"])["plan improved"] == 0

    def test_how_far_an_answer_gets(self):
        cases = {
            "I would use a ring.": (0, 0, 0),
            "def generate_plan(gpus, chunks):\n    import os": (1, 0, 0),
            "def generate_plan(gpus, chunks):\n    print('hello')": (1, 0, 0),
            "def generate_plan(gpus, chunks):\n    print('D(0,0): G(0) => G(1)')": (1, 1, 0),
        }
        for answer, wanted in cases.items():
            found = optiflow.score(self.machine, [answer, answer])
            assert tuple(found[f] for f in ("code detected", "code executable", "plan valid")) == wanted

    def test_the_second_question_tells_what_was_measured(self):
        slow, _ = optiflow.gold(self.machine)
        assert "takes 425.43 µs" in optiflow.question(self.machine, [slow])
        assert "is not valid" in optiflow.question(self.machine, ["x"])

    @pytest.mark.parametrize(
        ("plan", "reason"),
        [
            ("D(0,0): G(0) => G(1)", "undelivered"),
            ("D(0,0): G(1) => G(2)", "expected it to hold it"),
            ("D(0,0): G(0) => G(0)", "to itself"),
            ("D(0,0): G(0) => G(4)", "expected GPUs below 4"),
            ("D(0,1): G(0) => G(1)", "chunks below 1"),
        ],
    )
    def test_plans_that_are_no_all_gather(self, plan, reason):
        with pytest.raises(PlanError, match=reason):
            all_gather_latency(parse_plan(plan), self.machine)

    def test_what_arrives_in_a_step_is_sent_on_in_the_next(self):
        held = "D(0,0): G(0) => G(1)\nD(0,0): G(1) => G(2)"
        assert [len(step) for step in parse_plan(held)] == [1, 1]
        with pytest.raises(PlanError, match="to hold it"):
            all_gather_latency(parse_plan("step\n" + held), self.machine)

    def test_two_gpus_without_any_path(self):
        cut = dataclasses.replace(self.machine, bandwidth=tuple((0.0,) * 5 for _ in range(5)))
        with pytest.raises(PlanError, match="with a link"):
            all_gather_latency(parse_plan("D(0,0): G(0) => G(1)"), cut)

    def test_empty_plans_and_machines_of_a_wrong_shape(self):
        with pytest.raises(PlanError, match="got no transfer"):
            parse_plan("\n")
        with pytest.raises(ArgumentError, match="latency: got 4 rows"):
            dataclasses.replace(self.machine, latency=self.machine.latency[:4])
        with pytest.raises(ArgumentError, match="ring: got"):
            dataclasses.replace(self.machine, ring=(0, 0, 1, 2))


class TestInterpreter:
    def run(self, body, *arguments):
        code = "def f(a=0, b=0):\n" + "\n".join("    " + line for line in body.splitlines())
        return run_program(code, "f", arguments)

    def test_it_runs_what_plans_need(self):
        body = """
total = 0
for i, x in enumerate([3, 1, 2]):
    if x == 1:
        continue
    total += i * x
held = {"k": [1]}
held["k"].append(total)
while True:
    a, b = b, a + 1
    if a > 2:
        break
print(f"{total} {held['k'][-1]}", sorted({2, 1}), [y for x in range(3) for y in range(x) if y % 2 == 0], sep="|")
print(a, -b, 7 // 2, 3 if a else 4, "x" in "xy", a and 0 or 9, (1, 2)[::-1])
"""
        local = []
        exec(  # the interpreter must agree with Python on a program of our own
            "def f(a=0, b=0):\n" + "\n".join("    " + line for line in body.splitlines()),
            space := {"print": lambda *x, sep=" ": local.append(sep.join(map(str, x)))},
        )
        space["f"]()
        assert self.run(body).splitlines() == local

    def test_helper_functions_and_module_constants(self):
        code = "N = 3\ndef g(x):\n    return x + N\ndef f(a):\n    print(g(a))"
        assert run_program(code, "f", (4,)) == "7\n"

    @pytest.mark.parametrize(
        "body",
        [
            "import os",
            "from os import system",
            "open('x')",
            "__import__('os')",
            "eval('1')",
            "exec('1')",
            "().__class__",
            "f.__globals__",
            "'{0.__class__}'.format(a)",
            "getattr(a, 'x')",
            "lambda: 1",
            "class A: pass",
            "del a",
            "try:\n    pass\nexcept Exception:\n    pass",
            "with a: pass",
            "global a",
            "print(a, file=1)",
            "a ** 9",
            "1 << 9",
            "'%s' % a",
            "[].__len__()",
            "print",
            "range",
            "yield a",
            "assert a",
            "raise a",
            "f'{a!r}'",
            "f'{a:9}'",
            "a = b = c",
            "{**a}",
            "print(**{})",
            "a.b = 1",
            "'x'.encode()",
            "[].clear()",
            "b'x'",
            "sorted([1], key=len)",
            "x: int = 1",
        ],
    )
    def test_everything_else_is_refused(self, body):
        with pytest.raises(ProgramError):
            self.run(body)

    @pytest.mark.parametrize(
        "body",
        [
            "while True:\n    pass",
            "for i in range(10**11):\n    pass",
            "f()",
            "x = [0]\nwhile True:\n    x.extend(x)",
            "x = 'a' * 10**11",
            "x = [0] * 10**11",
            "x = 9\nwhile True:\n    x = x * x",
            "list(range(10**11))",
            "while True:\n    print('a' * 9999)",
            "x = 'ab'\nwhile True:\n    x = x + x",
            "sum(range(10**11))",
            "sorted(range(10**10))",
            "min(range(10**11))",
            "set(range(10**9))",
            "10**9 in [x for x in range(10**9)]",
            "list(enumerate(range(10**9)))",
            "x = [0]\nfor i in range(99):\n    x = [x, x]\nstr(x)",
        ],
    )
    def test_programs_that_would_not_end_are_stopped(self, body):
        with pytest.raises(ProgramError):
            self.run(body)

    def test_errors_of_a_program_are_its_own(self):
        for body in ("1 // 0", "[][1]", "{}['x']", "int('x')", "a + 'x'", "a, b = 1, 2, 3", "break", "f(1, 2, 3)"):
            with pytest.raises(ProgramError):
                self.run(body)
        with pytest.raises(ProgramError, match="no function 'f'"):
            run_program("x = 1", "f", ())
        with pytest.raises(ProgramError, match="cannot be read"):
            run_program("def f(:", "f", ())
        with pytest.raises(ProgramError, match="levels of nesting"):
            run_program("def f():\n    x = " + "[" * 70 + "]" * 70, "f", ())
        with pytest.raises(ProgramError, match="characters"):
            run_program("#" * 30_000, "f", ())
        with pytest.raises(ProgramError, match="number beyond"):
            self.run(f"a = {LARGEST} * 10")


class TestKusto:
    def test_gold_queries_are_of_the_grammar_and_name_what_they_read(self):
        queries = [kql.parse(sample.query) for sample in kql.samples()]
        assert queries[0].read == {"Timestamp", "NodeId"}
        assert queries[1].read == {"State"}
        assert queries[6].read == {"BusBandwidth", "Timestamp"}
        assert {(q.cluster, q.database) for q in queries} == {
            ("infra", "Fleet"),
            ("support", "Cases"),
            ("net", "Bench"),
        }

    @pytest.mark.parametrize(
        "query",
        [
            "SELECT * FROM Jobs",
            'cluster("a").database("b")',
            'cluster("a").Jobs | count',
            'cluster("a").database("b").Jobs | where',
            'cluster("a").database("b").Jobs | where State = "x" y',
            'cluster("a").database("b").Jobs | filter State == 1',
            'cluster("a").database("b").Jobs | summarize count() by',
            'cluster("a").database("b").Jobs | take x',
            'cluster("a").database("b").Jobs | where (A == 1',
            'cluster("a").database("b").Jobs | where A == "open',
            'cluster("a").database("b").Jobs | where ' + "(" * 99 + "A" + ")" * 99,
            'cluster(a).database("b").Jobs',
            "",
        ],
    )
    def test_other_texts_are_not(self, query):
        with pytest.raises(kql.KustoError, match="query: got"):
            kql.parse(query)

    @pytest.mark.parametrize(
        "tail",
        [
            "where not(A == 1) and (B > 2 or C !contains 'x')",
            "where A between (1 .. 5) and B !in ('a', 'b')",
            "extend X = A * -2 + strlen(B), Y = 1.5",
            "summarize make_set(A), N = count() by bin(T, 5m), B",
            "sort by A asc, B | limit 3",
            "top 3 by A",
            "where T > ago(7d) // last week",
        ],
    )
    def test_what_the_grammar_knows(self, tail):
        kql.parse(f"cluster('a').database('b').Jobs | {tail}")

    def test_parts_count_where_the_whole_is_wrong(self):
        sample = kql.samples()[0]
        found = kql.score(sample, [sample.query.replace("distinct", "unique").replace("GpuErrors", "Errors")])
        assert (found["syntax"], found["cluster recall"], found["table recall"], found["column recall"]) == (0, 1, 0, 1)
        assert 0.7 < found["jaccard"] < 1

    def test_a_column_that_is_missing_lowers_recall(self):
        sample = kql.samples()[2]
        found = kql.score(sample, [sample.query.replace(", DurationSeconds", "").replace("JobId", "Id")])
        assert found["column recall"] == pytest.approx(2 / 3)
        assert found["syntax"] == 1

    def test_a_fence_and_a_semicolon_are_taken_off(self):
        sample = kql.samples()[4]
        assert kql.score(sample, [f"```kusto\n{sample.query};\n```"])["syntax"] == 1
