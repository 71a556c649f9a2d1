"""``reselect=``: a run selects again at later steps, for targets that may change."""

import json
import logging
import runpy
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import numpy as np
import pytest
import reference
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import trained

from benchmarks.simulated_run import World, simulate
from hf_auxselect import (
    AbstractSelector,
    ConstrainedSelection,
    FixedSelection,
    GaussNewton,
    GradientStore,
    LayerSelection,
    Reselection,
    Selection,
    SelectionReport,
    TaskSelectionCallback,
    cli,
)
from hf_auxselect.gradient_pass import GradientPass
from hf_auxselect.report import card
from hf_auxselect.report.content import DecisionLine
from hf_auxselect.reselection import (
    averaged,
    credited,
    drift_p_value,
    reselection_of,
    score_of,
)
from hf_auxselect.run import Run
from hf_auxselect.sampler import MIN_SHARE, MixtureSampler
from hf_auxselect.tasks import TaskRows


@pytest.fixture(scope="module", autouse=True)
def _without_figures():
    """They take half the time of these runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_auxselect.report.figures.draw", lambda content: {})
        yield


SAVING = {"save_strategy": "steps", "save_steps": 1}


@dataclass(frozen=True, kw_only=True)
class ByRowsLeft(AbstractSelector):
    """Another task at each selection: which one depends on the steps that are left."""

    rows_per_task: int = 8

    def select(self, problem):
        number = (problem.rows_to_read // self.rows_per_task) % len(problem.task_names)
        chosen = np.eye(len(problem.task_names))[number]
        return Selection(
            weights=dict(zip(problem.task_names, chosen.tolist(), strict=True)),
            estimate=problem.estimate(chosen[None]),
        )


def callback(**options):
    """One that selects after steps 4, 6 and 8, each time another task."""
    defaults = {"estimator": GaussNewton(), "selector": ByRowsLeft(), "reselect": 2}
    defaults["examples_per_task"] = 8
    return tiny.callback(**defaults | options)


def new_choices(**options):
    """Nothing is carried over."""
    return Reselection(**{"every": 2, "memory": 0} | options)


def targets(**more):
    sets = {"sums": tiny.sums(16, 9), "letters": tiny.sums(16, 8, letters=True)} | more
    return {name: tiny.tokenize(rows) for name, rows in sets.items()}


def record(directory):
    return json.loads((directory / "_task_selection" / "selection.json").read_text())


def without_times(report):
    content = report.to_dict()
    for name in ("created", "seconds", "gradient_pass_seconds"):
        content["run"].pop(name)
    return content


class TestARun:
    @pytest.fixture(scope="class")
    def run(self, tmp_path_factory):
        directory = tmp_path_factory.mktemp("run")
        cb = callback(reselect=new_choices())
        torch.manual_seed(3)
        trainer = tiny.plain_trainer(directory, cb, **SAVING)
        seen = tiny.spy(trainer)
        trainer.train()
        return directory, cb, seen

    def test_each_mixture_is_read_until_the_next(self, run):
        _, cb, seen = run
        chosen = [[*line.weights] for line in cb.report.decisions]
        assert [line.step for line in cb.report.decisions] == [4, 6, 8]
        assert chosen == [["d"], ["c"], ["b"]]
        batches = seen[-6:]
        assert batches == ["dddd"] * 2 + ["cccc"] * 2 + ["bbbb"] * 2

    def test_the_files(self, run):
        directory, _, _ = run
        files = directory / "_task_selection"
        for folder in (files, files / "step_6", files / "step_8"):
            for name in ("gradients/index.json", "report/report.json", "report/rows.jsonl"):
                assert (folder / name).is_file()
        assert json.loads((files / "plan.json").read_text())["switch_steps"] == [4, 6, 8]

    def test_decisions_are_in_each_checkpoint(self, run):
        directory, _, _ = run
        for step in range(1, 11):
            path = directory / f"checkpoint-{step}" / "task_selection.json"
            assert path.is_file() == (step >= 4)
            if step >= 4:
                saved = json.loads(path.read_text())
                steps = [one["switch_step"] for one in (*saved.get("earlier", []), saved)]
                assert steps == [s for s in (4, 6, 8) if s <= step]
        last = (directory / "checkpoint-10" / "task_selection.json").read_bytes()
        assert last == (directory / "_task_selection" / "selection.json").read_bytes()

    def test_the_reports(self, run):
        directory, cb, _ = run
        files = directory / "_task_selection"
        assert cb.report.run["switch_step"] == 8
        last = SelectionReport.load(files)
        assert last.to_dict() == cb.report.to_dict()
        assert last.gradients_directory == files / "step_8" / "gradients"
        assert SelectionReport.load(files / "report").run["switch_step"] == 4
        assert SelectionReport.load(files / "report").decisions == []
        assert len(SelectionReport.load(files / "step_6").decisions) == 2
        for text in (last.to_text(), last.to_markdown(), last.to_html(), card.section(last, [])):
            assert "Selections of this run" in text

    def test_the_command_line_is_about_the_last_selection(self, run, capsys):
        directory, cb, _ = run
        files = directory / "_task_selection"
        first = (files / "report" / "report.json").read_bytes()
        for folder in (files, files / "step_8"):
            assert cli.main(["report", str(folder)]) == 0
            assert "Selections of this run" in capsys.readouterr().out
            assert cli.main(["what-if", str(folder), "--tasks", "a,b"]) == 0
            loss = float(capsys.readouterr().out.split()[1])
            assert loss == pytest.approx(cb.report.estimate(["a", "b"]).loss[0], abs=1e-4)
        assert (files / "report" / "report.json").read_bytes() == first
        assert not (files / "step_8" / "report" / "report").exists()

    def test_what_later_mixtures_read_is_as_announced(self, run):
        directory, _, seen = run
        rows = (directory / "_task_selection/step_8/report/rows.jsonl").read_text().splitlines()
        assert sum(json.loads(row)["reads"] for row in rows if json.loads(row)["task"] == "b") == 8
        assert seen[-2:] == ["bbbb"] * 2

    def test_estimates_are_those_of_a_run_that_begins_there(self, run_dir):
        cb = callback(after="observe")
        trained(tiny.plain_trainer, run_dir / "again", cb)
        once = callback(after="observe", warmup=8, reselect=None)
        trainer = trained(tiny.plain_trainer, run_dir / "once", once)
        assert cb.report.rows == once.report.rows
        stores = [report.gradients() for report in (cb.report, once.report)]
        assert np.array_equal(stores[0].gradients, stores[1].gradients)
        torch.manual_seed(3)
        plain = tiny.plain_trainer(run_dir / "plain")
        plain.train()
        assert tiny.same(tiny.weights(trainer), tiny.weights(plain)), "observe changes nothing"

    def test_a_new_run_in_the_same_directory_forgets(self, run_dir):
        trained(tiny.plain_trainer, run_dir, callback())
        trained(tiny.plain_trainer, run_dir, callback(reselect=None))
        assert not (run_dir / "_task_selection" / "step_6").exists()
        assert "earlier" not in record(run_dir)

    def test_the_same_rows_are_not_read_first_again(self):
        plan = SimpleNamespace(switch_steps=(4, 6, 8), seed=3)
        run = Run(plan=plan, directory=None, initial=None, batches=None, notes=[])
        assert run.seed_of(4) == 3
        assert len({run.seed_of(step) for step in (4, 6, 8)}) == 3


class TestResume:
    """Bitwise from every phase: before the first selection, at, between, in and after them."""

    @pytest.mark.parametrize(
        ("kind", "options", "selection", "steps"),
        [
            ("SFTTrainer", {}, {}, (3, 4, 5, 6, 9)),
            (
                "Trainer",
                {"gradient_accumulation_steps": 3, "dataloader_num_workers": 2},
                {"reselect": new_choices()},
                (5, 6),
            ),
        ],
    )
    def test_from_every_step(self, kind, options, selection, steps, run_dir, tmp_path):
        make, options = tiny.TRAINERS[kind], SAVING | options
        whole = callback(**selection)
        expected = tiny.weights(trained(make, run_dir, whole, **options))
        for step in steps:
            copy = tmp_path / f"resumed{step}"
            shutil.copytree(run_dir, copy)
            cb = callback(**selection)
            trainer = trained(make, copy, cb, str(copy / f"checkpoint-{step}"), **options)
            assert tiny.same(tiny.weights(trainer), expected), f"from step {step}"
            assert record(copy) == record(run_dir)
            assert without_times(cb.report) == without_times(whole.report)

    @pytest.mark.parametrize("moment", ["gradient pass", "drift test", "decision"])
    def test_a_run_that_is_stopped_in_a_later_selection(self, moment, run_dir, monkeypatch):
        options = SAVING | {"eval_dataset": targets()}

        def make_callback():
            return callback(
                target="sums",
                reselect=Reselection(every=2, targets=[(6, "letters")], significance=0.3),
            )

        expected = tiny.weights(
            trained(tiny.plain_trainer, run_dir / "whole", make_callback(), **options)
        )
        owner, name = {
            "gradient pass": (GradientPass, "run"),
            "drift test": (GradientPass, "drift"),
            "decision": (TaskSelectionCallback, "on_save"),
        }[moment]
        original, calls = getattr(owner, name), []

        def stop(self, *args, **kwargs):
            calls.append(name)
            if len(calls) == {"run": 2, "drift": 1, "on_save": 6}[name]:
                if name == "run":
                    original(self, *args, **kwargs)
                raise KeyboardInterrupt
            return original(self, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, stop)
            with pytest.raises(KeyboardInterrupt):
                trained(tiny.plain_trainer, run_dir / "stopped", make_callback(), **options)
        trainer = trained(tiny.plain_trainer, run_dir / "stopped", make_callback(), True, **options)
        assert tiny.same(tiny.weights(trainer), expected)
        assert record(run_dir / "stopped") == record(run_dir / "whole")

    def test_a_moved_checkpoint_brings_its_decisions(self, run_dir, tmp_path):
        whole = trained(tiny.plain_trainer, run_dir, callback(), **SAVING)
        shutil.copytree(run_dir / "checkpoint-7", tmp_path / "moved" / "checkpoint-7")
        cb = callback()
        trainer = trained(tiny.plain_trainer, tmp_path / "moved", cb, True, **SAVING)
        assert tiny.same(tiny.weights(trainer), tiny.weights(whole))
        assert len(cb.report.decisions) == 3

    def test_other_options_at_a_later_switch_decide_anew(self, run_dir, caplog):
        trained(tiny.plain_trainer, run_dir, callback(), **SAVING)
        cb = callback(selector=FixedSelection(["a"]))
        with caplog.at_level(logging.WARNING):
            trained(tiny.plain_trainer, run_dir, cb, str(run_dir / "checkpoint-6"), **SAVING)
        assert "it is made anew" in caplog.text
        chosen = [[*line.weights] for line in cb.report.decisions]
        assert chosen[0] == ["d"] and chosen[1:] == [["a"], ["a"]]

    def test_re_selection_may_begin_in_a_resumed_run(self, run_dir, caplog):
        trained(tiny.plain_trainer, run_dir, callback(reselect=None), **SAVING)
        cb = callback()
        with caplog.at_level(logging.WARNING):
            trained(tiny.plain_trainer, run_dir, cb, str(run_dir / "checkpoint-7"), **SAVING)
        assert "no selection was made after step 6, where reselect=2 asks for one" in caplog.text
        assert [one["switch_step"] for one in record(run_dir)["earlier"]] == [4]
        assert record(run_dir)["switch_step"] == 8

    def test_re_selection_may_end_in_a_resumed_run(self, run_dir):
        trained(tiny.plain_trainer, run_dir, callback(), **SAVING)
        for step, last in ((7, 6), (5, 4)):
            cb = callback(reselect=None)
            checkpoint = str(run_dir / f"checkpoint-{step}")
            trained(tiny.plain_trainer, run_dir, cb, checkpoint, **SAVING)
            assert cb.report.run["switch_step"] == last
            assert record(run_dir)["switch_step"] == last
            assert SelectionReport.load(run_dir / "_task_selection").run["switch_step"] == last


class TestTargetsThatChange:
    def test_dates_select_for_the_target_of_that_time(self, run_dir):
        cb = callback(
            target="sums",
            examples_per_task=None,
            reselect=new_choices(every=None, targets=[(7, "letters")]),
        )
        logged = trained(
            tiny.plain_trainer,
            run_dir,
            cb,
            eval_dataset=targets(),
            eval_strategy="steps",
            eval_steps=1,
        ).state.log_history
        lines = cb.report.decisions
        assert [(line.step, line.target) for line in lines] == [(4, "sums"), (7, "letters")]
        (loss,) = [
            e["eval_letters_loss"] for e in logged if e["step"] == 7 and "eval_letters_loss" in e
        ]
        assert cb.report.target.name == "letters"
        assert cb.report.row("no further training").loss == pytest.approx(loss, rel=1e-5)

    def test_a_function_of_the_step(self, run_dir):
        asked = []

        def target(step):
            asked.append(step)
            return "letters" if step == 6 else None

        cb = callback(target="sums", reselect=Reselection(every=2, targets=target))
        trained(tiny.plain_trainer, run_dir, cb, eval_dataset=targets())
        assert [line.target for line in cb.report.decisions] == ["sums", "letters", "sums"]
        assert {*asked} == {4, 5, 6, 7, 8, 9}

    def test_the_first_target_may_be_dated_too(self, run_dir):
        reselect = Reselection(targets=[(0, "letters"), (7, "sums")])
        cb = callback(reselect=reselect)
        trained(tiny.plain_trainer, run_dir, cb, eval_dataset=targets())
        assert [line.target for line in cb.report.decisions] == ["letters", "sums"]

    @pytest.mark.parametrize(("later", "selections"), [("letters", [4, 6]), ("other sums", [4])])
    def test_only_a_change_that_shows_makes_a_selection(self, later, selections, run_dir):
        """At 8 the target is what it was at 6."""
        cb = callback(
            target="sums",
            examples_per_task=None,
            reselect=Reselection(every=2, targets=[(6, later)], significance=0.02),
        )
        sets = targets(**{"other sums": tiny.sums(16, 7)})
        trained(tiny.plain_trainer, run_dir, cb, eval_dataset=sets, max_steps=9)
        lines = cb.report.decisions
        assert [line.step for line in lines if line.is_selection] == selections
        assert [line.p_value is None for line in lines] == [True, False, False]
        tests = record(run_dir)["drift_tests"]
        assert [test["step"] for test in tests] == [6, 8]
        assert (tests[0]["p_value"] <= 0.02) == (later == "letters")
        if later == "letters":
            assert tests[1]["p_value"] == 1
        saved = SelectionReport.load(run_dir / "_task_selection")
        assert saved.decisions == lines, "the last report has the tests after it, too"
        assert "not selected again" in saved.to_text()


class TestOtherOptions:
    """What else the callback does, it does at each selection."""

    def test_a_race_at_each_selection(self, run_dir):
        cb = callback(confirm=2, verify=1, reselect=new_choices(every=3))
        trainer = trained(tiny.plain_trainer, run_dir, cb)
        race = cb.report.confirmation
        assert (cb.report.run["switch_step"], race.steps) == (7, [10])
        assert race.measured(race.winner) == trainer.evaluate()["eval_loss"]
        assert cb.report.verification[0].measured == race.measured(race.winner)
        files = run_dir / "_task_selection"
        assert (files / "ground_truth_runs_step_7.json").is_file()
        assert SelectionReport.load(files / "report").confirmation.steps == [10]

    def test_calibration_at_each_selection(self, run_dir):
        cb = callback(calibrate=2, reselect=3)
        trained(tiny.plain_trainer, run_dir, cb)
        first = SelectionReport.load(run_dir / "_task_selection" / "report")
        assert len(first.calibration) == len(cb.report.calibration) == 2
        assert first.calibration[0].measured != cb.report.calibration[0].measured

    def test_clusters_are_found_once(self, run_dir):
        data = tiny.tokenize(tiny.tasks()).remove_columns("task")
        options = {"train_dataset": data} | SAVING
        whole = callback(clusters=3)
        expected = tiny.weights(trained(tiny.plain_trainer, run_dir, whole, **options))
        assert [*whole.report.weights] == ["cluster 1", "cluster 2", "cluster 3"]
        files = run_dir / "_task_selection"
        assert not (files / "step_8" / "cluster_gradients").exists()
        first = SelectionReport.load(files / "report")
        assert first.run["rows_per_task"] == whole.report.run["rows_per_task"]
        cb = callback(clusters=3)
        trainer = trained(tiny.plain_trainer, run_dir, cb, str(run_dir / "checkpoint-7"), **options)
        assert tiny.same(tiny.weights(trainer), expected)

    def test_groups_and_their_prices(self, run_dir):
        selector = ConstrainedSelection(ceilings={"letters": 0.0}, relative_to="all tasks")
        cb = callback(
            target="sums",
            groups=["letters"],
            selector=selector,
            reselect=3,
            estimator=GaussNewton(),
        )
        trained(tiny.plain_trainer, run_dir, cb, eval_dataset=targets())
        saved = record(run_dir)
        assert [*saved["shadow_prices"]] == [*saved["earlier"][0]["shadow_prices"]] == ["letters"]
        assert cb.report.group_lines[0].name == "letters"
        assert saved["reselection"]["averaged_with"] is None
        assert saved["selector"]["initial_prices"] == {}, "as the user gave it"

    def test_prices_are_where_the_next_search_starts(self):
        selector = ConstrainedSelection(ceilings={"a": 1.0, "b": 1.0}, initial_prices={"a": 1.0})
        assert selector.starting_from({"b": 2.0}).initial_prices == {"a": 1.0, "b": 2.0}
        assert selector.starting_from({"b": 2.0}).ceilings == selector.ceilings
        assert FixedSelection(["a"]).starting_from({"b": 2.0}) == FixedSelection(["a"])

    def test_the_preview_counts_all_selections(self, run_dir):
        def preview(**options):
            cb = callback(**{"target": "sums"} | options)
            trainer = tiny.plain_trainer(run_dir, cb, eval_dataset=targets())
            return cb.preview(trainer)

        one, three = preview(reselect=None), preview(verify=1)
        assert three.num_examples == 3 * one.num_examples
        assert three.disk_mib == pytest.approx(3 * one.disk_mib)
        assert three.verification_steps == 6 + 4 + 2
        assert (one.num_selections, three.num_selections) == (1, 3)
        assert str(three).startswith("3 gradient passes, the first after step 4:")
        assert str(one).startswith("gradient pass after step 4:")


class TestCarryingOver:
    def test_a_new_choice_is_averaged_with_the_one_before(self, run_dir):
        cb = callback()
        trained(tiny.plain_trainer, run_dir, cb)
        first, second, third = cb.report.decisions
        saved = [*record(run_dir)["earlier"], record(run_dir)]
        gains = [first.loss - second.loss, second.loss - third.loss]
        scores = [decision["reselection"]["scores"].get("target", {}) for decision in saved]
        assert scores[0] == {}
        assert scores[1]["d"] == pytest.approx(0.5 * gains[0] / 2)
        assert gains[0] > 0 and second.averaged_with == 4
        assert first.weights == {"d": 1.0}
        assert second.weights == pytest.approx({"d": 0.5, "c": 0.5})
        assert third.averaged_with == 6
        assert third.weights == pytest.approx({"d": 0.25, "c": 0.25, "b": 0.5})
        estimate = cb.report.estimate(cb.report.weights)
        assert cb.report.row("chosen").loss == pytest.approx(estimate.loss[0])
        tried = cb.report.history[-1]
        assert (tried.tasks, tried.accepted) == (("b",), False), "it may be a finalist"

    def test_not_with_one_with_which_the_loss_has_risen(self, run_dir):
        cb = callback()
        torch.manual_seed(3)
        trainer = tiny.plain_trainer(run_dir, cb)
        measured = iter([1.0, 2.0, 1.5])  # at steps 4, 6 and 8
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("hf_auxselect.switch.evaluation_loss", lambda *args: next(measured))
            trainer.train()
        lines = cb.report.decisions
        assert [line.loss for line in lines] == [1.0, 2.0, 1.5]
        assert [line.averaged_with for line in lines] == [None, None, 6]
        assert [{*line.weights} for line in lines] == [{"d"}, {"c"}, {"b", "c"}]

    def test_a_loss_that_is_not_finite_counts_for_nothing(self, run_dir):
        cb = callback()
        torch.manual_seed(3)
        trainer = tiny.plain_trainer(run_dir, cb, max_steps=7)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("hf_auxselect.switch.evaluation_loss", lambda *args: float("nan"))
            trainer.train()
        assert [line.loss for line in cb.report.decisions] == [None] * 2
        assert record(run_dir)["reselection"]["scores"] == {}

    def test_the_last_one_for_the_same_target(self, run_dir):
        reselect = Reselection(every=2, targets=[(6, "letters"), (8, "sums")])
        cb = callback(target="sums", reselect=reselect)
        trained(tiny.plain_trainer, run_dir, cb, eval_dataset=targets())
        assert [line.averaged_with for line in cb.report.decisions] == [None, None, 4]
        assert cb.report.weights == pytest.approx({"a": 0, "b": 0.5, "c": 0, "d": 0.5})
        scores = record(run_dir)["reselection"]["scores"]
        assert scores["sums"]["d"] > 0 and {*scores} == {"sums", "letters"}

    def test_not_for_selectors_that_promise_more_than_a_low_loss(self, run_dir):
        class Promising(ByRowsLeft):
            asks_for_target_only = False

        cb = callback(selector=Promising())
        trained(tiny.plain_trainer, run_dir, cb, max_steps=7)
        assert [line.averaged_with for line in cb.report.decisions] == [None] * 2

    def test_the_average_of_two_mixtures(self):
        new, old = {"a": 0.5, "b": 0.5, "c": 0.0}, {"a": 0.8, "b": 0.0, "c": 0.2}
        found = averaged(new, old, memory=0.25, rows_to_read=100)
        assert found == pytest.approx({"a": 0.575, "b": 0.375, "c": 0.05})
        few = averaged(new, old, memory=0.25, rows_to_read=19)
        assert few == pytest.approx({"a": 0.575 / 0.95, "b": 0.375 / 0.95, "c": 0})

    def test_an_average_can_be_drawn(self):
        new, old = {"a": 1 - 3e-6, "b": 3e-6, "c": 0.0}, {"a": 1 - 1e-6, "b": 0.0, "c": 1e-6}
        found = averaged(new, old, memory=0.9, rows_to_read=10**7)
        assert found["b"] >= MIN_SHARE and found["c"] == 0
        tasks = TaskRows(("a", "b", "c"), np.array([0, 0, 1, 2]))
        MixtureSampler(tasks, np.array([*found.values()]), 0)

    @given(
        st.lists(st.floats(0, 1), min_size=3, max_size=3),
        st.lists(st.floats(0, 1), min_size=3, max_size=3),
        st.floats(0, 0.99),
    )
    def test_it_is_a_mixture_and_permutes_with_the_tasks(self, new, old, memory):
        new, old = ({n: (w + 0.01) for n, w in zip("abc", m, strict=True)} for m in (new, old))
        new, old = ({n: w / sum(m.values()) for n, w in m.items()} for m in (new, old))
        found = averaged(new, old, memory=memory, rows_to_read=50)
        assert sum(found.values()) == pytest.approx(1)
        assert all(found[name] > 0 for name in new), "what the new choice has stays"
        turned = averaged(
            {n: new[n] for n in "cab"}, {n: old[n] for n in "bca"}, memory=memory, rows_to_read=50
        )
        assert turned == pytest.approx(found)

    @given(st.lists(st.tuples(st.floats(0, 1), st.floats(-1, 1)), max_size=8), st.floats(0, 0.9))
    def test_scores_are_moving_averages(self, intervals, memory):
        scores, expected = {}, {"a": 0.0, "b": 0.0}
        for share, gain in intervals:
            weights = {"a": share, "b": 1 - share}
            scores = credited(scores, "t", weights, gain, memory=memory)
            for name, weight in weights.items():
                kept = 1 - (1 - memory) * weight
                expected[name] = kept * expected[name] + (1 - kept) * gain
        assert scores.get("t", expected) == pytest.approx(expected)
        assert score_of({"a": 0.5, "b": 0.5}, expected) == pytest.approx(
            (expected["a"] + expected["b"]) / 2
        )

    def test_other_targets_keep_their_scores(self):
        scores = credited({"s": {"a": 1.0}}, "t", {"a": 1.0}, 0.5, memory=0.5)
        assert scores == {"s": {"a": 1.0}, "t": {"a": 0.25}}


class TestSimulatedRuns:
    """Quadratic tasks, whose losses are known; the means of several runs."""

    def final_losses(self, dates, count=20, model=0.35, **options):
        runs = [simulate(World(seed, model=model), dates, **options) for seed in range(count)]
        return np.mean([run["losses"][-1] for run in runs])

    def test_it_follows_a_target_that_jumps(self):
        """Near the oracle, which knows the truth, where one selection and none are far from it."""
        dates, clock = [(80, 1.0)], Reselection(every=20)
        dated = Reselection(every=20, targets=[(80, "second")], significance=0.05)
        oracle = self.final_losses(dates, reselection=None, knows=True)
        once = self.final_losses(dates, reselection=None)
        never = self.final_losses(dates, reselection=None, selects=False)
        assert self.final_losses(dates, reselection=clock) - oracle < 0.1 * (once - oracle)
        assert self.final_losses(dates, reselection=clock) - oracle < 0.2 * (never - oracle)
        assert self.final_losses(dates, reselection=dated) - oracle < 0.1 * (once - oracle)

    def test_it_follows_a_target_that_drifts(self):
        dates = [(60, 0.25), (80, 0.5), (100, 0.75), (120, 1.0)]
        tested = Reselection(every=20, targets=[(60, "second")], significance=0.05)
        once = self.final_losses(dates, reselection=None)
        for reselection in (Reselection(every=20), tested):
            assert self.final_losses(dates, reselection=reselection) < 0.5 * once

    def test_memory_helps_when_a_target_returns(self):
        """Few selections, and estimates with errors of their own."""
        dates = [(50, 1.0), (60, 0.0)]
        with_memory, without = (
            self.final_losses(dates, 60, reselection=Reselection(every=40, memory=memory))
            for memory in (0.5, 0)
        )
        assert with_memory < without - 0.03

    def test_a_stationary_target_is_seldom_selected_for_again(self):
        """Versions of it that have other rows."""
        versions = [(date, 0.0) for date in range(40, 140, 20)]
        tested = Reselection(every=20, targets=[(40, "rows")], significance=0.05)
        runs = [
            simulate(World(seed), versions, tested, same_rows=False)["selections"]
            for seed in range(30)
        ]
        assert np.mean([len(selections) - 1 for selections in runs]) / 5 <= 0.05 + 0.035


class TestTheDriftTest:
    def samples(self, rng, shift=0.0, scale=1.0, count=40):
        return rng.normal(0, 1, (count, 12)), rng.normal(shift, scale, (count - 8, 12))

    def test_it_is_what_a_slow_test_finds(self):
        for shift in (0.0, 0.2, 0.4):
            before, after = self.samples(np.random.default_rng(1), shift, count=20)
            slow = reference.drift_p_value(before, after, num_permutations=999)
            assert drift_p_value(before, after, seed=0) == pytest.approx(slow, abs=0.04)

    def test_a_stationary_target_seldom_triggers(self):
        """At most 5%, up to the chance of 400 trials (a standard error of 1.1%)."""
        rng = np.random.default_rng(0)
        p_values = [drift_p_value(*self.samples(rng), seed=i) for i in range(400)]
        assert np.mean(np.array(p_values) <= 0.05) <= 0.05 + 2 * 0.011

    @pytest.mark.parametrize("change", [{"shift": 0.5}, {"scale": 1.6}])
    def test_changes_of_mean_and_of_spread_show(self, change):
        rng = np.random.default_rng(0)
        p_values = [drift_p_value(*self.samples(rng, **change), seed=i) for i in range(20)]
        assert np.mean(np.array(p_values) <= 0.05) >= 0.9

    def test_the_order_of_examples_and_the_unit_do_not_matter(self):
        before, after = self.samples(np.random.default_rng(0), 0.2)
        p_value = drift_p_value(before, after, seed=0)
        assert drift_p_value(1e-4 * before, 1e-4 * after, seed=0) == pytest.approx(
            p_value, abs=0.01
        )
        reordered = drift_p_value(before[::-1], after, seed=0)
        assert reordered == pytest.approx(p_value, abs=0.03)
        assert drift_p_value(before, after, seed=0) == p_value

    def test_the_same_examples(self):
        rows = np.random.default_rng(0).normal(0, 1, (10, 3))
        assert drift_p_value(rows, rows, seed=0) == 1.0
        assert drift_p_value(0 * rows, 0 * rows, seed=0) == 1.0


class TestTheSchedule:
    def test_a_clock(self):
        assert Reselection(every=30).steps(20, 100) == (20, 50, 80)
        assert Reselection(every=40).steps(20, 100) == (20, 60)

    def test_dates(self):
        dated = Reselection(targets=[(10, "a"), (50, "b"), (60, "c")])
        assert dated.steps(20, 100) == (20, 50, 60)
        assert Reselection(every=30, targets=[(60, "b")]).steps(20, 100) == (20, 50, 60, 80)
        assert [dated.target_at(step) for step in (9, 10, 49, 50, 99)] == [None, "a", "a", "b", "c"]

    def test_dates_before_the_first_selection(self):
        dated = Reselection(targets=[(0, "a"), (50, "b")])
        with pytest.raises(ValueError, match=r"begin by step 50, .* after step 100, .* every=\.\."):
            dated.steps(100, 200)
        assert Reselection(every=40, targets=dated.targets).steps(100, 200) == (100, 140, 180)

    def test_a_number_is_short_for_a_clock(self):
        assert reselection_of(7) == Reselection(every=7)
        assert reselection_of(None) is None
        assert TaskSelectionCallback().reselect is None


class TestRefusals:
    @pytest.mark.parametrize("reselect", [0, -1, 2.5, True, "3"])
    def test_no_number_of_steps(self, reselect):
        with pytest.raises(ValueError, match=r"reselect must be a number of steps, 1 or more"):
            TaskSelectionCallback(reselect=reselect)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({}, "needs every="),
            ({"targets": lambda step: None}, "needs every="),
            ({"every": 2, "targets": [(5, "a"), (5, "b")]}, "must ascend, got 5 after 5"),
            ({"every": 2, "targets": [(-1, "a")]}, r"\(500, 'news'\); got \(-1, 'a'\)"),
            ({"every": 2, "targets": [("a", 5)]}, "pairs of a step and a key"),
            ({"every": 2, "significance": 0.05}, "no targets=... that change it"),
            ({"targets": [(5, "a")], "significance": 0.0}, r"significance must be in \[0.001, 1\)"),
            ({"targets": [(5, "a")], "significance": True}, "significance must be in"),
            ({"every": 2, "memory": 1.0}, r"memory must be in \[0, 1\), got 1.0"),
        ],
    )
    def test_options_that_are_wrong(self, options, message):
        with pytest.raises(ValueError, match=message):
            Reselection(**options)

    def test_what_is_no_list(self):
        for wrong in ("news", 5):
            with pytest.raises(TypeError, match="targets must be pairs of a step and a key"):
                Reselection(every=2, targets=wrong)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"after": "restart"}, r"reselect=5 .* after='restart' .* pass after='continue'"),
            (
                {"selector": FixedSelection(["a"], estimate=False)},
                r"reselect=5 selects again by new estimates, but FixedSelection\(estimate=False\)",
            ),
            (
                {"layers": LayerSelection(training="freeze")},
                "layers: training='freeze' holds some back .* pass training='all'",
            ),
            (
                {"groups": ["b"], "reselect": Reselection(targets=[(5, "b")])},
                "groups names 'b', which is one of the targets of reselect",
            ),
        ],
    )
    def test_options_that_exclude_each_other(self, options, message):
        with pytest.raises(ValueError, match=message):
            TaskSelectionCallback(**{"reselect": 5} | options)

    @pytest.mark.parametrize(
        ("reselect", "message"),
        [
            (6, r"no selection is due between the first one, after step 4, and the end .* step 10"),
            (
                Reselection(targets=[(10, "letters")]),
                "one from step 10 on, but the run has only 10",
            ),
            (
                Reselection(targets=[(6, "poems")]),
                r"reselect: targets names 'poems', which is not a key .* has \['letters', 'sums'\]",
            ),
            (
                Reselection(targets=[(0, "sums"), (4, "letters")]),
                "all targets begin by step 4, but the first selection is after step 4",
            ),
            (
                Reselection(every=2, targets=cast("Any", lambda step: 7)),
                r"targets\(4\) must return a key",
            ),
            (
                Reselection(every=2, targets=lambda step: "letters" if step > 5 else None),
                "groups names the target 'letters'",
            ),
        ],
    )
    def test_before_the_first_step(self, reselect, message, run_dir):
        cb = callback(target="sums", reselect=reselect)
        if callable(reselect) or (not isinstance(reselect, int) and callable(reselect.targets)):
            cb.groups = ("letters",)
        trainer = tiny.plain_trainer(run_dir, cb, eval_dataset=targets())
        with pytest.raises((TypeError, ValueError), match=message):
            trainer.train()
        assert trainer.state.global_step == 0


class TestTheReport:
    lines: ClassVar = [
        DecisionLine(step=4, target="<b>|", weights={"a": 0.5, "<i>|": 0.5}, loss=1.5),
        DecisionLine(
            step=8,
            target="t",
            weights={"a": 1.0},
            loss=1.25,
            estimated=1.0,
            low=0.9,
            high=1.1,
            p_value=0.011,
            averaged_with=4,
        ),
        DecisionLine(step=9, target="t", weights={"a": 1.0}, p_value=0.5, is_selection=False),
    ]

    def test_it_comes_back_from_its_file(self, tmp_path):
        report = SelectionReport(weights={"a": 1.0}, decisions=self.lines)
        report.save(tmp_path)
        assert SelectionReport.load(tmp_path).decisions == self.lines

    def test_in_words(self):
        report = SelectionReport(weights={"a": 1.0}, decisions=self.lines)
        text = report.to_text()
        assert (
            "step 8, for t: a 100% (new choice, averaged with the mixture of step 4, p = 0.011). Loss 1.2500, estimated "
            "for the end 1.0000." in text
        )
        assert "step 9, for t: a 100% (target not significantly different: not selected" in text
        assert "<b>" not in report.to_html() + report.to_markdown() + card.section(report, [])
        assert '<table id="selections">' in report.to_html()
        assert "| 8 | t | 1.2500 | 1.0000 | 0.9000 | 1.1000 | 0.011 | a 100% |" in (
            report.to_markdown()
        )

    def test_of_one_selection_nothing_is_shown(self):
        report = SelectionReport(weights={"a": 1.0})
        for text in (report.to_text(), report.to_markdown(), report.to_html()):
            assert "Selections" not in text and "selections" not in text


def test_verify_is_about_the_last_selection(run_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    script = tmp_path / "train.py"
    script.write_text(
        "import sys, tiny\n"
        "from hf_auxselect import FixedSelection, GaussNewton\n"
        "callback = tiny.callback(\n"
        "    estimator=GaussNewton(), selector=FixedSelection(['b']), reselect=3\n"
        ")\n"
        "trainer = tiny.plain_trainer(sys.argv[1], callback, save_strategy='steps', save_steps=1)\n"
        "trainer.train()\n"
        "print('ended with', trainer.evaluate()['eval_loss'])\n"
    )
    monkeypatch.setattr(sys, "argv", [str(script), str(run_dir)])
    runpy.run_path(str(script), run_name="__main__")
    ended = float(capsys.readouterr().out.split("ended with ")[1].split()[0])
    directory = run_dir / "_task_selection"
    assert cli.main(["verify", str(directory), "--num", "1", str(script), str(run_dir)]) == 0
    report = SelectionReport.load(directory)
    assert (report.run["switch_step"], report.verification[0].measured) == (7, ended)


def test_the_store_of_a_test_holds_both_targets(run_dir):
    cb = callback(target="sums", reselect=Reselection(targets=[(6, "letters")], significance=0.5))
    trained(tiny.plain_trainer, run_dir, cb, eval_dataset=targets())
    store = GradientStore.load(run_dir / "_task_selection" / "step_6" / "drift_gradients")
    assert store.task_names == ["sums"]
    assert len(store) == len(store.target) == 8
