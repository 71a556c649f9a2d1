"""Truth: the target's loss after really fine-tuning on many subsets and mixtures of tasks.

For each family one warm-up is trained on all tasks. From its checkpoint every mixture is trained to
the end, with several seeds, through the public interface alone: a ``FixedSelection`` and
``trainer.train(resume_from_checkpoint=...)``; the truth is the trainer's own ``eval_loss``. It
takes hours on a CPU; it can be stopped at any time and goes on where it stopped. Processes with
other seeds can run at the same time, with one thread each (OMP_NUM_THREADS=1).

    python -m benchmarks.accuracy.ground_truth [--families small,text] [--modes continue]
        [--seeds 1,2] [--rounds 2]
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import platform
import tempfile
import time
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import trl.trainer.utils
from peft import LoraConfig
from transformers import TrainerCallback
from transformers.utils import logging as transformers_logging
from trl import SFTConfig, SFTTrainer

from benchmarks import RESULTS
from benchmarks.families import FAMILIES, VARIANTS, with_fixed_hashes
from hf_auxselect import FixedSelection, TaskSelectionCallback, concatenate_tasks
from hf_auxselect.capture.memory import evaluation_mode
from hf_auxselect.capture.scalars import forward_label_logits
from hf_auxselect.files import to_json, write_atomically

TRUTH = RESULTS / "truth"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "hf_auxselect" / "truth"

ARGUMENTS: dict[str, Any] = {
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 16,
    "learning_rate": 1e-3,
    "logging_steps": 1000,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "bf16": False,
    "activation_checkpointing": False,
    "dataloader_pin_memory": False,
    "model_init_kwargs": {"dtype": "float32"},
}


def lora(family: str) -> dict[str, Any]:
    """Options of the family's adapter."""
    rank = FAMILIES[family].lora_rank
    return {"r": rank, "lora_alpha": 2 * rank, "target_modules": "all-linear"}


def make_trainer(
    family: str,
    directory: Path,
    callbacks: list[TrainerCallback],
    *,
    train_dataset: Any = None,
    eval_dataset: Any = None,
    **options: Any,
) -> SFTTrainer:
    """The trainer of a family; the adapter's initial values are the same in every run."""
    # Where TRL has Triton it leaves out the logits at positions without a label; on a CPU it does
    # not, and they take a third of the time. The losses are the same.
    trl.trainer.utils._use_triton = lambda device: True
    own = FAMILIES[family]
    torch.manual_seed(0)
    arguments = ARGUMENTS | {"max_steps": own.steps} | own.arguments | options
    return SFTTrainer(
        model=own.model(),
        args=SFTConfig(output_dir=str(directory), **arguments),
        train_dataset=(
            concatenate_tasks(own.training_tasks()) if train_dataset is None else train_dataset
        ),
        eval_dataset=own.make_target(0) if eval_dataset is None else eval_dataset,
        peft_config=LoraConfig(**lora(family)),
        callbacks=callbacks,
    )


class StopAt(TrainerCallback):
    """Ends the run at a step, with a checkpoint."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save and stop."""
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


def warm_up(family: str) -> Path:
    """The checkpoint at the switch, trained when it is first asked for."""
    step = FAMILIES[family].warm_up_steps
    checkpoint = CACHE / family / f"checkpoint-{step}"
    if not (checkpoint / "trainer_state.json").is_file():
        # One thread adds up in the same order every time. On another processor, which may round
        # otherwise, the warm-up ends elsewhere; agreement.py knows the digests.
        num_threads = torch.get_num_threads()
        torch.set_num_threads(1)
        make_trainer(family, CACHE / family, [StopAt(step)]).train()
        torch.set_num_threads(num_threads)
    return checkpoint


def digest(checkpoint: Path) -> str:
    """Of the adapter at a checkpoint: truth and gradients must start from the same one."""
    return hashlib.sha256((checkpoint / "adapter_model.safetensors").read_bytes()).hexdigest()[:16]


def mixtures(num_tasks: int, rounds: int) -> list[list[float]]:
    """32 mixtures a round: 16 subsets of 5 tasks, 10 of other sizes, 6 with weights."""
    return [mixture for seed in range(rounds) for mixture in _round_of_mixtures(num_tasks, seed)]


def _round_of_mixtures(num_tasks: int, seed: int) -> list[list[float]]:
    rng = np.random.default_rng(seed)

    def subset(size: int) -> np.ndarray:
        mask = np.zeros(num_tasks)
        mask[rng.choice(num_tasks, size, replace=False)] = 1
        return mask

    rows = [subset(5) for _ in range(16)]
    rows += [subset(num_tasks) if seed == 0 else subset(5)]
    rows += [subset(size) for size in (1, 2, 3, 4, 6, 7, 8, 9, 10)]
    rows += [subset(6) * rng.dirichlet(np.ones(num_tasks)) for _ in range(6)]
    return [(row / row.sum()).round(6).tolist() for row in rows]


def train_on(family: str, weights: dict[str, float], mode: str, seed: int) -> dict[str, Any]:
    """Fine-tune on one mixture from the warm-up's checkpoint and measure the target's loss."""
    callback = TaskSelectionCallback(
        warmup=FAMILIES[family].warm_up_steps,
        after=mode,
        selector=FixedSelection({k: w for k, w in weights.items() if w > 0}, estimate=False),
        seed=seed,
    )
    with tempfile.TemporaryDirectory() as directory:
        trainer = make_trainer(family, Path(directory), [callback])
        result = train_and_measure(family, trainer)
    return {"weights": [weights[name] for name in weights], "seed": seed} | result


def train_and_measure(family: str, trainer: SFTTrainer) -> dict[str, float]:
    """Train from the warm-up's checkpoint to the end: the target's loss and exact matches then."""
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=str(warm_up(family)))
    return {
        "loss": round(trainer.evaluate()["eval_loss"], 6),
        "exact_match": round(exact_match(trainer), 6),
        "seconds": round(time.perf_counter() - start, 1),
    }


def exact_match(trainer: SFTTrainer) -> float:
    """Share of the rows of the target whose completion greedy decoding gives, token by token."""
    matches: list[bool] = []
    with evaluation_mode(trainer.model), torch.no_grad():
        for batch in trainer.get_eval_dataloader():
            found = forward_label_logits(trainer.model, batch)
            right_L = (found.logits.argmax(1) == found.labels).float()
            matches += (found.mean_over_tokens(right_L) == 1).tolist()
    return float(np.mean(matches))


def switch_loss(family: str) -> float:
    """The target's loss at the switch."""
    with tempfile.TemporaryDirectory() as directory:
        trainer = make_trainer(family, Path(directory), [])
        trainer._load_from_checkpoint(str(warm_up(family)))
        return round(trainer.evaluate()["eval_loss"], 6)


def main() -> None:
    """Run what is missing of the plan, seed by seed, and write each run as it ends."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--families", default=",".join(f for f in FAMILIES if f not in VARIANTS), metavar="a,b"
    )
    parser.add_argument("--modes", default="continue,restart")
    parser.add_argument("--seeds", default="1,2", metavar="1,2")
    parser.add_argument("--rounds", type=int, default=1, help="of 32 mixtures each")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    for seed in map(int, options.seeds.split(",")):
        for mode in options.modes.split(","):
            # In turn, so that every family has something to compare with soon.
            families = [
                run_family(family, mode, seed, options.rounds)
                for family in options.families.split(",")
            ]
            for _ in itertools.zip_longest(*families):
                pass


def run_family(family: str, mode: str, seed: int, rounds: int) -> Iterator[None]:
    """Run the mixtures of one family, mode and seed, one at each step of the iterator."""
    path = TRUTH / f"{family}-{mode}.json"
    names = FAMILIES[family].tasks
    record: dict[str, Any] = {
        "family": family,
        "mode": mode,
        "tasks": list(names),
        "unit": "nats per label token, the trainer's eval_loss",
        "command": "python -m benchmarks.accuracy.ground_truth",
        "warm_up": digest(warm_up(family)),
        "warm_up_steps": FAMILIES[family].warm_up_steps,
        "steps": FAMILIES[family].steps,
        "arguments": ARGUMENTS | FAMILIES[family].arguments,
        "lora": lora(family),
        "versions": {p: version(p) for p in ("torch", "transformers", "trl", "peft", "accelerate")},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "runs": [],
    }
    if path.is_file():
        before = json.loads(path.read_text())
        if before["warm_up"] != record["warm_up"]:
            raise SystemExit(
                f"{path} was measured from another warm-up than {warm_up(family)}: remove the "
                "file to measure anew, or bring that checkpoint back."
            )
        record |= {name: before[name] for name in ("switch_loss", "runs")}
    else:
        record["switch_loss"] = switch_loss(family)
    done = {(tuple(run["weights"]), run["seed"]) for run in record["runs"]}
    for weights in mixtures(len(names), rounds):
        if (tuple(weights), seed) not in done:
            run = train_on(family, dict(zip(names, weights, strict=True)), mode, seed)
            if path.is_file():  # another process may have added to it
                record["runs"] = json.loads(path.read_text())["runs"]
            record["runs"].append(run)
            write_atomically(path, to_json(record))
            print(
                f"{family} {mode} seed {seed}: {run['loss']:.4f} ({run['seconds']:.0f} s)",
                flush=True,
            )
            yield


if __name__ == "__main__":
    with_fixed_hashes()
    main()
