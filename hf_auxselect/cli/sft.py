"""``sft``: TRL's ``sft`` with its flags and YAML; each entry of ``datasets:`` is a task."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import trl
from datasets import Dataset, load_dataset
from packaging.version import Version
from transformers import set_seed
from yaml import YAMLError

from hf_auxselect import TaskSelectionCallback, concatenate_tasks
from hf_auxselect.cli.options import UsageError
from hf_auxselect.cli.sft_arguments import SelectionArguments
from hf_auxselect.cli.sources import TaskMixture, load, target_entry
from hf_auxselect.cli.stored import show_json

DESCRIPTION = """\
Trains with TRL's sft, and selects the tasks that lower the target's loss most on the way. Takes the
flags and the YAML file (--config FILE) of trl sft. Each entry of datasets: is a task, named by its
path and name, or by a further key task:. Without datasets:, the tasks are those of a column of
--dataset_name (--task_column)."""

EXAMPLE = (
    "example: hf-auxselect sft --model_name_or_path my/model --datasets my/gsm my/code "
    "--target my/gsm:test --use_peft"
)


def run(arguments: Sequence[str]) -> None:
    """Train; the process's rank and world size are those of its launcher.

    Raises:
        UsageError: a flag, or a key of the YAML file, is unknown or wrong.
    """
    parser = trl.TrlParser(
        (trl.ScriptArguments, trl.SFTConfig, trl.ModelConfig, TaskMixture, SelectionArguments),
        prog="hf-auxselect sft",
        description=DESCRIPTION,
        epilog=EXAMPLE,
    )
    try:
        script, training, model, mixture, selection = parser.parse_args_and_config(arguments)
    except (TypeError, ValueError, YAMLError) as error:  # of TRL and of its configurations
        raise UsageError(str(error)) from error
    # What training prints must not stand among the JSON.
    with contextlib.redirect_stdout(sys.stderr if selection.json else sys.stdout):
        trainer, callback = make_trainer(script, training, model, mixture, selection)
        trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
        trainer.save_model(training.output_dir)
        if training.push_to_hub:
            trainer.push_to_hub(dataset_name=script.dataset_name)
        is_main = trainer.is_world_process_zero()
        if Version(version("transformers")) >= Version("5.18"):
            trainer.end()  # trackers and process group, as in TRL's script
        if training.world_size > 1:
            # PyTorch frees a gloo group with the GIL held, and joins a thread of it that may still
            # need the GIL to put its last operation away: a deadlock, unless that comes first.
            time.sleep(1.0)
    if selection.json and is_main and callback.report is not None:
        show_json(callback.report.to_dict())


def make_trainer(
    script: Any, training: Any, model: Any, mixture: TaskMixture, selection: SelectionArguments
) -> tuple[Any, TaskSelectionCallback]:
    """The trainer that ``trl sft`` makes of its arguments, with a callback.

    Args:
        script: TRL's ``ScriptArguments``.
        training: TRL's ``SFTConfig``, whose ``model_init_kwargs`` are completed.
        model: TRL's ``ModelConfig``.
        mixture: the tasks.
        selection: target and options of the callback.
    """
    if not model.model_name_or_path:
        raise UsageError("there is no model: give --model_name_or_path.")
    callback = selection.callback(mixture.sources)
    train, target = _load(script, training, mixture, selection)
    settings = vars(model) | vars(training)  # trust_remote_code has moved between them
    options = {
        "revision": model.model_revision,
        "trust_remote_code": settings["trust_remote_code"],
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
    }
    training.model_init_kwargs = options | (training.model_init_kwargs or {})
    quantization = trl.get_quantization_config(model)
    set_seed(training.seed)  # not all releases of TRL do before they initialize an adapter
    trainer = trl.SFTTrainer(
        model=model.model_name_or_path,
        args=training,
        train_dataset=train,
        eval_dataset=target,
        peft_config=trl.get_peft_config(model),
        callbacks=[callback],
        # Older releases of TRL know no such argument: only those who ask for it need a newer one.
        **({} if quantization is None else {"quantization_config": quantization}),
    )
    return trainer, callback


def _load(
    script: Any, training: Any, mixture: TaskMixture, selection: SelectionArguments
) -> tuple[Dataset, Dataset]:
    """Training set and target."""
    if not mixture.datasets and not script.dataset_name:
        raise UsageError(
            "there is nothing to train on: give --datasets, or --dataset_name with a --task_column."
        )
    if mixture.datasets and selection.target is None and mixture.test_split_size is None:
        raise UsageError(
            "there is no target: give --target path[:split], the evaluation set whose loss is to "
            "fall; or --test_split_size, which holds out rows of all tasks."
        )

    def of_name(split: str) -> Dataset:
        return load_dataset(script.dataset_name, script.dataset_config, split=split)

    if mixture.datasets:
        train = concatenate_tasks(mixture.load(), task_column=selection.task_column)
    else:
        train = of_name(script.dataset_train_split)
    if selection.target is not None:
        entry = target_entry(
            selection.target,
            mixture,
            config=selection.target_config,
            split=script.dataset_test_split,
        )
        return train, load(entry)
    if mixture.test_split_size is not None:
        # With a seed: each process must hold out the same rows.
        parts = train.train_test_split(mixture.test_split_size, seed=training.seed)
        return parts["train"], parts["test"]
    return train, of_name(script.dataset_test_split)
