"""The gradient pass of other packages, through their public interfaces: bergson and dattri-llm.

Each is a context manager that attaches a package's hooks to a PEFT model and gives a function which
runs a batch, by its row numbers, and returns what the package would store of it, in parts
[B, ...]. ``losses`` maps row numbers to the losses [B] of the examples; it is the same function for
every package, so that the forward costs the same.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn

Row = dict[str, list[int]]
LossesFn = Callable[[Sequence[int]], Tensor]
RunFn = Callable[[Sequence[int]], list[Tensor]]


@contextlib.contextmanager
def bergson(
    model: Any, rows: list[Row], losses: LossesFn, *, own_loop: bool = False, **projection: Any
) -> Iterator[RunFn]:
    """Bergson's collector; ``own_loop``: its forward, too, with logits at every position.

    ``projection`` are options of its ``GradientProcessor``.
    """
    from bergson import CollectorComputer, GradientProcessor, IndexConfig, InMemoryCollector
    from bergson.utils.peft import detect_peft_modules

    logging.disable(logging.INFO)  # it names every module
    data = Dataset.from_list([row | {"length": len(row["input_ids"])} for row in rows])
    with tempfile.TemporaryDirectory() as directory:
        config = IndexConfig(
            run_path=f"{directory}/index",
            projection_dim=projection.get("projection_dim", 0),
            loss_reduction="mean",
        )
        os.makedirs(config.partial_run_path)
        collector = InMemoryCollector(
            model=model.base_model,
            cfg=config,
            # As its own callback does for LoRA; version 2.5.1 reads the option nowhere.
            processor=GradientProcessor(reshape_to_square=True, **projection),
            target_modules=detect_peft_modules(model),
            data=data,
        )

        def run(indices: Sequence[int]) -> list[Tensor]:
            if own_loop:
                CollectorComputer(
                    model=model, data=data, collector=collector, cfg=config, batches=[[*indices]]
                ).run_with_collector_hooks(desc="")
            else:
                with collector.with_batch():
                    values = losses(indices)
                    values.sum().backward()
                model.zero_grad()
                collector.process_batch([*indices], losses=values)
            return [torch.from_numpy(collector.builder.grad_buffer[[*indices]])]

        yield run


@contextlib.contextmanager
def dattri_llm(
    model: nn.Module, rows: list[Row], losses: LossesFn, **projection: Any
) -> Iterator[RunFn]:
    """The hooks of dattri-llm; ``projection`` are its options for every layer, if any."""
    from dattri_llm import CaptureCallback, HookManager, HookManagerConfig

    callback = CaptureCallback()
    manager = HookManager(
        model,
        config=HookManagerConfig(
            linear_io=[r"lora_[AB]\."],
            capture_style="materialized",
            projection_kwargs={"__default__": projection} if projection else None,
        ),
        callbacks=[callback],
    )

    def run(indices: Sequence[int]) -> list[Tensor]:
        with manager.collect():
            losses(indices).sum().backward()
        model.zero_grad()
        return [*callback.record.gradient.data.values()]

    yield run
    manager.remove()
