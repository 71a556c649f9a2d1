"""``confirm=n``: finalists are trained before the switch, and the best measured one goes on."""

import json
import logging
import math
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from peft import get_peft_model
from tiny import trained

from hf_auxselect import Confirmation, FixedSelection, SelectionReport, TaskSelectionCallback
from hf_auxselect.confirmation import finalists, run_race, rungs, training_steps
from hf_auxselect.files import read_json
from hf_auxselect.ground_truth import digest_of_data
from hf_auxselect.report import card
from hf_auxselect.report.content import Finalist, Race
from hf_auxselect.report.table_rows import table_rows
from hf_auxselect.report.tables import parquet_tables
from hf_auxselect.report.text import confirmation_sentence
from hf_auxselect.selectors import Selection, Step
from hf_auxselect.switch import Switch
from hf_auxselect.tasks import TaskRows
from hf_auxselect.trainer.checkpoints import Decision
from hf_auxselect.trainer.trial_runs import TrialRun


def callback(**options):
    """Without a gradient pass unless a selector is given."""
    return tiny.callback(**{"selector": FixedSelection(["c", "d"], estimate=False)} | options)


@pytest.fixture
def parts(monkeypatch):
    """The steps to which ground-truth runs were trained, in order."""
    done, train_to = [], TrialRun.train_to

    def count(self, step, progress=None):
        done.append(step)
        return train_to(self, step, progress)

    monkeypatch.setattr(TrialRun, "train_to", count)
    return done


class TestTheRunThatGoesOn:
    @pytest.mark.parametrize(
        ("kind", "after", "number"), [("SFTTrainer", "continue", 3), ("Trainer", "restart", 4)]
    )
    def test_it_is_that_of_a_fixed_selection_of_the_winner(self, kind, after, number, run_dir):
        """Bit by bit, with dropout; with four finalists the training of two was interrupted."""
        make, options = tiny.TRAINERS[kind], {"gradient_accumulation_steps": 2}
        cb = callback(confirm=number, after=after)
        trainer = trained(make, run_dir / "race", cb, **options)
        race = cb.report.confirmation
        assert len(race.finalists) == number
        winner = FixedSelection(cb.report.weights, estimate=False)
        other = trained(make, run_dir / "fixed", callback(selector=winner, after=after), **options)
        assert tiny.same(tiny.weights(trainer), tiny.weights(other))
        measured = race.measured(race.winner)
        assert measured == trainer.evaluate()["eval_loss"] == other.evaluate()["eval_loss"]
        assert measured == min(race.measured(f.name) or math.inf for f in race.finalists)

    def test_the_estimates_choice_gives_way_to_a_better_one(self, run_dir):
        cb = callback(selector=FixedSelection(["b"]), confirm=2)
        trained(tiny.plain_trainer, run_dir, cb)
        report, race = cb.report, cb.report.confirmation
        assert (race.choice, race.winner) == ("selector's choice", "all tasks")
        assert report.selected == ["a", "b", "c", "d"]
        assert report.row("chosen").loss == report.row("all tasks").loss
        assert report.history == []
        for one in race.finalists:
            assert one.estimated == report.estimate(one.weights).loss[0]
            assert one.low <= one.estimated <= one.high
        decision = read_json(run_dir / "_task_selection" / "selection.json", Decision)
        assert decision["weights"] == report.weights == race.finalist("all tasks").weights
        assert decision["confirmation"] == {
            "finalists": 2,
            "share": 1.0,
            "winner": "all tasks",
            "measured_loss": race.measured("all tasks"),
            "measured_loss_all": race.measured("all tasks"),
        }
        assert "has changed the choice: all tasks" in report.to_text()
        assert report.metrics()["auxselect/measured_loss"] == race.measured("all tasks")

    def test_observing_only_reports(self, run_dir):
        cb = callback(confirm=2, after="observe")
        trainer = trained(tiny.plain_trainer, run_dir / "race", cb)
        torch.manual_seed(3)
        plain = tiny.plain_trainer(run_dir / "plain")
        plain.train()
        assert tiny.same(tiny.weights(trainer), tiny.weights(plain))
        assert len(cb.report.confirmation.finalists) == 2

    def test_a_share_of_the_rest(self, run_dir, parts):
        cb = callback(confirm=Confirmation(finalists=2, share=0.5))
        trained(tiny.plain_trainer, run_dir, cb)
        assert parts == [7, 7]
        assert "measured after step 7 of 10" in cb.report.to_text()
        assert card.measured_loss(cb.report) is None


class TestNothingIsTrainedTwice:
    def test_options_share_their_runs(self, run_dir, parts):
        """Calibration runs are evaluated where a race with pauses will ask for their losses."""
        selector = FixedSelection(["c", "d"])
        cb = callback(selector=selector, calibrate=2, confirm=4, verify=2)
        trained(tiny.plain_trainer, run_dir, cb)
        race = cb.report.confirmation
        assert race.steps == [7, 10]
        known = {run.name: run.measured for run in cb.report.calibration}
        verified = {run.name: run.measured for run in cb.report.verification}
        assert verified["all tasks"] == known["all tasks"]
        assert verified["chosen"] == race.measured(race.winner)
        calibration, new = [7, 10] * 2, [7] * 3
        assert parts[:7] == calibration + new
        in_final = [f.name for f in race.finalists if len(f.losses) == 2 and f.name != "all tasks"]
        assert parts[7:] == [10] * len(in_final)

    @pytest.mark.parametrize(
        ("kind", "after"), [("SFTTrainer", "continue"), ("Trainer", "restart")]
    )
    def test_a_run_that_is_stopped_in_the_race(self, kind, after, run_dir, monkeypatch):
        make, options = tiny.TRAINERS[kind], {"save_strategy": "steps", "save_steps": 2}
        whole = callback(confirm=3, after=after)
        expected = tiny.weights(trained(make, run_dir / "whole", whole, **options))
        calls, train_to = [], TrialRun.train_to

        def stop_in_the_third(self, step, progress=None):
            calls.append(step)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return train_to(self, step, progress)

        monkeypatch.setattr(TrialRun, "train_to", stop_in_the_third)
        with pytest.raises(KeyboardInterrupt):
            trained(make, run_dir / "stopped", callback(confirm=3, after=after), **options)
        assert not (run_dir / "stopped" / "checkpoint-4").exists()
        cb = callback(confirm=3, after=after)
        trainer = trained(make, run_dir / "stopped", cb, True, **options)
        assert len(calls) == 4, "the two that had finished are not trained again"
        assert tiny.same(tiny.weights(trainer), expected)
        losses = [one.losses for one in cb.report.confirmation.finalists]
        assert losses == [one.losses for one in whole.report.confirmation.finalists]

    @pytest.mark.parametrize("what", ["other state", "damaged"])
    def test_what_was_measured_of_another_state_does_not_count(self, what, run_dir, parts, caplog):
        options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}
        trained(tiny.plain_trainer, run_dir, callback(confirm=2), **options)
        (run_dir / "_task_selection" / "selection.json").unlink()
        (run_dir / "checkpoint-4" / "task_selection.json").unlink()
        path = run_dir / "_task_selection" / "ground_truth_runs.json"
        if what == "damaged":
            path.write_text(path.read_text()[:100])
        else:
            options["learning_rate"] = 2e-2
        with caplog.at_level(logging.WARNING):
            at_switch = str(run_dir / "checkpoint-4")
            trained(tiny.plain_trainer, run_dir, callback(confirm=2), at_switch, **options)
        assert parts == [6] * 4
        assert ("measured again" in caplog.text) == (what == "damaged")

    def test_a_run_that_is_stopped_before_its_first_checkpoint(self, run_dir, parts, monkeypatch):
        """It starts anew, from the same state, and finds what was measured."""

        def stop(*args):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(Switch, "publish", stop)
            with pytest.raises(KeyboardInterrupt):
                trained(tiny.plain_trainer, run_dir, callback(confirm=2))
        assert parts == [10, 10]
        trained(tiny.plain_trainer, run_dir, callback(confirm=2))
        assert parts == [10, 10]

    @pytest.mark.parametrize("what", ["adapter", "target"])
    def test_a_new_run_of_another_kind_in_the_same_directory(self, what, run_dir, parts):
        """A restart has the same initial parameters on another model, and for another target."""
        options = [{}, {"eval_dataset": tiny.tokenize(tiny.sums(16, 10))}]
        if what == "adapter":  # the factor of an adapter is no parameter
            options = [
                {"model": get_peft_model(tiny.llama(), tiny.lora(lora_alpha=a))} for a in (4, 8)
            ]
        for one in options:
            trained(tiny.plain_trainer, run_dir, callback(confirm=2, after="restart"), **one)
        assert parts == [10] * 4


@pytest.mark.parametrize("changed", ["train_dataset", "eval_dataset"])
def test_every_row_counts_in_the_hash_of_the_data(changed, run_dir):
    """Also one that the plan's fingerprint, of every third row of 200, has not looked at."""
    sets = {"train_dataset": tiny.tasks(100), "eval_dataset": tiny.sums(200, 9)}
    hashes, fingerprints = [], []
    for row in (None, None, 1):
        rows = sets[changed].map(
            lambda one, i, row=row: one | ({"completion": "h"} if i == row else {}),
            with_indices=True,
        )
        trainer = tiny.plain_trainer(
            run_dir, **{name: tiny.tokenize(one) for name, one in (sets | {changed: rows}).items()}
        )
        plan = callback().attach(trainer)._make_plan(trainer, 10)
        hashes.append(digest_of_data(plan))
        fingerprints.append(plan.fingerprint)
    assert fingerprints[0] == fingerprints[1] == fingerprints[2]
    assert hashes[0] == hashes[1] != hashes[2]


class TestResumingAtTheSwitch:
    @pytest.fixture
    def options(self):
        return {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}

    def test_the_decision_is_kept(self, run_dir, parts, options):
        first = callback(confirm=2)
        expected = tiny.weights(trained(tiny.plain_trainer, run_dir, first, **options))
        cb = callback(confirm=2)
        at_switch = str(run_dir / "checkpoint-4")
        trainer = trained(tiny.plain_trainer, run_dir, cb, at_switch, **options)
        assert parts == [6, 6]
        assert cb.report.confirmation == first.report.confirmation
        assert tiny.same(tiny.weights(trainer), expected)

    def test_other_finalists_are_another_decision(self, run_dir, parts, options, caplog):
        trained(tiny.plain_trainer, run_dir, callback(confirm=2), **options)
        cb = callback(confirm=3)
        with caplog.at_level(logging.WARNING):
            trained(tiny.plain_trainer, run_dir, cb, str(run_dir / "checkpoint-4"), **options)
        assert "it is made anew" in caplog.text
        assert len(cb.report.confirmation.finalists) == 3
        assert parts == [6, 6, 6], "two losses are known"


class TestRungs:
    def test_the_worse_half_goes_until_three_are_left(self):
        counts = {n: [count for count, _ in rungs(n, 0, 100, 1.0)] for n in range(2, 13)}
        assert counts[2] == [2]
        assert counts[3] == [3]
        assert counts[4] == [4, 2]
        assert counts[5] == [5, 3]
        assert counts[7] == [7, 4, 2]
        assert counts[12] == [12, 6, 3]

    def test_steps_double_up_to_the_end(self):
        assert [step for _, step in rungs(8, 20, 100, 1.0)] == [40, 60, 100]
        assert [step for _, step in rungs(8, 20, 100, 0.5)] == [30, 40, 60]
        assert [step for _, step in rungs(8, 4, 5, 1.0)] == [5, 5, 5]

    def test_the_price(self):
        assert training_steps(None, 20, 100) == 0
        assert training_steps(Confirmation(finalists=3), 20, 100) == 3 * 80
        eight = training_steps(Confirmation(finalists=8), 20, 100)
        assert eight == 8 * 20 + 4 * 20 + 2 * 40

    def test_the_preview_has_it(self, run_dir):
        cb = callback(selector=FixedSelection(["a"]), confirm=4, verify=1)
        preview = cb.preview(tiny.plain_trainer(run_dir, cb))
        assert preview.verification_steps == 6 + 4 * 3 + 2 * 3


class RunsOfTwoTasks:
    """Stands for GroundTruthRuns: the losses after each step, by the share of the first task."""

    rest = SimpleNamespace(
        first_step=0, last_step=8, tasks=TaskRows(("a", "b"), np.array([0, 1, 1]))
    )

    def __init__(self, losses):
        self.losses, self.asked = losses, []

    def bar(self, title, total):
        self.title, self.total = title, total
        return nullcontext()

    def loss(self, shares, step, progress, *, pause):
        self.asked.append((shares[0], step))
        return self.losses[shares[0]][step]

    def forget_state(self, shares):
        pass

    def seconds(self, shares):
        return 0.0

    def race(self, **options):
        mixtures = {f"mixture {share}": np.array([share, 1 - share]) for share in self.losses}
        return run_race(self, mixtures, Confirmation(finalists=len(mixtures), **options))


class TestTheRace:
    def test_the_worse_half_is_dropped(self):
        runs = RunsOfTwoTasks(
            {0.1: {4: 3.0}, 0.2: {4: 1.0, 8: 0.9}, 0.3: {4: 2.0, 8: 0.8}, 0.4: {4: 4.0}}
        )
        race = runs.race()
        assert race.winner == "mixture 0.3"
        assert race.steps == [4, 8]
        assert [one.losses for one in race.finalists] == [[3.0], [1.0, 0.9], [2.0, 0.8], [4.0]]
        assert (runs.title, runs.total) == ("confirmation", 4 * 4 + 2 * 4)
        assert race.measured("mixture 0.3") == 0.8
        assert race.measured("mixture 0.1") is None
        verdicts = [race.verdict(one) for one in race.finalists]
        assert verdicts == ["dropped at step 4", "", "won", "dropped at step 4"]

    def test_of_equal_losses_the_first_goes_on(self):
        assert RunsOfTwoTasks({0.1: {8: 1.0}, 0.2: {8: 1.0}}).race().winner == "mixture 0.1"
        runs = RunsOfTwoTasks({share: {4: 1.0, 8: 1.0} for share in (0.1, 0.2, 0.3, 0.4)})
        assert [len(one.losses) for one in runs.race().finalists] == [2, 2, 1, 1]

    def test_a_loss_that_is_not_finite_is_the_worst(self):
        race = RunsOfTwoTasks({0.1: {8: math.nan}, 0.2: {8: 9.0}, 0.3: {8: math.inf}}).race()
        assert race.winner == "mixture 0.2"
        assert [one.losses for one in race.finalists] == [[None], [9.0], [None]]
        assert RunsOfTwoTasks({0.1: {8: math.nan}, 0.2: {8: math.inf}}).race().winner == (
            "mixture 0.1"
        )

    def test_one_finalist_is_not_trained(self):
        runs = RunsOfTwoTasks({0.1: {}})
        race = run_race(runs, {"all tasks": np.array([0.1, 0.9])}, Confirmation(finalists=2))
        assert (race.winner, race.steps, runs.asked) == ("all tasks", [], [])


class TestFinalists:
    tasks = TaskRows(tuple("abcd"), np.repeat([0, 1, 2, 3], [10, 20, 30, 40]))

    def selection(self, weights, *history):
        return Selection(
            weights={name: weights.get(name, 0.0) for name in self.tasks.names},
            history=tuple(
                Step(tasks=tuple(tasks), loss=loss, low=0, high=9, accepted=False, weights=shares)
                for tasks, loss, shares in history
            ),
        )

    def of(self, selection, number, keep=()):
        return {
            name: np.round(shares, 4).tolist()
            for name, shares in finalists(selection, self.tasks, keep, number).items()
        }

    def test_the_choice_then_all_tasks_then_the_best_others(self):
        selection = self.selection(
            {"a": 1.0},
            ("c", 1.2, None),
            ("ab", 1.1, None),
            ("a", 1.0, None),
            ("bd", 1.3, {"b": 0.5, "d": 0.5}),
        )
        found = self.of(selection, 5)
        assert [*found] == [
            "selector's choice",
            "all tasks",
            "runner-up 1: a, b",
            "runner-up 2: c",
            "runner-up 3: b, d",
        ]
        assert found["all tasks"] == [0.1, 0.2, 0.3, 0.4]
        assert found["runner-up 1: a, b"] == [0.3333, 0.6667, 0, 0]
        assert found["runner-up 3: b, d"] == [0, 0.5, 0, 0.5]
        assert [*self.of(selection, 2)] == ["selector's choice", "all tasks"]

    def test_then_mixtures_between_them(self):
        found = self.of(self.selection({"a": 1.0}), 5)
        assert [*found] == [
            "selector's choice",
            "all tasks",
            "0.5 of the way to all tasks",
            "0.25 of the way to all tasks",
            "0.75 of the way to all tasks",
        ]
        assert found["0.25 of the way to all tasks"] == [0.775, 0.05, 0.075, 0.1]

    def test_where_all_tasks_were_chosen_the_others_may_still_win(self):
        everything = dict(zip("abcd", [0.1, 0.2, 0.3, 0.4], strict=True))
        found = self.of(self.selection(everything, ("d", 1.0, None)), 3)
        assert [*found] == ["all tasks", "runner-up 1: d"]

    def test_what_hardly_differs_is_not_trained(self):
        almost = {"a": 0.97, "b": 0.03}
        selection = self.selection({"a": 1.0}, ("ab", 0.9, almost), ("b", 1.0, None))
        assert [*self.of(selection, 3)][2] == "runner-up 1: b"

    def test_kept_tasks_are_in_all(self):
        selection = self.selection({"a": 0.5, "b": 0.5}, ("a", 1.0, None), ("bc", 1.1, None))
        found = self.of(selection, 4, keep=["b"])
        assert [*found][2:] == ["runner-up 1: b, c", "0.5 of the way to all tasks"]

    def test_long_and_strange_names(self):
        names = tuple(f"{{{i}}} %s" for i in range(9))
        tasks = TaskRows(names, np.arange(9))
        selection = Selection(
            weights=dict.fromkeys(names, 0.0) | {names[0]: 1.0},
            history=(Step(tasks=names[1:], loss=1.0, low=0, high=2, accepted=False),),
        )
        name = [*finalists(selection, tasks, (), 3)][2]
        assert name == f"runner-up 1: {', '.join(names[1:7])} and 2 more"


class TestTheReport:
    @pytest.fixture
    def report(self):
        weights = {"a": 0.5, "<b>|": 0.5}
        return SelectionReport(
            weights=weights,
            run={"max_steps": 10, "switch_step": 2, "after": "continue"},
            confirmation=Race(
                finalists=[
                    Finalist(
                        name="selector's choice", weights=weights, losses=[1.0, 0.9], seconds=2
                    ),
                    Finalist(name="all tasks", weights=weights, losses=[1.5], seconds=1),
                    Finalist(
                        name="runner-up 1: a, <b>|", weights=weights, losses=[None], seconds=1
                    ),
                ],
                steps=[6, 10],
                winner="selector's choice",
                choice="selector's choice",
                asked=3,
                share=1.0,
            ),
        )

    def test_it_comes_back_from_its_file(self, report, tmp_path):
        report.save(tmp_path)
        assert SelectionReport.load(tmp_path).confirmation == report.confirmation

    def test_in_words(self, report):
        assert confirmation_sentence(report) == (
            "Training on 3 finalists has confirmed the choice: selector's choice 0.9000, all tasks "
            "1.5000 (dropped at step 6, where selector's choice had 1.0000) nats per label token."
        )
        assert confirmation_sentence(report) in report.to_text()
        assert "all tasks             1.5000  dropped at step 6" in report.to_text()
        assert card.measured_loss(report) == 0.9
        assert "has confirmed the choice" in card.section(report, [])

    def test_as_tables(self, report):
        assert "| selector's choice | 1.0000 | 0.9000 | – |" in report.to_markdown()
        assert "runner-up 1: a, &lt;b&gt;\\| | not finite |  |" in report.to_markdown()
        page = report.to_html()
        assert '<table id="confirmation">' in page
        assert "<td>dropped at step 6</td>" in page
        assert "<b>" not in page
        assert table_rows(report)["finalists"][1] == {
            "trained on": "all tasks",
            "step 6": 1.5,
            "step 10": "",
            "result": "dropped at step 6",
        }
        assert "ground_truth_runs" in parquet_tables(report)

    def test_where_there_was_nothing_to_confirm(self, report):
        alone = Race(
            finalists=report.confirmation.finalists[1:2],
            steps=[],
            winner="all tasks",
            choice="all tasks",
            asked=2,
            share=1.0,
        )
        report.confirmation = alone
        assert "nothing to confirm" in report.to_text()
        assert "nothing to confirm" in report.to_markdown()
        assert "nothing to confirm" in report.to_html()
        assert table_rows(report).get("finalists") is None
        assert json.loads(json.dumps(report.to_dict()))["confirmation"]["steps"] == []


@pytest.mark.parametrize("confirm", [1, -1, 2.5, True, "3", None])
def test_bad_numbers_of_finalists(confirm):
    with pytest.raises(ValueError, match="confirm must be a number of finalists, 2 or more"):
        TaskSelectionCallback(confirm=confirm)


@pytest.mark.parametrize("share", [0, -0.5, 1.5, True, "all", math.nan])
def test_bad_shares(share):
    with pytest.raises(ValueError, match="share of the remaining steps in"):
        Confirmation(share=share)


def test_a_selector_that_promises_more_than_a_low_loss_is_not_overruled():
    class Constrained(FixedSelection):
        asks_for_target_only = False

    with pytest.raises(ValueError, match="Constrained asks for more than that"):
        TaskSelectionCallback(selector=Constrained(["a"]), confirm=2)


def test_off_by_default():
    assert TaskSelectionCallback().confirm == 0
