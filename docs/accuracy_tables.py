"""Tables of how estimates agree with ground-truth runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from statistics import fmean
from typing import Any

from choosing_tables import ALL_TASKS, CHOSEN, lines_of_strategies, regret, times_worse
from results import bullets, markdown, number, percent, read, table

FAMILIES = ("arithmetic", "logic", "text", "small", "spelling", "demo", "sparse", "sorting")
HELD_OUT = ("sentiment",)
RESTARTED = ("arithmetic", "logic", "text", "small")
VARIANTS = {
    "small": "small: 60 steps of warm-up, r = 8",
    "small-rank2": "small, r = 2",
    "small-rank32": "small, r = 32",
    "small-warmup20": "small, 20 steps of warm-up",
    "small-warmup3": "small, 3 steps of warm-up",
    "small-rates": "small, learning rates 30 times as high",
}
DEFAULT = "LinearizedTraining()"


def agreement(family: str, mode: str = "continue") -> dict[str, Any]:
    """What ``benchmarks.accuracy.agreement`` measured of a family."""
    record: dict[str, Any] = read(f"agreement/{family}-{mode}")
    return record


def find(record: dict[str, Any], name: str, part: str = "lines") -> dict[str, Any] | None:
    """One estimator's line of a record; None if it was not measured."""
    return next((line for line in record[part] if line["estimator"] == name), None)


def default_line(record: dict[str, Any], name: str = DEFAULT) -> dict[str, Any]:
    """The line of the default, or of another estimator that was measured in every family."""
    found = find(record, name)
    assert found is not None, name
    return found


def calibrated(record: dict[str, Any], runs: int) -> dict[str, Any]:
    """The default's line after so many calibration runs."""
    return next(line for line in record["calibrated"] if line["calibration_runs"] == runs)


def per_family(
    rows: dict[str, Callable[[dict[str, Any]], str]],
    families: Sequence[str] = FAMILIES,
    mode: str = "continue",
) -> str:
    """A table with one column per family; each row is a function of the family's record."""
    records = [agreement(family, mode) for family in families]
    return markdown(
        ["", *families], [[name, *(cell(r) for r in records)] for name, cell in rows.items()]
    )


def of(
    name: str, key: str = "spearman", part: str = "lines", form: Callable[[float], str] = number
) -> Callable[[dict[str, Any]], str]:
    """A row of ``per_family``: one number of one estimator."""

    def cell(record: dict[str, Any]) -> str:
        found = find(record, name, part)
        return form(found[key]) if found else "not measured"

    return cell


def triple(name: str, part: str = "lines") -> Callable[[dict[str, Any]], str]:
    """Spearman, mean relative error, and regret."""

    def cell(record: dict[str, Any]) -> str:
        found = find(record, name, part)
        if found is None:
            return "not measured"
        return f"{number(found['spearman'])}, {found['error']:.1%}, {percent(found['regret'])}"

    return cell


def as_published(record: dict[str, Any]) -> str:
    """Spearman of the authors' procedure, for every step length that was run."""
    found = [of["spearman"] for of in record["lines"] if "as published" in of["estimator"]]
    return ", ".join(map(number, found)) or "not measured"


def spread(record: dict[str, Any]) -> str:
    """The range of the ground-truth losses."""
    low, high = record["range"]
    return f"{low:.2f} to {high:.2f}"


BASELINES = {
    "dot product of mean gradients, preconditioned": "mean dot product, preconditioned",
    "one step along the mean gradient, preconditioned": "mean gradient step, precond.",
    "mean cosine, preconditioned (as LESS)": "mean cosine, preconditioned",
    "similarity of representations (RDS+)": "representations (RDS+)",
    "n-grams, cosine": "n-grams, cosine",
    "n-grams, importance (DSIR)": "n-grams, importance (DSIR)",
    "number of tasks": "number of tasks",
    "`GradExLogistic()`, the paper's, corrected": "GradExLogistic()",
}


def default_with_interval(record: dict[str, Any]) -> str:
    """Rank correlation of the default."""
    found = default_line(record)
    low, high = found["spearman_interval"]
    return f"**{number(found['spearman'])}** [{number(low)}, {number(high)}]"


@table
def ranking() -> str:
    """Rank correlation of the default, of baselines, and of a perfect estimate."""
    return per_family(
        {
            "ground-truth losses, nats per label token": spread,
            "**the default** [90%]": default_with_interval,
            "*perfect estimate (noise ceiling)*": lambda r: f"*{number(r['noise_ceiling'])}*",
            **{label: of(name) for label, name in BASELINES.items()},
            "GradEx as its authors published it, two step lengths": as_published,
            "`GaussNewton()`": of("GaussNewton()"),
            '`GaussNewton(curvature="empirical")`': of('GaussNewton(curvature="empirical")'),
            "`RidgeSurrogate()`": of("RidgeSurrogate()"),
            "`KernelSurrogate()`": of("KernelSurrogate()"),
            "the default, without the task of shuffled answers": of(
                DEFAULT, "spearman_without_shuffled"
            ),
            "*perfect estimate, without it*": lambda r: (
                f"*{number(r['noise_ceiling_without_shuffled'])}*"
            ),
        }
    )


@table
def errors() -> str:
    """Size of the errors, of calibrated estimates, and of the choice."""

    def tenth(value: float) -> str:
        return f"{value:.1%}"

    return per_family(
        {
            "centred R²": of(DEFAULT, "r2"),
            "*perfect estimate*": lambda r: f"*{number(r['r2_ceiling'])}*",
            "mean relative error": of(DEFAULT, "error", form=tenth),
            "*perfect estimate*, error": lambda r: f"*{r['error_floor']:.1%}*",
            "error of a constant, the mean of the ground truth": lambda r: (
                f"{r['error_of_a_constant']:.1%}"
            ),
            "R² and error after `calibrate=8`": lambda r: (
                f"{number(calibrated(r, 8)['r2'])}, {calibrated(r, 8)['error']:.1%}"
            ),
            "regret of the best-estimated, of the range": of(DEFAULT, "regret", form=percent),
        }
    )


@table
def held_out() -> str:
    """Families of real text on which no constant was decided."""
    rows = {
        "ground-truth losses, nats per label token": spread,
        "**Spearman of the default** [90%]": default_with_interval,
        "the default, without the task of shuffled answers": of(
            DEFAULT, "spearman_without_shuffled"
        ),
        "*perfect estimate (noise ceiling)*": lambda r: f"*{number(r['noise_ceiling'])}*",
        "*perfect estimate, without it*": lambda r: (
            f"*{number(r['noise_ceiling_without_shuffled'])}*"
        ),
        **{label: of(name) for label, name in BASELINES.items()},
        "regret of the best-estimated, of the range": of(DEFAULT, "regret", form=percent),
        "centred R² of the default": of(DEFAULT, "r2"),
        "mean relative error of the default": lambda r: f"{default_line(r)['error']:.1%}",
        "error of a constant, the mean of the ground truth": lambda r: (
            f"{r['error_of_a_constant']:.1%}"
        ),
        "90% intervals that hold the ground truth": of(DEFAULT, "coverage", form=percent),
    }
    return per_family(rows, HELD_OUT)


@table
def intervals() -> str:
    """Coverage of the 90% intervals."""
    return per_family(
        {
            "losses": of(DEFAULT, "coverage", form=percent),
            "differences, all pairs": of(DEFAULT, "difference_coverage", form=percent),
        }
    )


def losses_in_intervals() -> list[tuple[int, int]]:
    """Of runs that continue and that restart: losses that lie in their intervals, and all."""
    counts = []
    for mode, families in (("continue", FAMILIES), ("restart", RESTARTED)):
        records = [agreement(family, mode) for family in families]
        inside = sum(round(default_line(r)["coverage"] * r["mixtures"]) for r in records)
        counts.append((inside, sum(r["mixtures"] for r in records)))
    return counts


@table
def covered() -> str:
    """How many losses lie in their intervals."""
    (one, of_one), (two, of_two) = losses_in_intervals()
    inside, total = one + two, of_one + of_two
    return (
        f"The intervals hold {one} of {of_one} losses of runs that continue and {two} of {of_two} "
        f"of runs that restart: {inside} of {total}, {inside / total:.0%}.\n"
    )


@table
def probes() -> str:
    """What the probes are worth."""
    return per_family(
        {
            "no probes (`probes=False`)": triple("without probes", "ablations"),
            "gradients of the tasks alone": triple(
                "probe gradients, no endpoint losses", "ablations"
            ),
            "losses of the target alone": triple(
                "endpoint losses, no probe gradients", "ablations"
            ),
            "both: the default": triple(DEFAULT),
        }
    )


@table
def basis() -> str:
    """Dimensions in which curvature is modelled."""
    names = {"16": "rank 16", "32": "rank 32", "128": "rank 128", "256": "rank 256"}
    rows = {rank: of(name, part="ranks") for rank, name in names.items()}
    return per_family({"default (at most 96)": of(DEFAULT), **rows})


@table
def dimensions() -> str:
    """Numbers per projected gradient."""

    def cell(dim: int) -> Callable[[dict[str, Any]], str]:
        def text(record: dict[str, Any]) -> str:
            found = next(line for line in record["dims"] if line["dim"] == dim)
            low, high = found["spearman_range"]
            return f"{number(found['spearman'])} [{number(low)}, {number(high)}]"

        return text

    rows = {f"{dim:,}": cell(dim) for dim in (256, 512, 1024, 2048)}
    return per_family(rows | {"4,096, the default": of(DEFAULT)})


@table
def captured() -> str:
    """Captured examples of a task, and the warning about them."""
    counts = ("8", "16", "32", "64")
    rows = {count: of(f"{count} examples a task", part="fewer_examples") for count in counts}
    text = per_family(rows | {"all": of("without probes", part="ablations")})
    above: list[float] = []
    below: list[float] = []
    for family in FAMILIES:
        if family == "sparse":
            continue  # 32 examples of a task were captured: two of its rows are the same
        for found in agreement(family)["fewer_examples"]:
            if found["sampling"] > 0:
                (above if found["sampling"] > 0.5 else below).append(found["spearman"])
    return (
        f"{text}\nIn the families other than sparse: where only some of a task's examples were "
        f"captured and the report warns, the mean Spearman is {fmean(above):.2f} ({len(above)} "
        f"cases); where it does not warn, {fmean(below):.2f} ({len(below)} cases).\n"
    )


@table
def ablations() -> str:
    """What curvature, preconditioner and momentum are worth."""
    names = {
        "no probes": "without probes",
        "and no curvature": "no curvature",
        "and curvature from the loss (empirical Fisher), not from drawn labels": "empirical Fisher",
        "and curvature from margins of tokens (`--token-margins`)": "margins of tokens",
        "and plain gradient steps, of equal first-order gain": "not preconditioned",
        "and plain steps, curvature from the loss": "not precond., empirical Fisher",
        "and plain steps on margins, as in the paper's model": "not precond., margin",
        "and no momentum at the switch": "no momentum",
        "and all gradients in the target's 64 principal directions (as GIST)": (
            "in the target's 64 main axes"
        ),
    }
    rows = {label: of(name, part="ablations") for label, name in names.items()}
    return per_family({"the default": of(DEFAULT), **rows})


@table
def ablation_errors() -> str:
    """What curvature is worth in nats."""
    return per_family(
        {
            "no probes": of("without probes", "error", "ablations", percent),
            "and no curvature": of("no curvature", "error", "ablations", percent),
        }
    )


@table
def terms() -> str:
    """The default without each of its terms: means over the eight families."""
    record = read("terms")

    def row(label: str, lines: list[dict[str, Any]]) -> list[str]:
        means = {key: fmean(line[key] for line in lines) for key in lines[0]}
        return [
            label,
            number(means["spearman"], 3),
            number(means["spearman_without_shuffled"], 3),
            f"{100 * means['regret']:.1f}%",
            f"{100 * means['error']:.1f}%",
            percent(means["coverage"]),
            f"{100 * means['error_calibrated']:.1f}%",
        ]

    before, now = ([record[key][family] for family in FAMILIES] for key in ("before", "families"))
    rows = [row("**the default**", [of["the default"] for of in now])]
    rows += [row(name, [of[name] for of in now]) for name in now[0] if name != "the default"]
    rows.append(row("*the default before*", [of["the default"] for of in before]))
    for name in ("no noise of batches", "no curvature outside the basis"):
        rows.append(row(f"before, {name}", [of[name] for of in before]))
    header = ["", "Spearman", "without the shuffled task", "regret", "error"]
    return markdown([*header, "in intervals", "error after calibration"], rows)


@table
def restart() -> str:
    """Estimates of runs that restart."""
    rows: dict[str, Callable[[dict[str, Any]], str]] = {
        "ground-truth losses": spread,
        "**Spearman of the default**": of(DEFAULT),
        "*noise ceiling*": lambda r: f"*{number(r['noise_ceiling'])}*",
        "`GaussNewton()`": of("GaussNewton()"),
        "dot product of mean gradients, preconditioned": of("mean dot product, preconditioned"),
        "one step along the mean gradient, preconditioned": of("mean gradient step, precond."),
        "mean cosine": of("mean cosine"),
        "regret of the best-estimated": of(DEFAULT, "regret", form=percent),
        "R² and mean relative error of the default": lambda r: (
            f"{of(DEFAULT, 'r2')(r)}, {of(DEFAULT, 'error', form=percent)(r)}"
        ),
        "after `calibrate=8`": lambda r: (
            f"{number(calibrated(r, 8)['r2'])}, {percent(calibrated(r, 8)['error'])}"
        ),
        "90% intervals that hold the ground truth": of(DEFAULT, "coverage", form=percent),
        "the same after `calibrate=8`": lambda r: percent(calibrated(r, 8)["coverage"]),
    }
    return per_family(rows, RESTARTED, "restart")


LIMITS = {
    "terms_over_loss": 1 / 3,
    "linearization_residual": 1.0,
    "target_residual": 1 / 3,
    "largest_curvature_over_stable": 1.0,
}
"""Above which the report warns; ``tests/test_limits.py`` compares them with the package's."""


@table
def diagnostics() -> str:
    """What the reliability checks say of each family."""

    def tenth(value: float) -> str:
        return number(value, 1)

    def row(name: str, values: dict[str, Any], measures: dict[str, Any]) -> list[str]:
        forms: list[Callable[[float], str]] = [percent, tenth, percent, tenth]
        cells = [
            f"**{form(values[key])}**" if values[key] > limit else form(values[key])
            for (key, limit), form in zip(LIMITS.items(), forms, strict=True)
        ]
        return [name, number(measures["spearman"]), percent(measures["error"]), *cells]

    rows = []
    for found in read("drift")["lines"]:
        rows.append(row(VARIANTS[found["family"]], found["probes"], found["probes"]))
    for family in FAMILIES:
        if family != "small":
            record = agreement(family)
            rows.append(row(family, record["diagnostics"], default_line(record)))
    rows.append(["*limit*", "", "", "*33%*", "*1*", "*33%*", "*1*"])
    header = ["", "Spearman", "error", *(f"`{key}`" for key in LIMITS)]
    return markdown(header, rows)


@table
def gate() -> str:
    """How well diagnostics tell bad estimates from good ones."""
    rows = [
        [
            name if name == "gate" else f"`{name}`",
            number(row["auroc"]),
            f"{row['bad']} of {row['cases']}",
        ]
        for row in read("gate")["rows"]
        for name in [row["diagnostic"]]
    ]
    return markdown(["", "AUROC", "bad cases"], rows)


@table
def behind() -> str:
    """What the change of gradients over the end of the warm-up says."""
    columns = {
        "with curvature that agrees with the change since then": "{spearman:.2f}",
        "gradients missed": "{linearization_residual:.1f}",
    }
    rows = [
        [VARIANTS[found["family"]], step, number(found["probes"]["spearman"])]
        + [form.format(**values).replace("-", "−") for form in columns.values()]
        for found in read("drift")["lines"]
        for step, values in found.items()
        if step.startswith("step")
    ]
    return markdown(["", "from", "Spearman of the default", *columns], rows)


@table
def summary() -> str:
    """The default against three baselines: the README's table."""
    names = {
        "**`LinearizedTraining()`, the default**": DEFAULT,
        "dot product of mean gradients, preconditioned": "mean dot product, preconditioned",
        "mean cosine, preconditioned (as LESS)": "mean cosine, preconditioned",
        "`GradExLogistic()`, the paper's": "GradExLogistic()",
    }
    records = [agreement(family) for family in FAMILIES]
    rows = []
    for label, name in names.items():
        ranks = [default_line(record, name)["spearman"] for record in records]
        regret = fmean(default_line(record, name)["regret"] for record in records)
        worst = min(range(len(ranks)), key=ranks.__getitem__)
        of_worst = f"{number(ranks[worst])} ({FAMILIES[worst]})"
        rows.append([label, number(fmean(ranks)), of_worst, percent(regret)])
    ceilings = [record["noise_ceiling"] for record in records]
    of_worst = f"*{number(min(ceilings))} ({FAMILIES[ceilings.index(min(ceilings))]})*"
    rows.append(
        ["*perfect estimate (noise ceiling)*", f"*{number(fmean(ceilings))}*", of_worst, ""]
    )
    return markdown(["", "mean Spearman", "worst family", "mean regret"], rows)


@table
def claims() -> str:
    """The README's sentences about a family that was held out, a bad case, and intervals."""
    held_out, bad = agreement("sorting"), agreement("sparse")
    now, worst = default_line(held_out), default_line(bad)
    inside, total = map(sum, zip(*losses_in_intervals(), strict=True))
    strategies = lines_of_strategies()
    default, confirmed = strategies[CHOSEN], strategies[f"{CHOSEN}, confirm=3"]
    return bullets(
        "**A family that was held out.** The first estimates of *sorting*, made before its ground "
        "truth was measured, had a Spearman of 0.95 and errors of 2.6% of the loss "
        f"(now {number(now['spearman'])} and {now['error']:.1%}, after one constant was set).",
        "**A bad case.** In *sparse*, only 32 of 256 examples of each task are captured, after 16 "
        f"steps of warm-up. The Spearman is {number(worst['spearman'])}; that of the number of "
        f"tasks in a mixture is {of('number of tasks')(bad)}. Losses are "
        f"{percent(worst['error'])} off, and the report warns.",
        f"**Error bars.** The 90% intervals hold {inside / total:.0%} of {total} ground-truth "
        "losses.",
        f"**Choices.** In {len(default)} families, two of them real text, training on the "
        f"default's choice was worse than on all tasks in {times_worse(default)} runs; mean regret "
        f"{regret(default)}, all tasks {regret(strategies[ALL_TASKS])}, LESS "
        f"{regret(strategies['LESS'])}. With `confirm=3`: {times_worse(confirmed)}, at the cost of "
        "three more runs.",
    )


@table
def regmix() -> str:
    """Rank correlation of surrogates with losses that others measured, by number of runs."""
    record = read("regmix")
    counts = sorted({line["runs"] for line in record["lines"]})

    def rows() -> Iterator[list[str]]:
        for name in dict.fromkeys(line["surrogate"] for line in record["lines"]):
            lines = {line["runs"]: line for line in record["lines"] if line["surrogate"] == name}
            yield [f"`{name}`", *(pair(lines[n]) for n in counts)]
            held = (f"{percent(lines[n]['coverage'])}" for n in counts)
            yield ["its intervals hold", *held]
        lines = {line["runs"]: line for line in record["lightgbm"]}
        yield ["LightGBM", *(pair(lines[n]) if n in lines else "not measured" for n in counts)]

    def pair(line: dict[str, Any]) -> str:
        return f"{line['spearman_pile_cc']:.3f}, {line['spearman_mean']:.3f}"

    return markdown(["runs", *map(str, counts)], rows())
