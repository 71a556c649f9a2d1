"""Progressive re-selection: when a run chooses again, whether it must, and what it remembers.

The states of a run with switch steps ``s_0 < s_1 < ...``, of which ``s_0`` ends the warm-up. Paths
are those under ``_task_selection/``; ``step_<n>/`` has the files of the selection after step n, as
the directory above it has those of the first one.

    where the run is           what is on disk                   what a resumed run does
    before s_0                 plan.json                         trains on all tasks
    in the selection of s_i    gradients/ or step_<n>/, in       is back at the checkpoint before:
                               parts                             trains to s_i, takes up the parts
    after it                   selection.json: this decision,    reads the decisions of the
                               those before it, and the tests    checkpoint and draws the last
                               of the target that let none be    mixture, counted from its own step
                               made; step_<n>/report
    in a checkpoint since s_0  a copy of that selection.json     as above; at s_i itself nothing is
                               (task_selection.json)             decided twice
    between s_i and s_(i+1)    the same                          the same

A selection at s_i is one of a run that begins there: gradients at the parameters of s_i, losses
after the steps that are left, a mixture whose order begins at s_i. What it takes from earlier ones
is in their decisions alone: the losses that were measured, the scores, the shadow prices. So that a
run resumed from any checkpoint decides as an unbroken one, bit by bit.

Shapes: N and M examples, D projection_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hf_auxselect.checks import is_count, is_number
from hf_auxselect.seeds import random_words
from hf_auxselect.selectors.simplex import LEAST_WEIGHT

NUM_PERMUTATIONS = 999
"""Of a test. A convention: the smallest p-value is then 0.001, and that of 0.05 has a standard
error of 0.007."""

MAX_TESTED = 256
"""Examples of each target that a test compares. A convention, as ``examples_per_task``."""

Scores = Mapping[str, Mapping[str, float]]
"""Target -> task -> decrease of the target's loss for each step, nats per label token."""

Targets = Sequence[tuple[int, str]] | Callable[[int], str | None]


@dataclass(frozen=True, kw_only=True)
class Reselection:
    """When ``TaskSelectionCallback(reselect=...)`` selects again in the same run.

    Choose it for long runs, in which the gradients of the first selection grow old, and for targets
    that change. ``reselect=n`` is short for ``Reselection(every=n)``. Each selection captures
    gradients at the present parameters, and costs what the first one costs.

    A new choice is averaged with the mixture of the last selection for the same target, so that
    errors that are new at each selection average out, if that mixture has a positive score: the
    loss has fallen with it. The score of a task for a target is the moving average of the decrease
    of the target's loss for each step, over the steps after each selection for this target, by the
    task's share in them; that of a mixture is the mean of its tasks' scores. The average may have
    more tasks than the selector's own limit. Shadow prices are carried over, too.

    Args:
        every: steps from one selection to the next; None: only where a dated target begins.
        targets: keys of the ``eval_dataset`` dict: pairs of a step and the target from that step
            on, in order; or a function from the step to the target, which is called for all steps
            after the warm-up before training begins. Where it names none (None, or before the
            first date), the target is that of the callback.
        significance: select again only if the target has changed significantly: the p-value of a
            permutation test between gradients of the examples of the last selection's target and
            of the present one, both at the present parameters, is at most this. None: always.
        memory: share of the old in both averages; 0: nothing is carried over but shadow prices.

    Raises:
        ValueError, TypeError: an argument is wrong, or two do not go together.

    Source: "L2S" (doi 10.3389/fdata.2022.1052972), which learns along the way which source task
    serves which version of the target; Gretton et al., "A Kernel Two-Sample Test" (JMLR 2012).
    """

    every: int | None = None
    targets: Targets = ()
    significance: float | None = None
    memory: float = 0.5

    def __post_init__(self) -> None:
        every, significance, memory = self.every, self.significance, self.memory
        if every is not None and not is_count(every, 1):
            raise ValueError(
                f"reselect must be a number of steps, 1 or more, a Reselection, or None; got "
                f"{every!r}."
            )
        if not callable(self.targets):
            object.__setattr__(self, "targets", _dated(self.targets))
        if every is None and (callable(self.targets) or not self.targets):
            raise ValueError(
                "reselect: Reselection needs every=..., the steps from one selection to the next, "
                "or targets=[(step, key), ...]."
            )
        least = 1 / (NUM_PERMUTATIONS + 1)
        if significance is not None:
            if not is_number(significance) or not least <= significance < 1:
                raise ValueError(
                    f"reselect: significance must be in [{least:g}, 1) or None, got "
                    f"{significance!r}."
                )
            if not callable(self.targets) and not self.targets:
                raise ValueError(
                    f"reselect: significance={significance} selects again only if the target has "
                    "changed, but there are no targets=... that change it; leave it out."
                )
        if not is_number(memory) or not 0 <= memory < 1:
            raise ValueError(f"reselect: memory must be in [0, 1), got {memory!r}.")

    @property
    def named_targets(self) -> tuple[str, ...]:
        """The targets of dated pairs."""
        return () if callable(self.targets) else tuple(key for _, key in self.targets)

    def steps(self, first: int, last: int) -> tuple[int, ...]:
        """Optimizer steps after which a selection is due, ascending.

        Args:
            first: step of the first selection.
            last: number of steps of the run, before which a selection must be.

        Raises:
            ValueError: there is none after the first, or a target begins after the run.
        """
        dates = [] if callable(self.targets) else [step for step, _ in self.targets]
        if dates and dates[-1] >= last:
            raise ValueError(
                f"reselect: targets has one from step {dates[-1]} on, but the run has only {last} "
                "steps; leave it out, or train for longer."
            )
        clock = () if self.every is None else range(first, last, self.every)
        steps = sorted({first, *clock, *(date for date in dates if date > first)})
        if len(steps) == 1 and self.every is None:
            raise ValueError(
                f"reselect: all targets begin by step {dates[-1]}, but the first selection is "
                f"after step {first}, so that no other one is due. Pass every=..., let a target "
                "begin later, lower warmup, or leave reselect out."
            )
        if len(steps) == 1:
            raise ValueError(
                f"reselect: no selection is due between the first one, after step {first}, and the "
                f"end of the run, at step {last}; lower it (every={self.every}), or leave it out."
            )
        return tuple(steps)

    def target_at(self, step: int) -> str | None:
        """The target of a selection after this step; None: that of the callback.

        Raises:
            TypeError: ``targets`` is a function and returns something else.
        """
        if callable(self.targets):
            key = self.targets(step)
            if key is not None and not isinstance(key, str):
                raise TypeError(
                    f"reselect: targets({step}) must return a key of eval_dataset or None, got "
                    f"{key!r}."
                )
            return key
        return next((key for date, key in reversed(self.targets) if date <= step), None)


def reselection_of(reselect: int | Reselection | None) -> Reselection | None:
    """The re-selection that ``reselect=`` asks for; None: there is none.

    Raises:
        ValueError: it is no number of steps.
    """
    if reselect is None or isinstance(reselect, Reselection):
        return reselect
    return Reselection(every=reselect)


def drift_p_value(before_ND: np.ndarray, after_MD: np.ndarray, *, seed: int) -> float:
    """P-value of the hypothesis that two samples of gradients come from one distribution.

    A permutation test on the maximum mean discrepancy with a Gaussian kernel, whose width is the
    median distance of the pooled samples. Under the hypothesis a p-value of at most p has a
    probability of at most p, whatever the distribution.

    Args:
        before_ND: float [N, D].
        after_MD: float [M, D].
        seed: determines the permutations.

    Source: Gretton et al., "A Kernel Two-Sample Test" (JMLR 2012), equation 5 (biased statistic).
    """
    pooled = np.concatenate([before_ND, after_MD]).astype(np.float64)
    total, num_before = len(pooled), len(before_ND)
    norms = (pooled**2).sum(1)
    squares = np.maximum(norms[:, None] + norms[None] - 2 * pooled @ pooled.T, 0)
    width = np.median(squares[np.triu_indices(total, 1)])
    kernel = np.exp(-squares / max(width, np.finfo(float).tiny))
    signs = np.concatenate(
        [np.full(num_before, 1 / num_before), np.full(len(after_MD), -1 / len(after_MD))]
    )
    words = random_words(NUM_PERMUTATIONS * total, seed, "drift").reshape(-1, total)
    signs_PN = np.vstack([signs, signs[np.argsort(words, axis=1, kind="stable")]])
    found, *chance = np.einsum("pi,pi->p", signs_PN @ kernel, signs_PN)
    # Equal statistics may differ by rounding.
    return float(1 + np.sum(np.array(chance) >= found - 1e-12)) / (NUM_PERMUTATIONS + 1)


def credited(
    scores: Scores, target: str, weights: Mapping[str, float], gain: float, *, memory: float
) -> dict[str, dict[str, float]]:
    """Scores after steps on a mixture: a moving average of what the target has gained.

    Args:
        scores: those before; a score that is missing is 0.
        target: what the mixture was chosen for.
        weights: share of each task in the mixture.
        gain: decrease of the target's loss for each step, nats per label token.
        memory: share of an old score that stays where a task was all of the mixture.
    """
    own = {name: scores.get(target, {}).get(name, 0.0) for name in weights}
    new = {
        name: score + (1 - memory) * weights[name] * (gain - score) for name, score in own.items()
    }
    return {**{name: dict(of_task) for name, of_task in scores.items()}, target: new}


def score_of(weights: Mapping[str, float], scores: Mapping[str, float]) -> float:
    """Score of a mixture: the mean of its tasks' scores."""
    return sum(weight * scores.get(name, 0.0) for name, weight in weights.items())


def averaged(
    new: Mapping[str, float], old: Mapping[str, float], *, memory: float, rows_to_read: int
) -> dict[str, float]:
    """The average of two mixtures of the same tasks; its weights sum to 1.

    Args:
        new: the new choice.
        old: that of an earlier selection.
        memory: share of the old one.
        rows_to_read: number of training rows that the remaining steps read. A task that the new
            choice has dropped stays only where they read a whole row of it. One that it has stays,
            with a weight that the sampler can draw.
    """
    mixed = {name: (1 - memory) * weight + memory * old[name] for name, weight in new.items()}
    least = max(1 / max(rows_to_read, 1), LEAST_WEIGHT)
    kept = {
        name: max(weight, LEAST_WEIGHT) if new[name] > 0 else weight if weight >= least else 0.0
        for name, weight in mixed.items()
    }
    total = sum(kept.values())
    return {name: weight / total for name, weight in kept.items()}


def _dated(targets: Sequence[tuple[int, str]]) -> tuple[tuple[int, str], ...]:
    """Pairs of a step and a target, checked."""
    if isinstance(targets, str) or not isinstance(targets, Sequence):
        raise TypeError(
            "reselect: targets must be pairs of a step and a key of eval_dataset, such as "
            f"[(500, 'news')], or a function of the step; got {targets!r}."
        )
    found: list[tuple[int, str]] = []
    for pair in targets:
        is_pair = isinstance(pair, Sequence) and not isinstance(pair, str) and len(pair) == 2
        if not is_pair or not is_count(pair[0], 0) or not isinstance(pair[1], str):
            raise ValueError(
                "reselect: targets must be pairs of a step and a key of eval_dataset, such as "
                f"(500, 'news'); got {pair!r} among them."
            )
        if found and pair[0] <= found[-1][0]:
            raise ValueError(
                f"reselect: the steps of targets must ascend, got {pair[0]} after {found[-1][0]}."
            )
        found.append((int(pair[0]), pair[1]))
    return tuple(found)
