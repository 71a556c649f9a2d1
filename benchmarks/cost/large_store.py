"""A gradient store larger than memory: written, loaded and fitted with synthetic examples.

The examples go through ``StoreWriter`` shard by shard, as those of a gradient pass do, with the
three scalars that ``LinearizedTraining`` needs; half of all rows count as captured, so that its
intervals look at every example. Files stay in the page cache if there is room: seconds are those of
a warm disk.

Two measures of memory, both of Linux. ``RLIMIT_DATA`` bounds what the process may allocate (heap,
stacks, private writable pages), so that a run that ends has proven to need no more than
``--memory_gib``. The table tells what was in use, the peak of ``RssAnon`` in ``/proc/self/status``,
looked up every 10 ms: mapped pages of the store are not in it, as the kernel takes them back when
memory is short.

    python -m benchmarks.cost.large_store    # 100,000 examples, 0.6 GB
    # 6.2 GB, 12.4 GB while shards are merged
    python -m benchmarks.cost.large_store --num_examples 1000000
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from hf_auxselect import GradientStore, LinearizedTraining
from hf_auxselect.store.format import Arrays, task_entry
from hf_auxselect.store.writer import ShardSpec, StoreWriter

SHARD_SIZE = 4096
NUM_TASKS = 10
NUM_TARGET = 1000


class PeakMemory:
    """Peak of the process's anonymous memory since :meth:`restart`, MiB."""

    def __init__(self) -> None:
        self.mib = 0.0
        threading.Thread(target=self._watch, daemon=True).start()

    def restart(self) -> None:
        self.mib = self._now()

    def _watch(self) -> None:
        while True:
            self.mib = max(self.mib, self._now())
            time.sleep(0.01)

    @staticmethod
    def _now() -> float:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) / 1024
        raise OSError("/proc/self/status has no RssAnon.")


def plan(num_examples: int) -> list[ShardSpec]:
    """Shards of the tasks, equally large, and of the target."""
    sizes = {f"task{k}": len(range(k, num_examples, NUM_TASKS)) for k in range(NUM_TASKS)}
    return [
        ShardSpec(
            task=name,
            role="target" if name == "target" else "task",
            example_ids=tuple(range(start, min(start + SHARD_SIZE, size))),
        )
        for name, size in (*sizes.items(), ("target", NUM_TARGET))
        for start in range(0, size, SHARD_SIZE)
    ]


def synthetic(shard: ShardSpec, dim: int, rng: np.random.Generator) -> Arrays:
    """What the gradient pass would give for a shard; gradients have a decaying spectrum."""
    count = len(shard.example_ids)
    scale = np.linspace(1, 0.1, dim, dtype=np.float32) / dim
    arrays = {
        "example_ids": np.array(shard.example_ids),
        "losses": rng.random(count, np.float32),
        "num_label_tokens": rng.integers(1, 9, count),
        "example_weights": np.ones(count),
    }
    for scalar in LinearizedTraining.scalars:
        arrays[f"outputs.{scalar}"] = arrays["losses"]
        arrays[f"gradients.{scalar}"] = rng.standard_normal((count, dim), np.float32) * scale
    return arrays


def write(directory: Path, num_examples: int, dim: int) -> None:
    """Write a store as the gradient pass does."""
    rng = np.random.default_rng(0)
    shards = plan(num_examples)
    names = dict.fromkeys((shard.task, shard.role) for shard in shards)
    writer = StoreWriter(
        directory,
        scalars=LinearizedTraining.scalars,
        tasks=[task_entry(name, role, 2 * num_examples // NUM_TASKS) for name, role in names],
        shards=shards,
        metadata={
            "optimizer": {
                "learning_rate_factor": 1.0,
                "momentum_coefficient": 0.9,
                "weight_decay": 0.01,
            },
            "training": {
                "learning_rates": [0.1] * 100,
                "max_grad_norm": 1.0,
                "examples_per_step": 16,
                "after": "continue",
            },
        },
        vectors={name: rng.standard_normal(dim, np.float32) for name in ("momentum", "parameters")},
    )
    for shard in writer.pending:
        writer.write(shard, synthetic(shard, dim, rng))


def main() -> None:
    """Print a table of what each stage takes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--num_examples", type=int, default=100_000)
    parser.add_argument("--projection_dim", type=int, default=512)
    parser.add_argument("--memory_gib", type=float, default=2.0)
    parser.add_argument("--directory", help="where the temporary store goes; it is removed")
    options = parser.parse_args()
    limit = int(options.memory_gib * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.getrlimit(resource.RLIMIT_DATA)[1]))
    peak = PeakMemory()
    lines = []

    @contextmanager
    def measured(stage: str) -> Iterator[None]:
        peak.restart()
        start = time.perf_counter()
        yield
        lines.append(f"| {stage} | {time.perf_counter() - start:.1f} | {peak.mib:.0f} |")

    with tempfile.TemporaryDirectory(dir=options.directory) as name:
        directory = Path(name)
        with measured("write, with making up the numbers"):
            write(directory, options.num_examples, options.projection_dim)
        size = sum(file.stat().st_size for file in directory.iterdir())
        with measured("load and verify"):
            store = GradientStore.load(directory)
        with measured("fit"):
            fitted = LinearizedTraining().fit(store)
        subsets = np.random.default_rng(1).random((64, NUM_TASKS)) < 0.5
        with measured(f"estimate {len(subsets)} subsets"):
            estimate = fitted.estimate(subsets)
        assert np.isfinite(estimate.loss).all()
        with measured("diagnostics"):
            fitted.diagnostics()
    print(
        f"{len(store):,} examples, projection_dim {options.projection_dim}, {size / 1e9:.2f} GB on "
        f"disk; at most {options.memory_gib:g} GiB of memory\n"
    )
    print("| stage | seconds | peak anonymous memory, MiB |\n|---|---|---|")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
