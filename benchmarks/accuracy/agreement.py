"""Agreement of estimates with truth: every estimator, family and mode, next to the noise ceiling.

The truth is what ``ground_truth.py`` measured (committed in ``results/truth``). The gradients are
captured once per family and mode at the warm-up's checkpoint, and cached, as is what the baselines
find out about the texts; then the table takes seconds. The authors' own procedure is in it if
``gradex_reference.py`` has measured it on all mixtures. Where the truth was measured on a processor
that rounds otherwise, its warm-up ended elsewhere than the one here: the losses are moved by what
those at the two anchors differ by, and the table says so.

A mixture with the task of shuffled answers is easily told from one without, and shuffled answers
from others; what matters is how estimates rank the mixtures that are left.

    python -m benchmarks.accuracy.agreement [--families small] [--modes continue]
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from transformers import TrainerCallback
from transformers.utils import logging as transformers_logging
from trl import SFTTrainer

from benchmarks import RESULTS
from benchmarks.accuracy.ablations import (
    ABLATIONS,
    AHEAD,
    ablated,
    before_restart,
    partly_ahead,
    projected_again,
    replaced,
    signed_token_margins,
    thinned,
)
from benchmarks.accuracy.baselines import (
    Constant,
    MeanCosine,
    MeanDotProduct,
    MeanGradientStep,
    NgramOverlap,
    NumberOfTasks,
    RepresentationSimilarity,
    StepNorm,
)
from benchmarks.accuracy.gradex_reference import GradExAsPublished, measured_scales
from benchmarks.accuracy.ground_truth import (
    CACHE,
    TRUTH,
    anchor_loss,
    digest,
    make_trainer,
    warm_up,
)
from benchmarks.families import FAMILIES, with_fixed_hashes
from hf_auxselect import (
    AbstractEstimator,
    GaussNewton,
    GradExLogistic,
    GradientStore,
    KernelSurrogate,
    LinearizedTraining,
    RidgeSurrogate,
    TaskSelectionCallback,
)
from hf_auxselect.capture.batching import TaskExamples
from hf_auxselect.capture.probes import losses_at
from hf_auxselect.capture.scalars import add_scalar
from hf_auxselect.estimators import Estimate, FittedCalibrated, FittedEstimator
from hf_auxselect.estimators.diagnostics import rank_correlation
from hf_auxselect.files import to_json, write_atomically
from hf_auxselect.trainer.access import trainable_state
from hf_auxselect.trainer.data import ModelRows, collate_function

IN_NATS = (
    LinearizedTraining,
    GaussNewton,
    KernelSurrogate,
    RidgeSurrogate,
    GradExLogistic,
    GradExAsPublished,
    Constant,
)
NUM_BOOTSTRAP = 1000
NUM_ANCHORS = (2, 4, 8, 16)
NUM_ANCHOR_DRAWS = 50
EXAMPLES_PER_TASK = (8, 16, 32, 64)
DIMS = (256, 512, 1024, 2048)
NUM_PROJECTIONS = 8
RANKS = (16, 32, 128, 256)


def estimators(family: str, weights: np.ndarray) -> dict[str, AbstractEstimator]:
    """What is compared on mixtures [M, K] of a family, by the name of its line."""
    return {
        "LinearizedTraining()": LinearizedTraining(),
        "GaussNewton()": GaussNewton(),
        'GaussNewton(curvature="empirical")': GaussNewton(curvature="empirical"),
        "KernelSurrogate()": KernelSurrogate(),
        "RidgeSurrogate()": RidgeSurrogate(),
        "GradExLogistic()": GradExLogistic(),
        **{
            f"GradEx as published, scale {scale}": GradExAsPublished(family=family, scale=scale)
            for scale in measured_scales(family, weights)
        },
        "constant: loss at the anchor": Constant(),
        "mean dot product": MeanDotProduct(),
        "mean dot product, preconditioned": MeanDotProduct(preconditioned=True),
        "mean cosine": MeanCosine(),
        "mean cosine, preconditioned": MeanCosine(preconditioned=True),
        "mean gradient step": MeanGradientStep(),
        "mean gradient step, precond.": MeanGradientStep(preconditioned=True),
        "step norm": StepNorm(),
        "number of tasks": NumberOfTasks(),
        "representations (RDS+)": RepresentationSimilarity(family=family),
        "n-grams, cosine": NgramOverlap(family=family),
        "n-grams, importance (DSIR)": NgramOverlap(family=family, importance=True),
    }


@dataclass(frozen=True, kw_only=True)
class Truth:
    """What was measured of a family and mode."""

    family: str
    mode: str
    weights: np.ndarray
    """Mixtures [M, K] that were trained on."""
    losses: np.ndarray
    """Of every seed [seeds, M]; NaN where it has not been run."""
    moved: float = 0.0
    """What has been added to the losses: the anchor's here, less the one they were measured from.
    Other processors round otherwise, and there a warm-up of the same recipe ends elsewhere."""

    @property
    def mean(self) -> np.ndarray:
        """Over the seeds [M]: what estimates are compared with."""
        return np.nanmean(self.losses, axis=0)

    @property
    def is_without_shuffled(self) -> np.ndarray:
        """Which of the mixtures leave out the task of shuffled answers: booleans [M]."""
        return self.weights[:, FAMILIES[self.family].tasks.index("shuffled")] == 0


@dataclass(frozen=True, kw_only=True)
class _Everything(LinearizedTraining):
    """Captures what any of the estimators needs."""

    scalars: ClassVar[tuple[str, ...]] = (*LinearizedTraining.scalars, "sampled_loss", "margin")


@dataclass(frozen=True, kw_only=True)
class _Tokens(LinearizedTraining):
    """Captures what one of the ablations needs beyond that, and nothing ahead."""

    scalars: ClassVar[tuple[str, ...]] = (*LinearizedTraining.scalars, "token_margins@optimizer")
    probes: bool = False


class _Stop(TrainerCallback):
    """Ends the run after one step: the gradients are captured before it."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop."""
        control.should_training_stop = True


def gradients(family: str, mode: str, dim: int = 4096) -> GradientStore:
    """The gradients at the warm-up's checkpoint, captured when they are first asked for."""
    if mode == "restart":  # from the same anchor: the gradients are the same
        store = gradients(family, "continue", dim)
        return before_restart(store, losses_before_training(family, store))
    return _captured(family, f"{mode}-{dim}", _Everything(), dim, last="second_points")


def losses_before_training(family: str, store: GradientStore) -> np.ndarray:
    """Those of the store's examples of the target [T], at the adapter's initial values."""
    with tempfile.TemporaryDirectory() as directory:
        trainer = make_trainer(family, Path(directory), [])
        with trainer.compute_loss_context_manager():
            return losses_at(
                trainer.model,
                captured_examples(trainer, store.target, 0, trainer.eval_dataset),
                collate_function(trainer),
                trainable_state(trainer.model),
                batch_size=trainer.args.per_device_eval_batch_size,
            ).losses_T


def captured_examples(
    trainer: SFTTrainer, store: GradientStore, k: int, dataset: Any
) -> TaskExamples:
    """Those of its k-th task that a store holds, as rows for the model."""
    return TaskExamples(
        name=store.task_names[k],
        rows=ModelRows(trainer, dataset),
        example_ids=store.example_ids[store.task_ids == k].tolist(),
        num_rows=int(store.task_sizes[k]),
    )


def with_token_margins(family: str, store: GradientStore, *, capture: bool) -> GradientStore | None:
    """The store with the gradients of the tokens' margins; None if they are not to be had.

    They are of the same examples in the same order. It takes as long as the whole pass.
    """
    dim = store.metadata["projection_dim"]
    name = f"tokens-{dim}"
    if not (capture or complete_store(_place(family, name), "momentum")):
        return None
    add_scalar("token_margins", signed_token_margins)
    captured = _captured(family, name, _Tokens(), dim, last="momentum")

    def part(of: GradientStore, tokens: GradientStore, **target: GradientStore) -> GradientStore:
        assert np.array_equal(of.example_ids, tokens.example_ids)
        scalars = {name: of.scalar(name) for name in of.scalars}
        name = "token_margins@optimizer"
        return replaced(of, scalars=scalars | {name: tokens.scalar(name)}, **target)

    return part(store, captured, target=part(store.target, captured.target))


def _captured(
    family: str, name: str, estimator: AbstractEstimator, dim: int, *, last: str
) -> GradientStore:
    """What an estimator asks for, from the cache if it is there with the vector added ``last``."""
    directory, path = CACHE / family / name, _place(family, name)
    store = complete_store(path, last)
    if store is None:
        callback = TaskSelectionCallback(
            warmup=FAMILIES[family].warm_up_steps,
            estimator=estimator,
            examples_per_task=FAMILIES[family].examples_per_task,
            projection_dim=dim,
            seed=0,
        )
        trainer = make_trainer(family, directory, [callback, _Stop()])
        trainer.train(resume_from_checkpoint=str(warm_up(family)))
        store = GradientStore.load(path)
    return store


def _place(family: str, name: str) -> Path:
    """Where gradients are cached."""
    return CACHE / family / name / "_task_selection" / "gradients"


def complete_store(path: Path, vector: str) -> GradientStore | None:
    """The store, if it is whole and has that vector, which is added last."""
    index = path / "index.json"
    if not index.is_file() or not json.loads(index.read_text())["complete"]:
        return None
    store = GradientStore.load(path)
    return store if vector in store.vectors else None


def spearman(one: np.ndarray, other: np.ndarray) -> float:
    """Rank correlation; 0 if one of them is constant, or nothing is compared."""
    return rank_correlation(one, other) if len(one) else 0.0


def read_truth(family: str, mode: str) -> Truth:
    """What ``ground_truth.py`` has written; runs from another warm-up are moved to this one."""
    record = json.loads((TRUTH / f"{family}-{mode}.json").read_text())
    runs, moved = record["runs"], 0.0
    if mode == "continue" and record["warm_up"] != digest(warm_up(family)):
        moved = anchor_loss(family) - record["anchor_loss"]
    losses: dict[tuple[float, ...], dict[int, float]] = {}
    for run in runs:
        losses.setdefault(tuple(run["weights"]), {})[run["seed"]] = run["loss"]
    seeds = sorted({run["seed"] for run in runs})
    table = [[of.get(seed, np.nan) for seed in seeds] for of in losses.values()]
    return Truth(
        family=family,
        mode=mode,
        weights=np.array(list(losses)),
        losses=np.array(table).T + moved,
        moved=moved,
    )


def noise_ceiling(losses: np.ndarray) -> float | None:
    """Expected Spearman of a perfect estimate with the mean over seeds; None with one seed.

    From the mixtures that all seeds have run.

    With r the correlation of two seeds, the mean of n of them has the reliability
    n r / (1 + (n - 1) r) (Spearman-Brown), whose root is its correlation with the expectation.
    """
    count = len(losses)
    losses = losses[:, np.isfinite(losses).all(0)]
    if count < 2 or losses.shape[1] < 3:
        return None
    pairs = [spearman(losses[i], losses[j]) for i in range(count) for j in range(i)]
    r = max(float(np.mean(pairs)), 0.0)
    return float(np.sqrt(count * r / (1 + (count - 1) * r)))


def measures(loss: np.ndarray, true: np.ndarray) -> dict[str, float]:
    """How estimates [M] agree with the truth [M].

    The regret is that of a mixture drawn from those that are estimated as the best.
    """
    chosen = true[loss == loss.min()].mean()
    return {
        "spearman": spearman(loss, true),
        "regret": float((chosen - true.min()) / np.ptp(true)),
    }


def measures_in_nats(loss: np.ndarray, true: np.ndarray) -> dict[str, float]:
    """Further measures of estimates that are losses, not scores."""
    return {
        "r2": float(1 - ((loss - true) ** 2).sum() / ((true - true.mean()) ** 2).sum()),
        "error": float(np.mean(np.abs(loss - true) / true)),
        "offset": float(np.mean(loss - true)),
    }


def compare(
    truth: Truth, store: GradientStore, name: str, estimator: AbstractEstimator
) -> dict[str, Any]:
    """One line of the table: an estimator on a family and mode, with 90% bootstrap intervals."""
    weights, true = truth.weights, truth.mean
    fitted = estimator.fit(store)
    start = time.perf_counter()
    estimate = fitted.estimate(weights)
    seconds = (time.perf_counter() - start) / len(true)
    line: dict[str, Any] = {"family": truth.family, "mode": truth.mode, "estimator": name}
    line |= measures(estimate.loss, true)
    equal = np.isclose((weights > 0).sum(1), 5) & np.isclose(weights.max(1), 0.2, atol=1e-3)
    line["spearman_equal_size"] = spearman(estimate.loss[equal], true[equal])
    rng = np.random.default_rng(0)
    draws = [rng.choice(len(true), len(true)) for _ in range(NUM_BOOTSTRAP)]
    ranks = [spearman(estimate.loss[i], true[i]) for i in draws]
    line["spearman_interval"] = np.quantile(ranks, [0.05, 0.95]).tolist()
    is_left = truth.is_without_shuffled
    of_left = measures(estimate.loss[is_left], true[is_left])
    if isinstance(estimator, IN_NATS):
        line |= measures_in_nats(estimate.loss, true)
        of_left |= measures_in_nats(estimate.loss[is_left], true[is_left])
        if (estimate.low < estimate.high).any():  # it gives intervals
            line["coverage"] = float(is_inside(estimate, true).mean())
            line["width"] = float(np.mean(estimate.high - estimate.low))
            line["difference_coverage"] = coverage_of_differences(fitted, weights, true)
    line |= {f"{measure}_without_shuffled": value for measure, value in of_left.items()}
    diagnostics = fitted.diagnostics()
    # What was measured before says itself how long it took.
    seconds = diagnostics.get("seconds_per_estimate", seconds)
    if "rank_correlation_with_step_norm" in diagnostics:
        line["follows_step_norm"] = diagnostics["rank_correlation_with_step_norm"]
    if "sampling_error_over_spread" in diagnostics:
        line["sampling"] = diagnostics["sampling_error_over_spread"]
    line["ms_per_estimate"] = 1000 * seconds
    return line


def is_inside(estimate: Estimate, true: np.ndarray) -> np.ndarray:
    """Which of the true values [M] lie in their intervals: booleans [M]."""
    return (estimate.low <= true) & (true <= estimate.high)


def coverage_of_differences(
    fitted: FittedEstimator, weights: np.ndarray, true: np.ndarray
) -> float:
    """Share of all pairs of mixtures whose difference lies in its 90% interval."""
    inside = []
    for j in range(1, len(weights)):
        difference = fitted.difference(weights[:j], weights[j])
        inside.append(is_inside(difference, true[:j] - true[j]))
    return float(np.concatenate(inside).mean())


def compare_calibrated(
    truth: Truth, fitted: FittedEstimator, name: str, num_anchors: int
) -> dict[str, Any]:
    """As :func:`compare`, after ``num_anchors`` of the real runs have put the estimates right.

    The mean over random choices of the anchors, each compared on all other mixtures.
    """
    rng, true, lines = np.random.default_rng(0), truth.mean, []
    for _ in range(NUM_ANCHOR_DRAWS):
        anchors = rng.choice(len(true), num_anchors, replace=False)
        others = np.setdiff1d(np.arange(len(true)), anchors)
        calibrated = FittedCalibrated(fitted, truth.weights[anchors], true[anchors])
        estimate = calibrated.estimate(truth.weights[others])
        lines.append(
            measures(estimate.loss, true[others])
            | measures_in_nats(estimate.loss, true[others])
            | {"coverage": float(is_inside(estimate, true[others]).mean())}
        )
    return {
        "family": truth.family,
        "mode": truth.mode,
        "estimator": name,
        "anchors": num_anchors,
        **{key: float(np.mean([line[key] for line in lines])) for key in lines[0]},
    }


def compare_projections(truth: Truth, store: GradientStore, dim: int) -> dict[str, Any]:
    """As :func:`compare`, with gradients of ``dim`` numbers: mean and spread over projections.

    And what the mean of their estimates comes to.
    """
    losses, lines = [], []
    for seed in range(NUM_PROJECTIONS):
        fitted = LinearizedTraining().fit(projected_again(store, dim, seed))
        losses.append(fitted.estimate(truth.weights).loss)
        lines.append(measures(losses[-1], truth.mean) | measures_in_nats(losses[-1], truth.mean))
    return {
        "dim": dim,
        **{key: float(np.mean([line[key] for line in lines])) for key in lines[0]},
        "spearman_range": [f(line["spearman"] for line in lines) for f in (min, max)],
        "spearman_of_the_mean": spearman(np.mean(losses, axis=0), truth.mean),
    }


def describe(truth: Truth) -> dict[str, Any]:
    """The truth in numbers."""
    losses = truth.losses
    is_left, mean = truth.is_without_shuffled, truth.mean
    return {
        "family": truth.family,
        "mode": truth.mode,
        "mixtures": len(truth.weights),
        "mixtures_without_shuffled": int(is_left.sum()),
        "seeds": len(losses),
        "moved": truth.moved,
        "range": [float(mean.min()), float(mean.max())],
        "spread": float(mean.std()),
        "noise_ceiling": noise_ceiling(losses),
        "noise_ceiling_without_shuffled": noise_ceiling(losses[:, is_left]),
        "error_of_a_constant": float(np.mean(np.abs(mean / mean.mean() - 1))),
        **ceilings_in_nats(losses),
    }


def ceilings_in_nats(losses: np.ndarray) -> dict[str, float | None]:
    """Expected R^2 and relative error of a perfect estimate, against the mean over seeds.

    With one seed they are not known (None). Seeds differ by sqrt(2) times the deviation of one, the
    mean of n of them from the expectation by 1/sqrt(n) times it.
    """
    count = len(losses)
    losses = losses[:, np.isfinite(losses).all(0)]
    if count < 2 or losses.shape[1] < 3:
        return {"r2_ceiling": None, "error_floor": None}
    pairs = [(i, j) for i in range(count) for j in range(i)]
    squares = np.mean([np.mean((losses[i] - losses[j]) ** 2) for i, j in pairs])
    gaps = np.mean([np.mean(np.abs(losses[i] - losses[j]) / losses.mean(0)) for i, j in pairs])
    return {
        "r2_ceiling": float(1 - squares / (2 * count) / losses.mean(0).var()),
        "error_floor": float(gaps / np.sqrt(2 * count)),
    }


def print_table(header: dict[str, Any]) -> None:
    """What was measured of one family and mode: the estimators, line by line, and the rest."""
    ceiling, of_left = (
        "unknown" if value is None else f"{value:.3f}"
        for value in (header["noise_ceiling"], header["noise_ceiling_without_shuffled"])
    )
    low, high = header["range"]
    print(
        f"\n{header['family']}, {header['mode']}: {header['mixtures']} mixtures "
        f"({header['mixtures_without_shuffled']} without shuffled), {header['seeds']} seed(s), "
        f"losses {low:.3f} to {high:.3f};\nnoise ceiling {ceiling}, without shuffled {of_left}; "
        f"the mean of the truth errs by {header['error_of_a_constant']:.1%}"
    )
    if header["moved"]:
        print(f"measured from another warm-up, and moved by {header['moved']:+.4f}")
    if header["error_floor"] is not None:
        print(
            f"a perfect estimate would have R2 {header['r2_ceiling']:.2f} and err by "
            f"{header['error_floor']:.1%}: seeds differ"
        )
    print(
        f"{'':34} spearman  [90%]            w/o shuffled  same size     R2   error  regret"
        "  coverage (of differences)  ms/estimate  sampling error"
    )
    further = [name for name in ("ablations", "ranks", "fewer_examples") if name in header]
    for line in header["lines"] + [line for name in further for line in header[name]]:
        interval = "[{:.3f}, {:.3f}]".format(*line["spearman_interval"])
        nats = f"{line['r2']:6.2f}  {line['error']:6.2%}" if "r2" in line else " " * 14
        coverage = f"{line['coverage']:8.0%}" if "coverage" in line else " " * 8
        if "difference_coverage" in line:
            coverage += f" ({line['difference_coverage']:.0%})"
        print(
            f"{line['estimator']:34} {line['spearman']:8.3f}  {interval:16} "
            f"{line['spearman_without_shuffled']:13.3f}  {line['spearman_equal_size']:9.3f}  "
            f"{nats}  {line['regret']:6.1%}  {coverage:14}  {line['ms_per_estimate']:22.2f}"
            + (f"{line['sampling']:16.2f}" if line.get("sampling") else "")
        )
    for line in header.get("dims", []):
        low, high = line["spearman_range"]
        print(
            f"{line['dim']:4} numbers per gradient, {NUM_PROJECTIONS} projections: Spearman "
            f"{line['spearman']:.3f} ({low:.3f} to {high:.3f}), of their mean "
            f"{line['spearman_of_the_mean']:.3f}, R2 {line['r2']:.2f}, error {line['error']:.2%}, "
            f"regret {line['regret']:.1%}"
        )
    for line in header["calibrated"]:
        print(
            f"{line['estimator']} with {line['anchors']:2} anchors: Spearman "
            f"{line['spearman']:.3f}, R2 {line['r2']:.2f}, error {line['error']:.2%}, regret "
            f"{line['regret']:.1%}, coverage {line['coverage']:.0%}"
        )


def what_matters(
    truth: Truth, store: GradientStore, *, capture_tokens: bool
) -> dict[str, list[dict[str, Any]]]:
    """Lines of the default with something taken away, or less or more of it."""
    ablations = ABLATIONS
    with_tokens = with_token_margins(truth.family, store, capture=capture_tokens)
    if with_tokens is None:
        ablations = {n: a for n, a in ABLATIONS.items() if a.curvature != "token_margins"}
    at_one_point = LinearizedTraining(probes=False)
    lines = [
        compare(truth, ablated(with_tokens or store, ablation), name, at_one_point)
        for name, ablation in ablations.items()
    ]
    lines += [
        compare(truth, partly_ahead(store, left_out), name, LinearizedTraining())
        for name, left_out in AHEAD.items()
    ]
    return {
        "ablations": lines,
        "ranks": [
            compare(truth, store, f"rank {rank}", LinearizedTraining(rank=rank)) for rank in RANKS
        ],
        "fewer_examples": [
            compare(truth, thinned(store, n), f"{n} examples a task", at_one_point)
            for n in EXAMPLES_PER_TASK
        ],
        "dims": [compare_projections(truth, store, dim) for dim in DIMS],
    }


def main() -> None:
    """Print the table and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--families", default="small", metavar="a,b")
    parser.add_argument("--modes", default="continue", metavar="continue,restart")
    parser.add_argument(
        "--token-margins", action="store_true", help="capture them for one more of the lines"
    )
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    for family in options.families.split(","):
        for mode in options.modes.split(","):
            truth, store = read_truth(family, mode), gradients(family, mode)
            lines = [
                compare(truth, store, name, estimator)
                for name, estimator in estimators(family, truth.weights).items()
            ]
            fitted = LinearizedTraining().fit(store)
            calibrated = [
                compare_calibrated(truth, fitted, "LinearizedTraining()", num_anchors)
                for num_anchors in NUM_ANCHORS
            ]
            header = describe(truth)
            record = header | {"command": "python -m benchmarks.accuracy.agreement", "lines": lines}
            record |= {"calibrated": calibrated, "diagnostics": fitted.diagnostics()}
            if mode == "continue":
                record |= what_matters(truth, store, capture_tokens=options.token_margins)
            print_table(record)
            path = RESULTS / "agreement" / f"{family}-{mode}.json"
            write_atomically(path, to_json(record))


if __name__ == "__main__":
    with_fixed_hashes()
    main()
