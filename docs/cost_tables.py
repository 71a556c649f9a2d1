"""Tables of time, memory and precision."""

from __future__ import annotations

from results import bullets, listed, markdown, number, read, table


@table
def costs() -> str:
    """The README's numbers on cost."""
    passes = {found["method"]: found["ratio"] for found in read("gradients")["lines"]}
    real = next(found for found in read("cost")["lines"] if found["family"] == "arithmetic")
    return bullets(
        "The gradient pass for `LinearizedTraining()`, without probes, takes "
        f"**{passes['ours, LinearizedTraining()']:.1f} times** the CPU time of training on the "
        "same examples.",
        f"A selection is **{real['forward_selection_times']:.1f} times** cheaper than forward "
        f"selection by training for runs of {real['steps_of_a_fine_tune']} steps (SmolLM2-135M). "
        "For runs of 1,000 steps of the same cost it would be "
        f"**{real['forward_selection_times_long']:.0f} times** cheaper.",
    )


@table
def choosing() -> str:
    """The selection next to choosing by training."""
    return listed(
        "cost",
        {"family": {"small": "small", "arithmetic": "arithmetic (SmolLM2-135M)"}},
        {
            "steps of a run": "{steps_of_a_fine_tune}",
            "seconds of the selection": "{seconds_of_selection:.0f}",
            "mixtures of forward selection": "{mixtures_of_forward_selection}",
            "times cheaper than forward selection by training": "{forward_selection_times:.1f}",
            "than 1,000 runs": "{random_ensemble_times:.0f}",
            "than forward selection, at 1,000 steps a run": "{forward_selection_times_long:.0f}",
            "than 1,000 runs of 1,000 steps": "{random_ensemble_times_long:,.0f}",
        },
    )


ERRORS = {"error, median": "{error_median:.3f}", "95th percentile": "{error_p95:.3f}"}


@table
def peers() -> str:
    """The gradient pass next to plain training and other packages."""
    names = {
        "ours, one scalar": "**one scalar**",
        "ours, two scalars": "**two scalars**",
        "ours, LinearizedTraining()": "**what `LinearizedTraining()` needs**, without probes",
        "B backward passes": "one backward per example, not projected",
        "B backward passes, dense": "the same, dense projection to 512",
        "bergson, per module 16 x 16": "bergson 2.5.1, per module, 16 × 16",
        "bergson, the same, own loop": "bergson, the same, its own loop",
        "bergson, per module 1 x 1": "bergson, per module, 1 × 1",
        "bergson, global": "bergson, global, 512",
        "dattri-llm, exact": "dattri-llm 0.1.0, not projected",
        "dattri-llm, mask 64": "dattri-llm, 64 coordinates a layer",
        "dattri-llm, logra 16 x 16": "dattri-llm, LoGra 16 × 16",
        "dattri-llm, dense 1": "dattri-llm, dense, 1 a layer",
    }
    columns = {
        "CPU time, times plain training": "{ratio:.2f}",
        "memory above it, MiB": "{memory_mib:.0f}",
        "bytes per example": "{bytes_per_example:,}",
    }
    return listed("gradients", {"method": names}, columns | ERRORS)


@table
def projection() -> str:
    """Kinds of projection, to 512 numbers."""
    names = {
        "count sketch": "**count sketch (used here)**",
        "Rademacher": "dense Rademacher, regenerated for each batch",
        "cached": "dense Rademacher, cached",
        "two-sided": "two-sided, per LoRA matrix",
        "SRHT": "SRHT",
    }
    columns = {"ms per example": "{ms_per_example:.1f}", "tables, MiB": "{table_mib:.0f}"}
    return listed("projection", {"projection": names, "dim": {512: ""}}, columns | ERRORS)


@table
def scaling() -> str:
    """Exponents of time and memory."""
    names = {
        "examples": "number of examples",
        "length": "tokens of an example",
        "rank": "LoRA rank",
        "projection_dim": "numbers per gradient",
    }
    record, rows = read("scaling"), []
    for key, label in names.items():
        values = [found["value"] for found in record["lines"] if found["setting"] == key]
        exponents = record["exponents"][key]
        span = f"{min(values):,} to {max(values):,}"
        rows.append([label, span, number(exponents["seconds"]), number(exponents["memory_mib"])])
    return markdown(["", "range", "exponent of time", "exponent of memory"], rows)


@table
def precision() -> str:
    """Gradients of bfloat16 models against float32."""
    names = ("bf16 autocast", "bf16 model and adapter")
    columns = {
        "error, median": "{error_median:.1%}",
        "largest": "{error_max:.1%}",
        "smallest cosine": "{cosine_min:.4f}",
    }
    return listed("precision", {"setting": {name: name for name in names}}, columns)


@table
def memory() -> str:
    """Memory of the gradient pass, of a training step, and as predicted."""
    rows = [
        [name, *(f"{found[key]:.0f}" for key in ("training step", "gradient pass", "preview"))]
        for name, found in read("memory")["MiB"].items()
    ]
    return markdown(["MiB", "training step", "gradient pass", "predicted"], rows)


@table
def page() -> str:
    """Size of the report page, and time of a report."""
    return listed(
        "report_page",
        {"tasks": {11: "11", 38: "38", 1729: "1,729"}},
        {
            "page, kB": "{page_kb:.0f}",
            "seconds to render it": "{seconds_of_page:.2f}",
            "seconds for its estimates": "{seconds_of_numbers:.0f}",
        },
    )


@table
def speed() -> str:
    """Time of an estimate."""
    record = read("estimates")
    fast = record["seconds_per_estimate"]["LinearizedTraining(), batch"]
    rows = [
        [f"{name}", f"{1000 * seconds:,.1f}", f"{seconds / fast:,.0f}"]
        for name, seconds in record["seconds_per_estimate"].items()
    ]
    return markdown(["", "ms per estimate", "times the first"], rows)


@table
def killed() -> str:
    """Runs that were killed at random moments."""
    record = read("chaos")
    rows = [
        [when, str(count), str(record["resumed"][when]), str(record["bitwise_equal"][when])]
        for when, count in record["killed"].items()
    ]
    total = [str(sum(record[key].values())) for key in ("killed", "resumed", "bitwise_equal")]
    header = ["killed", "runs", "resumed", "bitwise equal at the end"]
    return markdown(header, [*rows, ["all", *total]])
