"""Run under torchrun by trainer/test_two_processes.py: writes what each process saw as JSON."""

import errno
import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import numpy as np
import tiny
import torch
import torch.distributed as dist
from peft import get_peft_model
from transformers import BertConfig, BertForSequenceClassification

from hf_auxselect import (
    FixedSelection,
    GradExLogistic,
    LayerSelection,
    TaskSelectionCallback,
    UnsupportedLossError,
    capture_gradients,
)
from hf_auxselect.capture.batching import TaskExamples
from hf_auxselect.capture.probes import measure_probes
from hf_auxselect.files import write_atomically
from hf_auxselect.trainer.access import preserved_rng


def digest(weights: dict[str, torch.Tensor]) -> str:
    content = b"".join(weights[name].numpy().tobytes() for name in sorted(weights))
    return hashlib.sha256(content).hexdigest()


def error_of_full_disk(output: Path, name: str) -> str:
    """The error of a run whose main process finds no space to write a file."""

    def write(path: Path, content: Any) -> None:
        if path.name == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_atomically(path, content)

    callback = TaskSelectionCallback(
        warmup=1, after="restart", selector=FixedSelection(["a"], estimate=False)
    )
    trainer = tiny.sft_trainer(output / name, callback, max_steps=2)
    written = write if dist.get_rank() == 0 else write_atomically
    with mock.patch("hf_auxselect.run_directory.write_atomically", written):
        try:
            trainer.train()
        except OSError as error:
            return str(error)
    return "none"


def classifier() -> BertForSequenceClassification:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    config = BertConfig(vocab_size=len(tiny.VOCABULARY), num_attention_heads=2, **sizes)
    return BertForSequenceClassification(config)


def classified(rows: list[Any]) -> dict[str, torch.Tensor]:
    batch = tiny.collate(rows)
    return batch | {"labels": batch["input_ids"].sum(1) % 2}


def main(output: Path) -> None:
    torch.set_num_threads(1)
    result: dict = {"leaks": {}, "exported": {}}
    for kind, make in tiny.TRAINERS.items():
        for workers in (0, 2):
            for accumulation in (1, 3):
                if kind == "SFTTrainer" and workers:
                    continue  # data are loaded as in Trainer
                callback = TaskSelectionCallback(
                    warmup=4, selector=FixedSelection(["a", "c"]), projection_dim=16
                )
                name = f"{kind}/{workers}/{accumulation}"
                trainer = make(
                    output / name,
                    callback,
                    dataloader_num_workers=workers,
                    gradient_accumulation_steps=accumulation,
                )
                seen = tiny.spy(trainer)
                trainer.train()
                result["leaks"][name] = seen
                result["exported"][name] = callback.report.export("rows")
    result["world_size"] = trainer.args.world_size

    # Four finalists, two of which are paused.
    callback = TaskSelectionCallback(warmup=4, projection_dim=16, confirm=4, verify=1)
    trainer = tiny.sft_trainer(output / "trained", callback)
    trainer.train()
    result["weights"] = digest(tiny.weights(trainer))
    result["measured at the switch"] = callback.report.verification[0].measured
    result["measured at the end"] = trainer.evaluate()["eval_loss"]
    result["race"] = [one.losses for one in callback.report.confirmation.finalists]

    callback = TaskSelectionCallback(
        warmup=4,
        projection_dim=16,
        estimator=GradExLogistic(),
        clusters=3,
        layers=LayerSelection(keep=1, training="freeze"),
    )
    trainer = tiny.plain_trainer(output / "clusters", callback)
    trainer.train()
    result["clusters"] = {
        "tasks": callback.report.weights,
        "layers": callback.report.layers,
        "weights": digest(tiny.weights(trainer)),
    }

    # Without a learning rate the weights at the switch do not depend on the number of processes.
    # A group does not change what is chosen for the target.
    callback = TaskSelectionCallback(
        target="target", groups=["letters"], warmup=4, projection_dim=16
    )
    sets = {"target": tiny.sums(16, 9), "letters": tiny.sums(11, 7, letters=True)}
    trainer = tiny.sft_trainer(output / "selection", callback, learning_rate=0, eval_dataset=sets)
    trainer.train()
    result["selection"] = {
        "weights": callback.report.weights,
        "rows": [row.loss for row in callback.report.rows],
        "group": [row.group_losses["letters"] for row in callback.report.rows],
    }
    result["logged of the group"] = trainer.evaluate()["eval_letters_loss"]

    # Evaluation batches that differ in label tokens, and a part of one.
    result["estimated"], result["logged"] = {}, {}
    for kind, make in tiny.TRAINERS.items():
        rows = tiny.sums(11, 9)
        callback = TaskSelectionCallback(warmup=4, projection_dim=16, estimator=GradExLogistic())
        trainer = make(
            output / f"estimated-{kind}",
            callback,
            learning_rate=0,
            eval_dataset=rows if kind == "SFTTrainer" else tiny.tokenize(rows),
            per_device_eval_batch_size=2,
        )
        trainer.train()
        result["estimated"][kind] = callback.report.row("no further training").loss
        result["logged"][kind] = trainer.evaluate()["eval_loss"]

    # A head that divides by its own labels, in a trainer that takes it to divide by those of all.
    result["heads"] = {}
    for averages in (True, False):
        callback = TaskSelectionCallback(warmup=1, projection_dim=16, estimator=GradExLogistic())
        trainer = tiny.plain_trainer(
            output / f"head-{averages}",
            callback,
            model=classifier(),
            data_collator=classified,
            average_tokens_across_devices=averages,
            max_steps=2,
        )
        try:
            trainer.train()
            result["heads"][str(averages)] = "none"
        except UnsupportedLossError as error:
            result["heads"][str(averages)] = str(error)

    result["errors"] = {
        name: error_of_full_disk(output / "full", name)
        for name in ("plan.json", "initial_adapter.safetensors", "selection.json", "rows.jsonl")
    }

    # Uneven shards: the pass of both processes against that of one, on the same model.
    model = get_peft_model(tiny.llama(), tiny.lora())
    tasks = {name: list(tiny.tokenize(tiny.sums(n, n))) for name, n in {"x": 70, "y": 33}.items()}
    target = list(tiny.tokenize(tiny.sums(5, 9)))

    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad])

    def examples_of(name: str, rows: list[Any]) -> TaskExamples:
        return TaskExamples(name=name, rows=rows, example_ids=range(len(rows)), num_rows=len(rows))

    def capture(directory: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        with preserved_rng():
            store = capture_gradients(
                model,
                tasks,
                target,
                tiny.collate,
                directory=directory,
                optimizer=optimizer,
                layers=LayerSelection(keep=1.0),
                progress=False,
            )
            mean = store.scalar("loss@optimizer")[1].mean(0)
            ahead = measure_probes(
                model,
                [examples_of(name, rows) for name, rows in tasks.items()],
                examples_of("target", target),
                tiny.collate,
                store,
                -mean,
                np.outer([-2.0, 1.0], mean),
                directory=directory,
                optimizer=optimizer,
                batch_size=4,
                progress=False,
            )
        changes = [ahead.vectors[name].ravel() for name in ("gradient_changes", "end_changes")]
        return store.gradients, np.concatenate(changes), store.vectors["layer_gram"]

    shared, shared_changes, shared_layers = capture(output / "shared")
    dist.barrier()
    rank = dist.get_rank()
    dist.destroy_process_group()
    alone, changes, layers = capture(output / f"alone{rank}")
    result["largest_difference"] = float(np.abs(shared - alone).max())
    result["largest_change"] = float(np.abs(changes).max())
    result["largest_difference_of_changes"] = float(np.abs(shared_changes - changes).max())
    result["largest_relative_difference_of_layers"] = float(
        np.abs(shared_layers - layers).max() / np.abs(layers).max()
    )
    (output / f"rank{rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    tiny.leave()
