"""Run under torchrun by trainer/test_sharded.py: runs with whole and with sharded parameters.

It is started as ``sharded_run.py DIRECTORY CASE...``, and writes what each process measured as JSON.
"""

import contextlib
import json
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", TRL_TELEMETRY="0")

import numpy as np
import tiny
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, DistributedType, PartialState
from matplotlib.figure import Figure
from peft import get_peft_model
from torch.distributed.tensor import DTensor

from hf_auxselect import GradExLogistic, LayerSelection, MixtureOptimization
from hf_auxselect.sharding import trainable_parameters, whole

WRAPPED = {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}


@contextlib.contextmanager
def fsdp_on_cpu() -> Iterator[None]:
    """Let Accelerate shard on a CPU, too, where it leaves models whole."""
    original = AcceleratorState.__init__

    def init(self: AcceleratorState, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        plugin = kwargs.get("fsdp_plugin")
        if plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, plugin
            if self._mixed_precision != "no":
                plugin.set_mixed_precision(self._mixed_precision)
            PartialState._shared_state["distributed_type"] = self.distributed_type

    with mock.patch.object(AcceleratorState, "__init__", init):
        try:
            yield
        finally:
            AcceleratorState._reset_state()
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_CPU


def adapted(**options: Any) -> Any:
    """A model with another adapter, made anew for each run."""
    return lambda: get_peft_model(tiny.llama(), tiny.lora(**options))


CASES: dict[str, dict[str, Any]] = {
    "Trainer": {"kind": "Trainer"},
    "SFTTrainer": {"kind": "SFTTrainer", "callback": {"verify": 1, "calibrate": 2}},
    "restart": {"kind": "Trainer", "callback": {"after": "restart", "verify": 1}},
    "observe": {"kind": "SFTTrainer", "callback": {"after": "observe"}},
    "confirm": {"kind": "SFTTrainer", "callback": {"confirm": 3}},
    "layers": {
        "kind": "Trainer",
        "callback": {"layers": LayerSelection(keep=1, training="freeze")},
    },
    "clusters": {"kind": "Trainer", "callback": {"clusters": 3, "estimator": GradExLogistic()}},
    "one by one": {"kind": "Trainer", "callback": {"one_by_one": True}},
    "accumulation": {"kind": "SFTTrainer", "training": {"gradient_accumulation_steps": 2}},
    "SGD": {"kind": "Trainer", "training": {"optim": "sgd", "learning_rate": 0.1}},
    "embedding": {
        "kind": "Trainer",
        "model": adapted(target_modules=["embed_tokens", "q_proj", "lm_head"]),
    },
    "DoRA": {"kind": "Trainer", "model": adapted(use_dora=True)},
    "modules to save": {
        "kind": "Trainer",
        "model": adapted(target_modules=["q_proj"], modules_to_save=["lm_head"]),
    },
    "gathered layers": {"kind": "SFTTrainer", "fsdp": {"reshard_after_forward": False}},
    "gradient checkpointing": {
        "kind": "SFTTrainer",
        "training": {"gradient_checkpointing": True},
    },
    "activation checkpointing": {"kind": "SFTTrainer", "fsdp": {"activation_checkpointing": True}},
    "offload": {"kind": "SFTTrainer", "fsdp": {"cpu_offload": True}},
    "no wrapping": {"kind": "SFTTrainer", "fsdp": {"auto_wrap_policy": "NO_WRAP"}},
    "bfloat16": {"kind": "SFTTrainer", "training": {"bf16": True}},
}


def run(directory: Path, case: dict[str, Any], *, sharded: bool, resume: Any = None) -> Any:
    options = {"save_strategy": "no", "report_to": "none"} | case.get("training", {})
    if "model" in case:
        options["model"] = case["model"]()
    if sharded:
        options |= {"fsdp": True, "fsdp_config": {"version": 2} | WRAPPED | case.get("fsdp", {})}
    selector = MixtureOptimization(risk_aversion=0)
    callback = tiny.callback(**{"selector": selector} | case.get("callback", {}))
    torch.manual_seed(3)
    trainer = tiny.TRAINERS[case["kind"]](directory, callback, **options)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, callback


def measured(trainer: Any, callback: Any) -> dict[str, np.ndarray]:
    """All that must be the same, by name."""
    report = callback.report
    store = report.gradients()
    arrays = {f"vectors of {name}": array for name, array in store.vectors.items()}
    for scalar in store.scalars:
        outputs, gradients = store.scalar(scalar)
        arrays |= {f"outputs of {scalar}": outputs, f"gradients of {scalar}": gradients}
    arrays["estimates"] = np.array([row.loss for row in report.rows])
    arrays["verification"] = np.array([one.measured for one in report.verification])
    arrays["evaluation"] = np.array([trainer.evaluate()["eval_loss"]])
    for name, p in trainable_parameters(trainer.model).items():
        arrays[f"parameter {name}"] = whole(p).float().numpy()
    return arrays


def difference(one: np.ndarray, other: np.ndarray) -> float:
    """Largest difference, relative to the largest number."""
    if one.shape != other.shape:
        return float("inf")
    return float(np.abs(one - other).max() / max(np.abs(one).max(), 1e-12)) if one.size else 0.0


def main(directory: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    Figure.savefig = lambda figure, file, **options: file.write(b"\x89PNG")
    results: dict[str, Any] = {}
    for name in names:
        case = CASES[name]
        path = directory / name.replace(" ", "_")
        trainer, callback = run(path / "whole", case, sharded=False)
        expected, weights = measured(trainer, callback), callback.report.weights
        with fsdp_on_cpu():
            trainer, callback = run(path / "sharded", case, sharded=True)
            found = measured(trainer, callback)
            parts = [p for p in trainer.model.parameters() if isinstance(p, DTensor)]
            results[name] = {
                "world_size": trainer.args.world_size,
                "is_sharded": bool(parts)
                and len(parts) == len(list(trainer.model.parameters()))
                and sum(p.to_local().numel() for p in parts)
                < 0.75 * sum(p.numel() for p in parts),
                "same_choice": callback.report.weights == weights,
                "differences": {
                    key: difference(expected[key], found.get(key, np.empty(0))) for key in expected
                },
            }
            del trainer, callback
    rank = dist.get_rank()
    (directory / f"rank{rank}.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), sys.argv[2:])
    except BaseException:
        traceback.print_exc()
        tiny.leave(1)
    tiny.leave()
