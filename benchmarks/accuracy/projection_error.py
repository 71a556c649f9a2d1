"""Random projections of real per-example gradients: time, memory, error of inner products.

The gradients are those of SmolLM2-135M with LoRA (r = 8 on all linear layers, 2.4 million numbers
an example) on examples of the arithmetic recipe, after a few steps of training. The error of a pair
of examples is ``|<p(g), p(h)> - <g, h>| / (|g| |h|)``. Five projections:

    count sketch     the package's: each entry, with a random sign, into one of D cells
    Rademacher       a dense P x D matrix of signs, regenerated block by block; the yardstick
    cached           the same, kept in memory as int8
    two-sided        each LoRA matrix [8, n] times a random [n, D / 8], the short side left whole
    SRHT             signs, fast Walsh-Hadamard transform and a sample of D entries per parameter

    python -m benchmarks.accuracy.projection_error [--dims 256,512,1024] [--num_examples 32]
"""

from __future__ import annotations

import argparse
import math
import time
import warnings
from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from benchmarks import RESULTS
from hf_auxselect.capture.hooks import GradientHooks
from hf_auxselect.capture.memory import evaluation_mode
from hf_auxselect.capture.projection import CountSketch
from hf_auxselect.capture.scalars import SCALARS, forward_label_logits
from hf_auxselect.files import to_json, write_atomically
from hf_auxselect.seeds import random_words
from hf_auxselect.trainer import data
from recipes.models import smollm2


class Projection(Protocol):
    """What is compared: linear in the gradients, and summed over parameters."""

    def project(self, name: str, gradients: Tensor) -> Tensor:
        """Gradients [B, *shape] of one parameter to [B, D]."""

    def table_bytes(self, num_parameters: int) -> float:
        """Memory that is kept from batch to batch."""


class _CountSketch:
    def __init__(self, dim: int, seed: int) -> None:
        self._sketch = CountSketch(dim, seed)

    def project(self, name: str, gradients: Tensor) -> Tensor:
        return self._sketch.project(name, gradients.flatten(1))

    def table_bytes(self, num_parameters: int) -> float:
        return sum(t.nbytes for tables in self._sketch._tables.values() for t in tables)


class _Rademacher:
    def __init__(self, dim: int, seed: int, *, cached: bool = False) -> None:
        self._dim, self._seed, self._cached = dim, seed, cached
        self._blocks: dict[str, Tensor] = {}

    def _block(self, name: str, num_entries: int) -> Tensor:
        if name in self._blocks:
            return self._blocks[name]
        rng = np.random.default_rng(_seed(self._seed, name))
        bits = np.unpackbits(np.frombuffer(rng.bytes(num_entries * self._dim // 8), np.uint8))
        block = torch.from_numpy(bits.view(np.int8)).view(num_entries, self._dim).mul_(2).sub_(1)
        if self._cached:
            self._blocks[name] = block
        return block

    def project(self, name: str, gradients: Tensor) -> Tensor:
        flat = gradients.flatten(1)
        return flat @ self._block(name, flat.shape[1]).float() / math.sqrt(self._dim)

    def table_bytes(self, num_parameters: int) -> float:
        return num_parameters * self._dim if self._cached else 0


class _TwoSided:
    def __init__(self, dim: int, seed: int) -> None:
        self._dim, self._seed = dim, seed
        self._sides: dict[str, Tensor] = {}

    def project(self, name: str, gradients: Tensor) -> Tensor:
        short_last = gradients.shape[1] > gradients.shape[2]
        matrices = gradients.mT if short_last else gradients  # [B, 8, n]
        width = self._dim // matrices.shape[1]
        if name not in self._sides:
            generator = torch.Generator().manual_seed(_seed(self._seed, name))
            side = torch.randn(matrices.shape[2], width, generator=generator)
            self._sides[name] = side / math.sqrt(width)
        return (matrices @ self._sides[name]).flatten(1)

    def table_bytes(self, num_parameters: int) -> float:
        return float(sum(side.nbytes for side in self._sides.values()))


class _Srht:
    def __init__(self, dim: int, seed: int) -> None:
        self._dim, self._seed = dim, seed
        self._tables: dict[str, tuple[Tensor, Tensor]] = {}

    def project(self, name: str, gradients: Tensor) -> Tensor:
        flat = gradients.flatten(1)
        padded = 1 << (max(flat.shape[1], self._dim) - 1).bit_length()
        if name not in self._tables:
            generator = torch.Generator().manual_seed(_seed(self._seed, name))
            signs = torch.randint(0, 2, (flat.shape[1],), generator=generator) * 2.0 - 1.0
            self._tables[name] = signs, torch.randperm(padded, generator=generator)[: self._dim]
        signs, sample = self._tables[name]
        x = torch.nn.functional.pad(flat * signs, (0, padded - flat.shape[1]))
        width = 1
        while width < padded:
            pairs = x.view(len(x), -1, 2, width)
            x = torch.stack([pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]], 2)
            x = x.view(len(flat), padded)
            width *= 2
        return x[:, sample] / math.sqrt(self._dim)

    def table_bytes(self, num_parameters: int) -> float:
        return float(sum(s.nbytes + i.nbytes for s, i in self._tables.values()))


PROJECTIONS: dict[str, Callable[[int, int], Projection]] = {
    "count sketch": _CountSketch,
    "Rademacher": _Rademacher,
    "cached": lambda dim, seed: _Rademacher(dim, seed, cached=True),
    "two-sided": _TwoSided,
    "SRHT": _Srht,
}


def _seed(seed: int, name: str) -> int:
    return int(random_words(1, "benchmark", seed, name)[0] >> np.uint64(1))


def real_gradients(num_examples: int) -> dict[str, Tensor]:
    """Loss gradients [N, *shape] of every LoRA matrix, after ten steps of training."""
    from recipes.arithmetic import build

    trainer = build(
        smollm2(),
        None,
        output_dir="outputs/projection",
        num_rows=8,
        max_steps=10,
        per_device_train_batch_size=8,
        disable_tqdm=True,
        logging_steps=1000,
    )
    trainer.train()
    rows = data.ModelRows(trainer, trainer.train_dataset)
    every = max(1, len(rows) // num_examples)
    chosen = [rows[i] for i in range(0, len(rows), every)][:num_examples]
    collate = data.collate_function(trainer)
    parts: dict[str, list[Tensor]] = {}
    with (
        evaluation_mode(trainer.model),
        GradientHooks(trainer.model, lambda n, g: parts.setdefault(n, []).append(g.detach())),
    ):
        for start in range(0, len(chosen), 8):
            output = forward_label_logits(trainer.model, collate(chosen[start : start + 8]))
            SCALARS["loss"](output).sum().backward()
    return {name: torch.cat(pieces) for name, pieces in parts.items()}


def inner_products(vectors: Tensor) -> Tensor:
    """Of all pairs of different examples, divided by nothing: [N (N - 1) / 2]."""
    gram = vectors @ vectors.T
    first, second = torch.triu_indices(len(vectors), len(vectors), 1)
    return gram[first, second]


def main() -> None:
    """Print the table and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dims", default="256,512,1024")
    parser.add_argument("--num_examples", type=int, default=32)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    gradients = real_gradients(options.num_examples)
    count = len(next(iter(gradients.values())))
    num_parameters = sum(g[0].numel() for g in gradients.values())
    gram = sum(g.flatten(1).double() @ g.flatten(1).double().T for g in gradients.values())
    assert isinstance(gram, Tensor)
    norms = gram.diagonal().sqrt()
    first, second = torch.triu_indices(count, count, 1)
    exact, scale = gram[first, second], norms[first] * norms[second]
    print(f"{count} examples, {num_parameters:,} numbers each; {len(exact)} pairs")
    print(f"{'':14} {'D':>5}  ms/example  table MiB  error: median  95th percentile")
    lines = []
    for dim in map(int, options.dims.split(",")):
        for label, make in PROJECTIONS.items():
            projection = make(dim, 0)
            total, seconds = torch.zeros(count, dim), math.inf
            for _ in range(2):  # the first builds the tables
                start = time.perf_counter()
                total = sum(
                    (projection.project(name, g) for name, g in gradients.items()),
                    torch.zeros(count, dim),
                )
                seconds = min(seconds, time.perf_counter() - start)
            error = (inner_products(total.double()) - exact).abs() / scale
            line = {
                "projection": label,
                "dim": dim,
                "ms_per_example": 1000 * seconds / count,
                "table_mib": projection.table_bytes(num_parameters) / 2**20,
                "error_median": float(error.median()),
                "error_p95": float(error.quantile(0.95)),
            }
            lines.append(line)
            print(
                f"{label:14} {dim:5}  {line['ms_per_example']:10.2f}  {line['table_mib']:9.1f}  "
                f"{line['error_median']:13.4f}  {line['error_p95']:15.4f}",
                flush=True,
            )
    record = {
        "command": "python -m benchmarks.accuracy.projection_error",
        "examples": count,
        "parameters": num_parameters,
        "lines": lines,
    }
    write_atomically(RESULTS / "projection.json", to_json(record))


if __name__ == "__main__":
    main()
