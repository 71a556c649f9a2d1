"""Fine-tune on the tasks that help with three-term sums: a TRL script, and three lines.

There are ten tasks of reasoning-gym, some of which help the target, and one task whose answers are
shuffled. This is the script to copy: without the lines marked with an arrow it is an ordinary
``SFTTrainer`` script. It prints what the selection will cost, at the switch the estimates, and at
the end the target's loss.

    python -m recipes.arithmetic [--model NAME] [--output_dir DIR] [--after restart] [--max_steps N]
"""

from __future__ import annotations

import argparse
import random
from typing import Any

from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from hf_auxselect import TaskSelectionCallback, concatenate_tasks

TWO_DIGITS = {"min_digits": 1, "max_digits": 2}
TASKS: dict[str, tuple[str, dict[str, int]]] = {
    "sums of two": ("chain_sum", {"min_terms": 2, "max_terms": 2, **TWO_DIGITS}),
    "sums of four": ("chain_sum", {"min_terms": 4, "max_terms": 4, **TWO_DIGITS}),
    "decimals": ("decimal_chain_sum", {"min_terms": 2, "max_terms": 2, **TWO_DIGITS}),
    "products": ("products", {"min_terms": 2, "max_terms": 2, **TWO_DIGITS}),
    "equations": ("simple_equations", {}),
    "common divisors": ("gcd", {}),
    "common multiples": ("lcm", {}),
    "bits": ("count_bits", {"max_n": 1000}),
    "letters": ("letter_counting", {"min_words": 3, "max_words": 5}),
    "spelling backward": ("spell_backward", {"max_word_len": 8}),
}
ARGUMENTS: dict[str, Any] = {
    "max_steps": 60,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 16,
    "learning_rate": 1e-3,
    "logging_steps": 10,
    "save_strategy": "no",
    "report_to": "none",
    # For a CPU; a GPU does well with TRL's defaults:
    "bf16": False,
    "activation_checkpointing": False,
    "dataloader_pin_memory": False,
    "model_init_kwargs": {"dtype": "float32"},
}
TARGET = ("chain_sum", {"min_terms": 3, "max_terms": 3, **TWO_DIGITS})


def examples(task: tuple[str, dict[str, int]], num_rows: int, seed: int) -> Dataset:
    """Questions and answers of one generator, as prompts and completions."""
    import reasoning_gym

    name, options = task
    rows = reasoning_gym.create_dataset(name, size=num_rows, seed=seed, **options)
    return Dataset.from_list(
        [{"prompt": f"Q: {r['question']}\nA:", "completion": f" {r['answer']}"} for r in rows]
    )


def shuffled_answers(dataset: Dataset, seed: int) -> Dataset:
    """The same questions with one another's answers."""
    answers = list(dataset["completion"])
    random.Random(seed).shuffle(answers)
    return dataset.remove_columns("completion").add_column("completion", answers)


def training_tasks(num_rows: int, seed: int) -> dict[str, Dataset]:
    """The ten tasks, and one of sums with shuffled answers."""
    tasks = {
        name: examples(task, num_rows, seed + i) for i, (name, task) in enumerate(TASKS.items())
    }
    wrong = shuffled_answers(examples(TARGET, num_rows, seed + len(TASKS)), seed)
    return {**tasks, "shuffled answers": wrong}


def target_examples(num_rows: int, seed: int) -> Dataset:
    """Three-term sums; another seed gives other sums."""
    return examples(TARGET, num_rows, 1000 + seed)


def build(
    model: str,
    callback: TaskSelectionCallback | None,
    *,
    output_dir: str,
    num_rows: int = 64,
    seed: int = 0,
    **options: Any,
) -> SFTTrainer:
    """The trainer of this recipe, with or without the callback; options are those of SFTConfig."""
    train = concatenate_tasks(training_tasks(num_rows, seed))  # <- remembers each row's task
    return SFTTrainer(
        model=model,
        args=SFTConfig(output_dir=output_dir, **ARGUMENTS | options),
        train_dataset=train,
        eval_dataset=target_examples(num_rows, seed),  # <- the target
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
        callbacks=[callback] if callback else [],  # <- selects, and switches
    )


def main() -> None:
    """Run the recipe from the command line."""
    from recipes.models import smollm2

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="name or directory; default: SmolLM2 from PyPI")
    parser.add_argument(
        "--output_dir", default="outputs/arithmetic", help="for the adapter and _task_selection/"
    )
    parser.add_argument(
        "--after",
        default="continue",
        choices=["continue", "restart", "observe"],
        help="after the selection: go on, start again from the initial adapter, or only report",
    )
    parser.add_argument(
        "--max_steps", type=int, default=60, help="training steps; 40%% of them warm up"
    )
    options = parser.parse_args()
    callback = TaskSelectionCallback(warmup=0.4, after=options.after)
    trainer = build(
        options.model or smollm2(),
        callback,
        output_dir=options.output_dir,
        max_steps=options.max_steps,
    )
    # FSDP and DeepSpeed prepare the model when training begins: the callback prints it then.
    if not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        trainer.accelerator.print(callback.preview(trainer))
    trainer.train()
    print("target loss:", trainer.evaluate()["eval_loss"])
    trainer.save_model()


if __name__ == "__main__":
    main()
