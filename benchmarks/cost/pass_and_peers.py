"""The gradient pass next to plain training, to B backward passes, and to other packages.

SmolLM2-135M in float32 with LoRA (r = 8 on all linear layers, 2.4 million parameters) after a few
steps of training, on examples of the arithmetic recipe, sorted by length, 16 to a batch. Every
method runs the same forward, with logits at label positions only, except where its name says so.

    pip install -e '.[bench]'
    pip install --no-deps bergson==2.5.1 dattri==0.3.0
    python -m benchmarks.cost.pass_and_peers [--num_batches 2] [--repetitions 3]

Bergson declares dependencies that are not needed here (torchvision, torchaudio, torchopt,
bitsandbytes), dattri one for MIDI files; ``bench`` holds those that are. A package that is missing
is skipped.

How it is measured. Every method has a process of its own, with one thread; in each repetition all
methods take their turn. A batch runs plainly and then through the method; ``ratio`` is the median
over batches and repetitions of the CPU seconds of the latter to those of the former (CPU, because
it counts other users of the machine less; the wall time is in the JSON). Tables and cached matrices
are built before. Memory is the peak resident set above that of the plain pass, on the longest
batch, with all that is kept; another process measures it, in which malloc gives freed memory back
at once. The error of a pair of examples is ``|<p(g), p(h)> - <g, h>| / (|g| |h|)``, with g from
autograd, one example at a time. A projection that is not normalized is, by the one number that
keeps the mean square norm.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from benchmarks import RESULTS
from benchmarks.cost import peers
from benchmarks.cost.peers import LossesFn, Row, RunFn
from hf_auxselect import LinearizedTraining
from hf_auxselect.capture.example_gradients import ExampleGradients
from hf_auxselect.capture.optimizer_state import read_optimizer
from hf_auxselect.capture.projection import CountSketch
from hf_auxselect.capture.scalars import (
    AT_OPTIMIZER,
    IGNORE_INDEX,
    SCALARS,
    Batch,
    forward_label_logits,
)
from hf_auxselect.files import to_json, write_atomically
from recipes.models import smollm2

DIM = 512
BATCH_SIZE = 16
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}  # the Makefile's
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # so that the resident set is what is in use
PACKAGES = (
    "hf-auxselect",
    "torch",
    "transformers",
    "peft",
    "trl",
    "numpy",
    "bergson",
    "dattri-llm",
    "dattri",
)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all processes share."""

    adapter: str
    rows: list[Row]
    """Tokenized, sorted by length."""
    seed: int

    @property
    def batches(self) -> list[range]:
        """Row numbers of each batch; the last one is the longest."""
        return [range(i, i + BATCH_SIZE) for i in range(0, len(self.rows), BATCH_SIZE)]


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to get the gradients of a batch."""

    open: Callable[[Any, list[Row], LossesFn], AbstractContextManager[RunFn]]
    note: str
    packages: tuple[str, ...] = ()
    num_parts: int | None = None
    """Parts of a result that hold the gradient of the loss; None: all."""
    normalized: bool = True
    """Whether inner products are kept in expectation."""


def collate(rows: Sequence[Row]) -> Batch:
    """Rows, padded on the right."""

    def pad(values: list[list[int]], value: int) -> Tensor:
        tensors = [torch.tensor(v) for v in values]
        return pad_sequence(tensors, batch_first=True, padding_value=value)

    return {
        "input_ids": pad([row["input_ids"] for row in rows], 0),
        "attention_mask": pad([[1] * len(row["input_ids"]) for row in rows], 0),
        "labels": pad([row["labels"] for row in rows], IGNORE_INDEX),
    }


def run_plainly(model: nn.Module, losses: LossesFn, indices: Sequence[int]) -> list[Tensor]:
    """Forward and backward of a batch, as in training."""
    losses(indices).sum().backward()
    model.zero_grad()
    return []


@contextlib.contextmanager
def plain(model: nn.Module, rows: list[Row], losses: LossesFn) -> Iterator[RunFn]:
    """The ceiling."""
    yield partial(run_plainly, model, losses)


@contextlib.contextmanager
def ours(
    model: nn.Module, rows: list[Row], losses: LossesFn, *, scalars: Sequence[str]
) -> Iterator[RunFn]:
    """The package's pass; what it returns of a batch is what it would store."""
    state = None
    if any(spec.endswith(AT_OPTIMIZER) for spec in scalars):
        trainable = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trainable, lr=0.0)
        losses(range(BATCH_SIZE)).sum().backward()
        optimizer.step()  # moments, and no change of the parameters
        model.zero_grad()
        state = read_optimizer(model, optimizer)
        del optimizer  # in training it is there anyway
    sketch = CountSketch(DIM, 0)
    with ExampleGradients(
        model, lambda batch: collate(batch), sketch, scalars, 0, state
    ) as capture:

        def run(indices: Sequence[int]) -> list[Tensor]:
            arrays = capture._batch("", [(i, rows[i]) for i in indices])
            first = arrays.pop("gradients.loss")
            return [torch.from_numpy(array) for array in (first, *arrays.values())]

        yield run


@contextlib.contextmanager
def backward_passes(
    model: nn.Module, rows: list[Row], losses: LossesFn, *, dense: bool
) -> Iterator[RunFn]:
    """B passes of one example; ``dense``: then times a matrix of signs.

    In float32 the matrix takes P x D x 4 bytes = 5.0 GB. It is kept as int8 (1.25 GB) and converted
    in pieces that fit the cache, once for all examples of a batch, which is faster than to read it
    in float32 and far faster than to draw it anew (20 s).
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    num_entries, step = sum(p.numel() for p in trainable), 4096
    signs = torch.empty(num_entries if dense else 0, DIM, dtype=torch.int8)
    signs.random_(0, 2, generator=torch.Generator().manual_seed(0)).mul_(2).sub_(1)

    def run(indices: Sequence[int]) -> list[Tensor]:
        gradients = torch.empty(len(indices), num_entries)
        for row, i in enumerate(indices):
            parts = torch.autograd.grad(losses([i]).sum(), trainable)
            torch.cat([part.flatten() for part in parts], out=gradients[row])
        if not dense:
            return [gradients]
        projected = torch.zeros(len(indices), DIM)
        for start in range(0, num_entries, step):
            piece = signs[start : start + step].float()
            projected.addmm_(gradients[:, start : start + step], piece, alpha=DIM**-0.5)
        return [projected]

    yield run


def _ours(scalars: Sequence[str], note: str) -> Method:
    return Method(open=partial(ours, scalars=scalars), note=note, num_parts=1)


def _bergson(note: str, **options: Any) -> Method:
    return Method(open=partial(peers.bergson, **options), note=note, packages=("bergson",))


def _dattri(note: str, *, normalized: bool = True, **options: Any) -> Method:
    packages: tuple[str, ...] = ("dattri_llm",)
    if options.get("style") in ("logra", "dense"):
        packages += ("dattri",)
        options |= {"proj_type": "rademacher", "proj_max_batch_size": BATCH_SIZE}
    return Method(
        open=partial(peers.dattri_llm, **options),
        note=note,
        packages=packages,
        normalized=normalized,
    )


EXACT = "B backward passes"
METHODS: dict[str, Method] = {
    "plain": Method(open=plain, note="forward and backward of the batch; nothing is captured"),
    "ours, one scalar": _ours(("loss",), "loss"),
    "ours, two scalars": _ours(("loss", "sampled_loss"), "loss, sampled_loss"),
    "ours, LinearizedTraining()": _ours(
        LinearizedTraining.scalars, ", ".join(LinearizedTraining.scalars)
    ),
    EXACT: Method(open=partial(backward_passes, dense=False), note="not projected"),
    "B backward passes, dense": Method(
        open=partial(backward_passes, dense=True),
        note="P x D signs, kept as int8 and converted piece by piece",
    ),
    "bergson, per module 16 x 16": _bergson("projection_dim=16", projection_dim=16),
    "bergson, the same, own loop": _bergson(
        "projection_dim=16; its own forward: logits at every position",
        projection_dim=16,
        own_loop=True,
    ),
    "bergson, per module 1 x 1": _bergson("projection_dim=1", projection_dim=1),
    "bergson, global": _bergson(
        f'projection_target="global", projection_dim={DIM}; it draws its matrix for every batch',
        projection_target="global",
        projection_dim=DIM,
    ),
    "dattri-llm, exact": _dattri("not projected, materialized"),
    "dattri-llm, mask 64": _dattri(
        "64 coordinates of each layer's gradient",
        normalized=False,
        style="mask",
        proj_dim=64,
        proj_seed=0,
    ),
    "dattri-llm, logra 16 x 16": _dattri("proj_dim=16", style="logra", proj_dim=16, proj_seed=0),
    "dattri-llm, dense 1": _dattri("proj_dim=1", style="dense", proj_dim=1, proj_seed=0),
}


def prepare(num_batches: int, seed: int, directory: str) -> Setting:
    """Train a few steps, and tokenize the rows."""
    from recipes.arithmetic import TASKS, build

    warnings.filterwarnings("ignore", category=FutureWarning)
    count = num_batches * BATCH_SIZE
    trainer = build(
        smollm2(),
        None,
        output_dir=directory,
        num_rows=-(-count // (len(TASKS) + 1)),
        seed=seed,
        max_steps=8,
        disable_tqdm=True,
        logging_steps=1000,
    )
    trainer.train()
    trainer.save_model(directory)
    order = torch.randperm(
        len(trainer.train_dataset), generator=torch.Generator().manual_seed(seed)
    )
    rows = [trainer.train_dataset[i] for i in order[:count].tolist()]
    rows = [{name: row[name] for name in ("input_ids", "labels")} for row in rows]
    rows.sort(key=lambda row: len(row["input_ids"]))
    return Setting(adapter=directory, rows=rows, seed=seed)


def load(setting: Setting) -> tuple[Any, LossesFn]:
    """The model, in a process of its own, and the losses of examples by row number."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message="Full backward hook is firing")  # the peers' hooks
    torch.set_num_threads(1)
    base = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32)
    model = PeftModel.from_pretrained(base, setting.adapter, is_trainable=True).eval()

    def losses(indices: Sequence[int]) -> Tensor:
        batch = collate([setting.rows[i] for i in indices])
        return SCALARS["loss"](forward_label_logits(model, batch))

    return model, losses


def peak_memory() -> int:
    """Bytes of the largest resident set since the last call; Linux only."""
    status = Path("/proc/self/status").read_text()
    Path("/proc/self/clear_refs").write_text("5")
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def measure_memory(name: str, setting: Setting) -> dict[str, int]:
    """Peak memory in bytes of the plain pass, and of a method above it."""
    model, losses = load(setting)
    longest = setting.batches[-1]
    for _ in range(2):  # the first warms up
        peak_memory()
        run_plainly(model, losses, longest)
    plain_peak = peak_memory()
    with METHODS[name].open(model, setting.rows, losses) as run:
        peak_memory()
        run(longest)
        run(longest)
    return {"plain_peak": plain_peak, "memory": peak_memory() - plain_peak}


def inspect(name: str, setting: Setting) -> dict[str, Any]:
    """Size and inner products [N, N] of what a method gives."""
    model, losses = load(setting)
    with METHODS[name].open(model, setting.rows, losses) as run:
        results = [run(indices) for indices in setting.batches]
    gram = torch.zeros(len(setting.rows), len(setting.rows), dtype=torch.float64)
    for parts in zip(*[result[: METHODS[name].num_parts] for result in results], strict=True):
        vectors = torch.cat(parts).flatten(1).double()
        gram += vectors @ vectors.T
    num_bytes = sum(part.nbytes for part in results[0]) // BATCH_SIZE
    return {"bytes_per_example": num_bytes, "gram": gram}


def measure_time(name: str, setting: Setting) -> np.ndarray:
    """CPU and wall seconds [batches, 2 passes, 2] of the plain pass and of a method."""

    def seconds(run: RunFn, indices: Sequence[int]) -> tuple[float, float]:
        cpu, wall = time.process_time(), time.perf_counter()
        run(indices)
        return time.process_time() - cpu, time.perf_counter() - wall

    model, losses = load(setting)
    plainly = partial(run_plainly, model, losses)
    plainly(setting.batches[-1])
    with METHODS[name].open(model, setting.rows, losses) as run:
        run(setting.batches[-1])  # builds tables
        return np.array([[seconds(f, b) for f in (plainly, run)] for b in setting.batches])


def in_own_process(function: Callable[..., Any], *arguments: Any, malloc: dict[str, str]) -> Any:
    """Run in a new process, with these settings of glibc's malloc."""
    for name in KEEP_MEMORY | GIVE_BACK:
        os.environ.pop(name, None)
    os.environ.update(malloc)  # read when a process starts
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def errors(gram: Tensor, exact: Tensor, *, normalized: bool) -> dict[str, float]:
    """Errors of the inner products of all pairs of different examples, as cosines."""
    scale = 1.0 if normalized else float(exact.trace() / gram.trace())
    norms = exact.diagonal().sqrt()
    pairs = torch.triu_indices(len(exact), len(exact), 1)
    error = ((scale * gram - exact).abs() / torch.outer(norms, norms))[*pairs]
    return {
        "error_median": float(error.median()),
        "error_p95": float(error.quantile(0.95)),
        "scaled_by": scale,
    }


def summarize(
    seen: dict[str, Any], seconds: np.ndarray, exact: Tensor, name: str
) -> dict[str, Any]:
    """One line of the table, of times [repetitions, batches, 2 passes, 2]."""
    own, plainly = seconds[:, :, 1], seconds[:, :, 0]
    cpu, wall = np.median(own.sum(1), axis=0) / len(exact)
    ratios = own[:, :, 0] / plainly[:, :, 0]
    line: dict[str, Any] = {
        "method": name,
        "note": METHODS[name].note,
        "cpu_seconds_per_example": cpu,
        "wall_seconds_per_example": wall,
        "ratio": np.median(ratios),
        "ratios": ratios.round(3).tolist(),
        "memory_mib": seen["memory"] / 2**20,
        "bytes_per_example": seen["bytes_per_example"],
    }
    if seen["bytes_per_example"]:
        line |= errors(seen["gram"], exact, normalized=METHODS[name].normalized)
    return line


def print_table(lines: list[dict[str, Any]]) -> None:
    """The table, for people."""
    print(
        f"\n{'':28} CPU s/example  ratio  memory MiB  bytes/example  error: median  95th percentile"
    )
    for line in lines:
        error = ""
        if "error_median" in line:
            scaled = "" if line["scaled_by"] == 1 else f"  (scaled by {line['scaled_by']:.1f})"
            error = f"  {line['error_median']:13.1e}  {line['error_p95']:15.1e}{scaled}"
        print(
            f"{line['method']:28} {line['cpu_seconds_per_example']:13.3f}  {line['ratio']:5.2f}  "
            f"{line['memory_mib']:10.0f}  {line['bytes_per_example']:13,}{error}"
        )


def main() -> None:
    """Measure, print the table and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num_batches", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="some only; writes no JSON")
    options = parser.parse_args()
    os.environ["TQDM_DISABLE"] = "1"
    names = []
    for name, method in METHODS.items():
        if options.methods and name not in (*options.methods, "plain", EXACT):
            continue
        missing = [package for package in method.packages if find_spec(package) is None]
        if missing:
            print(f"skipped: {name} ({missing[0]} is not installed)")
        else:
            names.append(name)
    times: dict[str, list[np.ndarray]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as directory:
        setting = in_own_process(
            prepare, options.num_batches, options.seed, directory, malloc=KEEP_MEMORY
        )
        seen = {}
        for name in names:
            seen[name] = in_own_process(measure_memory, name, setting, malloc=GIVE_BACK)
            seen[name] |= in_own_process(inspect, name, setting, malloc=KEEP_MEMORY)
            print(f"{name}: {seen[name]['memory'] / 2**20:.0f} MiB", flush=True)
        for repetition in range(options.repetitions):
            for name in names:
                seconds = in_own_process(measure_time, name, setting, malloc=KEEP_MEMORY)
                times[name].append(seconds)
                ratio = seconds[:, 1, 0].sum() / seconds[:, 0, 0].sum()
                print(f"repetition {repetition + 1}, {name}: {ratio:.2f}", flush=True)
    exact = seen[EXACT]["gram"]
    lines = [summarize(seen[name], np.array(times[name]), exact, name) for name in names]
    print_table(lines)
    if options.methods:
        return
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    record = {
        "command": "python -m benchmarks.cost.pass_and_peers "
        f"--num_batches {options.num_batches} --repetitions {options.repetitions}",
        "examples": len(exact),
        "lengths": [len(row["input_ids"]) for row in setting.rows],
        "dim": DIM,
        "seed": options.seed,
        "plain_peak_mib": seen["plain"]["plain_peak"] / 2**20,
        "versions": versions,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, 1 thread",
        "lines": lines,
    }
    write_atomically(RESULTS / "gradients.json", to_json(record))


if __name__ == "__main__":
    main()
