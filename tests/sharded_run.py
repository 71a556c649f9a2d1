"""Run under torchrun by trainer/test_sharded.py: runs with whole and with sharded state.

It is started as ``sharded_run.py DIRECTORY CASE... [failure]``, and writes what each process
measured as JSON.
"""

import json
import os
import re
import shutil
import sys
import traceback
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", TRL_TELEMETRY="0")

import numpy as np
import tiny
import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from peft import get_peft_model

from hf_auxselect import LayerSelection, MixtureOptimization, concatenate_tasks
from hf_auxselect.capture.example_gradients import ExampleGradients
from hf_auxselect.sharding import is_sharded, local, shape_of, trainable_parameters, whole
from hf_auxselect.zero import ZeroOptimizer

WRAPPED = {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}


def adapted(**options: Any) -> Any:
    """A model with another adapter, made anew for each run."""
    return lambda: get_peft_model(tiny.llama(), tiny.lora(**options))


def few_tasks() -> Any:
    """Fewer tasks than processes, with different numbers of rows."""
    return tiny.tokenize(concatenate_tasks({"a": tiny.sums(9, 1), "b": tiny.sums(24, 2)}))


CASES: dict[str, dict[str, Any]] = {
    "ground-truth runs, gradient checkpointing": {
        "kind": "SFTTrainer",
        "callback": {"verify": 1, "calibrate": 2},
        "training": {"gradient_checkpointing": True},
    },
    "restart, SGD, LoRA on embedding and head, no wrapping": {
        "kind": "Trainer",
        "callback": {"after": "restart", "verify": 1},
        "training": {"optim": "sgd", "learning_rate": 0.1},
        "model": adapted(target_modules=["embed_tokens", "q_proj", "lm_head"]),
        "fsdp": {"auto_wrap_policy": "NO_WRAP"},
    },
    "finalists, activation checkpointing, accumulation": {
        "kind": "SFTTrainer",
        "callback": {"confirm": 3},
        # Accelerate's wrapper draws other dropout masks when a layer runs again.
        "training": {"gradient_accumulation_steps": 2, "peft_config": tiny.lora()},
        "fsdp": {"activation_checkpointing": True},
    },
    "observe, one by one, DoRA, offload": {
        "kind": "Trainer",
        "callback": {"after": "observe", "one_by_one": True},
        "model": adapted(target_modules=["q_proj", "v_proj"], use_dora=True),
        "fsdp": {"cpu_offload": True},
    },
    "frozen layers, DoRA, modules to save, layers stay gathered": {
        "kind": "Trainer",
        "callback": {"layers": LayerSelection(keep=1, training="freeze")},
        "model": adapted(
            target_modules=["q_proj", "up_proj"], use_dora=True, modules_to_save=["lm_head"]
        ),
        "fsdp": {"reshard_after_forward": False},
    },
    "few tasks": {
        "kind": "Trainer",
        "training": {"train_dataset": few_tasks()},
        "fsdp": {"auto_wrap_policy": "NO_WRAP"},
    },
    "bfloat16": {"kind": "SFTTrainer", "training": {"bf16": True}},
    "resumed from steps 2, 4, 6": {"kind": "SFTTrainer"},
    "resumed from step 4, of sharded files": {
        "kind": "Trainer",
        "callback": {"after": "restart"},
        "fsdp": {"state_dict_type": "SHARDED_STATE_DICT", "cpu_ram_efficient_loading": True},
    },
}


ZERO_CASES: dict[str, dict[str, Any]] = {
    "ZeRO-1, restart, SGD": {
        "kind": "Trainer",
        "callback": {"after": "restart", "verify": 1},
        "training": {"optim": "sgd", "learning_rate": 0.1},
        "zero": 1,
    },
    "ZeRO-2, ground-truth runs, gradient checkpointing": {
        "kind": "SFTTrainer",
        "callback": {"verify": 1, "calibrate": 2},
        "training": {"gradient_checkpointing": True},
        "zero": 2,
    },
    "ZeRO-2, frozen layers, head that is saved": {
        "kind": "Trainer",
        "callback": {"layers": LayerSelection(keep=1, training="freeze")},
        "model": adapted(target_modules=["q_proj", "up_proj"], modules_to_save=["lm_head"]),
        "zero": 2,
    },
    "ZeRO-2, optimizer and schedule of DeepSpeed": {
        "kind": "Trainer",
        "callback": {"verify": 1},
        "zero": 2,
        "config": {
            "optimizer": {
                "type": "AdamW",
                "params": dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")
                | {"torch_adam": True},
            },
        },
    },
    "ZeRO-3, finalists, accumulation": {
        "kind": "SFTTrainer",
        "callback": {"confirm": 3},
        "training": {"gradient_accumulation_steps": 2, "peft_config": tiny.lora()},
        "zero": 3,
    },
    "ZeRO-3, restart, ground-truth runs, frozen layers": {
        "kind": "Trainer",
        "callback": {
            "after": "restart",
            "verify": 1,
            "layers": LayerSelection(keep=1, training="freeze"),
        },
        "model": adapted(r=3),
        "zero": 3,
        "config": {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}},
    },
    "ZeRO-3, observe, DoRA, offload": {
        "kind": "Trainer",
        "callback": {"after": "observe"},
        "model": adapted(target_modules=["q_proj", "v_proj"], use_dora=True),
        "zero": 3,
        "config": {
            "zero_optimization": {
                "stage": 3,
                "offload_param": {"device": "cpu"},
                "offload_optimizer": {"device": "cpu"},
            }
        },
    },
    "ZeRO-2, few tasks, offload": {
        "kind": "Trainer",
        "training": {"train_dataset": few_tasks()},
        "zero": 2,
        "config": {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
    },
    "ZeRO-3, sharded when it is loaded": {
        "kind": "SFTTrainer",
        "training": {"peft_config": tiny.lora()},
        "from_disk": True,
        "zero": 3,
    },
    "ZeRO-3, few tasks": {
        "kind": "Trainer",
        "training": {"train_dataset": few_tasks()},
        "zero": 3,
    },
    "ZeRO-2, bfloat16": {"kind": "SFTTrainer", "training": {"bf16": True}, "zero": 2},
    "ZeRO-3, bfloat16": {"kind": "SFTTrainer", "training": {"bf16": True}, "zero": 3},
    "ZeRO-2, resumed from steps 4, 6": {"kind": "SFTTrainer", "zero": 2},
    "ZeRO-3, resumed from steps 2, 4, 6": {
        "kind": "Trainer",
        "callback": {"after": "restart"},
        "zero": 3,
    },
}
"""Under DeepSpeed, which need not be installed."""


def saved_model(directory: Path) -> Path:
    """Folder of a model, which the first process writes."""
    if dist.get_rank() == 0:
        tiny.llama().save_pretrained(directory / "model")
    dist.barrier()
    return directory / "model"


def sharding(case: dict[str, Any]) -> Any:
    """The context in which a case shards on a CPU."""
    return tiny.deepspeed_on_cpu() if "zero" in case else tiny.fsdp_on_cpu()


def run(directory: Path, case: dict[str, Any], *, sharded: bool, resume: Any = None) -> Any:
    options = {"save_strategy": "no", "report_to": "none"} | case.get("training", {})
    if "model" in case:
        options["model"] = case["model"]()
    elif "from_disk" in case:
        options["model"] = str(saved_model(directory.parent))
    if sharded and "zero" in case:
        config = tiny.deepspeed(case["zero"]) | case.get("config", {})
        options |= {"deepspeed": config, "use_cpu": True}
    elif sharded:
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
    if store.probes is not None:  # a change of a loss is rounded as the loss is
        arrays["vectors of end_changes"] = store.probes.loss_changes_ET + report.rows[0].loss
    for scalar in store.scalars:
        outputs, gradients = store.scalar(scalar)
        arrays |= {f"outputs of {scalar}": outputs, f"gradients of {scalar}": gradients}
    arrays["estimates"] = np.array([row.loss for row in report.rows])
    arrays["weights"] = np.array(list(report.weights.values()))
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


def compared(path: Path, case: dict[str, Any]) -> dict[str, Any]:
    """A run with sharded parameters, and the same one without."""
    expected = measured(*run(path / "whole", case, sharded=False))
    with sharding(case):
        trainer, callback = run(path / "sharded", case, sharded=True)
        found = measured(trainer, callback)
        return {
            "world_size": trainer.args.world_size,
            "share": share_of_state(trainer),
            "differences": {
                name: difference(array, found.get(name, np.empty(0)))
                for name, array in expected.items()
            },
        }


def share_of_state(trainer: Any) -> float:
    """Of all parameters, or of ZeRO's masters, how much this process holds, padding included."""
    parameters = list(trainer.model.parameters())
    held = [local(p) for p in parameters]
    zero = ZeroOptimizer.of(trainer.optimizer)
    if zero is not None and not is_sharded(trainer.model):
        parameters, held = [p for p in parameters if p.requires_grad], zero.masters
    return sum(p.numel() for p in held) / sum(shape_of(p).numel() for p in parameters)


def resumed(path: Path, case: dict[str, Any], steps: list[int]) -> dict[str, Any]:
    """A run with sharded parameters, and the same one, stopped and resumed at some steps."""
    case = case | {"training": {"save_strategy": "steps", "save_steps": 2, "max_steps": 8}}
    with sharding(case):
        expected = measured(*run(path / "unbroken", case, sharded=True))
    differences = {}
    for step in steps:
        if dist.get_rank() == 0:
            shutil.copytree(path / "unbroken", path / f"from {step}")
            for later in range(step + 2, 10, 2):
                shutil.rmtree(path / f"from {step}" / f"checkpoint-{later}")
        dist.barrier()
        with sharding(case):
            trainer, callback = run(path / f"from {step}", case, sharded=True, resume=True)
            found = measured(trainer, callback)
        differences[f"from step {step}"] = max(
            difference(array, found[name]) for name, array in expected.items()
        )
    return {
        "world_size": trainer.args.world_size,
        "share": share_of_state(trainer),
        "differences": differences,
    }


def fail_in_second_process(path: Path, case: dict[str, Any]) -> None:
    """A run in which the second process raises in the gradient pass."""
    capture = ExampleGradients.batches

    def batches(self: ExampleGradients, stream: str, rows: Any) -> Any:
        if dist.get_rank() == 1:
            raise RuntimeError("the second process fails")
        return capture(self, stream, rows)

    with sharding(case), mock.patch.object(ExampleGradients, "batches", batches):
        run(path, case, sharded=True)


def main(directory: Path, names: list[str], *, fails: bool) -> None:
    torch.set_num_threads(1)
    Figure.savefig = lambda figure, file, **options: file.write(b"\x89PNG")
    results: dict[str, Any] = {}
    for name in names:
        path = directory / re.sub(r"\W+", "_", name)
        case = (CASES | ZERO_CASES)[name]
        if "resumed" in name:
            steps = [int(step) for step in re.findall(r"\d+", name.partition("from step")[2])]
            results[name] = resumed(path, case, steps)
        else:
            results[name] = compared(path, case)
    (directory / f"rank{dist.get_rank()}.json").write_text(json.dumps(results, indent=1))
    if fails:
        fail_in_second_process(directory / "failure", case)


if __name__ == "__main__":
    try:
        names = [name for name in sys.argv[2:] if name != "failure"]
        main(Path(sys.argv[1]), names, fails="failure" in sys.argv)
    except BaseException:
        traceback.print_exc()
        tiny.leave(1)
    tiny.leave()
