"""Further evaluation sets (groups): read, checked, captured, estimated and reported."""

import json
import logging
import re
from dataclasses import replace

import pytest
import tiny
from datasets import Dataset
from tiny import callback, trained

from hf_auxselect import (
    ConstrainedSelection,
    FixedSelection,
    GradExLogistic,
    SelectionReport,
    TaskSelectionCallback,
    WorstGroupSelection,
)
from hf_auxselect.trainer.data import group_dataset

HOSTILE = "<b>|wrong\n"


def evaluation_sets(**others):
    return {
        "target": tiny.sums(11, 9),
        "letters": tiny.sums(7, 7, letters=True),
        HOSTILE: tiny.sums(5, 8, shuffled=True),
    } | others


def with_groups(**options):
    return callback(**{"target": "target", "groups": ["letters", HOSTILE]} | options)


def begin(cb, run_dir, **options):
    """The checks before the first step."""
    trainer = tiny.sft_trainer(run_dir, cb, **{"eval_dataset": evaluation_sets()} | options)
    cb.attach(trainer)
    return cb._make_plan(trainer, 10)


class TestARun:
    @pytest.fixture(scope="class")
    def run(self, tmp_path_factory):
        """One whose losses the estimates must meet: nothing is learned, and batches are uneven."""
        directory = tmp_path_factory.mktemp("groups")
        cb = with_groups(estimator=GradExLogistic(), selector=WorstGroupSelection(starts=1))
        trainer = tiny.sft_trainer(
            directory,
            cb,
            eval_dataset=evaluation_sets(),
            learning_rate=0,
            per_device_eval_batch_size=2,
        )
        trainer.train()
        return directory, cb.report, trainer.evaluate()

    def test_losses_at_the_switch_are_those_that_are_logged(self, run):
        _, report, logged = run
        before = report.row("no further training").group_losses
        for name in ("letters", HOSTILE):
            assert before[name] == pytest.approx(logged[f"eval_{name}_loss"], rel=1e-5)

    def test_every_row_has_them_and_the_report_comes_back(self, run):
        directory, report, _ = run
        assert all({*row.group_losses} == {"letters", HOSTILE} for row in report.rows)
        assert [group.name for group in report.groups] == ["letters", HOSTILE]
        assert [group.captured for group in report.groups] == [7, 5]
        loaded = SelectionReport.load(directory / "_task_selection")
        assert loaded.to_dict() == report.to_dict()
        chosen = loaded.estimate(report.weights).group_losses[0]
        assert chosen == pytest.approx([*report.row("chosen").group_losses.values()])

    def test_they_are_shown(self, run):
        _, report, _ = run
        chosen = report.row("chosen").group_losses
        assert len(report.group_lines) == 2
        pages = (report.to_markdown(), report.to_html(), report.to_text())
        for page in pages:
            assert all(f"{loss:.4f}" in page for loss in chosen.values())
            assert "shadow price" in page
            assert HOSTILE not in page and "<b>|" not in page.replace(r"<b>|wrong\n", "")
        assert "<b>" not in pages[0] and "<b>" not in pages[1]

    def test_prices_are_in_the_decision_and_a_later_selection_starts_from_them(self, run):
        directory, report, _ = run
        path = directory / "_task_selection" / "selection.json"
        prices = json.loads(path.read_text())["shadow_prices"]
        assert prices == report.shadow_prices and {*prices} == {"letters", HOSTILE}
        later = ConstrainedSelection(ceilings={"letters": 3.0}, initial_prices=str(path))
        assert later.initial_prices == prices

    def test_a_report_of_an_earlier_release_is_read(self, run, tmp_path):
        _, report, _ = run
        content = report.to_dict()
        for name in ("groups", "shadow_prices"):
            del content[name]
        for row in content["rows"]:
            del row["group_losses"]
        (tmp_path / "report.json").write_text(json.dumps(content))
        loaded = SelectionReport.load(tmp_path)
        assert loaded.group_lines == [] and loaded.groups == []
        assert "Other targets" not in loaded.to_html()


class TestCeilings:
    def test_a_note_says_where_none_can_hold(self, run_dir):
        cb = with_groups(selector=ConstrainedSelection(ceilings={"letters": 0.5}, starts=1))
        trained(tiny.sft_trainer, run_dir, cb, eval_dataset=evaluation_sets())
        assert "No mixture is estimated to keep all ceilings" in " ".join(cb.report.warnings)

    def test_unknown_groups_are_refused_before_training(self, run_dir):
        selector = ConstrainedSelection(ceilings={"French": 0.5})
        with pytest.raises(ValueError, match=r"unknown group 'French'; known are \['letters', "):
            begin(with_groups(selector=selector), run_dir)
        with pytest.raises(ValueError, match="WorstGroupSelection needs groups"):
            begin(with_groups(selector=WorstGroupSelection(), groups=()), run_dir)


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"groups": "letters"}, TypeError, "sequence of keys of eval_dataset, got 'letters'"),
            ({"groups": [3]}, TypeError, "groups must be keys of eval_dataset, got 3"),
            ({"groups": ["a", "a"]}, ValueError, "groups names 'a' more than once"),
            ({"groups": ["target"], "target": "target"}, ValueError, "names the target 'target'"),
            (
                {"groups": ["a"], "selector": FixedSelection(["a"], estimate=False)},
                ValueError,
                r"groups=\['a'\] asks for estimates",
            ),
        ],
    )
    def test_of_options(self, options, error, message):
        with pytest.raises(error, match=message):
            TaskSelectionCallback(**options)

    @pytest.mark.parametrize(
        ("sets", "message"),
        [
            (tiny.sums(4, 1), "a key of eval_dataset, which is not a dict"),
            ({"target": tiny.sums(4, 1)}, r"'letters', which is not a key of eval_dataset"),
            (evaluation_sets(letters=Dataset.from_list([])), "has no rows"),
        ],
    )
    def test_of_evaluation_sets(self, sets, message, run_dir):
        trainer = tiny.sft_trainer(run_dir, callback())
        trainer.eval_dataset = sets
        with pytest.raises(ValueError, match=message):
            group_dataset(trainer, "letters", ["target"])

    def test_of_the_only_key_as_target_and_group(self, run_dir):
        sets = {"letters": tiny.sums(4, 1)}
        with pytest.raises(ValueError, match="names the target 'letters'"):
            begin(callback(groups=["letters"]), run_dir, eval_dataset=sets)

    def test_of_a_group_that_is_a_stream(self, run_dir):
        trainer = tiny.sft_trainer(run_dir, callback())
        trainer.eval_dataset = {"letters": tiny.sums(4, 1).to_iterable_dataset()}
        with pytest.raises(ValueError, match="of the group 'letters' is an iterable dataset"):
            group_dataset(trainer, "letters", [None])

    def test_of_a_group_without_label_tokens(self, run_dir):
        rows = tiny.tokenize(tiny.sums(6, 7))
        masked = rows.map(lambda row: {"labels": [-100] * len(row["labels"])})
        sets = {"target": rows, "letters": masked}
        cb = callback(target="target", groups=["letters"])
        trainer = tiny.plain_trainer(run_dir, cb, eval_dataset=sets)
        cb.attach(trainer)
        with pytest.raises(ValueError, match="the group 'letters' has no label tokens"):
            cb._make_plan(trainer, 10)


class TestBeforeTraining:
    def test_rows_of_a_group_that_are_trained_on_are_told(self, run_dir, caplog):
        cb = with_groups()
        sets = evaluation_sets(letters=tiny.sums(12, 2, mark="b", letters=True))
        trainer = tiny.sft_trainer(run_dir, cb, eval_dataset=sets, max_steps=1)
        with caplog.at_level(logging.WARNING), pytest.raises(ValueError, match="warmup"):
            trainer.train()
        caplog.clear()
        cb.warmup = 1
        trainer.args.max_steps = 2
        with caplog.at_level(logging.WARNING):
            trainer.train()
        assert re.search(r"the group 'letters' equals the training task 'b'", caplog.text)

    def test_the_preview_counts_their_examples(self, run_dir):
        sets = evaluation_sets()
        number = {}
        for groups in ((), ("letters", HOSTILE)):
            cb = with_groups(groups=groups)
            trainer = tiny.sft_trainer(run_dir, cb, eval_dataset=sets)
            number[groups] = cb.preview(trainer)
        one, other = number.values()
        assert other.num_examples == one.num_examples + 7 + 5
        assert other.disk_mib > one.disk_mib


class TestResume:
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}  # noqa: RUF012

    def selecting(self, **options):
        return with_groups(
            selector=WorstGroupSelection(starts=1), **{"estimator": GradExLogistic()} | options
        )

    @pytest.mark.parametrize("checkpoint", ["checkpoint-2", "checkpoint-4"])
    def test_a_resumed_run_decides_the_same(self, checkpoint, run_dir):
        options = self.options | {"eval_dataset": evaluation_sets()}
        cb = self.selecting()
        whole = trained(tiny.sft_trainer, run_dir, cb, **options)
        decision = (run_dir / "_task_selection" / "selection.json").read_text()
        again = self.selecting()
        resumed = trained(tiny.sft_trainer, run_dir, again, str(run_dir / checkpoint), **options)
        assert tiny.same(tiny.weights(whole), tiny.weights(resumed))
        assert again.report.weights == cb.report.weights
        assert again.report.rows == cb.report.rows
        assert (run_dir / "_task_selection" / "selection.json").read_text() == decision

    @pytest.mark.parametrize("change", ["rows", "names"])
    def test_other_groups_are_refused(self, change, run_dir):
        options = self.options | {"max_steps": 5}
        trained(
            tiny.sft_trainer, run_dir, self.selecting(), eval_dataset=evaluation_sets(), **options
        )
        sets, groups = evaluation_sets(), ["letters", HOSTILE]
        if change == "rows":
            sets["letters"] = tiny.sums(7, 6, letters=True)
        else:
            groups = ["letters"]
        with pytest.raises(ValueError, match=r"cannot resume: the run differs .* in groups"):
            trained(
                tiny.sft_trainer,
                run_dir,
                self.selecting(groups=groups),
                str(run_dir / "checkpoint-2"),
                eval_dataset=sets,
                **options,
            )


def test_a_note_says_where_not_all_examples_of_a_group_are_read(run_dir):
    plan = begin(with_groups(examples_per_task=6), run_dir)
    assert [len(group.example_ids) for group in plan.groups] == [6, 5]
    notes = " ".join(plan.target_sample_note())
    assert "6 of the target's 11 examples" in notes
    assert "6 of the 7 examples of the group 'letters'" in notes
    assert "wrong" not in notes
    assert replace(plan, groups=()).target_sample_note() != plan.target_sample_note()
