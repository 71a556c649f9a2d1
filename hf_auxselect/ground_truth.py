"""Ground-truth runs of one switch: each mixture is trained once, whatever option asks for it.

``calibrate``, ``confirm`` and ``verify`` share what was measured. It is written to a file after
every run, so that a run that was stopped need not train on a finished mixture again.

Shapes: K tasks.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypedDict

import numpy as np
from tqdm.auto import tqdm

from hf_auxselect.distributed import MainProcessValue, on_main_process
from hf_auxselect.estimators import FittedEstimator
from hf_auxselect.files import read_json, to_json, write_atomically
from hf_auxselect.fingerprint import digest
from hf_auxselect.plan import Plan
from hf_auxselect.report import Measurement
from hf_auxselect.trainer.data import ModelRows
from hf_auxselect.trainer.trial_runs import RestOfRun, TrialRun

logger = logging.getLogger(__name__)

_SAME_SHARE = 1e-9
"""Shares of mixtures that differ by less are the same: rounding. A convention."""


_CHUNK = 1000
"""Rows that are read at once for a hash; a convention."""


class _RunRecord(TypedDict):
    weights: dict[str, float]
    losses: dict[str, float | None]
    """Optimizer step -> the target's loss, nats per label token; None: not finite."""
    seconds: float


class _RunsRecord(TypedDict):
    """The content of the file."""

    training: str
    """Hash of the state that the runs start from, of the training arguments, and of the data."""
    runs: list[_RunRecord]


@dataclass
class _Run:
    """What is known of training on one mixture."""

    shares: np.ndarray
    losses: dict[int, float] = field(default_factory=dict)
    seconds: float = 0.0
    paused: TrialRun | None = None


class GroundTruthRuns:
    """Trains on mixtures from the switch on, and keeps what it measures.

    Every process must make it, and call its methods.

    Args:
        rest: the remaining steps of the run, before anything has moved its random states.
        path: of the file. What it holds counts if it was measured from the same state, bit for bit,
            and on the same data; an earlier run may have written it.
        stops: optimizer steps at which every run that goes beyond them is evaluated, too.
        data: from :func:`digest_of_data`.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(
        self, rest: RestOfRun, path: Path, stops: Sequence[int] = (), *, data: str
    ) -> None:
        self.rest = rest
        self._path = path
        self._stops = tuple(stops)
        self._training = f"{rest.digest()}-{data}"
        self._runs: list[_Run] = on_main_process(self._read)

    def bar(self, title: str, total: int) -> tqdm:
        """A progress bar for a number of training steps."""
        trainer = self.rest.trainer
        hidden = trainer.args.disable_tqdm or not trainer.is_world_process_zero()
        return tqdm(total=total, desc=title, unit="step", disable=hidden)

    def knows(self, shares: np.ndarray, step: int) -> bool:
        """Whether a mixture's loss at a step is known, so that :meth:`loss` trains nothing."""
        return step in self._of(shares).losses

    def loss(
        self, shares: np.ndarray, step: int, progress: tqdm | None = None, *, pause: bool = False
    ) -> float:
        """The target's loss after training on a mixture up to a step of the run.

        Args:
            shares: float [K], summing to 1.
            step: optimizer step of the whole run.
            progress: is told of every step that is trained.
            pause: whether to keep the state, to go on from it later.

        Returns:
            Nats per label token; may be infinite or NaN.
        """
        run = self._of(shares)
        if step not in run.losses:
            trial = run.paused or TrialRun(self.rest, shares)
            stops = [stop for stop in self._stops if trial.step < stop < step]
            for stop in [*stops, step]:
                start = time.perf_counter()
                run.losses[stop] = trial.train_to(stop, progress)
                run.seconds += time.perf_counter() - start
                on_main_process(self._write)
            run.paused = trial
        if not pause:
            run.paused = None
        return run.losses[step]

    def seconds(self, shares: np.ndarray) -> float:
        """How long training on a mixture has taken, over all steps."""
        return round(self._of(shares).seconds, 3)

    def forget_state(self, shares: np.ndarray) -> None:
        """Let go of the state that was kept of a mixture; its losses stay known."""
        self._of(shares).paused = None

    def _of(self, shares: np.ndarray) -> _Run:
        for run in self._runs:
            if np.abs(run.shares - shares).max() <= _SAME_SHARE:
                return run
        self._runs.append(_Run(np.asarray(shares, float)))
        return self._runs[-1]

    def _read(self) -> list[_Run]:
        try:
            record = read_json(self._path, _RunsRecord)
            if record["training"] != self._training:
                return []
            return [
                _Run(
                    shares=np.array([run["weights"][name] for name in self.rest.tasks.names]),
                    losses={
                        int(step): math.nan if loss is None else loss
                        for step, loss in run["losses"].items()
                    },
                    seconds=run["seconds"],
                )
                for run in record["runs"]
            ]
        except FileNotFoundError:
            return []
        except (ValueError, KeyError) as error:
            logger.warning("what ground-truth runs have measured is measured again: %s", error)
            return []

    def _write(self) -> None:
        runs = [
            _RunRecord(
                weights=dict(zip(self.rest.tasks.names, run.shares.tolist(), strict=True)),
                losses={
                    str(step): loss if math.isfinite(loss) else None
                    for step, loss in run.losses.items()
                },
                seconds=round(run.seconds, 3),
            )
            for run in self._runs
            if run.losses
        ]
        write_atomically(self._path, to_json(_RunsRecord(training=self._training, runs=runs)))


def digest_of_data(plan: Plan) -> str:
    """A hash of the rows that ground-truth runs train on and are evaluated on.

    The state at the switch tells only of the rows that the warm-up has read. Of rows that are not
    in a table, those that the plan's fingerprint has looked at stand for all. Every process must
    call this.

    Args:
        plan: of the run, with the target of the selection.
    """

    def read() -> str:
        hashes = [digest(plan.fingerprint, plan.target_key, plan.tasks.names, plan.tasks.ids)]
        for rows in (plan.examples[0].rows, plan.target.rows):
            assert isinstance(rows, ModelRows)
            columns = sorted(rows.columns) if rows.is_table else []
            if columns:
                for first in range(0, len(rows), _CHUNK):
                    ids = range(first, min(first + _CHUNK, len(rows)))
                    hashes.append(digest(*rows.stored(ids, columns)))
        return digest(*hashes).hex()

    return on_main_process(read)


class Measured(NamedTuple):
    """What ground-truth runs have measured."""

    runs: list[Measurement]
    """Those whose loss is finite."""
    warnings: list[str]
    """For the report: that training diverged on other mixtures; empty if on none."""


def measure(
    runs: GroundTruthRuns,
    mixtures: Mapping[str, np.ndarray],
    fitted: MainProcessValue[FittedEstimator],
    purpose: str,
) -> Measured:
    """Train on each mixture to the end of the run, and compare the loss with the estimate.

    A run that diverges is left out: its loss is not finite, and no estimate can be compared with
    it. Every process must call this.

    Args:
        runs: trains.
        mixtures: shares [K] by the name of the mixture.
        fitted: the estimator to compare with.
        purpose: title of the progress bar; begins the warning.
    """
    rest = runs.rest
    unknown = [shares for shares in mixtures.values() if not runs.knows(shares, rest.last_step)]
    with runs.bar(purpose, len(unknown) * (rest.last_step - rest.first_step)) as progress:
        measured = {
            name: runs.loss(shares, rest.last_step, progress) for name, shares in mixtures.items()
        }
    finite = {name: loss for name, loss in measured.items() if math.isfinite(loss)}
    diverged = [name for name in measured if name not in finite]
    warnings = []
    if diverged:
        warnings.append(
            f"{purpose}: {len(diverged)} of {len(measured)} ground-truth runs are left out, since "
            f"training diverges (the loss is not finite) on: {'; '.join(diverged)}. Lower the "
            "learning rate."
        )

    def compare(fitted: FittedEstimator) -> list[Measurement]:
        for warning in warnings:
            logger.warning(warning)
        if not finite:
            return []
        estimate = fitted.estimate(np.array([mixtures[name] for name in finite]))
        return [
            Measurement(
                name=name,
                weights=dict(zip(rest.tasks.names, mixtures[name].tolist(), strict=True)),
                estimated=float(estimate.loss[i]),
                low=float(estimate.low[i]),
                high=float(estimate.high[i]),
                measured=loss,
                seconds=runs.seconds(mixtures[name]),
            )
            for i, (name, loss) in enumerate(finite.items())
        ]

    return Measured(fitted.ask(compare), warnings)
