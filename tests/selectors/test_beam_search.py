import numpy as np
import pytest
from analytic import convex, exhaustive, loss_of, problem_of, rugged, sizes_of
from hypothesis import given
from hypothesis import strategies as st

from hf_auxselect import BeamSearch, ForwardSelection

PROBLEMS = st.tuples(st.sampled_from([convex, rugged]), st.integers(0, 300))


def make(kind, seed, *, num_tasks=7, **options):
    return problem_of(*kind(seed, num_tasks), sizes=sizes_of(seed, num_tasks), **options)


@given(
    kind_and_seed=PROBLEMS,
    width=st.integers(1, 5),
    max_tasks=st.none() | st.integers(1, 7),
    num_kept=st.integers(0, 3),
    swaps=st.booleans(),
)
def test_it_is_never_worse_than_forward_selection(kind_and_seed, width, max_tasks, num_kept, swaps):
    num_kept = min(num_kept, max_tasks or num_kept)
    problem = make(*kind_and_seed, keep=[f"t{k}" for k in range(num_kept)])
    search = BeamSearch(width=width, max_tasks=max_tasks, swaps=swaps)
    found = search.select(problem)
    greedy = ForwardSelection(max_tasks=max_tasks).select(problem)
    assert found.estimate.loss[0] <= greedy.estimate.loss[0] + 1e-12
    assert set(problem.keep) <= set(found.selected)
    assert len(found.selected) <= (max_tasks or 7)


@given(kind_and_seed=PROBLEMS, max_tasks=st.none() | st.integers(1, 7))
def test_no_removal_addition_or_exchange_improves_the_result(kind_and_seed, max_tasks):
    problem = make(*kind_and_seed, keep=["t3"])
    found = BeamSearch(width=2, max_tasks=max_tasks).select(problem)
    chosen, names = set(found.selected), set(problem.task_names)
    changed = [chosen - {name} for name in chosen]
    if len(chosen) < (max_tasks or 7):
        changed += [chosen | {name} for name in names - chosen]
    changed += [chosen - {one} | {other} for one in chosen for other in names - chosen]
    for subset in changed:
        if "t3" in subset:
            assert loss_of(problem, subset) >= found.estimate.loss[0] - 1e-12


@given(st.integers(0, 300))
def test_a_beam_that_holds_all_subsets_of_a_size_finds_the_best_of_those_it_reaches(seed):
    """A loss that falls with the number of tasks lets the beam reach every size."""
    loss, _ = rugged(seed, 6)
    problem = problem_of(lambda w: loss(w) - (w > 0).sum(1), sizes=sizes_of(seed, 6))
    found = BeamSearch(width=20, swaps=False).select(problem)
    assert found.estimate.loss[0] == exhaustive(problem)


def losses(table, other=2.0):
    """Losses of subsets of four tasks, given as the digits of their tasks."""

    def loss(shares):
        names = ["".join(map(str, np.flatnonzero(row))) for row in shares]
        return np.array([table.get(name, other) for name in names])

    return problem_of(loss, sizes=[1] * 4)


def test_two_tasks_that_help_only_together_are_found():
    problem = losses({"0": 0.5, "1": 0.9, "2": 0.9, "01": 0.4, "12": 0.1})
    assert ForwardSelection().select(problem).selected == ["t0", "t1"]
    for swaps in (False, True):
        assert BeamSearch(width=3, swaps=swaps).select(problem).selected == ["t1", "t2"]


def test_an_exchange_leaves_the_path_of_the_greedy_search():
    problem = losses({"0": 0.5, "01": 0.4, "12": 0.1})
    assert BeamSearch(width=1, swaps=False).select(problem).selected == ["t0", "t1"]
    found = BeamSearch(width=1).select(problem)
    assert found.selected == ["t1", "t2"]
    accepted = [step for step in found.history if step.accepted]
    assert [step.loss for step in accepted] == [0.5, 0.4, 0.1]
    assert [len(step.tasks) for step in found.history] == [1, 2, 3, 2]


def test_among_equals_the_first_tasks_win():
    assert BeamSearch().select(losses({}, other=1.0)).selected == ["t0"]
    tied = losses({"0": 0.5, "1": 0.5, "12": 0.3, "03": 0.3})
    assert BeamSearch(width=1).select(tied).selected == ["t0", "t3"]
    assert BeamSearch(width=2).select(tied).selected == ["t0", "t3"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 0}, "width must be an int of at least 1, got 0"),
        ({"width": 2.5}, "width must be an int of at least 1, got 2.5"),
        ({"max_tasks": "2"}, "max_tasks must be an int of at least 1, or None; got '2'"),
        ({"max_tasks": 0}, "max_tasks must be an int of at least 1, or None; got 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        BeamSearch(**options)
