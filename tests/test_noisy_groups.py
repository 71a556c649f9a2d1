"""The recipe that finds bad data sources, at its own size for 30 steps, and at a tiny one."""

import random
import re
import sys

import pytest

from benchmarks.accuracy import noisy_groups as benchmark
from hf_auxselect import GradExLogistic
from recipes import noisy_groups


@pytest.fixture
def tiny_size(monkeypatch):
    sizes = {"WARM_UP_STEPS": 2, "STEPS": 3, "WIDTH": 8, "GROUP_SIZE": 3, "TARGET_SIZE": 10}
    for name, value in sizes.items():
        monkeypatch.setattr(noisy_groups, name, value)


def test_right_groups_are_told_from_random_ones(tmp_path):
    scores, _ = noisy_groups.score_groups(
        0, GradExLogistic(), str(tmp_path), max_steps=30, disable_tqdm=True, use_cpu=True
    )
    assert len(scores) == 20
    assert noisy_groups.auroc(scores) == 1.0
    bad = noisy_groups.above_the_gap(scores)
    assert sorted(bad) == sorted(name for name in scores if name.startswith("random"))


def test_an_example():
    example = noisy_groups.addition(random.Random(0), is_right=True)
    text = "".join(noisy_groups.CHARACTERS[i] for i in example["input_ids"])
    question, *lines = text.strip().split("\n")
    a, b = map(int, question.split("+"))
    assert int(lines[-1]) == a + b
    assert [len(line) for line in lines] == [2, 3, 4, 5, 6]
    labelled = sum(label != -100 for label in example["labels"])
    assert labelled == sum(len(line) + 1 for line in lines)


def test_random_examples_have_the_same_form():
    right = noisy_groups.addition(random.Random(0), is_right=True)
    wrong = noisy_groups.addition(random.Random(0), is_right=False)
    assert right["input_ids"][:12] == wrong["input_ids"][:12]
    assert len(right["input_ids"]) == len(wrong["input_ids"])
    assert right != wrong


def test_auroc():
    assert noisy_groups.auroc({"right 0": 1, "right 1": 3, "random 2": 2}) == 0.5
    assert noisy_groups.auroc({"right 0": 2, "random 1": 2}) == 0.5


@pytest.mark.parametrize(
    ("scores", "above"),
    [
        ({"a": 1.0, "b": 1.3, "c": 1.1}, ["b"]),
        ({"a": 9.0, "b": 1.0, "c": 8.0, "d": 1.1}, ["c", "a"]),
        ({"a": 1.0, "b": 1.0}, ["b"]),
    ],
)
def test_groups_above_the_widest_gap(scores, above):
    assert noisy_groups.above_the_gap(scores) == above


def test_the_script_prints_both_estimators_and_the_losses(tiny_size, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        sys, "argv", ["noisy_groups.py", "--seeds", "1", "--output_dir", str(tmp_path)]
    )
    noisy_groups.main()
    number = r"(\d\.\d{3})"
    line = re.search(
        rf"^seed 0: AUROC GradExLogistic\(\) {number}, LinearizedTraining\(\) {number}; dropped "
        rf"(\d+) random groups of 8, (\d+) right ones: target loss {number}, with all groups "
        rf"{number}$",
        capsys.readouterr().out,
        re.MULTILINE,
    )
    assert line is not None
    assert 0 < int(line[3]) + int(line[4]) < 20


def test_a_run_without_some_groups(tiny_size, tmp_path):
    bad = ["right 3", "random 12"]
    trainer = noisy_groups.build(0, None, str(tmp_path), without=bad, use_cpu=True)
    every = noisy_groups.build(0, None, str(tmp_path), use_cpu=True)
    assert set(every.train_dataset["task"]) - set(trainer.train_dataset["task"]) == set(bad)
    assert len(trainer.train_dataset) == 18 * 3
    assert trainer.eval_dataset["labels"][:] == every.eval_dataset["labels"][:]


def test_a_number_of_seeds_below_1_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["noisy_groups.py", "--seeds", "0"])
    with pytest.raises(SystemExit):
        noisy_groups.main()
    assert "--seeds must be a number of seeds, 1 or more, got 0." in capsys.readouterr().err


def test_the_benchmark_compares_the_estimators(tiny_size):
    found = benchmark.of_addition(0)
    assert set(found["auroc"]) == {
        benchmark.LOSS,
        benchmark.GRADEX,
        benchmark.DEFAULT,
        benchmark.NO_PROBES,
        benchmark.NEXT_STEPS,
        benchmark.GAUSS_NEWTON,
    }
    assert all(0 <= value <= 1 for value in found["auroc"].values())
    assert 0 < found["mixture"]["share_of_random"] < 1


def test_groups_at_the_floor_of_a_mixture():
    assert benchmark.above_floor({"a": 0.1, "b": 0.1001, "c": 3.0}) == ["c"]
    assert benchmark.above_floor({"a": 1.0, "b": 1.0}) == []
