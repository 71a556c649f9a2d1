"""Recipes check a choice by training; what was measured is kept, and summarized plainly."""

import json

import numpy as np
import pytest
import tiny
from scipy.stats import spearmanr

from hf_auxselect import SelectionReport
from recipes.comparison import (
    ALL,
    CHOSEN,
    Comparison,
    Run,
    all_tasks,
    most_similar,
    random_order,
    rank_agreement,
    shares,
    table,
    verdict,
)


def run(name, loss, *, seed=0, estimated=None, **metrics):
    return Run(
        seed=seed,
        name=name,
        weights={"a": 1.0},
        measured={"loss": loss, **metrics},
        estimated=estimated,
        seconds=1.0,
    )


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A comparison that was stopped after the chosen mixture, and went on."""
    directory = tmp_path_factory.mktemp("comparison")
    made = []

    def make(callback, output_dir, seed):
        made.append(output_dir.name)
        options = {"save_strategy": "steps", "save_steps": 1, "logging_steps": 1}
        return tiny.sft_trainer(output_dir, callback, **options)

    def comparison(rivals, **settings):
        return Comparison(
            make=make,
            callback=lambda seed: tiny.callback(seed=seed),
            measure=lambda trainer: {"loss": trainer.evaluate()["eval_loss"]},
            rivals=rivals,
            output_dir=directory,
            settings=settings,
        )

    first = comparison({}, size=1).run(0)
    runs = comparison({ALL: all_tasks, "random": random_order}, size=1).run(0)
    return first, runs, made, comparison, directory


def test_what_was_measured_is_not_measured_again(compared):
    first, runs, made, _, directory = compared
    assert [one.name for one in runs] == [CHOSEN, ALL, "random"]
    assert runs[0] == first[0]
    assert made == ["chosen-0", "all-tasks-0", "random-0"]
    assert json.loads((directory / "measured-0.json").read_text())["settings"] == {"size": 1}


def test_rivals_start_from_the_checkpoint_at_the_switch(compared):
    _, runs, _, _, directory = compared
    report = SelectionReport.load(directory / "chosen-0" / "_task_selection")
    assert runs[0].weights == report.weights
    assert runs[0].estimated == pytest.approx(report.row("chosen").loss)
    assert runs[1].estimated == pytest.approx(report.row("all tasks").loss)
    steps = [
        json.loads((directory / name / "checkpoint-5" / "trainer_state.json").read_text())
        for name in ("chosen-0", "all-tasks-0")
    ]
    warm_up = [
        [entry["loss"] for entry in state["log_history"] if "loss" in entry and entry["step"] <= 2]
        for state in steps
    ]
    assert warm_up[0] == warm_up[1] != []


def test_other_settings_measure_anew(compared):
    *_, made, comparison, directory = compared
    before = (directory / "measured-0.json").read_text()
    comparison({}, size=2).run(0)
    assert made[3:] == ["chosen-0"]
    (directory / "measured-0.json").write_text(before)


def test_mixtures_to_compare_with(compared):
    *_, directory = compared
    report = SelectionReport.load(directory / "chosen-0" / "_task_selection")
    assert all_tasks(report, 0) == list(report.weights)
    mixed = random_order(report, 1)
    assert sorted(mixed.values()) == sorted(w for w in report.weights.values() if w > 0)
    store = report.gradients()
    target = store.target.gradients.mean(axis=0)
    scores = {}
    for k, name in enumerate(store.task_names):
        cosines = [g @ target / np.linalg.norm(g) for g in store.gradients[store.task_ids == k]]
        scores[name] = np.mean(cosines)
    assert most_similar(report, 0, number=1) == [max(scores, key=scores.get)]


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ((1.5, 2.0, 2.5), "The choice won; it is 0.5000 nats below"),
        ((1.5, 1.0, 2.5), "The choice did NOT win: all tasks had a lower loss"),
    ],
)
def test_the_verdict_says_plainly_whether_the_choice_won(losses, expected):
    names = [CHOSEN, ALL, "random"]
    assert verdict([*map(run, names, losses)]).startswith(expected)


def test_the_table_shows_means_and_gains_over_all_tasks():
    runs = [
        run(CHOSEN, 1.0, accuracy=0.5),
        run(ALL, 1.5, accuracy=0.25),
        run(CHOSEN, 2.0, seed=1, accuracy=0.75),
        run(ALL, 2.7, seed=1, accuracy=0.25),
    ]
    head, chosen, everything = table(runs)
    assert head.split() == ["loss", "accuracy", "gain"]
    assert chosen.split("  ")[1] == CHOSEN
    assert "1.5000 ± 0.5000" in chosen
    assert "62.5 ± 12.5%" in chosen
    assert chosen.endswith("+0.6000 ± 0.1000")
    assert everything.endswith("25.0 ± 0.0%")


def test_rank_agreement_is_that_of_scipy():
    losses, estimates, accuracies = [1.0, 2.0, 2.0, 4.0], [0.9, 2.5, 2.0, 3.0], [0.9, 0.5, 0.6, 0.1]
    runs = [
        run(str(i), loss, estimated=estimate, accuracy=accuracy)
        for i, (loss, estimate, accuracy) in enumerate(
            zip(losses, estimates, accuracies, strict=True)
        )
    ]
    found = rank_agreement(runs)
    assert found["loss"] == pytest.approx(spearmanr(losses, estimates).statistic)
    assert found["accuracy"] == pytest.approx(-spearmanr(accuracies, estimates).statistic)
    constant = [run(str(i), 1.0, estimated=float(i)) for i in range(4)]
    assert np.isnan(rank_agreement(constant)["loss"])
    assert rank_agreement([run("a", 1.0), run("b", 2.0)]) == {}


def test_a_mixture_in_words():
    assert shares({"a": 0.25, "b": 0.75, "c": 0.0}) == "b 75%, a 25%"
