"""Fine-tune on rationales: which data sets of chains of thought help with StrategyQA, or GSM8K?

Each data set is a task; or, with ``--clusters n``, each of n clusters of rows with similar
gradients, as in the paper. Without the lines marked with an arrow this is an ordinary
``SFTTrainer`` script. At the end the model writes rationales for questions that it has not seen,
and the script counts the right answers.

    python -m recipes.chain_of_thought --config recipes/configs/chain_of_thought_cpu.yaml \
        [--target gsm8k] [--data_dir DIR] [--num_rows N] [--num_held_out N] [--max_new_tokens N] \
        [--warmup STEPS] [--max_steps N] [--examples_per_task N] [--clusters N] [--output_dir DIR]

``--compare_seeds N`` also trains on other mixtures from the checkpoint at the switch, with N seeds,
and prints a table of what was measured; ``--results FILE`` keeps it.

Source: Li et al., "Scalable Fine-tuning from Multiple Data Sources" (EMNLP Findings 2024).
"""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from datasets import Dataset
from transformers import AutoTokenizer
from trl import (
    ModelConfig,
    SFTConfig,
    SFTTrainer,
    TrlParser,
    get_peft_config,
    get_quantization_config,
)

from hf_auxselect import TaskSelectionCallback, cluster_tasks, concatenate_tasks
from recipes import comparison
from recipes.comparison import ALL, Comparison, ComparisonArguments
from recipes.metrics import AnswerAccuracy, CompletionMetric, generated, most_likely_tokens
from recipes.models import add_model_options
from recipes.rationales import Rationales, load

TEXT = ["prompt", "completion"]


@dataclass
class DataArguments:
    """Where rationales come from, and how many rows are read and generated."""

    target: str = field(default="strategyqa", metadata={"help": "the task to improve"})
    data_dir: str | None = field(
        default=None, metadata={"help": "folder of JSONL files; default: data sets on the Hub"}
    )
    num_rows: int = field(default=200, metadata={"help": "rows of each task, at most"})
    num_target: int = field(default=48, metadata={"help": "rows of the target for the selection"})
    num_held_out: int = field(
        default=64, metadata={"help": "further rows of the target, to measure loss and answers"}
    )
    include_target: bool = field(
        default=False, metadata={"help": "make the target's own training rows a task"}
    )
    max_new_tokens: int = field(
        default=96, metadata={"help": "tokens of a generated rationale, at most"}
    )


@dataclass
class SelectionArguments:
    """Options of the ``TaskSelectionCallback``."""

    warmup: int = field(default=24, metadata={"help": "steps on all tasks before the selection"})
    after: str = field(
        default="continue",
        metadata={"help": "continue, restart (from the initial adapter) or observe (only report)"},
    )
    examples_per_task: int = field(
        default=48, metadata={"help": "examples of each task that are captured, at most"}
    )
    clusters: int | None = field(
        default=None, metadata={"help": "number of clusters of rows; default: data sets are tasks"}
    )
    verify: int = field(
        default=0, metadata={"help": "number of ground-truth runs, to compare with the estimates"}
    )

    def callback(self, seed: int | None = None) -> TaskSelectionCallback:
        """The callback with these options."""
        return TaskSelectionCallback(**asdict(self), seed=seed)


def build(
    tasks: Dataset,
    target: Dataset,
    callback: TaskSelectionCallback | None,
    args: SFTConfig,
    model_args: ModelConfig,
) -> SFTTrainer:
    """The trainer of this recipe, with or without the callback."""
    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path)
    return SFTTrainer(
        model=model_args.model_name_or_path,
        args=args,
        train_dataset=tasks,
        eval_dataset=target.select_columns(TEXT),  # <- the target
        processing_class=tokenizer,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
        compute_metrics=CompletionMetric(AnswerAccuracy(), tokenizer),
        preprocess_logits_for_metrics=most_likely_tokens,
        callbacks=[callback] if callback else [],  # <- selects, and switches
    )


def measure(trainer: SFTTrainer, held_out: Dataset, max_new_tokens: int) -> dict[str, float]:
    """Loss of rows that no run has seen, and how many answers are right.

    ``answers`` counts those of generated rationales, ``answers, rationale given`` the most likely
    ones after the rationale of the data.
    """
    found = trainer.evaluate(held_out.select_columns(TEXT))
    texts = generated(
        trainer.model, trainer.processing_class, held_out["prompt"], max_new_tokens=max_new_tokens
    )
    accuracy = AnswerAccuracy().compute(predictions=texts, references=held_out["completion"])
    return {
        "loss": found["eval_loss"],
        "answers": accuracy["answer_accuracy"],
        "answers, rationale given": found["eval_answer_accuracy"],
    }


def compare(
    data: Rationales,
    tasks: Dataset,
    options: DataArguments,
    selection: SelectionArguments,
    comparing: ComparisonArguments,
    args: SFTConfig,
    model_args: ModelConfig,
) -> list[comparison.Run]:
    """Train on the chosen mixture and on others for the same steps; prints the measured table."""
    output_dir = Path(args.output_dir)

    def make(callback: TaskSelectionCallback, directory: Path, seed: int) -> SFTTrainer:
        own = replace(
            args,
            output_dir=str(directory),
            save_strategy="steps",  # keeps the checkpoint at the switch
            save_steps=selection.warmup,
            seed=seed,
        )
        rows = tasks
        if selection.clusters and not callback.clusters:  # a rival: its tasks are known
            found = output_dir / f"chosen-{seed}" / "_task_selection" / "clusters.json"
            labels = json.loads(found.read_text())["cluster_of_row"]
            rows = cluster_tasks(tasks.remove_columns("task"), labels)
        return build(rows, data.target, callback, own, model_args)

    settings = {
        "model": Path(str(model_args.model_name_or_path)).name,
        "rows": {name: len(rows) for name, rows in data.tasks.items()},
        "target": options.target,
        "num_target": options.num_target,
        "num_held_out": options.num_held_out,
        "max_new_tokens": options.max_new_tokens,
        "selection": asdict(selection),
        "max_steps": args.max_steps,
        "batch_size": args.per_device_train_batch_size,
        "learning_rate": args.learning_rate,
        "lora_r": model_args.lora_r,
    }
    comparison_of_mixtures = Comparison(
        make=make,
        callback=selection.callback,
        measure=lambda trainer: measure(trainer, data.held_out, options.max_new_tokens),
        rivals={
            ALL: comparison.all_tasks,
            "most similar gradients (LESS)": comparison.most_similar,
            "weights in random order": comparison.random_order,
        },
        output_dir=output_dir,
        settings=settings,
    )
    name = options.target + (" clusters" if selection.clusters else "")
    runs = comparison_of_mixtures.run_all(comparing, name)
    print(f"\nMeasured on {len(data.held_out)} rows of {options.target} that no run has seen:\n")
    print("\n".join(comparison.summary(runs)))
    return runs


def main() -> None:
    """Run the recipe from the command line."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    parser = TrlParser(
        (DataArguments, SelectionArguments, ComparisonArguments, SFTConfig, ModelConfig)
    )
    options, selection, comparing, args, model_args = parser.parse_args_and_config()
    comparing.check(args, selection.warmup)
    data = load(
        options.target,
        data_dir=options.data_dir,
        num_rows=options.num_rows,
        num_target=options.num_target,
        num_held_out=options.num_held_out,
        include_target=options.include_target,
    )
    add_model_options(args, model_args)
    tasks = concatenate_tasks(  # <- remembers each row's task
        {name: rows.select_columns(TEXT) for name, rows in data.tasks.items()}
    )
    if comparing.compare_seeds:
        compare(data, tasks, options, selection, comparing, args, model_args)
        return
    callback = selection.callback()
    trainer = build(tasks, data.target, callback, args, model_args)
    # FSDP and DeepSpeed prepare the model when training begins: the callback prints it then.
    if not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        trainer.accelerator.print(callback.preview(trainer))
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    measured = measure(trainer, data.held_out, options.max_new_tokens)
    if callback.report is not None:
        trainer.accelerator.print(f"chosen: {comparison.shares(callback.report.weights)}")
    trainer.accelerator.print(
        f"target loss: {measured['loss']:.4f}; right answers: {measured['answers']:.1%} of "
        f"{len(data.held_out)}, {measured['answers, rationale given']:.1%} after the rationales of "
        "the data"
    )
    trainer.save_model()


if __name__ == "__main__":
    main()
