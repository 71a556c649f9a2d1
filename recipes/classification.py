"""Classify texts of one domain with the help of other domains: a Trainer script, and three lines.

One domain is the target, each other one a task. An encoder with a classification head warms up on
all tasks, and goes on with the mixture for which the lowest loss of the target is estimated.
Without the lines marked with an arrow this is an ordinary ``Trainer`` script.

    python -m recipes.classification --data_dir DIR --target phones
    python -m recipes.classification --target telephone --model answerdotai/ModernBERT-base

DIR has a file ``TASK.jsonl`` for each task, and ``TARGET.heldout.jsonl``; a row has ``text`` and
``label`` (0, 1, ...). Without ``--data_dir`` the rows come from the Hub (``--dataset_name``,
``--task_column``, ``--text_column``, ``--label_column``, ``--heldout_split``). Without ``--model``
a small encoder is trained from scratch. ``--compare_seeds 3`` checks the choice by training;
``--confirm 3`` lets measured losses decide.
"""

from __future__ import annotations

import copy
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    EvalPrediction,
    HfArgumentParser,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_auxselect import SelectionReport, TaskSelectionCallback, concatenate_tasks
from recipes import comparison
from recipes.domains import DataArguments, Domains, load
from recipes.metrics import F1, Accuracy

SPECIAL_TOKENS = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]"}


@dataclass
class ModelArguments:
    """Which encoder is trained, and when tasks are selected."""

    model: str | None = field(
        default=None,
        metadata={"help": "encoder that gets a LoRA adapter; default: a small one, from scratch"},
    )
    max_length: int = field(default=128, metadata={"help": "tokens of a text, at most"})
    warmup: float = field(
        default=0.75, metadata={"help": "share of the steps on all tasks before the selection"}
    )
    confirm: int = field(
        default=0,
        metadata={"help": "number of candidate mixtures to train on; the best goes on; 0: none"},
    )
    compare_seeds: int = field(
        default=0,
        metadata={"help": "number of seeds to check the choice with by training; 0: only train"},
    )


@dataclass
class Arguments(TrainingArguments):
    """Those of the Trainer; the defaults are for the small encoder on a CPU."""

    output_dir: str | None = "outputs/classification"
    max_steps: int = 160
    per_device_train_batch_size: int = 32
    per_device_eval_batch_size: int = 32
    learning_rate: float = 1e-3
    logging_steps: float = 20
    save_strategy: str = "no"
    report_to: str = "none"
    dataloader_pin_memory: bool = False
    # Most classification heads do not divide by the number of labels of all processes, which the
    # Trainer relies on if this is True: their loss, and its gradient, would be twice that for two.
    average_tokens_across_devices: bool = False


def tokenized(domains: Domains, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Domains:
    """The same rows as token ids."""

    def encode(rows: dict[str, list[Any]]) -> dict[str, Any]:
        texts = [rows[name] for name in ("text", "text_pair") if name in rows]
        return dict(tokenizer(*texts, truncation=True, max_length=max_length))

    def of(dataset: Dataset) -> Dataset:
        texts = [name for name in dataset.column_names if name != "label"]
        return dataset.map(encode, batched=True, remove_columns=texts)

    tasks = {name: of(dataset) for name, dataset in domains.tasks.items()}
    return Domains(tasks, of(domains.target), of(domains.measured))


def words(texts: Iterable[str], min_count: int = 2) -> PreTrainedTokenizerFast:
    """A tokenizer of lower-case words, those that occur so often in the texts.

    Counted here because the trainers of ``tokenizers`` may give another vocabulary another time,
    and all runs of a comparison, and all processes, must have the same.
    """
    normalizer, splitter = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    counts: Counter[str] = Counter()
    for text in texts:
        split = splitter.pre_tokenize_str(normalizer.normalize_str(text))
        counts.update(word for word, _ in split)
    kept = sorted(word for word, count in counts.items() if count >= min_count)
    ids = {word: i for i, word in enumerate([*SPECIAL_TOKENS.values(), *kept])}
    core = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    core.normalizer, core.pre_tokenizer = normalizer, splitter
    core.post_processor = processors.BertProcessing(
        ("[SEP]", ids["[SEP]"]), ("[CLS]", ids["[CLS]"])
    )
    names = {f"{kind}_token": token for kind, token in SPECIAL_TOKENS.items()}
    return PreTrainedTokenizerFast(tokenizer_object=core, **names)


def small_encoder(tokenizer: PreTrainedTokenizerBase, num_labels: int) -> Any:
    """A new encoder, all parameters of which are trained; most are the words' vectors."""
    ids = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in SPECIAL_TOKENS}
    config = ModernBertConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_labels=num_labels,
        classifier_pooling="mean",
        bos_token_id=None,
        eos_token_id=None,
        **{name: value for name, value in ids.items() if name != "unk_token_id"},
    )
    return ModernBertForSequenceClassification(config)


def adapted_encoder(name: str, num_labels: int) -> Any:
    """A pretrained encoder with a LoRA adapter; its head is new, and trained as a whole."""
    model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=num_labels)
    heads = [
        part
        for part, module in model.named_children()
        if part != model.base_model_prefix and any(True for _ in module.parameters())
    ]
    lora = LoraConfig(
        task_type="SEQ_CLS",
        r=8,
        lora_alpha=16,
        target_modules="all-linear",
        modules_to_save=heads,  # captured and estimated like the adapter
    )
    return get_peft_model(model, lora)


def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Accuracy and macro F1 of an evaluation."""
    # With the Hub in reach, evaluate.load("accuracy") and evaluate.load("f1") do the same.
    logits, labels = prediction.predictions, prediction.label_ids
    classes = (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)
    accuracy: dict[str, float] = Accuracy().compute(predictions=classes, references=labels)
    f1: dict[str, float] = F1().compute(predictions=classes, references=labels, average="macro")
    return accuracy | f1


def build(
    domains: Domains,
    tokenizer: PreTrainedTokenizerBase,
    callback: TaskSelectionCallback | None,
    args: TrainingArguments,
    model: str | None = None,
) -> Trainer:
    """The trainer of this recipe, for tokenized domains, with or without the callback."""
    num_labels = domains.num_labels
    set_seed(args.seed)  # a new head or encoder is drawn
    return Trainer(
        model=adapted_encoder(model, num_labels) if model else small_encoder(tokenizer, num_labels),
        args=args,
        train_dataset=concatenate_tasks(domains.tasks),  # <- remembers each row's task
        eval_dataset=domains.target,  # <- the target
        processing_class=tokenizer,
        compute_metrics=compute_metrics,
        callbacks=[callback] if callback else [],  # <- selects, and switches
    )


Make = Callable[[TaskSelectionCallback, TrainingArguments], Trainer]


def compare(
    make: Make,
    options: ModelArguments,
    args: TrainingArguments,
    measured: Dataset,
    settings: Mapping[str, object],
) -> list[str]:
    """Train on the choice and on other mixtures with several seeds; lines of what was measured."""
    start, switch_step = time.perf_counter(), max(1, round(options.warmup * args.max_steps))

    def make_trainer(callback: TaskSelectionCallback, directory: Path, seed: int) -> Trainer:
        own = copy.copy(args)
        own.output_dir, own.seed = str(directory), seed
        own.set_save(strategy="steps", steps=switch_step)  # keeps the checkpoint at the switch
        return make(callback, own)

    def measure(trainer: Trainer) -> dict[str, float]:
        metrics = trainer.evaluate(measured)
        return {"loss": metrics["eval_loss"], "accuracy": metrics["eval_accuracy"]}

    comparing = comparison.Comparison(
        make=make_trainer,
        callback=lambda seed: TaskSelectionCallback(warmup=switch_step, confirm=options.confirm),
        measure=measure,
        rivals={
            comparison.ALL: comparison.all_tasks,
            "weights in random order": comparison.random_order,
            "most similar gradients (LESS)": comparison.most_similar,
        },
        output_dir=Path(str(args.output_dir)),
        settings=settings,
    )
    runs = [run for seed in range(options.compare_seeds) for run in comparing.run(seed)]
    directories = [comparing.directory("chosen", seed) for seed in range(options.compare_seeds)]
    reports = [SelectionReport.load(directory / "_task_selection") for directory in directories]
    return [
        f"Measured on {len(measured)} rows of the target that no run has seen ({args.max_steps} "
        f"steps each,",
        f"of which the first {switch_step} are shared); mean and standard error of "
        f"{options.compare_seeds} seed(s), loss in nats:",
        "",
        *comparison.summary(runs),
        f"Everything took {(time.perf_counter() - start) / 60:.1f} minutes; a selection "
        f"{reports[0].run['seconds']:.0f} seconds.",
        "",
        f"The report of seed 0: {directories[0] / '_task_selection' / 'report' / 'index.html'}",
    ]


def main() -> None:
    """Run the recipe from the command line."""
    parser = HfArgumentParser((DataArguments, ModelArguments, Arguments))
    data, options, args = parser.parse_args_into_dataclasses()
    if options.compare_seeds and (args.world_size > 1 or args.max_steps < 2):
        raise ValueError(
            f"--compare_seeds {options.compare_seeds} compares runs of one process and of "
            f"--max_steps 2 or more; got {args.world_size} process(es) and --max_steps "
            f"{args.max_steps}."
        )
    domains = load(data)
    if options.model:
        tokenizer = AutoTokenizer.from_pretrained(options.model)
    else:
        tokenizer = words(domains.training_texts())
    domains = tokenized(domains, tokenizer, options.max_length)

    def make(callback: TaskSelectionCallback, own: TrainingArguments) -> Trainer:
        return build(domains, tokenizer, callback, own, options.model)

    if options.compare_seeds:
        settings = asdict(data) | asdict(options) | args.to_sanitized_dict()
        unlike = ("compare_seeds", "output_dir", "run_name", "logging_dir")
        kept = {key: value for key, value in settings.items() if key not in unlike}
        print("\n" + "\n".join(compare(make, options, args, domains.measured, kept)))
        return
    callback = TaskSelectionCallback(warmup=options.warmup, confirm=options.confirm)
    trainer = make(callback, args)
    # FSDP and DeepSpeed prepare the model when training begins: the callback prints it then.
    if not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        trainer.accelerator.print(callback.preview(trainer))
    trainer.train()
    metrics = trainer.evaluate(domains.measured)
    if trainer.is_world_process_zero():
        print(f"target: loss {metrics['eval_loss']:.4f}, accuracy {metrics['eval_accuracy']:.1%}")
    trainer.save_model()


if __name__ == "__main__":
    main()
