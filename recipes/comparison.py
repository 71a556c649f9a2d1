"""Check a choice by training on other mixtures, for the same steps and from the same checkpoint.

Recipes print a table of what was measured. A script that you copy does not need this module:
``verify=n`` of the callback also trains on a few mixtures, and shows their losses in the report.

Shapes: K tasks.
"""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from transformers import Trainer, TrainingArguments

from hf_auxselect import FixedSelection, SelectionReport, TaskSelectionCallback
from hf_auxselect.files import to_json, write_atomically

CHOSEN, ALL = "chosen by hf-auxselect", "all tasks"

Mixture = Mapping[str, float] | list[str]
"""Task -> share of the rows, or the tasks whose rows are pooled."""


@dataclass
class ComparisonArguments:
    """Flags of a script that can check its choice by training."""

    compare_seeds: int = field(
        default=0,
        metadata={"help": "Number of seeds to check the choice with by training; 0: only train."},
    )
    results: Path | None = field(
        default=None, metadata={"help": "JSON file to which the measurements are added."}
    )

    def check(self, args: TrainingArguments, switch_step: float) -> None:
        """Refuse a comparison that cannot be made.

        Raises:
            ValueError: it names the flag.
        """
        if self.results and not self.compare_seeds:
            raise ValueError(
                f"--results {self.results} keeps what --compare_seeds measures; add it, or leave "
                "--results out."
            )
        if not self.compare_seeds:
            return
        if args.world_size > 1:
            raise ValueError(
                f"--compare_seeds {self.compare_seeds} trains one run after another in one "
                f"process; got {args.world_size} processes. Launch one, or leave it out."
            )
        if switch_step < 1:
            raise ValueError(
                "--compare_seeds: --warmup must be a number of steps, at which a checkpoint is "
                f"saved; got the share {switch_step}."
            )
        if 0 < args.max_steps <= switch_step:
            raise ValueError(
                f"--compare_seeds needs --max_steps above --warmup {switch_step:g}, got "
                f"{args.max_steps}."
            )


@dataclass(frozen=True, kw_only=True)
class Run:
    """What training on one mixture has reached."""

    seed: int
    name: str
    weights: dict[str, float]
    """Task -> share of the rows after the switch."""
    measured: dict[str, float]
    """``loss``, nats per label token, and metrics of the target."""
    estimated: float | None
    """The loss that was estimated at the switch; None: without estimates."""
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Trains with the callback, then on other mixtures from the checkpoint at the switch.

    What was measured is kept in ``output_dir``: a comparison that was stopped goes on where it was,
    if its settings are the same.

    Attributes:
        make: the trainer for a callback, an output directory and a seed. It must save a checkpoint
            at the switch, and keep it.
        callback: the callback for a seed.
        measure: ``loss`` and metrics of the target, after training.
        rivals: name -> mixture to compare with, from the report on the choice and a seed.
        output_dir: for all runs.
        settings: JSON values that tell these runs from others.
    """

    make: Callable[[TaskSelectionCallback, Path, int], Trainer]
    callback: Callable[[int], TaskSelectionCallback]
    measure: Callable[[Trainer], dict[str, float]]
    rivals: Mapping[str, Callable[[SelectionReport, int], Mixture]]
    output_dir: Path
    settings: Mapping[str, object]

    def run(self, seed: int) -> list[Run]:
        """Train with a seed on whatever is not measured yet; the chosen mixture comes first."""
        runs, directory = self._read(seed), self.directory("chosen", seed)
        if not runs:
            shutil.rmtree(directory, ignore_errors=True)  # of a comparison that was stopped
            runs.append(self._train_chosen(directory, seed))
            self._write(seed, runs)
        report = SelectionReport.load(directory / "_task_selection")
        for name, mixture_of in self.rivals.items():
            if name not in {run.name for run in runs}:
                runs.append(self._train_rival(name, mixture_of(report, seed), report, seed))
                self._write(seed, runs)
        return runs

    def run_all(self, arguments: ComparisonArguments, name: str) -> list[Run]:
        """:meth:`run` with all seeds; the file of results has each as soon as it is measured."""
        runs: list[Run] = []
        for seed in range(arguments.compare_seeds):
            runs += self.run(seed)
            if arguments.results:
                add_results(arguments.results, name, self.settings, runs)
        return runs

    def directory(self, name: str, seed: int) -> Path:
        """Output directory of a run."""
        return self.output_dir / f"{name.replace(' ', '-')}-{seed}"

    def _path(self, seed: int) -> Path:
        return self.output_dir / f"measured-{seed}.json"

    def _read(self, seed: int) -> list[Run]:
        if not self._path(seed).is_file():
            return []
        record = json.loads(self._path(seed).read_text())
        is_same = record["settings"] == json.loads(json.dumps(self.settings))
        return [Run(**run) for run in record["runs"]] if is_same else []

    def _write(self, seed: int, runs: list[Run]) -> None:
        record = {"settings": self.settings, "runs": [asdict(run) for run in runs]}
        write_atomically(self._path(seed), to_json(record))

    def _train_chosen(self, directory: Path, seed: int) -> Run:
        callback, start = self.callback(seed), time.perf_counter()
        print(f"\nSeed {seed}: warm-up on all tasks, selection, training on the chosen mixture\n")
        trainer = self.make(callback, directory, seed)
        print(callback.preview(trainer))
        trainer.train()
        report = callback.report
        assert report is not None, "training has passed the switch"
        return self._measured(CHOSEN, report.weights, report, trainer, seed, start)

    def _train_rival(self, name: str, mixture: Mixture, report: SelectionReport, seed: int) -> Run:
        start, step = time.perf_counter(), report.run["switch_step"]
        print(f"\nSeed {seed}, for comparison, from the same checkpoint: {name}\n")
        fixed = TaskSelectionCallback(
            warmup=step, selector=FixedSelection(mixture, estimate=False), seed=seed
        )
        trainer = self.make(fixed, self.directory(name, seed), seed)
        checkpoint = self.directory("chosen", seed) / f"checkpoint-{step}"
        trainer.train(resume_from_checkpoint=str(checkpoint))
        assert fixed.report is not None, "training has passed the switch"
        return self._measured(name, fixed.report.weights, report, trainer, seed, start)

    def _measured(
        self,
        name: str,
        weights: dict[str, float],
        report: SelectionReport,
        trainer: Trainer,
        seed: int,
        start: float,
    ) -> Run:
        measured = {key: float(value) for key, value in self.measure(trainer).items()}
        estimated = float(report.estimate(weights).loss[0]) if report.rows else None
        return Run(
            seed=seed,
            name=name,
            weights=weights,
            measured=measured,
            estimated=estimated,
            seconds=round(time.perf_counter() - start, 1),
        )


def all_tasks(report: SelectionReport, seed: int) -> Mixture:
    """All tasks, their rows pooled."""
    return list(report.weights)


def random_order(report: SelectionReport, seed: int) -> Mixture:
    """The chosen weights in a random order: how good is a mixture of this shape by chance?"""
    tasks, weights = list(report.weights), list(report.weights.values())
    random.Random(seed).shuffle(weights)
    return {task: weight for task, weight in zip(tasks, weights, strict=True) if weight > 0}


def most_similar(report: SelectionReport, seed: int, *, number: int = 2) -> Mixture:
    """The tasks whose gradients are most similar to the target's, as LESS ranks them.

    The mean over a task's examples of the cosine with the target's mean gradient, both in the
    optimizer's coordinates.

    Source: Xia et al., "LESS: Selecting Influential Data for Targeted Instruction Tuning" (2024).
    """
    store = report.gradients()

    def unit(gradients: np.ndarray) -> np.ndarray:
        return gradients / np.maximum(np.linalg.norm(gradients, axis=-1, keepdims=True), 1e-30)

    cosines_N = unit(store.gradients) @ unit(store.target.gradients.mean(axis=0))
    scores_K = [cosines_N[store.task_ids == k].mean() for k in range(len(store.task_names))]
    best = np.argsort(scores_K)[::-1][:number]
    return [store.task_names[k] for k in sorted(best)]


def table(runs: list[Run]) -> list[str]:
    """Lines of a table: mean and standard error over seeds of what was measured, per mixture.

    Gains are over training on all tasks with the same seed.
    """
    names = list(dict.fromkeys(run.name for run in runs))
    columns = list(runs[0].measured)
    seeds = sorted({run.seed for run in runs})
    known = {(run.name, run.seed): run for run in runs}
    width = max(map(len, names))
    lines = [f"  {'':<{width}}" + "".join(f"  {column:>18}" for column in [*columns, "gain"])]
    for name in names:
        cells = []
        for column in columns:
            values = [known[name, seed].measured[column] for seed in seeds if (name, seed) in known]
            cells.append(_mean(values, percent=column != "loss"))
        gains = [
            known[ALL, seed].measured["loss"] - known[name, seed].measured["loss"]
            for seed in seeds
            if (ALL, seed) in known and (name, seed) in known
        ]
        cells.append("" if name == ALL or not gains else _mean(gains, sign="+"))
        lines.append((f"  {name:<{width}}" + "".join(f"  {cell:>18}" for cell in cells)).rstrip())
    return lines


def _mean(values: list[float], *, percent: bool = False, sign: str = "") -> str:
    """A mean and its standard error; of one value the value."""
    scale, digits = (100, 1) if percent else (1, 4)
    values = [scale * value for value in values]
    text = f"{np.mean(values):{sign}.{digits}f}"
    if len(values) > 1:
        text += f" ± {np.std(values, ddof=1) / len(values) ** 0.5:.{digits}f}"
    return text + ("%" if percent else "")


def rank_agreement(runs: list[Run]) -> dict[str, float]:
    """Spearman correlation of the estimated losses with what was measured, mean over seeds.

    1 for a loss that is ranked as estimated; for metrics, of which more is better, the sign is
    turned. NaN where all mixtures have the same value.
    """
    result: dict[str, float] = {}
    for column in runs[0].measured:
        sign, found = (1 if column == "loss" else -1), []
        for seed in sorted({run.seed for run in runs}):
            of_seed = [run for run in runs if run.seed == seed and run.estimated is not None]
            if len(of_seed) > 2:
                measured = _ranks([sign * run.measured[column] for run in of_seed])
                estimated = _ranks([run.estimated or 0.0 for run in of_seed])
                is_constant = np.ptp(measured) == 0 or np.ptp(estimated) == 0
                found.append(np.nan if is_constant else np.corrcoef(measured, estimated)[0, 1])
        if found:
            result[column] = float(np.mean(found))
    return result


def _ranks(values: list[float]) -> np.ndarray:
    """Ranks, those of equal values averaged."""
    ordered = np.array(values)
    below = (ordered[:, None] > ordered).sum(axis=1)
    return below + ((ordered[:, None] == ordered).sum(axis=1) - 1) / 2


def verdict(runs: list[Run]) -> str:
    """Say plainly whether the choice won."""
    losses = {
        name: float(np.mean([run.measured["loss"] for run in runs if run.name == name]))
        for name in dict.fromkeys(run.name for run in runs)
    }
    better = [name for name, loss in losses.items() if loss < losses[CHOSEN]]
    if better:
        return f"The choice did NOT win: {' and '.join(better)} had a lower loss."
    gain = losses[ALL] - losses[CHOSEN]
    return f"The choice won; it is {gain:.4f} nats below training on all tasks."


def summary(runs: list[Run]) -> list[str]:
    """Lines: the table, the chosen mixtures, who won, and how well estimates ranked the runs."""
    lines = [*table(runs), ""]
    lines += [f"Seed {run.seed} chose {shares(run.weights)}." for run in runs if run.name == CHOSEN]
    lines += ["", verdict(runs)]
    lines += [
        f"Rank correlation of the estimated loss with the measured {name}: {value:.2f}"
        for name, value in rank_agreement(runs).items()
    ]
    return lines


def add_results(path: Path, name: str, settings: Mapping[str, object], runs: list[Run]) -> None:
    """Put a comparison into a file of results, in place of an earlier one of the same name."""
    known = json.loads(path.read_text()) if path.is_file() else {}
    known[name] = {"settings": settings, "runs": [asdict(run) for run in runs]}
    write_atomically(path, to_json(known))


def shares(weights: Mapping[str, float]) -> str:
    """A mixture, the largest share first, in percent."""
    ordered = sorted(weights.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {weight:.0%}" for name, weight in ordered if weight > 0)
