"""Train a causal language model on blocks of text: a Trainer script as it is without a selection.

It tokenizes the texts, drops their columns, and cuts the tokens into blocks, as ``run_clm.py`` of
the examples of Transformers does. ``causal_lm.patch`` adds the selection; see README.md here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from datasets import load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    default_data_collator,
)


@dataclass
class ScriptArguments:
    """Model and data; the training's own arguments are those of TrainingArguments."""

    model_name_or_path: str = field(metadata={"help": "name or directory of the model"})
    train_files: list[str] = field(metadata={"help": "JSON files with a column 'text'"})
    validation_file: str = field(metadata={"help": "JSON file of the texts that are evaluated"})
    block_size: int = field(default=512, metadata={"help": "tokens of a training example"})


def main() -> None:
    """Train, and evaluate."""
    parser = HfArgumentParser((ScriptArguments, TrainingArguments))
    script_args, training_args = parser.parse_args_into_dataclasses()
    size = script_args.block_size
    tokenizer = AutoTokenizer.from_pretrained(script_args.model_name_or_path)
    model = AutoModelForCausalLM.from_pretrained(script_args.model_name_or_path)
    raw_datasets = load_dataset(
        "json",
        data_files={"train": script_args.train_files, "validation": script_args.validation_file},
    )

    def tokenize(texts: dict[str, list[str]]) -> Any:
        return tokenizer(texts["text"])

    def cut_into_blocks(texts: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        tokens = list(chain.from_iterable(texts["input_ids"]))  # of up to 1,000 texts
        blocks = [tokens[i : i + size] for i in range(0, len(tokens) - size + 1, size)]
        return {"input_ids": blocks, "labels": blocks}

    tokenized_datasets = raw_datasets.map(
        tokenize, batched=True, remove_columns=raw_datasets["train"].column_names
    )
    lm_datasets = tokenized_datasets.map(
        cut_into_blocks, batched=True, remove_columns=tokenized_datasets["train"].column_names
    )
    train_dataset = lm_datasets["train"]
    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=lm_datasets["validation"],
        processing_class=tokenizer,
        data_collator=default_data_collator,
    )
    trainer.train()
    trainer.save_model()
    print("loss:", trainer.evaluate()["eval_loss"])


if __name__ == "__main__":
    main()
