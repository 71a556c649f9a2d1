"""Instruction tuning: which of many instruction tasks teach a target skill?

A TRL script with its usual command line and YAML, and three lines. Tasks are the entries of
``datasets:``, the values of a column (``--dataset_name`` and ``--task_column``), or the JSONL files
of a folder (``--data_dir``). ``--compare_seeds N`` checks the choice by training with N seeds on
other mixtures: all tasks, the two tasks with the most similar gradients, and the chosen weights in
a random order.

    python -m recipes.instruction --config recipes/configs/instruction.yaml
    python -m recipes.instruction --config recipes/configs/instruction_cpu.yaml [--data_dir DIR]
"""

from __future__ import annotations

import copy
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path

from datasets import Dataset, load_dataset
from transformers import Trainer
from trl import (
    DatasetMixtureConfig,
    ModelConfig,
    ScriptArguments,
    SFTConfig,
    SFTTrainer,
    TrlParser,
    get_dataset,
    get_peft_config,
    get_quantization_config,
)

from hf_auxselect import TaskSelectionCallback, concatenate_tasks
from recipes.comparison import (
    ALL,
    Comparison,
    ComparisonArguments,
    all_tasks,
    most_similar,
    random_order,
    summary,
)
from recipes.metrics import CompletionMetric, ExactMatch, most_likely_tokens
from recipes.models import add_model_options

COLUMNS = {"input": "prompt", "output": "completion"}
"""Columns of Super-NaturalInstructions on the Hub -> those of TRL."""


@dataclass
class DataArguments:
    """Where tasks and target are."""

    target: str = field(
        metadata={"help": "The target: a data set on the Hub; with --data_dir, a file's name."}
    )
    target_split: str = field(default="test", metadata={"help": "Split of a target on the Hub."})
    data_dir: Path | None = field(
        default=None,
        metadata={
            "help": "Folder of JSONL files with `prompt` and `completion`, instead of the Hub: "
            "TASK.jsonl for each entry of `datasets:` (all files, if there is none), and "
            "TARGET.heldout.jsonl."
        },
    )
    task_column: str | None = field(
        default=None, metadata={"help": "Column of --dataset_name with each row's task."}
    )
    rows_per_task: int | None = field(default=None, metadata={"help": "Rows of a task, at most."})
    target_rows: int = field(default=64, metadata={"help": "Rows of the target for the selection."})
    test_rows: int = field(
        default=200, metadata={"help": "Further rows of the target, to measure the result."}
    )


@dataclass
class SelectionArguments:
    """Options of the callback."""

    warmup: float = field(
        default=0.2, metadata={"help": "Share of the run, or steps, before the selection."}
    )
    examples_per_task: int = field(
        default=64, metadata={"help": "Examples of each task that are captured, at most."}
    )
    confirm: int = field(
        default=0,
        metadata={"help": "Number of candidate mixtures to train on; the best goes on; 0: none."},
    )

    def callback(self, seed: int | None = None) -> TaskSelectionCallback:
        """The callback with these options."""
        return TaskSelectionCallback(
            warmup=self.warmup if self.warmup < 1 else int(self.warmup),
            examples_per_task=self.examples_per_task,
            confirm=self.confirm,
            seed=seed,
        )


def load_tasks(
    script: ScriptArguments, mixture: DatasetMixtureConfig, data: DataArguments
) -> Dataset:
    """The training set with a task column, from wherever the tasks are."""
    if data.data_dir is not None:
        names = [_name(entry.path) for entry in mixture.datasets] or sorted(
            path.stem for path in data.data_dir.glob("*.jsonl") if ".heldout" not in path.name
        )
        tasks = {
            name: _of_file(data.data_dir / f"{name}.jsonl", "--data_dir")
            for name in names
            if name != _name(data.target)
        }
        if not tasks:
            raise ValueError(f"--data_dir: there are no tasks (*.jsonl) in {str(data.data_dir)!r}.")
    elif mixture.datasets:
        tasks = {
            entry.path: _prompts(get_dataset(DatasetMixtureConfig(datasets=[entry]))["train"])
            for entry in mixture.datasets
        }
    elif script.dataset_name and data.task_column:
        rows = load_dataset(script.dataset_name, split=script.dataset_train_split)
        rows_of: dict[str, list[int]] = {}
        for row, name in enumerate(rows[data.task_column]):
            rows_of.setdefault(name, []).append(row)
        rows = rows.remove_columns(data.task_column)
        tasks = {name: rows.select(rows_of[name]) for name in sorted(rows_of)}
    else:
        raise ValueError(
            "there are no tasks: give --data_dir, or datasets: in the YAML file, or --dataset_name "
            "with --task_column."
        )
    most = data.rows_per_task
    return concatenate_tasks(  # <- remembers each row's task
        {
            name: rows.select(range(min(most or len(rows), len(rows))))
            for name, rows in tasks.items()
        }
    )


def load_target(data: DataArguments) -> tuple[Dataset, Dataset]:
    """Rows of the target for the selection, and others for the final measurement."""
    if data.data_dir is None:
        rows = _prompts(load_dataset(data.target, split=data.target_split))
    else:
        rows = _of_file(data.data_dir / f"{_name(data.target)}.heldout.jsonl", "--target")
    if len(rows) <= data.target_rows:
        raise ValueError(
            f"--target_rows {data.target_rows}: the target has {len(rows)} rows, and some must be "
            "left for the final measurement; give a smaller number."
        )
    last = min(data.target_rows + data.test_rows, len(rows))
    first = range(data.target_rows)
    return rows.select(first), rows.select(range(data.target_rows, last))


def _name(path: str) -> str:
    """The name of a data set, without its user's on the Hub."""
    return path.rpartition("/")[2]


def _of_file(path: Path, argument: str) -> Dataset:
    if not path.is_file():
        known = sorted(file.name for file in path.parent.glob("*.jsonl"))
        raise ValueError(f"{argument}: there is no {str(path)!r}; the folder has {known}.")
    return _prompts(load_dataset("json", data_files=str(path), split="train"))


def _prompts(rows: Dataset) -> Dataset:
    """Rows with the columns ``prompt`` and ``completion``, or ``messages``, alone."""
    names = {old: new for old, new in COLUMNS.items() if old in rows.column_names}
    rows = rows.rename_columns(names)
    kept = [name for name in ("prompt", "completion", "messages") if name in rows.column_names]
    return rows.select_columns(kept)


def build(
    model: ModelConfig,
    training: SFTConfig,
    train: Dataset,
    target: Dataset,
    callback: TaskSelectionCallback,
) -> SFTTrainer:
    """The trainer of this recipe."""
    trainer = SFTTrainer(
        model=model.model_name_or_path,
        args=training,
        train_dataset=train,
        eval_dataset=target,  # <- the target
        quantization_config=get_quantization_config(model),
        peft_config=get_peft_config(model),
        preprocess_logits_for_metrics=most_likely_tokens,
        callbacks=[callback],  # <- selects, and switches
    )
    trainer.compute_metrics = CompletionMetric(ExactMatch(), trainer.processing_class)
    return trainer


def main() -> None:
    """Run the recipe from the command line."""
    parser = TrlParser(
        (
            ScriptArguments,
            DatasetMixtureConfig,
            DataArguments,
            SelectionArguments,
            ComparisonArguments,
            SFTConfig,
            ModelConfig,
        )
    )
    script, mixture, data, selection, comparing, training, model = parser.parse_args_and_config()
    comparing.check(training, selection.warmup)
    warnings.filterwarnings("ignore", category=FutureWarning)
    train = load_tasks(script, mixture, data)
    target, test = load_target(data)
    add_model_options(training, model)
    if not comparing.compare_seeds:
        callback = selection.callback()
        trainer = build(model, training, train, target, callback)
        # FSDP and DeepSpeed prepare the model when training begins: the callback prints it then.
        if not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
            trainer.accelerator.print(callback.preview(trainer))
        trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
        measured = _measure(trainer, test)
        trainer.accelerator.print(
            f"target loss: {measured['loss']:.4f}; exact match: {measured['exact match']:.1%} of "
            f"{len(test)} rows that the run has not seen"
        )
        trainer.save_model()
        return

    def make(callback: TaskSelectionCallback, directory: Path, seed: int) -> Trainer:
        own = copy.copy(training)
        own.output_dir, own.seed, own.save_strategy = str(directory), seed, "steps"
        own.save_steps = callback.warmup  # the other runs start from the checkpoint at the switch
        return build(model, own, train, target, callback)

    settings = {
        "data": asdict(data) | {"data_dir": data.data_dir and data.data_dir.name},
        "selection": asdict(selection),
        "max_steps": training.max_steps,
        "batch_size": training.per_device_train_batch_size,
        "learning_rate": training.learning_rate,
        "lora_r": model.lora_r,
        "model": Path(str(model.model_name_or_path)).name,
    }
    comparison = Comparison(
        make=make,
        callback=selection.callback,
        measure=lambda trainer: _measure(trainer, test),
        rivals={
            ALL: all_tasks,
            "most similar gradients (LESS)": most_similar,
            "weights in random order": random_order,
        },
        output_dir=Path(training.output_dir),
        settings=settings,
    )
    runs = comparison.run_all(comparing, _name(data.target))
    print(f"\n{_name(data.target)}, {len(test)} rows that no run has seen; nats per label token:\n")
    print("\n".join(summary(runs)))


def _measure(trainer: Trainer, test: Dataset) -> dict[str, float]:
    """Loss and metric of rows that no run has seen."""
    measured = trainer.evaluate(test)
    return {"loss": measured["eval_loss"], "exact match": measured["eval_exact_match"]}


if __name__ == "__main__":
    main()
