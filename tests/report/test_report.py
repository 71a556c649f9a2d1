import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from reference import random_store

from hf_auxselect import (
    BackwardElimination,
    FixedSelection,
    ForwardSelection,
    GaussNewton,
    GradExLogistic,
    KernelSurrogate,
    LinearizedTraining,
    RandomEnsemble,
    RidgeSurrogate,
    SelectionReport,
)
from hf_auxselect.estimators.reliability import RELIABILITY_CHECKS, RESTART_WARNING
from hf_auxselect.files import to_json
from hf_auxselect.report.analysis import estimator_from, strategy_record
from hf_auxselect.report.content import Evaluation, Interval, Row
from hf_auxselect.report.markdown import escape_markdown
from hf_auxselect.report.tables import parquet_tables
from hf_auxselect.report.text import printable
from hf_auxselect.selectors import SelectionProblem

MODEL_CARDS = sorted((Path(__file__).parents[2] / "model_cards").glob("*/README.md"))


def problem(fitted, store):
    return SelectionProblem(fitted.estimate, store.task_names, store.task_sizes)


def report_of(store, selector=None):
    fitted = GradExLogistic().fit(store)
    selection = (selector or ForwardSelection()).select(problem(fitted, store))
    report = SelectionReport(
        weights=selection.weights,
        scores=selection.scores,
        score_intervals={
            name: Interval(low=low, high=high)
            for name, (low, high) in selection.score_intervals.items()
        },
        history=list(selection.history),
        estimator=strategy_record(GradExLogistic()),
        selector=strategy_record(ForwardSelection()),
        run={"after": "continue", "switch_step": 4, "model": "tiny", "seconds": 1.5},
    )
    report.add_estimates(fitted, selection, store, seed=0)
    return report


@pytest.fixture
def report():
    return report_of(random_store(1))


def test_measured_metrics_stand_beside_the_loss(tmp_path):
    report = report_of(random_store(1))
    report.evaluations = [
        Evaluation(step=4, loss=1.5, metrics={"exact|match": 0.25}),
        Evaluation(step=8, loss=None, metrics={"exact|match": 0.5, "f1": 0.125}),
    ]
    sentence = (
        "Measured on the target: after step 4 loss 1.5000, exact|match 0.25; after step 8 loss not "
        "finite, exact|match 0.5, f1 0.125."
    )
    assert report.to_text().count(sentence) == 1
    page = report.to_markdown()
    assert "| after step | loss | exact\\|match | f1 |" in page
    assert "| 4 | 1.5000 | 0.25 | – |" in page
    assert "| 8 | not finite | 0.5 | 0.125 |" in page
    assert '<th scope="row">8</th><td class="number">not finite</td>' in report.to_html()
    report.save(tmp_path)
    assert SelectionReport.load(tmp_path).evaluations == report.evaluations


def test_scores_have_their_intervals(tmp_path):
    report = report_of(random_store(1), RandomEnsemble(num_subsets=20, subset_size=2))
    name, interval = next(iter(report.score_intervals.items()))
    shown = f"{report.scores[name]:.4f} [{interval.low:.4f}, {interval.high:.4f}]"
    assert "score, 90% interval |" in report.to_markdown() and shown in report.to_markdown()
    assert "score, 90% interval</th>" in report.to_html() and shown in report.to_html()
    report.save(tmp_path)
    assert SelectionReport.load(tmp_path).score_intervals == report.score_intervals
    table = pq.read_table(pa.BufferReader(parquet_tables(report)["tasks"]))
    row = table.to_pylist()[0]
    assert (row["score_low"], row["score_high"]) == (interval.low, interval.high)


class TestTheComparison:
    def test_it_has_what_a_reader_wants_to_compare(self, report):
        store = random_store(1)
        fitted = GradExLogistic().fit(store)
        size = len(report.selected)
        names = [row.name for row in report.rows]
        assert names == [
            "no further training",
            "chosen",
            "all tasks",
            f"random {size} of 3 tasks",
            *(f"all without {name}" for name in store.task_names),
            *(f"chosen and {name}" for name, w in report.weights.items() if w == 0),
        ]
        assert report.row("no further training").loss == pytest.approx(store.target.task_losses[0])
        everything = fitted.estimate(np.ones((1, 3), bool))
        assert report.row("all tasks").loss == pytest.approx(everything.loss[0], rel=1e-12)
        assert report.row("all tasks").low == pytest.approx(everything.low[0], rel=1e-12)
        without = fitted.estimate([[True, False, True]])
        assert report.row("all without task1").high == pytest.approx(without.high[0], rel=1e-12)
        assert report.row("all without task1").left_out == "task1"
        for row in report.rows:
            if row.added:
                subset = [[n in report.selected or n == row.added for n in store.task_names]]
                assert row.loss == pytest.approx(fitted.estimate(subset).loss[0], rel=1e-12)

    def test_the_difference_to_all_tasks_is_told_in_words(self, report):
        chosen, everything = report.row("chosen").loss, report.row("all tasks").loss
        assert report.difference.loss == pytest.approx(chosen - everything)
        sentence = report.compared_with_all_tasks()
        assert sentence in report.to_text()
        for low, high, verdict in [
            (-0.0440, 0.0115, "not significantly different from all tasks"),
            (-0.0440, -0.0115, "significantly better than all tasks"),
            (0.0115, 0.0440, "all tasks are significantly better"),
        ]:
            report.difference = Row(name="chosen minus all tasks", loss=-0.0163, low=low, high=high)
            told = f"[{low:+.4f}, {high:+.4f}] nats per label token: {verdict}."
            assert (
                report.compared_with_all_tasks()
                == f"Chosen mixture minus all tasks: -0.0163 {told}"
            )
            assert f"label token: {verdict}." in report.to_markdown()

    def test_all_tasks_do_not_differ_from_all_tasks(self):
        store = random_store(2)
        report = report_of(store, FixedSelection(store.task_names))
        assert report.compared_with_all_tasks() == "The chosen mixture is that of all tasks."

    def test_random_subsets_have_the_chosen_size(self):
        store = random_store(2, counts=(3, 4, 5, 6))
        report = report_of(store, FixedSelection(["task0", "task2"]))
        fitted = GradExLogistic().fit(store)
        subsets = RandomEnsemble(num_subsets=200, subset_size=2, seed=0).subsets(4)
        row = report.row("random 2 of 4 tasks")
        losses = fitted.estimate(subsets).loss
        assert row.loss == pytest.approx(losses.mean())
        assert [row.low, row.high] == pytest.approx(np.quantile(losses, [0.05, 0.95]))


class TestReliabilityWarnings:
    @pytest.mark.parametrize("check", RELIABILITY_CHECKS, ids=lambda check: check.diagnostic)
    def test_values_above_the_limit_are_warned_of(self, check, monkeypatch):
        store = random_store(3)
        fitted = GradExLogistic().fit(store)
        selection = ForwardSelection().select(problem(fitted, store))
        for value, warned in [(1.01, True), (0.99, False), (-3.0, False)]:
            report = SelectionReport(weights=selection.weights)
            told = {check.diagnostic: value * check.limit}
            monkeypatch.setattr(type(fitted), "diagnostics", lambda self, told=told: told)
            report.add_estimates(fitted, selection, store, seed=0)
            assert report.warnings == [check.text.format(value * check.limit)] * warned

    @pytest.mark.parametrize("after", ["continue", "restart"])
    def test_a_restart_is_warned_of(self, after):
        store = random_store(3, after=after)
        fitted = GradExLogistic().fit(store)
        selection = ForwardSelection().select(problem(fitted, store))
        report = SelectionReport(weights=selection.weights)
        report.add_estimates(fitted, selection, store, seed=0)
        assert (RESTART_WARNING in report.warnings) == (after == "restart")

    def test_the_default_estimator_gives_each(self):
        diagnostics = LinearizedTraining().fit(random_store(3, look_ahead=True)).diagnostics()
        assert all(np.isfinite(diagnostics[check.diagnostic]) for check in RELIABILITY_CHECKS)


class TestFiles:
    def test_it_is_read_back_as_it_was(self, report, tmp_path):
        report.save(tmp_path / "report")
        again = SelectionReport.load(tmp_path / "report")
        assert again.to_dict() == report.to_dict()
        assert again.history == report.history
        assert SelectionReport.load(tmp_path).to_dict() == report.to_dict()

    def test_the_picture_is_one(self, report, tmp_path):
        report.save(tmp_path)
        assert (tmp_path / "left_out.png").read_bytes().startswith(b"\x89PNG")

    def test_without_estimates_there_is_no_picture(self, tmp_path):
        SelectionReport(weights={"a": 1.0, "b": 0.0}).save(tmp_path)
        assert not (tmp_path / "left_out.png").exists()
        assert "left_out.png" not in (tmp_path / "README.md").read_text()

    @pytest.mark.parametrize(
        "content", ["", "{", "[]", '{"selected": []}', '{"selected": [], "x": 1}']
    )
    def test_a_damaged_report_is_named(self, content, tmp_path):
        (tmp_path / "report.json").write_text(content)
        with pytest.raises(ValueError, match=r"report\.json: damaged"):
            SelectionReport.load(tmp_path)

    def test_no_report(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"report\.json is missing"):
            SelectionReport.load(tmp_path)

    def test_an_unknown_estimator(self, report, tmp_path):
        report.estimator = {"name": "Oracle"}
        report.save(tmp_path / "report")
        (tmp_path / "gradients").mkdir()
        loaded = SelectionReport.load(tmp_path)
        with pytest.raises((ValueError, FileNotFoundError)):
            loaded.estimate(["task0"])


class TestWhatIf:
    def test_names_weights_and_arrays(self, tmp_path):
        store = random_store(3)
        report = report_of(store)
        fitted = GradExLogistic().fit(store)
        report.attach_gradients(tmp_path / "gradients", fitted)
        assert (
            report.estimate(["task0", "task2"]).loss == fitted.estimate([[True, False, True]]).loss
        )
        mixture = report.estimate({"task0": 1, "task1": 3})
        assert mixture.loss == fitted.estimate([[0.25, 0.75, 0.0]]).loss
        assert len(report.estimate(np.ones((4, 3), bool))) == 4

    def test_unknown_tasks(self, report):
        with pytest.raises(ValueError, match="unknown task 'x'; the report knows"):
            report.estimate(["x"])
        with pytest.raises(TypeError, match="got the string 'task0'"):
            report.estimate("task0")


class TestRendering:
    def test_the_page(self, report):
        page = report.to_markdown()
        assert page.startswith("# Task selection\n")
        for name in report.selected:
            assert f"**{name}**" in page
        for row in report.rows:
            assert f"| {row.name} | {row.loss:.4f} | {row.low:.4f} | {row.high:.4f} |" in page
        assert "| switch\\_step | 4 |" in page
        assert page.endswith("\n")

    def test_the_table(self, report):
        lines = report.to_text().splitlines()
        assert lines[0].startswith(f"Selected {len(report.selected)} of 3 tasks: ")
        assert len(lines) == 3 + sum(row.added is None for row in report.rows)

    def test_the_title_has_shares_where_they_differ(self, report):
        report.weights = {"task0": 0.2, "task1": 0.8, "task2": 0.0}
        assert report.to_text().startswith("Selected 2 of 3 tasks: task1 80%, task0 20%\n")
        report.weights = {"task0": 0.5, "task1": 0.5, "task2": 0.0}
        assert report.to_text().startswith("Selected 2 of 3 tasks: task0, task1\n")

    def test_warnings_are_shown(self, report):
        report.warnings = ["this is *odd*"]
        assert "Warning: this is *odd*" in report.to_text()
        assert "> **Warning.** this is \\*odd\\*" in report.to_markdown()

    @pytest.mark.parametrize(
        "name",
        [
            "a|b",
            "`rm`",
            "<script>alert(1)</script>",
            "a\nb",
            "\x1b[31mred",
            "\u202eevil",
            "$x_1$",
            "[l](u)",
        ],
    )
    def test_names_cannot_break_out(self, name, tmp_path):
        store = random_store(4)
        store.task_names[1] = name
        report = report_of(store, FixedSelection([name]))
        report.save(tmp_path)
        page, text = report.to_markdown(), report.to_text()
        assert "<script>" not in page
        assert "\x1b" not in page + text
        assert "\u202e" not in page + text
        assert len(text.splitlines()) == 3 + sum(row.added is None for row in report.rows)
        table = [line for line in page.splitlines() if line.startswith("| all without")]
        assert [line.replace("\\|", "").count("|") for line in table] == [5] * 3
        assert json.loads((tmp_path / "report.json").read_text())["selected"] == [name]

    def test_printable(self):
        assert printable("ü – ok") == "ü – ok"
        assert printable("a\tb") == "a\\tb"

    def test_escaping_is_undone_by_a_reader_of_markdown(self):
        assert escape_markdown("a_b|c") == "a\\_b\\|c"
        assert escape_markdown("<b>&") == "&lt;b&gt;&amp;"


@pytest.mark.parametrize("card", MODEL_CARDS, ids=lambda card: card.parent.name)
def test_a_model_card_is_rendered_from_its_report(card):
    """If the page was meant to change: ``SelectionReport.load(directory).save(directory)``."""
    report = SelectionReport.load(card.parent)
    assert report.to_markdown() == card.read_text()
    assert report.to_html() == (card.parent / "index.html").read_text()
    for name in ("left_out", "similarity"):
        for kind in ("png", "svg"):
            assert (card.parent / f"{name}.{kind}").is_file()


class TestStrategies:
    @pytest.mark.parametrize(
        "options",
        [
            GradExLogistic(regularization=0.5),
            LinearizedTraining(learning_rates=[0.2, 0.1]),
            GaussNewton(curvature="empirical", damping=0.2),
            RidgeSurrogate(),
            KernelSurrogate(
                base=RidgeSurrogate(base=LinearizedTraining(learning_rates=[0.1])),
                num_subsets=9,
            ),
        ],
        ids=repr,
    )
    def test_they_are_read_back(self, options):
        record = json.loads(json.dumps(strategy_record(options)))
        again = estimator_from(record)
        assert again == options
        assert strategy_record(again) == record

    @pytest.mark.parametrize(
        "options",
        [
            ForwardSelection(min_improvement=-math.inf),
            BackwardElimination(min_improvement=math.inf),
            RandomEnsemble(threshold=math.inf),
        ],
        ids=repr,
    )
    def test_infinite_options_are_written_and_equal_those_read_back(self, options):
        record = strategy_record(options)
        assert json.loads(to_json(record)) == record == strategy_record(replace(options))
        assert record != strategy_record(type(options)())

    def test_an_estimator_within_another_is_part_of_the_report(self, report, tmp_path):
        store = random_store(1)
        options = RidgeSurrogate(base=GradExLogistic(regularization=0.5))
        report.estimator = strategy_record(options)
        assert report.estimator["base"] == strategy_record(options.base)
        report.save(tmp_path / "report")
        loaded = SelectionReport.load(tmp_path)
        assert "GradExLogistic" in loaded.to_markdown()
        fitted = estimator_from(loaded.estimator).fit(store)
        loaded.attach_gradients(tmp_path / "gradients", fitted)
        assert loaded.estimate(["task1"]).loss == options.fit(store).estimate([[0, 1, 0]]).loss

    def test_an_option_by_its_name_in_an_earlier_version_is_read(self):
        earlier = {"name": "LinearizedTraining", "look_ahead": False, "model_error": 0.5}
        assert estimator_from(earlier) == LinearizedTraining(probes=False)
        earlier = {"name": "RidgeSurrogate", "base": earlier}
        assert estimator_from(earlier) == RidgeSurrogate(base=LinearizedTraining(probes=False))

    def test_an_unknown_one_within_another_is_named(self):
        record = strategy_record(RidgeSurrogate()) | {"base": {"name": "Oracle"}}
        with pytest.raises(ValueError, match="unknown estimator 'Oracle'"):
            estimator_from(record)

    def test_an_unknown_one_is_named(self):
        with pytest.raises(ValueError, match=r"unknown estimator 'Oracle'; known are \['GaussN"):
            estimator_from({"name": "Oracle"})

    def test_an_option_of_another_version_is_named(self):
        record = strategy_record(GradExLogistic()) | {"new": 1}
        with pytest.raises(ValueError, match=r"GradExLogistic has other options .*'new'"):
            estimator_from(record)

    def test_records_are_json(self):
        record = strategy_record(FixedSelection({"a": 1.0}))
        assert record == {"name": "FixedSelection", "tasks": {"a": 1.0}, "estimate": True}
        assert json.dumps(record)
